from __future__ import annotations

import re
import shutil

import pytest

from quantline.core.errors import UserError
from quantline.pipeline import identity as identity_module
from quantline.pipeline.config import parse
from quantline.pipeline.execute import execute
from quantline.pipeline.inputs import Wanted, missing_inputs
from quantline.pipeline.run import StageRun


def write(text="x", *inputs):
    """A stage's work that reads outputs of earlier stages and writes one file."""

    def work(run):
        for name in inputs:
            run.input(name)
        with run.output() as out:
            (out / "value").write_text(text)

    return work


@pytest.fixture
def code(monkeypatch):
    """What every stage's source files are said to be; may be changed."""
    files = {"stages/x.py": "old"}
    monkeypatch.setattr(identity_module, "code_files", lambda stage: dict(files))
    return files


def test_an_input_by_hand_is_found_by_what_it_was_made_from_whatever_its_name(checkout, config):
    options = ("method=gptq", "bits=8")
    execute("quantize", write(), config(*options, "variant=mine"), checkout, ())
    run = StageRun("convert", config(*options, "serve.process.port=9000"), checkout, options)
    assert run.input("quantize") == checkout / "scratch" / "mine" / "quantize"
    assert list(run.inputs) == ["quantize"]


def test_an_input_by_hand_is_found_among_the_pipelines_outputs(checkout, config):
    execute("quantize", write(), config("method=gptq"), checkout, ())
    shutil.move(checkout / "scratch" / "gptq-w4-g128", checkout / "artifacts" / "renamed")
    run = StageRun("convert", config("method=gptq"), checkout, ())
    assert run.input("quantize") == checkout / "artifacts" / "renamed" / "quantize"


@pytest.mark.parametrize("option", ["bits=8", "seed=1", "threads=1", "calibration.n_samples=5", "method.desc_act=true"])
def test_an_input_made_from_other_options_is_not_taken(checkout, config, option):
    execute("quantize", write(), config("method=gptq"), checkout, ())
    run = StageRun("convert", config("method=gptq", option), checkout, ("method=gptq", option))
    with pytest.raises(UserError, match=f"(?m)^  python -m stages.quantize method=gptq {option}$"):
        run.input("quantize")


def test_a_baseline_that_is_missing_names_its_command_without_the_methods_options(checkout, config):
    options = ("method=gptq", "method.desc_act=true", "bits=8", "group_size=32", "evaluate.max_tokens=100")
    run = StageRun("evaluate", config(*options), checkout, options)
    with pytest.raises(UserError, match=r"(?m)^  python -m stages.evaluate method=float evaluate.max_tokens=100$"):
        run.input("evaluate", baseline=True)


def test_a_baseline_is_found_for_a_variant(checkout, config):
    execute("evaluate", write(), config("method=float"), checkout, ("method=float",))
    run = StageRun("evaluate", config("method=gptq", "bits=8"), checkout, ())
    (made,) = checkout.glob("scratch/float/demo-*/evaluate")
    assert run.input("evaluate", baseline=True) == made
    assert list(run.inputs) == ["float/evaluate"]


def test_the_command_for_a_missing_baseline_makes_it_whatever_the_variants_options_are(checkout, composed):
    options = (
        "variant=v1", "method=gptq", "bits=8", "backend=gptqmodel", "dtype=float32", "calibration.n_samples=8",
        "layers=uniform", "seed=3", "low_memory=false", "convert.target=gptq", "evaluate.max_tokens=100", "instruments=none",
        "threads=4", "serve.max_model_len=512", "model.name=mine",
    )  # fmt: skip
    run = StageRun("evaluate", parse(composed(*options)), checkout, options)
    with pytest.raises(UserError) as refused:
        run.input("evaluate", baseline=True)
    command = str(refused.value).partition("python -m stages.evaluate ")[2].splitlines()[0].split()
    kept = ["evaluate.max_tokens=100", "instruments=none", "threads=4", "serve.max_model_len=512", "model.name=mine"]
    assert command == ["method=float", *kept]
    execute("evaluate", write(), parse(composed(*command)), checkout, command)
    assert run.input("evaluate", baseline=True).is_relative_to(checkout / "scratch" / "float")


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_all_inputs_that_are_missing_are_told_at_once_in_the_order_in_which_they_can_be_made(checkout, config, method):
    options = (f"method={method}", "variant=v1")
    run = StageRun("evaluate", config(*options), checkout, options)

    def told():
        with pytest.raises(UserError) as refused:
            run.input("download")
        return re.findall(r"^  python -m stages\.(\S+) (\S+)", str(refused.value), re.MULTILINE)

    of = f"method={method}"
    every = [
        ("download", of), ("calibrate", of), ("quantize", of), ("convert", of), ("serve_smoke", "method=float"),
        ("serve_smoke", of), ("evaluate", "method=float"),
    ]  # fmt: skip
    assert told() == every
    execute("convert", write(), config(*options), checkout, options)
    assert told() == [every[0], *every[4:]]


