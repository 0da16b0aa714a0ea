"""AWQ by GPTQModel: its processor with fixes, for `gptqmodel`.

- `_compute_best_scale` backs up the weights with `.to(float32).cpu()`, which makes no copy on a CPU in float32. So every
  trial rounds the weights again, and they are never restored. Here the backup is a copy.
- A linear that stays float is scaled with its group, because its input is scaled, but is neither clipped nor rounded. The
  library would scale its input but not the linear.
- The range of a group does not include zero, but its zero point is clamped to [0, 15]. So a group whose weights have one
  sign and are far from zero is clipped. Here the range includes zero; groups with both signs do not change.
- Scales are rounded to float16, as they are stored, before the search and the computation use them.
- `_compute_best_clip` multiplies element by element with temporaries of (out, tokens, groups), and asserts an output width
  that is a multiple of 64. `rounding.awq_clip` replaces it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantline.toolchains.workers.quantizers import rounding
from quantline.toolchains.workers.quantizers.model import LayerArrays


@contextmanager
def copied_on_detach(linears: list[Any]) -> Iterator[None]:
    """Inside the block, `weight.detach()` returns a copy."""
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
    """The library's AWQ processor `base` for one job (a `gptqmodel.Run`), with the fixes named above."""
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
                        "too few calibration tokens reached it to scale it, so it was rounded unscaled; use more "
                        "calibration samples"
                    )
                grid = (weight.shape[0], -1)
                state.done(name, row, LayerArrays(codes.view(grid), scales.view(grid), zeros.view(grid), linear.bias))

        def _quantize_layer(self, layer_index: int, layer_state: Any) -> None:
            self.unscaled = set()
            self.names_in_files = {
                short: state.work.renamed(named.full_name) for short, named in layer_state.modules.items()
            }
            layer, modules, label = layer_state.layer_module, dict(layer_state.modules), f"layer-{layer_index}"
            if layer_state.quantized:
                return
            if stored := state.store.get(label):
                self.restore(layer, modules, *stored)
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
            """Restore a decoder layer of an earlier run: its rounded and scaled weights, and its packed tensors."""
            with torch.no_grad():
                for name, tensor in layer.state_dict().items():
                    tensor.copy_(torch.from_numpy(arrays[name]))
            state.notes.update(facts["notes"])
            for short, row in facts["rows"].items():
                name = self.names_in_files[short]
                packed = {key.removeprefix("packed "): array for key, array in arrays.items()}
                state.add_packed(name, row, {key: packed[key] for key in packed if key.startswith(f"{name}.")})

    return Processor
