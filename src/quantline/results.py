"""Results on disk: one JSON file a stage, read back by the stages after it and by `publish`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantline.errors import UserError


def read_result(path: Path) -> dict[str, Any]:
    """Read a stage's result.

    Raises:
        UserError: it is missing or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run the stage again") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); remove it and run the stage again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no result; remove it and run the stage again")
    return value
