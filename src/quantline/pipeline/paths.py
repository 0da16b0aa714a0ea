"""Where results lie on disk: one JSON file per stage beside the stage's output, read by later stages and by `publish`.

    artifacts/shared/download, artifacts/float/evaluate, artifacts/NAME/quantize      made by the pipeline
    artifacts/MODEL/shared/download, artifacts/MODEL/float/evaluate, ...              where params.yaml has `models:`
    scratch/float/MODEL/download, scratch/float/MODEL/evaluate, scratch/NAME/quantize by hand

By hand every model has a folder of its own for its download and for what the float baseline gives. No variant can be
named `float` or `shared`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.method import BASELINE
from quantline.core.errors import UserError
from quantline.core.text import nearest
from quantline.pipeline.config import Config
from quantline.pipeline.names import joined, model_of, own_name
from quantline.pipeline.stages import STAGES, baseline_overrides, is_baseline


def read_result(path: Path) -> dict[str, Any]:
    """Read a stage's result.

    Raises:
        UserError: it is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run the stage again") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); remove it and run the stage again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a result; remove it and run the stage again")
    return value


PIPELINE_HOME, MANUAL_HOME = "artifacts", "scratch"
SHARED = "shared"
# The name of a manual run begins with this, apart from the pipeline's variants; the rest is its folder below scratch/.
BY_HAND = "by-hand/"
# The configuration of a manual run, in its folder.
SAVED = "config.json"
# Folders of artifacts/ and scratch/ that are not a variant's.
_RESERVED = (SHARED, BASELINE, "report")
# Below a report's folder: its content in a form that programs read.
REPORT_MANIFEST = "data/manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
# Options that change how a stage runs on this machine, but not its output.
_RUNTIME = (
    "device",
    "toolchains",
    "tracking",
    "promote",
    "serve.process",
    "variant",
    "hydra",
    "noise",
    "sensitivity",
    "speed",
    "report",
)


@dataclass(frozen=True)
class Taken:
    """What a stage was made from: another stage's output or one file of it, of its variant or of the float baseline.

    Its name stands in a result's `inputs`, beside the hash: `quantize`, `float/evaluate`, `calibrate/tokens.safetensors`.
    """

    stage: str
    file: str | None = None
    baseline: bool = False

    def __str__(self) -> str:
        """Its name."""
        return "/".join([*([BASELINE] if self.baseline else []), self.stage, *([self.file] if self.file else [])])

    @classmethod
    def named(cls, name: str) -> Taken:
        """What a name in `inputs` stands for."""
        own = name.removeprefix(f"{BASELINE}/")
        stage, _, file = own.partition("/")
        return cls(stage, file or None, own != name)

    def content(self, result: Mapping[str, Any]) -> str | None:
        """The hash of it in the other stage's result; None if that has none."""
        found = (result.get("outputs") or {}).get(self.file) if self.file else result.get("output_hash")
        return None if found is None else str(found)


def taken(result: Mapping[str, Any]) -> dict[Taken, str]:
    """What a stage's result says that it was made from, with the hashes."""
    return {Taken.named(str(name)): str(content) for name, content in (result.get("inputs") or {}).items()}


@dataclass(frozen=True)
class StagePaths:
    """Paths of one stage of one variant."""

    output: Path

    @property
    def result(self) -> Path:
        """The stage's result, JSON."""
        return self.output.with_name(self.output.name + ".json")

    @property
    def log(self) -> Path:
        """Output of its worker or server."""
        return self.output.with_name(self.output.name + ".log")


def stage_paths(home: Path, variant: str, stage: str) -> StagePaths:
    """Paths of a stage of the pipeline below `home`, artifacts/; all variants of a model share one download."""
    shared = stage in STAGES and STAGES[stage].shared
    return StagePaths(home / (joined(model_of(variant), SHARED) if shared else variant) / stage)


def frozen_path(root: Path, name: str) -> Path:
    """The frozen configuration of a variant of params.yaml."""
    return root / "variants" / f"{name}.yaml"


def manual_paths(root: Path, config: Config, name: str, stage: str) -> StagePaths:
    """Paths of a stage that is run manually under `name`; all runs with one model share its download."""
    shared = stage in STAGES and STAGES[stage].shared
    return StagePaths(root / MANUAL_HOME / (model_folder(config) if shared else name) / stage)


def recorded(root: Path, stage: str) -> Iterator[Path]:
    """The result files of a stage: those of manual runs, then the pipeline's."""
    for pattern in (f"{MANUAL_HOME}/*", f"{MANUAL_HOME}/{BASELINE}/*", f"{PIPELINE_HOME}/*"):
        yield from sorted(root.glob(f"{pattern}/{stage}.json"))
    # Of several models; the files in the output of a stage of one model lie as deep, and can have such a name.
    deeper = root.glob(f"{PIPELINE_HOME}/*/*/{stage}.json")
    yield from sorted(path for path in deeper if path.parent.name not in STAGES)


