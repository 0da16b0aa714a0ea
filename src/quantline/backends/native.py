"""Plain rounding to nearest (method rtn), without any library: NumPy only, one tensor at a time.

The baseline that every method has to beat, and the way for models that no old toolchain reads. Quantized are the 2-D
weights inside the decoder layers, but for embeddings, norms and routers; the layout follows from the options:
sym=true gives GPTQ v1, sym=false AWQ GEMM at 4 bits and GPTQ v2 at others, which hold a zero point of 0 safely.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from quantline.backends import _output
from quantline.checkpoint import Checkpoint, to_float32
from quantline.errors import UserError
from quantline.formats import dequantize, quantize_rtn
from quantline.formats.packing import BITS
from quantline.jobs import JobError, Reporter, worker_main

DEFAULTS = {"sym": True}

_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.(.+)\.weight$")
_NOT_LINEAR = re.compile(r"norm|embed|ln_|(?:^|\.)(?:gate|router|shared_expert_gate)$")
# Their linear layers store the transpose, so that groups would run along the wrong side.
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt")


def layout_of(bits: int, symmetric: bool) -> str:
    """The layout that a result is written in."""
    if symmetric:
        return "gptq"
    return "awq_gemm" if bits == 4 else "gptq_v2"


def quantization_config(layout: str, bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """The `quantization_config` of a result."""
    if layout == "awq_gemm":
        fixed = {"quant_method": "awq", "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
        return {**fixed, "bits": bits, "group_size": group_size}
    return {
        "quant_method": "gptq",
        "checkpoint_format": layout,
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
    }


def linear_names(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """The linears that are quantized: name without `.weight` -> (in_features, out_features)."""
    found = {}
    for name in checkpoint.names:
        inside, shape = _IN_LAYER.search(name), checkpoint.info(name).shape
        if inside and len(shape) == 2 and not _NOT_LINEAR.search(inside[1]):
            found[name.removesuffix(".weight")] = (shape[1], shape[0])
    return found


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Quantize one model; see `quantline.jobs` for the border.

    Raises:
        JobError: the job cannot be done as given.
    """
    options = _output.options_of(job, DEFAULTS, "rtn")
    bits, group_size, symmetric = job["bits"], job["group_size"], bool(options["sym"])
    if bits not in BITS:
        raise JobError(f"bits={bits}: rtn takes {', '.join(map(str, BITS))}")
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        raise JobError(f"group_size={group_size}: rtn takes -1 or a divisor of every width, such as 128")
    config = _output.float_config(job["model"])
    if config.get("model_type") in _TRANSPOSED:
        raise JobError(
            f"model_type={config['model_type']!r}: its weights are stored transposed; rtn cannot quantize it"
        )
    with _output.refusals():
        checkpoint = Checkpoint.open(job["model"])
    layout = layout_of(bits, symmetric)
    linears = linear_names(checkpoint)
    _output.check_widths(linears, layout, bits, group_size)
    output = Path(job["output"])
    stacked = [name for name in checkpoint.names if re.search(r"\.experts\.\w+$", name) and _is_stack(checkpoint, name)]
    warnings = [f"left in float16: {', '.join(stacked)}"] if stacked else []

    started = time.perf_counter()
    errors: list[dict[str, Any]] = []

    def tensors() -> Iterator[_output.Named]:
        for name in checkpoint.names:
            layer, _, suffix = name.rpartition(".")
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            if layer not in linears:
                yield name, _output.half(name, checkpoint.tensor(name))
            elif suffix == "weight":
                yield from _quantize(
                    checkpoint, layer, layout, bits=bits, group_size=group_size, symmetric=symmetric, errors=errors
                ).items()
                report(len(errors), len(linears), layer)

    with _output.refusals():
        _output.write_weights(output, tensors())
        _output.write_configs(
            Path(job["model"]), output, config, quantization_config(layout, bits, group_size, symmetric)
        )
        for _ in _output.verify(output, linears):
            pass
    metrics = {
        "linears_quantized": len(errors),
        "linears_expected": len(linears) + len(stacked),
        "quantize_seconds": time.perf_counter() - started,
        "calibration_tokens": 0,
    }
    return {"metrics": metrics, "layers": errors, "warnings": warnings}


def _is_stack(checkpoint: Checkpoint, name: str) -> bool:
    return len(checkpoint.info(name).shape) == 3


def _quantize(
    checkpoint: Checkpoint,
    layer: str,
    layout: str,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    errors: list[dict[str, Any]],
) -> dict[str, Any]:
    weight = to_float32(checkpoint.tensor(f"{layer}.weight"))
    try:
        linear = quantize_rtn(weight, bits, group_size, symmetric)
    except UserError as fault:
        raise JobError(f"{layer}: {fault}") from fault
    # The error of a weight relative to the weights, as root mean squares.
    error = float(np.sqrt(np.mean((dequantize(linear) - weight) ** 2) / max(float(np.mean(weight**2)), 1e-30)))
    errors.append({"module": layer, "relative_error": error})
    bias = f"{layer}.bias"
    if bias in checkpoint.names:
        linear = replace(linear, bias=_output.half(bias, checkpoint.tensor(bias)))
    return _output.pack(layer, linear, layout)


if __name__ == "__main__":
    worker_main(run)
