"""How the probe computes a float16 model, and what it leaves behind."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from quantline.checkpoints.model_config import legacy_copy
from quantline.toolchains.protocol import worker_main
from quantline.toolchains.workers.quantizers import model as _common


def state(model):
    return {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}


def run(job, report):
    probe = load_file(job["probe"])
    with TemporaryDirectory() as scratch:
        folder = legacy_copy(job["model"], Path(scratch))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float16).eval()
    work = SimpleNamespace(model=model, device="cpu", probe_ids=probe["input_ids"])
    before = state(model)
    narrow = _common.probe_logits(work)
    untouched = state(model) == before
    with torch.no_grad():
        plain = np.stack(
            [model(torch.from_numpy(row[None].astype("int64"))).logits[0].float() for row in work.probe_ids]
        )
    work.probe_ids = np.full((1, 2), 10**6, dtype=np.int32)
    try:
        _common.probe_logits(work)
        failed = False
    except IndexError:
        failed = True
    untouched_by_failure = failed and state(model) == before
    work.model, work.probe_ids = model.float(), probe["input_ids"]
    wide = _common.probe_logits(work)
    return {
        "from_float32": float(np.abs(narrow - wide).max()),
        "float16_from_float32": float(np.abs(plain - wide).max()),
        "untouched": untouched,
        "untouched_by_failure": untouched_by_failure,
    }


if __name__ == "__main__":
    worker_main(run)
