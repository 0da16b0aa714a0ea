"""Layers that are done, kept on disk, so that a job that was killed need not do them again. NumPy only.

A folder belongs to one job: what decides the result is in its name, so another job finds nothing there. A layer's file is
moved into place when it is whole; one that cannot be read counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What may change without changing the result: where things are, and how far the proof may be off.
_PLACES = ("model", "output", "work", "calibration", "probe", "probe_tolerance")


class LayerStore:
    """Finished layers of one job: name -> arrays and JSON facts. Does nothing where `folder` is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.found = 0

    @classmethod
    def of(cls, job: Mapping[str, Any], versions: str) -> LayerStore:
        """The store of a job, in its `work` folder.

        Args:
            job: see `quantline.jobs`; without `work` nothing is kept.
            versions: of the libraries that compute.
        """
        if not job.get("work"):
            return cls(None)
        model = Path(job["model"])
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(model.iterdir())]
        values = {key: value for key, value in job.items() if key not in _PLACES}
        digest = hashlib.sha256(Path(job["calibration"]).read_bytes())
        digest.update(json.dumps([values, files, versions], sort_keys=True).encode())
        folder = Path(job["work"]) / f"layers-{digest.hexdigest()[:24]}"
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def get(self, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """The arrays and facts of a finished layer; None where there are none."""
        if self.folder is None:
            return None
        try:
            with np.load(self.folder / f"{name}.npz", allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            facts: dict[str, Any] = json.loads(arrays.pop("__facts__").tobytes())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        self.found += 1
        return arrays, facts

    def put(self, name: str, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
        """Keep a finished layer."""
        if self.folder is None:
            return
        temporary = self.folder / f"{name}.tmp"
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays, __facts__=np.frombuffer(json.dumps(facts).encode(), np.uint8))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / f"{name}.npz")

    def clear(self) -> None:
        """Forget everything: the job is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
