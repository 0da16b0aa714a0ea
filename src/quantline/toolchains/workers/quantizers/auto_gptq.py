"""AutoGPTQ 0.7.1 as a worker: second-order rounding by the library, packing by `quantline.checkpoints.layouts`.

The model is loaded without the library's `from_pretrained`, which needs a GPU and leaves `torch.nn.init` disabled. During
`quantize`, the context `library` replaces the parts with faults, on every device unless stated:

- `pack_model`: the library packs `z - 1` without masking. With sym=False, the zero point 0 of a group without negative
  weights becomes 0xFFFFFFFF and overwrites the neighbouring rows. It also gives every layer an all-zero bias. Here codes,
  scales, zero points and group index are taken before that and packed by `quantline.checkpoints.layouts`, which masks.
- `Quantizer`: see `rounding.gptq_quantizer`.
- `GPTQ`: the library returns all zeros for a layer that no calibration token reached (an expert). Here that is an error.
  If a Hessian cannot be inverted, it is tried again with ten times the damping, up to `_MOST_DAMPING`, and reported.
- On a CPU only: `CUDA_0`, the device that layers are moved to, and `torch.cuda.synchronize`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantline.checkpoints.linears import modules_left
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.quantizers import model as _common
from quantline.toolchains.workers.quantizers import output, rounding, selection

# Families that were tested and beat plain rounding; the library lists more.
DEFAULTS = {"damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True, "static_groups": False}
BITS = (2, 3, 4, 8)
LAYOUT = "gptq"
# Share of the Hessian's mean diagonal beyond which the result is hardly better than rounding to nearest.
_MOST_DAMPING = 0.5


class Losses(logging.Handler):
    """Reads losses from the library's log, reports progress, and tracks the current layer."""

    def __init__(self, total: int, report: Reporter) -> None:
        super().__init__(logging.INFO)
        self.rows: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.current = "the first layer"
        self._total = total
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Handle one line of the library's log."""
        text = record.getMessage()
        if found := re.match(r"Quantizing (\S+) in layer (\d+)/(\d+)", text):
            self.current = f"layer {int(found[2]) - 1} {found[1]}"
            self._report(len(self.rows), self._total, f"layer {found[2]}/{found[3]} {found[1]}")
            self.rows.append({"layer": int(found[2]) - 1, "module": found[1]})
        elif found := re.match(r"(duration|avg loss): (\S+)", text):
            self.rows[-1]["seconds" if found[1] == "duration" else "loss"] = float(found[2])


def check(job: dict[str, Any]) -> dict[str, Any]:
    """The job's options. First refuses what the library would reject late or accept wrongly.

    Raises:
        JobError: bits, group size or options that AutoGPTQ does not support.
    """
    options = output.method_options(job, DEFAULTS, "gptq")
    if job["bits"] not in BITS:
        raise JobError(f"bits={job['bits']}: gptq takes {', '.join(map(str, BITS))}")
    size = job["group_size"]
    if type(size) is not int or size == 0 or size < -1:
        raise JobError(f"group_size={size}: gptq takes -1 or a divisor of every width, such as 128")
    if not 0 < options["damp_percent"] < 1:
        raise JobError(
            f"method.damp_percent={options['damp_percent']}: gptq takes a number between 0 and 1, such as 0.01"
        )
    return options


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Quantize one model; see `quantline.toolchains.protocol` for job and result.

    Raises:
        JobError: the job cannot be done as given.
    """
    config = output.float_config(job["model"])
    options = check(job)
    _common.start(job)
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP

    work = _common.load(job, config)
    family = GPTQ_CAUSAL_LM_MODEL_MAP[config["model_type"]]
    layers = work.model.get_submodule(family.layers_block_name)
    linears = selection.linears_inside((f"{family.layers_block_name}.{i}", layer) for i, layer in enumerate(layers))
    known = {name for names in family.inside_layer_modules for name in names}
    found = {name: module for name, module in linears.items() if _inside(name, family.layers_block_name) in known}
    wanted = selection.chosen(job, found)
    skipped = [name for name in found if name not in wanted]
    selection.check_selection(job, wanted, LAYOUT)

    settings = {"bits": job["bits"], "group_size": job["group_size"], **options}
    gptq = family(work.model, False, BaseQuantizeConfig(**settings))
    # Nothing is padded, as all samples have one length and batches one sample, but the library needs a padding id.
    work.model.config.pad_token_id = 1
    losses = Losses(len(wanted), report)
    started = time.perf_counter()
    with library(work, losses, {id(found[name]) for name in skipped}):
        gptq.quantize(_common.samples(work), batch_size=1, use_triton=False)
    work.metrics["quantize_seconds"] = time.perf_counter() - started
    work.warnings.extend(losses.warnings)
    left = output.left_float(modules_left(skipped, wanted))
    quantization = {"quant_method": "gptq", "checkpoint_format": "gptq", **settings, **left}
    result = _common.finish(
        work, {name: module for name, module in linears.items() if name not in skipped}, quantization
    )
    return {**result, "layers": losses.rows}


def _inside(name: str, block: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `mlp.up_proj`."""
    return name[len(block) + 1 :].split(".", 1)[1]


