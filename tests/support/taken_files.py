"""What a stand-in for a stage writes: the files that later stages read of its output by themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantline.checkpoints.safetensors_file import write_safetensors
from quantline.pipeline.stages import STAGES


def write_taken(out: Path, stage: str, content: str) -> None:
    """Write them to `out`; another content gives other hashes."""
    for file in {other.takes[stage] for other in STAGES.values() if stage in other.takes}:
        if file.endswith(".safetensors"):
            write_safetensors(out / file, {"text": np.frombuffer(content.encode(), np.uint8)})
        else:
            (out / file).write_text(content, encoding="utf-8")
