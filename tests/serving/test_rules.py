from __future__ import annotations

import json
from dataclasses import replace

import pytest
import sections
from tiny_quantized import write_float

from quantline.checkpoints.layouts.choice import compressed_tensors_of
from quantline.checkpoints.layouts.compressed_tensors.schemes import SCHEMES
from quantline.checkpoints.quantization_config import describe
from quantline.core.errors import UserError
from quantline.serving.rules import (
    CheckpointFacts,
    Target,
    architecture_note,
    architecture_of,
    checkpoint_facts,
    cpu_has_amx,
    cpu_instructions,
    facts_of,
    refuse_options,
    rules,
    verdict,
    verdicts,
)

CPU = Target("vllm", "0.32.0+cpu", "cpu", "bfloat16")
GPU = Target("vllm", "0.32.0", "cuda", "bfloat16")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
HOPPER = Target("vllm", "0.32.0", "cuda", "bfloat16", compute_capability=90)
BLACKWELL = Target("vllm", "0.32.0", "cuda", "bfloat16", compute_capability=100)
PLAIN_CPU = Target("vllm", "0.32.0", "cpu", "bfloat16", instructions="avx512", amx=False)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    ("config", "target", "rule"),
    [
        (None, CPU, ""),
        (AWQ, CPU, ""),
        (AWQ, GPU, ""),
        (GPTQ, CPU, ""),
        (GPTQ, GPU, ""),
        (GPTQ | {"group_size": -1}, CPU, ""),
        (GPTQ | {"group_size": -1, "desc_act": True}, CPU, ""),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, CPU, ""),
        (GPTQ | {"bits": 8}, GPU, ""),
        (GPTQ | {"bits": 8}, CPU, "gptq-cpu-bits"),
        (GPTQ | {"bits": 2}, GPU, "gptq-bits"),
        (GPTQ | {"bits": 3}, CPU, "gptq-bits"),
        (GPTQ | {"sym": False}, CPU, "gptq-asymmetric"),
        (GPTQ | {"sym": False}, GPU, "gptq-asymmetric"),
        (GPTQ | {"desc_act": True}, CPU, "gptq-grouped-desc-act"),
        (GPTQ | {"group_size": 256}, CPU, "gptq-group-size"),
        (AWQ | {"bits": 8}, CPU, "awq-bits"),
        (AWQ | {"version": "gemv"}, GPU, "awq-layout"),
        (AWQ | {"version": "gemv_fast"}, CPU, "awq-layout"),
        (AWQ | {"zero_point": False}, CPU, "awq-cpu-zero-point"),
        (AWQ | {"zero_point": False}, GPU, ""),
        (AWQ, Target("vllm", "0.32.0", "cpu", "float32"), "quantized-float32"),
        (None, Target("vllm", "0.32.0", "cpu", "float32"), ""),
    ],
)
def test_what_vllm_serves(config, target, rule):
    found = verdict(target, facts_of(config))
    assert (found.supported, found.rule_id) == (not rule, rule)
    if rule:
        assert "0.32.0" in found.reason
        assert found.remedy


@pytest.mark.parametrize(
    ("config", "dtype", "rule"),
    [
        (AWQ, "bfloat16", ""),
        (AWQ | {"zero_point": False}, "float16", ""),
        (GPTQ, "float32", "quantized-float32"),
        (GPTQ | {"bits": 8}, "float16", ""),
        (GPTQ | {"bits": 3}, "float16", "gptq-bits"),
        (GPTQ | {"desc_act": True}, "float16", ""),
        (GPTQ | {"group_size": -1}, "float16", ""),
        (GPTQ | {"group_size": 256}, "float16", "gptq-group-size"),
    ],
)
def test_what_0_25_1_did_on_a_gpu(config, dtype, rule):
    assert verdict(Target("vllm", "0.25.1", "cuda", dtype), facts_of(config)).rule_id == rule


def test_sections_are_read_by_the_defaults_of_their_layouts():
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True}
    assert (facts_of(old).bits, facts_of(old).group_size, facts_of(old).layout) == (4, 64, "gemm")
    assert verdict(GPU, facts_of({**old, "checkpoint_format": "GEMV"})).rule_id == "awq-layout"
    assert facts_of(GPTQ).layout == "gptq"
    assert facts_of({**GPTQ, "is_marlin_format": True}).layout == "marlin"


