"""AutoRound 0.16.1 as a worker: the library learns the rounding, `quantline.checkpoints.layouts` packs it as GPTQ.

The library gets the model in memory, and the calibration as tensors with a mask of ones. A data set by name would be fetched
from the network, and a tokenizer would mask its padding token, often the end-of-text token, out of the loss. The library
always leaves the last token of a sample out of the loss. Its own saving is not used, because it puts the result into a
subfolder and packs zero points of 0 unmasked. Differences from the library's defaults:

- Codes are computed from the rounded weights, scales and zero points, and packed by `checkpoints.layouts`. With sym=true
  about half of the scales are negative, so that the largest weight of a group gets the code that exists on one side only.
  The layout allows negative scales, and its readers multiply by them.
- `amp` is off unless the job's dtype is 16-bit: on a CPU the library would convert the model to bfloat16 by itself.
- 8 bits with zero points need AR_ALLOW_W8_ASYM: the library refuses them because vLLM cannot serve them as GPTQ.
- `autoround_resume.blocks_class` replaces `ResumeState`; see there for the faults of the library's own.
- `tqdm` is replaced, to report progress by block and to name the block in errors.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from quantline.checkpoints.layouts.linear_spec import LM_HEAD
from quantline.checkpoints.layouts.packing import BITS
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.quantizers import autoround_resume, model, output, resume_files, selection

# lr: null means 1 / iters.
DEFAULTS = {"sym": True, "iters": 200, "batch_size": 8, "lr": None, "gradient_accumulate_steps": 1}
LAYOUT = "gptq"


class NoTokenizer:
    """Stands in for the tokenizer that the library requires. It has no padding token, so every token counts."""

    pad_token = None
    pad_token_id = -1


class Watch(logging.Handler):
    """Reads the library's log and stands in for its `tqdm`: progress, losses, and the current block."""

    def __init__(self, report: Reporter) -> None:
        super().__init__(logging.INFO)
        self.rows: list[dict[str, Any]] = []
        self.current = "the calibration"
        self._report = report
        self._total = self._done = 0
        self._since = time.perf_counter()

    def __call__(self, iterable: Any = (), *_: Any, **__: Any) -> Watch:
        """Called by the library to get a progress bar over blocks."""
        self._total = len(iterable)
        return self

    def update(self, count: int = 1) -> None:
        """`count` more blocks are done."""
        self._done += count

    def set_description(self, text: str) -> None:
        """The next block begins."""
        self.current, self._since = text.removeprefix("Quantizing "), time.perf_counter()
        self._report(self._done, self._total, self.current)

    def emit(self, record: logging.LogRecord) -> None:
        """Handle one line of the library's log; the line about a finished block has its losses."""
        found = re.search(r"loss iter 0: (\S+) -> iter (\d+): ([^\s,]+)", record.getMessage())
        if not found:
            return
        first, best = float(found[1]), float(found[3])
        self.rows.append({
            "module": self.current, "loss": best, "loss_rounded_to_nearest": first, "best_iteration": int(found[2]),
            "seconds": time.perf_counter() - self._since,
        })  # fmt: skip
        if not math.isfinite(first):
            raise JobError(
                f"{self.current}: its output on the calibration text is NaN or infinite, so no rounding can be learned; use "
                "dtype=float32"
            )


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """The job's options. First refuses what the library would reject late or change silently.

    Raises:
        JobError: bits, group sizes, dtype or options that AutoRound does not support.
    """
    options = output.method_options(job, DEFAULTS, "autoround")
    for width in [job, *(job.get("linears") or {}).values()]:
        if width["bits"] not in BITS:
            raise JobError(f"bits={width['bits']}: autoround takes {', '.join(map(str, BITS))}")
        size = width["group_size"]
        if type(size) is not int or size == 0 or size < -1:
            raise JobError(f"group_size={size}: autoround takes -1 or a divisor of every width, such as 128")
    for name, least in (("iters", 0), ("batch_size", 1), ("gradient_accumulate_steps", 1)):
        if type(options[name]) is not int or options[name] < least:
            raise JobError(f"{name}={options[name]}: autoround takes an integer of at least {least}")
    if options["lr"] is not None and not 0 < options["lr"] < 1:
        raise JobError(f"lr={options['lr']}: autoround takes a number between 0 and 1, or null for 1 / iters")
    if job["device"] == "cpu" and job.get("dtype") == "float16":
        raise JobError("dtype=float16: autoround learns in bfloat16 or float32 on a CPU; use dtype=auto")
    return options


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Quantize one model; see `quantline.toolchains.protocol` for job and result.

    Raises:
        JobError: the job cannot be done as given.
    """
    config = output.float_config(job["model"])
    options = check(job)
    model.start(job)
    os.environ["AR_ALLOW_W8_ASYM"] = "1"
    import torch
    from auto_round.utils import get_block_names

    work = model.load(job, config, translate=False)
    if not work.calibration.size:
        raise JobError("calibration: autoround needs token ids; run the calibrate stage")
    blocks = [name for group in get_block_names(work.model) for name in group]
    found = selection.linears_inside((name, work.model.get_submodule(name)) for name in blocks)
    if LM_HEAD in (job.get("linears") or {}):
        found[LM_HEAD] = work.model.get_submodule(LM_HEAD)
    wanted = selection.chosen(job, found)
    skipped = [name for name in found if name not in wanted]
    selection.check_selection(job, wanted, LAYOUT)
    if job.get("low_memory") and work.device == "cpu":
        work.warnings.append("low_memory=true saves GPU memory only; on a CPU it has no effect")

    watch = Watch(report)
    started = time.perf_counter()
    with library(work, watch, options) as done_before:
        compressor = _compressor(work, options, wanted, skipped)
        try:
            work.model, _ = compressor.quantize()
        except JobError:
            raise
        except torch.cuda.OutOfMemoryError as error:
            raise JobError(
                f"{watch.current}: the GPU's memory is full; use low_memory=true or a smaller batch_size"
            ) from error
        except Exception as error:
            raise RuntimeError(f"{watch.current}: {type(error).__name__}: {error}") from error
    work.metrics["quantize_seconds"] = time.perf_counter() - started
    work.metrics["blocks_resumed"] = len(done_before)
    model.note_unmasked(work, sum(_catch(work, name, bool(options["sym"])) for name in wanted))
    expected = {name: layer for name, layer in found.items() if name not in skipped}
    widths = {name: work.width(name) for name in wanted}
    settings = output.described(job, LAYOUT, widths, skipped, symmetric=bool(options["sym"]))
    result = model.finish(work, expected, settings)
    resume_files.forget(job, autoround_resume.KIND)
    return {**result, "layers": watch.rows}


def _compressor(work: model.Work, options: Mapping[str, Any], wanted: Mapping[str, Any], skipped: list[str]) -> Any:
    import torch
    from auto_round import AutoRound

    samples = model.samples(work)
    layers: dict[str, dict[str, Any]] = {name: {"bits": 16, "data_type": "float"} for name in skipped}
    for name in wanted:
        bits, group_size = work.width(name)
        layers[name] = {"bits": bits, "group_size": group_size, "sym": bool(options["sym"]), "data_type": "int"}
    learned = {"lr": options["lr"]} if options["iters"] else {}
    return AutoRound(
        work.model, NoTokenizer(), scheme="W4A16", bits=int(work.job["bits"]), group_size=int(work.job["group_size"]),
        sym=bool(options["sym"]), iters=options["iters"], **learned, layer_config=layers, dataset=samples,
        nsamples=len(samples), seqlen=work.calibration.shape[1], batch_size=min(options["batch_size"], len(samples)),
        gradient_accumulate_steps=options["gradient_accumulate_steps"], seed=int(work.job["seed"]),
        device_map="cpu" if work.device == "cpu" else 0, enable_torch_compile=False, low_cpu_mem_usage=False,
        low_gpu_mem_usage=bool(work.job.get("low_memory")), amp=work.model.dtype != torch.float32,
    )  # fmt: skip


@contextmanager
def library(work: model.Work, watch: Watch, options: Mapping[str, Any]) -> Iterator[list[str]]:
    """Apply the replacements named above, undone on exit; yield the names of blocks finished by an earlier run."""
    import auto_round
    import torch
    import transformers
    from auto_round.compressors import orchestrator
    from auto_round.logger import logger
    from auto_round.utils import resume

    done: list[str] = []
    replaced: list[tuple[Any, str, Any]] = [(orchestrator, "tqdm", watch)]
    if options["iters"] and work.job.get("work"):
        identity = {"options": dict(options), "versions": [m.__version__ for m in (auto_round, torch, transformers)]}
        folder = resume_files.folder_of(work.job, autoround_resume.KIND, json.dumps(identity, sort_keys=True))
        resume_files.forget(work.job, autoround_resume.KIND, but=folder)  # left by a job with other options
        replaced.append((resume, "ResumeState", autoround_resume.blocks_class(work, folder, done)))
        os.environ["AR_RESUME_DIR"] = str(folder)
    logger.addHandler(watch)
    try:
        with model.replaced(replaced):
            yield done
    finally:
        logger.removeHandler(watch)
        os.environ.pop("AR_RESUME_DIR", None)


def _catch(work: model.Work, name: str, symmetric: bool) -> int:
    """Pack one linear that the library quantized, and set its weight in the model to exactly the packed values.

    Returns:
        the number of groups with the zero point 0; 0 if symmetric.

    Raises:
        JobError: the library left it in float.
        RuntimeError: its weights are not on the grid of its scales and zero points.
    """
    import torch

    layer = work.model.get_submodule(name)
    bits, _ = work.width(name)
    if getattr(layer, "scale", None) is None:
        raise JobError(f"{name}: the library left it in float; skip it (layers.rules), or use method=rtn")
    scales = layer.scale.detach().cpu().float().reshape(layer.out_features, -1)
    zeros = (
        torch.full_like(scales, 2 ** (bits - 1)) if symmetric else layer.zp.detach().cpu().float().reshape(scales.shape)
    )
    weight = layer.weight.detach().cpu().float().reshape(*scales.shape, -1)  # (out, groups, group size)
    steps = weight / scales[..., None]
    codes = torch.round(steps)
    off = float((steps - codes).abs().max())
    if off > (1e-3 if layer.weight.dtype == torch.float32 else 0.499):
        raise RuntimeError(f"{name}: weights are up to {off:.3g} steps off the grid of their scales")
    rounded = scales.half().float()  # as stored; the library's search at iters=0 leaves wider ones than float16
    flat = (codes + zeros[..., None]).reshape(layer.weight.shape)
    model.add_layer(work, name, LAYOUT, model.LayerArrays(flat, rounded, zeros, layer.bias))
    layer.weight.data = (codes * rounded[..., None]).reshape(layer.weight.shape).to(layer.weight.device)
    return 0 if symmetric else int((zeros == 0).sum())


if __name__ == "__main__":
    worker_main(run)
