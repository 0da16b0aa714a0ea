"""The verdict on a variant from captured requests: it and another model are served in turn and score the served answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.model_config import dimensions, read_config
from quantline.config.method import BASELINE
from quantline.core.errors import ServerError, UserError
from quantline.core.files import read_json, write_json
from quantline.data.tokenizer import tokenizer_sha256
from quantline.evaluation.shadow_verdict import ShadowVerdict, judge
from quantline.lifecycle import serve
from quantline.lifecycle.chat import subject_of_name
from quantline.lifecycle.fleet import folder_of
from quantline.lifecycle.serve import Subject, Typed
from quantline.pipeline.config import parse
from quantline.pipeline.identity import differing, file_hashes
from quantline.pipeline.names import baseline_of, is_baseline_name
from quantline.pipeline.paths import run_folder
from quantline.pipeline.run import StageRun
from quantline.pipeline.server import server_of
from quantline.serving import server as vllm_server
from quantline.serving.command import SERVED_NAME, ServerOptions
from quantline.serving.fleet.captures import Capture, captures
from quantline.serving.fleet.gauge import ALARMS
from quantline.serving.logprobs import score
from quantline.serving.running import Server
from quantline.serving.server import Vllm

RESULT = "shadow.json"
# What a variant may lose to the one that it is to follow at the same precision: relative perplexity. AWQ and GPTQ of 4 bits
# of the demo model differ by 0.7 %.
FOLLOWING = 0.02


@dataclass(frozen=True)
class Tokens:
    """A captured request as token ids; the first `prompt` of them were asked, the rest was answered."""

    capture: Capture
    ids: tuple[int, ...]
    prompt: int


@dataclass(frozen=True)
class Question:
    """What is to be judged.

    variant: a name, MODEL@ALIAS, or a folder. against: what it is compared with, the float model or the variant that it is
    to follow. most_increase: of the perplexity; None is `promote.max_perplexity_increase` against the float model, else
    `FOLLOWING`. requests: the newest that are scored; 0 takes all.
    """

    variant: str
    against: str = BASELINE
    most_increase: float | None = None
    requests: int = 500


def shadow(root: Path, typed: Typed, question: Question) -> tuple[ShadowVerdict, Path]:
    """Score captured requests under a variant and what it is compared with, and judge the difference.

    The verdict is over what users wrote. A served answer is likelier for the model that gave it than for any other, by their
    divergence, so its difference is told beside the verdict and decides nothing.

    Args:
        root: the checkout.
        typed: the command line; `fleet.name` says whose captures.
        question: what is to be judged.

    Returns:
        The verdict, and the file that has it. A variant that is worse gets an alarm in the fleet's folder, by which its
        gauge degrades it; a sound one loses it.

    Raises:
        UserError: there are no captures, or the variant or the float model cannot be served here.
        ServerError: a server failed.
    """
    config = parse(typed.values)
    folder = folder_of(root, config.fleet.name)
    found = list(captures(folder))
    if not found:
        raise UserError(
            f"{folder}: has no captured requests; start the fleet with capture.share=0.1, and let it answer some"
        )
    found = found[-question.requests :] if question.requests else found
    own = replace(
        typed, overrides=[one for one in typed.overrides if one.partition("=")[0].split(".")[0] in serve.READS]
    )
    against, folder_of_run = question.against, run_folder(root, question.variant)
    if against == BASELINE and folder_of_run is not None and folder_of_run.is_dir():
        against = baseline_of(question.variant)  # of its own model
    subjects = [subject_of_name(root, one, own) for one in (against, question.variant)]
    _refuse_other_tokens(subjects)
    starts = [_start(root, subject, own) for subject in subjects]
    longest = min(served_tokens(subject, options) for subject, (_, options) in zip(subjects, starts, strict=True))
    scores: list[list[NDArray[np.float64]]] = []
    answered: list[list[NDArray[np.float64]]] = []
    asked: list[Tokens] = []
    for subject, (vllm, options) in zip(subjects, starts, strict=True):
        log = folder / "logs" / f"shadow-{subject.name.replace('/', '-')}.log"
        with vllm_server.serve(vllm.python, subject.folder, options, log=log) as server:
            asked = asked or tokens_of(server, found, min(longest, server.max_model_len))
            if not asked:
                raise UserError(
                    f"{folder}: none of {len(found)} captured requests has an answer and fits into {longest} tokens; "
                    "capture others, or raise serve.max_model_len"
                )
            whole = score(server, [one.ids for one in asked], label=f"scoring {len(asked)} answers by {subject.name}")
        # The first token has no log-probability. What users wrote decides: an answer is likelier for the model that gave it.
        scores.append([values[: one.prompt - 1] for values, one in zip(whole, asked, strict=True)])
        answered.append([values[one.prompt - 1 :] for values, one in zip(whole, asked, strict=True)])
    default = config.promote.max_perplexity_increase if is_baseline_name(question.against) else FOLLOWING
    most = default if question.most_increase is None else question.most_increase
    verdict = judge(scores[1], scores[0], most_increase=most, how=config.evaluate.bootstrap)
    path = folder / RESULT
    names = {"variant": subjects[1].name, "against": subjects[0].name, "files": file_hashes(subjects[1].folder)}
    largest = [{"id": asked[place].capture.id, "nats": nats} for place, nats in verdict.largest]
    answers = judge(answered[1], answered[0], most_increase=most, how=config.evaluate.bootstrap)
    document = {**names, **verdict.as_json(), "largest": largest, "answers": asdict(answers.difference)}
    write_json(path, document)
    _note_alarm(folder, subjects[1].name, verdict)
    return verdict, path


def shadow_faults(root: Path, fleet: str | None, variant: str, outputs: Mapping[str, str]) -> list[str]:
    """Why the verdict on captured requests does not speak for a variant's promotion; empty if it does, or is not asked for.

    Args:
        root: the checkout.
        fleet: name of the fleet whose verdict counts, `promote.shadow`; None asks for none.
        variant: its name, as `stages.shadow` takes it.
        outputs: hashes of the variant's files, as its conversion recorded them.
    """
    if fleet is None:
        return []
    path = folder_of(root, fleet) / RESULT
    again = f"python -m stages.shadow variant={variant} fleet.name={fleet}"
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return [f"shadow: {path} has no verdict; run: {again}"]
    if differing(outputs, found.get("files") or {}):
        return [f"shadow: the verdict of {path} is about other files, of {found.get('variant')}; run: {again}"]
    if found.get("verdict") != "sound":
        return [f"shadow: captured requests say {found.get('verdict')}, required is sound; see {path}"]
    return []


def served_tokens(subject: Subject, options: ServerOptions) -> int:
    """The tokens of prompt and answer that a subject takes as it is served."""
    return options.max_model_len or dimensions(read_config(subject.folder)).positions or sys.maxsize


def _refuse_other_tokens(subjects: Sequence[Subject]) -> None:
    hashes = [tokenizer_sha256(subject.folder) for subject in subjects]
    if hashes[0] != hashes[1]:
        raise UserError(
            f"{subjects[1].name} and {subjects[0].name} have different tokenizers, so that their scores cannot be compared; "
            "give against=NAME of a variant of the same model"
        )


def tokens_of(server: Server, found: Sequence[Capture], longest: int) -> list[Tokens]:
    """The captured requests as the model's tokens, without those that are longer than every server takes or have no answer.

    longest: tokens of prompt and answer that all of them take.

    Raises:
        ServerError: the server does not tokenize.
    """
    kept = []
    with server.client() as client:
        for capture in found:
            chat = {"messages": capture.messages, "add_generation_prompt": True}
            prompt = _tokens(client, chat if capture.messages is not None else {"prompt": capture.prompt})
            answer = _tokens(client, {"prompt": capture.answer, "add_special_tokens": False})
            if prompt and answer and len(prompt) + len(answer) < longest:
                kept.append(Tokens(capture, (*prompt, *answer), len(prompt)))
    return kept


def _tokens(client: httpx.Client, asked: dict[str, Any]) -> list[int]:
    try:
        answer = client.post("/tokenize", json={"model": SERVED_NAME, **asked}).raise_for_status().json()
        return [int(token) for token in answer["tokens"]]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise ServerError(f"the server does not tokenize a captured request: {error}") from error


def _start(root: Path, subject: Subject, typed: Typed) -> tuple[Vllm, ServerOptions]:
    """The interpreter and the options of a subject's server; refuses what this machine does not serve before one starts."""
    run = StageRun("serve", subject.config, root, tuple(typed.overrides))
    vllm = server_of(run, subject.folder)
    options, _ = serve.options_for(subject, vllm.version, run.device, 0)
    return vllm, replace(options, name=SERVED_NAME)


def _note_alarm(folder: Path, name: str, verdict: ShadowVerdict) -> None:
    name = name.replace("/", "-")  # as a fleet calls it
    path = folder / ALARMS
    alarms: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        alarms = json.loads(path.read_text(encoding="utf-8"))
    if verdict.verdict == "worse":
        alarms[name] = f"{verdict.difference.estimate:+.4f} nats a token on {verdict.requests} captured requests"
    elif verdict.verdict == "sound":
        alarms.pop(name, None)
    write_json(path, alarms)