def test_what_other_code_made_with_the_same_options_is_said_to_be_that(checkout, config, code):
    options = ("method=gptq", "variant=v1")
    execute("download", write(), config(*options), checkout, options)
    execute("calibrate", write("x", "download"), config(*options), checkout, options)

    def told(stage, wanted, *more):
        with pytest.raises(UserError) as refused:
            StageRun(stage, config(*options, *more), checkout, (*options, *more)).input(wanted)
        return str(refused.value)

    code["stages/x.py"] = "new"
    (download,) = checkout.glob("scratch/float/*/download")
    place = download.relative_to(checkout)
    assert told("calibrate", "download") == (
        f"calibrate needs the output of download, which was made by other code ({place}); run it again: "
        "python -m stages.download method=gptq variant=v1"
    )
    both = f"which were made by other code ({place} and scratch/v1/calibrate); run them again in this order:"
    assert both in told("quantize", "calibrate")
    assert f"do not exist for these options ({place} was made by other code); run in this order:" in told(
        "quantize", "calibrate", "calibration.seed=5"
    )
    other_model = told("calibrate", "download", "model.allow_pickle=true")
    assert "download, which does not exist for these options; run: " in other_model
    execute("download", write(), config(*options), checkout, options)
    assert "output of calibrate, which was made by other code (scratch/v1/calibrate)" in told("quantize", "calibrate")
    code["stages/x.py"] = "newer"
    shutil.rmtree(download)
    assert "download, which does not exist for these options; run: " in told("calibrate", "download")


OTHER_MODEL = ("model=custom", "model.path=/models/other")
# What a variant's stages read. Where this machine cannot serve it, serve_smoke of all variants has the same content.
READ = {
    "download": (), "quantize": ("download",), "convert": ("quantize",), "serve_smoke": ("download", "convert"),
    "evaluate": ("download", "convert", "serve_smoke"),
}  # fmt: skip


def make_variant(checkout, config, options, stages):
    chosen = config(*options)
    for stage in stages:
        of = [part for part in options if stage != "download" or part.startswith("model")]
        text = "not served" if stage == "serve_smoke" else f"{stage} of {of}"
        execute(stage, write(text, *READ[stage]), chosen, checkout, options)


def make_float(checkout, config, options):
    execute("serve_smoke", write("served", "download"), config(*options, "method=float"), checkout, options)


def outdated(checkout, config):
    """Stage -> the output of other code, of what a variant lacks up to its evaluation."""
    missing = missing_inputs(checkout, "evaluate", Wanted("evaluate"), config)
    return {wanted.stage: wanted.outdated for wanted in missing if not wanted.baseline}


def test_an_evaluation_of_another_model_is_not_taken_for_that_of_the_float_model(checkout, config):
    first, second = (
        ("method=rtn", "bits=8", f"variant=v{number}", *model) for number, model in ((1, ()), (2, OTHER_MODEL))
    )
    make_variant(checkout, config, first, READ)
    make_variant(checkout, config, second, list(READ)[:-1])
    make_float(checkout, config, OTHER_MODEL)
    of_float = [Wanted("evaluate", baseline=True)]
    assert missing_inputs(checkout, "evaluate", of_float[0], config(*second)) == of_float


def test_an_evaluation_of_another_variant_with_equal_answers_is_not_taken_for_that_of_this_one(checkout, config, code):
    first, second = (("method=rtn", f"bits={bits}", f"variant=v{bits}") for bits in (4, 8))
    make_variant(checkout, config, first, READ)
    make_variant(checkout, config, second, list(READ)[:-1])
    make_float(checkout, config, ())
    assert outdated(checkout, config(*second)) == {"evaluate": None}
    code["stages/x.py"] = "new"
    assert outdated(checkout, config(*first))["evaluate"] == "scratch/v4/evaluate"
    found = outdated(checkout, config(*second))
    assert (found["serve_smoke"], found["evaluate"]) == ("scratch/v8/serve_smoke", None)


def test_an_evaluation_is_of_this_variant_where_the_stages_before_it_were_made_again(checkout, config, code):
    options = ("method=rtn", "variant=v1")
    make_variant(checkout, config, options, READ)
    make_float(checkout, config, ())
    code["stages/x.py"] = "new"
    make_variant(checkout, config, options, list(READ)[:-1])
    make_float(checkout, config, ())
    assert outdated(checkout, config(*options)) == {"evaluate": "scratch/v1/evaluate"}


def test_a_missing_output_of_the_float_model_is_named_as_its_own(checkout, config):
    for stage, method in (("download", "float"), ("serve_smoke", "float"), ("serve_smoke", "gptq")):
        execute(stage, write(), config(f"method={method}"), checkout, ())
    run = StageRun("evaluate", config("method=gptq"), checkout, ("method=gptq",))
    expected = (
        "evaluate needs the output of evaluate of the float model, which does not exist for these options; run: python -m "
        "stages.evaluate method=float"
    )
    with pytest.raises(UserError) as refused:
        run.input("evaluate", baseline=True)
    assert str(refused.value) == expected
