from __future__ import annotations

import json
import shlex
import socket
from dataclasses import replace

import pytest
from gguf_files import small_model
from tiny_quantized import write_float, write_whole
from variant_records import record

from quantline.core.errors import UserError
from quantline.lifecycle import serve
from quantline.lifecycle.serve import Typed, curl_line, measured_settings, options_for, port_of, settings_of, subject_of
from quantline.lifecycle.tracking.registry import promote
from quantline.pipeline.identity import file_hashes
from quantline.pipeline.server import PROVEN, options_of
from quantline.serving.command import flags_of, served_line
from tests.lifecycle.tracking.test_registry import MODEL, Store

GPTQ = ("method=gptq", "bits=4", "tracking.uri=null")


@pytest.fixture
def kept(composed, tmp_path, monkeypatch):
    """Put a variant in the place of those of this checkout; returns its record, with changes of a stage's result."""

    def put(*overrides, folder=None, without=(), **served):
        folder = folder or write_whole(tmp_path / "gptq-w4" / "convert", "gptq")
        made = record("gptq-w4", "gptq", 4, 0.01, tmp_path / "work")
        results = [dict(result) for result in made.results if result["stage"] not in without]
        for result in results:
            if result["stage"] == "convert":
                result["outputs"] = file_hashes(folder)
            if result["stage"] == "serve_smoke":
                result.update(served)
        config = composed(*GPTQ, *overrides)
        made = replace(made, config=config, results=results, outputs={"convert": folder})
        monkeypatch.setattr(serve, "variant_record", lambda root, name: made)
        return made

    return put


def asked(composed, tmp_path, *overrides, **arguments):
    return subject_of(tmp_path, arguments, Typed(composed(*overrides), overrides))


def test_a_variant_is_served_as_it_was_proven_whatever_the_defaults_of_today_are(kept, composed, tmp_path):
    kept("serve.dtype=bfloat16", "serve.enforce_eager=false", "serve.process.kv_cache_gib=3")
    subject = asked(composed, tmp_path, variant="gptq-w4")
    options, note = options_for(subject, "0.40.0", "cpu", 0)
    assert (options.dtype, options.enforce_eager, options.process.kv_cache_gib) == ("bfloat16", False, 3)
    assert options.max_model_len == 64  # the model's own limit
    assert (options.name, options.process.port, note) == ("gptq-w4", None, "")


def test_the_flags_that_serve_smoke_noted_serve_it_again_unless_the_command_line_changes_them(kept, composed, tmp_path):
    flags = ("--dtype", "float16", "--older-flag")
    kept(tables={PROVEN: [{"flag": flag} for flag in flags]}, environment={"device": "cpu"})
    same, _ = options_for(asked(composed, tmp_path, variant="gptq-w4"), "0.40.0", "cpu", 0)
    assert flags_of(same) == list(flags)
    elsewhere, _ = options_for(asked(composed, tmp_path, variant="gptq-w4"), "0.40.0", "cuda", 0)
    other, _ = options_for(asked(composed, tmp_path, "serve.max_model_len=32", variant="gptq-w4"), "0.40.0", "cpu", 0)
    for options in (elsewhere, other):
        assert "--older-flag" not in flags_of(options)
        assert "--max-model-len" in flags_of(options)


def test_what_the_command_line_says_of_serving_replaces_only_that(kept, composed, tmp_path):
    kept("serve.dtype=bfloat16", "serve.process.kv_cache_gib=3")
    subject = asked(composed, tmp_path, "serve.process.host=0.0.0.0", "serve.max_model_len=32", variant="gptq-w4")
    options, _ = options_for(subject, "0.40.0", "cpu", 0)
    assert (options.process.host, options.max_model_len) == ("0.0.0.0", 32)
    assert (options.process.kv_cache_gib, options.dtype) == (3, "bfloat16")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "unsupported", "reason": "vLLM has no kernel"}, "it is not served: vLLM has no kernel; or to try"),
        ({"without": ("serve_smoke",)}, "no result of serve_smoke is up to date; run: dvc repro; or to try it all"),
        ({"without": ("convert",)}, None),
    ],
)  # fmt: skip
def test_a_variant_that_was_not_proven_is_refused_with_the_reason(kept, composed, tmp_path, changes, words):
    made = kept(**changes)
    if words is None:
        made.outputs.clear()
        words = "has no result of convert that is up to date; run: dvc repro"
    with pytest.raises(UserError, match=words) as caught:
        asked(composed, tmp_path, variant="gptq-w4")
    if made.outputs:
        folder = str(caught.value).rpartition("stages.serve ")[2]
        assert asked(composed, tmp_path, folder=folder).folder == made.outputs["convert"]


