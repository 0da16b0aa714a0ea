"""The forms of dvc.yaml: for one model, for several models with every variant, and for named pairs of both.

DVC resolves `foreach` and `matrix` before any stage runs, and cannot leave out a loop, so one dvc.yaml is not for one model
and for several (docs/decisions/0034). A form is made from another by exchanging what the loops and paths say. Comments and
a user's own stages stay, and stages of the same kind as those here are changed as these are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from quantline.core.errors import UserError
from quantline.core.files import replaced
from quantline.pipeline.model_lines import MODELS, PAIRS
from quantline.pipeline.names import file_name, joined, named_pairs

Form = Literal["one", "every", "pairs"]
FILE = "dvc.yaml"
COMMAND = "python -m stages.models"

_VARIANTS = "    foreach: ${variants}\n    do:\n"
_MATRIX = '    matrix: {model: "${models}", variant: "${variants}"}\n'
_BUILT = "    foreach: ${built}\n    do:\n"
_MODELS = "    foreach: ${models}\n    do:\n"
# What a stage of a variant says: for one model, and for several.
_OF_VARIANT = (
    ("-cp ../variants -cn ${key}", "-cp ../variants/${item.model} -cn ${item.variant}"),
    ("variant=${key}", "variant=${item.model}/${item.variant}"),
    ("variants/${key}.yaml", "variants/${item.model}/${item.variant}.yaml"),
    ('[shared, "variants.${key}"', '[shared, "models.${item.model}", "variants.${item.variant}"'),
    ("reads.${key}.", "reads.${item.model}.${item.variant}."),
    ("artifacts/${key}/", "artifacts/${item.model}/${item.variant}/"),
    ("artifacts/float/", "artifacts/${item.model}/float/"),
    ("artifacts/shared/", "artifacts/${item.model}/shared/"),
)
# What a stage says that runs once a model: the float baseline's stages, the download, the report.
_OF_MODEL = (
    ("-cp ../variants -cn float", "-cp ../variants/${key} -cn float"),
    ("variant=float", "variant=${key}/float"),
    ("variants/float.yaml", "variants/${key}/float.yaml"),
    ("[shared, baseline", '[shared, baseline, "models.${key}"'),
    ("reads.float.", "reads.${key}.float."),
    ("artifacts/float/", "artifacts/${key}/float/"),
    ("artifacts/shared/", "artifacts/${key}/shared/"),
    ('- "artifacts"', '- "artifacts/${key}"'),
    ("fleet_smoke.json", "fleet_smoke/${key}.json"),
    ('- "variants"', '- "variants/${key}"'),
    ('outs: ["report"]', 'outs: ["report/models/${key}"]'),
    ('metrics: ["metrics.json", "metrics"]', 'metrics: ["metrics/${key}"]'),
)
_OVERVIEW = """\
  overview:
    desc: Say which variant of each model to ship, in one page that leads to the report of each
    cmd: python -m stages.overview
    deps: ["report/models"]
    params: [models, code.yaml: [overview]]
    outs: ["report/index.html", "report/report.md", "report/data"]
    metrics: ["metrics.json"]    # the variant to ship, by model

"""


def form_of(text: str) -> Form | None:
    """The form that a dvc.yaml has; None where it has no stage `compose` of these forms."""
    stage = _stage(text, "compose")
    if "matrix" in stage:
        return "every"
    loops: dict[str, Form] = {"${variants}": "one", "${built}": "pairs"}
    return loops.get(str(stage.get("foreach")))


def wanted_form(content: Mapping[str, Any]) -> Form:
    """The form that params.yaml asks for. content: as `read_params` gives it."""
    if MODELS not in content:
        return "one"
    return "every" if content.get(PAIRS) is None else "pairs"


def in_form(text: str, content: Mapping[str, Any]) -> str:
    """dvc.yaml in the form that params.yaml asks for. content: of params.yaml."""
    form = wanted_form(content)
    text = _of_one(text)
    if form == "one":
        return text
    head, stages, tail = _parts(text)
    made = "".join(_of_several(block, form) for block in stages)
    built = _built(_pairs(content)) if form == "pairs" else ""
    return f"{head}{built}stages:\n{_OVERVIEW}{made}{tail}"


def rewrite(root: Path, content: Mapping[str, Any]) -> bool:
    """Bring a project's dvc.yaml into the form that params.yaml asks for; returns whether it changed.

    Raises:
        UserError: it is not of these forms, or a stage in it would not come out as YAML.
    """
    path = root / FILE
    text = _read(path)
    if form_of(text) is None:
        raise UserError(
            f"{FILE}: has no stage `compose` over the variants, so it is none of Quantline's; take that of "
            "`quantline init`"
        )
    made = in_form(text, content)
    try:
        yaml.safe_load(made)
    except yaml.YAMLError as error:
        shown = " ".join(str(error).split())
        raise UserError(
            f"{FILE}: a stage in it cannot be brought into the form for these models ({shown}); put quotes around its "
            "paths"
        ) from error
    if made != text:
        with replaced(path) as temporary:
            temporary.write_text(made, encoding="utf-8")
    return made != text


def refuse_other_form(root: Path, content: Mapping[str, Any]) -> None:
    """Refuse a dvc.yaml that is not for the models and pairs of params.yaml: DVC would build something else.

    Raises:
        UserError: it is of another form, or of other pairs, with the command that mends it.
    """
    path = root / FILE
    if not path.is_file():  # nothing that DVC runs
        return
    text, form = _read(path), wanted_form(content)
    found = form_of(text)
    said = {
        "one": "for one model", "every": "for every variant of every model", "pairs": "for named pairs of model and variant"
    }  # fmt: skip
    if found is not None and found != form:
        raise UserError(f"{FILE} is {said[found]}, and params.yaml {said[form]}; run `{COMMAND}`, then `dvc repro`")
    if form == "pairs" and _vars(text) != _pairs(content):
        raise UserError(
            f"{FILE} has other pairs of model and variant than params.yaml; run `{COMMAND}`, then `dvc repro`"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path.name}: {error.strerror}; take that of `quantline init`") from error


def _content(text: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{FILE} is not valid YAML: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def _stage(text: str, name: str) -> dict[str, Any]:
    found = (_content(text).get("stages") or {}).get(name)
    return found if isinstance(found, dict) else {}


def _vars(text: str) -> dict[str, Any]:
    found = [
        entry["built"] for entry in _content(text).get("vars") or [] if isinstance(entry, dict) and "built" in entry
    ]
    return dict(found[0]) if found else {}


def _pairs(content: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The pairs as DVC's loop reads them, by their names in DVC's stages."""
    source = {**content, "variants": content.get("own", content["variants"])}
    return {
        file_name(joined(*pair)): dict(zip(("model", "variant"), pair, strict=True)) for pair in named_pairs(source)
    }


