"""dvc.lock: which outputs belong to the variants. All other modules read it through this one, as a file, since `verify` and
`backup` must work where DVC refuses to.

DVC 3.67 writes dvc.lock in place. Whoever reads it meanwhile, or after DVC was killed there, sees the first stages alone,
often as valid YAML. So it is read under DVC's lock, and compared with the results that lie in artifacts/.
"""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.method import BASELINE
from quantline.core.errors import UserError
from quantline.core.files import alive
from quantline.pipeline.dvc_config import dvc_config
from quantline.pipeline.names import all_names, dvc_stage, file_name, is_baseline_name, joined, model_of
from quantline.pipeline.paths import SHARED, stage_paths
from quantline.pipeline.stages import PIPELINE, STAGES

MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
REPAIR = "run `dvc repro`, which takes what has run before from its run cache"
_NOTHING_WRITES = (errno.EACCES, errno.EROFS)
_held: set[Path] = set()


@dataclass(frozen=True)
class Output:
    """One output in dvc.lock. stage: its stage's name there. path: relative to the checkout. md5: of its object."""

    stage: str
    path: str
    md5: str

    @property
    def variant(self) -> str:
        """Its variant, from its path; of several models with the model, such as `qwen/awq-w4` or `qwen/shared`."""
        home, *parts = Path(self.path).parts
        if home == "artifacts":
            return "/".join(parts[:-1])
        return "/".join(parts).removesuffix(".yaml") if parts else self.path


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Hold DVC's lock on a checkout, so that no `dvc` command writes dvc.lock or the cache; it may be nested.

    A `dvc repro` gives it back while a stage's command runs, and fails where it cannot have it again within 3 seconds.

    Raises:
        UserError: a `dvc` command has it.
    """
    from dvc.lock import LockError, make_lock

    own = root.resolve() / ".dvc"
    if own in _held or not own.is_dir():
        yield
        return
    temporary = own / "tmp"
    logging.getLogger("zc.lockfile").setLevel(logging.CRITICAL)  # it logs every attempt
    try:
        temporary.mkdir(exist_ok=True)
        hardlink = dvc_config(root)["core"].get("hardlink_lock", False)
        lock = make_lock(str(temporary / "lock"), tmp_dir=str(temporary), hardlink_lock=hardlink)
        lock.lock()
    except LockError as error:
        raise UserError(f"{root}: a `dvc` command is working here; run this again when it has ended") from error
    except OSError as error:
        if error.errno not in _NOTHING_WRITES:
            raise
        yield  # the checkout is read-only, for DVC as well
        return
    _held.add(own)
    try:
        yield
    finally:
        _held.discard(own)
        lock.unlock()


def refuse_running(root: Path) -> None:
    """Refuse while DVC runs a stage here; call it inside `held`.

    Raises:
        UserError: a living process makes outputs, by DVC's own list; the message has its number.
    """
    path = root / ".dvc" / "tmp" / "rwlock"
    try:
        writers = json.loads(path.read_text(encoding="utf-8")).get("write", {}).values()
        running = sorted({(int(one["pid"]), str(one["cmd"])) for one in writers})
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); if no `dvc` command runs here, remove it") from error
    for pid, command in running:
        if alive(pid):
            raise UserError(
                f"{root}: a `dvc` command makes outputs here (process {pid}: {command}); run this again when it has ended. "
                f"If process {pid} is another program, remove {path}"
            )


def read_lock(root: Path) -> list[Output]:
    """The outputs in dvc.lock, in its order. Outputs of variants that were removed from params.yaml are left out.

    Raises:
        UserError: dvc.lock is missing or malformed, or a `dvc` command is working.
    """
    known = _Known.of(root)
    return [output for output in _locked(root) if known is None or known.has(output.stage)]


def former_outputs(root: Path) -> list[Output]:
    """The outputs in dvc.lock of variants that were removed from params.yaml; they may still be here.

    Raises:
        UserError: dvc.lock is missing or malformed, or a `dvc` command is working.
    """
    known = _Known.of(root)
    return [output for output in _locked(root) if not known.has(output.stage)] if known is not None else []


def stage_keys(name: str) -> dict[str, str]:
    """The pipeline's stages of a variant -> their names in dvc.lock, in order; the download, which all share, too.

    Of the float baseline DVC runs those that variants are compared with; its speed is measured beside each variant's.
    """
    baseline = is_baseline_name(name)
    return {
        stage: dvc_stage(stage, name, shared=STAGES[stage].shared)
        for stage in PIPELINE if not baseline or STAGES[stage].shared or STAGES[stage].beside_float
    }  # fmt: skip


def lacking(root: Path) -> dict[str, str]:
    """The stages, as DVC names them, whose result is in artifacts/, but which are not or not whole in dvc.lock -> variant.

    Raises:
        UserError: dvc.lock is missing or malformed, or a `dvc` command is working.
    """
    locked, here = locked_outs(root), root / "artifacts"
    known = _Known.of(root)
    names = known.names if known else [BASELINE, *sorted(path.name for path in here.glob("*"))]
    return {
        key: joined(model_of(name), SHARED) if STAGES[stage].shared else name
        for name in names for stage, key in stage_keys(name).items()
        if (paths := stage_paths(here, name, stage)).result.is_file()
        and not {root / out["path"] for out in locked.get(key, [])}.issuperset([paths.output, paths.result])
    }  # fmt: skip


def require_whole(root: Path) -> None:
    """Refuse a dvc.lock that was cut off, or that DVC could not write any more.

    Raises:
        UserError: a stage is lacking in it; dvc.lock is missing or malformed, or a `dvc` command is working.
    """
    if stages := lacking(root):
        raise UserError(
            f"dvc.lock does not have {', '.join(stages)}, although artifacts/ has the results: it was cut off, or DVC did "
            f"not end there; {REPAIR}"
        )


def locked_outs(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The outputs of every stage as in dvc.lock: stage -> [{"path", "md5", "size", ...}].

    Raises:
        UserError: dvc.lock is missing or malformed, or a `dvc` command is working.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with held(root):
            text = (root / "dvc.lock").read_text(encoding="utf-8")
        content = yaml.load(text, loader)  # noqa: S506 - a safe one
        found = {str(stage): list(entry.get("outs") or []) for stage, entry in (content.get("stages") or {}).items()}
        outs = [out for of_stage in found.values() for out in of_stage]
        if not text.endswith("\n") or not all(out["path"] and MD5.fullmatch(str(out["md5"])) for out in outs):
            raise KeyError("path or md5")
    except OSError as error:
        raise UserError(f"dvc.lock: {error.strerror}; `dvc repro` makes it") from error
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            "dvc.lock is damaged; take it from git (`git checkout dvc.lock`), or remove it, and run `dvc repro`"
        ) from error
    return found


def _locked(root: Path) -> list[Output]:
    return [
        Output(stage, str(out["path"]), str(out["md5"])) for stage, outs in locked_outs(root).items() for out in outs
    ]


@dataclass(frozen=True)
class _Known:
    """What params.yaml names. names: of the variants, with each model's baseline. models: empty where there is one."""

    names: list[str]
    models: frozenset[str]

    @classmethod
    def of(cls, root: Path) -> _Known | None:
        """From a checkout; None if params.yaml cannot be read."""
        import yaml

        try:
            content = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
            _ = content["variants"].items()
            return cls(all_names(content), frozenset(map(str, content.get("models") or ())))
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
            return None

    def has(self, key: str) -> bool:
        """Whether the pipeline of these variants has a stage that DVC calls so."""
        stage, _, of = key.partition("@")
        once = stage.removesuffix("_baseline") == stage and stage not in (
            *PIPELINE,
            "report",
            "fleet_smoke",
        )  # `code`, `inputs`, ...
        if not of:
            return once or not self.models
        return of in self.models or of in {file_name(name) for name in self.names}
