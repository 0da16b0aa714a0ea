"""Facts about a checkpoint's layers that serving rules use: widths, fused linears, splits by tensor parallelism.

Names are those of transformers. Which linears are fused, and which are split along their input, follows vLLM (its
models' `packed_modules_mapping`, and `RowParallelLinear`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from quantline.checkpoints.layouts.compressed_tensors.schemes import BLOCK
from quantline.checkpoints.layouts.linear_spec import LM_HEAD
from quantline.checkpoints.quantization_config import LayerSettings
from quantline.serving.rules import EXPERT, CheckpointFacts, facts_of

FUSED = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"),  # of Qwen3.5's gated delta nets
)  # fmt: skip
# Where checkpoints have q, k and v in one linear, head by head.
_QKV = ".query_key_value"
ROW_PARALLEL = frozenset({"o_proj", "out_proj", "down_proj", "fc2", "c_proj", "dense", "dense_4h_to_h", "w2", "wo"})

Shapes = Mapping[str, tuple[int, int]]


def facts_of_layers(
    quantization: Mapping[str, Any] | None,
    linears: Mapping[str, LayerSettings],
    shapes: Shapes,
    *,
    heads: int | None = None,
    tensor_parallel_size: int = 1,
) -> list[CheckpointFacts]:
    """The facts of a checkpoint, one entry for each setting that its linears have; one entry for a float model.

    Args:
        quantization: the section of config.json; None for a float model.
        linears: settings of the quantized linears, by name.
        shapes: (in_features, out_features) of all linears, by name.
        heads: attention heads of the model.
        tensor_parallel_size: GPUs that each linear is split over.
    """
    cuts_heads = heads is not None and heads % tensor_parallel_size != 0
    base = facts_of(quantization)
    there = "float" if any(EXPERT.search(name) for name in shapes) else None
    if not linears:
        return [replace(base, cut="heads" if cuts_heads else "nothing", experts=there)]
    parts = list(_computed(linears, shapes, tensor_parallel_size))
    fused = "mixed" if any(_differ(names, linears) for names, _, _ in parts) else "alike"
    head = "float" if LM_HEAD not in linears else "named" if _names_head(quantization or {}) else "unnamed"
    experts = "quantized" if any(EXPERT.search(name) for name in linears) else there
    qkv = "one" if any(name.endswith(_QKV) for name in linears) else None
    before = [shapes[name][1] for names, _, _ in parts for name in names[:-1]]
    blocks = "cut" if any(_share(high, tensor_parallel_size) % BLOCK for high in before) else "whole"
    found = []
    for setting in dict.fromkeys(linears.values()):
        sizes = [(wide, high) for names, wide, high in parts if any(linears.get(name) == setting for name in names)]
        cuts_groups = setting.group_size > 0 and any(wide % setting.group_size for wide, _ in sizes)
        found.append(replace(
            base, bits=setting.bits, group_size=setting.group_size,
            sym=setting.symmetric if base.sym is not None else None,
            widths_divisible_by_32=all(wide % 32 == 0 and high % 32 == 0 for wide, high in sizes),
            fused=fused, head=head, experts=experts, qkv=qkv, blocks=blocks if base.strategy == "block" else None,
            cut="heads" if cuts_heads else "groups" if cuts_groups else "nothing",
        ))  # fmt: skip
    return found


def fused_apart(linears: Mapping[str, LayerSettings], shapes: Shapes) -> list[list[str]]:
    """Fused linears whose parts differ in settings or are only partly quantized; a list of names for each.

    Args:
        linears: settings of the quantized linears, by name.
        shapes: (in_features, out_features) of all linears, by name.
    """
    return [names for names, _, _ in _computed(linears, shapes, 1) if _differ(names, linears)]


def units_of(linears: Iterable[str]) -> dict[str, list[str]]:
    """The linears that must have one width for a server: its fused linears, and all experts of a layer.

    Returns:
        unit -> its linears, in their order. A unit is called by its only linear, `PARENT.q_proj+k_proj+v_proj`, or
        `PARENT.experts.*`.
    """
    names, units = list(linears), dict[str, list[str]]()
    for name in names:
        parent, _, last = name.rpartition(".")
        expert = EXPERT.search(name)
        group = next((parts for parts in FUSED if last in parts), (last,))
        present = [part for part in group if f"{parent}.{part}" in names]
        unit = f"{name[: expert.start()]}.experts.*" if expert else f"{parent}.{'+'.join(present)}"
        units.setdefault(unit if parent or expert else name, []).append(name)
    return units


def _computed(linears: Mapping[str, LayerSettings], shapes: Shapes, ranks: int) -> Iterator[tuple[list[str], int, int]]:
    """Each quantized linear as vLLM fuses it: names of its parts, in and out on each rank; -1 if a width cannot be split."""
    done: set[str] = set()
    for name in shapes:
        if name in done:
            continue
        parent, _, last = name.rpartition(".")
        group = next((parts for parts in FUSED if last in parts), (last,))
        siblings = [f"{parent}.{part}" if parent else part for part in group]
        names = [sibling for sibling in siblings if sibling in shapes]
        done.update(names)
        if any(one in linears for one in names):
            wide, high = shapes[name][0], sum(shapes[one][1] for one in names)
            split_input = last in ROW_PARALLEL
            yield names, _share(wide, ranks) if split_input else wide, high if split_input else _share(high, ranks)


def _share(width: int, ranks: int) -> int:
    return width // ranks if width % ranks == 0 else -1


def _differ(names: list[str], linears: Mapping[str, LayerSettings]) -> bool:
    return len({linears.get(name) for name in names}) > 1


def _names_head(quantization: Mapping[str, Any]) -> bool:
    groups = quantization.get("config_groups") or {}
    targets = [target for group in groups.values() for target in group.get("targets") or []]
    return bool(quantization.get("lm_head")) or any(target.endswith(LM_HEAD) for target in targets)
