"""Quantize a variant with several seeds and report the spread of its loss.

Run `python -m stages.run` of the same variant first: the float model's evaluation is compared with.

Examples:
    python -m stages.noise method=gptq bits=4 noise.runs=5
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import ROOT, WORK, stage

if TYPE_CHECKING:
    from pathlib import Path

    from quantline.evaluation.evaluate import Verdict
    from quantline.pipeline.run import StageRun


@stage("noise")
def noise(run: StageRun) -> None:
    import stages.calibrate
    import stages.convert
    import stages.quantize  # noqa: F401
    from quantline.core.errors import UserError
    from quantline.core.files import write_json
    from quantline.data.windows import build_windows
    from quantline.evaluation import evaluate, seed_noise
    from quantline.pipeline.execute import made, seeded

    run.refuse_float()
    if run.frozen:
        raise UserError(f"{run.stage}: takes overrides, not a frozen configuration; run it without -cp and -cn")
    options, float_model = run.config.evaluate, run.input("download") / "model"
    windows, baseline = build_windows(float_model, options), run.input("evaluate", baseline=True)

    def make(seed: int) -> tuple[Path, str]:
        return made(seeded(run.config, seed), f"{run.variant}-seed{seed}", WORK, ROOT)

    with run.output() as out:

        def judge(checkpoint: Path) -> Verdict:
            folder = out / checkpoint.parent.name
            folder.mkdir()
            return evaluate.evaluate(
                evaluate.Inputs(checkpoint, float_model, folder, baseline), windows, options, device=run.device,
                threads=run.config.threads, out=folder, run_worker=run.worker,
            )  # fmt: skip

        seeds = range(run.config.seed, run.config.seed + run.config.noise.runs)
        spread = seed_noise.measure(seeds, make, judge)
        write_json(out / "runs.json", {"runs": spread.rows})
        run.files.append("runs.json")
        run.metrics.update(spread.metrics)
        run.tables["runs"] = spread.rows


if __name__ == "__main__":
    noise()
