"""Facts about GGUF files, found in the environment of llama.cpp.

`families`: name -> folder of a float model; the converter writes it without a vocabulary, and `differences` has the largest
difference of any parameter that is read back, and the names that only one of both has. `files`: label -> source, mixture,
importance (npz or null); `hashes` has the SHA-256 of the whole quantized file and of its tensors.
"""

import hashlib
import tempfile
from pathlib import Path

import numpy as np

from quantline.checkpoints.float_view import FloatView
from quantline.checkpoints.layouts.gguf.header import read_gguf
from quantline.toolchains.protocol import worker_main
from quantline.toolchains.workers.llamacpp.writing import quantize_file


def converted(model, out):
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    architecture = get_model_architecture(ModelBase.load_hparams(model, False), ModelType.TEXT)
    builder = get_model_class(architecture, mmproj=False)
    builder.set_vocab = lambda self: None
    with torch.inference_mode():
        builder(model, gguf.LlamaFileType.ALL_F32, out).write()


def difference(model):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        converted(model, folder / "model.gguf")
        (folder / "config.json").write_text('{"model_type": "any"}')
        before, after = FloatView.open(model), FloatView.open(folder)
        names = set(before.names) & set(after.names)
        # Gemma 3's converter leaves out rows of the embeddings that have no token.
        pairs = ((before.values(name), after.values(name)) for name in names)
        largest = max(float(np.abs(one[: len(other)] - other).max()) for one, other in pairs)
        return {"largest": largest, "others": sorted(set(before.names) ^ set(after.names)), "names": len(names)}


def quantized(source, mixture, importance):
    weights = None if importance is None else dict(np.load(importance))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "model.gguf")
        quantize_file(Path(source), out, mixture, weights, threads=2, report=lambda *_step: None)
        data, start = out.read_bytes(), min(one.offset for one in read_gguf(out).tensors.values())
        return {"sha256": hashlib.sha256(data).hexdigest(), "tensors_sha256": hashlib.sha256(data[start:]).hexdigest()}


def run(job, report):
    return {
        "differences": {name: difference(Path(folder)) for name, folder in job["families"].items()},
        "hashes": {label: quantized(*given) for label, given in job["files"].items()},
    }


if __name__ == "__main__":
    worker_main(run)
