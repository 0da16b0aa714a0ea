"""A Hydra application whose jobs are commands, for Hydra's launchers: joblib, submitit, Slurm, Ray.

It runs in the environment `sweep` as `python -m quantline.toolchains.launcher --multirun hydra/launcher=NAME
+spec=FILE +job=0,1,2`. FILE is JSON:

    folder: where to run
    commands: lists of arguments, one a job
    visible: CUDA_VISIBLE_DEVICES of who started it, or null
    gives_gpus: whether the launcher sets that variable for each job

Only the standard library and Hydra are imported, since the core's packages are not there. A job's failure is its exit code,
not an exception: the launchers of joblib 1.2.0 and Ray 1.2.2 end with the first exception.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import hydra

# Variables of the launcher's environment, which the command's own Python must not see.
_LEFT_OUT = ("PYTHON", "HYDRA_", "OMP_", "MKL_")


@hydra.main(version_base="1.3", config_path=None)
def run(cfg: Any) -> int:
    """Run the command of one job and return its exit code."""
    spec = json.loads(Path(str(cfg.spec)).read_text(encoding="utf-8"))
    variables = {key: value for key, value in os.environ.items() if not key.startswith(_LEFT_OUT)}
    if not spec["gives_gpus"]:  # submitit's local launcher 1.2.0 empties the variable
        variables.pop("CUDA_VISIBLE_DEVICES", None)
        if spec["visible"] is not None:
            variables["CUDA_VISIBLE_DEVICES"] = spec["visible"]
    command = spec["commands"][int(cfg.job)]
    return subprocess.run(command, cwd=spec["folder"], env=variables, stdin=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    run()
