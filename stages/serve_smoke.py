"""Serve the variant, check its answers to test questions, and score the evaluation text.

Examples:
    python -m stages.serve_smoke method=gptq bits=4
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun


@stage("serve_smoke")
def serve_smoke(run: StageRun) -> None:
    from quantline.data.windows import build_windows
    from quantline.evaluation.generations import served_prompts
    from quantline.pipeline.kept_servers import keeping_of
    from quantline.pipeline.server import PROVEN, server_of, server_options
    from quantline.serving.serve_smoke import Asked, serve_and_score

    options = server_options(run, quantized=not run.is_baseline)
    model, continued = run.input("download") / "model", run.config.evaluate.generations
    windows = build_windows(model, run.config.evaluate)
    prompts = served_prompts(model, windows, continued).tokens
    asked = Asked(run.config.serve.smoke, prompts, continued.new_tokens)
    checkpoint = run.checkpoint()
    vllm = server_of(run)._replace(keeping=keeping_of(run, fresh=True), run_worker=run.side_worker)
    run.files += ["answers.json", "verdict.json"]
    with run.output() as out:
        served = serve_and_score(
            vllm, checkpoint, options, asked=asked, windows=windows, out=out,
            baseline=None if run.is_baseline else run.input("serve_smoke", baseline=True), log=run.paths.log,
        )  # fmt: skip
        run.metrics.update(served.metrics)
        run.warnings.extend(served.warnings)
        run.tables[PROVEN] = [{"flag": flag} for flag in served.flags]
        if served.reason:
            run.status, run.reason = "unsupported", served.reason


if __name__ == "__main__":
    serve_smoke()
