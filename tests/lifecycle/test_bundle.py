"""A bundle packs what runs here, and installs it elsewhere without a network."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys

import pytest

from quantline.core.errors import DiskFullError, UserError
from quantline.lifecycle import bundle as bundling
from quantline.lifecycle.bundle import bundle


@pytest.fixture
def project(tmp_path, root):
    """A repository with a small environment in .venv: one module, and one script of it."""
    folder = tmp_path / "project"
    (folder / "tools").mkdir(parents=True)
    shutil.copyfile(root / "tools" / "unbundle.py", folder / "tools" / "unbundle.py")
    (folder / ".gitignore").write_text(".venv\n.venvs\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *command], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / ".venv")], check=True)
    packages = next((folder / ".venv").glob("lib/python*/site-packages"))
    (packages / "greeting.py").write_text("import sys\n\n\ndef main():\n    print('hello from', sys.prefix)\n")
    script = folder / ".venv" / "bin" / "greet"
    script.write_text(f"#!{folder}/.venv/bin/python\nfrom greeting import main\nmain()\n")
    script.chmod(0o755)
    (folder / ".venv" / "ready").touch()
    return folder


def unbundle(made, to):
    subprocess.run(["git", "clone", "-q", str(made / "repository.bundle"), str(to)], check=True)
    command = [sys.executable, "-I", str(to / "tools" / "unbundle.py"), str(made), str(to)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_packed_environment_runs_where_it_is_unpacked(project, tmp_path):
    made = bundle(project, tmp_path / "made", [], outputs=False)
    assert made.environments == ("core",)
    there = tmp_path / "there"
    done = unbundle(made.folder, there)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(project)  # nothing of it may point back
    said = subprocess.run([str(there / ".venv" / "bin" / "greet")], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == f"hello from {there / '.venv'}"
    assert (there / ".venv" / "ready").is_file()
    assert f"{there}/.venv" in (there / ".venv" / "bin" / "activate").read_text()


def test_the_same_environment_gives_the_same_bytes(project, tmp_path):
    files = [json.loads((bundle(project, tmp_path / name, [], outputs=False).folder / "bundle.json").read_text())["files"]
             for name in ("one", "two")]  # fmt: skip
    assert files[0]["environments/core.tar"] == files[1]["environments/core.tar"]


def test_a_damaged_file_is_refused_before_anything_is_installed(project, tmp_path):
    made = bundle(project, tmp_path / "made", [], outputs=False).folder
    tar = made / "environments" / "core.tar"
    tar.write_bytes(tar.read_bytes().replace(b"hello from", b"goodbye to"))
    done = unbundle(made, tmp_path / "there")
    assert done.returncode == 1
    assert "core.tar: is damaged" in done.stderr
    assert not (tmp_path / "there" / ".venv").exists()


def test_another_python_is_refused(project, tmp_path):
    made = bundle(project, tmp_path / "made", [], outputs=False).folder
    manifest = json.loads((made / "bundle.json").read_text())
    (made / "bundle.json").write_text(json.dumps({**manifest, "python": "3.8.1"}))
    assert "is for Python 3.8.1" in unbundle(made, tmp_path / "there").stderr


def test_a_manifest_that_was_cut_off_is_refused_without_a_traceback(project, tmp_path):
    made = bundle(project, tmp_path / "made", [], outputs=False).folder
    (made / "bundle.json").write_text((made / "bundle.json").read_text()[:40])
    done = unbundle(made, tmp_path / "there")
    assert "bundle.json: is damaged; copy the bundle again" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda project, made: (project / "tools" / "unbundle.py").write_text("# other\n"),
            "changes that are not committed",
        ),
        (lambda project, made: (project / ".venv" / "ready").unlink(), r"run `make setup`"),
        (lambda project, made: made.mkdir() or (made / "something").touch(), "is not empty"),
    ],
)
def test_what_cannot_be_packed_whole_is_refused(project, tmp_path, change, said):
    made = tmp_path / "made"
    change(project, made)
    with pytest.raises(UserError, match=said):
        bundle(project, made, [], outputs=False)


def test_after_a_bundle_that_failed_the_same_command_works(project, tmp_path, monkeypatch):
    made = tmp_path / "made"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bundling, "_pack", full)
        with pytest.raises(DiskFullError, match="run it again"):
            bundle(project, made, [], outputs=False)
    assert [path.name for path in tmp_path.iterdir() if path != project] == []
    assert (bundle(project, made, [], outputs=False).folder / "bundle.json").is_file()


def test_an_environment_that_does_not_exist_is_refused_by_name(project, tmp_path):
    with pytest.raises(UserError, match="environments=vlm: no such environment; there are all, reference, vllm"):
        bundle(project, tmp_path / "made", ["vlm"], outputs=False)
