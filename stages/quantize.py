"""Quantize the float model with one method and one backend, in the backend's environment.

Examples:
    python -m stages.quantize method=awq
    python -m stages.quantize method=gptq bits=8 method.desc_act=true
    python -m stages.quantize method=awq,gptq,rtn --multirun
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun
    from quantline.quantization.quantize import Request


@stage("quantize")
def quantize(run: StageRun) -> None:
    from quantline.core.gpu import refuse_more_gpus
    from quantline.quantization import layer_errors
    from quantline.quantization import quantize as quantization

    run.refuse_float()
    refuse_more_gpus("quantize.gpus", run.config.quantize.gpus, run.device)
    download, calibration = run.input("download"), run.input_file("calibrate")
    early = layer_errors.early(run.early_side_worker, enabled=run.config.layer_errors.enabled)
    with run.output() as out, run.work_folder() as work, early:
        outcome = quantization.quantize(
            request(run), model=download / "model", probe=download / "probe.safetensors",
            calibration=calibration, out=out, work=work, run_worker=run.worker,
        )  # fmt: skip
        run.environment["backend"] = outcome.backend
        config = run.config
        covered = layer_errors.measure(
            layer_errors.Quantized(
                download / "model", out, calibration, outcome.linears, config.method.name,
                config.layers.model_dump()["rules"], outcome.layers,
            ),
            config.layer_errors, run_worker=run.side_worker, threads=config.threads, device=run.device, failed=work,
        )  # fmt: skip
        run.metrics.update({**outcome.metrics, **covered.metrics})
        run.warnings.extend([*outcome.warnings, *covered.warnings])
        run.tables["layers"] = covered.rows
        run.files += covered.files


def request(run: StageRun) -> Request:
    """The quantization request, with the backends that may serve it."""
    from quantline.pipeline.identity import backends_of
    from quantline.quantization.quantize import Request
    from quantline.quantization.requirements import requirements_of

    config = run.config
    return Request(
        method=config.method.model_dump(), bits=config.bits, group_size=config.group_size, backend=config.backend,
        order=backends_of(config), requirements=requirements_of(config.model_dump()),
        rules=config.layers.model_dump()["rules"], seed=config.seed, threads=config.threads, device=run.device,
    )  # fmt: skip


if __name__ == "__main__":
    quantize()
