"""AutoAWQ 0.2.9 as a worker: activation-aware scaling and clipping by the library, packing by `checkpoints.layouts`.

The library is run through its own `quantize(quantizer_cls=...)`. The class below fixes these faults:

- `_compute_best_scale` backs up the weights with `.cpu()`, which makes no copy on a CPU. So every trial scales the weights
  again, and they are never restored. Here `state_dict()` returns clones while it runs.
- The range of a group does not include zero, but its zero point is clamped to [0, 15]. So a group whose weights have one
  sign and are far from zero is clipped. Here the range includes zero; groups with both signs do not change.
- Scales are stored in float16, but the search uses the model's dtype. Here they are rounded first, so that search,
  computation and file use the same scales.
- `zero_point=False` ends in a bare AssertionError, because the layouts have zero points. Here such groups are quantized
  symmetrically, and every zero point is the middle one, 8, which every reader accepts.
- Its packers need float16 tensors, and one of them a GPU. Here the codes are packed by Quantline, for both layouts.
- `_compute_best_clip` multiplies element by element with temporaries of (out, tokens, in), in the model's dtype, and
  asserts an output width that is a multiple of 64. It took most of the time on a CPU. `rounding.awq_clip` replaces it with
  one Gram matrix per group.

Calibration ids are passed unchanged. The library drops samples longer than `max_calib_seq_len` and re-cuts the rest. This
has no effect if all have exactly that length; the number of samples that arrive is checked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantline.checkpoints.layouts.awq import MADE
from quantline.checkpoints.linears import modules_left
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.quantizers import model, rounding, selection
from quantline.toolchains.workers.quantizers import output as _output

# Families that were tested and beat plain rounding; the library lists more.
# exllama is a choice of kernels at loading time; its weights are stored as gemm.
DEFAULTS = {"zero_point": True, "version": "gemm", "clip": True}

# Calibration samples per forward pass of a module; bounds the memory for activations.
_PARALLEL = 8
_PARALLEL_TOKENS = 4096


def check(job: dict[str, Any]) -> dict[str, Any]:
    """The job's options. First refuses what the library would reject late or accept wrongly.

    Raises:
        JobError: bits, group size or options that AutoAWQ does not support.
    """
    options = _output.method_options(job, DEFAULTS, "awq")
    options["version"] = str(options["version"]).lower()
    if job["bits"] != 4:
        raise JobError(f"bits={job['bits']}: awq takes 4; use method=gptq for 2, 3 or 8")
    if type(job["group_size"]) is not int or job["group_size"] < 8:
        raise JobError(f"group_size={job['group_size']}: awq takes 32, 64 or 128 (or another divisor of every width)")
    if options["version"] not in MADE:
        raise JobError(f"method.version={options['version']}: awq takes {', '.join(MADE)}")
    return options


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Quantize one model; see `quantline.toolchains.protocol` for job and result.

    Raises:
        JobError: the job cannot be done as given.
    """
    config = _output.float_config(job["model"])
    options = check(job)
    model.start(job)
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP

    work = model.load(job, config)
    family = AWQ_CAUSAL_LM_MODEL_MAP[config["model_type"]]
    awq = family(work.model, config["model_type"], False, work.model.config, None, None)
    layers = list(family.get_model_layers(work.model))
    names = {id(module): name for name, module in work.model.named_modules()}
    linears = selection.linears_inside((names[id(layer)], layer) for layer in layers)
    excluded = getattr(awq, "modules_to_not_convert", None) or []
    found = {name: module for name, module in linears.items() if not any(part in name for part in excluded)}
    wanted = selection.chosen(job, found)
    skipped = [name for name in found if name not in wanted]
    layout = MADE[options["version"]]
    selection.check_selection(job, wanted, layout)

    started = time.perf_counter()
    samples, length = work.calibration.shape
    awq.quantize(
        tokenizer=None,
        quant_config={"zero_point": True, "q_group_size": job["group_size"], "w_bit": 4, "version": "gemm"},
        calib_data=work.calibration.tolist(),
        apply_clip=bool(options["clip"]),
        max_calib_samples=samples,
        max_calib_seq_len=length,
        quantizer_cls=quantizer_class(work, layout, report, symmetric=not options["zero_point"]),
    )
    work.metrics["quantize_seconds"] = time.perf_counter() - started
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": job["group_size"],
        "version": options["version"],
        "zero_point": True,
        "modules_to_not_convert": [*excluded, *modules_left(skipped, wanted)] or None,
    }
    return model.finish(work, {name: module for name, module in linears.items() if name not in skipped}, quantization)


