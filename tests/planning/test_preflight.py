from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import product
from types import SimpleNamespace

import pytest
from tiny_quantized import write_float

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.linears import planned
from quantline.checkpoints.quantization_config import quantization_of
from quantline.core.errors import UserError
from quantline.pipeline.preflight import before_quantize, method_defaults
from quantline.planning import layouts
from quantline.planning.nearest import nearest
from quantline.planning.preflight import check
from quantline.planning.recommend import candidates, recommend
from quantline.planning.spec import Model, Place, Planned, RefusedError
from quantline.serving.memory import GIB
from quantline.serving.rules import Target, facts_of
from quantline.toolchains.workers.quantizers import native

ORDER = {"awq": ["autoawq"], "gptq": ["auto_gptq"], "rtn": ["native"]}
CPU = Target("vllm", "0.32.0", "cpu", instructions="avx512")
GPU = Target("vllm", "0.32.0", "cuda", compute_capability=90)
HERE, THERE = Place(CPU, ORDER), Place(GPU, ORDER)


@pytest.fixture(scope="module")
def defaults(root):
    return {name: options for name, options in method_defaults(root).items() if name in ORDER}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model.open(write_float(tmp_path_factory.mktemp("m") / "model", layers=2), "tiny")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return Model.open(write_float(tmp_path_factory.mktemp("m") / "untied", tied=False), "untied")


@pytest.fixture
def variant(defaults):
    def build(method, bits=4, group_size=128, **changes):
        own = {key: changes.pop(key) for key in tuple(changes) if key in defaults[method]}
        return Planned(method, bits, group_size, {**defaults[method], **own}, **changes)

    return build


@pytest.fixture
def checked(variant, model):
    return lambda method, changes, place: check(variant(method, **changes), model, place)


@pytest.fixture
def nearest_here(variant, model, defaults):
    return lambda method, **changes: nearest(variant(method, **changes), model, HERE, defaults)


def against(plan):
    return [(finding.step, finding.id) for finding in plan.refused]


def test_a_good_variant_has_nothing_against_it_and_its_sizes(variant, model):
    plan = check(variant("awq"), model, HERE)
    assert (plan.backend, plan.layout, plan.findings) == ("autoawq", "awq_gemm", ())
    assert plan.weights.total < plan.weights.float_source
    assert plan.kv_bytes == 4096 * plan.kv.bytes_per_token
    assert plan.peak.total > plan.peak.model > 0


@pytest.mark.parametrize(
    ("method", "changes", "where", "expected"),
    [
        ("gptq", {"bits": 8}, HERE, [("serve", "gptq-cpu-bits")]),
        ("gptq", {"bits": 8}, THERE, []),
        ("gptq", {"sym": False}, THERE, [("serve", "gptq-asymmetric")]),
        ("gptq", {"desc_act": True}, THERE, [("serve", "gptq-grouped-desc-act")]),
        ("gptq", {"desc_act": True, "group_size": -1}, THERE, []),
        ("gptq", {"group_size": 256}, THERE, [("serve", "gptq-group-size")]),
        ("gptq", {"serve_dtype": "float32"}, HERE, [("serve", "quantized-float32")]),
        ("gptq", {"group_size": 1024}, HERE, [("quantize", "group-size")]),
        ("gptq", {"backend": "autoawq"}, HERE, [("quantize", "backend")]),
        ("gptq", {"rules": ({"match": "*.q_proj", "skip": True},)}, HERE, [("serve", "fused-layers-differ")]),
        ("gptq", {"rules": ({"match": "*.down_proj", "skip": True},)}, HERE, []),
        ("gptq", {"rules": ({"match": "*.nothing", "skip": True},)}, HERE, [("quantize", "layers")]),
        ("rtn", {"rules": ({"match": "*.mlp.*", "bits": 8},)}, HERE, [("serve", "gptq-cpu-bits")]),
        ("rtn", {"rules": ({"match": "*.mlp.*", "bits": 8},)}, THERE, []),
        ("rtn", {"lm_head": True}, THERE, [("quantize", "layers")]),
        ("rtn", {"bits": 8, "convert": "awq"}, THERE, [("convert", "layout")]),
        ("rtn", {"bits": 8, "convert": "compressed_tensors"}, HERE, [("serve", "compressed-tensors-cpu-bits")]),
        ("awq", {"version": "gemv"}, HERE, []),
        ("awq", {"version": "gemv", "convert": "keep"}, HERE, [("serve", "awq-layout")]),
        ("awq", {"zero_point": False}, HERE, []),
        ("awq", {"tensor_parallel_size": 3}, THERE, [("serve", "tensor-parallel-heads")]),
        ("awq", {"group_size": 256, "tensor_parallel_size": 2}, THERE, [("serve", "tensor-parallel-groups")]),
        ("awq", {"serve_dtype": "bfloat16"}, Place(Target("vllm", "0.32.0", "cuda", compute_capability=75), ORDER),
         [("serve", "gpu-bfloat16")]),
        ("awq", {}, Place(Target("vllm", "0.32.0", "cuda", compute_capability=70), ORDER), [("serve", "gpu-capability")]),
        ("awq", {}, Place(Target("vllm", "0.32.0", "cpu", instructions="avx2"), ORDER),
         [("serve", "cpu-int4-needs-avx512")]),
        ("awq", {}, Place(CPU, ORDER, memory_bytes=2**20), [("memory", "memory")]),
    ],
)  # fmt: skip
def test_what_is_refused_and_where(checked, method, changes, where, expected):
    assert against(checked(method, changes, where)) == expected


