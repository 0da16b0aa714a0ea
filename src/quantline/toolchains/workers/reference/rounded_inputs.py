"""Inputs of linears rounded as a checkpoint's runtime rounds them, in float32 with torch.

Scales follow compressed-tensors 0.19 (`compute_dynamic_scales_and_zp`), which the tests compare with: a scale maps the
largest magnitude that it is for to the largest value of the kind. An all-zero share stays zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quantline.checkpoints.checkpoint import plain
from quantline.checkpoints.float_view import FloatView
from quantline.checkpoints.layouts.description import Activations
from quantline.checkpoints.layouts.float_codes import LARGEST_E2M1, LARGEST_E4M3, single
from quantline.core.errors import UserError
from quantline.toolchains.protocol import JobError

if TYPE_CHECKING:
    from torch import Tensor

Rounding = Callable[["Tensor"], "Tensor"]

_LARGEST = {"int8": 127.0, "e4m3": LARGEST_E4M3, "e2m1": LARGEST_E2M1}
# Exponents of the largest values, by which a power of two is chosen (OCP MX).
_EXPONENT = {"e4m3": 8, "e2m1": 2}
# Halfway between E2M1's magnitudes, and the magnitudes; a value halfway goes to the one with an even code.
_HALFWAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def round_inputs(model: Any, view: FloatView) -> None:
    """Let a model round the inputs of a checkpoint's quantized linears as its runtime does, if that does.

    Args:
        model: of transformers; its linears have their names in the checkpoint.

    Raises:
        JobError: a linear is no module of its own, has no usable fixed scale, or an input width that groups do not fill.
    """
    how = view.info.activations if view.info is not None else None
    if how is None:
        return
    folder = view.checkpoint.folder
    for name, tensors in view.quantized.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise JobError(
                f"{folder}: {name} is not a separate module here, so its activations cannot be rounded"
            ) from None
        if how.tensor and how.tensor not in tensors:
            raise JobError(f"{folder}: {name} has no {how.tensor}, by which its inputs are rounded; fetch it again")
        width = view.shape(f"{name}.weight")[1]
        if how.size and width % how.size:
            raise JobError(
                f"{folder}: groups of {how.size} do not fill the {width} inputs of {name}, so these cannot be rounded; "
                "leave it in float, or take a scheme without groups of inputs"
            )
        fixed = _fixed(view, tensors[how.tensor]) if how.tensor else None
        rounded = rounder(how, 1 / fixed if fixed and how.multiplied else fixed)
        module.register_forward_pre_hook(lambda _, given, own=rounded: (own(given[0]), *given[1:]))


def _fixed(view: FloatView, name: str) -> float:
    """The fixed scale of a linear's inputs, the tensor `name`."""
    try:
        return float(single(name, plain(view.checkpoint.tensor(name))))
    except UserError as error:
        raise JobError(f"{view.checkpoint.folder}: {error}") from error


def rounder(how: Activations, fixed: float | None = None) -> Rounding:
    """A function that rounds inputs (..., in), float32, and gives them back.

    fixed: the value of the linear's tensor `how.tensor`, where there is one.
    """

    def rounded(values: Tensor) -> Tensor:
        parts = values.unflatten(-1, (-1, how.size)) if how.share == "group" else values
        scale = _scale(parts, how, fixed)
        limit = _LARGEST[how.kind]
        result = _to_kind((parts / scale).clamp(-limit, limit), how.kind) * scale
        return result.reshape(values.shape)

    return rounded


def _scale(parts: Tensor, how: Activations, fixed: float | None) -> Tensor:
    import torch

    if how.share == "tensor":
        return torch.tensor(fixed, dtype=torch.float32, device=parts.device)
    largest = parts.abs().amax(dim=-1, keepdim=True)
    if how.scales == "e8m0":
        # Up from seven quarters, by adding to the bits of the float: less is kept by clipping than by the next power.
        bits = (largest.float().view(torch.int32) + (1 << 21)) & 0x7F800000
        exponent = (bits >> 23) - 127 - _EXPONENT[how.kind]
        return torch.exp2(exponent.clamp(-127, 127).float())
    scale = largest / _LARGEST[how.kind]
    if how.scales == "e4m3":
        outer = torch.tensor(fixed, dtype=torch.float32, device=parts.device)
        stored = (scale * outer).clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn).float()
        return torch.where(stored == 0, torch.full_like(stored, 0.125), stored) / outer
    return scale.clamp(min=1e-30)


def _to_kind(values: Tensor, kind: str) -> Tensor:
    import torch

    if kind == "int8":
        return values.round()
    if kind == "e4m3":
        return values.to(torch.float8_e4m3fn).float()
    below = torch.tensor(0.0)
    # An even code is above every second boundary, so that this one belongs to it.
    bounds = [
        torch.nextafter(torch.tensor(one), below).item() if place % 2 else one for place, one in enumerate(_HALFWAY)
    ]
    magnitudes = torch.tensor(_MAGNITUDES, device=values.device)
    return torch.copysign(magnitudes[torch.bucketize(values.abs(), torch.tensor(bounds, device=values.device))], values)