@contextmanager
def cloned_state(module: Any) -> Iterator[None]:
    """Inside the block, `module.state_dict()` returns copies."""
    original = module.state_dict
    module.state_dict = lambda: {name: tensor.clone() for name, tensor in original().items()}
    try:
        yield
    finally:
        del module.state_dict


def quantizer_class(work: model.Work, layout: str, report: Reporter, *, symmetric: bool = False) -> Any:
    """A quantizer class for `awq.quantize` that passes every layer to `model.add_layer` instead of packing it."""
    import torch
    from awq.quantize.quantizer import AwqQuantizer

    class Quantizer(AwqQuantizer):  # type: ignore[misc]
        def init_quant(self, *arguments: Any, **keywords: Any) -> Any:
            modules, kwargs, inputs = super().init_quant(*arguments, **keywords)
            if tuple(inputs.shape[:2]) != work.calibration.shape:
                raise RuntimeError(f"calibration arrived as {tuple(inputs.shape[:2])}, not {work.calibration.shape}")
            return modules, kwargs, inputs

        def pseudo_quantize_tensor(self, w: Any) -> tuple[Any, Any, Any]:
            return rounding.awq_rounded(w, self.group_size, symmetric)

        def _module_forward(self, x: Any, module: Any, module_kwargs: dict[str, Any]) -> Any:
            # The library's own version does not split per-sample arguments, such as masks.
            parts = []
            step = _PARALLEL if x.dim() > 2 else _PARALLEL_TOKENS  # experts get tokens, not samples
            with torch.no_grad():
                for first in range(0, x.shape[0], step):
                    rows = slice(first, first + step)
                    kwargs = {key: _rows_of(value, rows, x.shape[0]) for key, value in module_kwargs.items()}
                    output = module(x[rows], **kwargs)
                    parts.append(output[0] if isinstance(output, tuple) else output)
            return torch.cat(parts, dim=0)

        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any) -> Any:
            if work.device != "cpu":
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest)
            with cloned_state(module2inspect):
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest)

        def _compute_best_clip(self, w: Any, input_feat: Any) -> Any:
            return rounding.awq_clip(w, input_feat, self.group_size, symmetric)

        def wanted_linears(self, module: Any, named_linears: dict[str, Any]) -> tuple[str, dict[str, Any]]:
            """The full name of a decoder layer, and its linears that are not skipped."""
            prefix = next(name for name, candidate in self.model.named_modules() if candidate is module)
            wanted = selection.chosen_in(work.job, prefix, named_linears)
            return prefix, wanted

        def _search_best_clip(self, layer: Any, named_linears: dict[str, Any], input_feat: Any) -> Any:
            return super()._search_best_clip(layer, self.wanted_linears(layer, named_linears)[1], input_feat)

        def _apply_quant(self, module: Any, named_linears: dict[str, Any]) -> None:
            prefix, wanted = self.wanted_linears(module, named_linears)
            for name, linear in wanted.items():
                weight = linear.weight.data
                codes, scales, zeros = rounding.awq_codes(weight, self.group_size, symmetric)
                linear.weight.data = ((codes - zeros) * scales).reshape(weight.shape).to(weight.dtype)
                grid = (weight.shape[0], -1)
                arrays = model.LayerArrays(codes.view(grid), scales.view(grid), zeros.view(grid), linear.bias)
                model.add_layer(work, f"{prefix}.{name}", layout, arrays)
            done = next(number for number, candidate in enumerate(self.modules, 1) if candidate is module)
            report(done, len(self.modules), f"layer {done}")

    return Quantizer


def _rows_of(value: Any, rows: slice, samples: int) -> Any:
    """The rows of a per-sample tensor for some samples; anything else unchanged."""
    if samples > 1 and hasattr(value, "shape") and len(value.shape) > 1 and value.shape[0] == samples:
        return value[rows]
    if isinstance(value, tuple):
        return tuple(_rows_of(item, rows, samples) for item in value)
    return value


if __name__ == "__main__":
    worker_main(run)
