"""Makes a new project: a folder with everything that the pipeline reads, and a git repository with DVC in it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from quantline.core.errors import UserError
from quantline.core.files import building
from quantline.core.text import decimal_size
from quantline.lifecycle.storage.linked import prefer_reflinks
from quantline.pipeline.compose import compose_values, variant_overrides
from quantline.pipeline.config import parse
from quantline.pipeline.preflight import machine_of, variant_spec
from quantline.planning.preflight import check
from quantline.planning.spec import Model

_PACKAGE = Path(__file__).resolve().parents[1]
_GOALS = Path(__file__).with_name("goals.yaml")
# What a project holds, named as in a checkout; the wheel carries the same files in this folder of the package.
CARRIED = _PACKAGE / "_project"
PARTS = (
    "conf", "envs", "dvc.yaml", "params.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", ".dvcignore", ".gitignore",
)  # fmt: skip
DEMO = "assets"
# Evaluation and tasks read this text by default, whatever the model and the calibration are.
EVALUATION = ("assets/demo/evaluation.jsonl", "assets/demo/README.md", "assets/demo/LICENSES")


def goals() -> dict[str, dict[str, Any]]:
    """The templates of params.yaml by name, see goals.yaml: about, shared, variants (line, why)."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(_GOALS.read_text(encoding="utf-8"))
    return found


