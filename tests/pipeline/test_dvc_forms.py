"""The forms of dvc.yaml, and that each has the stages of the table."""

from __future__ import annotations

import pytest
import yaml

from quantline.core.errors import UserError
from quantline.lifecycle.storage.dvc_lock import stage_keys
from quantline.pipeline.compose import read_params
from quantline.pipeline.dvc_forms import form_of, in_form, refuse_other_form, rewrite

ONE = "shared: model=demo\nbaseline: method=float\nvariants:\n  w8: method=rtn\n  w4: method=rtn\n"
EVERY = ONE.replace("shared: model=demo", "models:\n  demo: model=demo\n  mine: model=custom model.path=x")
PAIRS = EVERY + "pairs: [mine/w4, demo/w8]\n"
OWN = """\
  shape:
    foreach: ${variants}
    do:
      # of mine
      cmd: python shape.py variants/${key}.yaml
      deps: ["artifacts/${key}/convert", "artifacts/shared/download"]
      outs: ["artifacts/${key}/shape"]

  shape_baseline:
    cmd: python shape.py variants/float.yaml
    deps: ["artifacts/shared/download"]
    outs: ["artifacts/float/shape"]

"""


@pytest.fixture
def project(root, tmp_path):
    (tmp_path / "dvc.yaml").write_text((root / "dvc.yaml").read_text(encoding="utf-8"))

    def write(params):
        (tmp_path / "params.yaml").write_text(params)
        return tmp_path, read_params(tmp_path / "params.yaml")

    return write


@pytest.mark.parametrize(("params", "form"), [(EVERY, "every"), (PAIRS, "pairs")])
def test_there_and_back_again_gives_the_same_bytes(project, root, params, form):
    text = (root / "dvc.yaml").read_text(encoding="utf-8")
    folder, content = project(params)
    assert rewrite(folder, content)
    assert form_of((folder / "dvc.yaml").read_text()) == form
    assert not rewrite(folder, content)
    refuse_other_form(folder, content)
    assert rewrite(*project(ONE))
    assert (folder / "dvc.yaml").read_text() == text


def test_from_every_pair_to_named_ones(project):
    folder, content = project(EVERY)
    rewrite(folder, content)
    folder, content = project(PAIRS)
    assert rewrite(folder, content)
    assert yaml.safe_load((folder / "dvc.yaml").read_text())["vars"] == [
        {"built": {"demo-w8": {"model": "demo", "variant": "w8"}, "mine-w4": {"model": "mine", "variant": "w4"}}}
    ]


def test_comments_and_stages_of_ones_own_stay(project, root):
    folder, content = project(EVERY)
    text = (folder / "dvc.yaml").read_text().replace("# The report's own tables", f"{OWN}# The report's own tables")
    (folder / "dvc.yaml").write_text(text)
    rewrite(folder, content)
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    assert stages["shape"]["outs"] == ["artifacts/${item.model}/${item.variant}/shape"]
    assert stages["shape"]["deps"][1] == "artifacts/${item.model}/shared/download"
    assert stages["shape_baseline"]["foreach"] == "${models}"
    assert "# of mine" in (folder / "dvc.yaml").read_text()
    rewrite(*project(ONE))
    assert (folder / "dvc.yaml").read_text() == text


@pytest.mark.parametrize("params", [EVERY, PAIRS])
def test_dvc_has_for_each_pair_the_stages_that_one_model_has(project, params):
    """As DVC itself resolves the loops: names, paths and parameters of every stage."""
    from dvc.parsing import DataResolver
    from dvc.repo import Repo

    folder, content = project(params)
    one = resolved(Repo, DataResolver, folder, ONE, project)
    several = resolved(Repo, DataResolver, folder, params, project)
    wanted = {key for name in content["variants"] for key in stage_keys(name).values()}
    assert wanted <= several.keys()
    for name in content["variants"]:
        model, _, own = name.partition("/")
        for stage, key in stage_keys(name).items():
            alone, here = one[stage_keys(own)[stage]], several[key]
            assert here["outs"] == [out.replace("artifacts/", f"artifacts/{model}/") for out in alone["outs"]], key
            assert here.get("deps") == [
                dep.replace("artifacts/", f"artifacts/{model}/") for dep in alone.get("deps", [])
            ] or not here.get("deps"), key
            (read,) = alone["params"][1]["inputs.yaml"]
            assert here["params"] == [alone["params"][0], {"inputs.yaml": [read.replace("reads.", f"reads.{model}.")]}]
            assert here["cmd"] == alone["cmd"].replace("../variants", f"../variants/{model}")
    assert several["report@mine"]["outs"] == ["report/models/mine"]
    assert several["fleet_smoke@mine"]["outs"] == ["fleet_smoke/mine.json"]
    assert "fleet_smoke/mine.json" in several["report@mine"]["deps"]
    assert several["overview"]["deps"] == ["report/models"]


def resolved(repo_class, resolver, folder, params, project):
    rewrite(*project(params))
    if not (folder / ".dvc").is_dir():
        repo_class.init(str(folder), no_scm=True)
    with repo_class(str(folder)) as repo:
        definition = yaml.safe_load((folder / "dvc.yaml").read_text())
        return resolver(repo, str(folder), definition).resolve()["stages"]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (ONE, EVERY, "dvc.yaml is for one model, and params.yaml for every variant of every model"),
        (EVERY, ONE, "dvc.yaml is for every variant of every model, and params.yaml for one model"),
        (EVERY, PAIRS, "and params.yaml for named pairs of model and variant"),
        (PAIRS, PAIRS.replace("demo/w8", "demo/w4"), "dvc.yaml has other pairs"),
    ],
)
def test_a_dvc_yaml_for_something_else_is_refused_with_the_command(project, before, after, said):
    rewrite(*project(before))
    with pytest.raises(UserError, match=r"run `python -m stages\.models`, then `dvc repro`") as caught:
        refuse_other_form(*project(after))
    assert said in str(caught.value)


def test_a_further_variant_or_model_needs_no_other_dvc_yaml(project):
    rewrite(*project(EVERY))
    refuse_other_form(*project(EVERY + "  w3: method=rtn\n"))
    refuse_other_form(*project(EVERY.replace("  mine:", "  third: model=demo\n  mine:")))


def test_a_dvc_yaml_of_something_else_is_left_alone(project):
    folder, content = project(EVERY)
    (folder / "dvc.yaml").write_text("stages:\n  mine:\n    cmd: true\n")
    with pytest.raises(UserError, match="has no stage `compose` over the variants"):
        rewrite(folder, content)
    assert "matrix" not in in_form("stages:\n  mine:\n    cmd: true\n", content)
