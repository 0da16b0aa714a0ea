"""AWQ by GPTQModel: its processor with what was seen to be wrong mended, for `gptqmodel`.

- On a CPU in float32 `_compute_best_scale` keeps its backup of the weights with `.to(float32).cpu()`, which is no copy
  there: every trial rounds the weights further and they never come back. Here the backup is one.
- A linear that is to stay float is scaled with its group, since its input is scaled; it is neither clipped nor rounded.
  The library would leave it out and scale its input all the same.
- The range of a group does not include zero, while its zero point is clamped to [0, 15]: a group of one sign far from
  zero is cut off. Here it does; groups with both signs are the same as before.
- Scales are rounded to float16, as they are stored, before they are searched and computed with.
- `_compute_best_clip` multiplies element by element through temporaries of (out, tokens, groups), and asserts an output
  width that is a multiple of 64: `_rounding.awq_clip` in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantline.toolchains.workers.quantizers import rounding


@contextmanager
def copied_on_detach(linears: list[Any]) -> Iterator[None]:
    """`weight.detach()` gives a copy inside the block."""
    import torch

    weights = [linear.weight for linear in linears]
    for weight in weights:
        weight.detach = lambda weight=weight: torch.Tensor.detach(weight).clone()
    try:
        yield
    finally:
        for weight in weights:
            del weight.detach


def processor_class(base: Any, state: Any) -> Any:
    """The library's AWQ processor `base` for one job (a `gptqmodel.Run`), with the changes named above."""
    import torch

    symmetric = not state.options.get("zero_point", True)

    class Processor(base):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.apply_clip = bool(state.options["clip"])

        def pseudo_quantize_tensor(self, w: Any) -> tuple[Any, Any, Any]:
            return rounding.awq_rounded(w, self.qcfg.group_size, symmetric)

        def _pseudo_quantize_tensor_into(self, src: Any, dst: Any) -> None:
            dst.copy_(self.pseudo_quantize_tensor(src)[0])

        def _compute_best_scale(
            self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, linears2scale: Any, *rest: Any
        ) -> Any:
            with copied_on_detach(linears2scale):
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, linears2scale, *rest)

        def _search_best_clip(self, layer: Any, named_linears: dict[str, Any], input_feat: Any) -> Any:
            wanted = {
                short: linear for short, linear in named_linears.items() if self.names_in_files[short] in state.wanted
            }
            return super()._search_best_clip(layer, wanted, input_feat)

        def _compute_best_clip(self, w: Any, input_feat: Any, *_: Any, **__: Any) -> Any:
            return rounding.awq_clip(w, input_feat, self.qcfg.group_size, symmetric)

        def _should_fallback_group(self, layer_names: list[str], input_feat: Any) -> bool:
            short = bool(super()._should_fallback_group(layer_names, input_feat))
            if short:
                self.unscaled = {*getattr(self, "unscaled", ()), *layer_names}
            return short

        def apply_quant(self, named_linears: dict[str, Any], scales_list: Any) -> None:
            for short, named in named_linears.items():
                name = state.work.renamed(named.full_name)
                if name not in state.wanted:
                    continue
                linear = self.resolve_quant_source_module(named)
                weight = linear.weight.data
                codes, scales, zeros = rounding.awq_codes(weight, self.qcfg.group_size, symmetric)
                linear.weight.data = ((codes - zeros) * scales).reshape(weight.shape).to(weight.dtype)
                losses = [entry[3] for entry in scales_list if any(layer.endswith(f".{short}") for layer in entry[1])]
                row: dict[str, Any] = {"loss": float(losses[0])} if losses else {}
                if not losses and short in getattr(self, "unscaled", ()):
                    state.notes[name] = (
                        "too few calibration tokens reached it to scale it, so it was rounded as it is; use more "
                        "calibration samples"
                    )
                grid = (weight.shape[0], -1)
                state.done(
                    name, row, codes=codes.view(grid),
                    scales=scales.view(grid), zeros=zeros.view(grid), bias=linear.bias,
                )  # fmt: skip

        def _quantize_layer(self, layer_index: int, layer_state: Any) -> None:
            self.unscaled = set()
            self.names_in_files = {
                short: state.work.renamed(named.full_name) for short, named in layer_state.modules.items()
            }
            layer, modules, label = layer_state.layer_module, dict(layer_state.modules), f"layer-{layer_index}"
            if layer_state.quantized:
                return
            if kept := state.store.get(label):
                self.restore(layer, modules, *kept)
                self._finalize_quantized_layer(layer_state, fallback_task_names=set(modules))
                return
            try:
                super()._quantize_layer(layer_index, layer_state)
            except Exception as error:
                raise RuntimeError(f"decoder layer {layer_index}: {type(error).__name__}: {error}") from error
            arrays: dict[str, Any] = {}
            facts: dict[str, dict[str, Any]] = {"rows": {}, "notes": {}}
            for short, name in self.names_in_files.items():
                if name in state.rows:
                    facts["rows"][short] = state.rows[name]
                    arrays |= {f"packed {key}": array for key, array in state.work.packed[name].items()}
                if name in state.notes:
                    facts["notes"][name] = state.notes[name]
            arrays |= {name: tensor.cpu().float().numpy() for name, tensor in layer.state_dict().items()}
            state.store.put(label, arrays, facts)

        def restore(self, layer: Any, modules: dict[str, Any], arrays: dict[str, Any], facts: dict[str, Any]) -> None:
            """A decoder layer that an earlier run finished: its rounded and scaled weights, and what was packed."""
            with torch.no_grad():
                for name, tensor in layer.state_dict().items():
                    tensor.copy_(torch.from_numpy(arrays[name]))
            state.notes.update(facts["notes"])
            for short, row in facts["rows"].items():
                name = self.names_in_files[short]
                packed = {key.removeprefix("packed "): array for key, array in arrays.items()}
                state.kept(name, row, {key: packed[key] for key in packed if key.startswith(f"{name}.")})

    return Processor