def test_a_reason_names_what_was_given():
    found = verdict(CPU, facts_of(GPTQ | {"bits": 8}))
    assert found.reason == ("vLLM 0.32.0+cpu on CPU has a kernel for GPTQ with 4 bits only, this checkpoint has 8")
    assert found.remedy == "serve it on a GPU, or set bits=4"


def test_widths_that_no_kernel_takes_are_refused_on_a_cpu_only():
    narrow = facts_of(AWQ, widths_divisible_by_32=False)
    assert verdict(CPU, narrow).rule_id == "cpu-layer-widths"
    assert verdict(GPU, narrow).supported
    assert verdict(CPU, facts_of(AWQ, widths_divisible_by_32=True)).supported


def test_nothing_is_said_about_versions_and_runtimes_outside_the_rules():
    eight = facts_of(GPTQ | {"bits": 8})
    assert verdict(Target("vllm", "1.0.0", "cpu"), eight).supported
    assert verdict(Target("mindie", "0.32.0", "cpu"), eight).supported
    assert not verdict(Target("vllm", "0.32.1rc1", "cpu"), eight).supported


def test_a_fact_that_is_not_stated_matches_no_rule():
    assert verdict(CPU, CheckpointFacts("gptq")).supported


def test_a_gpu_is_refused_below_a_capability_and_an_unknown_one_is_not():
    old, unknown = (Target("vllm", "0.32.0", "cuda", "float16", compute_capability=value) for value in (70, None))
    assert verdict(old, facts_of(AWQ)).rule_id == "gpu-capability"
    assert verdict(unknown, facts_of(AWQ)).supported
    assert verdict(Target("vllm", "0.32.0", "cuda", "float16", compute_capability=75), facts_of(AWQ)).supported


def test_everything_that_is_known_against_it_is_said():
    found = verdicts(CPU, facts_of(GPTQ | {"bits": 8, "sym": False, "desc_act": True}))
    assert [one.rule_id for one in found] == ["gptq-asymmetric", "gptq-cpu-bits", "gptq-grouped-desc-act"]
    assert all(one.source for one in found)
    assert verdict(CPU, facts_of(GPTQ | {"bits": 8, "sym": False})) == found[0]


def test_a_version_that_is_none_is_a_user_error():
    with pytest.raises(UserError, match="give one such as"):
        verdict(Target("vllm", "newest", "cpu"), CheckpointFacts("float"))


def test_old_names_in_awq_configs_are_understood():
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    assert facts_of(old) == CheckpointFacts("awq", 4, 64, None, None, True, "gemm", None)


def test_rule_ids_are_unique_and_every_rule_has_a_source():
    assert len(rules()) > 5
    assert len({rule.id for rule in rules()}) == len(rules())
    assert all(rule.source.startswith(("ran: ", "read: ")) for rule in rules())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f avx512dq avx512bw avx512vl", "avx512"),
        ("fpu avx2 avx512f", "avx2"),
        ("fpu sse2", "none"),
    ],
)
def test_the_instruction_set_is_read_from_the_cpus_flags(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert cpu_instructions(tmp_path / "cpuinfo") == expected
    assert cpu_instructions(tmp_path / "missing") is None
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_instructions(tmp_path / "cpuinfo") is None


def test_amx_is_read_from_the_cpus_flags(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for flags, expected in (("fpu avx512f amx_bf16 amx_tile", True), ("fpu avx512f", False)):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        assert cpu_has_amx(tmp_path / "cpuinfo") is expected
    assert not cpu_has_amx(tmp_path / "missing")


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ({"cpu_offload_gib": 2}, "cpu-offload-without-gpu"),
        ({"kv_offload_gib": 0.5}, "kv-offload-without-gpu"),
        ({"attention_backend": "FLASH_ATTN"}, "cpu-attention-backend"),
    ],
)
def test_options_of_the_process_that_a_cpu_lacks_are_refused_by_name_and_say_nothing_of_the_checkpoint(option, rule):
    process = sections.server(**option).process
    with pytest.raises(UserError, match=rf"serve\.process\.{next(iter(option))}=.*{rule}"):
        refuse_options("0.32.0", "cpu", process)
    refuse_options("0.32.0", "cuda", process)
    assert verdict(CPU, facts_of(GPTQ)).supported


