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
        keys = {"toolchain", "families", "layers", "lm_head", "low_memory", "dtypes", "resume", "methods"}
        assert set(entry) == keys, name
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
    assert choose("auto", ["auto_gptq"], GPTQ, "llama") == ("auto_gptq", [])
    rtn = replace(GPTQ, method="rtn")
    with pytest.raises(UserError, match="model_type=qwen9: auto_gptq supports llama"):
        choose("auto_gptq", ["auto_gptq"], GPTQ, "qwen9")
    assert choose("auto", ["native"], rtn, "qwen9") == ("native", [])


def test_what_a_backend_cannot_do_is_refused_by_name():
    assert faults("autoawq", replace(GPTQ, method="awq", bits=8))[0] == "bits=8: awq by autoawq takes 4"
    assert "lm_head=quantized: auto_gptq leaves it float" in faults("auto_gptq", replace(GPTQ, lm_head=True))[0]
    assert "can set them by layer" in faults("auto_gptq", replace(GPTQ, layers="widths"))[0]
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
