"""What the speed stage decides before and around vLLM; vLLM itself is in test_speed_vllm.py."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sections
from tiny_model import write_config, write_model

from quantline.core.errors import ConfigError
from quantline.evaluation.speed import run as speed
from quantline.evaluation.speed.ratios import metrics_of
from quantline.evaluation.speed.run import Subject, measure, nothing, tensor_bytes
from quantline.evaluation.speed.vllm_bench import _COLUMNS
from quantline.pipeline.config import parse
from quantline.toolchains.protocol import JobResult

LENGTHS = {"input_tokens": 256, "output_tokens": 256}
PLAN = sections.speed((1, 4), (64, 64), **LENGTHS)
SHAPE = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 4096}
GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True, "desc_act": False}


def no_bench(*_):
    raise AssertionError("nothing was to be measured")


@pytest.fixture
def model(tmp_path):
    folder = write_model(tmp_path / "model")
    write_config(folder, **SHAPE)
    return folder


def subjects_of(model, **options):
    own = sections.server(**{"dtype": "float16", "max_model_len": 1024, **options})
    return Subject("float", model, own), Subject("variant", model, own)


def measured(model, tmp_path, plan):
    out = tmp_path / "out"
    out.mkdir()
    subjects = subjects_of(model)
    found = measure(python=Path("/no/python"), version="0.32.0", subjects=subjects, plan=plan, bench=no_bench, out=out,
                    log=tmp_path / "speed.log")  # fmt: skip
    assert json.loads((out / "speed.json").read_text()) == found.document
    return found


def test_without_tools_the_result_is_empty_and_nothing_is_started(model, tmp_path):
    found = measured(model, tmp_path, PLAN.model_copy(update={"tools": []}))
    assert (found.document, found.metrics, found.reason) == (nothing(), {}, "")


def test_what_the_target_refuses_is_not_measured_and_the_reason_is_told(model, tmp_path):
    write_config(model, **SHAPE, quantization_config=GPTQ)
    found = measured(model, tmp_path, PLAN)
    assert "4 bits only" in found.reason
    assert found.document == nothing()
    assert metrics_of(found.document) == {}


def test_a_variant_that_another_server_serves_is_left_out_and_the_reason_is_told(model, tmp_path):
    (tmp_path / "out").mkdir()
    base, variant = subjects_of(model)
    subjects = (base, replace(variant, options=replace(variant.options, runtime="llamacpp")))
    found = measure(
        python=Path("/no/python"), version="0.32.0", subjects=subjects, plan=PLAN, bench=no_bench, out=tmp_path / "out",
        log=tmp_path / "speed.log",
    )  # fmt: skip
    assert "served by llama.cpp and the float model by vLLM" in found.reason
    assert found.document == nothing()


@pytest.mark.parametrize("side_by_side", ["always", "never"])
def test_models_take_turns_and_their_servers_are_in_the_document(model, tmp_path, monkeypatch, side_by_side):
    up = []

    @contextmanager
    def serve(_python, _checkpoint, options, *, log, keeping):
        server = SimpleNamespace(
            url=log.name,
            load_seconds=2.0,
            taken_over="",
            log_text=lambda: "",
            peak_memory_bytes=lambda: 7 * len(up),
            options=options,
        )
        up.append(server)
        yield server
        up.remove(server)

    def bench(job, _label):
        assert len(up) == (2 if side_by_side == "always" else 1)
        saved = dict.fromkeys(_COLUMNS.values(), 4.0)
        told = [run["label"] for run in job["runs"]]
        assert [label.split(",")[0] for label in told] == (
            ["float", "variant"] * 2 + ["variant", "float"] * 2 if len(up) == 2 else [told[0].split(",")[0]] * 4
        )
        counts = [int(run["arguments"][run["arguments"].index("--num-prompts") + 1]) for run in job["runs"]]
        results = [{**saved, "completed": count, "total_output_tokens": count * 256} for count in counts]
        return JobResult({"results": results}, 1.0, 0)

    monkeypatch.setattr(speed, "serve", serve)
    out = tmp_path / "out"
    out.mkdir()
    plan = PLAN.model_copy(update={"side_by_side": side_by_side})
    found = measure(python=Path("/no/python"), version="0.32.0", subjects=subjects_of(model), plan=plan, bench=bench,
                    out=out, log=tmp_path / "speed.log")  # fmt: skip
    assert not up
    session = found.document["session"]
    assert (session["side_by_side"], session["device"]) == (side_by_side == "always", "cpu")
    assert "reports none" in session["weights_memory_is"]
    assert [server["model"] for server in found.document["servers"]] == ["float", "variant"]
    for server in found.document["servers"]:
        assert server["weights_memory_bytes"] == server["checkpoint_bytes"] == tensor_bytes(model)
        assert server["peak_memory_bytes"] == (14 if side_by_side == "always" else 7)  # read while it is up
        assert server["gpu_memory_bytes"] is None
    assert [ratio["speed_up"] for ratio in found.document["ratios"]] == [1.0, 1.0]
    assert json.loads((out / "speed.json").read_text()) == found.document


def test_the_cache_holds_every_request_of_the_largest_level(model):
    subject = speed._prepared(subjects_of(model, kv_cache_gib=1.0)[0], PLAN)
    # Keys and values of 32 layers and 4096 numbers at two bytes are half a MiB a token.
    needed = 64 * (256 + 256 + 32) / 2 / 1024
    assert needed * 1.05 < subject.options.process.kv_cache_gib < needed * 1.15
    small = speed._prepared(subjects_of(model, kv_cache_gib=1.0)[0], sections.speed((1, 4), **LENGTHS))
    assert small.options.process.kv_cache_gib == 1.0
    longest = speed._prepared(subjects_of(model, kv_cache_gib=0.1)[0], sections.speed((1, 4), **LENGTHS))
    assert longest.options.process.kv_cache_gib > 0.5  # vLLM asks for room for one sequence of full length


def test_graphs_are_captured_on_a_gpu_unless_told_otherwise(model):
    for device, asked, eager in (("cpu", "auto", True), ("cuda", "auto", False), ("cuda", True, True)):
        subject = subjects_of(model, device=device, enforce_eager=not eager)[0]
        assert speed._prepared(subject, PLAN.model_copy(update={"enforce_eager": asked})).options.enforce_eager is eager


def test_both_servers_are_up_at_once_where_memory_allows(model):
    small, large = subjects_of(model, kv_cache_gib=0.01), subjects_of(model, kv_cache_gib=100_000.0)
    assert not speed._together(large, PLAN)
    assert speed._together(large, PLAN.model_copy(update={"side_by_side": "always"}))
    assert not speed._together(small, PLAN.model_copy(update={"side_by_side": "never"}))


def test_tensor_bytes_are_those_of_all_tensors(model):
    assert tensor_bytes(model) == 2 * 16 * 16 * 4


def test_every_choice_of_the_group_is_valid_and_only_none_measures_nothing(composed, root):
    names = sorted(path.stem for path in (root / "conf" / "speed").glob("*.yaml"))
    assert names == ["none", "short", "sweep"]
    for name in names:
        found = parse(composed(f"speed={name}")).speed
        assert found.name == name
        assert bool(found.tools) == (name != "none")
    assert [level.concurrency for level in parse(composed("speed=sweep")).speed.levels] == [1, 8, 64]
    assert parse(composed()).speed.name == "short"


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["speed.input_tokens=1000", "serve.max_model_len=1024"],
            r"speed.input_tokens=1000 speed.output_tokens=32: .* serve.max_model_len=1032",
        ),
        (["speed.tools=[loop]"], "allowed are serve, latency or throughput"),
        (["speed.levels=[]"], "there are no levels to measure"),
        (["speed.levels=[{concurrency: 8, prompts: 8}, {concurrency: 8, prompts: 9}]"], "is given twice"),
        (["speed.rounds=0"], "speed.rounds=0"),
    ],
)
def test_a_fault_names_the_option_and_what_it_takes(composed, overrides, fault):
    with pytest.raises(ConfigError, match=fault):
        parse(composed(*overrides))