def test_a_variant_whose_files_were_changed_is_refused(kept, composed, tmp_path):
    made = kept()
    (made.outputs["convert"] / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: differs from the output of convert; run: "):
        asked(composed, tmp_path, variant="gptq-w4")


def test_what_this_vllm_does_not_load_is_refused_for_a_variant_and_told_for_a_folder(kept, composed, tmp_path):
    folder = write_whole(tmp_path / "w8" / "convert", "gptq", bits=8)
    kept(folder=folder)
    with pytest.raises(UserError, match=r"kernel for GPTQ with 4 bits only.*all the same: python -m stages\.serve "):
        options_for(asked(composed, tmp_path, variant="gptq-w4"), "0.32.0", "cpu", 0)
    subject = asked(composed, tmp_path, folder=str(folder))
    assert subject.name == "w8"
    assert "4 bits only" in options_for(subject, "0.32.0", "cpu", 0)[1]


def test_a_promoted_variant_is_fetched_once_verified_each_time_and_served_as_its_run_says(composed, tmp_path):
    configured = composed(*GPTQ, "serve.process.kv_cache_gib=3")
    store = Store(tmp_path, configured=configured)
    write_whole(tmp_path / "awq-w4", "gptq")
    promote(store.tracking, tmp_path, replace(store.promotion("awq-w4"), documents={"README.md": "# it\n"}), "best")

    subject = asked(composed, tmp_path, alias="best")
    assert subject.folder == tmp_path / "scratch" / ".serve" / f"{MODEL}-1"
    assert (subject.name, subject.config.serve.process.kv_cache_gib, subject.proven) == ("awq-w4", 3, True)
    weights = subject.folder / "model.safetensors"
    whole, first = weights.read_bytes(), weights.stat().st_ino
    asked(composed, tmp_path, alias="best", model=MODEL)
    assert weights.stat().st_ino == first
    weights.write_bytes(whole[:-1])
    asked(composed, tmp_path, alias="best")
    assert weights.read_bytes() == whole
    with pytest.raises(UserError, match=f"alias=other: no variant has it; there are {MODEL}@best"):
        asked(composed, tmp_path, alias="other")
    words = rf"model={MODEL}x: no registered model has this name; there are {MODEL} \(did you mean {MODEL}\?\)"
    with pytest.raises(UserError, match=words):
        asked(composed, tmp_path, alias="best", model=f"{MODEL}x")


@pytest.mark.parametrize(
    ("overrides", "arguments", "words"),
    [
        ((), {}, "nothing to serve is given; give variant=NAME"),
        ((), {"variant": "a", "folder": "b"}, "variant=a folder=b: are several"),
        (("bits=8",), {"variant": "a"}, "bits=8: serving does not read bits"),
        (("model.trust_remote_code=true",), {"variant": "a"}, "does not read model.trust_remote_code"),
        ((), {"folder": "not/there"}, "not/there: is no folder of a checkpoint"),
    ],
)
def test_what_names_nothing_to_serve_is_refused(composed, tmp_path, overrides, arguments, words):
    with pytest.raises(UserError, match=words):
        asked(composed, tmp_path, *overrides, **arguments)


def test_a_folder_of_a_float_model_is_served_with_the_options_of_today_and_no_more_tokens_than_it_takes(
    composed, tmp_path
):
    folder = write_float(tmp_path / "mine")
    subject = asked(composed, tmp_path, "model.trust_remote_code=true", folder=str(folder))
    options, note = options_for(subject, "0.32.0", "cpu", 0)
    assert (options.name, options.dtype, options.trust_remote_code, note) == ("mine", "bfloat16", True, "")
    assert options.max_model_len == json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    short = asked(composed, tmp_path, "serve.max_model_len=20", folder=str(folder))
    assert options_for(short, "0.32.0", "cpu", 0)[0].max_model_len == 20
    long = asked(composed, tmp_path, "serve.max_model_len=999999", folder=str(folder))
    with pytest.raises(UserError, match=r"serve\.max_model_len=999999: the model takes at most"):
        options_for(long, "0.32.0", "cpu", 0)


def test_prompts_share_a_cache_where_that_was_asked_for_and_never_where_answers_are_measured(kept, composed, tmp_path):
    kept()
    subject = asked(composed, tmp_path, "serve.process.enable_prefix_caching=true", variant="gptq-w4")
    assert options_for(subject, "0.40.0", "cpu", 0)[0].process.enable_prefix_caching
    assert not options_of(subject.config, "cpu", quantized=True).process.enable_prefix_caching


def test_the_port_is_that_of_the_command_then_of_the_configuration_then_8000(composed, tmp_path):
    folder = str(write_float(tmp_path / "mine"))
    usual = asked(composed, tmp_path, folder=folder).config
    own = asked(composed, tmp_path, "serve.process.port=8123", folder=folder).config
    assert [port_of(None, usual), port_of(None, own), port_of("0", own), port_of("81", own)] == [8000, 8123, 0, 81]
    for wrong in ("http", "-1", "70000"):
        with pytest.raises(UserError, match=f"port={wrong}: give a number"):
            port_of(wrong, usual)


def test_a_taken_port_is_refused_with_the_option_of_this_command(composed, tmp_path):
    subject = asked(composed, tmp_path, folder=str(write_float(tmp_path / "mine")))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken; .*, or give port=NUMBER"):
            options_for(subject, "0.32.0", "cpu", port)


@pytest.mark.parametrize(("template", "path"), [(None, "completions"), ("{{ messages }}", "chat/completions")])
def test_the_line_that_asks_is_for_the_api_that_the_model_has(composed, tmp_path, template, path):
    folder = write_float(tmp_path / "mine")
    if template:
        (folder / "chat_template.jinja").write_text(template)
    subject = asked(composed, tmp_path, folder=str(folder))
    words = shlex.split(curl_line("http://127.0.0.1:8000", subject))
    assert words[:2] == ["curl", f"http://127.0.0.1:8000/v1/{path}"]
    assert json.loads(words[-1])["model"] == "mine"


def test_two_settings_differ_in_what_the_command_line_gives_and_in_nothing_else(kept, composed, root):
    kept("serve.dtype=bfloat16", "serve.process.kv_cache_gib=3")
    given = ("serve.process.max_num_seqs=4", "speed.rounds=2")
    pair, plan = settings_of(root, {"variant": "gptq-w4"}, Typed(composed(*given), given))
    before, after = measured_settings(pair, "0.40.0", "cpu")
    assert (before.model, after.model, before.checkpoint) == ("float", "variant", after.checkpoint)
    assert plan.rounds == 2
    changed = after.options.process.model_dump()
    assert changed.pop("max_num_seqs") == 4
    unchanged = before.options.process.model_dump()
    assert unchanged.pop("max_num_seqs") is None
    assert changed == unchanged
    assert (before.options.dtype, after.options.dtype) == ("bfloat16", "bfloat16")


def test_without_a_change_or_a_measurement_there_is_nothing_to_compare(kept, composed, root):
    kept()
    with pytest.raises(UserError, match=r"nothing to compare; give options of serve, such as"):
        settings_of(root, {"variant": "gptq-w4"}, Typed(composed(), ()))
    given = ("serve.dtype=float16", "speed=none")
    with pytest.raises(UserError, match=r"speed.tools=\[\]: nothing would be compared; give speed=short"):
        settings_of(root, {"variant": "gptq-w4"}, Typed(composed(*given), given))


def test_a_folder_with_a_gguf_file_is_served_by_llama_cpp_whatever_the_method_of_the_configuration(composed, tmp_path):
    subject = asked(composed, tmp_path, folder=str(small_model(tmp_path / "mine")))
    assert subject.config.method.name != "gguf"
    options, note = options_for(subject, "2026.10.11549", "cpu", 0)
    assert (options.runtime, note) == ("llamacpp", "")
    assert served_line("mine", options).startswith("llama-server --model mine/model.gguf")
