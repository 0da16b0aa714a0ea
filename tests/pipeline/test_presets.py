"""Every choice of every group of conf/, and every pair of them: valid, or refused with a reason; and what a model takes."""

from __future__ import annotations

from contextlib import suppress
from itertools import combinations

import pytest

from quantline.config.context import model_faults
from quantline.core.errors import ConfigError
from quantline.pipeline.config import parse
from quantline.quantization.capabilities import CALIBRATED

# What a choice needs beside it.
WITH = {
    "jsonl": ["calibration.path=x.jsonl"], "custom": ["model.path=x"], "c4": ["evaluate.path=x"],
    "wikitext2": ["evaluate.path=x"], "wikitext2_word": ["evaluate.path=x"],
}  # fmt: skip


@pytest.fixture(scope="module")
def sections(root, composed):
    """The section of every choice, by group and choice; groups whose options lie in another section are left out."""
    found = {}
    for path in sorted((root / "conf").glob("*/*.yaml")):
        group = path.parent.name
        if group not in ("hydra", "instruments", "source"):
            found[group, path.stem] = composed(f"{group}={path.stem}", *WITH.get(path.stem, ()))[group]
    assert len(found) > 30
    return found


def test_every_choice_of_every_group_composes_into_a_valid_configuration(root, composed):
    choices = [
        (group.name, path.stem)
        for group in sorted((root / "conf").iterdir())
        if group.is_dir() and group.name != "hydra"
        for path in sorted(group.glob("*.yaml"))
    ]
    assert len(choices) >= 20
    for group, choice in choices:
        extra = {"jsonl": ["calibration.path=x.jsonl"], "custom": ["model.path=x"]}.get(choice, [])
        extra += ["method=rtn"] if group == "layers" else []
        extra += ["source.path=x"] if group == "source" and choice != "pipeline" else []
        config = parse(composed(f"{group}={choice}", *extra))
        assert config.threads >= 1, (group, choice)


def test_no_pair_of_choices_contradicts_itself_but_methods_that_know_one_number_of_bits(sections, composed):
    base, tried = composed(), 0
    for (one, first), (other, second) in combinations(sections, 2):
        if one == other:
            continue
        values = {**base, one: sections[one, first], other: sections[other, second]}
        tried += 1
        # Rules of layers need a method with those numbers of bits: AWQ, the default, has 4 only.
        if "attention8_mlp4" in (first, second):
            with suppress(ConfigError):
                parse(values)
            continue
        config = parse(values)
        assert config.serve.length > config.evaluate.fitted().lengths[0] or config.evaluate.mode == "documents"
        # The demo's own model takes 1024 tokens; what any preset asks, a model of 4096 and one token takes.
        assert model_faults(config, 4097, calibrated=config.method.name in CALIBRATED) == []
    assert tried > 400
