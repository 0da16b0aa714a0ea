"""The three methods of the llm-compressor worker: the library's modifiers, with progress, layer names in errors, and codes.

Modules are quantized one at a time, because the size of the library's batches depends on free memory.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, get_execution_device, remove_dispatch
from compressed_tensors.quantization import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import make_empty_hessian, prepare_batch, update_batch_qparams
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from pydantic import PrivateAttr
from torch.utils.data import DataLoader

from quantline.checkpoints.quantization_config import LayerSettings, describe
from quantline.toolchains.protocol import JobError, Reporter
from quantline.toolchains.workers.quantizers import model as _common
from quantline.toolchains.workers.ranks import Team

_EXPERTS = re.compile(r"^(.*\.experts)\.\d+\.")


def apply(state: Run, modifiers: list[Any], *, targets: list[str] | None = None, tokens: bool = True) -> None:
    """Run modifiers, over the calibration's tokens if `tokens`.

    targets: modules to quantize one after another, each with the quantized ones before it; None means layer by layer.
    """
    rows = []
    if tokens:
        samples = torch.from_numpy(state.work.calibration[state.team.share].astype("int64"))
        rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in samples]
    # Without a processor the library would look for a tokenizer.
    oneshot(
        model=state.work.model, processor=object(), recipe=modifiers, sequential_targets=targets,
        dataset=DataLoader(rows, batch_size=1) if rows else None,
    )  # fmt: skip


class Gptq(GPTQModifier):  # type: ignore[misc]
    """GPTQ that raises the damping when the library would round to nearest."""

    _run: Any = PrivateAttr(default=None)

    def compress_modules(self) -> None:
        """Quantize the modules that tokens of any rank have reached."""
        if self._run.team.folder is None:
            super().compress_modules()
            return
        self._level()
        modules = list(self._num_samples)
        super().compress_modules()
        self._agree(modules)

    def _agree(self, modules: list[Any]) -> None:
        # On a CPU the library does not wait for the other ranks, and would go on with weights that are not quantized yet.
        import torch.distributed as dist

        dist.barrier()
        sums = {self._module_names[module]: float(module.weight.sum(dtype=torch.float64)) for module in modules}
        found: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, sums)
        bad = [name for name in sums if len({others[name] for others in found}) > 1]
        if bad:
            raise RuntimeError(f"{bad[0]}: the ranks have different weights after it was quantized")

    def _level(self) -> None:
        # The library deals out the modules of each rank by itself, so that all must have the same ones in the same order.
        # Experts are reached by the tokens of some ranks only.
        import torch.distributed as dist

        reached: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(reached, [self._module_names[module] for module in self._num_samples])
        modules = {name: module for module, name in self._module_names.items()}
        hessians, counts = dict(self._hessians), dict(self._num_samples)
        self._hessians.clear()
        self._num_samples.clear()
        for module in (modules[name] for name in sorted({name for names in reached for name in names})):
            device = get_execution_device(module)
            self._hessians[module] = hessians.get(module, make_empty_hessian(module, device=device))
            self._num_samples[module] = counts.get(module, torch.zeros((), device=device))

    def compress_module_list(self, module_list: list[Any]) -> None:
        """Quantize modules whose Hessians are complete."""
        state: Run = self._run
        for module in module_list:
            name = state.work.renamed(self._module_names[module])
            state.step(name, len(state.wanted))
            started = time.perf_counter()
            with disable_offloading():
                damp, loss = self._compress(name, module)
            seconds = time.perf_counter() - started
            state.rows.append({**place(name), "loss": loss, "seconds": seconds, "damp_percent": damp})
            if damp != self.dampening_frac:
                state.work.warnings.append(
                    f"{name}: its Hessian could not be inverted with method.damp_percent={self.dampening_frac:g}; "
                    f"{damp:g} was used"
                )

    def _compress(self, name: str, module: Any) -> tuple[float, float]:
        arguments, parameters = module.quantization_scheme.weights, [module.weight_observer.get_qparams()]
        weights, hessians, scales, zeros, _ = prepare_batch([module], parameters, self._hessians, self._num_samples)
        scales = scales.float()  # in bfloat16, codes would lose precision
        damp = self.dampening_frac
        while True:
            try:
                quantized, losses, fallback = quantize_weight(
                    weights=weights.clone(), hessians=hessians.clone(), scale=scales, zero_point=zeros,
                    global_scale=None, quant_args=arguments, blocksize=self.block_size, percdamp=damp,
                )  # fmt: skip
                if not fallback.any():
                    break
            except torch.linalg.LinAlgError:  # from factorizing the inverse, which the library does not catch
                pass
            damp = stronger(name, damp)
        self._run.add(name, quantized[0], scales[0], zeros[0])
        update_batch_qparams([module], quantized, scales, zeros, None, arguments)
        return damp, float(losses[0])


def stronger(name: str, damp: float) -> float:
    """The next damping to try.

    Raises:
        JobError: the damping is already at its maximum.
    """
    if damp >= 1:
        raise JobError(
            f"{name}: its Hessian cannot be inverted, even with method.damp_percent=1; its inputs or weights are not "
            "finite; skip it (layers.rules), or use method=rtn"
        )
    return min(1.0, damp * 10)


def gptq(state: Run) -> None:
    """arXiv:2210.17323.

    Raises:
        JobError: a linear's Hessian cannot be inverted.
    """
    modifier = Gptq(
        config_groups=state.schemes(), ignore=state.ignored, actorder="weight" if state.options["desc_act"] else None,
        dampening_frac=state.options["damp_percent"], batched_quantization=None,
    )  # fmt: skip
    modifier._run = state
    state.places = {name: number for number, name in enumerate(state.wanted)}
    targets = None
    if state.options["true_sequential"]:
        # Tokens are routed to experts at run time, so a layer's experts can only be quantized together.
        paths = [state.paths[name] for name in state.wanted]
        targets = list(dict.fromkeys(found[1] if (found := _EXPERTS.match(path)) else path for path in paths))
    apply(state, [modifier], targets=targets)


def refuse_unreached(state: Run) -> None:
    """Refuse a result of GPTQ that lacks linears.

    Raises:
        JobError: no token reached a linear.
    """
    lost = [name for name in state.wanted if name not in state.work.packed]
    if lost:
        raise JobError(
            f"no calibration token reached {lost[0]} and {len(lost) - 1} other linears; use more calibration samples, skip "
            "them (layers.rules), or use method=rtn"
        )


def rtn(state: Run) -> None:
    """Round to nearest, which needs no tokens."""
    apply(state, [QuantizationModifier(config_groups=state.schemes(), ignore=state.ignored)], tokens=False)
    _take(state, rows=True)


class Awq(AWQModifier):  # type: ignore[misc]
    """AWQ's search for scales, limited to the linears that are quantized."""

    _run: Any = PrivateAttr(default=None)

    def _set_resolved_mappings(self, model: Any) -> None:
        super()._set_resolved_mappings(model)
        # The library divides by zero if none of a mapping's linears is quantized.
        used = [mapping for mapping in self._resolved_mappings if any(self._widths(mapping))]  # type: ignore[has-type]
        self._resolved_mappings = used

    def _widths(self, mapping: Any) -> list[tuple[int, int]]:
        names = [self._run.work.renamed(path) for path in mapping.balance_names]
        return [self._run.work.width(name) for name in names if name in self._run.wanted]

    def _compute_best_scale(self, mapping: Any, *arguments: Any, **keywords: Any) -> Any:
        state: Run = self._run
        state.step(state.work.renamed(mapping.smooth_name), len(self._resolved_mappings))
        # The library uses the last linear's scheme for all of them.
        if len(set(self._widths(mapping))) > 1:
            raise JobError(
                f"{', '.join(mapping.balance_names)}: awq scales these together, so they need the same bits and "
                "group_size; set them in layers.rules"
            )
        started = time.perf_counter()
        scales = super()._compute_best_scale(mapping, *arguments, **keywords)
        reported = self._error_metrics[-1]
        errors = {key: float(reported[key]) for key in ("initial_error", "best_error")}
        state.rows.append({**place(state.current), **errors, "seconds": time.perf_counter() - started})
        return scales


