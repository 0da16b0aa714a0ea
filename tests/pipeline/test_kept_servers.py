from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from quantline.pipeline import kept_servers
from quantline.pipeline.config import parse
from quantline.pipeline.kept_servers import keeping_of, make_room, owner

STAGE = "from quantline.pipeline.kept_servers import owner; print(owner())"


@pytest.fixture
def under_dvc(monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "serve_smoke@v")
    monkeypatch.setattr(kept_servers, "owner", lambda: 4711)


def run_of(composed, stage, *overrides, frozen=True, device="cpu"):
    config = parse(composed("variant=v", *overrides))
    is_baseline = config.method.name == "float"
    return SimpleNamespace(
        stage=stage, config=config, frozen=frozen, device=device, is_baseline=is_baseline,
        checkpoint_stage="download" if is_baseline else "convert", inputs={"download": "aa", "convert": "bb"},
    )  # fmt: skip


def test_the_owner_is_the_process_that_named_the_stage_however_many_shells_are_between(root):
    for shells in (0, 2):
        command = [sys.executable, "-c", STAGE]
        for _ in range(shells):
            command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
        environment = {**os.environ, "DVC_STAGE": "tasks@v", "PYTHONPATH": str(root / "src")}
        told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert int(told.stdout) == os.getpid()


def test_a_stage_by_hand_has_no_owner_and_shares_no_server(composed, monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert owner() is None
    assert keeping_of(run_of(composed, "tasks", frozen=False)) is None


@pytest.mark.parametrize(
    ("given", "role", "onward"),
    [
        (("serve_smoke",), "variant", True),
        (("serve_smoke", "tasks=none"), "variant", True),
        (("serve_smoke", "speed=none"), "variant", True),
        (("serve_smoke", "tasks=none", "speed=none"), "variant", False),
        (("tasks",), "variant", True),
        (("tasks", "speed=none"), "variant", False),
        (("speed",), "variant", False),
        (("speed",), "float", True),
        (("tasks", "method=float"), "float", True),
    ],
)
def test_a_server_is_handed_on_while_a_later_stage_of_the_configuration_asks_for_it(
    composed, under_dvc, given, role, onward
):
    keeping = keeping_of(run_of(composed, *given), role)
    assert (keeping.owner, keeping.role, keeping.stage, keeping.onward) == (4711, role, given[0], onward)
    assert keeping.content == ("aa" if role == "float" else "bb")


def test_on_a_gpu_the_speed_is_measured_on_servers_of_its_own(composed, under_dvc):
    assert keeping_of(run_of(composed, "speed", device="cuda")) is None
    assert not keeping_of(run_of(composed, "tasks", device="cuda")).onward
    assert keeping_of(run_of(composed, "serve_smoke", device="cuda")).onward


@pytest.mark.parametrize(
    ("found", "ended"),
    [
        (("quantize", 4000, []), False),
        (("quantize", 3999, []), True),
        (("evaluate", 4000, ["a GPU"]), True),
        (("tasks", 0, []), False),  # its own server's start sees to that
        (("tasks", 0, ["a GPU"]), False),
        (("speed", 0, []), False),
        (("speed", 0, ["a GPU"]), True),  # it shares none there
    ],
)
def test_servers_that_wait_make_room_for_a_stage_that_computes(under_dvc, tmp_path, monkeypatch, found, ended):
    ends, (stage, available, gpus) = [], found
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr("quantline.serving.handover.end_all", ends.append)
    monkeypatch.setattr("quantline.core.gpu.visible_gpus", lambda: gpus)
    memory = SimpleNamespace(available=kept_servers._PROCESS_BYTES + available)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    make_room(stage, tmp_path)
    assert ends == ([4711] if ended else [])
