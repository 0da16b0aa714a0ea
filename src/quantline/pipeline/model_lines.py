"""The block `models:` of params.yaml: a line of overrides for each model, beside `variants:`.

Every model is built with every variant, or with those that `pairs:` names as MODEL/VARIANT. What contradicts this is
refused before anything is composed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantline.core.errors import ConfigError
from quantline.core.text import nearest
from quantline.pipeline.names import all_names, file_name, joined, named_pairs
from quantline.pipeline.overrides import key_of, split
from quantline.pipeline.paths import BY_HAND, checked_name
from quantline.pipeline.stages import STAGES

MODELS, PAIRS = "models", "pairs"


def variant_lines(content: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Every variant of params.yaml, the float baselines included, by its whole name -> its own line.

    Args:
        content: of params.yaml; `variants` is a mapping.
        file: its name, for messages.

    Raises:
        ConfigError: every contradiction between models, variants and pairs, with the remedy.
        UserError: a line is not text.
    """
    if faults := list(_faults(content, file)):
        raise ConfigError(faults)
    own = {str(name): line for name, line in content["variants"].items()}
    return {name: own.get(name.rpartition("/")[2], content.get("baseline")) for name in all_names(content)}


def _faults(content: Mapping[str, Any], file: str) -> Iterator[str]:
    models, pairs = content.get(MODELS), content.get(PAIRS)
    if MODELS not in content:
        if pairs is not None:
            yield f"{file}: `{PAIRS}:` names models, but there is no `{MODELS}:`; remove it, or name the models"
        return
    if not isinstance(models, Mapping) or not models:
        yield (
            f"{file}: `{MODELS}:` needs a mapping of names to overrides, such as `qwen: model=custom model.path=DIR`; for "
            "one model leave it out, and set the model in `shared:`"
        )
        return
    variants = list(map(str, content["variants"]))
    for name, line in models.items():
        yield from _of_model(str(name), split(line, f"{file}: {MODELS}.{name}"), variants, file)
    places = {f"variants.{name}": line for name, line in content["variants"].items()}
    for place, line in {"baseline": content.get("baseline"), **places}.items():
        setting = [one for one in split(line, f"{file}: {place}") if _sets(one, "model")]
        if setting:
            yield f"{file}: {place}: {setting[0]} sets the model, which the lines of `{MODELS}:` do; write it there"
    yield from (
        f"{file}: variants.{name}: is the name of a stage; give it another name" for name in variants if name in STAGES
    )
    yield from _of_pairs(content, file)


def _of_model(name: str, line: list[str], variants: list[str], file: str) -> Iterator[str]:
    place = f"{file}: {MODELS}.{name}"
    if name in variants:
        yield f"{place}: a variant has this name, too; give the model another one"
    elif name in STAGES or name == BY_HAND.rstrip("/"):
        yield f"{place}: is the name of something else; give the model another one"
    else:
        checked_name(name, place)
    if not any(_sets(one, "model") for one in line):
        yield f"{place}: sets no model; write which it is, such as model=custom model.path=DIR"
    if method := next((one for one in line if _sets(one, "method")), None):
        yield f"{place}: {method} describes a variant; write it in a line of `variants:`"


def _sets(override: str, group: str) -> bool:
    return key_of(override).partition(".")[0] == group


def _of_pairs(content: Mapping[str, Any], file: str) -> Iterator[str]:
    models, pairs = list(map(str, content[MODELS])), content.get(PAIRS)
    variants = [*map(str, content["variants"])] or ["NAME"]
    if pairs is not None:
        place, seen = f"{file}: {PAIRS}", set()
        if not isinstance(pairs, list) or not pairs:
            yield f"{place}: needs a list of MODEL/VARIANT; leave it out for every pair"
            return
        for pair in map(str, pairs):
            model, slash, variant = pair.partition("/")
            if not slash:
                yield f"{place}: {pair} is no pair; give MODEL/VARIANT, such as {models[0]}/{variants[0]}"
                continue
            if pair in seen:
                yield f"{place}: {pair} stands there twice; keep one"
            seen.add(pair)
            for kind, name, known in (
                (MODELS, model, models),
                ("variants", variant, variants),
            ):
                if name not in known:
                    yield f"{place}: {pair}: `{kind}:` has no {name}; it has {', '.join(known)}{nearest(name, known)}"
        built = named_pairs(content)
        yield from (
            f"{place}: none is of {model}; name one, or remove {MODELS}.{model}"
            for model in models
            if not any(model == of for of, _ in built)
        )
    # DVC's names of stages join the two by a hyphen.
    keys: dict[str, str] = {}
    for name in (joined(*pair) for pair in named_pairs(content)):
        if other := keys.get(file_name(name)):
            yield f"{file}: {other} and {name}: DVC would call both {file_name(name)}; give one of them another name"
        keys[file_name(name)] = name
