"""bitsandbytes 0.50.2 as a worker: quantizes with its functions, writes its serialized form, needs no calibration.

4 bits: `quantize_4bit`, NF4 or FP4, in blocks of `group_size` over the weight in C order. With double_quant the blocks'
scales are quantized too. 8 bits: `int8_vectorwise_quant`, one scale per row, as `Linear8bitLt` does: from float16 weights
and without groups. Both have CPU kernels. transformers loads the result by its config.json.

The state of a 4-bit layer names the dtype float16, which all float tensors here have; readers round weights to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from quantline.checkpoints.layouts import bitsandbytes as layout
from quantline.checkpoints.layouts.description import Description
from quantline.checkpoints.layouts.linear_spec import LM_HEAD, LayerSettings
from quantline.checkpoints.quantization_config import section_of
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.quantizers import model, output, selection

DEFAULTS = {"quant_type": "nf4", "double_quant": True}
BITS = (4, 8)


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """The job's options. First refuses what the library would reject late or accept wrongly.

    Raises:
        JobError: bits, block sizes or options that bitsandbytes does not support, or not for single layers.
    """
    options = output.method_options(job, DEFAULTS, "bnb")
    if job["bits"] not in BITS:
        raise JobError(f"bits={job['bits']}: bnb takes {' or '.join(map(str, BITS))}")
    if options["quant_type"] not in layout.TABLES:
        raise JobError(f"method.quant_type={options['quant_type']}: bnb takes {' or '.join(layout.TABLES)}")
    if job["bits"] == 4 and job["group_size"] not in layout.BLOCK_SIZES:
        sizes = ", ".join(map(str, layout.BLOCK_SIZES))
        raise JobError(f"group_size={job['group_size']}: bnb takes blocks of {sizes}")
    for name, width in (job.get("linears") or {}).items():
        if width["bits"] != job["bits"] or (job["bits"] == 4 and width["group_size"] != job["group_size"]):
            raise JobError(
                f"{name}: bnb uses the same bits and block size for all layers and can only skip some (layers.rules)"
            )
    return options


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Quantize one model; see `quantline.toolchains.protocol` for job and result.

    Raises:
        JobError: the job cannot be done as given.
    """
    config = output.float_config(job["model"])
    options = check(job)
    # For blocks of 2048 or more, the library would compile its dequantize function.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    model.start(job)
    work = model.load({**job, "calibration": None}, config, translate=False)
    from torch import nn

    linears = {name: module for name, module in work.model.named_modules() if isinstance(module, nn.Linear)}
    inside = {name: module for name, module in linears.items() if name != LM_HEAD}
    wanted = selection.chosen(job, linears if LM_HEAD in (job.get("linears") or {}) else inside)
    if not wanted:
        raise JobError("the model has no linear layer, so nothing would be quantized; check the model")
    skipped = [name for name in linears if name not in wanted]

    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for name, module in wanted.items():
        report(len(rows), len(wanted), name)
        rows.append({"module": name, "relative_error": _quantize(work, name, module, options)})
    work.metrics["quantize_seconds"] = time.perf_counter() - started
    main = LayerSettings(job["bits"], job["group_size"], symmetric=True)
    settings = section_of(layout.NAME, Description(main, left_float=tuple(skipped), options=options))
    return {**model.finish(work, wanted, settings), "layers": rows}


def _quantize(work: model.Work, name: str, module: Any, options: Mapping[str, Any]) -> float:
    """Quantize one linear, set its weight in the model to the library's dequantized one, and return its relative error.

    Raises:
        JobError: a weight is outside float16's range.
    """
    import torch
    from bitsandbytes import functional

    bits, block_size = work.width(name)
    weight = module.weight.data
    output.half(f"{name}.weight", weight.float().cpu().numpy())
    placed = weight.to(work.device).contiguous()
    if bits == 4:
        codes, state = functional.quantize_4bit(
            placed, blocksize=block_size, compress_statistics=bool(options["double_quant"]),
            quant_type=options["quant_type"],
        )  # fmt: skip
        state.dtype = torch.float16
        stored = {"weight": codes, **{f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}}
        read = functional.dequantize_4bit(codes, state)
    else:
        codes, scales, _ = functional.int8_vectorwise_quant(placed.half())
        codes[scales == 0] = 0  # the library divided such a row by zero
        stored = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        read = functional.int8_vectorwise_dequant(codes, scales)
    if module.bias is not None:
        stored["bias"] = torch.from_numpy(output.half(f"{name}.bias", module.bias.data.float().cpu().numpy()))
    work.packed[name] = {f"{name}.{suffix}": part.cpu().numpy() for suffix, part in stored.items()}
    read = read.float().cpu()
    before = weight.float().cpu()
    module.weight.data = read
    return float(((read - before).square().mean() / before.square().mean().clamp(min=1e-30)).sqrt())


if __name__ == "__main__":
    worker_main(run)
