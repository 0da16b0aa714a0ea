"""The list of weight layouts, and lookups in it. A new layout is a module of its own and a line here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from quantline.checkpoints.layouts import awq_gemm, awq_gemv, bitsandbytes, exl3, gptq, gptq_v2, modelopt
from quantline.checkpoints.layouts.compressed_tensors import floats, int_quantized, pack_quantized
from quantline.checkpoints.layouts.gguf import layout as gguf
from quantline.checkpoints.layouts.layout import ConfigSection, Layout
from quantline.checkpoints.layouts.msmodelslim import layout as msmodelslim

LAYOUTS: Mapping[str, Layout] = {
    "awq_gemm": awq_gemm.LAYOUT,
    "awq_gemv": awq_gemv.LAYOUT,
    "gptq": gptq.LAYOUT,
    "gptq_v2": gptq_v2.LAYOUT,
    "compressed_tensors": pack_quantized.LAYOUT,
    "compressed_tensors_int": int_quantized.LAYOUT,
    "compressed_tensors_w4afp8": pack_quantized.W4AFP8,
    **floats.LAYOUTS,
    "modelopt_fp8": modelopt.FP8,
    "modelopt_nvfp4": modelopt.NVFP4,
    "bitsandbytes": bitsandbytes.LAYOUT,
    "exl3": exl3.LAYOUT,
    "gguf": gguf.LAYOUT,
    "msmodelslim": msmodelslim.SAFE_TENSOR,
    "msmodelslim_ascend_v1": msmodelslim.ASCEND_V1,
    "msmodelslim_v1": msmodelslim.V1,
}

# convert.target -> layout
TARGETS: Mapping[str, Layout] = {
    layout.target: layout for layout in LAYOUTS.values() if layout.target is not None
}  # fmt: skip

# quant_method in config.json -> its section
CONFIG_SECTIONS: Mapping[str, ConfigSection] = {
    layout.method: layout.config for layout in LAYOUTS.values() if layout.config is not None
}


def packed_linear(names: Iterable[str]) -> str | None:
    """The first linear whose tensor names show that it is packed, in any layout."""
    marks = {mark for layout in LAYOUTS.values() for mark in layout.telling}
    found = [(name, mark) for name in sorted(names) for mark in marks if name.endswith(f".{mark}")]
    return min((name.removesuffix(f".{mark}") for name, mark in found), default=None)


def folder_layout(folder: Path, method: str) -> Layout | None:
    """The layout that recognises this folder or has this method; None for layouts that config.json describes."""
    known = (layout for layout in LAYOUTS.values() if layout.folder is not None)
    return next(
        (one for one in known if one.method == method or (one.folder is not None and one.folder.recognises(folder))),
        None,
    )