def _built(pairs: Mapping[str, Mapping[str, str]]) -> str:
    lines = [f"      {name}: {{model: {one['model']}, variant: {one['variant']}}}" for name, one in pairs.items()]
    return "\n".join(["vars:", f"  - built:    # `pairs:` of params.yaml; `{COMMAND}` writes it", *lines, ""])


def _parts(text: str) -> tuple[str, list[str], str]:
    """What stands before the stages, each stage, and what stands behind them."""
    head, _, rest = text.partition("stages:\n")
    end = re.search(r"(?m)^(?=[^\s])", rest)
    inside, tail = (rest, "") if end is None else (rest[: end.start()], rest[end.start() :])
    return head, [block for block in re.split(r"(?m)^(?=  [\w-]+:\s*$)", inside) if block], tail


def _exchanged(text: str, pairs: Sequence[tuple[str, str]], *, back: bool = False) -> str:
    for one, several in pairs:
        text = text.replace(several, one) if back else text.replace(one, several)
    return text


def _indented(text: str, by: int) -> str:
    lines = text.splitlines(keepends=True)
    if by > 0:
        return "".join(line if not line.strip() else " " * by + line for line in lines)
    return "".join(line[-by:] if line.startswith(" " * -by) else line for line in lines)


def _split(block: str) -> tuple[str, str, str]:
    """The line that names a stage, what the stage says, and comments behind it, which are of the next one."""
    name, _, body = block.partition("\n")
    inside = re.match(r"(?:    .*\n|\n(?=    ))*", body)
    assert inside is not None
    return f"{name}\n", inside[0], body[inside.end() :]


def _of_several(block: str, form: Form) -> str:
    name, body, behind = _split(block)
    if body.startswith(_VARIANTS):
        inner = _exchanged(body.removeprefix(_VARIANTS), _OF_VARIANT)
        return name + (_MATRIX + _indented(inner, -2) if form == "every" else _BUILT + inner) + behind
    several = _exchanged(body, _OF_MODEL)
    if form == "pairs":
        several = several.replace('"models.${key}", variants,', '"models.${key}", variants, pairs,')
    return block if several == body else name + _MODELS + _indented(several, 2) + behind


def _of_one(text: str) -> str:
    head, stages, tail = _parts(text)
    head = re.sub(r"(?m)^vars:\n  - built:.*\n(?:      .*\n)+", "", head)
    return f"{head}stages:\n{''.join(_back(stages))}{tail}"


def _back(stages: Sequence[str]) -> Iterator[str]:
    for block in stages:
        name, body, behind = _split(block)
        if name == "  overview:\n":
            continue
        if body.startswith(_MATRIX):
            inner = _indented(body.removeprefix(_MATRIX), 2)
            yield name + _VARIANTS + _exchanged(inner, _OF_VARIANT, back=True) + behind
        elif body.startswith(_BUILT):
            yield name + _VARIANTS + _exchanged(body.removeprefix(_BUILT), _OF_VARIANT, back=True) + behind
        elif body.startswith(_MODELS):
            inner = _indented(body.removeprefix(_MODELS), -2).replace(", variants, pairs,", ", variants,")
            yield name + _exchanged(inner, _OF_MODEL, back=True) + behind
        else:
            yield block
