"""The files beside the weights: config, quantization config or description, and the source's other files."""

from __future__ import annotations

import os
from pathlib import Path

from quantline.checkpoints.model_files import FOLDERS, PICKLES, files_of
from quantline.checkpoints.quantization_config import own_file
from quantline.conversion.plan import ConversionPlan
from quantline.core.files import copy_file, write_json

A_PICKLE = "a pickle, which can run code"
# Files that describe the old weights, or that this project writes itself.
_REPLACED = ("config.json", "quantize_config.json", "quant_config.json", "conversion_proof.json")


def write_description(plan: ConversionPlan, out: Path) -> dict[str, str]:
    """Write config.json, the quantization's description, and every other file of the source except its weights.

    The description is a section of config.json; some layouts also have a separate file, or only that.

    Returns:
        file of the source -> why it was left out.
    """
    section = {"quantization_config": dict(plan.settings)} if plan.layout.config is not None else {}
    write_json(out / "config.json", {**plan.source.config, **section})
    if plan.layout.folder is not None:
        layers, carried = plan.source.layers, {name for shard in plan.shards for name in shard.carried}
        names = [name for shard in plan.shards for name in shard.specs]
        specs = {name: None if name in carried else layers[name.rpartition(".")[0]].spec for name in names}
        plan.layout.folder.describe(out, specs)
    own = own_file(plan.settings)
    if own is not None:
        write_json(out / own, dict(plan.settings))
    folder = plan.source.folder
    left_out = {path.name: "a folder" for path in folder.iterdir() if not path.is_file() and path.name not in FOLDERS}
    for name in files_of(folder):
        reason = _reason(folder / name)
        if reason:
            left_out[name] = reason
        else:
            carry_file(folder / name, out / name)
    return dict(sorted(left_out.items()))


def _reason(path: Path) -> str | None:
    if path.name in _REPLACED:
        return "written anew"
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        return "the source's weights"
    if path.name.startswith("quant_model_description"):
        return "describes the source's weights"
    return A_PICKLE if is_pickle(path.name) else None


def is_pickle(name: str) -> bool:
    """Whether a file is a pickle, or the index of pickles, by its name."""
    return name.endswith((*PICKLES, *(f"{suffix}.index.json" for suffix in PICKLES)))


def carry_file(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if that fails. Linking is safe because no finished file is written in place."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        copy_file(source, target)
