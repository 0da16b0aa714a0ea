"""Questions by a model's own library: what excludes what, who loads what, and the real libraries on the demo model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sections
from checkout_paths import DEMO_MODEL
from gguf_files import small_model
from tiny_quantized import write_whole

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.layouts import LAYOUTS, quantize_rtn
from quantline.checkpoints.quantization_config import describe
from quantline.checkpoints.safetensors_file import to_float32
from quantline.core.errors import ConfigError
from quantline.evaluation.speed.own_library import (
    WORKER,
    Asking,
    faults_of,
    job_of,
    library_of,
    library_table,
    measure_by_library,
)
from quantline.pipeline.config import parse
from quantline.toolchains import environments
from quantline.toolchains.runner import run_worker

QUESTIONS = ["What is an index?", "What is a list?", "What is a table?"]


def plan(**values):
    return sections.speed(runtime="transformers", tools=[], levels=[], questions=QUESTIONS, max_tokens=6, **values)


def quantized_demo(folder: Path, layout: str) -> Path:
    """The demo model with its linears rounded to 4 bits in groups of 128."""
    shutil.copytree(DEMO_MODEL, folder)
    opened = Checkpoint.open(DEMO_MODEL)
    weights = {name: to_float32(opened.tensor(name)) for name in opened.names}
    for name in [name for name in weights if "proj.weight" in name]:
        linear = quantize_rtn(weights.pop(name), 4, 128, symmetric=True)
        weights |= {name.replace("weight", suffix): value for suffix, value in LAYOUTS[layout].write(linear).items()}
    write_safetensors(folder / "model.safetensors", weights)
    section = describe(layout, bits=4, group_size=128, symmetric=True, modules_to_not_convert=["lm_head"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    return folder


def no_work(*_):
    raise AssertionError("nothing was to be loaded")


def test_fused_modules_and_flash_attention_exclude_each_other_by_name(composed):
    told = faults_of(Asking(fuse=True, attention="flash_attention_2"), "awq", "cuda")
    assert len(told) == 1
    assert told[0].startswith("fuse=true attention=flash_attention_2: exclude each other")
    assert faults_of(Asking(fuse=True), "awq", "cuda") == []
    assert faults_of(Asking(attention="flash_attention_2"), "float", "cuda") == []
    with pytest.raises(ConfigError, match=r"speed\.fuse=true speed\.attention=flash_attention_2: exclude each other"):
        parse(composed("speed.runtime=transformers", "speed.fuse=true", "speed.attention=flash_attention_2"))
    with pytest.raises(
        ConfigError, match=r"speed\.attention=eager speed\.fuse=true: vLLM does not take it; give speed\.run"
    ):
        parse(composed("speed.fuse=true", "speed.attention=eager"))


def test_what_needs_a_gpu_or_another_checkpoint_is_told_all_at_once_before_anything_is_loaded(tmp_path):
    told = "\n".join(faults_of(Asking(fuse=True, attention="flash_attention_2", max_tokens=0), "gptq", "cpu"))
    for words in (
        "exclude each other", "fuses AWQ checkpoints", "fused modules need a GPU", "needs a GPU", "max_tokens",
    ):  # fmt: skip
        assert words in told
    models = (("float", DEMO_MODEL), ("variant", write_whole(tmp_path / "awq", "awq_gemm")))
    for option, words in (
        (plan(fuse=True), "speed.fuse=true: AutoAWQ's fused modules need a GPU"),
        (plan(attention="flash_attention_2"), "speed.attention=flash_attention_2: needs a GPU"),
    ):
        with pytest.raises(ConfigError) as caught:
            measure_by_library(models, option, "cpu", 1, work=no_work, out=tmp_path)
        assert str(caught.value).count(words) == 1
    assert not (tmp_path / "speed.json").exists()


def test_each_method_has_its_own_library():
    assert library_of("awq", "cuda", fuse=True) == library_of("awq", "cuda", fuse=False) == ("autoawq", "autoawq")
    assert library_of("awq", "cuda", fuse=False, attention="flash_attention_2") == ("autoawq", "transformers")
    assert library_of("awq", "cpu", fuse=False) == ("gptqmodel", "transformers")
    assert library_of("gptq", "cpu", fuse=False) == ("gptqmodel", "gptqmodel")
    assert library_of("float", "cuda", fuse=False) == ("reference", "transformers")


def test_a_checkpoint_that_no_library_was_seen_to_load_is_left_out(tmp_path):
    (tmp_path / "gguf").mkdir()
    models = (("float", DEMO_MODEL), ("variant", small_model(tmp_path / "gguf")))
    found = measure_by_library(models, plan(), "cpu", 1, work=no_work, out=tmp_path)
    assert "this checkpoint is gguf" in found.reason
    assert json.loads((tmp_path / "speed.json").read_text())["rows"] == []


def test_the_identity_of_a_measurement_by_vllm_is_what_it_was_before_there_was_another():
    assert sections.speed((1, 4)).identity().keys() == {
        "name", "tools", "levels", "input_tokens", "output_tokens", "rounds", "warmup_waves", "seed", "enforce_eager",
        "side_by_side",
    }  # fmt: skip
    assert plan(attention="eager").identity()["attention"] == "eager"


def test_fused_modules_are_the_variants_alone():
    environment, job = job_of(Path("model"), "awq", "cuda", 1, Asking(fuse=True, fuse_max_seq_len=128))
    assert environment == "autoawq"
    assert (job["fuse"], job["fuse_max_seq_len"], job["attention"]) == (True, 128, None)
    assert job_of(Path("model"), "awq", "cpu", 1, Asking())[1]["attention"] == "sdpa"


@pytest.mark.toolchain("reference")
@pytest.mark.toolchain("gptqmodel")
@pytest.mark.parametrize(("layout", "linear"), [("awq_gemm", "TorchAtenAwqLinear"), ("gptq", "TorchAtenLinear")])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float_and_variant_really_answer_on_a_cpu(root, tmp_path, layout, linear, attention):
    checkpoint = quantized_demo(tmp_path / layout, layout)
    asked = []

    def work(environment, job, label):
        asked.append(environment)
        chosen = environments.ensure(root, environment)
        return run_worker(chosen, WORKER, job, log=tmp_path / f"{len(asked)}.log", threads=1, label=label)

    (tmp_path / "out").mkdir()
    found = measure_by_library(
        (("float", DEMO_MODEL), ("variant", checkpoint)), plan(attention=attention), "cpu", 1, work=work,
        out=tmp_path / "out",
    )  # fmt: skip
    assert asked == ["reference", "gptqmodel"]
    rows = json.loads((tmp_path / "out" / "speed.json").read_text())["library"]
    assert [row["model"] for row in rows] == ["float", "variant"]
    for row in rows:
        assert [answer["question"] for answer in row["answers"]] == QUESTIONS
        assert all(0 < answer["tokens"] <= 6 for answer in row["answers"])
        assert row["memory_after"] >= row["memory_before"] > 50e6
        assert row["attention"] == row["used_attention"] == attention
        assert row["tokens_per_second"] > 0
    assert linear in rows[1]["linear"]
    assert found.metrics["library_speed_up"] > 0
    assert "3 questions in a row, one at a time, on cpu" in library_table(rows)
