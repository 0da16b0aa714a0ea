"""Hashes of a stage's output: of each file, and of each tensor in it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quantline.checkpoints.safetensors_file import SafetensorsFile
from quantline.core.cores import cores
from quantline.core.files import sha256_of


@dataclass(frozen=True)
class FolderHashes:
    """files: path below the folder -> SHA-256. tensors: name -> `tensor_hashes`, of every safetensors file below it."""

    files: dict[str, str]
    tensors: dict[str, str]


def hash_folder(folder: Path) -> FolderHashes:
    """Hash every file below a folder and every tensor of its safetensors files.

    hashlib releases the interpreter's lock, so both hashes of a large file are computed at once. The second read comes
    from the page cache.

    Raises:
        CheckpointError: a file named .safetensors is not a safetensors file.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    weights = [name for name in paths if name.endswith(".safetensors")]
    with ThreadPoolExecutor(cores()) as pool:
        tensors = pool.map(tensor_hashes, (paths[name] for name in weights))
        files = pool.map(sha256_of, paths.values())
        return FolderHashes(dict(zip(paths, files, strict=True)), _merged(dict(zip(weights, tensors, strict=True))))


def _merged(by_file: dict[str, dict[str, str]]) -> dict[str, str]:
    # Tensor names are unique within a checkpoint. If two files share one (a model and a probe), the file is prefixed.
    names = [name for tensors in by_file.values() for name in tensors]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return {
        f"{file}:{name}" if name in twice else name: content
        for file, tensors in by_file.items()
        for name, content in tensors.items()
    }


def tensor_hashes(path: Path) -> dict[str, str]:
    """`SafetensorsFile.sha256` of each tensor of a file, sorted by name.

    Raises:
        CheckpointError: it is not a safetensors file.
    """
    file = SafetensorsFile.open(path)
    return {name: file.sha256(name) for name in sorted(file.infos)}


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in order."""
    yield from sorted(path for path in folder.rglob("*") if path.is_file())
