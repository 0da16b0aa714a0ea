from __future__ import annotations

import fake_fleet
import pytest

from quantline.core.errors import UserError
from quantline.core.files import read_json
from quantline.lifecycle import fleet_smoke
from quantline.lifecycle.fleet import Resolved
from quantline.lifecycle.serve import Typed
from quantline.serving.server import Vllm


@pytest.mark.toolchain("router")
def test_the_drill_of_a_fleet_is_kept_and_one_without_a_second_variant_is_refused(
    composed, root, tmp_path, monkeypatch
):
    fleet, starts = fake_fleet.make(tmp_path / "fakes")

    def found(made):
        monkeypatch.setattr(fleet_smoke, "resolve", lambda *_: Resolved(made, tuple(starts), ()))
        return fleet_smoke.prove(tmp_path, Typed(composed(), []), 20)

    monkeypatch.setattr(fleet_smoke, "server_of", lambda run: Vllm(tmp_path, "0.32.0"))
    monkeypatch.setattr(fleet_smoke, "envoy", lambda *_: fake_fleet.envoy(root))
    monkeypatch.setattr(fleet_smoke, "REAL", ("kill -9", "reload"))
    rows, path = found(fleet)
    assert [(row.fault, row.lost) for row in rows] == [("kill -9", 0), ("reload", 0)]
    kept = read_json(path)
    assert kept["metrics"] == {"fleet_lost": 0.0, "fleet_requests": 40.0, "fleet_quiet": 0.0}
    assert (kept["precision"], kept["chain"]) == ("high", ["float", "w8"])
    with pytest.raises(UserError, match="no precision has a second variant"):
        found(fleet.model_copy(update={"precisions": {"high": ("float",)}}))
