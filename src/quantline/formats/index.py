"""A shard index (``<weights>.safetensors.index.json``) and the headers of its shards, checked against each other."""

from __future__ import annotations

from pathlib import Path

from quantline.formats.container import CheckpointError, TensorInfo, read_header, read_json


def read_index(index: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Every tensor's file and place, both sorted by file or name.

    Returns:
        tensor name -> file name; tensor name -> `TensorInfo`.

    Raises:
        CheckpointError: an index that does not agree with its shards or names files outside its folder, a missing or
            damaged shard.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor to file names: fetch or write it again")
    infos: dict[str, TensorInfo] = {}
    for shard in sorted(set(shards.values())):
        # A plain name only: an index must not reach files outside its own folder.
        if shard in ("", ".", "..") or any(char in shard for char in "/\\\0"):
            raise CheckpointError(f"{index}: {shard!r} is not a plain file name: do not use this checkpoint")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index}: shard {shard} is missing: fetch it again")
        header = read_header(index.parent / shard)
        listed = {name for name, file in shards.items() if file == shard}
        for name in sorted(listed ^ set(header)):
            fact = "lists {} in {}, which does not hold it" if name in listed else "does not list {} of {}"
            raise CheckpointError(f"{index}: {fact.format(name, shard)}: index and shards are of different versions")
        infos.update(header)
    return {name: shards[name] for name in sorted(shards)}, infos
