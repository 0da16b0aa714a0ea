"""Finished layers, kept on disk so that a killed job need not compute them again. NumPy only.

A folder belongs to one job, see `resume_files`. A layer's file that cannot be read counts as missing.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.toolchains.workers.quantizers import resume_files

KIND = "layers"


class LayerStore:
    """Finished layers of one job: name -> arrays and JSON facts. Does nothing if `folder` is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.found = 0

    @classmethod
    def of(cls, job: Mapping[str, Any], versions: str) -> LayerStore:
        """The store of a job, in its `work` folder.

        Args:
            job: see `quantline.toolchains.protocol`; without `work` nothing is kept.
            versions: versions of the libraries that compute.
        """
        if not job.get("work"):
            return cls(None)
        folder = resume_files.folder_of(job, KIND, versions)
        resume_files.forget(job, KIND, but=folder)  # left by a job with other options
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def get(self, name: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """The arrays and facts of a finished layer; None if it is not finished."""
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
        """Save a finished layer."""
        if self.folder is None:
            return
        with resume_files.whole(self.folder / f"{name}.npz") as file:
            np.savez(file, allow_pickle=False, **arrays, __facts__=np.frombuffer(json.dumps(facts).encode(), np.uint8))

    def clear(self) -> None:
        """Remove all saved layers, because the job is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
