"""Quantize the float model with one method, by one backend, in its own environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.stage import StageRun


@stage("quantize")
def quantize(run: StageRun) -> None:
    from quantline import quantization

    run.refuse_float()
    download, calibration = run.input("download"), run.input("calibrate") / "tokens.safetensors"
    with run.output() as out:
        outcome = quantization.quantize(
            run.quantization_request(), model=download / "model", probe=download / "probe.safetensors",
            calibration=calibration, out=out, work=run.work_folder(), run_worker=run.worker,
        )  # fmt: skip
        run.environment["backend"] = outcome.backend
        run.metrics.update(outcome.metrics)
        run.warnings.extend(outcome.warnings)
        run.tables["layers"] = outcome.layers


if __name__ == "__main__":
    quantize()
