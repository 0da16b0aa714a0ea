from __future__ import annotations

from quantline.lifecycle.doctor import examine
from quantline.lifecycle.project import create


def found(root):
    return {finding.about: finding for finding in examine(root)}


def test_a_new_project_is_whole_and_its_environments_are_still_to_be_built(tmp_path):
    create(tmp_path / "new")
    findings = found(tmp_path / "new")
    assert all(finding.good for about, finding in findings.items() if about != "disk")
    assert findings["project"].fact == str(tmp_path / "new")
    environments = [finding for about, finding in findings.items() if about.startswith(".venvs/")]
    assert len(environments) > 5
    assert {finding.fact for finding in environments} == {"not built; the first stage that needs it builds it"}


def test_a_folder_that_is_no_project_comes_with_the_command_that_makes_one(tmp_path):
    finding = found(tmp_path)["project"]
    assert not finding.good
    assert "without conf/config.yaml, params.yaml, dvc.yaml, .dvc/config" in finding.fact
    assert "quantline init to=DIR" in finding.remedy


def test_a_missing_tool_is_named(tmp_path, monkeypatch):
    create(tmp_path / "new")
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = found(tmp_path / "new")["git"]
    assert (finding.good, finding.fact) == (False, "not found")
    assert "install git" in finding.remedy


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    create(tmp_path / "new")
    monkeypatch.setattr("quantline.lifecycle.doctor.ENOUGH_DISK", 1e18)
    assert not found(tmp_path / "new")["disk"].good
