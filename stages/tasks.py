"""Evaluate tasks with lm-evaluation-harness, on the server and the reference engine, each compared with the float model.

Examples:
    python -m stages.tasks method=gptq bits=4
    python -m stages.tasks method=gptq bits=4 tasks=own tasks.path=questions.jsonl
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages import stage

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from quantline.pipeline.run import StageRun
    from quantline.serving.running import Server
    from quantline.toolchains.protocol import JobResult


@stage("tasks")
def tasks(run: StageRun) -> None:
    from quantline.config.context import served_length
    from quantline.evaluation.tasks import run as tasks
    from quantline.pipeline.fit import positions_of

    options = run.config.tasks
    with run.output() as out:
        run.files.append("tasks.json")
        if not options.any:
            tasks.write_nothing(out)
            return
        checkpoint, items = run.checkpoint(), tasks.local_items(options, run.root)
        refused = tasks.refusal(run.input_file("serve_smoke")) if "vllm" in options.engines else ""
        report = tasks.evaluate(
            options, items, refused=refused,
            job={
                "checkpoint": str(checkpoint), "device": run.device, "threads": run.config.threads, "seed": options.seed,
                "batch_size": options.batch_size, "concurrency": run.config.serve.process.concurrency,
                "timeout_seconds": run.config.serve.process.request_timeout_seconds, "download": options.download,
                "max_length": served_length(run.config, positions_of(checkpoint)),
            },
            run_worker=lambda job: ask(run, job), server=lambda: server(run, checkpoint),
            baseline=None if run.is_baseline else run.input("tasks", baseline=True), out=out,
        )  # fmt: skip
        run.files += sorted(path.name for path in out.glob("samples-*.jsonl"))
        run.metrics.update(report.metrics)
        run.warnings.extend(report.warnings)


def ask(run: StageRun, job: dict[str, Any]) -> JobResult:
    """Run the harness on one engine, with its own log, and record the time."""
    engine = job["engine"]
    log = run.paths.log.with_name(f"tasks.{engine}.log")
    result = run.worker("lm_eval", "quantline.toolchains.workers.lm_eval", job, f"tasks, {engine}", log=log)
    if engine != "check":
        run.metrics[f"task_seconds/{engine}"] = result.seconds
    return result


def server(run: StageRun, checkpoint: Path) -> AbstractContextManager[Server]:
    """The variant's server, as serve_smoke starts it; in the pipeline it is the same one."""
    from quantline.pipeline.kept_servers import keeping_of
    from quantline.pipeline.server import server_of, server_options
    from quantline.serving.server import serve

    options = server_options(run, quantized=not run.is_baseline)
    return serve(server_of(run)[0], checkpoint, options, log=run.paths.log, keeping=keeping_of(run))


if __name__ == "__main__":
    tasks()
