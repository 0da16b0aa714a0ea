"""Questions in a row to a variant by its own library, without a server: answers, seconds and memory as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import ConfigError
from quantline.core.files import write_json
from quantline.lifecycle.serve import Subject
from quantline.pipeline.paths import MANUAL_HOME
from quantline.pipeline.run import StageRun
from quantline.serving.rules import checkpoint_facts
from quantline.toolchains import runner

WORKER = "quantline.toolchains.workers.asking"
ATTENTION = ("sdpa", "eager", "flash_attention_2")
QUESTIONS = (
    "What is an index?", "Explain how a function is called.", "What does a transaction do?", "What is a list?",
    "How is a table sorted?",
)  # fmt: skip


@dataclass(frozen=True)
class Asking:
    """How a variant is asked.

    attention: as transformers names it; None takes `sdpa`. fuse: AutoAWQ's fused modules, whose cache holds
    `fuse_max_seq_len` tokens.
    """

    questions: Sequence[str] = QUESTIONS
    max_tokens: int = 64
    attention: str | None = None
    fuse: bool = False
    fuse_max_seq_len: int = 4096


def library_of(method: str, device: str, *, fuse: bool) -> tuple[str, str]:
    """The environment and the library that load a checkpoint.

    AutoAWQ loads AWQ on a GPU, GPTQModel loads GPTQ, and transformers everything else.
    method: as `serving.rules.CheckpointFacts` has it.
    """
    if method == "awq":
        # On a CPU AutoAWQ 0.2.9 needs IPEX; transformers computes AWQ by GPTQModel's kernels.
        return ("autoawq", "autoawq") if device == "cuda" or fuse else ("gptqmodel", "transformers")
    if method == "gptq":
        return "gptqmodel", "gptqmodel"
    return "reference", "transformers"


def faults_of(asking: Asking, method: str, device: str) -> list[str]:
    """What cannot work together, before anything is loaded."""
    faults = []
    if asking.fuse and asking.attention == "flash_attention_2":
        faults.append(
            "fuse=true attention=flash_attention_2: exclude each other, since fused modules have an attention of their own; "
            "leave one out"
        )
    elif asking.fuse and asking.attention:
        faults.append(
            f"fuse=true attention={asking.attention}: fused modules have an attention of their own; leave one out"
        )
    if asking.fuse and method != "awq":
        faults.append(f"fuse=true: AutoAWQ fuses AWQ checkpoints, and this one is {method}; leave it out")
    if asking.fuse and device != "cuda":
        faults.append(
            "fuse=true: AutoAWQ's fused modules need a GPU; leave it out, or set device=cuda on a machine with one"
        )
    if asking.attention == "flash_attention_2" and device != "cuda":
        faults.append("attention=flash_attention_2: needs a GPU; take sdpa or eager")
    if asking.attention and library_of(method, device, fuse=asking.fuse)[1] != "transformers" and not asking.fuse:
        faults.append(
            f"attention={asking.attention}: only transformers takes it, and {method} is loaded by another library"
        )
    if asking.fuse_max_seq_len < 1 or asking.max_tokens < 1:
        faults.append("max_tokens and fuse_max_seq_len: give 1 or more")
    return faults


def ask(root: Path, run: StageRun, subject: Subject, asking: Asking, out: Path | None) -> tuple[dict[str, Any], Path]:
    """Ask the questions.

    Args:
        root: the checkout.
        run: for its environments and device.
        subject: the checkpoint.
        asking: the questions, and how.
        out: the file that gets the result; None is one below scratch/.

    Returns:
        The worker's result with what was asked for, and the file that has it.

    Raises:
        ConfigError: options exclude each other, or do not fit the checkpoint or the machine; all of them at once.
        WorkerError: the library failed.
    """
    method = checkpoint_facts(subject.folder).method
    if faults := faults_of(asking, method, run.device):
        raise ConfigError(faults)
    environment, library = library_of(method, run.device, fuse=asking.fuse)
    home = root / MANUAL_HOME / ".ask"
    attention = None if asking.fuse else asking.attention or ATTENTION[0]
    job = {
        "checkpoint": str(subject.folder.absolute()), "library": library, "attention": attention, "fuse": asking.fuse,
        "fuse_max_seq_len": asking.fuse_max_seq_len, "questions": list(asking.questions), "max_tokens": asking.max_tokens,
        "device": run.device, "threads": run.config.threads,
    }  # fmt: skip
    done = runner.run_worker(
        run.toolchain(environment), WORKER, job, log=home / f"{subject.name.replace('/', '-')}.log",
        threads=run.config.threads, label=f"asking {subject.name} by {library}",
    )  # fmt: skip
    path = out or home / f"{subject.name.replace('/', '-')}.json"
    result = {
        **{key: job[key] for key in ("library", "attention", "fuse", "device")},
        **done.data,
        "versions": done.versions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"variant": subject.name, **result})
    return result, path
