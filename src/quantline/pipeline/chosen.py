"""How a variant's line was chosen: the losses of its units, and the search that found it.

A command that writes a variant into params.yaml (`apply=NAME`) keeps this as artifacts/shared/chosen/NAME.json, beside the
pipeline's results, where the report finds it. It belongs to that line: of an edited one nothing is shown.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.pipeline.paths import SHARED

_FOLDER = "chosen"


def keep(
    home: Path, name: str, line: Sequence[str], losses: Mapping[tuple[str, int], float], *, group_size: int,
    search: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Keep how a variant was chosen.

    Args:
        home: artifacts/.
        name: of the variant.
        line: its own overrides in params.yaml.
        losses: nats per token by unit and width, see `stages.sensitivity`.
        group_size: of the grids that were measured; -1 is one group a row.
        search: what `stages.search` found; None for another command.
    """
    units = [{"unit": unit, "bits": bits, "kl": kl} for (unit, bits), kl in losses.items()]
    path = _path(home, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"line": list(line), "group_size": group_size, "units": units, "search": search})


def kept(home: Path, name: str, overrides: str) -> dict[str, Any]:
    """How a variant was chosen: `line`, `group_size`, `units` (rows of `unit`, `bits`, `kl`) and `search`.

    Empty if that is not known, or if its line is another one now.

    Args:
        home: artifacts/.
        name: of the variant.
        overrides: those that made it, the shared ones first.

    Raises:
        UserError: the file cannot be read.
    """
    path = _path(home, name)
    if not path.is_file():
        return {}
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        line = list(found["line"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it") from error
    return found if shlex.split(overrides)[-len(line) :] == line else {}


def _path(home: Path, name: str) -> Path:
    return home / SHARED / _FOLDER / f"{name}.json"
