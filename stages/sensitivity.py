"""Measure the loss of each unit of linears at each width, for plans by budget (`stages.allocate`).

Examples:
    python -m stages.sensitivity method=gptq group_size=64
    python -m stages.sensitivity method=gptq group_size=64 sensitivity.bits=[3,4,8] sensitivity.samples=8
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun


@stage("sensitivity")
def sensitivity(run: StageRun) -> None:
    from quantline.checkpoints.checkpoint import Checkpoint
    from quantline.checkpoints.linears import select_linears
    from quantline.core.errors import UserError
    from quantline.core.files import read_json
    from quantline.evaluation import unit_losses
    from quantline.evaluation.unit_losses import BUDGETED
    from quantline.planning.layouts import is_symmetric

    run.refuse_float()
    config, model, calibration = run.config, run.input("download") / "model", run.input_file("calibrate")
    method = config.method.model_dump()
    if method["name"] not in BUDGETED:
        raise UserError(f"method={method['name']}: has no widths to choose from; take method={' or '.join(BUDGETED)}")
    linears = select_linears(
        Checkpoint.open(model), read_json(model / "config.json"), bits=config.bits, group_size=config.group_size,
        lm_head=config.lm_head == "quantized",
    )  # fmt: skip
    grids = unit_losses.Grids(config.sensitivity.bits, config.group_size, is_symmetric(method["name"], method))
    with run.output() as out:
        rows, metrics = unit_losses.measure(
            model, linears, grids, calibration, config.sensitivity.samples, device=run.device, threads=config.threads,
            run_worker=run.worker,
        )  # fmt: skip
        unit_losses.write(rows, out)
        run.files += [unit_losses.TABLE, *unit_losses.draw(rows, out)]
        run.metrics.update(metrics)
        run.tables["units"] = rows


if __name__ == "__main__":
    sensitivity()