def awq(state: Run) -> None:
    """arXiv:2306.00978, without its clipping.

    Raises:
        JobError: linears that are scaled together differ in bits or group size.
    """
    modifier = Awq()
    modifier._run = state
    apply(state, [modifier, QuantizationModifier(config_groups=state.schemes(), ignore=state.ignored)])
    _take(state)


def _take(state: Run, *, rows: bool = False) -> None:
    """Round weights with the library's scales and its own rounding; the model then has the rounded weights."""
    remove_dispatch(state.work.model)
    for name, module in state.wanted.items():
        state.current = name
        if rows:
            state.step(name, len(state.wanted))
        weight = module.weight.data.float()
        scale, zero_point = module.weight_scale.data.float(), module.weight_zero_point.data
        rounded = fake_quantize(weight, scale, zero_point, module.quantization_scheme.weights)
        state.add(name, rounded, scale, zero_point)
        if rows:
            # RMS of the weights' error, relative to the RMS of the weights.
            error = (rounded - weight).square().mean() / weight.square().mean().clamp(min=1e-30)
            state.rows.append({**place(name), "relative_error": float(error.sqrt())})
        module.weight.data = rounded.to(module.weight.dtype)


def place(name: str) -> dict[str, Any]:
    """`model.layers.3.mlp.up_proj` -> layer 3, module mlp.up_proj."""
    found = re.search(r"\.(\d+)\.(.+)$", name)
    return {"layer": int(found[1]), "module": found[2]} if found else {"layer": -1, "module": name}