def test_the_nearest_variant_of_every_refused_one_is_not_refused(variant, model, defaults):
    """Parsed back from its overrides: what is printed is what was checked."""
    refused = 0
    options = {
        "gptq": ({}, {"sym": False}, {"desc_act": True}),
        "rtn": ({}, {"sym": False}),
        "awq": ({}, {"version": "gemv"}),
    }
    for method, bits, size, convert, place in product(
        ORDER, (2, 3, 4, 8), (-1, 128, 512), ("auto", "keep", "awq"), (HERE, THERE)
    ):
        for own in options[method]:
            asked = variant(method, bits, size, convert=convert, **own)
            if check(asked, model, place).passes():
                continue
            refused += 1
            found = nearest(asked, model, place, defaults)
            assert found is not None, asked
            words = dict(word.split("=") for word in found.split())
            name = words.pop("method")
            values = {key.removeprefix("method."): json.loads(value) if value in ("true", "false", "null") else value
                      for key, value in words.items() if key.startswith("method.")}  # fmt: skip
            again = variant(
                name, int(words.get("bits", 4)), int(words.get("group_size", 128)),
                convert=words.get("convert.target", convert), **values,
            ) if name != "float" else Planned("float")  # fmt: skip
            assert check(again, model, place).passes(), (asked, found)
    assert refused > 100


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("gptq", {"bits": 8}, "method=gptq bits=4 group_size=128"),
        ("gptq", {"bits": 4, "sym": False}, "method=gptq bits=4 group_size=128"),
        ("gptq", {"group_size": 256}, "method=gptq bits=4 group_size=128"),
        ("rtn", {"sym": False, "bits": 8}, "method=rtn bits=4 group_size=128 method.sym=false"),
        ("rtn", {"lm_head": True}, "method=rtn bits=4 group_size=128 lm_head=float"),
        ("gptq", {"serve_dtype": "float32"}, "method=gptq bits=4 group_size=128 serve.dtype=bfloat16"),
        ("rtn", {"rules": ({"match": "*.q_proj", "bits": 8},)}, "method=rtn bits=4 group_size=128 layers=uniform"),
    ],
)
def test_the_nearest_variant_changes_little(nearest_here, method, changes, expected):
    assert nearest_here(method, **changes) == expected


def test_before_quantizing_what_the_server_refuses_is_a_note_unless_it_must_serve(variant, model, defaults):
    eight = variant("gptq", 8)
    (note,) = before_quantize(eight, model, HERE, must_serve=False, defaults=defaults)
    assert "GPTQ with 4 bits only" in note
    with pytest.raises(RefusedError, match="the nearest that works: method=gptq bits=4 group_size=128") as caught:
        before_quantize(eight, model, HERE, must_serve=True, defaults=defaults)
    assert caught.value.exit_code == 2
    with pytest.raises(RefusedError, match="does not divide the in-features"):
        before_quantize(variant("gptq", 4, 1024), model, HERE, must_serve=False, defaults=defaults)


def test_a_quantized_model_is_refused_as_a_source(tmp_path):
    folder = write_float(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="quantized already"):
        Model.open(folder)


@pytest.mark.parametrize("bits_and_sym", [(4, True), (8, True), (4, False), (3, False)])
@pytest.mark.parametrize("rules", [(), ({"match": "*.mlp.*", "bits": 8},), ({"match": "*.down_proj", "skip": True},)])
def test_the_config_that_is_foreseen_says_the_same_as_the_one_that_is_written(
    variant, model, tmp_path, bits_and_sym, rules
):
    bits, sym = bits_and_sym
    asked = variant("rtn", bits, 64, sym=sym, rules=rules)
    plan = check(asked, model, HERE)
    widths = planned(model.checkpoint, model.config, bits=bits, group_size=64, rules=rules)
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
    widths = planned(untied.checkpoint, untied.config, bits=4, group_size=64, lm_head=True)
    job = {
        "model": str(untied.checkpoint.folder), "output": str(tmp_path), "bits": 4, "group_size": 64,
        "options": {"sym": True}, "linears": {name: asdict(width) for name, width in widths.items()},
    }  # fmt: skip
    native.run(job, lambda *_: None)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["lm_head"] is layouts.described("gptq", asked, widths, ())["lm_head"] is True


