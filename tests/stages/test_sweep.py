"""The command line of `stages.sweep`: what is refused before anything runs."""

from __future__ import annotations

import re

import pytest

from quantline.core.errors import UserError
from quantline.pipeline.command_line import read
from stages.sweep import OPTIONS, sweep


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["variants=nothing"], "variants=nothing: no such variant; params.yaml has "),
        (["variants=,"], "variants=,: names no variant; leave it out for all"),
        (["workers=0"], "workers=0: give a whole number of at least 1"),
        (["gpus=some"], "gpus=some: give a whole number of at least 0"),
        (["detach=true"], "detach=true launcher=local: only Slurm runs on without this terminal"),
        (["launcher=condor"], "launcher=condor: allowed are local, joblib, submitit, slurm, ray"),
        (["collect", "sweep=nowhere"], "holds no sweep"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(given, said):
    with pytest.raises(UserError, match=re.escape(said)):
        sweep(read(given, OPTIONS, configured=False)[0])


def test_the_stages_and_launchers_of_the_options_are_those_that_there_are():
    from quantline.lifecycle.sweep.launch import LAUNCHERS
    from quantline.pipeline.stages import PIPELINE

    allowed = {option.name: option.allowed for option in OPTIONS}
    assert set(allowed["until"]) == {"all", *PIPELINE}
    assert set(allowed["launcher"]) == set(LAUNCHERS)
