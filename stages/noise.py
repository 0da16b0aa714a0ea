"""Quantize a variant several times with other seeds and report how much its loss spreads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import ROOT, WORK, stage

if TYPE_CHECKING:
    from pathlib import Path

    from quantline.config import Config
    from quantline.stage import StageRun
    from quantline.verdicts import Verdict


@stage("noise")
def noise(run: StageRun) -> None:
    import stages.calibrate
    import stages.convert
    import stages.quantize  # noqa: F401
    from quantline import noise, verdicts
    from quantline.jobs import write_json
    from quantline.stage import made
    from quantline.statistics import Bootstrap
    from quantline.windows import build_windows

    run.refuse_float()
    run.refuse_frozen()
    options, float_model = run.config.evaluate, run.input("download") / "model"
    windows, baseline = build_windows(float_model, run.protocol()), run.input("evaluate", baseline=True)

    def make(config: Config) -> tuple[Path, str]:
        return made(config, f"{run.variant}-seed{config.seed}", WORK, ROOT)

    with run.output() as out:

        def judge(checkpoint: Path) -> Verdict:
            folder = out / checkpoint.parent.name
            folder.mkdir()
            return verdicts.evaluate(
                checkpoint=checkpoint, windows=windows, served=folder, float_model=float_model, baseline=baseline,
                bootstrap=Bootstrap(**options.bootstrap.model_dump()), device=run.device, out=folder,
                engine_tolerance=options.engine_tolerance, batch_tokens=options.batch_tokens,
                threads=run.config.threads, run_worker=run.worker,
            )  # fmt: skip

        seeds = range(run.config.seed, run.config.seed + run.config.noise.runs)
        spread = noise.measure(run.config, seeds, make, judge)
        write_json(out / "runs.json", {"runs": spread.rows})
        run.files.append("runs.json")
        run.metrics.update(spread.metrics)
        run.tables["runs"] = spread.rows


if __name__ == "__main__":
    noise()
