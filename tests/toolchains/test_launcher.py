"""Jobs by Hydra's launchers, in their own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from quantline.toolchains.environments import ensure
from quantline.toolchains.toolchain import worker_environment

pytestmark = pytest.mark.toolchain("sweep")


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_failing_job_does_not_end_the_others(launcher, root, tmp_path):
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(int(sys.argv[2]))"
    )
    commands = [[sys.executable, "-c", code, f"said-{number}", str(failing)] for number, failing in enumerate((3, 0))]
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"folder": str(tmp_path), "commands": commands, "visible": "5", "gives_gpus": False}))
    python = ensure(root, "sweep").python
    done = subprocess.run(
        [str(python), "-m", "quantline.toolchains.launcher", "--multirun", f"hydra/launcher={launcher}",
         f"hydra.sweep.dir={tmp_path}/out", "hydra.sweep.subdir=${hydra.job.num}", "hydra.output_subdir=null",
         f"+spec={spec}", "+job=0,1"],
        env={**worker_environment(1), "HOME": os.environ.get("HOME", "/")}, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # Both ran, and saw the GPUs of who started them, whatever the launcher does with the variable.
    assert [(tmp_path / f"said-{number}").read_text() for number in range(2)] == ["5", "5"]
