from __future__ import annotations

import pytest

from quantline.serving.server_log import ending, failure_reason, kernels, weights_bytes


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "(EngineCore pid=1) ERROR 11-21 23:27:11 [core.py:1] ValueError: first\n"
            "(APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: first",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, bits=3 [type=value_error]\n    For further information visit somewhere\n",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig "
            "Value error, bits=3 [type=value_error]",
        ),
        ("vllm serve: error: unrecognized arguments: --foo\n", "vllm serve: error: unrecognized arguments: --foo"),
        ("/opt/bin/python: No module named vllm\n", "/opt/bin/python: No module named vllm"),
        (
            # The worker's traceback, the engine's and the server's, each raised again by the next.
            "(Worker pid=3) ERROR 11-21 23:51:00 [multiproc_executor.py:9] WorkerProc failed to start.\n"
            "(Worker pid=3) ERROR 11-21 23:51:00 [multiproc_executor.py:9] Traceback (most recent call last):\n"
            "(Worker pid=3) ERROR 11-21 23:51:00 [multiproc_executor.py:9]     raise it\n"
            "(Worker pid=3) ERROR 11-21 23:51:00 [multiproc_executor.py:9] torch.OutOfMemoryError: too much\n"
            "(EngineCore pid=2) ERROR 11-21 23:51:01 [core.py:9] Exception: WorkerProc initialization failed due to an "
            "exception in a background process. See stack trace for root cause.\n"
            "(EngineCore pid=2) Process EngineCore:\n"
            "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n",
            "torch.OutOfMemoryError: too much",
        ),
        ("safetensors_rust.SafetensorError: cut short\n", "safetensors_rust.SafetensorError: cut short"),
        ("something odd\n\n", "something odd"),
        ("", "it printed nothing"),
    ],
)
def test_the_reason_of_a_failure_is_the_root_exception(tmp_path, text, reason):
    log = tmp_path / "log"
    log.write_text(text)
    assert failure_reason(log) == reason


def test_a_missing_log_and_a_long_reason_are_told_too(tmp_path):
    assert failure_reason(tmp_path / "none") == "it left no log"
    (tmp_path / "log").write_text("ValueError: " + "x" * 5000)
    assert len(failure_reason(tmp_path / "log")) < 700


def test_a_kill_reads_as_out_of_memory():
    assert ending(137) == ending(-9) == "was killed (out of memory?)"
    assert ending(3) == "ended with code 3"


def test_weights_and_kernels_are_read_from_the_log():
    text = (
        "(Worker_TP0 pid=1) INFO [gpu_model_runner.py:1] Model loading took 1.5 GiB memory and 3.1 seconds\n"
        "(Worker_TP1 pid=2) INFO [gpu_model_runner.py:1] Model loading took 0.5 GiB memory and 3.1 seconds\n"
        "INFO [a.py:1] Using MacheteLinearKernel for AutoGPTQLinearMethod\n"
        "INFO [b.py:1] Using MacheteLinearKernel for mixed-precision linear\n"
    )
    assert weights_bytes(text) == 2 * 1024**3
    assert weights_bytes("no such line") is None
    assert weights_bytes("[model_runner.py:303] Model loading took 0.5 GiB and 3.100000 seconds") == 2**29
    assert kernels(text) == ["MacheteLinearKernel"]
