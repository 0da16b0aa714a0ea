from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import time

import fake_fleet
import httpx
import pytest

from quantline.config.fleet import CaptureConfig, EndpointConfig
from quantline.serving.fleet.captures import captures, remove_old
from quantline.serving.fleet.child import wait_until
from quantline.serving.fleet.envoy import CAPTURES
from quantline.serving.ports import free_port


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    found = folder / "certificate.pem", folder / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    command += [
        "-subj",
        "/CN=fleet",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-out",
        str(found[0]),
        "-keyout",
        str(found[1]),
    ]
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    subprocess.run(command, check=True, capture_output=True)
    return found


@pytest.mark.toolchain("router")
def test_requests_and_answers_are_captured_streamed_or_not_and_no_key_is_among_them(tmp_path, certificate):
    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    end = EndpointConfig(port=free_port("127.0.0.1"), certificate=str(certificate[0]), private_key=str(certificate[1]))
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys: [{client: team, key: sk-secret-1, precision: true}, {client: other, key: sk-secret-2}]")
    with fake_fleet.up(tmp_path, capture_share=1.0, keys_file=str(keys), endpoint=end) as running:
        url, state = running.fleet.url, tmp_path / "state"
        assert url.startswith("https://")

        def ask(path="chat/completions", key="sk-secret-1", headers=None, **body):
            body = {"model": "low", "max_tokens": 2, **body}
            given = {"authorization": f"Bearer {key}", "cookie": "session=sk-cookie", **(headers or {})}
            return httpx.post(f"{url}/v1/{path}", json=body, headers=given, trust_env=False, verify=trusted)

        said = [{"role": "user", "content": "What is an index?"}]
        assert ask(messages=said).status_code == 200
        assert ask(messages=said, stream=True).status_code == 200
        assert ask("completions", prompt="An index is").status_code == 200
        # What keys are for: none, a wrong one, one that may not choose the precision, a header of the router's own.
        bare = httpx.post(f"{url}/v1/completions", json={"model": "low"}, trust_env=False, verify=trusted)
        assert bare.status_code == 401
        assert ask(key="sk-wrong-key", messages=said).status_code == 401
        chosen = {"x-quantline-precision": "high"}
        assert ask(messages=said, headers=chosen).headers["x-quantline-variant"] == "float"
        pretended = {**chosen, "x-quantline-client": "team"}
        assert ask(messages=said, headers=pretended, key="sk-secret-2").headers["x-quantline-variant"] == "w4"
        assert wait_until(lambda: len(list(captures(state))) >= 5, 5)
        seen = fake_fleet.counts(running, "w4")["headers"]
        assert "authorization" not in seen
        assert "cookie" not in seen
        # Another key, without a restart.
        keys.write_text("keys: [{client: team, key: sk-secret-3}]")
        os.utime(keys, (time.time() + 5, time.time() + 5))
        running.step()
        running.step()
        assert ask(messages=said).status_code == 401
        assert ask(messages=said, key="sk-secret-3").status_code == 200
        # A file that is being edited stops nothing: the gauge ends, and the router is changed with the keys of before.
        keys.write_text("keys: [")
        os.utime(keys, (time.time() + 9, time.time() + 9))
        running.gauge.end(kill=True)
        running.step()
        assert not running.asks_gauge
        assert ask(messages=said, key="sk-secret-3").status_code == 200
        running.router.child.end(kill=True)
        running.step()
        assert wait_until(lambda: ask(messages=said, key="sk-secret-3").status_code == 200, 10)
        found = list(captures(state))
    assert {capture.answer for capture in found} == {"w4 w0 w1", "float w0 w1"}
    assert {capture.variant for capture in found} == {"w4", "float"}
    assert sum(capture.prompt == "An index is" for capture in found) == 1
    assert all(capture.asked == "low" and capture.id for capture in found)
    files = [path for path in state.rglob("*") if path.is_file()]
    keyed = {path.name for path in files if b"sk-" in path.read_bytes()}
    assert keyed == {"routes.json"}  # the router needs them there, and only this user can read it
    assert (state / "routes.json").stat().st_mode & 0o077 == 0
    assert state.stat().st_mode & 0o077 == 0


def test_old_captures_go_and_the_oldest_beyond_the_size(tmp_path):
    folder = tmp_path / CAPTURES
    folder.mkdir()
    for number in range(5):
        path = folder / f"c_{number}.json"
        path.write_bytes(b"x" * 2**20)
        os.utime(path, (1000.0 + number, 1000.0 + number))
    assert remove_old(tmp_path, CaptureConfig(keep_hours=1, keep_mib=100), now=1000.0 + 3602) == 2
    assert remove_old(tmp_path, CaptureConfig(keep_hours=1, keep_mib=1.5), now=1000.0) == 2
    assert [path.name for path in folder.iterdir()] == ["c_4.json"]


def test_what_is_cut_off_or_no_request_for_text_is_left_out(tmp_path):
    folder = tmp_path / CAPTURES
    folder.mkdir()
    (folder / "a.json").write_text("{")
    (folder / "b.json").write_text('{"http_buffered_trace": {"request": {}, "response": {}}}')
    assert list(captures(tmp_path)) == []


def test_captures_come_by_their_age_since_their_names_are_random(tmp_path):
    folder = tmp_path / CAPTURES
    folder.mkdir()
    for age, name in enumerate(("c_3", "c_9", "c_1")):
        headers = [{"key": "x-request-id", "value": name}, {"key": ":status", "value": "200"}]
        trace = {
            "request": {"headers": [], "body": {"as_string": json.dumps({"model": "low", "prompt": "x"})}},
            "response": {"headers": headers, "body": {"as_string": json.dumps({"choices": [{"text": "y"}]})}},
        }
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"http_buffered_trace": trace}))
        os.utime(path, (1000.0 - age, 1000.0 - age))
    assert [capture.id for capture in captures(tmp_path)] == ["c_1", "c_9", "c_3"]
