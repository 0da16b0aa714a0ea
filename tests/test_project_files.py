"""Files that others read: the citation, the workflow, the forms for issues, and the examples for Python."""

from __future__ import annotations

import re
import shutil
import tomllib

import pytest
import yaml
from tiny_quantized import write_whole

from quantline import __version__
from quantline.pipeline.server import options_of
from quantline.serving.command import served_line

FORMS = ("bug", "feature")


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_citation_names_this_version_and_this_licence(root):
    citation = read(root / "CITATION.cff")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (__version__, project["license"])
    assert (citation["title"], citation["abstract"]) == ("Quantline", project["description"])
    assert {"cff-version", "message", "authors"} <= citation.keys()


def test_the_workflow_runs_what_a_change_must_pass_with_the_python_of_the_makefile_and_reads_only(root):
    workflow = read(root / ".github" / "workflows" / "checks.yml")
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (root / ".ci" / "run").stat().st_mode & 0o111
    (python,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert f"PYTHON ?= python{python}\n" in (root / "Makefile").read_text(encoding="utf-8")
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_for_issues_has_the_parts_that_the_forge_needs(root, name):
    form = read(root / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 2
    assert all(field["attributes"]["label"] for field in fields)
    text = (root / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8")
    assert [path for path in re.findall(r"`(docs/[\w./-]+)`", text) if not (root / path).exists()] == []


def test_the_examples_for_python_run_in_order_up_to_the_server(root, tmp_path, monkeypatch, capsys):
    blocks = re.findall(
        r"```python\n(.*?)```", (root / "docs" / "reference" / "python.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(blocks) == 6
    write_whole(tmp_path / "checkpoint", "gptq")
    for name in ("assets/demo", "conf"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copy(root / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks[-1], server = blocks[-1].split("\nwith serve(")
    for block in blocks:
        exec(block, names)
    compile(f"with serve({server}", "server", "exec")
    assert (names["settings"], names["proof"].target) == (None, "compressed_tensors")
    assert names["rows"] == []
    shown = capsys.readouterr().out
    assert "codes and zero points of 14 linears are equal" in shown
    assert served_line("converted", options_of(names["config"], "cpu", quantized=True)) in shown
