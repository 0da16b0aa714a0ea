"""Selects the linears that a job requests, by name and width, and checks that the layout can represent them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import output

# Module names in memory -> in the files, for model types that transformers 5 renames.
_RENAMED = {
    "mixtral": (
        (r"\.mlp\.", ".block_sparse_moe."), (r"\.gate_proj\b", ".w1"), (r"\.down_proj\b", ".w2"), (r"\.up_proj\b", ".w3"),
    ),
    "gpt_neox": ((r"^lm_head\b", "embed_out"),),
}  # fmt: skip


def file_name(name: str, kind: str) -> str:
    """The name in a model type's files of a module that transformers 5 calls `name`."""
    renames = _RENAMED.get(kind, ())
    if renames and re.search(renames[0][0], name):
        for pattern, other in renames:
            name = re.sub(pattern, other, name)
    return name


def width_of(job: Mapping[str, Any], layer: str) -> tuple[int, int]:
    """The bits and group size that a job requests for a linear."""
    width = (job.get("linears") or {}).get(layer) or job
    return int(width["bits"]), int(width["group_size"])


def chosen(job: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The job's linears among those that a library finds; all of them if the job has no list.

    Raises:
        JobError: the library does not quantize a linear of the job.
    """
    if "linears" not in job:
        return dict(found)
    lost = [name for name in job["linears"] if name not in found]
    if lost:
        raise JobError(
            f"this library does not quantize {lost[0]} and {len(lost) - 1} other linears of this model; "
            "skip them (layers.rules), or use another backend or method=rtn"
        )
    return {name: module for name, module in found.items() if name in job["linears"]}


def chosen_in(job: Mapping[str, Any], prefix: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The job's linears in one decoder layer, by name within it."""
    requested = job.get("linears")
    return {name: module for name, module in found.items() if requested is None or f"{prefix}.{name}" in requested}


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
    """Refuse, before any computation, linears that the layout cannot represent with the requested bits and groups.

    Raises:
        JobError: see `output.check_shapes`.
    """
    shapes: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}
    for name, module in wanted.items():
        shapes.setdefault(width_of(job, name), {})[name] = (module.in_features, module.out_features)
    if not shapes:
        output.check_shapes({}, layout, int(job["bits"]), int(job["group_size"]))
    for width, named in shapes.items():
        output.check_shapes(named, layout, *width)
