"""A variant of the pipeline, served until Ctrl-C."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path

import httpx
import pytest
from checkout import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]


def test_a_variant_is_served_by_name_until_ctrl_c_and_leaves_its_log_alone(pipeline, untouched):
    name = next(name for name in ("awq-w4-g128", "float") if pipeline.result(name, "serve_smoke")["status"] == "ok")
    process = pipeline.start("python", "-m", "stages.serve", f"variant={name}", "port=0")
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        if "Ctrl-C ends it" in line:
            break
    assert process.poll() is None, process.communicate()
    text = "".join(said)
    assert re.search(rf"^ready: http://127\.0\.0\.1:\d+/v1 model {name}, ", text, re.MULTILINE), text
    command = shlex.split(re.search(r"ask it: (.*)", text)[1])
    answer = httpx.post(command[1], json=json.loads(command[-1]), timeout=120, trust_env=False).raise_for_status()
    assert answer.json()["usage"]["completion_tokens"] > 0
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out.splitlines()) == (0, ["ending", "ended, no process is left"]), err
    log = re.search(r"log: (.*)", text)[1]
    assert "Application startup complete" in Path(log).read_text(encoding="utf-8")


def test_ctrl_c_while_the_server_loads_ends_everything(pipeline, untouched):
    process = pipeline.start("python", "-m", "stages.serve", "artifacts/shared/download/model", "port=0")
    log = pipeline.root / "scratch" / ".serve" / "download-0.log"  # of this server, which has begun to load
    wait_for(lambda: log.is_file() and log.stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
