"""A running fleet of fakes: the real router, gauge and supervisors in front of `fake_openai` servers."""

from __future__ import annotations

from pathlib import Path

import fake_openai
import httpx
import sections
from checkout_paths import ROOT

from quantline.config.fleet import EndpointConfig, HealthConfig
from quantline.serving.command import ServerOptions
from quantline.serving.fleet.running import RunningFleet
from quantline.serving.fleet.servers import Start
from quantline.serving.fleet.spec import Fleet, Variant
from quantline.serving.ports import free_port
from quantline.toolchains.router import envoy

CHAINS = {"high": ("float", "w8"), "medium": ("w8", "float"), "low": ("w4", "w8", "float")}
NAMES = ("float", "w8", "w4")


def make(place: Path, **changes) -> tuple[Fleet, list[Start]]:
    """A fleet of three fakes, and how they are started. changes: of the fleet."""
    place.mkdir(parents=True, exist_ok=True)
    python = fake_openai.interpreter(place)
    ports = {name: free_port("127.0.0.1") for name in NAMES}
    model = place / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    variants = tuple(
        Variant(name=name, port=ports[name], weight_bytes=size) for name, size in zip(NAMES, (16, 8, 4), strict=True)
    )
    end = EndpointConfig(port=free_port("127.0.0.1"))
    given = {
        "variants": variants, "precisions": CHAINS, "endpoint": end, "admin_port": free_port("127.0.0.1"),
        "gauge_port": free_port("127.0.0.1"), "hang_seconds": 1.5, "health": HealthConfig(interval_seconds=0.5),
    }  # fmt: skip
    fleet = Fleet(**{"folder": str(place / "state"), **given, **changes})
    process = sections.server(startup_timeout_seconds=30.0).process
    starts = [
        Start(
            names=(name, *fleet.precisions), python=str(python), folder=str(model), log=str(place / f"{name}.log"),
            server=ServerOptions(process.model_copy(update={"port": ports[name]})),
        )
        for name in NAMES
    ]  # fmt: skip
    return fleet, starts


def up(place: Path, **changes) -> RunningFleet:
    """The same, to be entered."""
    fleet, starts = make(place, **changes)
    return RunningFleet(fleet, envoy(ROOT), starts)


def order(running: RunningFleet):
    """Sets the fault of a fake by its variant's name."""

    def set_fault(name: str, fault: str) -> None:
        httpx.post(f"http://{running.fleet.variant(name).address}/control", json={"fault": fault}, trust_env=False)

    return set_fault


def counts(running: RunningFleet, name: str) -> dict:
    """What a fake has counted."""
    return httpx.get(f"http://{running.fleet.variant(name).address}/control", trust_env=False).json()
