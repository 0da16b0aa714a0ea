"""The layout in which a variant is stored: what its backend writes, and what the convert stage makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantline.checkpoints.layouts import LAYOUTS, TARGETS, Storage, choice
from quantline.checkpoints.layouts.description import Description
from quantline.checkpoints.layouts.linear_spec import LM_HEAD, LayerSettings, LinearSpec
from quantline.checkpoints.quantization_config import section_of

if TYPE_CHECKING:
    from quantline.planning.spec import VariantSpec


def is_symmetric(method: str, options: Mapping[str, Any]) -> bool:
    """Whether the method's options fix every zero point at the middle."""
    return bool(not options.get("zero_point", True) if method == "awq" else options.get("sym", True))


def written(
    backend: str, method: str, options: Mapping[str, Any], widths: Mapping[str, LinearSpec], *, symmetric: bool
) -> str:
    """The layout of a backend's output, a key of `layouts.LAYOUTS`; empty for the float model."""
    return "" if method == "float" else choice.written_by(backend, method, options, set(widths.values()), symmetric)


def converted(
    layout: str, target: str, *, symmetric: bool, widths: Mapping[str, LinearSpec], reordered: bool = False
) -> str:
    """The layout that the convert stage makes of it, as `convert.choose_layout` chooses."""
    if not layout:
        return layout
    specs = set(widths.values())
    return choice.converted(LAYOUTS[layout], target, specs, symmetric=symmetric, reordered=reordered).name


def faults(layout: str, shapes: Mapping[str, tuple[int, int]], widths: Mapping[str, LinearSpec]) -> list[str]:
    """Reasons why a layout cannot hold the linears: one fault of each kind, with the first linear that has it."""
    known, found = LAYOUTS[layout], {}
    if len(set(widths.values())) > 1 and not known.mixed:
        found["mixed"] = "holds one width for all linears"
    for name, width in widths.items():
        for fault in known.faults(shapes[name], width, Storage()):
            found.setdefault(fault.about, f"{name} {fault.fact}")
    return list(found.values())


def conversion_faults(source: str, layout: str, widths: Mapping[str, LinearSpec]) -> list[str]:
    """Reasons why a layout cannot be converted to another one."""
    before, after = LAYOUTS[source], LAYOUTS[layout]
    found = []
    if len(set(widths.values())) > 1 and after.mixed and not after.mixed_target:
        several = [target for target, one in TARGETS.items() if one.mixed_target and one.servable]
        found.append(f"a conversion to it needs linears of one width; {' and '.join(several)} takes several")
    if before.activations and not after.activations:
        found.append(f"does not round activations, but {source} does")
    if before.affine is None:
        found.append(f"holds codes on a grid, but {source} has none")
    return found


def described(
    layout: str, variant: VariantSpec, widths: Mapping[str, LinearSpec], skipped: Sequence[str]
) -> dict[str, Any]:
    """The checkpoint's future quantization_config; only its method if another file describes the rest."""
    if LAYOUTS[layout].config is None:
        return {"quant_method": LAYOUTS[layout].method}
    symmetric = is_symmetric(variant.method, variant.options)
    main = LinearSpec(variant.bits, variant.group_size)
    overrides = {
        name: LayerSettings(width.bits, width.group_size, symmetric) for name, width in widths.items() if width != main
    }
    kinds = set(widths.values())
    if len(kinds) == 1:  # all quantized linears are alike, whatever the variant's own numbers are
        main, overrides = next(iter(kinds)), {}
    reordered = LAYOUTS[layout].desc_act and bool(variant.options.get("desc_act", False))
    return section_of(layout, Description(
        LayerSettings(main.bits, main.group_size, symmetric), reordered, tuple(skipped), overrides,
        quantized_head=LM_HEAD in widths, options=variant.options,
    ))  # fmt: skip
