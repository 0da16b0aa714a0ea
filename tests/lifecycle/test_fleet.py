from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import small_model
from tiny_quantized import write_float, write_whole
from variant_records import record

from quantline.core.errors import ConfigError, UserError
from quantline.lifecycle import fleet, serve
from quantline.lifecycle.fleet import curl_line, described, refuse_new_names, resolve, with_section
from quantline.lifecycle.serve import Typed
from quantline.pipeline.identity import file_hashes
from quantline.serving.fleet.export import refuse_llamacpp
from quantline.serving.server import Vllm

VLLM = Vllm(Path("/opt/vllm/bin/python"), "0.40.0")
LLAMACPP = Vllm(Path("/opt/llamacpp/bin/python"), "2026.10.11549")


def server_for(folder):
    return LLAMACPP if list(folder.glob("*.gguf")) else VLLM


@pytest.fixture
def made(composed, tmp_path, monkeypatch):
    """Resolve a fleet of options in a project with the variants `float`, `good` and `bad`, which failed its gates."""
    records = {}
    for name, nll in (("good", 0.01), ("bad", 0.3)):
        folder = write_whole(tmp_path / name / "convert", "gptq")
        own = record(name, "gptq", 4, nll, tmp_path / "work")
        results = [dict(result) for result in own.results]
        for result in results:
            if result["stage"] == "convert":
                result["outputs"] = file_hashes(folder)
            if result["stage"] == "quantize":
                result["metrics"]["output_error_max"] = 0.1
        config = composed("method=gptq", "bits=4", "tracking.uri=null", "serve.process.kv_cache_gib=0.01")
        records[name] = replace(own, config=config, results=results, outputs={"convert": folder})
    own = record("gguf", "gptq", 4, 0.01, tmp_path / "work")
    folder = tmp_path / "gguf" / "convert"
    folder.mkdir(parents=True)
    small_model(folder)
    results = [dict(result) for result in own.results]
    for result in results:
        result["metrics"] = {
            **result["metrics"],
            **({"output_error_max": 0.1} if result["stage"] == "quantize" else {}),
        }
        if result["stage"] == "convert":
            result["outputs"] = file_hashes(folder)
    config = composed("method=gguf", "tracking.uri=null", "serve.process.kv_cache_gib=0.01")
    records["gguf"] = replace(own, config=config, results=results, outputs={"convert": folder})
    model = write_float(tmp_path / "float" / "download" / "model")
    own = record("float", "float", 16, 0.0, tmp_path / "work")
    results = [dict(result) for result in own.results]
    for result in results:
        if result["stage"] == "download":
            result["outputs"] = file_hashes(model.parent)
    config = composed("method=float", "tracking.uri=null", "serve.process.kv_cache_gib=0.01")
    records["float"] = replace(own, config=config, results=results, outputs={"download": model.parent})

    def found(root, name):
        if name not in records:
            raise UserError(f"variant={name}: there is none")
        return records[name]

    monkeypatch.setattr(serve, "variant_record", found)
    monkeypatch.setattr(fleet, "variant_record", found)

    def do(*options, former=None):
        overrides = with_section(options)
        return resolve(tmp_path, Typed(composed(*overrides), overrides), server_for, "cpu", former)

    return do


def test_the_options_of_a_fleet_need_not_name_their_section_and_others_are_left_alone():
    given = [
        "up",
        "precisions.low=[a,float]",
        "keys_file=k.yaml",
        "serve.dtype=auto",
        "share=0.1",
        "~fleet.shadow",
        "-h",
    ]
    assert with_section(given) == [
        "up", "++fleet.precisions.low=[a,float]", "++fleet.keys_file=k.yaml", *given[3:]
    ]  # fmt: skip


def test_a_fleet_has_a_server_for_each_variant_and_each_answers_to_every_precision(made):
    found = made("precisions.low=[good,float]", "precisions.tiny=[good,float]")
    assert found.fleet.precisions["low"] == ("good", "float")
    assert {variant.name for variant in found.fleet.variants} == {"float", "good"}
    good = found.fleet.variant("good")
    assert good.perplexity_increase == pytest.approx(0.01005, abs=1e-4)
    assert good.weight_bytes > 1000
    assert good.max_model_len
    ports = {variant.port for variant in found.fleet.variants} | {found.fleet.admin_port, found.fleet.gauge_port}
    assert len(ports) == 4
    for start in found.starts:
        assert set(start.names[1:]) == {"high", "medium", "low", "tiny"}
        flags = start.options().proven
        assert flags[flags.index("--served-model-name") + 1 :][:2] == (start.names[0], "high")
        assert start.server.process.host == "127.0.0.1"


