from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from quantline.config.method import Backend
from quantline.core.errors import UserError
from quantline.quantization import capabilities
from quantline.quantization.capabilities import Requirements, candidates, choose, faults
from quantline.toolchains.environments import HEALTH_CHECKS

GPTQ = Requirements("gptq", 4, 128, {"sym": True, "desc_act": False, "activation_bits": None})


def test_every_backend_has_a_module_a_toolchain_with_locks_and_what_it_can_do(root):
    assert len(capabilities.table()) >= 3
    for name, entry in capabilities.table().items():
        assert (root / "src" / "quantline" / "toolchains" / "workers" / "quantizers" / f"{name}.py").is_file(), name
        assert entry["methods"], name
        keys = {
            "toolchain",
            "families",
            "layers",
            "lm_head",
            "low_memory",
            "several_gpus",
            "dtypes",
            "resume",
            "methods",
        }
        assert set(entry) - {"exceptions", "server"} == keys, name
        if entry["toolchain"] is not None:
            assert entry["toolchain"] in HEALTH_CHECKS
            for platform in ("cpu", "cuda"):
                assert (root / "envs" / f"{entry['toolchain']}-{platform}.txt").is_file(), name


def test_backend_may_be_named_by_every_name_of_the_table():
    named, able = set(get_args(Backend)) - {"auto"}, set(capabilities.table())
    assert named == able, f"Backend in config/method.py and capabilities.yaml differ in {sorted(named ^ able)}"


def test_every_backend_of_the_table_in_conf_has_its_method(composed):
    table = composed()["backends"]
    assert set(table) >= {"awq", "gptq", "rtn"}
    for method, names in table.items():
        for name in names:
            assert method in capabilities.table()[name]["methods"], (method, name)


def test_a_family_that_the_first_choice_does_not_know_goes_to_the_next_and_the_reason_is_told():
    assert choose("auto", ["auto_gptq"], GPTQ, {"model_type": "llama"}) == ("auto_gptq", [])
    rtn = replace(GPTQ, method="rtn")
    with pytest.raises(UserError, match="model_type=qwen9: auto_gptq supports llama"):
        choose("auto_gptq", ["auto_gptq"], GPTQ, {"model_type": "qwen9"})
    assert choose("auto", ["native"], rtn, {"model_type": "qwen9"}) == ("native", [])


def test_what_a_backend_cannot_do_is_refused_by_name():
    assert faults("autoawq", replace(GPTQ, method="awq", bits=8))[0] == "bits=8: awq by autoawq takes 4"
    assert "lm_head=quantized: auto_gptq leaves it float" in faults("auto_gptq", replace(GPTQ, lm_head=True))[0]
    assert "can set them by layer" in faults("auto_gptq", replace(GPTQ, layers="widths"))[0]
    assert (
        "quantize.gpus=2: gptq by auto_gptq takes 1; gptq by llmcompressor takes several"
        in faults("auto_gptq", replace(GPTQ, gpus=2))[0]
    )
    assert "low_memory=true: auto_gptq holds the whole model" in faults("auto_gptq", replace(GPTQ, low_memory=True))[0]
    assert "dtype=bfloat16: auto_gptq computes in" in faults("auto_gptq", replace(GPTQ, dtype="bfloat16"))[0]
    assert (
        "method.activation_bits=8: auto_gptq takes null"
        in faults("auto_gptq", replace(GPTQ, options={"activation_bits": 8}))[0]
    )
    assert "backend=native: has rtn; gptq is supported by auto_gptq" in faults("native", GPTQ)[0]


def test_only_backends_without_a_fault_are_candidates():
    assert candidates("auto", ["auto_gptq", "native"], GPTQ) == ["auto_gptq"]
    assert candidates("native", ["auto_gptq"], GPTQ) == []


PHI3 = {"model_type": "phi3", "num_attention_heads": 4}
AWQ = Requirements("awq", 4, 128, {"zero_point": True, "version": "gemm", "clip": True})
W8A8 = Requirements("gptq", 8, -1, {**GPTQ.options, "activation_bits": 8})


@pytest.mark.parametrize(
    ("backend", "wanted", "config", "reason"),
    [
        ("native", replace(GPTQ, method="rtn", options={"sym": True}), {"model_type": "gpt2"}, "stored transposed"),
        ("autoawq", AWQ, {**PHI3, "num_key_value_heads": 2}, "with grouped_heads=true: AutoAWQ silently corrupts"),
        ("llmcompressor", W8A8, {"model_type": "mixtral"}, "with inputs=rounded: the reference engine cannot"),
        ("llmcompressor", replace(GPTQ, options={**GPTQ.options, "desc_act": True, "static_groups": False}),
         {"model_type": "qwen2"}, "static_groups=true or group_size=-1"),
        ("gptqmodel", replace(GPTQ, group_size=-1, options={**GPTQ.options, "static_groups": True}),
         {"model_type": "qwen2"}, "set method.static_groups=false"),
        ("gptqmodel", AWQ, {"model_type": "mixtral"}, "model_type=mixtral: gptqmodel supports llama"),
    ],
)  # fmt: skip
def test_an_exception_is_refused_with_its_reason_and_only_that(backend, wanted, config, reason):
    with pytest.raises(UserError, match=reason):
        choose(backend, [backend], wanted, config)
    assert choose(backend, [backend], replace(wanted, options={"sym": True}), {**PHI3, "model_type": "llama"})


def test_rounding_is_advised_only_where_it_takes_the_model():
    for kind, advised in (("qwen9", True), ("gpt2", False)):
        with pytest.raises(UserError) as caught:
            choose("auto", ["auto_gptq"], GPTQ, {"model_type": kind})
        assert ("method=rtn takes this model" in str(caught.value)) is advised