@contextmanager
def library(work: _common.Work, losses: Losses, skipped: set[int] = frozenset()) -> Iterator[None]:  # type: ignore[assignment]
    """Apply the replacements named above, and hide modules whose id() is in `skipped`; undone on exit."""
    import torch
    from auto_gptq.modeling import _base
    from auto_gptq.quantization import gptq

    loggers = [logging.getLogger(name) for name in ("auto_gptq.modeling._base", "auto_gptq.quantization.gptq")]
    levels = [logger.level for logger in loggers]
    find_layers = _base.find_layers

    def visible_layers(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        layers = find_layers(*arguments, **keywords)
        return {name: module for name, module in layers.items() if id(module) not in skipped}

    replaced = [
        (_base, "find_layers", visible_layers),
        (_base, "pack_model", lambda **arguments: _catch(work, arguments["model"], arguments["quantizers"])),
        (_base, "GPTQ", _gptq_class(gptq.GPTQ, losses)),
        (gptq, "Quantizer", rounding.gptq_quantizer(gptq.Quantizer, lambda quantizer: quantizer.sym)),
    ]
    if work.device == "cpu":
        replaced += [(_base, "CUDA_0", torch.device("cpu")), (torch.cuda, "synchronize", lambda *_: None)]
    try:
        for logger in loggers:
            logger.setLevel(logging.INFO)
            logger.addHandler(losses)
        with _common.replaced(replaced):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeHandler(losses)


def _gptq_class(base: Any, losses: Losses) -> Any:
    import torch

    class Recorded(base):  # type: ignore[misc]
        H: Any

        def fasterquant(self, *arguments: Any, **keywords: Any) -> Any:
            if not self.nsamples:
                raise JobError(
                    f"{losses.current}: no calibration token reached it, so gptq would set it to zero; "
                    "use more calibration samples, or method=rtn"
                )
            damping, hessian = float(keywords["percdamp"]), self.H.clone()
            while True:
                try:
                    return super().fasterquant(*arguments, **{**keywords, "percdamp": damping})
                except torch.linalg.LinAlgError as error:
                    if damping >= _MOST_DAMPING:
                        raise JobError(
                            f"{losses.current}: its Hessian cannot be inverted, even with method.damp_percent={damping:g}; "
                            "use more calibration samples, or method=rtn"
                        ) from error
                    before, damping = damping, min(_MOST_DAMPING, damping * 10)
                    losses.warnings.append(
                        f"{losses.current}: its Hessian could not be inverted with method.damp_percent={before:g}; "
                        f"tried again with {damping:g}"
                    )
                    self.H = hessian.clone()

    return Recorded


def _catch(work: _common.Work, model: Any, quantizers: dict[str, Any]) -> None:
    """Replaces the library's packing: computes codes from the rounded weights in the model."""
    import torch

    unmasked = 0
    for name, (_, *parts) in quantizers.items():
        linear = model.get_submodule(name)
        weight = linear.weight.data.cpu().float()  # (out, in)
        scales, zeros, columns = (part.cpu().float() for part in parts)  # (out, groups), (out, groups), (in,)
        of_column = columns.long()
        codes = torch.round(weight / scales[:, of_column]) + zeros[:, of_column]
        _common.add_layer(work, name, LAYOUT, _common.LayerArrays(codes, scales, zeros, linear.bias, of_column))
        unmasked += int((zeros == 0).sum())
    _common.note_unmasked(work, unmasked)


if __name__ == "__main__":
    worker_main(run)