METHODS: dict[str, Callable[[Run], None]] = {"gptq": gptq, "rtn": rtn, "awq": awq}


@dataclass
class Run:
    """One quantize job inside the library. Names are those in the model's files.

    symmetric: every zero point is the middle one. layout: key in `layouts.LAYOUTS`. wanted: linears to quantize, name ->
    module. floats: modules with a matrix that stays float. paths: name -> the library's name. rows: one per linear, or per
    scaled layer for awq. current: the current layer. team: the processes that quantize this model. places: the
    number of each linear in the order in which they are quantized, where that is known.
    """

    work: _common.Work
    report: Reporter
    options: Mapping[str, Any]
    symmetric: bool
    layout: str
    wanted: dict[str, Any] = field(default_factory=dict)
    floats: list[str] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    current: str = "the first layer"
    team: Team = field(default_factory=Team)
    places: dict[str, int] = field(default_factory=dict)

    @property
    def ignored(self) -> list[str]:
        """The library's names of the modules that stay float."""
        return [self.paths[name] for name in self.floats]

    def step(self, name: str, total: int) -> None:
        """Start the next of `total` steps, on `name`."""
        self.current = name
        # With several ranks, this one has a part of the linears only.
        self.report(self.places.get(name, len(self.rows)), total, name)

    def add(self, name: str, weight: Any, scale: Any, zero_point: Any) -> None:
        """Pack one linear: weight (out, in), already rounded; scale (out, groups); zero_point (out, groups), signed."""
        bits, size = self.work.width(name)
        weight, scale = weight.detach().cpu().float(), scale.detach().cpu().float()
        zeros = zero_point.detach().cpu().float() + 2 ** (bits - 1)
        width = weight.shape[1] if size == -1 else size
        codes = (weight / scale.repeat_interleave(width, dim=1)).round() + zeros.repeat_interleave(width, dim=1)
        arrays = _common.LayerArrays(codes, scale, zeros, self.wanted[name].bias)
        _common.add_layer(self.work, name, self.layout, arrays, zero_points=not self.symmetric)

    def schemes(self) -> dict[str, Any]:
        """The library's config_groups: the linears of each width by name."""
        import torch

        targets: dict[tuple[int, int], list[str]] = {}
        for name in self.wanted:
            targets.setdefault(self.work.width(name), []).append(self.paths[name])
        kind = "float" if self.options.get("activation_bits") == "fp8" else "int"
        activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            f"group_{number}": {
                "targets": paths,
                "weights": {
                    "num_bits": bits, "type": "int", "symmetric": self.symmetric, "scale_dtype": torch.float16,
                    "strategy": "channel" if size == -1 else "group", "group_size": None if size == -1 else size,
                },
                "input_activations": activations if self.options.get("activation_bits") else None,
            }
            for number, ((bits, size), paths) in enumerate(targets.items())
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """The `quantization_config` of the result."""
        widths = {name: self.work.width(name) for name in self.wanted}
        main, _ = Counter(widths.values()).most_common(1)[0]
        overrides = {name: LayerSettings(*width, self.symmetric) for name, width in widths.items() if width != main}
        return describe(
            self.layout, bits=main[0], group_size=main[1], symmetric=self.symmetric, overrides=overrides,
            modules_to_not_convert=self.floats,
        )  # fmt: skip
