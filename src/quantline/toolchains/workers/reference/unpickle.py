"""Converts pickled weights to safetensors once, in the `reference` toolchain; no later stage reads pickles.

Runs only with `model.allow_pickle=true`. torch's restricted unpickler (`weights_only`) loads them: it accepts tensors and
plain containers and refuses everything else.

Job: {"folder": DIR}, which is changed in place: each `*.bin` becomes a `*.safetensors`, and an index is converted too.
Result: the number of tensors and of files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantline.checkpoints.model_files import INDEX_NAME, PICKLED_INDEX, PICKLED_NAME, WEIGHTS_NAME
from quantline.core.files import write_json
from quantline.toolchains.protocol import JobError, Reporter, worker_main

SINGLE = (PICKLED_NAME, WEIGHTS_NAME)
INDEX = (PICKLED_INDEX, INDEX_NAME)


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job, see the module's description.

    Raises:
        JobError: the pickles have other names, are damaged, or contain more than tensors.
    """
    import pickle

    import torch
    from safetensors.torch import save_file

    folder = Path(job["folder"])
    index = folder / INDEX[0]
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [SINGLE[0]]
    missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise JobError(
            f"{folder / missing[0]}: pickled weights are missing; convert this model to safetensors yourself"
        )
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        try:
            state = torch.load(folder / shard, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            first = str(error).splitlines()[0]
            raise JobError(
                f"{folder / shard}: is damaged or contains more than tensors ({first}); fetch it again"
            ) from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise JobError(
                f"{folder / shard}: is not a mapping of names to tensors; convert this model to safetensors yourself"
            )
        name = shard.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        # clone: tied tensors share storage in a pickle, which safetensors does not support
        save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / name, {"format": "pt"})
        (folder / shard).unlink()
        weight_map.update(dict.fromkeys(state, name))
        report(number, len(shards), shard)
    if index.exists():
        size = sum((folder / name).stat().st_size for name in set(weight_map.values()))
        write_json(folder / INDEX[1], {"metadata": {"total_size": size}, "weight_map": weight_map})
        index.unlink()
    return {"tensors": len(weight_map), "files": len(shards)}


if __name__ == "__main__":
    worker_main(run)
