"""Recovery, the gate and the table of the tasks, without an engine."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import sections

from quantline.config.tasks import LastWordConfig, LocalTasksConfig, StandardTaskConfig
from quantline.core.errors import QuantlineError, UserError
from quantline.evaluation.tasks import run as tasks
from quantline.toolchains.protocol import JobResult

ITEMS = {"last_word": [{"context": f"word {number}", "target": " x"} for number in range(40)]}


def answers(right, hashes="h"):
    """A worker that finds `right` of 40 items right, in order."""

    def run_worker(job):
        rows = [
            {"task": "last_word", "item": f"last_word/{number}", "hash": hashes,
             "scores": {"acc": float(number < right), "perplexity": -1.0 - number / 40}}
            for number in range(40)
        ]  # fmt: skip
        with open(job["output"], "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        metrics = {
            "acc": {"aggregation": "mean", "higher_is_better": True, "value": right / 40},
            "perplexity": {"aggregation": "perplexity", "higher_is_better": False, "value": None},
        }
        return JobResult({"tasks": {"last_word": {"metrics": metrics, "left_out": []}}}, 1.0, 1, {})

    return run_worker


def evaluate(out, run_worker, *, baseline=None, refused="", **options):
    out.mkdir()

    def no_server():
        raise AssertionError("a server was started")

    report = tasks.evaluate(
        sections.tasks(**options), ITEMS, job={}, run_worker=run_worker, refused=refused, server=no_server,
        baseline=baseline, out=out,
    )  # fmt: skip
    return report, json.loads((out / "tasks.json").read_text())


@pytest.fixture
def baseline(tmp_path):
    evaluate(tmp_path / "float", answers(32))
    return tmp_path / "float"


def test_the_baseline_recovers_itself_entirely(tmp_path):
    report, written = evaluate(tmp_path / "float", answers(32))
    (row,) = written["rows"]
    assert (row["recovery"], row["recovery_low"], row["recovery_high"]) == (1, 1, 1)
    assert report.metrics == {"task/last_word/reference": 0.8, "recovery/last_word/reference": 1.0}


def test_recovery_is_the_variants_share_of_the_float_models_score(tmp_path, baseline):
    _, written = evaluate(tmp_path / "one", answers(24), baseline=baseline)
    (row,) = written["rows"]
    assert (row["value"], row["float_value"], row["n"], row["metric"]) == (0.6, 0.8, 40, "acc")
    assert row["recovery"] == pytest.approx(0.75)
    assert 0.5 < row["recovery_low"] < 0.75 < row["recovery_high"] < 1
    assert row["stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 39))
    (more,) = written["more"]
    assert (more["metric"], more["recovery"], more["higher_is_better"]) == ("perplexity", 1.0, False)


@pytest.mark.parametrize(("judged_by", "passed"), [("low", False), ("estimate", False), ("high", True)])
def test_the_gate_is_judged_by_the_end_that_was_asked_for(tmp_path, baseline, judged_by, passed):
    report, written = evaluate(
        tmp_path / "one", answers(30), baseline=baseline, gate=sections.gate(0.95, judged_by, "warn")
    )
    assert written["gate"]["passed"] is passed
    assert bool(report.warnings) is not passed
    assert [one.split(":")[0] for one in written["gate"]["failed"]] == ([] if passed else ["last_word by reference"])


def test_a_gate_fails_the_stage_where_that_is_asked_for(tmp_path, baseline):
    with pytest.raises(QuantlineError, match=r"below tasks\.gate\.min_recovery=0\.95 .*last_word by reference: 0\.250"):
        evaluate(tmp_path / "one", answers(8), baseline=baseline, gate=sections.gate(0.95, "high", "fail"))


def test_other_items_than_the_baselines_are_refused(tmp_path, baseline):
    with pytest.raises(UserError, match="the float model was scored on other items with reference"):
        evaluate(tmp_path / "one", answers(24, hashes="other"), baseline=baseline)


def test_a_refused_variant_is_asked_by_the_reference_engine_alone(tmp_path, baseline):
    report, written = evaluate(
        tmp_path / "one", answers(30), baseline=baseline, engines=["reference", "vllm"], refused="no kernel for it"
    )
    assert [row["engine"] for row in written["rows"]] == ["reference"]
    assert written["skipped"] == {"vllm": "no kernel for it"}
    assert report.warnings == ["tasks were not run with vllm: no kernel for it"]


@pytest.mark.parametrize(
    ("verdict", "refused"),
    [({"supported": True, "reason": ""}, ""), ({"supported": False, "reason": "no kernel"}, "no kernel"),
     ({"supported": True, "reason": "", "prompt_scores": "gives none"}, "gives none")],
)  # fmt: skip
def test_a_server_that_does_not_load_or_score_the_variant_is_not_asked(tmp_path, verdict, refused):
    (tmp_path / "verdict.json").write_text(json.dumps(verdict))
    assert tasks.refusal(tmp_path / "verdict.json") == refused


def test_a_metric_that_a_task_does_not_have_is_refused_with_those_it_has(tmp_path):
    with pytest.raises(UserError, match="metric=f1: allowed are acc, perplexity"):
        evaluate(tmp_path / "one", answers(30), standard={"last_word": StandardTaskConfig(metric="f1")})


def test_a_score_that_the_items_do_not_give_is_an_error(tmp_path):
    def wrong(job):
        result = answers(30)(job)
        result.data["tasks"]["last_word"]["metrics"]["acc"]["value"] = 0.5
        return result

    with pytest.raises(QuantlineError, match=r"its items give acc 0\.75, but the harness reports 0\.5"):
        evaluate(tmp_path / "one", wrong)


def test_damaged_samples_are_an_error_that_names_them(tmp_path):
    (tmp_path / "samples-vllm.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"samples-vllm\.jsonl: scores of tasks cannot be read"):
        tasks.read_samples(tmp_path / "samples-vllm.jsonl")


def test_a_perplexity_is_of_the_mean_and_its_error_is_in_its_own_unit():
    value, error = tasks.aggregate(np.array([-1.0, -3.0]), "perplexity")
    assert value == pytest.approx(math.exp(2))
    assert error == pytest.approx(math.exp(2) * 1.0)


def test_engines_agree_where_they_are_right_in_the_same_items():
    def scores(*right):
        rows = [{"item": str(at), "scores": {"acc": one, "perplexity": -at - one / 9}} for at, one in enumerate(right)]
        return tasks.Scores({}, {"t": rows})

    both = {"reference": scores(1.0, 0.0, 1.0, 1.0), "vllm": scores(1.0, 0.0, 0.0, 1.0)}
    assert tasks.engine_agreement(both) == [{"task": "t", "same": 0.75}]
    assert tasks.engine_agreement({"reference": both["reference"]}) == []


LOCAL = LocalTasksConfig(last_word=LastWordConfig(context_words=12), multiple_choice=None)


def test_items_are_made_from_the_text_of_a_file_from_an_editor_on_windows(root, tmp_path):
    rows = (root / "assets" / "demo" / "evaluation.jsonl").read_bytes().splitlines()[:20]
    (tmp_path / "plain.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "MARKED.JSONL").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*rows, b'{"text": null}', b""]))
    plain, marked = (
        tasks.local_items(sections.tasks(path=name, local=LOCAL), tmp_path) for name in ("plain.jsonl", "MARKED.JSONL")
    )
    assert plain["last_word"]
    assert plain == marked


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "half \\ud83d"}', "text has half of a surrogate pair"),
        ('{"conversations": [{"from": "human", "value": "a"}]}', "has messages, but local tasks are made from text"),
    ],
)
def test_text_that_gives_no_item_is_refused_with_its_line(tmp_path, row, reason):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "one"}}\n{row}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {reason}"):
        tasks.local_items(sections.tasks(path="a.jsonl", local=LOCAL), tmp_path)


def test_no_task_makes_an_empty_table_that_passes(tmp_path):
    tasks.write_nothing(tmp_path)
    written = json.loads((tmp_path / "tasks.json").read_text())
    assert written == {"rows": [], "gate": {"passed": True, "limit": None, "failed": []}}


def test_the_harnesss_own_tasks_take_the_limit_where_they_have_none():
    exact = StandardTaskConfig(num_fewshot=5, limit=9, metric="exact_match,strict-match")
    options = sections.tasks(limit=100, standard={"mmlu": StandardTaskConfig(num_fewshot=5), "gsm8k": exact})
    assert list(tasks.tasks_to_run(ITEMS, options).items()) == [
        ("last_word", StandardTaskConfig()), ("mmlu", StandardTaskConfig(num_fewshot=5, limit=100)), ("gsm8k", exact)
    ]  # fmt: skip
