"""Serve the variant with the real server, ask it, judge its answers, score the evaluation text through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun


@stage("serve_smoke")
def serve_smoke(run: StageRun) -> None:
    from quantline.data.windows import Protocol, build_windows
    from quantline.pipeline.server import server_of, server_options
    from quantline.serving.serve_smoke import Questions, serve_and_score

    serve, baseline = run.config.serve, run.is_baseline
    options = server_options(run, quantized=not baseline)
    windows = build_windows(run.input("download") / "model", Protocol(**run.config.evaluate.protocol()))
    python, version = server_of(run)
    run.files += ["answers.json", "verdict.json"]
    with run.output() as out:
        served = serve_and_score(
            python=python, version=version, checkpoint=run.checkpoint(), options=options,
            questions=Questions(tuple(serve.smoke.prompts), tuple(serve.smoke.chat_prompts), serve.smoke.max_tokens),
            windows=windows, concurrency=serve.process.concurrency,
            request_timeout_seconds=serve.process.request_timeout_seconds,
            baseline=None if baseline else run.input("serve_smoke", baseline=True), out=out, log=run.paths.log,
        )  # fmt: skip
        run.metrics.update(served.metrics)
        run.warnings.extend(served.warnings)
        if served.reason:
            run.status, run.reason = "unsupported", served.reason


if __name__ == "__main__":
    serve_smoke()
