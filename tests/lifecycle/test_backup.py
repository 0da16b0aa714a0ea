from __future__ import annotations

import json
import re
import shutil
import socket
import sqlite3

import pytest

from quantline.core.errors import QuantlineError, UserError
from quantline.lifecycle import backup as backups
from quantline.lifecycle import restore as restores
from quantline.lifecycle.backup import backup, remove_stale
from quantline.lifecycle.restore import restore
from quantline.lifecycle.storage.dvc_cache import all_objects
from quantline.lifecycle.verify import verify
from stages import restore as restore_stage
from stages import verify as verify_stage


def track(project, text="metrics"):
    """An MLflow store of one run with an artifact, in the columns that hold addresses."""
    folder = project.root / "mlartifacts" / "demo" / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(text)
    with sqlite3.connect(project.root / "mlflow.db") as store:
        store.execute("create table if not exists runs (artifact_uri text)")
        store.execute("create table if not exists experiments (artifact_location text)")
        store.execute("delete from runs")
        store.executemany("insert into runs values (?)", [[folder.as_uri()], ["s3://elsewhere/run"]])


@pytest.fixture
def saved(project, tmp_path):
    track(project)
    report = backup(project.root, tmp_path / "backup")
    return project, tmp_path / "backup", report


def state(project):
    """Everything that a restore may touch."""
    names = [
        *project.root.glob("*"),
        *(project.root / "artifacts").rglob("*"),
        *(project.root / "mlartifacts").rglob("*"),
    ]
    return {str(path.relative_to(project.root)): path.read_bytes() for path in names if path.is_file()}


def assert_whole(clone, project):
    """All that `dvc checkout` needs is there."""
    assert set(all_objects(clone.cache)) == set(all_objects(project.cache))
    assert (clone.root / "dvc.lock").read_bytes() == (project.root / "dvc.lock").read_bytes()


def test_a_backup_is_restored_into_an_empty_clone_and_dvc_has_nothing_to_do(saved, tmp_path):
    project, folder, report = saved
    clone = project.clone(tmp_path / "clone")
    assert not list(all_objects(clone.cache))
    restored = restore(clone.root, folder)
    assert restored.snapshot == report.snapshot.stem
    assert restored.notes == ()
    clone.dvc("checkout")
    assert clone.content() == project.content()
    assert verify(clone.root, clone.cache).faults == ()
    assert "up to date" in clone.dvc("repro")
    assert (clone.root / "mlartifacts" / "demo" / "run" / "result.json").read_text() == "metrics"
    with sqlite3.connect(clone.root / "mlflow.db") as store:
        addresses = {row[0] for row in store.execute("select artifact_uri from runs")}
    assert addresses == {(clone.root / "mlartifacts" / "demo" / "run").as_uri(), "s3://elsewhere/run"}
    assert not (clone.root / restores.STAGING).exists()


def test_a_second_backup_copies_only_what_is_new_and_both_can_be_restored(saved, tmp_path):
    project, folder, first = saved
    track(project, "later")
    second = backup(project.root, folder)
    assert second.snapshot != first.snapshot
    assert 1 <= second.copied <= 2  # the artifact, and the database where SQLite wrote it otherwise
    for report, text in ((first, "metrics"), (second, "later")):
        clone = project.clone(tmp_path / report.snapshot.stem)
        restore(clone.root, folder, name=report.snapshot.stem)
        assert (clone.root / "mlartifacts" / "demo" / "run" / "result.json").read_text() == text


