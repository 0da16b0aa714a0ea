from __future__ import annotations

import pytest
import yaml
from variant_records import record

from quantline.core.errors import TrackingError, UserError
from quantline.lifecycle.publish import LOG, publish_by_hand, publish_in_background, publish_records
from quantline.lifecycle.storage.dvc_cache import md5_of
from quantline.lifecycle.tracking.store import experiment_name
from quantline.pipeline.config import parse


class Report:
    warnings = ("a file is too large",)

    def __str__(self):
        return "published 1 variant"


@pytest.fixture
def config(composed):
    return lambda *overrides: parse(composed(*overrides))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "quantline/demo"),
        (["model.name=mine"], "quantline/mine"),
        (["model=qwen2_5_0_5b"], "quantline/Qwen2.5-0.5B-Instruct"),
        (["model.name=mine", "tracking.experiment=study"], "study"),
    ],
)
def test_an_experiment_is_named_after_the_model_unless_it_is_given(config, overrides, name):
    chosen = config(*overrides)
    assert experiment_name(chosen.tracking, chosen.model) == name


def test_publishing_prints_the_outcome_with_its_warnings(config, monkeypatch, capsys, tmp_path):
    given = {}
    monkeypatch.setattr(
        "quantline.lifecycle.tracking.writer.publish", lambda records, **values: given.update(values) or Report()
    )
    chosen = config("tracking.uri=http://host:5000", "tracking.timeout_seconds=3.0")
    assert publish_records([], chosen, tmp_path) is True
    assert given == {
        "tracking_uri": "http://host:5000", "experiment": "quantline/demo", "root": tmp_path, "timeout_seconds": 3.0,
        "limit_seconds": None, "report": None, "drill": None,
    }  # fmt: skip
    assert capsys.readouterr().err == "published 1 variant\n  note: a file is too large\n"


def test_nobody_waits_for_a_publication_in_the_background_and_its_log_has_what_it_said(
    root, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PYTHONPATH", f"{root}/src:{root}")
    process = publish_in_background("no-such-run", tmp_path)
    assert process.poll() is None
    assert capsys.readouterr().err == f"publishing in the background; log: {tmp_path}/scratch/.publish.log\n"
    assert process.wait(120) == 2
    assert "by-hand/no-such-run" in (tmp_path / LOG).read_text()


def test_the_option_decides_who_publishes(config, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(
        "quantline.lifecycle.publish.publish_in_background", lambda name, root: started.append((name, root))
    )
    publish_by_hand(config("tracking.background=true"), "mine", tmp_path)
    assert started == [("mine", tmp_path)]
    with pytest.raises(UserError, match="by-hand/mine"):  # the record is read here, so it waits
        publish_by_hand(config(), "mine", tmp_path)


def test_outputs_that_dvc_lock_lacks_are_named(config, monkeypatch, capsys, tmp_path):
    published = []
    monkeypatch.setattr(
        "quantline.lifecycle.tracking.writer.publish", lambda records, **_: published.extend(records) or Report()
    )
    made = record("awq-w4", "awq", 4, 0.01, tmp_path, stages=("quantize", "convert"))
    folder = made.folder / "artifacts" / "awq-w4"
    folder.mkdir(parents=True)
    (folder / "quantize.json").write_text("{}")
    md5 = md5_of(folder / "quantize.json")
    lock = {"stages": {"quantize@awq-w4": {"outs": [{"path": "artifacts/awq-w4/quantize.json", "md5": md5}]}}}
    (made.folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert publish_records([made], config(), tmp_path) is True
    assert published[0].lock == {}
    said = capsys.readouterr().err
    assert "  note: awq-w4: dvc.lock lacks convert@awq-w4 as they are here" in said


def test_a_server_that_is_down_is_reported_and_not_raised(config, monkeypatch, capsys, tmp_path):
    def down(_records, **_values):
        raise TrackingError("http://host:5000 does not answer")

    monkeypatch.setattr("quantline.lifecycle.tracking.writer.publish", down)
    assert publish_records([], config(), tmp_path) is False
    assert capsys.readouterr().err == "NOT PUBLISHED: http://host:5000 does not answer\n"
