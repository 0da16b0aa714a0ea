"""Hashes of what a stage wrote: of each file, and of each tensor in it."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quantline.checkpoints.safetensors_file import TensorInfo, read_header
from quantline.core.files import sha256_of


@dataclass(frozen=True)
class FolderHashes:
    """files: path below the folder -> SHA-256. tensors: name -> `tensor_hashes`, of every safetensors file below it."""

    files: dict[str, str]
    tensors: dict[str, str]


def hash_folder(folder: Path, threads: int = 2) -> FolderHashes:
    """Hash every file below a folder and every tensor of its safetensors files.

    hashlib lets other threads run while it works, so the two hashes of a large file are computed side by side and its second
    reading comes from the page cache.

    Raises:
        CheckpointError: a file named as safetensors that is none.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    weights = [name for name in paths if name.endswith(".safetensors")]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        tensors = pool.map(tensor_hashes, (paths[name] for name in weights))
        files = pool.map(sha256_of, paths.values())
        return FolderHashes(dict(zip(paths, files, strict=True)), _merged(dict(zip(weights, tensors, strict=True))))


def _merged(by_file: dict[str, dict[str, str]]) -> dict[str, str]:
    # A checkpoint has a name once; where two files share one (a model's and a probe's, say), both are told by their file.
    names = [name for tensors in by_file.values() for name in tensors]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return {
        f"{file}:{name}" if name in twice else name: content
        for file, tensors in by_file.items()
        for name, content in tensors.items()
    }


def tensor_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a safetensors file: over its dtype, shape and bytes, wherever in the file they stand.

    Raises:
        CheckpointError: the file is none.
    """
    header = read_header(path)
    if not any(info.nbytes for info in header.values()):
        return {name: _tensor_hash(info, b"") for name, info in sorted(header.items())}
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        return {
            name: _tensor_hash(info, view[info.offset : info.offset + info.nbytes])
            for name, info in sorted(header.items())
        }


def _tensor_hash(info: TensorInfo, content: bytes | memoryview) -> str:
    digest = hashlib.sha256(json.dumps([info.dtype, list(info.shape)]).encode())
    digest.update(content)
    if isinstance(content, memoryview):
        content.release()
    return digest.hexdigest()


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in order."""
    yield from sorted(path for path in folder.rglob("*") if path.is_file())
