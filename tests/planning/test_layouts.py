from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product
from types import SimpleNamespace

import pytest
from places import HERE

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.linears import select_linears
from quantline.checkpoints.quantization_config import quantization_of
from quantline.planning import layouts
from quantline.planning.preflight import check
from quantline.serving.rules import facts_of
from quantline.toolchains.workers.quantizers import native


@pytest.mark.parametrize("bits_and_sym", [(4, True), (8, True), (4, False), (3, False)])
@pytest.mark.parametrize("rules", [(), ({"match": "*.mlp.*", "bits": 8},), ({"match": "*.down_proj", "skip": True},)])
def test_the_config_that_is_foreseen_says_the_same_as_the_one_that_is_written(
    variant, model, tmp_path, bits_and_sym, rules
):
    bits, sym = bits_and_sym
    asked = variant("rtn", bits, 64, sym=sym, rules=rules, convert="keep")
    plan = check(asked, model, HERE)
    widths = select_linears(model.checkpoint, model.config, bits=bits, group_size=64, rules=rules)
    job = {
        "model": str(model.checkpoint.folder), "output": str(tmp_path), "bits": bits, "group_size": 64,
        "options": {"sym": sym}, "linears": {name: asdict(width) for name, width in widths.items()},
    }  # fmt: skip
    native.run(job, lambda *_: None)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    layout = layouts.written("native", "rtn", asked.options, widths, symmetric=sym)
    skipped = [name for name in model.shapes if name not in widths]
    foreseen = layouts.described(layout, asked, widths, skipped)
    assert facts_of(foreseen) == facts_of(written)
    assert quantization_of(tmp_path).layout == layout
    made = Checkpoint.open(tmp_path)
    assert plan.weights.total == sum(made.info(name).nbytes for name in made.names)


def test_a_quantized_head_is_named_in_the_config_that_is_foreseen_and_written(variant, untied, tmp_path):
    asked = variant("rtn", 4, 64, lm_head=True)
    assert check(asked, untied, HERE).passes()
    widths = select_linears(untied.checkpoint, untied.config, bits=4, group_size=64, lm_head=True)
    job = {
        "model": str(untied.checkpoint.folder), "output": str(tmp_path), "bits": 4, "group_size": 64,
        "options": {"sym": True}, "linears": {name: asdict(width) for name, width in widths.items()},
    }  # fmt: skip
    native.run(job, lambda *_: None)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["lm_head"] is layouts.described("gptq", asked, widths, ())["lm_head"] is True


def test_a_conversion_is_foreseen_as_it_is_chosen():
    from quantline.checkpoints.layouts import LAYOUTS
    from quantline.conversion.convert import choose_layout

    for layout, target, symmetric, width, reordered in product(
        ("awq_gemm", "awq_gemv", "gptq", "gptq_v2", "compressed_tensors"),
        ("auto", "keep", "awq", "gptq"),
        (True, False),
        (LinearSpec(4, 128), LinearSpec(3, 128), LinearSpec(4, 256), LinearSpec(8, -1)),
        (True, False),
    ):
        layers = {"a": SimpleNamespace(bits=width.bits, group_size=width.group_size)}
        info = SimpleNamespace(desc_act=reordered)
        source = SimpleNamespace(layout=LAYOUTS[layout], layers=layers, kind="pipeline", info=info)
        grouped = reordered and width.group_size != -1
        found = layouts.converted(layout, target, symmetric=symmetric, widths={"a": width}, reordered=grouped)
        assert found == choose_layout(target, source, symmetric).name, (layout, target, symmetric, width)
