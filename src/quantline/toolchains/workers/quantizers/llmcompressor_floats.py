"""The llm-compressor worker's methods fp8, fp4 and mxfp8: the library's observers and its own packing.

Scales of FP8 stay in the dtype that the model is computed in, float32 on a CPU. The library's pass over calibration tokens
finds what inputs need beforehand: their scale (fp8 static) or the scale of their scales (nvfp4).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.offload import remove_dispatch
from llmcompressor.modifiers.quantization import QuantizationModifier
from numpy.typing import NDArray

from quantline.checkpoints.layouts import LAYOUTS
from quantline.checkpoints.layouts.compressed_tensors.schemes import FloatScheme
from quantline.checkpoints.safetensors_file import numpy_dtype
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import output
from quantline.toolchains.workers.quantizers.llmcompressor_modifiers import Run, apply, place


def quantize(state: Run, scheme: FloatScheme) -> None:
    """Quantize every linear of the job; the model then has the rounded weights.

    Raises:
        JobError: the scale of a linear's inputs is not known, since no token reached it.
    """
    group = {
        "targets": [state.paths[name] for name in state.wanted], "weights": _typed(scheme.weights),
        "input_activations": _typed(scheme.inputs) if scheme.inputs else None,
    }  # fmt: skip
    fixed = scheme.activations.tensor if scheme.activations else ""
    modifier = QuantizationModifier(config_groups={"group_0": group}, ignore=state.ignored)
    apply(state, [modifier], tokens=bool(fixed))
    remove_dispatch(state.work.model)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    for name, module in state.wanted.items():
        state.step(name, len(state.wanted))
        started = time.perf_counter()
        own = {key: value.data for key, value in module._parameters.items() if value is not None and key != "bias"}
        if fixed and not (fixed in own and bool(torch.isfinite(own[fixed]).all()) and bool((own[fixed] > 0).all())):
            raise JobError(
                f"no calibration token reached {name}, so the scale of its inputs is not known; use more calibration "
                "samples, skip it (layers.rules), or take a scheme without fixed scales"
            )
        packed = compressor.compress(own, module.quantization_scheme)
        arrays = {key: _array(packed[key]) for key in LAYOUTS[scheme.layout].tensors if key in packed}
        weight = LAYOUTS[scheme.layout].dequantize(arrays, bits=scheme.bits, group_size=scheme.group_size)
        if module.bias is not None:
            arrays["bias"] = output.half(f"{name}.bias", _array(module.bias))
        state.work.packed[name] = {f"{name}.{key}": value for key, value in arrays.items()}
        rounded, before = torch.from_numpy(weight), module.weight.data.float().cpu()
        # RMS of the weights' error, relative to the RMS of the weights.
        error = ((rounded - before).square().mean() / before.square().mean().clamp(min=1e-30)).sqrt()
        state.rows.append({**place(name), "relative_error": float(error), "seconds": time.perf_counter() - started})
        module.weight.data = rounded.to(module.weight.dtype).to(module.weight.device)


def _typed(section: Any) -> dict[str, Any]:
    """A section of the config with torch's dtypes in place of their names."""
    found = dict(section)
    if "scale_dtype" in found:
        found["scale_dtype"] = getattr(torch, found["scale_dtype"].removeprefix("torch."))
    return found


def _array(tensor: Any) -> NDArray[Any]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.float8_e4m3fn:
        return np.ascontiguousarray(tensor.view(torch.uint8).numpy()).view(numpy_dtype("F8_E4M3"))
    return np.asarray((tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy())