def create(to: Path, *, model: str | None = None, calibration: str | None = None, goal: str | None = None) -> None:
    """Make a project in a new or empty folder.

    Args:
        to: the folder.
        model: folder of a float model, or owner/name@COMMIT on the hub; None: the demo model.
        calibration: file of the calibration text; None: that of the demo model, or what `calibration=auto` finds.
        goal: name of a template for params.yaml; None: the demo's variants.

    Raises:
        UserError: git is not installed, the folder holds something, or model or calibration do not exist.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"to={to}: is not empty; give a new folder")
    if shutil.which("git") is None:  # before anything is made
        raise UserError("git is not installed; install it, since DVC needs it")
    if goal is not None and goal not in goals():
        raise UserError(f"goal={goal}: there are {', '.join(goals())}")
    shared = [*_model(model), *_calibration(calibration, own_model=model is not None)]
    chosen = [] if goal is None else goals()[goal]["shared"]
    line = shlex.join([*shared, *chosen])
    line = json.dumps(line, ensure_ascii=False) if re.search(r" #|: ", line) else line  # as YAML needs it
    source = _PACKAGE.parents[1] if _PACKAGE.parent.name == "src" else CARRIED
    to.parent.mkdir(parents=True, exist_ok=True)
    # An empty folder stays the same one, since it may be the shell's current folder.
    made = to / ".new" if to.exists() else to
    with building(made) as folder:
        folder.mkdir(exist_ok=True)
        for part in (*PARTS, *((DEMO,) if "model=demo" in shared or "calibration=demo" in shared else EVALUATION)):
            _copy(source / part, folder / part)
        _edit(folder / "dvc.yaml", _without_sources)
        _edit(
            folder / "params.yaml",
            lambda text: re.sub(r"(?m)^shared: .*?(?= +#|$)", lambda _: f"shared: {line}", text),
        )
        if goal is not None:
            _edit(folder / "params.yaml", partial(_with_variants, goals()[goal], {}))
        _default(folder / "conf", shared)
        float_model = _folder_of(model, source)
        if goal is not None and float_model is not None:
            planned = {name: _planned(folder, name, float_model) for name in goals()[goal]["variants"]}
            _edit(folder / "params.yaml", partial(_with_variants, goals()[goal], planned))
        prefer_reflinks(folder)
    if made != to:
        for path in list(made.iterdir()):
            path.rename(to / path.name)
        made.rmdir()
    if _git(to, "rev-parse", "--is-inside-work-tree") != 0:
        _git(to, "init", "--quiet")


def _model(given: str | None) -> list[str]:
    if given is None:
        return ["model=demo"]
    folder = Path(given).expanduser()
    if given and folder.is_dir():
        return ["model=custom", _option("model.path", folder.absolute())]
    repo, _, commit = given.partition("@")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo) and re.fullmatch(r"[0-9a-f]{40}", commit):
        return ["model=custom", f"model.repo={repo}", f"model.revision={commit}"]
    raise UserError(
        f"model={given}: is no folder and no model of the hub; give a folder, or owner/name@COMMIT with a commit of 40 hex "
        "digits"
    )


def _option(key: str, path: Path) -> str:
    """An override with a path, quoted where Hydra would read its characters otherwise."""
    text = str(path)
    return f"{key}={text if re.fullmatch('[-+./~ _0-9A-Za-z]+', text) else json.dumps(text, ensure_ascii=False)}"


def _folder_of(model: str | None, source: Path) -> Path | None:
    """The folder of the float model; None if it is on the hub."""
    if model is None:
        return source / DEMO / "demo" / "model"
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else None


def _planned(project: Path, name: str, float_model: Path) -> str:
    """What `stages.plan` says of a variant of a new project: its size, or why it cannot be made."""
    config = parse(compose_values(project / "conf", variant_overrides(project / "params.yaml", name)))
    plan = check(variant_spec(config.model_dump()), Model.open(float_model), machine_of(config, project))
    if not plan.passes("quantize", "convert"):
        return f"plan refuses it: {' '.join(plan.refused[0].reason.split())}"
    if plan.weights is None:
        return ""
    return f"here {plan.weights.bits_per_quantized_weight:.3g} bits a weight, {decimal_size(plan.weights.total)}"


def _with_variants(goal: Mapping[str, Any], planned: Mapping[str, str], text: str) -> str:
    """params.yaml with the variants of a goal, each below the reason for it. planned: what the plan says of each."""
    lines = [f"variants:  # for {goal['about']}"]
    for name, variant in goal["variants"].items():
        why = "; ".join(part for part in (variant["why"], planned.get(name)) if part)
        lines += [f"  # {why}", f"  {name}: {variant['line']}"]
    head, _, _ = re.split(r"(variants:(?: .*)?\n)", text, maxsplit=1)
    return "\n".join([head.rstrip("\n"), *lines, ""])


def _calibration(given: str | None, *, own_model: bool) -> list[str]:
    if given is None:
        return ["calibration=auto" if own_model else "calibration=demo"]
    path = Path(given).expanduser()
    if not path.is_file():
        raise UserError(f"calibration={given}: no such file; give a .jsonl, .parquet or .txt file")
    return ["calibration=jsonl", _option("calibration.path", path.absolute())]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


def _edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def _default(conf: Path, shared: Sequence[str]) -> None:
    """Make what all variants share the default of conf/, too, from which runs by hand start."""
    chosen: dict[str, str] = {}
    for override in shared:
        name, _, value = override.partition("=")
        group, _, key = name.partition(".")
        place, pattern = conf / "config.yaml", rf"(?m)^(  - {group}: )\S+"
        if key:
            place, pattern = conf / group / f"{chosen[group]}.yaml", rf"(?m)^({key}: )null"
            text = json.loads(value) if value.startswith('"') else value
            value = json.dumps(text, ensure_ascii=False).replace("${", r"\\${")  # no interpolation
        else:
            chosen[group] = value
        _edit(place, partial(re.sub, pattern, partial(_after, value)))


def _after(value: str, found: re.Match[str]) -> str:
    return f"{found[1]}{value}"


def _without_sources(text: str) -> str:
    """dvc.yaml for a project whose code is an installed package: DVC cannot watch its files, so `code` always runs."""
    kept = text.replace("    deps: [src/quantline, stages]\n", "    always_changed: true\n")
    code = yaml.safe_load(kept)["stages"]["code"]
    assert "deps" not in code, "dvc.yaml: the stage `code` depends on files that a project does not have"
    return kept


def _git(folder: Path, *arguments: str) -> int:
    try:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False).returncode
    except OSError as error:
        raise UserError("git is not installed; install it, since DVC needs it") from error
