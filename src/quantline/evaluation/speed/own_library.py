"""A model asked questions in a row by its own library, without a server: how it is loaded, and what that cost.

Which library loads what was tried with the locked environments (AutoAWQ 0.2.9 with transformers 4.52.4; GPTQModel 7.6.0 and
transformers 5.19.0): on a CPU AutoAWQ wants IPEX, which is no longer made, and transformers wants optimum for GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tabulate

from quantline.config.speed import FUSED_AND_ATTENTION, QUESTIONS, SpeedConfig
from quantline.core.errors import ConfigError
from quantline.core.files import write_json
from quantline.core.text import binary_size
from quantline.evaluation.speed.run import Measured, nothing
from quantline.serving.rules import checkpoint_facts
from quantline.toolchains.protocol import JobResult

WORKER = "quantline.toolchains.workers.asking"
ATTENTION = ("sdpa", "eager", "flash_attention_2")
# Of which a library of the locked environments was seen to load a checkpoint.
LOADED = ("float", "awq", "gptq")
# (environment, job, label) -> result
Work = Callable[[str, dict[str, Any], str], JobResult]


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    attention: as transformers names it; None takes `sdpa`, or the library's own. fuse: AutoAWQ's fused modules, whose cache
    holds `fuse_max_seq_len` tokens.
    """

    questions: Sequence[str] = QUESTIONS
    max_tokens: int = 64
    attention: str | None = None
    fuse: bool = False
    fuse_max_seq_len: int = 4096

    @classmethod
    def of(cls, plan: SpeedConfig) -> Asking:
        """That of a configuration."""
        return cls(plan.questions, plan.max_tokens, plan.attention, plan.fuse, plan.fuse_max_seq_len)


def library_of(method: str, device: str, *, fuse: bool, attention: str | None = None) -> tuple[str, str]:
    """The environment and the library that load a checkpoint.

    On a GPU AutoAWQ loads AWQ, or transformers with its kernels where the attention is given; on a CPU it is transformers
    with GPTQModel's kernels. GPTQModel loads GPTQ, and transformers everything else.

    method: as `serving.rules.CheckpointFacts` has it.
    """
    if method == "awq":
        if device == "cuda" or fuse:
            return "autoawq", "transformers" if attention and not fuse else "autoawq"
        return "gptqmodel", "transformers"
    if method == "gptq":
        return "gptqmodel", "gptqmodel"
    return "reference", "transformers"


def faults_of(asking: Asking, method: str, device: str, *, section: str = "") -> list[str]:
    """What cannot work together, before anything is loaded. section: before the options' names, such as `speed.`."""
    fuse, attention = f"{section}fuse=true", f"{section}attention={asking.attention}"
    faults = []
    if asking.fuse and asking.attention:
        faults.append(FUSED_AND_ATTENTION.format(fuse=fuse, attention=attention))
    if asking.fuse and method != "awq":
        faults.append(f"{fuse}: AutoAWQ fuses AWQ checkpoints, and this one is {method}; leave it out")
    if asking.fuse and device != "cuda":
        faults.append(
            f"{fuse}: AutoAWQ's fused modules need a GPU; leave it out, or set device=cuda on a machine with one"
        )
    if asking.attention == "flash_attention_2" and device != "cuda":
        faults.append(f"{attention}: needs a GPU; take sdpa or eager")
    if asking.fuse_max_seq_len < 1 or asking.max_tokens < 1:
        faults.append(f"{section}max_tokens and {section}fuse_max_seq_len: give 1 or more")
    return faults


def job_of(checkpoint: Path, method: str, device: str, threads: int, asking: Asking) -> tuple[str, dict[str, Any]]:
    """The environment and the job of the worker that asks a checkpoint."""
    environment, library = library_of(method, device, fuse=asking.fuse, attention=asking.attention)
    # AutoAWQ decides by itself.
    attention = None if library == "autoawq" else asking.attention or ATTENTION[0]
    return environment, {
        "checkpoint": str(checkpoint.absolute()), "library": library, "attention": attention, "fuse": asking.fuse,
        "fuse_max_seq_len": asking.fuse_max_seq_len, "questions": list(asking.questions), "max_tokens": asking.max_tokens,
        "device": device, "threads": threads,
    }  # fmt: skip


