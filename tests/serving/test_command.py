from __future__ import annotations

import shlex

import sections

from quantline.serving.command import command_line, served_line


def test_the_command_line_trusts_no_remote_code_and_ignores_the_sampling_defaults_of_the_checkpoint(tmp_path):
    command = command_line(tmp_path / "python", tmp_path, sections.server(max_model_len=99, kv_cache_gib=0.5), 8123)
    assert not {"--trust-remote-code", "--language-model-only"} & set(command)
    for name, value in [
        ("--port", "8123"), ("--host", "127.0.0.1"), ("--max-model-len", "99"), ("--served-model-name", "quantline"),
        ("--generation-config", "vllm"), ("--kv-cache-memory-bytes", str(2**29)),
    ]:  # fmt: skip
        assert command[command.index(name) + 1] == value
    assert "--gpu-memory-utilization" not in command
    more = sections.server(
        device="cuda", trust_remote_code=True, text_only=True, enforce_eager=False, extra_args=["--seed", "1"]
    )
    command = command_line(tmp_path / "python", tmp_path, more, 8123)
    assert command[-2:] == ["--seed", "1"]
    assert {"--trust-remote-code", "--language-model-only", "--gpu-memory-utilization"} <= set(command)
    assert "--enforce-eager" not in command


def test_options_by_name_are_vllms_flags_and_without_them_the_line_is_as_it_was(tmp_path):
    usual = shlex.split(served_line(".", sections.server()))
    assert usual == [
        "vllm", "serve", ".", "--dtype", "auto", "--tensor-parallel-size", "1", "--generation-config", "vllm",
        "--no-enable-prefix-caching", "--enforce-eager",
    ]  # fmt: skip
    named = sections.server(
        max_num_seqs=4, max_num_batched_tokens=512, block_size=64, cpu_offload_gib=2.5, kv_offload_gib=8.0,
        attention_backend="FLASHINFER", enable_prefix_caching=True,
    )  # fmt: skip
    flags = shlex.split(served_line(".", named))
    for name, value in [
        ("--max-num-seqs", "4"), ("--max-num-batched-tokens", "512"), ("--block-size", "64"), ("--cpu-offload-gb", "2.5"),
        ("--kv-offloading-size", "8"), ("--attention-backend", "FLASHINFER"),
    ]:  # fmt: skip
        assert flags[flags.index(name) + 1] == value
    assert "--enable-prefix-caching" in flags
    assert "--no-enable-prefix-caching" not in flags


def test_the_line_for_a_shell_has_every_flag_of_the_server_but_its_address_its_name_and_its_log(tmp_path):
    options = sections.server(max_model_len=99, device="cuda", extra_args=["--chat-template", "my template.jinja"])
    command = command_line(tmp_path / "python", tmp_path, options, 8123)
    own = {"--served-model-name": 2, "--host": 2, "--port": 2, "--disable-uvicorn-access-log": 1}
    flags = command[command.index("serve") + 2 :]
    for name, length in own.items():
        at = flags.index(name)
        del flags[at : at + length]
    assert shlex.split(served_line("owner/my model", options)) == ["vllm", "serve", "owner/my model", *flags]
    assert "'my template.jinja'" in served_line(".", options)
