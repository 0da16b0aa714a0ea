from __future__ import annotations

import fake_fleet
import pytest

from quantline.core.errors import UserError
from quantline.core.files import read_json
from quantline.lifecycle import fleet_smoke
from quantline.lifecycle.fleet import Resolved
from quantline.lifecycle.fleet_smoke import drill_values, prove, prove_in_pipeline, shown
from quantline.lifecycle.serve import Typed
from quantline.pipeline.config import parse

CHAIN = "fleet.precisions.high=[float,w8]"


@pytest.fixture
def fleet(composed, root, tmp_path, monkeypatch):
    """What a command line asks for; the variants are fakes, and only two faults are tried."""
    made, starts = fake_fleet.make(tmp_path / "fakes")
    contents = {"float": "f", "w8": "8"}
    resolved = Resolved(made, tuple(starts), (), contents)
    asked = []
    monkeypatch.setattr(fleet_smoke, "resolve", lambda root, typed, *_: asked.append(typed) or resolved)
    monkeypatch.setattr(fleet_smoke, "envoy", lambda *_: fake_fleet.envoy(root))
    monkeypatch.setattr(fleet_smoke, "REAL", ("kill -9", "reload"))

    def typed(*overrides):
        return Typed(composed("fleet_smoke.requests=20", "fleet_smoke.least_seconds=0", *overrides), [])

    typed.contents, typed.asked = contents, asked
    return typed


def test_a_drill_disturbs_no_fleet_that_runs_and_fills_short_queues(composed):
    values = composed(
        "fleet.endpoint.host=0.0.0.0", "fleet.endpoint.port=9000", "fleet.canary.share=0.1", "fleet.capture.share=0.5",
        "fleet_smoke.hang_seconds=7", "fleet.keys_file=k.yaml", "fleet.name=" + "a" * 41,
    )  # fmt: skip
    found = parse(drill_values(values, parse(values).fleet_smoke)).fleet
    assert found.name == "a" * 35 + "-smoke"
    assert (found.endpoint.host, found.endpoint.port) == ("127.0.0.1", 0)
    assert (found.canary.share, found.capture.share, found.keys_file) == (0.0, 0.0, "k.yaml")
    assert (found.limits.queued_requests, found.limits.hang_seconds) == (4, 7)


def test_a_load_that_would_never_fill_the_queue_is_refused(composed):
    with pytest.raises(UserError, match=r"fleet_smoke\.queue_concurrency=4: would never fill a queue of 4"):
        parse(composed("fleet_smoke.queue_concurrency=4"))


@pytest.mark.toolchain("router")
def test_the_drill_by_hand_is_kept_and_one_without_a_second_variant_is_refused(fleet, tmp_path):
    rows, path = prove(tmp_path, fleet(CHAIN))
    assert [(row.fault, row.lost) for row in rows] == [("kill -9", 0), ("reload", 0)]
    kept = read_json(path)
    assert {key: kept["metrics"][key] for key in ("fleet_lost", "fleet_requests", "lost/kill_9")} == {
        "fleet_lost": 0.0, "fleet_requests": 40.0, "lost/kill_9": 0.0,
    }  # fmt: skip
    assert kept["metrics"]["back_seconds/kill_9"] == rows[0].back_seconds
    assert (kept["status"], kept["precision"], kept["chain"]) == ("ok", "high", ["float", "w8"])
    assert path.parent.name == "fleet-smoke"
    with pytest.raises(UserError, match="no precision has a second variant"):
        prove(tmp_path, fleet())


def test_the_pipeline_runs_no_drill_unless_it_is_asked_for_one_and_goes_on_where_the_fleet_cannot_run(fleet, tmp_path):
    found = prove_in_pipeline(tmp_path, fleet(CHAIN))
    assert found == read_json(tmp_path / "fleet_smoke.json") == {"status": "not asked for"}
    found = prove_in_pipeline(tmp_path, fleet("fleet_smoke.pipeline=true"))
    assert found["status"] == "refused"
    assert "no precision has a second variant" in shown(found)[0]
    assert not fleet.asked


@pytest.mark.toolchain("router")
def test_the_pipeline_repeats_a_drill_only_where_something_is_another(fleet, tmp_path, monkeypatch):
    asked = fleet(CHAIN, "fleet_smoke.pipeline=true")
    first = prove_in_pipeline(tmp_path, asked)
    assert first["status"] == "ok"
    assert first["variants"] == {
        "float": {"content": "f", "runtime": "vllm"}, "w8": {"content": "8", "runtime": "vllm"},
    }  # fmt: skip
    assert "no request was lost" in shown(first)[-1]
    (tmp_path / "fleet_smoke.json").unlink()  # as DVC does
    assert prove_in_pipeline(tmp_path, asked) == first == read_json(tmp_path / "fleet_smoke.json")
    fleet.contents["w8"] = "other"
    second = prove_in_pipeline(tmp_path, asked)
    assert second["identity"] != first["identity"]
    assert second["variants"]["w8"]["content"] == "other"
    fleet.contents["w8"] = "8"
    assert prove_in_pipeline(tmp_path, asked) == first
