"""Quantize the float model with one method, in its backend's own environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.stage import StageRun


@stage("quantize")
def quantize(run: StageRun) -> None:
    from quantline import quantization
    from quantline.lineage import TOOLCHAIN_OF

    config = run.config
    run.refuse_float()
    download = run.input("download")
    calibrated = TOOLCHAIN_OF[config.method.backend] is not None
    calibration = run.input("calibrate") / "tokens.safetensors" if calibrated else None
    with run.output() as out:
        outcome = quantization.quantize(
            method=config.method.model_dump(), bits=config.bits, group_size=config.group_size, seed=config.seed,
            threads=config.threads, device=run.device, model=download / "model", probe=download / "probe.safetensors",
            calibration=calibration, out=out, run_worker=run.worker,
        )  # fmt: skip
        run.metrics.update(outcome.metrics)
        run.warnings.extend(outcome.warnings)
        run.tables["layers"] = outcome.layers


if __name__ == "__main__":
    quantize()
