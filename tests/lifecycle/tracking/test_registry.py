"""The registry, against a SQLite store and against a real MLflow server."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from variant_records import record

from quantline.config.tracking import TrackingConfig
from quantline.core.errors import TrackingError, UserError
from quantline.lifecycle.promoted import Kept, promoted, promoted_outputs
from quantline.lifecycle.storage.dvc_lock import stage_keys
from quantline.lifecycle.tracking.reader import connected, read_run
from quantline.lifecycle.tracking.registry import (
    Promotion,
    check_alias,
    demote,
    fetch,
    promote,
    versions,
)
from quantline.lifecycle.tracking.writer import publish
from quantline.pipeline.command_line import read
from quantline.pipeline.identity import file_hashes
from quantline.pipeline.records import VariantRecord
from quantline.pipeline.stages import PIPELINE
from stages.promote import OPTIONS
from tests.lifecycle.tracking.test_writer import server

pytestmark = pytest.mark.e2e

MODEL = "quantline-demo"


def tracking(uri: str | None = None) -> TrackingConfig:
    return TrackingConfig(enabled=True, uri=uri, experiment=None, timeout_seconds=60)


def lock_of(record: VariantRecord, *without: str) -> dict[str, Any]:
    """Its part of dvc.lock, but for some stages."""
    return {
        key: {"outs": [{"path": f"a/{stage}", "md5": f"{record.name}-{stage}.dir"}]}
        for stage, key in stage_keys(record.name).items() if stage not in without
    }  # fmt: skip


class Store:
    """Two published variants with a checkpoint each."""

    def __init__(self, root: Path, uri: str | None = None, configured: dict[str, Any] | None = None) -> None:
        self.root, self.tracking = root, tracking(uri)
        self.records = [record(f"{method}-w4", method, 4, worse, root / "work") for method, worse in
                        (("awq", 0.01), ("gptq", 0.02))]  # fmt: skip
        self.records = [
            replace(record, lock=lock_of(record), config=configured or record.config) for record in self.records
        ]
        self.run_ids = publish(
            self.records, tracking_uri=uri, experiment="quantline/demo", root=root, timeout_seconds=60
        ).run_ids

    def promotion(self, name: str) -> Promotion:
        folder = self.root / name
        if not folder.is_dir():
            (folder / "inner").mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(name.encode() * 1000)
            (folder / "inner" / "config.json").write_text("{}")
        tags = {"quantline.variant": name, "quantline.fingerprint": f"f-{name}", "quantline.dvc": "1.dir 2"}
        return Promotion(
            MODEL, name, self.run_ids[name], folder, file_hashes(folder), tags, {"lineage.txt": name}, "it"
        )

    def promote(self, name: str, alias: str = "production") -> object:
        return promote(self.tracking, self.root, self.promotion(name), alias)

    def holders(self) -> dict[str, tuple[str, ...]]:
        return {item.tags["quantline.variant"]: item.aliases for item in versions(self.tracking, self.root)}

    def fetched(self, out: Path, alias: str = "production") -> dict[str, str]:
        fetch(self.tracking, self.root, MODEL, alias, out)
        return file_hashes(out)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Store(tmp_path_factory.mktemp("registry"))


def test_an_alias_moves_from_version_to_version_and_a_second_promotion_uploads_nothing(store, tmp_path):
    first = store.promote("awq-w4")
    assert (first.version, first.created, first.before) == ("1", True, None)
    assert first.uploaded == sum(path.stat().st_size for path in (store.root / "awq-w4").rglob("*") if path.is_file())
    again = store.promote("awq-w4")
    assert (again.version, again.created, again.uploaded) == ("1", False, 0)
    newer = replace(store.promotion("awq-w4"), description="as it is served now")
    assert promote(store.tracking, store.root, newer, "production").created is False
    with connected(store.tracking, store.root) as client:
        assert client.get_model_version(newer.model, "1").description == "as it is served now"
    other = store.promote("gptq-w4")
    assert (other.version, other.before) == ("2", "1")
    assert store.holders() == {"awq-w4": (), "gptq-w4": ("production",)}
    assert store.fetched(tmp_path / "out") == file_hashes(store.root / "gptq-w4")
    store.promote("awq-w4", "small")
    assert store.fetched(tmp_path / "small", "small") == file_hashes(store.root / "awq-w4")
    # Those of its promotion, and those of its run.
    outputs = {name: ("1.dir", "2", *(f"{name}-{stage}.dir" for stage in sorted(PIPELINE))) for name in store.run_ids}
    demoting = {
        "awq-w4": "python -m stages.demote variant=awq-w4 alias=small",
        "gptq-w4": "python -m stages.demote variant=gptq-w4 alias=production",
    }
    kept = {Kept(name, f"f-{name}", outputs[name], demoting[name]) for name in outputs}
    assert promoted_outputs(store.root, store.tracking) == kept
    needed = promoted(store.root)
    assert needed.keys() == {*outputs["awq-w4"], *outputs["gptq-w4"]}  # what is kept
    assert needed["gptq-w4-convert.dir"] == demoting["gptq-w4"]


def test_the_registered_model_says_how_to_fetch_and_serve_it(store):
    from mlflow import MlflowClient

    store.promote("awq-w4", "said")
    said = MlflowClient(f"sqlite:///{store.root}/mlflow.db").get_registered_model(MODEL).description
    assert f"`python -m stages.fetch model={MODEL} alias=production out=DIR`" in said
    assert f"`python -m stages.serve model={MODEL} alias=production`" in said
    demote(store.tracking, store.root, "awq-w4", "said")


def test_a_version_has_the_schema_of_its_requests_beside_its_files_and_fetch_leaves_it_there(store, tmp_path):
    from mlflow import MlflowClient

    store.promote("gptq-w4", "described")
    client = MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    path = client.download_artifacts(store.run_ids["gptq-w4"], "model/MLmodel", str(tmp_path))
    assert '"name": "prompt"' in Path(path).read_text()
    assert "MLmodel" not in store.fetched(tmp_path / "out", "described")
    demote(store.tracking, store.root, "gptq-w4", "described")


def test_a_promoted_variant_whose_outputs_in_dvc_are_not_all_recorded_stops_retention_until_it_is_promoted_again(
    tmp_path,
):
    store = Store(tmp_path)
    part = replace(store.records[0], lock=lock_of(store.records[0], "convert", "evaluate"))
    (store.run_ids["awq-w4"],) = publish(
        [part], tracking_uri=None, experiment="quantline/demo", root=tmp_path, timeout_seconds=60
    ).run_ids.values()
    store.promote("awq-w4")
    with pytest.raises(
        UserError, match=r"without DVC's hashes of convert, evaluate, .*stages\.promote variant=awq-w4 alias=production"
    ):
        promoted(tmp_path)
    store.run_ids = publish(
        store.records, tracking_uri=None, experiment="quantline/demo", root=tmp_path, timeout_seconds=60
    ).run_ids
    store.promote("awq-w4")
    assert {f"awq-w4-{stage}.dir" for stage in PIPELINE} < promoted(tmp_path).keys()
    without = [replace(record, lock={}) for record in store.records]  # published while dvc.lock was cut off
    publish(without, tracking_uri=None, experiment="quantline/demo", root=tmp_path, timeout_seconds=60)
    assert {f"awq-w4-{stage}.dir" for stage in PIPELINE} < promoted(tmp_path).keys()


def test_the_fetched_folder_has_the_card_of_its_promotion_beside_the_verified_files(store, tmp_path):
    what = store.promotion("awq-w4")
    promote(store.tracking, store.root, replace(what, documents={"README.md": "# awq-w4\n"}), "carded")
    assert store.fetched(tmp_path / "out", "carded").keys() == {*what.files, "README.md"}
    assert (tmp_path / "out" / "README.md").read_text() == "# awq-w4\n"
    demote(store.tracking, store.root, "awq-w4", "carded")


def test_an_alias_is_taken_from_the_variant_that_has_it_alone(store):
    store.promote("gptq-w4")
    with pytest.raises(
        UserError, match=r"alias=production of awq-w4: gptq-w4 \(quantline-demo version \d\) has this alias"
    ):
        demote(store.tracking, store.root, "awq-w4", "production")
    assert demote(store.tracking, store.root, "gptq-w4", "production")[0] == MODEL
    assert store.holders()["gptq-w4"] == ()
    assert all(kept.variant != "gptq-w4" for kept in promoted_outputs(store.root, store.tracking))


def test_what_was_damaged_in_the_store_is_not_fetched_until_the_command_that_is_told_has_replaced_it(store, tmp_path):
    store.promote("awq-w4", "damaged")
    (weights,) = (store.root / "mlartifacts").rglob(f"{store.run_ids['awq-w4']}/artifacts/model/model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(TrackingError, match=r"version 1 differs from the registered file; run .*: (.*)") as told:
        store.fetched(tmp_path / "out", "damaged")
    assert list(tmp_path.iterdir()) == []
    command = "python -m stages.promote variant=awq-w4 alias=damaged upload=again"
    assert str(told.value).endswith(command)
    assert read(command.split()[3:], OPTIONS, configured=True)[1] == []  # the command takes all of it
    again = promote(store.tracking, store.root, store.promotion("awq-w4"), "damaged", upload_again=True)
    assert (again.created, again.uploaded) == (False, sum(map(len, (whole, b"{}"))))
    assert store.fetched(tmp_path / "out", "damaged").items() >= file_hashes(store.root / "awq-w4").items()
    demote(store.tracking, store.root, "awq-w4", "damaged")


def test_a_checkpoint_that_was_changed_is_not_promoted(store, tmp_path):
    what = store.promotion("awq-w4")
    changed = replace(what, files={**what.files, "model.safetensors": "0"})
    with pytest.raises(UserError, match=r"model\.safetensors: differs from the convert stage's output"):
        promote(store.tracking, store.root, changed, "production")


def test_a_missing_alias_names_the_existing_ones(store, tmp_path):
    store.promote("awq-w4", "small")
    with pytest.raises(
        UserError, match=r"quantline-demo@missing: is not registered; the model has .*quantline-demo@small"
    ):
        store.fetched(tmp_path / "out", "missing")


@pytest.mark.parametrize("alias", ["latest", "v1", "12", "a b", "a/b"])
def test_an_invalid_alias_is_refused(alias):
    with pytest.raises(UserError, match="use letters, digits"):
        check_alias(alias)


def test_without_a_store_nothing_is_promoted(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert promoted_outputs(tmp_path) == set()
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_down_is_no_empty_registry(tmp_path):
    with pytest.raises(TrackingError, match="no connection"):
        promoted_outputs(tmp_path, tracking("http://127.0.0.1:9"))


def test_a_run_is_found_by_its_variants_name_the_beginning_of_its_id_and_a_stages_fingerprint(store):
    run_id = store.run_ids["awq-w4"]
    stage = store.records[0].results[2]["fingerprint"]
    for given in ("awq-w4", run_id[:10], stage):
        found = read_run(store.tracking, store.root, given)
        assert (found.run_id, found.name) == (run_id, "awq-w4")
    assert list(found.results) == [result["stage"] for result in store.records[0].results]
    assert found.results["quantize"] == store.records[0].results[2]
    assert found.config["bits"] == 4
    assert found.lock == store.records[0].lock
    assert read_run(store.tracking, store.root, found.tags["quantline.fingerprint"]).run_id == run_id


@pytest.mark.parametrize("given", ["0" * 32, "abcde", "../../x", "ffffffffff"])
def test_an_unknown_run_is_an_error(store, given):
    with pytest.raises(UserError, match=f"run={given}: "):
        read_run(store.tracking, store.root, given)


@pytest.mark.e2e
def test_a_real_server_keeps_the_files_and_any_client_of_it_can_have_them(tmp_path):
    import mlflow

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with server(tmp_path, port):
        store = Store(tmp_path, f"http://127.0.0.1:{port}")
        assert store.promote("awq-w4").uploaded > 6000
        assert store.promote("awq-w4").uploaded == 0
        assert store.fetched(tmp_path / "out") == file_hashes(tmp_path / "awq-w4")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            mlflow.artifacts.download_artifacts(f"models:/{MODEL}@production", dst_path=str(tmp_path / "theirs"))
        theirs = file_hashes(tmp_path / "theirs")
        assert {name: theirs.get(name) for name in file_hashes(tmp_path / "awq-w4")} == file_hashes(tmp_path / "awq-w4")
        assert read_run(store.tracking, tmp_path, store.run_ids["awq-w4"][:9]).name == "awq-w4"
