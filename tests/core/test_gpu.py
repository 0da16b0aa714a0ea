from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from quantline.core.gpu import AcceleratorUse, Gpu, accelerator_use, visible_gpus


class NVMLError(Exception):
    pass


def nvml(boards, *, silent=()):
    """The part of pynvml that is asked; `silent` names the functions that this board does not answer."""
    answers = {
        "nvmlDeviceGetMemoryInfo": lambda board: SimpleNamespace(used=board["used"], total=board["total"]),
        "nvmlDeviceGetUtilizationRates": lambda board: SimpleNamespace(gpu=board["busy"]),
        "nvmlDeviceGetPowerUsage": lambda _: 70_500,
        "nvmlDeviceGetCudaComputeCapability": lambda _: (8, 9),
        "nvmlDeviceGetName": lambda _: b"L4",
        "nvmlDeviceGetHandleByIndex": lambda index: boards[index],
        "nvmlDeviceGetCount": lambda: len(boards),
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
    }

    def refuse(*_):
        raise NVMLError

    return SimpleNamespace(NVMLError=NVMLError, **{**answers, **dict.fromkeys(silent, refuse)})


BOARDS = [{"used": 1, "total": 10, "busy": 5}, {"used": 2, "total": 20, "busy": 60}]


@pytest.fixture
def boards(monkeypatch):
    def install(**options):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setitem(sys.modules, "pynvml", nvml(BOARDS, **options))

    return install


def test_a_gpu_has_its_name_memory_use_and_compute_capability(boards):
    boards()
    assert visible_gpus() == [Gpu("L4", 1, 10, 5.0, 70.5, 89), Gpu("L4", 2, 20, 60.0, 70.5, 89)]
    assert accelerator_use() == AcceleratorUse(3, 60.0)


def test_only_the_gpus_that_the_environment_selects_are_listed(boards, monkeypatch):
    boards()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.memory_total_bytes for gpu in visible_gpus()] == [20]


def test_what_a_board_does_not_report_is_none_and_the_rest_is_kept(boards):
    boards(silent=("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetCudaComputeCapability"))
    assert visible_gpus()[0] == Gpu("L4", 1, 10, None, None, None)
    assert accelerator_use() == AcceleratorUse(3, None)


@pytest.mark.parametrize("silent", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetMemoryInfo"])
def test_without_a_driver_there_is_no_gpu(boards, silent):
    boards(silent=(silent,))
    assert visible_gpus() == []
    assert accelerator_use() is None


def test_without_the_library_there_is_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert visible_gpus() == []