def test_a_queue_is_limited_where_a_request_can_go_on_and_not_at_the_end_of_a_chain(made):
    def limits(*options):
        starts = made(*options, "limits.queued_requests=4", "limits.queued_tokens=1000").starts
        return {start.names[0]: (start.queued_requests, start.queued_tokens) for start in starts}

    assert limits("precisions.low=[good,float]") == {"good": (4, 1000), "float": (None, None)}
    assert limits("precisions.low=[good]") == {"good": (None, None), "float": (None, None)}


def test_a_gguf_variant_is_served_by_llama_cpp_beside_others_by_vllm(made):
    found = made("precisions.low=[gguf,float]", "precisions.last=[gguf]", "limits.queued_requests=4")
    starts = {start.names[0]: start for start in found.starts}
    assert {name: (start.server.runtime, start.python) for name, start in starts.items()} == {
        "gguf": ("llamacpp", str(LLAMACPP.python)), "float": ("vllm", str(VLLM.python)),
    }  # fmt: skip
    assert found.by == "llama.cpp 2026.10.11549 and vLLM 0.40.0"
    assert found.fleet.variant("gguf").queued_requests is None  # it is the last of a chain
    found = made("precisions.low=[gguf,float]", "limits.queued_requests=4")
    assert found.fleet.variant("gguf").queued_requests == 4  # the gauge sees to it, since llama.cpp has no such limit
    assert {start.names[0]: start.queued_requests for start in found.starts} == {"gguf": None, "float": None}
    with pytest.raises(ConfigError, match=r"queued_tokens=100: llama\.cpp, which serves gguf, does not say"):
        made("precisions.low=[gguf,float]", "limits.queued_tokens=100")
    with pytest.raises(UserError, match=r"form=compose: gguf is served by llama\.cpp"):
        refuse_llamacpp(found.fleet, "compose")


def test_everything_that_is_wrong_is_told_at_once_before_anything_starts(made):
    with pytest.raises(ConfigError) as caught:
        made("precisions.low=[good,nothing]", "precisions.high=[bad]", "endpoint.host=0.0.0.0", "canary.share=0.2")
    told = str(caught.value)
    for words in (
        "variant=nothing: there is none", "bad: did not pass its gates: quality:", "fleet.gates=false",
        "give fleet.keys_file", "give fleet.canary.precision",
    ):  # fmt: skip
        assert words in told
    assert made("precisions.high=[bad]", "gates=false").fleet.precisions["high"] == ("bad",)


def test_a_chain_may_not_end_in_a_folder_that_no_stage_has_proven(made, tmp_path):
    folder = write_whole(tmp_path / "other" / "convert", "gptq")
    with pytest.raises(ConfigError, match="a folder that no stage has proven"):
        made(f"precisions.low=[good,{folder}]", "serve.process.kv_cache_gib=0.01")
    chain = made(f"precisions.low=[{folder},float]", "serve.process.kv_cache_gib=0.01").fleet.precisions["low"]
    assert chain == ("other", "float")


def test_variants_that_do_not_fit_together_are_refused_before_anything_starts(made):
    with pytest.raises(UserError, match="do not fit together") as caught:
        made("precisions.low=[good,float]", "serve.process.kv_cache_gib=100000")
    assert "  good: " in str(caught.value)


def test_a_changed_fleet_keeps_its_ports_and_may_not_have_new_names(made):
    before = made("precisions.low=[float]").fleet
    after = made("precisions.low=[good,float]", former=before).fleet
    assert after.variant("float").port == before.variant("float").port
    assert (after.admin_port, after.gauge_port, after.generation) == (before.admin_port, before.gauge_port, 1)
    refuse_new_names(before, after)
    with pytest.raises(UserError, match="tiny: the running servers do not know a new name"):
        refuse_new_names(before, made("precisions.tiny=[float]", former=before).fleet)


def test_a_user_is_told_where_each_name_goes_and_how_to_ask(made, tmp_path):
    (tmp_path / "keys.yaml").write_text("keys: []")
    canary = ("canary.precision=low", "canary.variant=good", "canary.share=0.05")
    found = made("precisions.low=[float,good]", *canary, "keys_file=keys.yaml").fleet
    told = "\n".join(described(found))
    assert "low     float -> good; 0.05 of it to good first" in told
    assert "keys are asked for" in told
    assert "Bearer $KEY" in curl_line(found)
    assert found.keys_file == str(tmp_path / "keys.yaml")
