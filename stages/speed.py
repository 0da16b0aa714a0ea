"""Measure the serving speed of the variant and the float model in one session, with vLLM's benchmark tools.

With speed.runtime=transformers both are asked questions in a row by their own library instead, without a server.

Examples:
    python -m stages.speed method=gptq bits=4
    python -m stages.speed method=gptq bits=4 speed=sweep
    python -m stages.speed method=awq bits=4 speed.runtime=transformers speed.attention=eager
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from stages import ROOT, stage

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun


@stage("speed")
def speed(run: StageRun) -> None:
    from quantline.evaluation.speed.run import measure
    from quantline.evaluation.speed.table import render_speed_table
    from quantline.evaluation.speed.vllm_bench import Subject
    from quantline.pipeline.kept_servers import keeping_of
    from quantline.pipeline.server import server_of, server_options
    from quantline.serving.server import Vllm

    run.refuse_float()
    if run.config.speed.runtime == "transformers":
        by_library(run)
        return
    plan, float_model, checkpoint = run.config.speed, run.input("download") / "model", run.checkpoint()
    subjects = (
        Subject("float", float_model, server_options(run, quantized=False), keeping_of(run, "float")),
        Subject("variant", checkpoint, server_options(run, quantized=True), keeping_of(run)),
    )
    vllm = server_of(run) if plan.tools else Vllm(ROOT, "")
    run.files.append("speed.json")
    with run.output() as out:
        measured = measure(
            python=vllm.python, version=vllm.version, subjects=subjects, plan=plan, out=out, log=run.paths.log,
            bench=partial(run.worker, "vllm", "quantline.toolchains.workers.vllm_bench"),
        )  # fmt: skip
    run.metrics.update(measured.metrics)
    run.warnings.extend(measured.warnings)
    if measured.reason:
        run.status, run.reason = "unsupported", measured.reason
    if measured.document["rows"]:
        print(render_speed_table(measured.document))


def by_library(run: StageRun) -> None:
    from quantline.evaluation.speed.own_library import WORKER, library_table, measure_by_library
    from quantline.pipeline.kept_servers import end_servers

    end_servers()  # which would take part of the machine
    models = (("float", run.input("download") / "model"), ("variant", run.checkpoint()))
    run.files.append("speed.json")
    with run.output() as out:
        measured = measure_by_library(
            models, run.config.speed, run.device, run.config.threads,
            work=lambda environment, job, label: run.worker(environment, WORKER, job, label), out=out,
        )  # fmt: skip
    run.metrics.update(measured.metrics)
    if measured.reason:
        run.status, run.reason = "unsupported", measured.reason
        return
    for row in measured.document["library"]:
        for answer in row["answers"]:
            print(f"{row['model']}: {answer['question']}\n  {' '.join(answer['answer'].split())}")
    print(library_table(measured.document["library"]))


if __name__ == "__main__":
    speed()
