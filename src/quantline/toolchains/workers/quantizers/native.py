"""Plain rounding to nearest (method rtn) without a library: NumPy only, a tensor for each core at a time.

The baseline that every method has to beat, and the fallback for models that no old toolchain can load. The options
determine the layout: sym=true gives GPTQ v1; sym=false gives AWQ GEMM at 4 bits and GPTQ v2 at others, which store a zero
point of 0 safely.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from quantline.checkpoints.checkpoint import Checkpoint, to_float32
from quantline.checkpoints.layouts import dequantize, quantize_rtn
from quantline.checkpoints.layouts.choice import layout_of
from quantline.checkpoints.layouts.linear_spec import LM_HEAD, LinearSpec
from quantline.checkpoints.layouts.packing import BITS
from quantline.checkpoints.linears import inventory, routers
from quantline.checkpoints.model_config import ties_head
from quantline.core.cores import tensors_at_once
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.quantizers import output as _output

DEFAULTS = {"sym": True, "grid": "absmax"}
GRIDS = ("absmax", "mse")


def check(widths: dict[str, LinearSpec]) -> None:
    """Refuse bits and group sizes that rtn does not support.

    Raises:
        JobError: with the given value and the allowed ones.
    """
    for width in widths.values():
        if width.bits not in BITS:
            raise JobError(f"bits={width.bits}: rtn takes {', '.join(map(str, BITS))}")
        if type(width.group_size) is not int or width.group_size == 0 or width.group_size < -1:
            raise JobError(f"group_size={width.group_size}: rtn takes -1 or a divisor of every width, such as 128")


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Quantize one model; see `quantline.toolchains.protocol` for job and result.

    Raises:
        JobError: the job cannot be done as given.
    """
    options = _output.method_options(job, DEFAULTS, "rtn")
    symmetric, grid = bool(options["sym"]), str(options["grid"])
    if grid not in GRIDS:
        raise JobError(f"method.grid={grid}: rtn takes {' or '.join(GRIDS)}")
    config = _output.float_config(job["model"])
    with _output.refusals():
        checkpoint = Checkpoint.open(job["model"])
    stock = inventory(checkpoint, config)
    shapes = dict(stock.linears)
    if not shapes:
        _output.check_shapes({}, "gptq", 4, -1)
    requested = job.get("linears") or dict.fromkeys(shapes, job)
    widths = {name: LinearSpec(width["bits"], width["group_size"]) for name, width in requested.items()}
    check(widths)
    layout = layout_of(set(widths.values()), symmetric)
    if LM_HEAD in widths:
        rows, columns = checkpoint.info(f"{LM_HEAD}.weight").shape
        shapes[LM_HEAD] = (columns, rows)
    for width in set(widths.values()):
        sized = {name: shapes[name] for name in widths if widths[name] == width}
        _output.check_shapes(sized, layout, width.bits, width.group_size)
    # Readers take what is not named for quantized.
    left = (*shapes, *stock.stacks, *chain(*stock.others.values()), *routers(checkpoint))
    skipped = [name for name in left if name not in widths]
    output = Path(job["output"])

    started = time.perf_counter()
    errors: list[dict[str, Any]] = []

    def tensors() -> Iterator[_output.Named]:
        names = [name for name in checkpoint.names if not (name == "lm_head.weight" and ties_head(config))]
        layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        ahead = [layer for layer in layers if layer in widths]
        with ThreadPoolExecutor(tensors_at_once()) as pool:
            rounded = partial(_quantize, checkpoint, layout, symmetric=symmetric, grid=grid)
            results = _in_turn(pool, rounded, {layer: widths[layer] for layer in ahead})
            for name in names:
                layer, _, suffix = name.rpartition(".")
                if layer not in widths:
                    yield name, _output.half(name, checkpoint.tensor(name))
                elif suffix == "weight":
                    packed, error = next(results)
                    errors.append({"module": layer, "relative_error": error})
                    yield from packed.items()
                    report(len(errors), len(widths), layer)

    with _output.refusals():
        _output.write_weights(output, tensors())
        pairs = {name: (width.bits, width.group_size) for name, width in widths.items()}
        settings = _output.described(job, layout, pairs, skipped, symmetric=symmetric)
        _output.write_configs(Path(job["model"]), output, config, settings)
        for _ in _output.verify(output, widths):
            pass
    metrics = {
        "linears_quantized": len(errors),
        "linears_expected": len(widths),
        "quantize_seconds": time.perf_counter() - started,
        "calibration_tokens": 0,
    }
    return {"metrics": metrics, "layers": errors, "warnings": []}


_Rounded = tuple[dict[str, Any], float]


def _in_turn(
    pool: ThreadPoolExecutor, rounded: Callable[[str, LinearSpec], _Rounded], widths: dict[str, LinearSpec]
) -> Iterator[_Rounded]:
    """The results of `_quantize` in the order of `widths`; no more are held than are computed at a time.

    Each tensor is computed by itself, so the bytes do not depend on the number of cores.
    """
    running: deque[Future[_Rounded]] = deque()
    for layer, width in widths.items():
        running.append(pool.submit(rounded, layer, width))
        if len(running) == tensors_at_once():
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _quantize(
    checkpoint: Checkpoint, layout: str, layer: str, width: LinearSpec, *, symmetric: bool, grid: str
) -> _Rounded:
    """The packed tensors of a linear by name, and the RMS of its weights' error, relative to the RMS of the weights."""
    weight = to_float32(checkpoint.tensor(f"{layer}.weight"))
    try:
        linear = quantize_rtn(weight, width.bits, width.group_size, symmetric, grid=grid)
    except UserError as fault:
        raise JobError(f"{layer}: {fault}") from fault
    error = float(np.sqrt(np.mean((dequantize(linear) - weight) ** 2) / max(float(np.mean(weight**2)), 1e-30)))
    bias = f"{layer}.bias"
    if bias in checkpoint.names:
        linear = replace(linear, bias=_output.half(bias, checkpoint.tensor(bias)))
    return _output.pack(layer, linear, layout), error


if __name__ == "__main__":
    worker_main(run)
