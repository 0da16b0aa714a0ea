"""Turns an exception into the message for the user."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from quantline.core.errors import QuantlineError, UserError
from quantline.core.files import to_be_made
from quantline.core.text import nearest
from quantline.pipeline.config import renamed
from quantline.pipeline.suggestions import choice_meant, option_meant

# A disk that fails or is missing, or a path that is something else than it should be: not a bug in Quantline.
_BROKEN_PLACES = (
    errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR,
    errno.EPERM, errno.EBUSY, errno.ELOOP, errno.EFBIG,
)  # fmt: skip


def explain(error: BaseException, conf: Path) -> tuple[str, int] | None:
    """The message and exit code for a failure that the user can fix; None for a bug, which keeps its traceback."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if isinstance(error, QuantlineError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {to_be_made(error.filename)}" if error.filename else ""
        return f"the disk is full{where}; free some space and run the stage again, nothing half written was left", 1
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return f"{to_be_made(error.filename)}: {error.strerror}; make it writable", 1
    if isinstance(error, OSError) and error.filename and error.errno in _BROKEN_PLACES:
        return (
            f"{to_be_made(error.filename)}: {error.strerror}; check the path, and that its disk is mounted",
            1,
        )
    if isinstance(error, YAMLError):  # of a file that Hydra reads
        return (
            f"not valid YAML: {' '.join(str(error).split())}; correct the file (one in variants/ can be removed: "
            "`dvc repro` makes it again)",
            2,
        )
    if isinstance(error, ValueError) and "Config group override must be" in str(error):  # Hydra's, for `evaluate=null`
        return "a group takes the name of one of its choices, such as method=gptq; see --help", 2
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_composition(error, conf), 2
    return None


def _explain_composition(error: Exception, conf: Path) -> str:
    from hydra.errors import OverrideParseException

    text = str(error)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: is not a valid override; give KEY=VALUE, such as bits=8, or 'KEY=\"VALUE\"' if the "
            "value has brackets or commas"
        )
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown.group(1)
        if now := renamed(key):
            return f"{key}: was renamed; use {now}"
        if owners := _owners(conf, key):
            group = key.partition(".")[0]
            return f"{key}: this {group} has no such option; {group}={' or '.join(owners)} has it, see --help"
        return f"{key}: no such option{option_meant(key, option_names(conf))}; see the allowed ones with --help"
    group = re.search(r"Could not find '([^']+)/([^'/]*)'", text)
    if group:
        choices = sorted(path.stem for path in (conf / group.group(1)).glob("*.yaml"))
        hint = choice_meant(group.group(2), choices)
        return f"{group.group(1)}={group.group(2)}: allowed are {', '.join(choices)}{hint}"
    primary = re.search(r"Cannot find primary config '([^']+)'", text)
    if primary:
        return _no_such_variant(primary.group(1), conf.parent)
    folder = re.search(r"Primary config directory not found.*config directory '([^']+)'", text, re.DOTALL)
    if folder:
        return f"{folder.group(1)}: no such folder of configurations; `dvc repro` makes those of the pipeline"
    return text.splitlines()[0] if text else type(error).__name__


def _no_such_variant(name: str, root: Path) -> str:
    from quantline.pipeline.compose import read_params

    try:
        known = list(read_params(root / "params.yaml")["variants"])
    except UserError as error:
        return f"{name}: no such configuration, and none can be made: {error}"
    if name in known:
        return f"{name}: was not composed yet; run `python -m stages.compose variant={name}`, or `dvc repro`"
    return f"{name}: no such configuration; params.yaml names {', '.join(known)}{nearest(name, known)}"


def _owners(conf: Path, key: str) -> list[str]:
    """The choices of a group that have an option: `method.desc_act` is an option of `gptq`."""
    import yaml

    group, *path = key.split(".")
    if not path:
        return []
    owners = []
    for choice in sorted((conf / group).glob("*.yaml")):
        value = yaml.safe_load(choice.read_text(encoding="utf-8"))
        for word in path[:-1]:
            value = value.get(word) if isinstance(value, dict) else None
        if isinstance(value, dict) and path[-1] in value:
            owners.append(choice.stem)
    return owners


def option_names(conf: Path) -> list[str]:
    """The names of all groups in conf/, and the dotted names of all options of every choice."""
    import yaml

    names: set[str] = set()

    def collect(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                name = f"{prefix}.{key}" if prefix else str(key)
                names.add(name)
                collect(name, inner)

    for path in conf.rglob("*.yaml"):
        group, text = path.relative_to(conf).parent.as_posix(), path.read_text(encoding="utf-8")
        package = re.match(r"# @package (\S+)", text)
        if not group.startswith("hydra"):
            prefix = package[1] if package else "" if group == "." else group.replace("/", ".")
            collect(prefix, yaml.safe_load(text))
            names.update({group} - {"."})
    return sorted(
        name for name in names if not name.startswith(("hydra", "defaults")) and not name.endswith(".defaults")
    )
