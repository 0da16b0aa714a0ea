"""Turn pickled weights into safetensors, once, in the `reference` toolchain; nothing after the download reads pickles.

Only where `model.allow_pickle=true` accepted them. torch's restricted unpickler (`weights_only`) loads them: it takes
tensors and plain containers and refuses everything else.

Job: {"folder": DIR}, which is changed in place: each `*.bin` becomes a `*.safetensors`, and an index follows.
Result: the number of tensors and of files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantline.core.files import write_json
from quantline.toolchains.protocol import JobError, Reporter, worker_main

SINGLE = ("pytorch_model.bin", "model.safetensors")
INDEX = ("pytorch_model.bin.index.json", "model.safetensors.index.json")


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """See the module.

    Raises:
        JobError: the pickles are under other names, damaged, or hold more than tensors.
    """
    import pickle

    import torch
    from safetensors.torch import save_file

    folder = Path(job["folder"])
    index = folder / INDEX[0]
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [SINGLE[0]]
    missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise JobError(f"{missing[0]}: expected as the pickled weights and not there; convert this model by hand")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        try:
            state = torch.load(folder / shard, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            first = str(error).splitlines()[0]
            raise JobError(f"{shard}: is damaged or holds more than tensors ({first}); fetch it again") from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise JobError(f"{shard}: is no mapping of names to tensors; convert this model by hand")
        name = shard.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        # clone: tied tensors share storage in a pickle, which safetensors does not have
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