def asked(environment: str, job: Mapping[str, Any], done: JobResult) -> dict[str, Any]:
    """The result of a worker with how the model was asked and the tokens a second of all answers together."""
    answers = done.data["answers"]
    seconds, tokens = sum(one["seconds"] for one in answers), sum(one["tokens"] for one in answers)
    kept = ("library", "attention", "fuse", "fuse_max_seq_len", "device", "threads", "max_tokens")
    return {
        "environment": environment, **{key: job[key] for key in kept}, **done.data,
        "tokens_per_second": tokens / seconds if seconds else 0.0, "versions": done.versions,
    }  # fmt: skip


def measure_by_library(
    models: Sequence[tuple[str, Path]], plan: SpeedConfig, device: str, threads: int, *, work: Work, out: Path
) -> Measured:
    """Ask the float model and the variant the same questions, one after the other, and write `speed.json`.

    Fused modules are the variant's alone, since the float model has none to fuse.

    Args:
        models: `float` and its folder, then `variant` and its.
        plan: the questions, and how to load.
        device: `cpu` or `cuda`.
        threads: of a CPU.
        work: runs a job of the worker in an environment.
        out: an empty folder.

    Raises:
        ConfigError: options exclude each other, or do not fit the checkpoint or the machine; all of them at once.
        WorkerError: a library failed.
    """
    asking, found = Asking.of(plan), []
    methods = {name: checkpoint_facts(folder).method for name, folder in models}
    if methods["variant"] not in LOADED:
        reason = (
            f"speed.runtime=transformers loads float, AWQ and GPTQ, and this checkpoint is {methods['variant']}; leave "
            "speed.runtime out for it"
        )
        return _written(Measured(nothing(), reason=reason), out)
    if faults := faults_of(asking, methods["variant"], device, section="speed."):
        raise ConfigError(faults)
    for name, folder in models:
        own = asking if name == "variant" else Asking(asking.questions, asking.max_tokens, asking.attention)
        environment, job = job_of(folder, methods[name], device, threads, own)
        done = work(environment, job, f"asking {name} by {job['library']}")
        found.append({"model": name, **asked(environment, job, done)})
    rows = {row["model"]: row for row in found}
    speeds = {name: row["tokens_per_second"] for name, row in rows.items()}
    metrics = {
        "library_tokens_per_second": speeds["variant"], "library_float_tokens_per_second": speeds["float"],
        "library_memory_before_bytes": float(rows["variant"]["memory_before"]),
        "library_memory_after_bytes": float(rows["variant"]["memory_after"]),
    }  # fmt: skip
    if speeds["float"]:
        metrics["library_speed_up"] = speeds["variant"] / speeds["float"]
    return _written(Measured({**nothing(), "library": found}, metrics), out)


def _written(measured: Measured, out: Path) -> Measured:
    write_json(out / "speed.json", measured.document)
    return measured


def library_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was measured, as text. rows: `library` of `speed.json`."""
    kind = "GPU memory" if rows[0]["device"] == "cuda" else "memory"
    heads = ("model", "library", "linears", "attention", "loaded in", f"{kind} before", "after", "tokens/s")
    cells = [
        (
            row["model"], row["library"], row["linear"], "fused" if row["fuse"] else row["attention"] or "its own",
            f"{row['load_seconds']:.1f} s", binary_size(row["memory_before"]), binary_size(row["memory_after"]),
            f"{row['tokens_per_second']:.4g}",
        )
        for row in rows
    ]  # fmt: skip
    table = tabulate.tabulate(cells, heads, disable_numparse=True)
    return f"{table}\n\n{len(rows[0]['answers'])} questions in a row, one at a time, on {rows[0]['device']}"
