"""Score the variant by the reference engine and compare it with the float baseline and with what was served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.stage import StageRun


@stage("evaluate")
def evaluate(run: StageRun) -> None:
    from quantline import verdicts
    from quantline.windows import build_windows

    options = run.config.evaluate
    float_model = run.input("download") / "model"
    windows = build_windows(float_model, run.protocol())
    run.files += ["documents.jsonl", "comparison.json"]
    with run.output() as out:
        verdict = verdicts.evaluate(
            checkpoint=run.checkpoint(), windows=windows, served=run.input("serve_smoke"), float_model=float_model,
            baseline=None if run.is_baseline else run.input("evaluate", baseline=True),
            bootstrap=verdicts.Bootstrap(**options.bootstrap.model_dump()), engine_tolerance=options.engine_tolerance,
            batch_tokens=options.batch_tokens, device=run.device, threads=run.config.threads, out=out,
            run_worker=run.worker,
        )  # fmt: skip
        run.metrics.update(verdict.metrics)
        run.warnings.append(f"against the float model: {verdict.verdict}")


if __name__ == "__main__":
    evaluate()
