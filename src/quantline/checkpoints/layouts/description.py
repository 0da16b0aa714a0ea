"""A checkpoint's quantization as its config describes it: read from it, and to be written to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quantline.checkpoints.layouts.linear_spec import LayerSettings


@dataclass(frozen=True)
class Activations:
    """How a runtime rounds the inputs of quantized linears, symmetrically.

    Attributes:
        kind: what a value becomes: `int8`, `e4m3` (FP8) or `e2m1` (FP4).
        share: which values have one scale: those of a `token`, a `group` of `size` values of a token, or all (`tensor`).
        size: values of a group.
        scales: how a scale itself is rounded: not, to a power of two (`e8m0`), or to FP8 (`e4m3`).
        tensor: suffix of the tensor with the fixed scale of a linear; for scales in FP8, with what they are divided by once
            they are stored. multiplied: they are multiplied by it instead.
    """

    kind: Literal["int8", "e4m3", "e2m1"]
    share: Literal["token", "tensor", "group"]
    size: int = 0
    scales: Literal["float", "e8m0", "e4m3"] = "float"
    tensor: str = ""
    multiplied: bool = False

    @property
    def bits(self) -> int:
        """Bits of a rounded value."""
        return 4 if self.kind == "e2m1" else 8


@dataclass(frozen=True)
class QuantizationInfo:
    """What a checkpoint's config says about its quantized linears.

    Attributes:
        method: its `quant_method`, such as "awq", "gptq", "compressed-tensors" or "bitsandbytes".
        layout: key in `layouts.LAYOUTS`.
        bits, group_size: of every quantized linear except the overrides; -1 is one group per output channel. The groups of
            bitsandbytes are its blocks.
        desc_act: columns were quantized in the order of their activations (GPTQ).
        symmetric: the config promises that every zero point is the middle one (GPTQ's sym, AWQ's zero_point false).
        modules_to_not_convert: names of modules left in float; compressed-tensors also has ``re:`` patterns there.
        overrides: module name -> settings of linears that differ from the rest (compressed-tensors).
        patterns: the same, by regular expressions that match the start of a name; the first match counts (GPTQ's dynamic).
        activations: how a runtime also rounds the inputs of the quantized linears; None if it does not.
    """

    method: str
    layout: str
    bits: int
    group_size: int
    desc_act: bool
    symmetric: bool
    modules_to_not_convert: tuple[str, ...]
    overrides: Mapping[str, LayerSettings] = field(default_factory=dict)
    patterns: tuple[tuple[str, LayerSettings], ...] = ()
    activations: Activations | None = None

    @property
    def activation_bits(self) -> int | None:
        """Bits of rounded inputs; None where inputs are not rounded."""
        return None if self.activations is None else self.activations.bits

    def of(self, layer: str) -> LayerSettings:
        """Bits, group size and symmetry of one quantized linear."""
        if layer in self.overrides:
            return self.overrides[layer]
        found = (own for pattern, own in self.patterns if re.match(pattern, layer))
        return next(found, LayerSettings(self.bits, self.group_size, self.symmetric))


@dataclass(frozen=True)
class Description:
    """What a config must say about a checkpoint.

    Attributes:
        main: of the quantized linears; symmetric: every zero point of every quantized linear is ``2**(bits-1)``.
        desc_act: groups are reordered by activation.
        left_float: names of the linears left in float.
        overrides: module name -> settings of linears that differ.
        quantized_head: the output layer `lm_head` is quantized, which vLLM must be told.
        options: of the method, for layouts whose config contains them (bitsandbytes).
    """

    main: LayerSettings
    desc_act: bool = False
    left_float: tuple[str, ...] = ()
    overrides: Mapping[str, LayerSettings] = field(default_factory=dict)
    quantized_head: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
