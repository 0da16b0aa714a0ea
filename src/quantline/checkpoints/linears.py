"""The linears of a model, from its headers: which are quantized, at how many bits and in what groups.

The 2-D weights inside the decoder layers are quantized, except for embeddings, norms and routers; the output layer is on
request. Rules by name make exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.model_config import ties_head
from quantline.core.errors import UserError

LM_HEAD = "lm_head"
_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.(.+)\.weight$")
_NOT_LINEAR = re.compile(r"norm|embed|ln_|(?:^|\.)(?:gate|router|shared_expert_gate)$")


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every linear of the decoder's layers, by name without `.weight`."""
    found = {}
    for name in checkpoint.names:
        inside, shape = _IN_LAYER.search(name), checkpoint.info(name).shape
        if inside and len(shape) == 2 and not _NOT_LINEAR.search(inside[1]):
            found[name.removesuffix(".weight")] = (int(shape[1]), int(shape[0]))
    return found


def select_linears(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    *,
    bits: int,
    group_size: int,
    rules: Sequence[Mapping[str, Any]] = (),
    lm_head: bool = False,
) -> dict[str, LinearSpec]:
    """Which linears to quantize and how, by name in the order of the checkpoint; all others stay float.

    Args:
        checkpoint: of the float model.
        config: its config.json.
        bits, group_size: of linears that no rule matches.
        rules: mappings with `match` (a pattern of the full name, * and ? as in a shell) and `skip`, `bits` or
            `group_size`; the first one that matches counts.
        lm_head: whether the output layer is quantized too.

    Raises:
        UserError: a rule matches no linear, every linear is skipped, or the output layer cannot be quantized.
    """
    names = list(linear_shapes(checkpoint))
    if lm_head:
        if ties_head(config) or f"{LM_HEAD}.weight" not in checkpoint.names:
            raise UserError(
                "lm_head=quantized: the model's output layer is tied to its embeddings, which stay float; give "
                "lm_head=float"
            )
        names.append(LM_HEAD)
    unmatched = [rule["match"] for rule in rules if not any(fnmatchcase(name, rule["match"]) for name in names)]
    if unmatched:
        example = names[0] if names else "no linear"
        raise UserError(
            f"layers.rules: {', '.join(unmatched)} matches no linear of this model; names look like {example}"
        )
    widths = {}
    for name in names:
        rule = next((rule for rule in rules if fnmatchcase(name, rule["match"])), {})
        if not rule.get("skip"):
            own_bits, own_group = rule.get("bits"), rule.get("group_size")
            widths[name] = LinearSpec(
                bits if own_bits is None else own_bits, group_size if own_group is None else own_group
            )
    if names and not widths:
        raise UserError(
            "layers.rules: every linear is skipped, so nothing would be quantized; use method=float for that"
        )
    return widths


def place_of(name: str) -> tuple[int, str]:
    """The decoder layer of a linear and its name inside that layer; -1 and the whole name outside the layers."""
    found = _PLACE.search(name)
    return (int(found[1]), found[2]) if found else (-1, name)


_PLACE = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
