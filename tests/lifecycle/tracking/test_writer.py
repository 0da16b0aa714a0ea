from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import variant_records
import yaml
from drill_results import drill
from mlflow_server import running
from variant_records import COMMIT, REFUSED, four, record

from quantline.core.errors import TrackingError
from quantline.core.secrets import Scrubber
from quantline.lifecycle.tracking.projection import plan_variant
from quantline.lifecycle.tracking.store import locked, resolve_uri
from quantline.lifecycle.tracking.view import view_path
from quantline.lifecycle.tracking.writer import publish
from quantline.pipeline.records import VariantRecord
from quantline.pipeline.stages import PIPELINE as STAGES

pytestmark = pytest.mark.e2e

EXPERIMENT = "quantline/demo"
FLOAT_STAGES = ("download", "serve_smoke", "evaluate")


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        publish([], tracking_uri=None, experiment="unused", root=folder)
    assert not list(folder.glob(".*"))
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(database, tmp_path / "mlflow.db")
    return tmp_path


def to(root: Path, records: list[VariantRecord], **options: Any) -> Any:
    return publish(records, tracking_uri=options.pop("uri", None), experiment=EXPERIMENT, root=root, **options)


def baseline(root: Path) -> VariantRecord:
    return record("float", "float", 16, 0.0, root / "work", stages=FLOAT_STAGES)


def dump(root: Path) -> dict[str, list[Any]]:
    """Every row, with the metrics' history and all times."""
    tables = ("experiments", "experiment_tags", "runs", "tags", "params", "metrics", "latest_metrics")
    with sqlite3.connect(root / "mlflow.db") as connection:
        return {name: sorted(connection.execute(f"select * from {name}"), key=repr) for name in tables}


def told(root: Path) -> list[Any]:
    """What the runs say, without what differs between two stores: ids and times."""
    with sqlite3.connect(root / "mlflow.db") as connection:
        names = dict(connection.execute("select run_uuid, name from runs where lifecycle_stage = 'active'"))
        said = []
        for run_id, name in names.items():
            params = connection.execute("select key, value from params where run_uuid = ?", [run_id]).fetchall()
            history = connection.execute("select key, value from metrics where run_uuid = ?", [run_id]).fetchall()
            tags = connection.execute("select key, value from tags where run_uuid = ?", [run_id]).fetchall()
            run = connection.execute("select status, artifact_uri from runs where run_uuid = ?", [run_id]).fetchone()
            artifacts = Path(run[1].removeprefix("file://"))
            files = sorted(str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file())
            named = [(key, names.get(value, value)) for key, value in tags]
            said.append((name, run[0], sorted(params), sorted(history), sorted(named), files))
    return sorted(said)