def test_the_usual_options_of_the_process_are_refused_nowhere():
    for process in (sections.server().process, sections.server(attention_backend="CPU_ATTN", max_num_seqs=1).process):
        refuse_options("0.32.0", "cpu", process)


def test_a_class_that_the_server_does_not_have_is_refused_and_one_that_it_only_takes_over_is_told():
    def ruled(target, config):
        return verdict(target, CheckpointFacts("float", architecture=architecture_of(config)))

    rwkv, llama = {"architectures": ["RwkvForCausalLM"]}, {"architectures": ["LlamaForCausalLM"]}
    assert ruled(CPU, rwkv).reason.startswith("vLLM 0.32.0+cpu has no class RwkvForCausalLM")
    assert not ruled(GPU, rwkv).supported
    assert ruled(CPU, llama).supported
    assert ruled(Target("vllm", "0.25.1", "cuda"), rwkv).supported  # nothing is known of that version's classes
    for config in ({}, {"architectures": "Rwkv"}, {**rwkv, "auto_map": {"AutoModelForCausalLM": "model.Own"}}):
        assert ruled(CPU, config).supported
    assert architecture_note(CPU, "LlamaForCausalLM") is None
    assert architecture_note(CPU, "HeliumForCausalLM").endswith("run that of transformers, which was not tried")


def floats(preset):
    scheme = SCHEMES[preset]
    return describe(scheme.layout, bits=scheme.bits, group_size=scheme.group_size, symmetric=True)


def beside_rounded(inputs, size=128):
    return describe(compressed_tensors_of(inputs), bits=4, group_size=size, symmetric=True)


@pytest.mark.parametrize(
    ("config", "target", "rule"),
    [
        (floats("FP8_DYNAMIC"), PLAIN_CPU, ""),
        (floats("FP8"), PLAIN_CPU, "fp8-cpu-fixed-inputs"),
        (floats("FP8"), HOPPER, ""),
        (floats("FP8_BLOCK"), PLAIN_CPU, "fp8-cpu-blocks"),
        (floats("FP8_BLOCK"), HOPPER, ""),
        (floats("NVFP4A16"), PLAIN_CPU, "float-groups-cpu"),
        (floats("NVFP4"), HOPPER, ""),
        (floats("MXFP4"), PLAIN_CPU, "float-groups-cpu"),
        (floats("MXFP8"), PLAIN_CPU, "float-groups-cpu"),
        (beside_rounded(8), PLAIN_CPU, ""),
        (beside_rounded(8), replace(HOPPER, version="0.25.1"), "w4a8-gpu"),
        (beside_rounded("fp8"), PLAIN_CPU, "w4afp8-cpu"),
        (beside_rounded("fp8"), HOPPER, ""),
        (beside_rounded("fp8", 64), HOPPER, "w4afp8-group-size"),
        (beside_rounded("fp8"), BLACKWELL, "w4afp8-capability"),
    ],
)
def test_what_vllm_serves_of_floating_point_codes_and_of_rounded_inputs(config, target, rule):
    found = verdict(target, facts_of(config))
    assert (found.supported, found.rule_id) == (not rule, rule)


def test_experts_in_fp8_need_amx():
    facts = replace(facts_of(floats("FP8_DYNAMIC")), experts="quantized")
    assert verdict(PLAIN_CPU, facts).rule_id == "fp8-cpu-experts"
    assert verdict(replace(PLAIN_CPU, amx=True), facts).supported


def test_blocks_of_fp8_that_hold_two_linears_are_refused_where_vllm_fuses_these():
    facts = facts_of(floats("FP8_BLOCK"))
    assert verdict(HOPPER, replace(facts, blocks="cut")).rule_id == "fp8-fused-blocks"
    assert verdict(HOPPER, replace(facts, blocks="whole")).supported


def test_experts_of_a_float_model_are_seen_in_its_headers(tmp_path):
    """Nemotron-H is served on a CPU without experts, and not with them."""
    plain, mixture = write_float(tmp_path / "plain"), write_float(tmp_path / "mixture", experts=4)
    for folder, expected in ((plain, ""), (mixture, "experts-without-gate-on-cpu")):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NemotronHForCausalLM"]}))
        assert verdict(CPU, checkpoint_facts(folder)).rule_id == expected
        assert verdict(GPU, checkpoint_facts(folder)).supported
