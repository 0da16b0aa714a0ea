"""What bitsandbytes and transformers read, beside `checkpoints.layouts.bitsandbytes`; {"folders": {label: folder}}."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import bitsandbytes
import numpy as np
import torch
import transformers

from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import bitsandbytes as layout
from quantline.toolchains.protocol import worker_main

F = bitsandbytes.functional


def blocks():
    """Largest difference of our weights from the library's, by type, block size, double quantization, dtype, shape."""
    torch.manual_seed(0)
    found = {}
    for kind in ("nf4", "fp4"):
        for size in (64, 256, 2048, 4096):
            for double in (False, True):
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    for shape in ((33, 100), (256, 1024)):
                        weight = torch.randn(shape) * 0.05
                        weight[3] *= 20
                        weight[5] = 0
                        codes, state = F.quantize_4bit(
                            weight, blocksize=size, compress_statistics=double, quant_type=kind
                        )
                        state.dtype = dtype
                        stored = {"weight": codes}
                        stored |= {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
                        ours = layout.dequantize({key: part.numpy() for key, part in stored.items()}, bits=4)
                        theirs = F.dequantize_4bit(codes, state).float().numpy()
                        found[f"{kind} {size} {double} {dtype} {shape}"] = float(np.abs(ours - theirs).max())
    codes, scales, _ = F.int8_vectorwise_quant(weight.half())
    ours = layout.dequantize({"weight": codes.numpy(), "SCB": scales.numpy()}, bits=8)
    found["int8"] = float(np.abs(ours - F.int8_vectorwise_dequant(codes, scales).numpy()).max())
    return found


def loaded(folder):
    """The kinds of linears in a folder as transformers loads it, and the largest difference of a weight from ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    kinds, largest = {}, 0.0
    ours = dict(iter_dequantized(folder))
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        kinds[name] = type(module).__name__
        if kinds[name] == "Linear4bit":
            theirs = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif kinds[name] == "Linear8bitLt":
            theirs = F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        else:
            continue
        largest = max(largest, float(np.abs(theirs.float().numpy() - ours[f"{name}.weight"]).max()))
    return {"kinds": kinds, "difference": largest}


def run(job, _report):
    torch.set_num_threads(1)
    return {"blocks": blocks(), "loaded": {label: loaded(folder) for label, folder in job["folders"].items()}}


if __name__ == "__main__":
    worker_main(run)
