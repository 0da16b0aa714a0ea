"""Stages by hand for two models, as a user does it: run what is wanted, then every command that the message names."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
from checkout import SHARED, Checkout

from quantline.checkpoints.safetensors_file import SafetensorsFile, write_safetensors

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

STAGES = ("serve_smoke", "evaluate")
OPTIONS = [*(option for option in SHARED if option != "model=demo"), "tracking.enabled=false"]


@pytest.fixture
def own_model(bare, root, tmp_path):
    """A copy of the demo model with other weights."""
    folder = shutil.copytree(root / "assets" / "demo" / "model", tmp_path / "own model")
    (path,) = folder.glob("*.safetensors")
    file = SafetensorsFile.open(path)
    tensors = {name: file.view(name).copy() for name in file.infos}
    name = next(name for name in sorted(tensors) if name.endswith("mlp.down_proj.weight"))
    tensors[name][:, 0] = 0
    write_safetensors(path, tensors)
    yield folder
    shutil.rmtree(bare.root / "scratch", ignore_errors=True)


def follow(copy: Checkout, stage: str, *overrides: str) -> list[str]:
    """Run a stage; where it refuses, run what it says, and then the stage again. Returns the commands that it named."""
    command = ["python", "-m", f"stages.{stage}", *OPTIONS, *overrides]
    done = copy.run(*command)
    if done.code == 0:
        return []
    assert "Traceback" not in done.err
    commands = re.findall(r"(?m)(?:^  |run(?: it again)?: )(python -m stages\..*)", done.err)
    assert commands, done.err
    for named in commands:
        made = copy.run(*shlex.split(named))
        assert made.code == 0, f"{named}\n{made.text}"
    again = copy.run(*command)
    assert again.code == 0, again.text
    return commands


def perplexity(copy: Checkout, pattern: str) -> float:
    (result,) = copy.root.glob(f"scratch/{pattern}/evaluate.json")
    return json.loads(result.read_text())["metrics"]["reference_perplexity"]


def test_what_is_asked_for_is_made_by_the_commands_that_are_printed_for_two_models_in_turn(bare, own_model):
    first = ("method=rtn", "bits=8", "variant=v1", "model=custom", f"model.path={own_model}")
    second = ("method=rtn", "bits=8", "model.trust_remote_code=true")  # the demo, not as the pipeline made it
    commands = {options: [follow(bare, stage, *options) for stage in STAGES] for options in (first, second)}
    for named in commands.values():
        assert len(named[0]) == 5  # download, calibrate, quantize, convert, and serve_smoke of the float model
        assert len(named[1]) == 1  # evaluate of the float model
    models = ("own-model", "demo")
    baselines = [perplexity(bare, f"float/{name}-*") for name in models]
    assert baselines[0] != baselines[1]
    # Neither model lost anything to the other, so that each can go on where it was.
    for options in (first, second):
        assert follow(bare, "evaluate", *options) == []
    assert baselines == [perplexity(bare, f"float/{name}-*") for name in models]
    assert perplexity(bare, "v1") == pytest.approx(baselines[0], rel=0.02)
    (folder,) = (path.parent for path in bare.root.glob("scratch/float/own-model-*/evaluate.json"))
    shown = bare.run("python", "-m", "stages.lineage", "variant=by-hand/v1", f"against=by-hand/float/{folder.name}")
    assert "first difference: calibrate, stage calibrate: ran | nothing" in shown.out
    assert "v1: is not one of the results here" in bare.run("python", "-m", "stages.lineage", "variant=v1").err
