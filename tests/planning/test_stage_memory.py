"""Planned memory of stages, held against what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from places import CPU, GPU, HERE, ORDER

from quantline.checkpoints.safetensors_stream import TensorSpec, streamed
from quantline.planning.preflight import check
from quantline.planning.spec import Machine, Model, VariantSpec, Work
from quantline.planning.stage_memory import stage_needs, too_large

GB = 1e9


@pytest.fixture(scope="module")
def of_shape(tmp_path_factory):
    """A model of a shape whose weights take no place on the disk."""

    def build(layers, hidden, inner, kv, vocabulary):
        folder = tmp_path_factory.mktemp("m") / "model"
        folder.mkdir()
        table = (vocabulary, hidden)
        shapes = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (hidden,)}
        for number in range(layers):
            for name, shape in {
                "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }.items():  # fmt: skip
                shapes[f"model.layers.{number}.{name}.weight"] = shape
        specs = {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}
        with streamed(folder / "model.safetensors", specs) as file:
            file.written.update(specs)  # zeros that were never written
        heads = hidden // 128
        (folder / "config.json").write_text(json.dumps({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv // 128, "head_dim": 128,
            "vocab_size": vocabulary, "tie_word_embeddings": False, "max_position_embeddings": 4096,
        }))  # fmt: skip
        return Model.open(folder)

    return build


def needs(model, machine, method="rtn", **others):
    plan = check(VariantSpec(method, **{"options": {"sym": True}, **others}), model, machine)
    return {need.stage: need for need in stage_needs(plan, model, machine)}


def test_evaluate_of_8b_takes_on_an_h200_what_was_measured_there(of_shape):
    """`python -m benchmarks.engine qwen3-8b:10 --device cuda`: 6.58 GB allocated, 7.2 GB on the host, 4 layers as 10."""
    work = Work(scored=20480, compared=20480, measured=8 * 512, restored=3, restored_tokens=2048)
    machine = Machine(GPU, ORDER, work=work)
    four, ten = (needs(of_shape(layers, 4096, 12288, 1024, 151936), machine)["evaluate"] for layers in (4, 10))
    assert four.device == ten.device == pytest.approx(6.58 * GB, rel=0.15)
    assert four.host == ten.host == pytest.approx(7.2 * GB, rel=0.15)


def test_evaluate_of_1b_takes_on_a_cpu_what_was_measured_there(of_shape):
    """Four layers of Llama-2-7B, 128 tokens: 3.70 GB in the errors of linears, of which the layers are nearly all."""
    work = Work(scored=128, compared=128, measured=64, restored=1, restored_tokens=64)
    found = needs(of_shape(4, 4096, 11008, 4096, 32000), Machine(CPU, ORDER, work=work))
    assert found["evaluate"].host == pytest.approx(3.70 * GB, rel=0.15)
    assert found["evaluate"].device == 0


def test_more_layers_take_no_more_memory_than_few_once_they_are_not_kept(of_shape):
    sizes = [needs(of_shape(layers, 2048, 8192, 2048, 32000), HERE)["evaluate"].host for layers in (2, 4, 16, 32)]
    small, kept, *streamed = sizes
    assert small < kept
    assert all(one == other for one, other in pairwise(streamed))


def test_every_stage_has_its_disk_and_the_float_model_is_neither_calibrated_nor_quantized(model):
    found = needs(model, HERE, "gptq")
    assert list(found) == ["download", "calibrate", "quantize", "convert", "serve_smoke", "evaluate"]
    assert found["download"].disk == sum(model.checkpoint.info(name).nbytes for name in model.checkpoint.names)
    assert found["quantize"].disk == found["convert"].disk < found["download"].disk
    assert list(needs(model, HERE)) == [name for name in found if name != "calibrate"]
    assert list(needs(model, HERE, "float")) == ["download", "serve_smoke", "evaluate"]
    # Fixed scales of inputs come from calibration.
    machine = replace(HERE, order={"fp8": ["llmcompressor"]})
    for scheme in ("static", "dynamic"):
        found = needs(model, machine, "fp8", bits=8, group_size=-1, options={"scheme": scheme})
        assert ("calibrate" in found) == (scheme == "static")


def test_what_does_not_fit_is_said_with_what_would(of_shape):
    large = of_shape(80, 8192, 28672, 1024, 128256)
    machine = replace(HERE, host_bytes=16 * 2**30)
    plan = check(VariantSpec("rtn", options={"sym": True}), large, machine)
    found = {finding.id: finding for finding in too_large(stage_needs(plan, large, machine), machine)}
    assert "evaluate.divergence.tokens=0" in found["evaluate-memory"].remedy
    roomy = replace(machine, host_bytes=64 * 2**30)
    assert too_large(stage_needs(plan, large, roomy), roomy) == []
    alone = replace(machine, work=replace(machine.work, compared=0, measured=0))
    (first, *_), (second, *_) = (
        [need.host for need in stage_needs(plan, large, place) if need.stage == "evaluate"]
        for place in (machine, alone)
    )
    assert second < first
