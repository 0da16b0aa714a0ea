"""llama.cpp as a worker: a GGUF file in the mixtures of its `llama-quantize`, from the library in xllamacpp's wheel.

The float model is converted by llama.cpp's own converter, its tokens and logits are compared with the model's, and each
tensor is quantized by llama.cpp's own function. With `imatrix`, a column's error counts as much as the square of its inputs
on the calibration tokens, on average, as `llama-imatrix` measures it; here transformers computes the inputs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.float_view import FloatView
from quantline.checkpoints.layouts.description import Description
from quantline.checkpoints.layouts.gguf import layout
from quantline.checkpoints.layouts.gguf.blocks import BLOCK_TYPES
from quantline.checkpoints.layouts.gguf.header import read_gguf
from quantline.checkpoints.layouts.gguf.mixtures import MIXTURES
from quantline.checkpoints.layouts.gguf.names import parameters
from quantline.checkpoints.layouts.linear_spec import LayerSettings
from quantline.checkpoints.quantization_config import section_of
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.llamacpp import conversion, library
from quantline.toolchains.workers.llamacpp.writing import quantize_file
from quantline.toolchains.workers.quantizers import model, output

DEFAULTS = {"type": "Q4_K_M", "imatrix": True}
# Samples whose text the gate on tokens reads; it decodes and encodes them again.
_TEXTS = 64


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Quantize one model; see `quantline.toolchains.protocol` for the border.

    Raises:
        JobError: the job cannot be done as given, or llama.cpp reads the model differently from the reference engine.
    """
    config = output.float_config(job["model"])
    options = output.method_options(job, DEFAULTS, "gguf")
    source, out, floats = Path(job["model"]), Path(job["output"]), Path(job["work"]) / "float.gguf"
    model.start(job)
    work = model.load(
        {**job, "calibration": job["calibration"] if options["imatrix"] else None}, config, translate=False
    )
    started = time.perf_counter()
    importance = _importance(work, job["linears"], report) if options["imatrix"] else None
    work.metrics["imatrix_seconds"] = time.perf_counter() - started
    work.model = None  # its memory is needed
    started = time.perf_counter()
    floats.parent.mkdir(parents=True, exist_ok=True)
    samples = [*work.probe_ids.tolist(), *work.calibration[:_TEXTS].tolist()]
    kind, note = conversion.convert(source, floats, conversion.texts_of(source, samples))
    work.warnings += [note] if note else []
    work.metrics["convert_seconds"] = time.perf_counter() - started
    work.metrics["probe_max_difference"] = _Probe(work, floats).max_difference
    if work.metrics["probe_max_difference"] > float(job["probe_tolerance"]):
        raise JobError(
            f"llama.cpp misreads the model: in float, its logits differ from the reference engine's by "
            f"{work.metrics['probe_max_difference']:.3g} standard deviations, allowed are {job['probe_tolerance']:g}; use "
            "another method"
        )
    names = {one.stored: name.rpartition(".")[0] for name, one in parameters(read_gguf(floats)).items()}
    started = time.perf_counter()
    scales = None
    if importance is not None:
        scales = {name: importance[linear] for name, linear in names.items() if linear in importance}
    threads = int(job["threads"])
    chosen = quantize_file(floats, out / layout.FILE, options["type"], scales, threads=threads, report=report)
    work.metrics["quantize_seconds"] = time.perf_counter() - started
    types = {names[name]: one for name, one in chosen.items()}
    _check_types(job["linears"], types)
    work.warnings += _other_types(options["type"], {name: types[name] for name in job["linears"]})
    work.metrics["probe_quantized_rms"] = _Probe(work, out / layout.FILE).rms
    floats.unlink()
    main = layout.spec_of(MIXTURES[options["type"]][1])
    settings = section_of(layout.NAME, Description(LayerSettings(main.bits, main.group_size, True), options=options))
    output.write_configs(source, out, config, {**settings, "tokenizer": kind})
    return {"metrics": work.metrics, "layers": _rows(source, out, job["linears"], types), "warnings": work.warnings}


def _importance(work: model.Work, linears: Iterable[str], report: Reporter) -> dict[str, NDArray[np.float32]]:
    """The mean square of each input of each linear over the calibration tokens, float32 (columns,)."""
    import torch

    sums: dict[str, Any] = {}
    wanted = set(linears)

    def watch(name: str) -> Any:
        def add(_module: Any, arguments: Any) -> None:
            inputs = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + inputs.square().sum(dim=0)

        return add

    hooks = [
        module.register_forward_pre_hook(watch(work.renamed(name)))
        for name, module in work.model.named_modules() if work.renamed(name) in wanted
    ]  # fmt: skip
    try:
        with torch.no_grad():
            for number, sample in enumerate(model.samples(work)):
                report(number, len(work.calibration), "importance")
                work.model(**sample, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    lost = sorted(wanted - sums.keys())
    if lost:
        raise JobError(f"{lost[0]}: no calibration token reaches it, of {len(lost)} linears; set method.imatrix=false")
    return {name: (total / work.calibration.size).float().cpu().numpy() for name, total in sums.items()}


class _Probe:
    """How far llama.cpp's logits on the probe are from the reference engine's, in its logits' standard deviations."""

    def __init__(self, work: model.Work, file: Path) -> None:
        _, length = work.probe_ids.shape
        wide = work.probe_logits.shape[-1]
        with library.opened(file, window=length, threads=int(work.job["threads"]), exact=True) as llama:
            found = np.stack([llama.logits(row.tolist())[:, :wide] for row in work.probe_ids])
        difference, scale = found - work.probe_logits[..., : found.shape[-1]], float(work.probe_logits.std())
        self.max_difference = float(np.abs(difference).max()) / scale
        self.rms = float(np.sqrt(np.mean(difference**2))) / scale


def _check_types(linears: Mapping[str, Any], types: Mapping[str, str]) -> None:
    """Raises RuntimeError where a linear has another type than was planned."""
    for name, width in linears.items():
        if types.get(name, "F16").lower() != width.get("kind"):
            raise RuntimeError(f"{name}: has the type {types.get(name)}, planned was {width.get('kind')}")


def _other_types(mixture: str, types: Mapping[str, str]) -> list[str]:
    """What to say of linears whose rows are no multiple of 256."""
    usual = MIXTURES[mixture][1]
    counted = Counter(types.values())
    small = sum(count for kind, count in counted.items() if BLOCK_TYPES[kind].weights < BLOCK_TYPES[usual].weights)
    if not small:
        return []
    listed = ", ".join(f"{count} x {kind}" for kind, count in counted.most_common())
    return [f"{small} of {len(types)} linears have rows that are no multiple of 256, so {mixture} is here {listed}"]


def _rows(source: Path, out: Path, linears: Iterable[str], types: Mapping[str, str]) -> list[dict[str, Any]]:
    before, after = FloatView.open(source), FloatView.open(out)
    rows = []
    for name in linears:
        weight = before.values(f"{name}.weight")
        error = np.square(after.values(f"{name}.weight") - weight).mean() / max(np.square(weight).mean(), 1e-30)
        rows.append({"module": name, "type": types[name], "relative_error": float(np.sqrt(error))})
    return rows


if __name__ == "__main__":
    worker_main(run)
