"""A model on the hub, known from its config.json, its tokenizer and the headers of its weights: before 15 GB are fetched.

The headers are read by HTTP range requests, at most 100 kB of a file at first, by the client and with the errors of the
download.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from quantline.checkpoints.model_files import COMPANIONS, INDEX_NAME, WEIGHTS_NAME, no_weights, weights_of
from quantline.config.data import ModelConfig
from quantline.core.errors import UserError
from quantline.data import hub

# Headers of that many files are asked for at a time.
_AT_ONCE = 8


def fetch_headers(source: ModelConfig, out: Path) -> None:
    """Put the files of a model on the hub into `out`, an empty folder: those of its weights have a header and no data.

    What is missing of a file is a hole, so `out` takes little of the disk. It may be opened as a checkpoint; the values of
    its tensors are zeros and mean nothing.

    Args:
        source: with `repo` and `revision`.

    Raises:
        UserError: no such repository or commit, no access, no network, no safetensors, or a damaged header.
    """
    origin = hub.HubRepo(str(source.repo), source.revision, "model", "model", "give a folder with model.path=DIR")
    _, there = hub.described(origin)
    cached = hub.fetch_snapshot(origin, ["config.json", *COMPANIONS, INDEX_NAME], ["*/*"])
    if (cached / INDEX_NAME).is_file():
        weights = [name for name in weights_of([INDEX_NAME], cached.joinpath) if name != INDEX_NAME]
    else:
        weights = [WEIGHTS_NAME] if WEIGHTS_NAME in there else []
        if not weights:
            remedy = (
                "use a repository or a commit with safetensors, or download and convert it with model.allow_pickle=true"
            )
            label = f"{source.repo}@{source.revision}"
            raise UserError(no_weights(label, there, read=partial(hub.fetch_file, origin), pickles=remedy))
    for path in cached.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for name, header in zip(
            weights, pool.map(lambda name: hub.safetensors_header(origin, name), weights), strict=True
        ):
            _write_hollow(out / name, header)


def _write_hollow(path: Path, header: dict[str, Any]) -> None:
    """A safetensors file of this header whose data are a hole."""
    text = json.dumps(header).encode()
    data = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data)
