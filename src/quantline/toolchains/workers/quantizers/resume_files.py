"""Files with finished work, from which a killed job resumes: one folder per job, and only complete files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from quantline.core.files import replaced

# Keys of a job that do not affect its result: paths, and the tolerance of its check.
_NOT_IN_RESULT = ("model", "output", "calibration", "probe", "work", "probe_tolerance")


def folder_of(job: Mapping[str, Any], kind: str, identity: str) -> Path:
    """The folder of a job in its `work`. Only jobs with the same result share one.

    Its name also hashes the reference engine's logits, so a model with other weights gets another folder.

    Args:
        job: see `quantline.toolchains.protocol`.
        kind: the kind of files in it, the first part of the name.
        identity: what else affects the result, such as the libraries' versions.
    """
    digest = hashlib.sha256(identity.encode())
    plain = {key: value for key, value in job.items() if key not in _NOT_IN_RESULT}
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for file in (job["calibration"], job["probe"]):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Path(job["work"]) / f"{kind}-{digest.hexdigest()[:16]}"


def forget(job: Mapping[str, Any], kind: str, but: Path | None = None) -> None:
    """Remove the folders of a kind, of this job and of others in its `work`, except `but` if given."""
    if job.get("work"):
        for folder in Path(job["work"]).glob(f"{kind}-*"):
            if folder != but:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; it is moved to `path` once it is completely on the disk."""
    with replaced(path) as temporary, temporary.open("wb") as file:
        yield file
