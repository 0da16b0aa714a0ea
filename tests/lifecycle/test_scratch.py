from __future__ import annotations

import json
import os

import pytest

from quantline.core.errors import UserError
from quantline.lifecycle.scratch import age, entries, remove, selected, table

NOW = 1_800_000_000.0
DAY = 86400


@pytest.fixture
def root(tmp_path):
    """One variant of the pipeline, two runs by hand of different age, and a float baseline by hand."""
    make(tmp_path / "artifacts" / "one", ["quantize", "evaluate"], ratio=1.02)
    make(
        tmp_path / "scratch" / "gptq-w8-g128", ["quantize", "evaluate"], days=10, ratio=1.001, made="method=gptq bits=8"
    )
    make(tmp_path / "scratch" / "awq-w4-g64", ["quantize"], days=1, made="group_size=64")
    make(tmp_path / "scratch" / "float" / "demo-1234", ["download"], days=10)
    return tmp_path


def make(folder, stages, *, days=0.0, ratio=None, made=None):
    for stage in stages:
        (folder / stage).mkdir(parents=True)
        (folder / stage / "file").write_bytes(bytes(1000))
        metrics = {"perplexity_ratio": ratio} if ratio and stage == "evaluate" else {}
        (folder / f"{stage}.json").write_text(json.dumps({"stage": stage, "metrics": metrics}))
        os.utime(folder / f"{stage}.json", (NOW - days * DAY,) * 2)
    if made:
        (folder / "config.json").write_text(json.dumps({"overrides": made}))


def test_every_run_has_how_far_it_came_its_quality_and_its_size(root):
    found = {entry.name: entry for entry in entries(root)}
    assert list(found) == ["one", "by-hand/awq-w4-g64", "by-hand/float/demo-1234", "by-hand/gptq-w8-g128"]
    best = found["by-hand/gptq-w8-g128"]
    assert (best.stages, best.made_of) == (("quantize", "evaluate"), "method=gptq bits=8")
    assert best.change_percent == pytest.approx(0.1)
    assert 2000 < best.size_bytes < 2500
    assert found["by-hand/awq-w4-g64"].change_percent is None


def test_outputs_that_share_a_file_count_once(root):
    before = {entry.name: entry.size_bytes for entry in entries(root)}
    (root / "artifacts" / "one" / "convert").mkdir()
    (root / "artifacts" / "one" / "convert" / "file").hardlink_to(root / "artifacts" / "one" / "quantize" / "file")
    assert {entry.name: entry.size_bytes for entry in entries(root)} == before


def test_of_a_variant_of_the_pipeline_it_is_told_whether_its_line_is_still_there(root):
    params = root / "params.yaml"
    for lines, told in (("one: method=rtn bits=4", "a line of params.yaml"), ("two: method=rtn", "no longer has")):
        params.write_text(f"shared: model=demo\nbaseline: method=float\nvariants:\n  {lines}\n")
        assert told in entries(root)[0].made_of


def test_the_table_says_the_same(root):
    lines = table(entries(root), now=NOW).splitlines()
    assert lines[0].split("  ")[0] == "run"
    row = next(line for line in lines if line.startswith("by-hand/gptq"))
    assert row.split() == [
        "by-hand/gptq-w8-g128", "evaluate", "+0.10", "%", "2.13", "kB", "10", "d", "method=gptq", "bits=8",
    ]  # fmt: skip
    assert table([]) == "no results yet"


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_is_as_wide_as_the_terminal(root, width):
    name = "awq-w4-g64-calibration_domain-low_memory-evaluate_max_documents-24-speed_none"
    made = "method=awq group_size=64 calibration=domain low_memory=true evaluate.max_documents=24 speed=none tasks=none"
    make(root / "scratch" / name, ["serve_smoke"], days=400, ratio=None, made=made)
    lines = table(entries(root), now=NOW, width=width).splitlines()
    assert max(map(len, lines)) <= width
    (row,) = [line for line in lines if "400 d" in line]
    assert "_none  " in row
    assert "  meth" in row


def test_runs_by_hand_are_removed_by_name_or_age_and_the_pipelines_stay(root):
    old = selected(root, [], "7d", now=NOW)
    assert {entry.name for entry in old} == {"by-hand/gptq-w8-g128", "by-hand/float/demo-1234"}
    assert remove(root, old) > 2000
    assert [entry.name for entry in entries(root)] == ["one", "by-hand/awq-w4-g64"]
    remove(root, selected(root, ["awq-w4-g64"], None))
    assert [entry.name for entry in entries(root)] == ["one"]


@pytest.mark.parametrize(
    ("names", "older", "said"),
    [
        ([], None, "give run=NAME, or older=7d"),
        ([], "7", "older=7: is not a span; give a number with h, d or w"),
        (["one"], None, "run=one: .* only runs by hand are removed"),
        (["gptq-w8"], None, r"did you mean by-hand/gptq-w8-g128\?"),
    ],
)
def test_what_cannot_be_removed_is_refused(root, names, older, said):
    with pytest.raises(UserError, match=said):
        selected(root, names, older)


def test_a_run_of_the_pipeline_is_never_removed(root):
    with pytest.raises(ValueError, match="belongs to DVC"):
        remove(root, [entry for entry in entries(root) if entry.name == "one"])


def test_an_age_has_its_largest_unit():
    assert [age(seconds) for seconds in (1, 90, 7200, 3 * DAY)] == ["now", "2 min", "2 h", "3 d"]
