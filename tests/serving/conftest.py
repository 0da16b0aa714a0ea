"""A small server in the place of vLLM's."""

from __future__ import annotations

import fake_server
import pytest
import sections

from quantline.serving.server import serve


@pytest.fixture
def start(tmp_path):
    """Start a server with a fault of `fake_server.FAULTS`, or with none."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    def started(fault: str = ""):
        options = sections.server(environment={"FAULT": fault}, startup_timeout_seconds=20.0)
        return serve(fake_server.interpreter(tmp_path), model, options, log=tmp_path / "server.log")

    return started
