"""What lies beside the weights: config, quantization config or description, and the source's other files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from quantline.checkpoints.layouts.msmodelslim import files
from quantline.checkpoints.layouts.registry import MSMODELSLIM, family
from quantline.conversion.plan import Plan
from quantline.conversion.source import PICKLES
from quantline.conversion.targets import save_mode
from quantline.core.files import write_json

# What describes the old weights, or what this project writes anew.
_REPLACED = ("config.json", "quantize_config.json", "quant_config.json", "conversion_proof.json")


def write_description(plan: Plan, out: Path) -> dict[str, str]:
    """config.json, what describes the quantization, and every other file of the source but its weights.

    That is a section of config.json, for AutoGPTQ quantize_config.json too, and for msModelSlim its own description.

    Returns:
        file of the source -> why it was left out.
    """
    if family(plan.layout) == MSMODELSLIM:
        write_json(out / "config.json", dict(plan.source.config))
        _describe_tensors(plan, out)
    else:
        write_json(out / "config.json", {**plan.source.config, "quantization_config": dict(plan.settings)})
    if plan.settings.get("quant_method") == "gptq":
        write_json(out / "quantize_config.json", dict(plan.settings))
    left_out = {}
    for path in sorted(plan.source.folder.iterdir()):
        reason = _reason(path)
        if reason:
            left_out[path.name] = reason
        else:
            carry_file(path, out / path.name)
    return left_out


def _describe_tensors(plan: Plan, out: Path) -> None:
    layers = plan.source.layers
    schemes: dict[str, str] = {}
    for shard in plan.shards:
        for name in shard.specs:
            layer = None if name in shard.carried else layers[name.rpartition(".")[0]]
            schemes[name] = files.FLOAT if layer is None else files.scheme_of(layer.bits)
    files.write_description(
        out, dict(sorted(schemes.items())), [layer.bits for layer in layers.values()],
        max(layer.group_size for layer in layers.values()), save_mode(plan.layout),
    )  # fmt: skip


def _reason(path: Path) -> str | None:
    if not path.is_file():
        return "a folder"
    if path.name in _REPLACED:
        return "written anew"
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        return "the source's weights"
    if path.name.startswith("quant_model_description"):
        return "describes the source's weights"
    return "a pickle, which can run code" if path.suffix in PICKLES else None


def carry_file(source: Path, target: Path) -> None:
    """A second name for the same bytes, or a copy where that cannot be; no finished file is written in place."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
