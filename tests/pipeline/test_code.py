import pytest
import yaml

from quantline.pipeline.code import CHECKOUT, code_files
from quantline.pipeline.identity import identity


@pytest.fixture
def checkout(tmp_path):
    """Two stages, of which one has a module of its own and both share a folder."""
    deps = {
        "one": ["src/own.py", "src/shared", "artifacts/x", "src/quantline/pipeline/identity.py"],
        "two": ["src/shared"],
    }
    stages = {"one": {"deps": deps["one"]}, "two": {"foreach": "x", "do": {"deps": deps["two"]}}}
    for name in ("src/own.py", "src/shared/a.py", "src/shared/rules.yaml", "src/shared/note.txt", "src/quantline/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "src/quantline/pipeline/identity.py").write_text("x")
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    return tmp_path


def test_the_code_of_a_stage_is_what_dvc_runs_it_again_for(checkout):
    assert list(code_files("one", checkout)) == ["src/own.py", "src/shared/a.py", "src/shared/rules.yaml"]
    assert list(code_files("two", checkout)) == ["src/shared/a.py", "src/shared/rules.yaml"]


def test_a_stage_that_dvc_does_not_run_is_known_by_all_of_the_library(checkout):
    assert list(code_files("noise", checkout)) == ["src/quantline/b.py"]


def test_an_edit_changes_the_stages_that_depend_on_it_alone(checkout):
    before = {stage: code_files(stage, checkout) for stage in ("one", "two")}
    (checkout / "src/own.py").write_text("edited")
    code_files.cache_clear()
    assert code_files("one", checkout) != before["one"]
    assert code_files("two", checkout) == before["two"]


def test_the_identity_of_a_stage_names_its_source_files(composed, root):
    from quantline.pipeline.config import parse

    values = identity(parse(composed()), "convert", root)
    assert values["code"] == code_files("convert", CHECKOUT)
    assert "src/quantline/conversion/convert.py" in values["code"]
    assert "src/quantline/evaluation/perplexity.py" not in values["code"]
