"""Score the variant with the reference engine and compare it with the float baseline and the served variant.

Examples:
    python -m stages.evaluate method=gptq bits=8
    python -m stages.evaluate method=gptq bits=8 evaluate=wikitext2 evaluate.path=wikitext2_test.parquet
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages import stage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from quantline.evaluation.measurements import MeasurementOptions
    from quantline.pipeline.run import StageRun


@stage("evaluate")
def evaluate(run: StageRun) -> None:
    from quantline.config.context import window_note
    from quantline.core.gpu import refuse_more_gpus
    from quantline.data.windows import build_windows
    from quantline.evaluation import evaluate as verdicts
    from quantline.pipeline.fit import positions_of

    options = run.config.evaluate
    refuse_more_gpus("evaluate.gpus", options.gpus, run.device)
    float_model = run.input("download") / "model"
    windows, tools = build_windows(float_model, options), instruments(run)
    with run.output() as out:
        inputs = verdicts.Inputs(
            checkpoint=run.checkpoint(), float_model=float_model, served=run.input("serve_smoke"),
            baseline=None if run.is_baseline else run.input("evaluate", baseline=True),
        )  # fmt: skip
        verdict = verdicts.evaluate(
            inputs, windows, options, device=run.device, threads=run.config.threads, out=out, run_worker=run.worker,
            instruments=tools,
        )  # fmt: skip
        run.metrics.update(verdict.metrics)
        run.tables.update(verdict.tables)
        run.files += verdict.files
        note = window_note(options, positions_of(float_model))
        verdicts_of = [] if run.is_baseline else [f"against the float model: {verdict.verdict}"]
        run.warnings += [*verdicts_of, *verdict.notes, *([note] if note else [])]


def instruments(run: StageRun) -> MeasurementOptions:
    """The measurements that the options select, with their inputs."""
    from quantline.core.errors import UserError
    from quantline.evaluation.measurements import LayerInputs, MeasurementOptions
    from quantline.pipeline.identity import stage_fingerprint

    config, options = run.config, run.config.evaluate
    if run.is_baseline:
        return MeasurementOptions(generations=options.generations)
    try:
        layers = LayerInputs(
            quantized=run.input("quantize"), calibration=run.input_file("calibrate"),
            samples=config.layer_errors.samples, unfold=True if config.method.name == "awq" else None,
            restore=options.restore,
        )  # fmt: skip
    except UserError:  # a manual run whose inputs were not kept
        if run.frozen:
            raise
        layers = None

    def noise_of(runs: int) -> str:
        times = config.noise.model_copy(update={"runs": runs})
        return stage_fingerprint(config.model_copy(update={"noise": times}), "noise", run.root)

    noise = noise_floor(run.root, noise_of)
    return MeasurementOptions(
        options.divergence.tokens,
        options.generations,
        layers,
        options.limits,
        tuple(options.fail_on),
        noise,
        changed_files(run),
    )


def changed_files(run: StageRun) -> int:
    """How many files of the checkpoint's folder differ from its result: changed, added or missing."""
    from quantline.pipeline.identity import differing, file_hashes
    from quantline.pipeline.paths import read_result
    from quantline.pipeline.run import stage_paths_of

    folder = run.input(run.checkpoint_stage)
    return len(differing(read_result(stage_paths_of(folder).result)["outputs"], file_hashes(folder)))


def noise_floor(root: Path, fingerprint_of: Callable[[int], str]) -> dict[str, Any] | None:
    """The spread of the loss over seeds: the variant's loss increase per seed, in nats per token of the same text.

    Args:
        root: the checkout; manual runs are in its scratch/.
        fingerprint_of: from a number of runs to the fingerprint of a noise result of this variant and text.

    Returns:
        runs, low and high (smallest and largest nll_difference), seeds, and the result's output_hash; None if it was not
        measured.
    """
    from quantline.pipeline.paths import read_result, recorded

    for path in recorded(root, "noise"):
        result = read_result(path)
        rows = result.get("tables", {}).get("runs", [])
        if rows and result.get("fingerprint") == fingerprint_of(len(rows)):
            lost = [float(row["nll_difference"]) for row in rows]
            return {
                "runs": len(rows), "low": min(lost), "high": max(lost), "seeds": [row["seed"] for row in rows],
                "unit": "nats/token", "output_hash": result["output_hash"],
            }  # fmt: skip
    return None


if __name__ == "__main__":
    evaluate()
