"""Measure how fast a variant is served, compared with the float model in the same session, by vLLM's benchmark tools.

The models are served one after the other, or both at the same time if memory allows; then only one of them is busy at a
time. They are measured in rounds, float then variant, then the reverse, so that other load on the machine slows both. A
speed is reported with the memory of the weights. Without it, it proves nothing: the server may have loaded float weights.

The output folder holds `speed.json` (session, rows, servers, ratios, rounds, offline; `speed.table` formats it) and,
in `bench/`, the files that vLLM's tools saved.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from quantline.config.speed import SpeedConfig
from quantline.core.cores import cores_in_use
from quantline.core.files import read_json, write_json
from quantline.core.gpu import accelerator_use, visible_gpus
from quantline.evaluation.speed import trust
from quantline.evaluation.speed.ratios import medians, metrics_of, ratios
from quantline.evaluation.speed.vllm_bench import (
    Subject,
    offline_arguments,
    offline_row,
    serve_arguments,
    serve_row,
)
from quantline.serving.handover import end_all
from quantline.serving.keeping import kept_of
from quantline.serving.memory import GIB, MEMORY_SHARE, kv_cache, server_bytes, tensor_bytes
from quantline.serving.rules import checkpoint_facts, here, verdict
from quantline.serving.running import Server
from quantline.serving.server import run_vllm, serve
from quantline.serving.server_log import kernels, weights_bytes
from quantline.toolchains.protocol import JobResult

_BY_LOG, _BY_TENSORS = "as vLLM's log reports it, to 0.01 GiB", "the checkpoint's tensors, for this vLLM reports none"
OFFLINE = ("latency", "throughput")
Bench = Callable[[dict[str, Any], str], JobResult]


OTHER_SERVER = (
    "it is served by llama.cpp and the float model by vLLM, so that their speeds say nothing about the weights"
)


@dataclass(frozen=True)
class Measured:
    """The result of the stage.

    Attributes:
        document: the content of `speed.json`.
        metrics: numbers by name.
        warnings: sentences for the user.
        reason: why the target does not serve the checkpoint; empty if it does.
    """

    document: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    reason: str = ""


def measure(
    *,
    python: Path,
    version: str,
    subjects: tuple[Subject, Subject],
    plan: SpeedConfig,
    bench: Bench,
    out: Path,
    log: Path,
    as_given: bool = False,
) -> Measured:
    """Measure the float model and the variant and write `speed.json` to `out`.

    Args:
        python, version: vLLM's interpreter and version.
        subjects: the float model, then the variant.
        plan: what to measure.
        bench: runs a job of `toolchains.workers.vllm_bench` under a label.
        out: an empty folder.
        log: the servers' logs are written beside it, with the model in their names.
        as_given: serve by exactly these options; otherwise the cache grows to hold all requests of the largest level, and
            `plan.enforce_eager` decides on graphs.

    Raises:
        ServerError: a server could not be started or died, or requests failed.
    """
    if not plan.tools:
        return _written(Measured(nothing()), out)
    variant = subjects[1]
    if variant.options.runtime != subjects[0].options.runtime:
        return _written(Measured(nothing(), reason=OTHER_SERVER), out)
    target = here(variant.options.runtime, version, variant.options.device, variant.options.dtype)
    known = verdict(target, checkpoint_facts(variant.checkpoint))
    if not known.supported:
        return _written(Measured(nothing(), warnings=[known.remedy] if known.remedy else [], reason=known.reason), out)
    prepared = subjects if as_given else (_prepared(subjects[0], plan), _prepared(variant, plan))
    session = _Session(python, prepared, plan, bench, out, log)
    document: dict[str, Any] = {**nothing(), "session": _described(version, prepared, plan)}
    (out / "bench").mkdir()
    if "serve" in plan.tools:
        served = session.measure_served()
        document.update(served, session={**document["session"], **served["session"]})
    document["offline"] = [row for tool in OFFLINE if tool in plan.tools for row in session.measure_offline(tool)]
    return _written(Measured(document, metrics_of(document), trust.notes(document)), out)


def nothing() -> dict[str, Any]:
    """The document of a session in which nothing was measured."""
    return {"session": {}, "rows": [], "servers": [], "ratios": [], "rounds": [], "offline": []}


def _written(measured: Measured, out: Path) -> Measured:
    write_json(out / "speed.json", measured.document)
    return measured


@dataclass(frozen=True)
class _Up:
    """A server that is ready, and the GPU memory that loading took."""

    server: Server
    gpu_memory_bytes: int | None


def _costs(subject: Subject, up: _Up) -> dict[str, Any]:
    """Load time, memory and kernels of a running server, and the stage that started it if that was not this one."""
    text, stored = up.server.log_text(), tensor_bytes(subject.checkpoint)
    logged = weights_bytes(text)
    return {
        "model": subject.model, "load_seconds": up.server.load_seconds,
        "weights_memory_bytes": stored if logged is None else logged, "weights_memory_logged": logged is not None,
        "checkpoint_bytes": stored, "peak_memory_bytes": up.server.peak_memory_bytes(), "kernels": kernels(text),
        "gpu_memory_bytes": up.gpu_memory_bytes, "taken_over": up.server.taken_over,
    }  # fmt: skip


@dataclass(frozen=True)
class _Session:
    """The measurement of the float model and the variant."""

    python: Path
    subjects: tuple[Subject, Subject]
    plan: SpeedConfig
    bench: Bench
    out: Path
    log: Path

    def measure_served(self) -> dict[str, Any]:
        """Measure both models with `vllm bench serve`: servers, rounds, rows, ratios, and additions to `session`."""
        together = _together(self.subjects, self.plan)
        if not together:
            for subject in self.subjects:
                if subject.keeping is not None:
                    end_all(subject.keeping.owner)
        groups: Sequence[Sequence[Subject]] = [self.subjects] if together else [[each] for each in self.subjects]
        rounds: list[dict[str, Any]] = []
        servers: list[dict[str, Any]] = []
        for group in groups:
            with ExitStack() as stack:
                up = {subject.model: stack.enter_context(self._up(subject, together)) for subject in group}
                rounds += self._benched(group, {model: one.server for model, one in up.items()})
                servers += [_costs(subject, up[subject.model]) for subject in group]
        by_log = all(server["weights_memory_logged"] for server in servers)
        return {
            "session": {"side_by_side": together, "weights_memory_is": _BY_LOG if by_log else _BY_TENSORS},
            "servers": sorted(servers, key=lambda server: str(server["model"])), "rounds": rounds,
            "rows": medians(rounds), "ratios": ratios(rounds),
        }  # fmt: skip

    @contextmanager
    def _up(self, subject: Subject, together: bool) -> Iterator[_Up]:
        """Run a server during the block, or that of a stage before."""
        before = accelerator_use()
        own = self.log.with_name(f"{self.log.stem}.{subject.model}.log")
        keeping = subject.keeping if together else None
        with serve(self.python, subject.checkpoint, subject.options, log=own, keeping=keeping) as server:
            loaded = accelerator_use()
            yield _Up(server, loaded.memory_bytes - before.memory_bytes if loaded and before else None)

    def _benched(self, group: Sequence[Subject], up: dict[str, Server]) -> list[dict[str, Any]]:
        """Rounds of every level. The models take turns within a round; the first one alternates between rounds."""
        # vLLM's idle processes spin for a second after their last request (SpinCondition, vllm 0.32.0), then sleep; the next
        # model's tokenizer and warm-up take longer than that.
        turns = [
            (subject, level, number)
            for number in range(self.plan.rounds)
            for level in self.plan.levels
            for subject in (group if number % 2 == 0 else tuple(reversed(group)))
        ]
        runs = []
        for subject, level, number in turns:
            result = self.out / "bench" / f"serve-{subject.model}-c{level.concurrency}-round{number + 1}.json"
            arguments = serve_arguments(subject, up[subject.model].url, level, self.plan, result)
            label = f"{subject.model}, {level.concurrency} at a time, round {number + 1}"
            runs.append({"arguments": arguments, "result": str(result), "label": label})
        results = self.bench({"runs": runs}, "measuring").data["results"]
        return [
            {**serve_row(result, subject.model, level, self.plan), "round": number}
            for (subject, level, number), result in zip(turns, results, strict=True)
        ]

    def measure_offline(self, tool: str) -> Iterator[dict[str, Any]]:
        """The rows of `vllm bench latency` or `throughput`; each one starts an engine."""
        for level in self.plan.levels:
            for subject in self.subjects:
                result = self.out / "bench" / f"{tool}-{subject.model}-c{level.concurrency}.json"
                own = self.log.with_name(f"{self.log.stem}.{tool}.{subject.model}.log")
                arguments = offline_arguments(tool, subject, level, self.plan, result)
                run_vllm(self.python, arguments, subject.options, log=own)
                yield offline_row(tool, read_json(result), subject.model, level, self.plan)


def _prepared(subject: Subject, plan: SpeedConfig) -> Subject:
    """The subject with a cache that holds all requests of the largest level, so that none has to wait."""
    options, cache = (
        subject.options,
        kv_cache(read_json(subject.checkpoint / "config.json"), subject.options.kv_cache_dtype),
    )
    length = plan.input_tokens + plan.output_tokens + 32
    needed = 0.0
    if cache is not None:
        most = cache.bytes(length, max(level.concurrency for level in plan.levels))
        needed = 1.1 * max(most, cache.bytes(options.max_model_len or length, 1)) / GIB
    eager = options.device == "cpu" if plan.enforce_eager == "auto" else bool(plan.enforce_eager)
    kv_cache_gib = max(options.process.kv_cache_gib or 0, round(needed, 3)) or None
    process = options.process.model_copy(update={"kv_cache_gib": kv_cache_gib})
    return replace(subject, options=replace(options, process=process, enforce_eager=eager))


def _together(subjects: tuple[Subject, Subject], plan: SpeedConfig) -> bool:
    """Whether both servers run at the same time."""
    if plan.side_by_side != "auto":
        return plan.side_by_side == "always"
    device = subjects[0].options.device
    up = {kept.known["role"] for subject in subjects if subject.keeping for kept in kept_of(subject.keeping.owner)}
    needed = sum(
        server_bytes(subject.checkpoint, subject.options.process, device)
        for subject in subjects
        if subject.model not in up
    )
    gpus = visible_gpus()
    if device == "cuda":
        # Each server requires its share of the memory to be free when it starts.
        share = sum(subject.options.process.gpu_memory_utilization for subject in subjects)
        return bool(gpus) and share < 0.95 and needed < gpus[0].memory_total_bytes - gpus[0].memory_used_bytes
    return bool(needed < MEMORY_SHARE * psutil.virtual_memory().available)


def _described(version: str, subjects: tuple[Subject, Subject], plan: SpeedConfig) -> dict[str, Any]:
    options = subjects[1].options
    return {
        "host": platform.node(), "device": options.device, "device_name": _device_name(options.device),
        "threads": os.cpu_count(), "cores_in_use": round(cores_in_use(), 2), "vllm_version": version,
        "tools": list(plan.tools), "input_tokens": plan.input_tokens, "output_tokens": plan.output_tokens,
        "rounds": plan.rounds, "seed": plan.seed, "enforce_eager": options.enforce_eager,
        "levels": [[level.concurrency, level.prompts] for level in plan.levels],
        "dtypes": {subject.model: subject.options.dtype for subject in subjects},
        "kv_cache_gib": {subject.model: subject.options.process.kv_cache_gib for subject in subjects},
        "side_by_side": None, "weights_memory_is": None,
    }  # fmt: skip


def _device_name(device: str) -> str:
    gpus = visible_gpus() if device == "cuda" else []
    if gpus:
        return gpus[0].name
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{named}, {os.cpu_count()} cores"
