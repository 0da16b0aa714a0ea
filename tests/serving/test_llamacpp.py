"""llama.cpp's server as a runtime: its command, the line for a shell, and a GGUF file that is served and scored."""

from __future__ import annotations

import shlex

import pytest
import sections
from gguf_files import small_model

from quantline.core.errors import UserError
from quantline.serving import llamacpp
from quantline.serving.command import command_line, environment_of, flags_of, served_line
from quantline.serving.rules import CheckpointFacts, Target, checkpoint_facts, verdict


def options(**values):
    return sections.server(runtime="llamacpp", **values)


def test_the_server_gets_the_file_its_name_and_a_context_for_all_sequences(tmp_path):
    folder = small_model(tmp_path)
    command = command_line(tmp_path / "python", folder, options(max_model_len=99, threads=3, concurrency=4), 8123)
    for name, value in [
        ("--model", str(folder / "model.gguf")), ("--alias", "quantline"), ("--host", "127.0.0.1"), ("--port", "8123"),
        ("--parallel", "4"), ("--ctx-size", "396"), ("--threads", "3"),
    ]:  # fmt: skip
        assert command[command.index(name) + 1] == value
    assert command[1:3] == ["-m", "quantline.toolchains.workers.llamacpp.server"]
    assert "--no-cache-prompt" in command
    assert environment_of(options()) == {}


def test_the_line_for_a_shell_is_llama_cpps_own_and_proven_flags_are_kept():
    line = shlex.split(served_line("converted", options(max_model_len=64, threads=1, concurrency=2)))
    assert line == [
        "llama-server", "--model", "converted/model.gguf", "--parallel", "2", "--threads", "1", "--no-cache-prompt",
        "--ctx-size", "128",
    ]  # fmt: skip
    assert flags_of(options(proven=("--parallel", "1"))) == ["--parallel", "1"]


def test_a_folder_without_one_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has 0 GGUF files; llama\.cpp serves a folder with one"):
        llamacpp.file_of(tmp_path)


@pytest.mark.parametrize(
    ("runtime", "version", "method", "rule"),
    [("vllm", "0.32.0", "gguf", "gguf"), ("llamacpp", "2026.10.11549", "awq", "llamacpp-gguf-only"),
     ("llamacpp", "2026.10.11549", "float", "llamacpp-gguf-only"), ("llamacpp", "2026.10.11549", "gguf", "")],
)  # fmt: skip
def test_each_server_is_refused_what_the_other_reads(runtime, version, method, rule):
    assert verdict(Target(runtime, version, "cpu"), CheckpointFacts(method)).rule_id == rule


def test_the_facts_of_a_file_are_its_method_and_mixture(tmp_path):
    facts = checkpoint_facts(small_model(tmp_path))
    assert (facts.method, facts.layout) == ("gguf", "q4_k_m")
