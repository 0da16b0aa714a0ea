"""Which layout a variant comes to be stored in: what its backend writes, and what converting makes of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantline.checkpoints.errors import FormatError
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.linears import LM_HEAD
from quantline.checkpoints.quantization_config import LayerSettings, describe
from quantline.conversion.targets import TARGETS

if TYPE_CHECKING:
    from quantline.planning.spec import Planned

BITSANDBYTES, MSMODELSLIM = "bitsandbytes", "msmodelslim"
# exllama is a choice of kernels at loading time: such weights are stored as gemm.
_AWQ = {"gemm": "awq_gemm", "gemv": "awq_gemv", "exllama": "awq_gemm"}


def is_symmetric(method: str, options: Mapping[str, Any]) -> bool:
    """Whether the method's options fix every zero point at the middle."""
    return bool(not options.get("zero_point", True) if method == "awq" else options.get("sym", True))


def written(
    backend: str, method: str, options: Mapping[str, Any], widths: Mapping[str, LinearSpec], *, symmetric: bool
) -> str:
    """The layout of a backend's output, a key of `formats.LAYOUTS`, or bitsandbytes; empty for the float model."""
    if method == "float":
        return ""
    if method == "bnb":
        return BITSANDBYTES
    if backend == "llmcompressor":
        return "compressed_tensors_int" if options.get("activation_bits") else "compressed_tensors"
    if backend == "native":
        from quantline.checkpoints.layouts.choice import layout_of

        return layout_of(set(widths.values()), symmetric)
    return _AWQ.get(str(options.get("version")), "awq_gemm") if method == "awq" else "gptq"


def converted(layout: str, target: str, *, symmetric: bool) -> str:
    """The layout that the convert stage makes of it, as `convert.choose_layout` chooses."""
    if not layout or target == "keep":
        return layout
    if target != "auto":
        return TARGETS.get(target, target)
    if layout == "awq_gemv":
        return "awq_gemm"
    return "gptq" if layout == "gptq_v2" and symmetric else layout


def faults(layout: str, shapes: Mapping[str, tuple[int, int]], widths: Mapping[str, LinearSpec]) -> list[str]:
    """What a layout cannot hold of the linears to quantize: one fault of each kind, with the first linear that has it."""
    if layout.startswith(("compressed_tensors", BITSANDBYTES, MSMODELSLIM)):
        return []
    awq, found = layout.startswith("awq"), []
    kinds = set(widths.values())
    if awq and len(kinds) > 1:
        found.append("holds one width for all linears")
    wide = next((name for name, width in widths.items() if width.bits != 4), None)
    if awq and wide:
        found.append(f"{wide} has {widths[wide].bits} bits, AWQ holds 4")
    for name, width in widths.items():
        run = 8 if awq else {2: 16, 3: 32, 4: 8, 8: 4}[width.bits]
        uneven = [size for size in shapes[name] if size % run]
        if uneven:
            found.append(f"{name} is {uneven[0]} wide, which does not fill whole words; a multiple of {run} does")
            break
    if layout == "awq_gemv" and widths:
        from quantline.checkpoints.layouts.awq_gemv import zeros_width

        try:
            name, width = next(iter(widths.items()))
            zeros_width(shapes[name][0], width.group_size)
        except FormatError as error:
            found.append(str(error))
    return found


def loses_activations(source: str, layout: str) -> bool:
    """Whether the source also rounds activations and the result does not."""
    return source == "compressed_tensors_int" and layout != source


def described(
    layout: str, variant: Planned, widths: Mapping[str, LinearSpec], skipped: Sequence[str]
) -> dict[str, Any]:
    """The quantization_config that the checkpoint will have."""
    if layout == BITSANDBYTES:
        return {"quant_method": BITSANDBYTES, f"load_in_{variant.bits}bit": True}
    if layout.startswith(MSMODELSLIM):
        return {"quant_method": MSMODELSLIM}
    symmetric = is_symmetric(variant.method, variant.options)
    main = LinearSpec(variant.bits, variant.group_size)
    overrides = {
        name: LayerSettings(width.bits, width.group_size, symmetric) for name, width in widths.items() if width != main
    }
    kinds = set(widths.values())
    if len(kinds) == 1:  # all linears that are quantized are alike, whatever the variant's own numbers say
        main, overrides = next(iter(kinds)), {}
    return describe(
        layout, bits=main.bits, group_size=main.group_size, symmetric=symmetric,
        desc_act=bool(variant.options.get("desc_act", False)) and layout.startswith("gptq"),
        modules_to_not_convert=skipped, overrides=overrides, quantized_head=LM_HEAD in widths,
    )  # fmt: skip