def test_gpus_share_weights_and_cache_and_copy_what_heads_cannot_be_shared(variant, model):
    one, two, four = (check(variant("awq", tensor_parallel_size=size), model, THERE) for size in (1, 2, 4))
    assert one.serving_bytes() == one.weights.total + one.kv_bytes + one.overhead_bytes
    assert two.serving_bytes() - two.overhead_bytes == -(-one.weights.total // 2) + one.kv_bytes // 2
    assert four.serving_bytes() - four.overhead_bytes == -(-one.weights.total // 4) + one.kv_bytes // 2  # 2 such heads


def test_a_server_that_is_given_too_small_a_share_is_told_which_would_do(variant, model):
    given = Place(GPU, ORDER, memory_bytes=2 * GIB, utilization=0.25)
    (note,) = check(variant("awq"), model, given).findings
    assert (note.id, note.refused) == ("memory-share", False)
    share = float(note.remedy.partition("gpu_memory_utilization=")[2].split()[0])
    assert check(variant("awq"), model, replace(given, utilization=share)).findings == ()


def test_quantizing_beyond_the_memory_is_a_note(variant, model):
    (note,) = check(variant("awq"), model, replace(HERE, quantizer_bytes=2**20)).findings
    assert (note.id, note.step, note.refused) == ("quantization-memory", "quantize", False)


def best(model, place, defaults, *, critical=False, **asked):
    return recommend(
        Planned("awq", options=defaults["awq"], **asked), model, place, critical=critical, defaults=defaults
    )


def test_critical_use_on_a_gpu_gets_8_bits_and_other_use_4(model, defaults):
    roomy = Place(GPU, ORDER, memory_bytes=24 * GIB)
    assert best(model, roomy, defaults, critical=True).best.overrides == "method=gptq bits=8 group_size=128"
    assert best(model, roomy, defaults).best.overrides == "method=awq bits=4 group_size=128"


def test_where_8_bits_do_not_serve_critical_use_stays_float(model, defaults):
    found = best(model, Place(CPU, ORDER, memory_bytes=24 * GIB), defaults, critical=True)
    assert found.best.overrides == "method=float"
    assert all(choice.tier != 1 or not choice.works for choice in found.choices)


def test_groups_are_made_smaller_where_gpus_would_cut_them(untied, tmp_path, defaults):
    odd = Model.open(write_float(tmp_path / "odd", inner=384), "odd")
    found = best(odd, Place(GPU, ORDER, memory_bytes=24 * GIB), defaults, critical=True, tensor_parallel_size=2)
    assert found.best.overrides == "method=gptq bits=8 group_size=64"


def test_where_nothing_fits_nothing_is_recommended_and_each_says_why(model, defaults):
    found = best(model, Place(GPU, ORDER, memory_bytes=2**20), defaults, critical=True)
    assert found.best is None
    assert all(choice.against for choice in found.choices)


def test_critical_use_never_gets_less_than_4_bits(model, defaults):
    # A server that takes everything, by a version without rules.
    found = best(model, Place(Target("vllm", "9.0", "cpu"), ORDER), defaults, critical=True)
    assert [choice.tier for choice in found.choices if choice.works][:1] == [1]
    assert not any(choice.tier > 2 for choice in found.choices[:3])


def test_what_was_measured_is_told_before_what_was_published(model, defaults):
    place, known = Place(GPU, ORDER, memory_bytes=24 * GIB), {("gptq", 8, 128): "measured here: perplexity +0.10 % (x)"}
    asked = Planned("awq", options=defaults["awq"])
    found = recommend(asked, model, place, critical=True, defaults=defaults, measured=known)
    assert found.best.measured == known["gptq", 8, 128]


def test_every_candidate_has_a_tier_and_says_what_is_known_of_its_loss():
    assert {entry["tier"] for entry in candidates()} == set(range(5))
    assert all(entry["loss"] for entry in candidates())


def test_a_conversion_is_foreseen_as_it_is_chosen():
    from quantline.checkpoints.layouts import LAYOUTS
    from quantline.conversion.convert import choose_layout

    for layout, target, symmetric in product(
        ("awq_gemm", "awq_gemv", "gptq", "gptq_v2", "compressed_tensors"),
        ("auto", "keep", "awq", "gptq"),
        (True, False),
    ):
        source = SimpleNamespace(layout=LAYOUTS[layout], layers={}, kind="pipeline")
        found = layouts.converted(layout, target, symmetric=symmetric)
        assert found == choose_layout(target, source, symmetric).name, (layout, target, symmetric)
