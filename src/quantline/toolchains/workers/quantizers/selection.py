"""Which linears of a model a job asks for, by name and width, and whether the layout can hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import output

# What a model's modules are called in memory -> in its files, where transformers 5 renames them.
_RENAMED = {
    "mixtral": (
        (r"\.mlp\.", ".block_sparse_moe."), (r"\.gate_proj\b", ".w1"), (r"\.down_proj\b", ".w2"), (r"\.up_proj\b", ".w3"),
    ),
}  # fmt: skip


def file_name(name: str, kind: str) -> str:
    """What the files of a model type call a module that transformers 5 knows as `name`."""
    renames = _RENAMED.get(kind, ())
    if renames and re.search(renames[0][0], name):
        for pattern, other in renames:
            name = re.sub(pattern, other, name)
    return name


def width_of(job: Mapping[str, Any], layer: str) -> tuple[int, int]:
    """Bits and group size that a job asks for a linear."""
    own = (job.get("linears") or {}).get(layer) or job
    return int(own["bits"]), int(own["group_size"])


def chosen(job: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Of the linears that a library finds, those that the job asks for; all of them where it does not say.

    Raises:
        JobError: the job asks for one that the library does not quantize.
    """
    if "linears" not in job:
        return dict(found)
    lost = [name for name in job["linears"] if name not in found]
    if lost:
        raise JobError(
            f"{lost[0]} and {len(lost) - 1} other linears are not among those that this library quantizes in this model; "
            "skip them (layers.rules), or use another backend or method=rtn"
        )
    return {name: module for name, module in found.items() if name in job["linears"]}


def chosen_in(job: Mapping[str, Any], prefix: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of the linears of one decoder layer, by name within it, those that the job asks for."""
    asked = job.get("linears")
    return {name: module for name, module in found.items() if asked is None or f"{prefix}.{name}" in asked}


def linears_inside(layers: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Every nn.Linear inside the decoder layers given as (name, module), by full name."""
    from torch import nn

    return {
        f"{prefix}.{name}": module
        for prefix, layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def check_selection(job: Mapping[str, Any], wanted: Mapping[str, Any], layout: str) -> None:
    """Refuse before any compute linears that the layout cannot hold at the bits and groups that are asked for.

    Raises:
        JobError: see `_output.check_widths`.
    """
    shapes: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}
    for name, module in wanted.items():
        shapes.setdefault(width_of(job, name), {})[name] = (module.in_features, module.out_features)
    if not shapes:
        output.check_shapes({}, layout, int(job["bits"]), int(job["group_size"]))
    for width, named in shapes.items():
        output.check_shapes(named, layout, *width)
