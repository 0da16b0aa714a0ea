"""A checkpoint's quantization as its config describes it: read from it, and to be written to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantline.checkpoints.layouts.linear_spec import LayerSettings


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
        activation_bits: 8 if a runtime also quantizes the inputs of the quantized linears, symmetrically, with one scale
            per token (W8A8); None if it does not.
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
    activation_bits: int | None = None

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