def runs_of(root: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    return {run.info.run_name: run for run in runs}


def test_publishing_twice_changes_no_row(root: Path) -> None:
    records = four(root / "work")
    first = to(root, records)
    before = dump(root)
    second = to(root, records)
    assert dump(root) == before
    assert set(first.created) == set(second.unchanged) == {"float", "awq-w4-g128", "gptq-w4-g128", "gptq-w8-g128"}
    assert first.run_ids == second.run_ids
    assert Counter(status for _, status, *_ in told(root)) == {"FINISHED": 4 + 3 + 3 * len(STAGES)}


def test_report_is_one_run_that_only_another_report_replaces(root: Path) -> None:
    folder = root / "report"
    (folder / "data").mkdir(parents=True)
    manifest = {"chosen": "awq-w4-g128", "headline": "Ship awq-w4-g128.", "variants": ["float", "awq-w4-g128"]}
    (folder / "data" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "index.html").write_text("<h1>one</h1>")
    assert to(root, [], report=folder).created == ("report",)
    before = dump(root)
    assert to(root, [], report=folder).unchanged == ("report",)
    assert dump(root) == before
    run = runs_of(root)["report"]
    assert run.data.params["recommended"] == "awq-w4-g128"
    assert run.data.tags["mlflow.note.content"].startswith("Ship awq-w4-g128.")
    attached = root / "mlartifacts" / EXPERIMENT / run.info.run_id / "artifacts"
    assert (attached / "index.html").read_text() == "<h1>one</h1>"
    assert (attached / "data" / "manifest.json").is_file()
    (folder / "index.html").write_text("<h1>two</h1>")
    assert to(root, [], report=folder).created == ("report",)
    assert (attached / "index.html").read_text() == "<h1>one</h1>"


def test_the_drill_of_a_fleet_is_one_run_that_only_another_drill_replaces(root: Path) -> None:
    found = drill({"awq-w4-g128": "a", "float": "f"})
    assert to(root, [], drill=found).created == ("fleet_smoke",)
    assert to(root, [], drill=found).unchanged == ("fleet_smoke",)
    run = runs_of(root)["fleet_smoke"]
    assert run.data.params["chain"] == "awq-w4-g128 float"
    assert (run.data.metrics["fleet_lost"], run.data.metrics["back_seconds/kill_9"]) == (1.0, 41.0)
    assert "back_seconds/queue_full" not in run.data.metrics
    assert run.info.end_time - run.info.start_time == 90_000
    assert to(root, [], drill={**found, "seconds": 80.0}).created == ("fleet_smoke",)


def test_parent_run_has_the_columns_that_variants_are_compared_by(root: Path) -> None:
    to(root, four(root / "work"))
    run = runs_of(root)["awq-w4-g128"]
    assert run.data.params["bits"] == "4"
    assert run.data.params["method.name"] == "awq"
    assert run.data.params["calibration.sources.tales.weight"] == "1.0"
    assert run.data.tags["quantline.overrides"] == "method=awq bits=4"
    assert run.data.tags["mlflow.source.git.commit"] == COMMIT
    assert not [key for key in run.data.params if key.startswith(("tracking", "toolchains", "serve.process"))]
    assert run.data.metrics["reference_perplexity"] == pytest.approx(21.6177, abs=1e-3)
    assert {"perplexity_difference", "size_bytes", "compression_ratio", "quantize_seconds"} <= set(run.data.metrics)
    assert run.data.metrics["output_tokens_per_second"] == 196.5
    assert run.data.metrics["seconds/quantize"] == 17.8
    assert "bits" not in runs_of(root)["float"].data.params


def test_child_run_has_versions_duration_result_and_files(root: Path) -> None:
    to(root, four(root / "work"))
    child, parent = runs_of(root)["gptq-w4-g128: quantize"], runs_of(root)["gptq-w4-g128"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["versions.torch"] == "2.13.0+cpu"
    assert child.data.params["device"] == "cpu"
    assert child.info.end_time - child.info.start_time == 17_800
    folder = Path(child.info.artifact_uri.removeprefix("file://"))
    assert (folder / "quantize" / "worker.log").read_text() == "quantize of gptq-w4-g128\n"
    assert (folder / "result.json").is_file()
    frozen = Path(parent.info.artifact_uri.removeprefix("file://"), "config.yaml")
    assert yaml.safe_load(frozen.read_text())["serve"]["process"]["kv_cache_gib"] == 1.0


def test_unsupported_variant_says_so_with_its_reason(root: Path) -> None:
    to(root, four(root / "work"))
    tags = runs_of(root)["gptq-w8-g128"].data.tags
    assert (tags["quantline.status"], tags["quantline.served"]) == ("unsupported", "no")
    assert tags["quantline.reason"] == f"serve_smoke: {REFUSED}"


def test_run_takes_the_time_of_the_variants_own_stages(root: Path) -> None:
    known = baseline(root)
    for at, result in enumerate(known.results):
        result["timings"] = {"total_seconds": 2.0, "started_at": 1_700_000_000.0 + 10 * at}
    to(root, [known])
    parent, child = runs_of(root)["float"], runs_of(root)["float: evaluate"]
    assert (parent.info.start_time, parent.info.end_time) == (1_700_000_010_000, 1_700_000_014_000)
    assert (child.info.start_time, child.info.end_time) == (1_700_000_020_000, 1_700_000_022_000)
    assert "started_at" not in child.data.metrics


def test_description_that_a_user_wrote_stays(root: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    whole = baseline(root)
    run = to(root, [replace(whole, results=whole.results[:2])]).run_ids["float"]
    experiment = client.get_run(run).info.experiment_id
    note = client.get_run(run).data.tags["mlflow.note.content"]
    assert f"](#/experiments/{experiment}/runs?" in note
    assert to(root, [whole]).run_ids["float"] == run
    assert client.get_run(run).data.tags["mlflow.note.content"] != note
    client.set_tag(run, "mlflow.note.content", "ours")
    assert to(root, [replace(whole, lock={"stages": {}})]).completed == ("float",)
    assert client.get_run(run).data.tags["mlflow.note.content"] == "ours"


def test_runs_by_hand_have_a_view_of_their_own(root: Path) -> None:
    from mlflow import MlflowClient

    manual = replace(baseline(root), name="by-hand/try")
    experiment = to(root, [baseline(root), manual]).experiment_id
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    tags = client.get_experiment(experiment).tags
    found = {}
    for view in ("variants", "by-hand"):
        state = json.loads(tags[f"mlflow.sharedViewState.{view}"])
        found[view] = [run.info.run_name for run in client.search_runs([experiment], state["searchFilter"])]
    assert found == {"variants": ["float"], "by-hand": ["by-hand/try"]}


def test_changed_results_make_a_new_run_and_keep_the_former_as_history(root: Path) -> None:
    old = baseline(root)
    first = to(root, [old])
    new = replace(old, results=deepcopy(old.results))
    new.results[2]["metrics"]["reference_perplexity"] += 1
    second = to(root, [new])
    assert second.created == ("float",)
    current = {row[3]: row[1] for row in _tags(root, "quantline.current")}
    assert current == {first.run_ids["float"]: "false", second.run_ids["float"]: "true"}
    # Going back to the former results makes their run the current one again, and no third.
    assert to(root, [old]).run_ids == first.run_ids
    current = {row[3]: row[1] for row in _tags(root, "quantline.current")}
    assert current == {first.run_ids["float"]: "true", second.run_ids["float"]: "false"}


def _tags(root: Path, key: str) -> list[tuple[str, str, str, str]]:
    with sqlite3.connect(root / "mlflow.db") as connection:
        return connection.execute("select key, value, '', run_uuid from tags where key = ?", [key]).fetchall()


def test_changed_config_makes_a_new_run_but_another_port_does_not(root: Path) -> None:
    old = baseline(root)
    to(root, [old])
    moved = replace(old, config=deepcopy(old.config), commit="0" * 40, dirty=True)
    moved.config["serve"]["process"]["port"] = 8123
    before = dump(root)
    assert to(root, [moved]).unchanged == ("float",)
    assert dump(root) == before
    moved.config["evaluate"]["seq_len"] = 256
    assert to(root, [moved]).created == ("float",)


def test_a_stage_that_comes_later_is_added_to_the_same_run(
    root: Path, database: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = baseline(root)
    for count in (1, 2, 3):
        to(root, [replace(whole, results=whole.results[:count])])
    assert len(told(root)) == 4
    straight = tmp_path_factory.mktemp("straight")
    shutil.copyfile(database, straight / "mlflow.db")
    to(straight, [whole])
    assert len(told(straight)) == 4
    at_once = [run for run in told(straight) if run not in told(root)]
    assert at_once == []


def test_missing_file_is_a_warning_and_is_attached_once_it_is_there(root: Path) -> None:
    float_model = baseline(root)
    log = float_model.folder / "evaluate" / "worker.log"
    text = log.read_text()
    log.unlink()
    float_model.results[0]["files"].append("../../secret.txt")
    report = to(root, [float_model])
    assert len(report.warnings) == 2
    assert "evaluate/worker.log is not attached, it is missing" in report.warnings[1]
    assert "secret.txt is not attached, it lies outside" in report.warnings[0]
    log.write_text(text)
    assert to(root, [float_model]).completed == ("float",)
    folder = Path(runs_of(root)["float: evaluate"].info.artifact_uri.removeprefix("file://"))
    assert (folder / "evaluate" / "worker.log").read_text() == text
    assert len(told(root)) == 4


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("method", "call"),
    [("create_run", 1), ("create_run", 3), ("log_batch", 1), ("log_batch", 2), ("log_artifacts", 2),
     ("set_terminated", 1), ("set_tag", 2), ("set_tag", 4), ("set_tag", 5)],
)  # fmt: skip
def test_publish_cut_off_anywhere_is_completed_by_the_next(
    root: Path, monkeypatch: pytest.MonkeyPatch, method: str, call: int, answered: bool
) -> None:
    """`answered`: the server did what was asked, but its answer was lost."""
    from mlflow import MlflowClient

    float_model = baseline(root)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, method, _fails_at(getattr(MlflowClient, method), call, answered))
        with pytest.raises(TrackingError, match="cut off"):
            to(root, [float_model])
    to(root, [float_model])
    healed = dump(root)
    assert to(root, [float_model]).unchanged == ("float",)
    assert dump(root) == healed
    said = told(root)
    assert [run[0] for run in said] == ["float", "float: download", "float: evaluate", "float: serve_smoke"]
    assert {run[1] for run in said} == {"FINISHED"}
    assert all(len(dict(run[3])) == len(run[3]) for run in said), "a metric was logged twice"
    assert dict(said[0][3]) == plan_variant(float_model, Scrubber(), []).metrics
    assert said[2][5] == ["evaluate/worker.log", "result.json"]


def _fails_at(method: Callable[..., Any], call: int, answered: bool) -> Callable[..., Any]:
    calls = iter(range(1, 10_000))

    def wrapped(*args: Any, **options: Any) -> Any:
        failing = next(calls) == call
        if failing and not answered:
            raise ConnectionError("cut off")
        value = method(*args, **options)
        if failing:
            raise ConnectionError("cut off")
        return value

    return wrapped


def test_half_published_run_that_was_overtaken_is_killed_and_not_current(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    old = baseline(root)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", _fails_at(MlflowClient.log_batch, 2, True))
        with pytest.raises(TrackingError):
            to(root, [old])
    new = replace(old, results=deepcopy(old.results))
    new.results[0]["metrics"]["files"] = 8
    assert to(root, [new]).created == ("float",)
    states = {(run[1], dict(run[4]).get("quantline.current")) for run in told(root) if run[0] == "float"}
    assert states == {("KILLED", "false"), ("FINISHED", "true")}


@pytest.mark.e2e
def test_two_publishers_at_once_make_each_run_once(root: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from variant_records import four\n"
        "from quantline.lifecycle.tracking.writer import publish; root = Path(sys.argv[2])\n"
        "print(publish(four(root / 'work'), tracking_uri=None, experiment='quantline/demo', root=root))\n"
    )
    variables = {**os.environ, "PYTHONPATH": str(Path(publish.__code__.co_filename).parents[3])}
    command = [sys.executable, "-c", script, str(Path(variant_records.__file__).parent), str(root)]
    (root / "mlflow.db").unlink()  # so that they make the database at once, too
    both = [
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(out.strip().rsplit(": ", 1)[1] for out, _ in outputs) == ["4 new", "4 unchanged"]
    assert [error for _, error in outputs] == ["", ""], "mlflow's chatter is silenced"
    assert len(told(root)) == 4 + 3 + 3 * len(STAGES)


def test_lock_that_is_held_too_long_is_an_error(tmp_path: Path) -> None:
    uri = resolve_uri("sqlite:///mlflow.db", tmp_path)
    with locked(uri, 1), pytest.raises(TrackingError, match="another publish"), locked(uri, 0.2):
        pass


def test_server_that_is_down_is_an_error_within_seconds_that_says_what_to_do(root: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        begun = time.monotonic()
        with pytest.raises(TrackingError, match=r"no connection(.|\n)*python -m stages\.publish"):
            to(root, [baseline(root)], uri=f"http://127.0.0.1:{port}", timeout_seconds=2)
    assert time.monotonic() - begun < 5


def test_server_that_does_not_answer_is_an_error_within_its_timeout(root: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(TrackingError, match=r"no answer within 0\.5 s"):
            to(root, [baseline(root)], uri=f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_seconds=0.5)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("scheme", ["http", "postgresql", "mysql+pymysql"])
def test_errors_have_no_credentials_in_them(root: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-4711-tok")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"{scheme}://ann:s3cr%40et@127.0.0.1:{closed.getsockname()[1]}/db?token=tok-4711-tok"
        with pytest.raises(TrackingError) as caught:
            to(root, [baseline(root)], uri=uri, timeout_seconds=1)
    assert f"{scheme}://***@127.0.0.1" in str(caught.value)
    assert not [secret for secret in ("ann", "s3cr", "tok-4711-tok") if secret in str(caught.value)]


def test_credentials_in_a_config_reach_no_run(root: Path) -> None:
    float_model = baseline(root)
    float_model.config["model"]["repo"] = "https://ann:s3cret@hub.example/model"
    float_model.config["model"]["hf_token"] = "hf_s3cret"
    float_model.config["tracking"]["uri"] = "http://ann:s3cret@tracking.example"
    float_model.results[0]["warnings"] = ["fetched from https://ann:s3cret@hub.example"]
    to(root, [float_model])
    artifacts = [path for path in (root / "mlartifacts").rglob("*") if path.is_file()]
    assert artifacts
    stored = [(root / "mlflow.db").read_bytes(), *(path.read_bytes() for path in artifacts)]
    assert not any(b"s3cret" in text for text in stored)
    assert runs_of(root)["float"].data.params["model.repo"] == "https://***@hub.example/model"


def test_scrubber_leaves_ordinary_words_alone() -> None:
    scrub = Scrubber("sqlite:////home/a@b/mlflow.db")
    assert scrub("sqlite:////home/a@b/mlflow.db: 3 tokens") == "sqlite:////home/a@b/mlflow.db: 3 tokens"
    assert scrub.value({"max_tokens": 3, "pad_token": "<pad>", "text_field": "text"})["pad_token"] == "<pad>"


def test_uri_is_the_configs_then_the_environments_then_a_database_in_the_root(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_uri(None, root) == f"sqlite:///{root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example")
    assert resolve_uri(None, root) == "http://tracking.example"
    assert resolve_uri("sqlite:///other/a.db", root) == f"sqlite:///{root}/other/a.db"


def test_deleted_experiment_is_an_error_that_names_the_command(root: Path) -> None:
    from mlflow import MlflowClient

    report = to(root, [])
    MlflowClient(f"sqlite:///{root}/mlflow.db").delete_experiment(report.experiment_id)
    with pytest.raises(TrackingError, match=f"mlflow experiments restore --experiment-id {report.experiment_id}"):
        to(root, [])


def test_experiment_gets_a_saved_view_and_an_edited_description_stays(root: Path) -> None:
    from mlflow import MlflowClient

    experiment_id = to(root, []).experiment_id
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    tags = client.get_experiment(experiment_id).tags
    assert f"#{view_path(experiment_id)}" in tags["mlflow.note.content"]
    shown = json.loads(tags["mlflow.sharedViewState.variants"])["selectedColumns"]
    to(root, four(root / "work"))
    assert {column.split("`")[1] for column in shown} <= set(runs_of(root)["awq-w4-g128"].data.tags)
    older = "[Compare the variants](#/experiments/1/runs?viewStateShareKey=quantline): one run per variant"
    client.set_experiment_tag(experiment_id, "mlflow.note.content", older)
    to(root, [])
    assert client.get_experiment(experiment_id).tags["mlflow.note.content"] == tags["mlflow.note.content"]
    client.set_experiment_tag(experiment_id, "mlflow.note.content", "ours")
    to(root, [])
    assert client.get_experiment(experiment_id).tags["mlflow.note.content"] == "ours"


def test_metrics_that_are_no_finite_number_are_published_once(root: Path) -> None:
    float_model = baseline(root)
    float_model.results[2]["metrics"].update(reference_perplexity=float("inf"), nll_difference=float("nan"))
    to(root, [replace(float_model, results=float_model.results[:2])])
    to(root, [float_model])
    before = dump(root)
    assert to(root, [float_model]).unchanged == ("float",)
    assert dump(root) == before


def server(root: Path, port: int) -> AbstractContextManager[subprocess.Popen[Any]]:
    """A server that keeps artifacts itself."""
    return running(root, port, "server", "--artifacts-destination", str(root / "served"))


@pytest.mark.e2e
def test_server_that_dies_during_a_publish_is_an_error_and_the_next_publish_completes_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri, float_model = f"http://127.0.0.1:{port}", baseline(root)
    log_batch, calls = MlflowClient.log_batch, iter(range(1, 100))
    with server(root, port) as process, monkeypatch.context() as patch:

        def dies_at_third(*args: Any, **options: Any) -> Any:
            if next(calls) == 3:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return log_batch(*args, **options)

        patch.setattr(MlflowClient, "log_batch", dies_at_third)
        begun = time.monotonic()
        with pytest.raises(TrackingError, match="publishing failed"):
            to(root, [float_model], uri=uri, timeout_seconds=5)
        assert time.monotonic() - begun < 60
    assert {run[1] for run in told(root)} == {"RUNNING", "FINISHED"}
    with server(root, port):
        capfd.readouterr()
        assert to(root, [float_model], uri=uri, timeout_seconds=30).completed == ("float",)
        assert capfd.readouterr() == ("", "")
        healed = dump(root)
        assert to(root, [float_model], uri=uri, timeout_seconds=30).unchanged == ("float",)
        assert dump(root) == healed
    assert [(run[0], run[1]) for run in told(root)] == [
        ("float", "FINISHED"), ("float: download", "FINISHED"), ("float: evaluate", "FINISHED"),
        ("float: serve_smoke", "FINISHED"),
    ]  # fmt: skip
    assert list((root / "served").rglob("worker.log"))
