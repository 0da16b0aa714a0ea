"""A search in MLflow: a run with its candidates below, written once, replaced where it came to something else."""

from __future__ import annotations

from copy import deepcopy

import pytest

import tests.lifecycle.tracking.test_writer as test_tracking
from quantline.core.secrets import Scrubber
from quantline.lifecycle.tracking.searches import plan_search, publish_plan
from quantline.lifecycle.tracking.store import resolve_uri
from quantline.lifecycle.tracking.view import SEARCH_COLUMNS
from quantline.report.choice import write_search
from tests.lifecycle.tracking.test_writer import EXPERIMENT
from tests.planning.test_search_record import record

pytestmark = pytest.mark.e2e
database, root = test_tracking.database, test_tracking.root  # fixtures


def published(root, found):
    uri = resolve_uri(None, root)
    return publish_plan(found, write_search(found, root / "search"), uri=uri, experiment=EXPERIMENT)


def runs(root, condition=""):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return client, client.search_runs([experiment.experiment_id], condition)


def test_a_search_has_its_candidates_below_with_line_figures_state_and_why(root):
    published(root, record())
    client, (search,) = runs(root, "tags.\"quantline.role\" = 'search'")
    _, children = runs(root, f"tags.\"mlflow.parentRunId\" = '{search.info.run_id}'")
    found = {one.info.run_name: one.data for one in children}
    assert found.keys() == {"rtn-6", "rtn-5", "rtn-w8", "rtn-w4", "gptq-w4", "awq-w4", "awq-w8"}
    winner = found["rtn-6"]
    assert winner.params["line"] == "method=rtn-6 'layers.rules=[{match: \"a.b\", bits: 8}]'"
    assert winner.metrics["1 quality/change_percent"] == pytest.approx(0.3)
    assert winner.metrics["1 quality/kl"] == 0.001
    assert (winner.metrics["search/share_of_text"], found["rtn-w4"].metrics["search/share_of_text"]) == (1, 8 / 24)
    assert {name: winner.tags[name] for name in SEARCH_COLUMNS} | {"why": ""} == {
        "state": "winner", "change of perplexity": "+0.30 % [+0.20, +0.40]", "KL": "0.00100", "size": "0.000140 MB",
        "documents": "24", "why": "",
    }  # fmt: skip
    assert (found["awq-w8"].tags["state"], found["awq-w8"].tags["why"]) == ("pruned", "awq takes 4")
    names = {one.path for one in client.list_artifacts(search.info.run_id)}
    assert names == {"record.json", "candidates.csv", "front.csv", "front.svg"}
    assert "**Answer: `rtn-6`**" in search.data.tags["mlflow.note.content"]
    assert "Its line for params.yaml: `method=rtn`" in search.data.tags["mlflow.note.content"]
    assert "| `rtn-w8` | met |" in search.data.tags["mlflow.note.content"]


def test_the_same_search_again_writes_nothing(root):
    assert len(published(root, record()).created) == 1
    before = test_tracking.dump(root)
    again = {**record(), "started": 99.0, "seconds": 1.0}
    assert len(published(root, again).unchanged) == 1
    assert test_tracking.dump(root) == before


def test_a_search_that_was_cut_off_while_it_was_published_is_completed(root, monkeypatch):
    from quantline.lifecycle.tracking.writer import _Publisher

    filled, whole = [], _Publisher._fill_child

    def some(self, plan, children, parent):
        if len(filled) == 3:
            raise RuntimeError("cut off")
        filled.append(plan.name)
        whole(self, plan, children, parent)

    with monkeypatch.context() as patch:
        patch.setattr(_Publisher, "_fill_child", some)
        with pytest.raises(test_tracking.TrackingError, match="the same search again finds its measurements"):
            published(root, record())
    assert len(published(root, record()).completed) == 1
    assert len(runs(root)[1]) == 8


def test_a_search_that_came_to_something_else_takes_the_place_of_the_former(root):
    published(root, record())
    other = deepcopy(record())
    other["candidates"][0]["change_percent"] = 0.35
    assert len(published(root, other).created) == 1
    _, current = runs(root, "tags.\"quantline.current\" = 'true'")
    assert len(current) == 8
    assert {one.data.metrics.get("1 quality/change_percent") for one in current if one.info.run_name == "rtn-6"} == {
        0.35
    }


def test_of_very_many_candidates_only_those_with_figures_are_runs():
    found = record()
    row = next(row for row in found["candidates"] if row["state"] == "pruned")
    found["candidates"] += [{**row, "name": f"awq-{number}"} for number in range(300)]
    assert {child.tags["state"] for child in plan_search(found, {}, Scrubber()).children} == {
        "winner", "finalist", "met", "raced out",
    }  # fmt: skip
