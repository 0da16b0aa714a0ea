"""What AutoGPTQ does by itself on a CPU, beside what it does in the worker."""

import numpy as np
import torch

from quantline.checkpoints.layouts import dequantize, gptq
from quantline.checkpoints.model_config import read_config
from quantline.toolchains.protocol import Reporter, worker_main
from quantline.toolchains.workers.quantizers import auto_gptq, rounding
from quantline.toolchains.workers.quantizers import model as _common


def plain(job, sym):
    """The library with its own packing: largest error of a packed layer, and which layers got a bias."""
    _common.start(job)
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base
    from auto_gptq.modeling.auto import GPTQ_CAUSAL_LM_MODEL_MAP

    work = _common.load(job, read_config(job["model"]))
    settings = BaseQuantizeConfig(bits=4, group_size=64, desc_act=False, sym=sym)
    model = GPTQ_CAUSAL_LM_MODEL_MAP["qwen2"](work.model, False, settings)
    rounded, pack = {}, _base.pack_model

    def remember(**arguments):
        for name in arguments["quantizers"]:
            rounded[name] = arguments["model"].get_submodule(name).weight.data.clone().numpy()
        pack(**arguments)

    kept = [(_base, "CUDA_0"), (_base, "pack_model"), (torch.cuda, "synchronize")]
    kept = [(where, name, getattr(where, name)) for where, name in kept]
    _base.CUDA_0, _base.pack_model, torch.cuda.synchronize = torch.device("cpu"), remember, lambda: None
    work.model.config.pad_token_id = 1
    ids = torch.from_numpy(work.calibration.astype(np.int64))
    model.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids])
    for where, name, value in kept:
        setattr(where, name, value)
    state, errors = work.model.state_dict(), {}
    for name, weight in rounded.items():
        tensors = {key: state[f"{name}.{key}"].numpy() for key in ("qweight", "qzeros", "scales", "g_idx")}
        errors[name] = float(np.abs(dequantize(gptq.read(tensors, bits=4, group_size=64)) - weight).max())
    return {"errors": errors, "bias": "model.layers.0.self_attn.o_proj.bias" in state}


def one_sided_groups():
    from auto_gptq.quantization.quantizer import Quantizer

    weight = torch.linspace(0.0, 1.0, 128).reshape(2, 64)

    def error(kind):
        quantizer = kind()
        quantizer.configure(4, perchannel=True, sym=True)
        quantizer.find_params(weight, weight=True)
        return float((quantizer.quantize(weight) - weight).abs().max())

    return {"plain": error(Quantizer), "ours": error(rounding.gptq_quantizer(Quantizer, lambda own: own.sym))}


def replaced():
    from auto_gptq.modeling import _base
    from auto_gptq.quantization import gptq as inner

    init = torch.nn.init
    return [
        torch.cuda.is_available, torch.cuda.synchronize, init.kaiming_uniform_, init.uniform_, init.normal_,
        _base.CUDA_0, _base.GPTQ, _base.pack_model, inner.Quantizer,
    ]  # fmt: skip


def run(job, report):
    facts = {"asymmetric": plain(job, sym=False), "symmetric": plain(job, sym=True)}
    facts["one_sided"] = one_sided_groups()
    before = replaced()
    auto_gptq.run({**job, "options": {"sym": False}}, Reporter())
    facts["put_back"] = [a is b for a, b in zip(before, replaced(), strict=True)]
    return facts


if __name__ == "__main__":
    worker_main(run)
