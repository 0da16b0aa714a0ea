"""Where a job that was killed finds again what it had done: a folder of its own, and files that are whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from quantline.core.files import replaced

# What says where a job runs and how far its proof may be off, and not what it makes.
_PLACES = ("model", "output", "calibration", "probe", "work", "probe_tolerance")


def folder_of(job: Mapping[str, Any], kind: str, identity: str) -> Path:
    """The folder of a job in its `work`: the same one only for jobs with the same result.

    The reference engine's logits of the float model are part of its name: other weights have another folder.

    Args:
        job: see `quantline.toolchains.protocol`.
        kind: what is kept, the first part of the name.
        identity: what decides the result beside the job, such as the libraries' versions.
    """
    digest = hashlib.sha256(identity.encode())
    plain = {key: value for key, value in job.items() if key not in _PLACES}
    digest.update(json.dumps(plain, sort_keys=True).encode())
    for file in (job["calibration"], job["probe"]):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Path(job["work"]) / f"{kind}-{digest.hexdigest()[:16]}"


def forget(job: Mapping[str, Any], kind: str, but: Path | None = None) -> None:
    """Remove what was kept, of this job and of others in its `work`; but for one folder, where it is given."""
    if job.get("work"):
        for folder in Path(job["work"]).glob(f"{kind}-*"):
            if folder != but:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is moved to `path` when it is on the disk as a whole."""
    with replaced(path) as temporary, temporary.open("wb") as file:
        yield file