@pytest.mark.parametrize(("kind", "harm"), [("md5", "damaged"), ("sha256", "missing")])
def test_a_backup_that_is_not_whole_restores_nothing(saved, tmp_path, kind, harm):
    project, folder, _ = saved
    path = max((folder / "objects" / kind).rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    path.chmod(0o644)
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    clone = project.clone(tmp_path / "clone")
    before = state(clone)
    with pytest.raises(UserError, match=f"nothing was restored:\\n  {path} is {harm}"):
        restore(clone.root, folder)
    assert state(clone) == before
    assert not list(all_objects(clone.cache))


def test_a_restore_that_is_cut_off_while_staging_changes_nothing_and_the_next_one_works(saved, tmp_path, monkeypatch):
    project, folder, _ = saved
    clone = project.clone(tmp_path / "clone")
    before = state(clone)
    copy, calls = restores._copy, iter(range(100))

    def cut_off(*arguments):
        if next(calls) == 9:
            raise KeyboardInterrupt
        copy(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(restores, "_copy", cut_off)
        with pytest.raises(KeyboardInterrupt):
            restore(clone.root, folder)
    assert state(clone) == before
    restore(clone.root, folder)
    assert_whole(clone, project)


@pytest.mark.parametrize("call", [0, 2])
def test_a_restore_that_is_killed_while_moving_is_finished_by_the_next(saved, tmp_path, monkeypatch, call):
    project, folder, _ = saved
    clone = project.clone(tmp_path / "clone")
    move, calls = restores.os.replace, iter(range(100))

    def killed(source, target):
        if restores.STAGING in str(source) and str(target).startswith(str(clone.root)) and "files" in str(source):
            if str(target).endswith(restores.STAGING) or ".partial-" in str(source):
                return move(source, target)
            if next(calls) == call:
                raise MemoryError("killed")
        return move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(restores.os, "replace", killed)
        with pytest.raises(MemoryError):
            restore(clone.root, folder)
    restore(clone.root, folder)
    assert_whole(clone, project)
    assert (clone.root / "mlartifacts" / "demo" / "run" / "result.json").read_text() == "metrics"
    assert not (clone.root / restores.STAGING).exists()


def test_a_clone_that_has_results_already_is_refused(saved):
    project, folder, _ = saved
    before = state(project)
    with pytest.raises(UserError, match=r"already has artifacts, mlflow\.db, mlartifacts; .* fresh clone"):
        restore(project.root, folder)
    assert state(project) == before


def test_uncommitted_changes_are_not_replaced(saved, tmp_path):
    project, folder, _ = saved
    clone = project.clone(tmp_path / "clone")
    clone.variants(mine="z")
    with pytest.raises(UserError, match=r"params\.yaml: has uncommitted changes"):
        restore(clone.root, folder)


def test_the_advice_that_is_printed_brings_uncommitted_changes_back(project, tmp_path, monkeypatch, capsys):
    code = project.root / "make.py"
    code.write_text(code.read_text() + "# changed\n")
    (project.root / "picture").write_bytes(bytes(range(256)))
    project.git("add", "picture")
    project.git("config", "diff.noprefix", "true")
    project.variants(one="a", two="b", three="c")
    project.git("config", "commit.gpgsign", "false")
    (project.root / "mine.py").write_text("")
    assert backup(project.root, tmp_path / "backup").left_out == ("mine.py",)
    clone = project.clone(tmp_path / "clone")
    monkeypatch.setattr(restore_stage, "ROOT", clone.root)
    monkeypatch.setattr(verify_stage, "ROOT", clone.root)
    assert restore_stage.restore({"from": str(tmp_path / "backup"), "snapshot": None}) == 0
    said = capsys.readouterr().err
    (advice,) = re.findall("`(git apply.*?)`", said)
    clone.run(*advice.split())
    for name in ("make.py", "picture", "params.yaml", "dvc.lock"):
        assert (clone.root / name).read_bytes() == (project.root / name).read_bytes()


def test_a_changed_params_yaml_alone_needs_no_patch(project, tmp_path):
    project.variants(one="a", two="b", three="c")
    backup(project.root, tmp_path / "backup")
    clone = project.clone(tmp_path / "clone")
    assert restore(clone.root, tmp_path / "backup").notes == ()
    assert "three: c" in (clone.root / "params.yaml").read_text()


def test_the_same_code_is_had_by_restoring_at_the_commit_of_the_backup_as_is_advised(project, tmp_path):
    code = project.root / "make.py"
    code.write_text(code.read_text() + "# changed\n")
    backup(project.root, tmp_path / "backup")
    text = code.read_text()
    code.write_text("# quite different\n")
    project.git("commit", "-qam", "later")
    notes = restore(project.clone(tmp_path / "later").root, tmp_path / "backup").notes
    clone = project.clone(tmp_path / "clone")
    checkout, apply = (re.findall("`(git .*?)`", note)[0] for note in notes)
    clone.run(*checkout.split())
    (note,) = restore(clone.root, tmp_path / "backup").notes
    assert apply in note
    clone.run(*apply.split())
    assert (clone.root / "make.py").read_text() == text


def test_a_checkout_by_dvc_that_fails_says_why(saved, tmp_path, monkeypatch):
    project, folder, _ = saved
    clone = project.clone(tmp_path / "clone")
    (clone.root / "artifacts").symlink_to(tmp_path / "disk that is not mounted")
    monkeypatch.setattr(restore_stage, "ROOT", clone.root)
    with pytest.raises(
        QuantlineError,
        match=r"`dvc checkout` failed:\n.*clone/artifacts/(.|\n)*`python -m stages\.verify` then lists",
    ):
        restore_stage.restore({"from": str(folder), "snapshot": None})


def test_a_dvc_lock_that_was_cut_off_is_not_backed_up(project, tmp_path):
    path = project.root / "dvc.lock"
    path.write_text(path.read_text().partition("  quantize@two:")[0])
    with pytest.raises(UserError, match=r"dvc\.lock does not have quantize@two, .* run `dvc repro`"):
        backup(project.root, tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


def test_a_damaged_cache_is_not_backed_up(project, tmp_path):
    path = max((project.cache / "files").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    path.chmod(0o644)
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with pytest.raises(UserError, match=f"{path}: is damaged.*stages.verify"):
        backup(project.root, tmp_path / "backup")
    assert not list((tmp_path / "backup").rglob("*.json"))
    assert not list((tmp_path / "backup").rglob(".*"))


def test_an_interrupted_backup_leaves_no_snapshot_and_the_next_one_goes_on(project, tmp_path, monkeypatch):
    copy, calls = backups.copy_hashed, iter(range(100))

    def cut_off(*arguments):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return copy(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(backups, "copy_hashed", cut_off)
        with pytest.raises(KeyboardInterrupt):
            backup(project.root, tmp_path / "backup")
    with pytest.raises(UserError, match="contains no backup"):
        restore(project.clone(tmp_path / "clone").root, tmp_path / "backup")
    assert backup(project.root, tmp_path / "backup").copied == 10 - 4


def test_a_folder_inside_the_checkout_is_refused(project):
    with pytest.raises(UserError, match="lies in the checkout; give a folder outside of it"):
        backup(project.root, project.root / "backup")


def test_what_a_killed_process_left_is_removed(tmp_path):
    for folder in ("snapshots", "objects/md5/ab"):
        left = tmp_path / folder / f".c.partial-{socket.gethostname()}-1"
        left.mkdir(parents=True)
        (left / "c").write_text("half")
    remove_stale(tmp_path)
    assert not list(tmp_path.rglob(".*"))


def test_a_snapshot_with_a_path_outside_is_refused(saved, tmp_path):
    project, folder, report = saved
    manifest = json.loads(report.snapshot.read_text())
    manifest["files"]["../../outside"] = manifest["files"]["params.yaml"]
    report.snapshot.write_text(json.dumps(manifest))
    clone = project.clone(tmp_path / "deep" / "clone")
    with pytest.raises(UserError, match="lies outside of the checkout"):
        restore(clone.root, folder)
    assert not (tmp_path / "deep" / "outside").exists()
    assert not (tmp_path / "outside").exists()
    shutil.rmtree(clone.root)
