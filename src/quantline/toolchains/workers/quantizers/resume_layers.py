"""Layers that are done, kept on disk, so that a job that was killed need not do them again. NumPy only.

A folder belongs to one job, see `_kept`. A layer's file that cannot be read counts as missing.
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
    """Finished layers of one job: name -> arrays and JSON facts. Does nothing where `folder` is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.found = 0

    @classmethod
    def of(cls, job: Mapping[str, Any], versions: str) -> LayerStore:
        """The store of a job, in its `work` folder.

        Args:
            job: see `quantline.toolchains.protocol`; without `work` nothing is kept.
            versions: of the libraries that compute.
        """
        if not job.get("work"):
            return cls(None)
        folder = resume_files.folder_of(job, KIND, versions)
        resume_files.forget(job, KIND, but=folder)  # of another job: its options were changed since
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
        with resume_files.whole(self.folder / f"{name}.npz") as file:
            np.savez(file, allow_pickle=False, **arrays, __facts__=np.frombuffer(json.dumps(facts).encode(), np.uint8))

    def clear(self) -> None:
        """Forget everything: the job is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
