"""What GPTQModel's own loader and kernels make of written results: {"folders": {label: folder}, "probes": {label: file}}.

The reference is a plain transformers model with the weights that `iter_dequantized` gives, which knows nothing of the
library. A kernel's weight is what it multiplies unit vectors by.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from quantline.backends import gptqmodel
from quantline.checkpoint import Checkpoint, iter_dequantized, quantization_of, quantized_layers
from quantline.jobs import worker_main


def reference_logits(folder, ids):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {name: torch.from_numpy(np.array(values)) for name, values in iter_dequantized(folder)}
    lost = model.load_state_dict(weights, strict=False)
    # A head that is tied to the embeddings is in no file; GPTQ layers of AutoGPTQ's writer may have a bias of zeros.
    assert set(lost.missing_keys) <= {"lm_head.weight"}, lost
    assert not lost.unexpected_keys, lost
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.numpy()


def read(folder, probe):
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from safetensors.numpy import load_file

    ids = torch.from_numpy(load_file(probe)["input_ids"].astype(np.int64))
    model = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    layers = quantized_layers(Checkpoint.open(folder), quantization_of(folder))
    weights, kernels, worst = dict(iter_dequantized(folder)), set(), 0.0
    with torch.no_grad():
        for name in layers:
            layer = model.model.get_submodule(name)
            kernels.add(type(layer).__name__)
            bias = 0 if layer.bias is None else layer.bias.float()
            found = layer(torch.eye(layer.in_features, dtype=torch.float16)).float() - bias  # (in, out)
            expected = torch.from_numpy(np.array(weights[f"{name}.weight"])).half().float().T
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
        logits = model.model(input_ids=ids, use_cache=False).logits.float().numpy()
    expected = reference_logits(folder, ids)
    return {
        "layers": len(layers), "kernels": sorted(kernels), "weights": worst,
        "logits": float(np.abs(logits - expected).max() / expected.std()),
    }  # fmt: skip


def run(job, report):
    with TemporaryDirectory() as scratch:
        gptqmodel.environment(Path(scratch))
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return {label: read(folder, job["probes"][label]) for label, folder in job["folders"].items()}


if __name__ == "__main__":
    worker_main(run)
