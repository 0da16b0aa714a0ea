"""GPTQ by GPTQModel: its classes with fixes and additions, for `gptqmodel`.

- `Quantizer`: see `rounding.gptq_quantizer`.
- `GPTQ`: weights are rounded in float32, whatever the model's dtype, so that the codes are known exactly. If the library
  raises the damping, lifts the Hessian's diagonal, or rounds to nearest because no Hessian can be used, a warning names the
  layer. A linear that an earlier run finished is taken from the store. GPTAQ and FOEM are solvers of the same kind.
"""

from __future__ import annotations

from typing import Any

from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers.model import LayerArrays

# The saved arrays of a linear: (out, in) uint8, (out, groups) float16, (out, groups) uint8, (in,) int32.
ARRAYS = ("codes", "scales", "zeros", "index")


def gptq_class(base: Any, state: Any) -> Any:
    """The library's solver `base` for one job (a `gptqmodel.Run`), which records the results."""
    import torch

    class Recorded(base):  # type: ignore[misc]
        lifted = False

        def hessian_inverse(self, H: Any) -> Any:  # noqa: N803
            before = H.diagonal().clone()
            result = super().hessian_inverse(H)
            self.lifted = not torch.equal(before, H.diagonal())
            return result

        def quantize(self, blocksize: int = 128) -> Any:
            if self.qcfg.mock_quantization:  # the library's own second attempt, inside the first
                return super().quantize(blocksize)
            name, weight = state.work.renamed(self._named_module.full_name), self.module.weight
            dtype, stored = weight.dtype, state.store.get(name)
            if stored:
                arrays, facts = stored
            else:
                try:
                    weight.data = weight.data.float()
                    arrays, facts = self.computed(blocksize)
                except JobError as error:
                    raise JobError(f"{name}: {error}") from error
                except Exception as error:
                    raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
                state.store.put(name, arrays, facts)
            codes, scales, zeros, index = (torch.from_numpy(arrays[key].astype("float32")) for key in ARRAYS)
            columns = index.long()
            if facts["note"]:
                state.notes[name] = facts["note"]
            state.done(name, facts["row"], LayerArrays(codes, scales, zeros, self.module.bias, columns))
            rounded = ((codes - zeros[:, columns]) * scales[:, columns]).to(weight.device, dtype)
            parts = [part.to(weight.device) for part in (scales, zeros, index.int())]
            row = facts["row"]
            return (
                rounded,
                *parts,
                row["seconds"],
                row.get("loss", facts["rounding"]),
                row["damp_percent"],
                row["tokens"],
            )

        def computed(self, blocksize: int) -> tuple[dict[str, Any], dict[str, Any]]:
            """Quantize now: (out, in) uint8 codes, (out, groups) float16 scales and zero points, (in,) groups; facts."""
            given = self.qcfg.damp_percent
            *tensors, seconds, loss, damp, tokens = super().quantize(blocksize)
            rounded, scales, zeros, index = (part.cpu() for part in tensors)
            columns = index.long()
            codes = torch.round(rounded / scales[:, columns]) + zeros[:, columns]
            row = {"seconds": seconds, "damp_percent": damp, "tokens": int(tokens)}
            if isinstance(loss, float):
                row["loss"] = loss
            for what, part in (("codes", codes), ("zero points", zeros)):
                if not ((part >= 0) & (part < 2**self.qcfg.bits)).all():
                    raise JobError(
                        f"{what} exceed [0, {2**self.qcfg.bits - 1}]; use method.sym=true, more bits, or method=rtn"
                    )
            parts = [part.numpy() for part in (codes.byte(), scales.half(), zeros.byte(), index.int())]
            facts = {"row": row, "note": self.note(given, damp, loss, tokens), "rounding": str(loss)}
            return dict(zip(ARRAYS, parts, strict=True)), facts

        def note(self, given: float, damp: float, loss: Any, samples: int) -> str | None:
            """How the library deviated from the job, as text."""
            if self.qcfg.mock_quantization:
                return "its GPTQ loss was NaN, so it was rounded to nearest; use more calibration samples"
            if not isinstance(loss, float):
                reason = "no Hessian could be inverted" if damp == 1.0 else f"{samples} calibration tokens reached it"
                return f"{reason}, so it was rounded to nearest instead; use more calibration samples"
            lifted = ", and the Hessian's diagonal was lifted" if self.lifted else ""
            if damp > given or lifted:
                return (
                    f"its Hessian could not be inverted with method.damp_percent={given:g}; {damp:.4g} was used{lifted}"
                )
            return None

    return Recorded