def run_names(root: Path, *stages: str) -> list[str]:
    """The names of the runs here with a result of one of these stages, the pipeline's first."""
    folders = {path.parent.relative_to(root).as_posix() for stage in stages for path in recorded(root, stage)}
    pipeline = [name.removeprefix(f"{PIPELINE_HOME}/") for name in folders if name.startswith(f"{PIPELINE_HOME}/")]
    manual = [BY_HAND + name.removeprefix(f"{MANUAL_HOME}/") for name in folders if name.startswith(f"{MANUAL_HOME}/")]
    return [name for name in sorted(pipeline) if own_name(name) != SHARED] + sorted(manual)


def not_among(name: str, known: Sequence[str]) -> str:
    """What to say of a name that no run has: the names that there are, and the nearest."""
    if not known:
        return "there are no results yet; run `dvc repro`"
    hint = f" (did you mean {BY_HAND}{name}?)" if BY_HAND + name in known else nearest(name, list(known))
    return f"is not one of the results here, which are {', '.join(known)}{hint}"


def run_folder(root: Path, name: str) -> Path | None:
    """The folder of the run with this name, the pipeline's or a manual one; None if the name is not that of a run.

    A name means one run: `NAME` or `MODEL/NAME` is the pipeline's variant, `by-hand/NAME` the manual run.
    """
    if name.startswith(BY_HAND):
        home, parts = MANUAL_HOME, name.removeprefix(BY_HAND).removeprefix(f"{BASELINE}/")
    else:
        home, parts = PIPELINE_HOME, own_name(name)
        if model_of(name) and (not _NAME.fullmatch(model_of(name)) or model_of(name) in _RESERVED):
            return None
    return root / home / name.removeprefix(BY_HAND) if _NAME.fullmatch(parts) and parts != SHARED else None


def is_folder_name(name: str) -> bool:
    """Whether every part of a name is one that Quantline gives to a folder of artifacts/."""
    return all(_NAME.fullmatch(part) for part in name.split("/", 1))


def checked_name(name: str, place: str = "") -> str:
    """Return `name` if it is valid as the name of a variant.

    place: begins the message, in place of `variant=NAME`.

    Raises:
        UserError: it is empty, too long, has characters other than letters, digits, '_' and '-' (DVC splits at a dot), or
            is the name of something else.
    """
    what = "model" if place else "variant"
    if name in _RESERVED:
        shown = place or f"variant={name}"
        raise UserError(f"{shown}: a {what} cannot be called {name}, which is the folder of something else")
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{place or f'variant={name!r}'}: a {what}'s name takes letters, digits, '_' and '-', 80 at most"
        )
    return name


def model_folder(config: Config) -> str:
    """The folder below scratch/ of a model's download and of its float baseline: one a model and revision."""
    from quantline.data.download import model_name

    model = config.model
    options = json.dumps(model.model_dump(exclude={"name"}), sort_keys=True)
    name = _plain(model_name(model)).strip("_-")[:40] or "model"
    return f"{BASELINE}/{name}-{hashlib.sha256(options.encode()).hexdigest()[:8]}"


def manual_name(config: Config, overrides: Sequence[str]) -> str:
    """The name of a manual run, its folder below scratch/: the given one, else one from method, bits and overrides.

    Raises:
        UserError: the given name is not valid, or it is given to the float baseline.
    """
    if is_baseline(config):
        own = model_folder(config)
        if config.variant is not None:
            raise UserError(
                f"variant={config.variant}: the float baseline of a model has its own folder, {MANUAL_HOME}/{own}; leave "
                "variant out"
            )
        return _cut("-".join([own, *_named(baseline_overrides(overrides), (*_RUNTIME, "model"))]))
    return derived_name(config, overrides) if config.variant is None else checked_name(config.variant)


def derived_name(config: Config, overrides: Sequence[str]) -> str:
    """The name of a variant that is run manually: method, bits, group size, and all other overrides."""
    group = "channel" if config.group_size == -1 else f"g{config.group_size}"
    kind = getattr(config.method, "type", None)  # which says more than bits and groups
    base = f"{config.method.name}-{kind}" if kind else f"{config.method.name}-w{config.bits}-{group}"
    return _cut("-".join([base, *_named(overrides, ("method=", "method.type=", "bits=", "group_size=", *_RUNTIME))]))


def _named(overrides: Sequence[str], without: tuple[str, ...]) -> list[str]:
    """The parts of a name for the overrides that make a run another one, short and readable.

    The choice of a group, an option at the top and one of the method stand in it with a short value. All others, a path
    above all, are left to the hash that then ends the name.
    """
    plain = sorted(override.lstrip("+~") for override in overrides)
    given = sorted(plain, key=lambda override: "." in override.partition("=")[0])  # groups first
    given = [one for one in given if not f"{one.partition('=')[0]}=".startswith(without)]
    parts, exact = [], True
    for override in given:
        key, _, value = override.removeprefix("method.").partition("=")
        if "." not in key and re.fullmatch(r"[A-Za-z0-9_-]{1,16}|-?[0-9.]{1,16}", value):
            parts.append(f"{_plain(key)}-{_plain(value)}")
        else:
            exact = False
    return parts if exact else [*parts, hashlib.sha256(" ".join(given).encode()).hexdigest()[:6]]


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)


def _cut(name: str) -> str:
    head, _, tail = name.rpartition("/")
    if len(tail) > 80:
        tail = f"{tail[:70]}-{hashlib.sha256(tail.encode()).hexdigest()[:8]}"
    return f"{head}/{tail}" if head else tail
