"""The serve_smoke stage's work: serve a checkpoint, send fixed prompts, check the answers, score the evaluation text.

The output folder holds `answers.json`, `verdict.json` and, where the target serves the variant, `scores.safetensors` (the
server's log-probability of every token, float32, aligned with the evaluation's windows) with the windows' hash in
`scores.json`; and `generations.json`, if continuations are asked for, see `continuations`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.model_files import has_chat_template
from quantline.checkpoints.safetensors_file import SafetensorsFile
from quantline.config.serve import SmokeConfig
from quantline.core.cores import cores
from quantline.core.errors import ServerError, UserError
from quantline.core.files import write_json
from quantline.data.windows import Windows
from quantline.serving import continuations, llamacpp
from quantline.serving.answer_checks import judge_answers
from quantline.serving.command import ServerOptions, flags_of
from quantline.serving.logprobs import score
from quantline.serving.rules import checkpoint_facts, here, verdict
from quantline.serving.server import Vllm, serve
from quantline.serving.smoke import Answer, run_smoke
from quantline.toolchains.protocol import JobResult

RunWorker = Callable[[str, str, dict[str, Any], str], JobResult]


@dataclass(frozen=True)
class Asked:
    """What the server is asked, besides to score a text.

    questions: fixed prompts; chat prompts go only to models with a chat template. prompts: lists of token ids to be
    continued greedily, by new_tokens; llama.cpp's server continues none, since it gives no second likeliest token.
    """

    questions: SmokeConfig
    prompts: Sequence[Sequence[int]] = ()
    new_tokens: int = 0


@dataclass(frozen=True)
class Served:
    """Metrics and warnings. `reason` says why the target does not serve the checkpoint; empty if it does. flags: with which
    `vllm serve` served it.
    """

    reason: str
    metrics: dict[str, float]
    warnings: list[str]
    flags: tuple[str, ...] = ()


def serve_and_score(
    vllm: Vllm,
    checkpoint: Path,
    options: ServerOptions,
    *,
    asked: Asked,
    windows: Windows,
    baseline: Path | None,
    out: Path,
    log: Path,
) -> Served:
    """Serve `checkpoint` and write its answers and its scores to `out`.

    Args:
        vllm: what serves it.
        checkpoint: its folder.
        options: options of the server and of the requests to it.
        asked: questions, and prompts to be continued.
        windows: the evaluation text, to be scored.
        baseline: the float model's output of this stage, to compare answers with; None for the float model itself.
        out: an empty folder.
        log: the server's log file.

    Raises:
        ServerError: the server could not be started, died, or gave answers that cannot be accepted.
        UserError: a window does not fit the server's max_model_len.
    """
    facts = checkpoint_facts(checkpoint)
    known = verdict(here(options.runtime, vllm.version, options.device, options.dtype, options.kv_cache_dtype), facts)
    document: dict[str, Any] = {"supported": known.supported, "reason": known.reason, "rule": known.rule_id}
    if not known.supported:
        write_json(out / "verdict.json", document)
        write_json(out / "answers.json", [])
        return Served(known.reason, {}, [known.remedy] if known.remedy else [])
    longest = int(np.diff(windows.offsets).max())
    if options.max_model_len is not None and longest >= options.max_model_len:
        raise UserError(
            f"evaluate.window={longest}: the server takes prompts shorter than serve.max_model_len="
            f"{options.max_model_len}; raise that or shorten the window"
        )
    chat_prompts = asked.questions.chat_prompts if has_chat_template(checkpoint) else []
    timeout = options.process.request_timeout_seconds
    with serve(vllm.python, checkpoint, options, log=log, keeping=vllm.keeping) as server:
        report = run_smoke(
            server,
            asked.questions.prompts,
            chat_prompts,
            max_tokens=asked.questions.max_tokens,
            timeout_seconds=timeout,
        )
        # The float model's own answers are the reference, so they are not checked.
        faults = list(report.faults) + (judge_answers(report.answers, read_answers(baseline)) if baseline else [])
        if faults:
            raise ServerError("\n  ".join([
                "the served model's answers cannot be accepted:", *faults,
                "the server reads the weights wrong, or they are damaged: look at the errors of the linears "
                "(quantize/coverage/layers.csv) and give the worst more bits; or ask other questions (serve.smoke.prompts)",
                f"log: {log}",
            ]))  # fmt: skip
        if options.runtime != llamacpp.NAME:
            pieces = [windows.input_ids[a:b] for a, b in zip(windows.offsets[:-1], windows.offsets[1:], strict=True)]
            logprobs = score(server, pieces, concurrency=options.process.concurrency, timeout_seconds=timeout)
            # The first token of a window has no context, so the server gives no probability for it.
            flat = np.concatenate([piece for window in logprobs for piece in ([np.nan], window)]).astype(np.float32)
            # Where they do not fit, the reference engine continues them.
            longest = max(map(len, asked.prompts), default=0) + asked.new_tokens
            if asked.prompts and longest <= server.max_model_len:
                found = continuations.continue_greedily(
                    server, asked.prompts, asked.new_tokens, concurrency=options.process.concurrency,
                    timeout_seconds=timeout,
                )  # fmt: skip
                write_json(out / continuations.FILE, {**found, "engine": options.runtime})
    if options.runtime == llamacpp.NAME:
        assert vllm.run_worker is not None, "its server gives no log-probabilities of a prompt"
        flat = _scored_by_worker(checkpoint, windows, vllm.run_worker)
        document["prompt_scores"] = llamacpp.NO_PROMPT_SCORES
    write_safetensors(out / "scores.safetensors", {"logprobs": flat})
    write_json(out / "scores.json", {"windows_sha256": windows.sha256})
    proven = {"kernels": list(report.kernels), "runtime": report.runtime_version, "flags": flags_of(options)}
    write_json(out / "verdict.json", {**document, **proven})
    write_json(out / "answers.json", [asdict(answer) for answer in report.answers])
    return Served("", report.metrics, [], tuple(flags_of(options)))


def _scored_by_worker(checkpoint: Path, windows: Windows, run_worker: RunWorker) -> NDArray[np.float32]:
    """Log-probabilities of every token by the library that serves; NaN at the first of a window."""
    with TemporaryDirectory(prefix="quantline-windows-") as scratch:
        given, scores = Path(scratch, "windows.safetensors"), Path(scratch, "scores.safetensors")
        write_safetensors(given, {"input_ids": windows.input_ids, "offsets": windows.offsets})
        job = {
            "file": str(llamacpp.file_of(checkpoint)), "windows": str(given), "output": str(scores),
            "threads": max(1, cores() - 1),
        }  # fmt: skip
        run_worker(llamacpp.NAME, llamacpp.SCORING, job, "scoring with llama.cpp")
        found: NDArray[np.float32] = SafetensorsFile.open(scores).read("logprobs")
        return found


def read_answers(folder: Path) -> list[Answer]:
    """The answers of an output folder of this stage."""
    import json

    rows: list[Mapping[str, Any]] = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return [Answer(**row) for row in rows]
