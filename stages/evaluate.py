"""Score the variant by the reference engine and compare it with the float baseline and with what was served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.evaluation.measurements import Instruments
    from quantline.pipeline.run import StageRun


@stage("evaluate")
def evaluate(run: StageRun) -> None:
    from quantline.data.windows import Protocol, build_windows
    from quantline.evaluation import evaluate as verdicts
    from quantline.evaluation.bootstrap import Bootstrap

    options = run.config.evaluate
    float_model = run.input("download") / "model"
    windows, tools = build_windows(float_model, Protocol(**options.protocol())), instruments(run)
    with run.output() as out:
        verdict = verdicts.evaluate(
            checkpoint=run.checkpoint(), windows=windows, served=run.input("serve_smoke"), float_model=float_model,
            baseline=None if run.is_baseline else run.input("evaluate", baseline=True),
            bootstrap=Bootstrap(**options.bootstrap.model_dump()), engine_tolerance=options.engine_tolerance,
            batch_tokens=options.batch_tokens, device=run.device, threads=run.config.threads, out=out,
            run_worker=run.worker, instruments=tools,
        )  # fmt: skip
        run.metrics.update(verdict.metrics)
        run.tables.update(verdict.tables)
        run.files += verdict.files
        run.warnings += [f"against the float model: {verdict.verdict}", *verdict.notes]


def instruments(run: StageRun) -> Instruments:
    """What the options ask for, with the inputs that it needs."""
    from quantline.core.errors import UserError
    from quantline.evaluation.measurements import Generations, Instruments, Layers
    from quantline.pipeline.identity import stage_fingerprint
    from quantline.pipeline.records import noise_floor

    config, options = run.config, run.config.evaluate
    generations, limits = Generations(**options.generations.model_dump()), options.limits.model_dump()
    if run.is_baseline:
        return Instruments(generations=generations)
    try:
        layers = Layers(
            quantized=run.input("quantize"), calibration=run.input("calibrate") / "tokens.safetensors",
            samples=config.layer_errors.samples, unfold=True if config.method.name == "awq" else None,
            restore=options.restore.layers, tokens=options.restore.tokens,
        )  # fmt: skip
    except UserError:  # a checkpoint by hand, of which nobody kept what it was made from
        if run.frozen:
            raise
        layers = None

    def noise_of(runs: int) -> str:
        times = config.noise.model_copy(update={"runs": runs})
        return stage_fingerprint(config.model_copy(update={"noise": times}), "noise", run.root)

    noise = noise_floor(run.root, noise_of)
    return Instruments(
        options.divergence.tokens, generations, layers, limits, tuple(options.fail_on), noise, changed_files(run)
    )


def changed_files(run: StageRun) -> int:
    """How many files of the checkpoint's folder are not what its result recorded: changed, added or lost."""
    from quantline.pipeline.identity import differing, file_hashes
    from quantline.pipeline.paths import read_result
    from quantline.pipeline.run import stage_paths_of

    folder = run.input(run.checkpoint_stage)
    return len(differing(read_result(stage_paths_of(folder).result)["outputs"], file_hashes(folder)))


if __name__ == "__main__":
    evaluate()
