"""Log-probabilities of given tokens by llama.cpp, from the library that also serves.

Job: file (GGUF), windows (safetensors: `input_ids` int32 (tokens,), `offsets` int64 (windows + 1,)), output and threads. The
output has `logprobs` float32 (tokens,), the natural logarithm of each token's probability given the tokens before it in its
window, NaN at the first. Each window goes through the model alone, with keys and values in float16, as the server has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from quantline.checkpoints.safetensors_file import SafetensorsFile, write_safetensors
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.llamacpp.library import log_probabilities, opened


def run(job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Score the windows of a job, see the module's description.

    Raises:
        JobError: llama.cpp does not load the file, or a log-probability is no number.
    """
    windows = SafetensorsFile.open(Path(job["windows"]))
    ids, offsets = windows.read("input_ids"), windows.read("offsets")
    scores = np.full(len(ids), np.nan, dtype=np.float32)
    with opened(Path(job["file"]), window=int(np.diff(offsets).max()), threads=int(job["threads"])) as llama:
        for begin, end in pairwise(offsets):
            report(int(begin), len(ids), "tokens")
            window = ids[begin:end].tolist()
            scores[begin + 1 : end] = log_probabilities(llama.logits(window)[:-1], window[1:])
    lost = int(np.isnan(scores).sum()) - int((np.diff(offsets) > 0).sum())
    if lost:
        raise JobError(f"{job['file']}: {lost} log-probabilities are no numbers: the weights are damaged")
    write_safetensors(Path(job["output"]), {"logprobs": scores})
    return {"tokens": len(ids)}


if __name__ == "__main__":
    worker_main(run)
