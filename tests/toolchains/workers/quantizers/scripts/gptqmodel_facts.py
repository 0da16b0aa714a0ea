"""What GPTQModel does by itself on a CPU, beside what it does in the worker; and what the worker leaves behind."""

from contextlib import nullcontext
from unittest import mock

import numpy as np
import torch

from quantline.toolchains.protocol import Reporter, worker_main
from quantline.toolchains.workers.quantizers import gptqmodel, gptqmodel_awq, model, rounding


def moved(work, *_):
    """In place of writing: how far the logits moved, in standard deviations."""
    difference = model.probe_logits(work) - work.probe_logits
    return {"moved": float(np.sqrt(np.mean(difference**2)) / work.probe_logits.std())}


def unrounded(processor_class):
    """The AWQ processor without its last step."""

    def build(base, state):
        class Processor(processor_class(base, state)):
            def apply_quant(self, named_linears, scales_list):
                state.work.packed.update({named.full_name: {} for named in named_linears.values()})

        return Processor

    return build


def scaling_alone(job, linears=None, *, backup=True):
    """AWQ's scaling without clipping and rounding must not change what the model computes."""
    job = {**job, "method": "awq", "options": {"clip": False}}
    if linears is not None:
        job["linears"] = linears
    copied = mock.patch.object(gptqmodel_awq, "copied_on_detach", nullcontext)
    with (
        mock.patch.object(model, "finish", moved),
        mock.patch.object(gptqmodel_awq, "processor_class", unrounded(gptqmodel_awq.processor_class)),
        nullcontext() if backup else copied,
    ):
        return gptqmodel.run(job, Reporter())["moved"]


def without_q_of_layer_0(job):
    width = {"bits": 4, "group_size": 64}
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    inside = [*attention, *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]
    names = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in inside]
    return {name: width for name in names if name != "model.layers.0.self_attn.q_proj"}


def one_sided_groups():
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.quantizer import Quantizer

    weight = torch.linspace(0.0, 1.0, 128).reshape(2, 64)

    def error(kind):
        quantizer = kind(QuantizeConfig(bits=4, group_size=64))
        quantizer.configure(perchannel=True)
        quantizer.find_params(weight, weight=True)
        return float((quantizer.quantize(weight) - weight).abs().max())

    return {"plain": error(Quantizer), "ours": error(rounding.gptq_quantizer(Quantizer, lambda own: own.qcfg.sym))}


def failure(job):
    """What a fault in one linear looks like; by itself the library would end this process."""
    from gptqmodel.quantization.gptq import GPTQ

    solve = GPTQ.hessian_inverse

    def fail(self, hessian):
        if self._named_module.full_name == "model.layers.1.mlp.down_proj":
            raise ArithmeticError("made to fail")
        return solve(self, hessian)

    with mock.patch.object(GPTQ, "hessian_inverse", fail):
        try:
            gptqmodel.run({**job, "options": {}}, Reporter())
        except RuntimeError as error:
            return str(error)
    return "nothing failed"


def replaced():
    from gptqmodel.looper import awq_processor, gptq_processor, loop_processor
    from gptqmodel.quantization import gptq
    from gptqmodel.utils import threadx

    return [
        threadx._DeviceWorker._abort_process, loop_processor._PROJECT_LOG_DIR, gptq.Quantizer, gptq_processor.GPTQ,
        gptq_processor.GPTQProcessor, awq_processor.AWQProcessor,
    ]  # fmt: skip


def run(job, report):
    facts = {"scaling_moves_logits": scaling_alone(job)}
    before = replaced()
    facts["scaling_beside_a_float_linear_moves_logits"] = scaling_alone(job, without_q_of_layer_0(job))
    facts["plain_scaling_moves_logits"] = scaling_alone(job, backup=False)
    facts["one_sided"] = one_sided_groups()
    facts["failure"] = failure(job)
    facts["put_back"] = [a is b for a, b in zip(before, replaced(), strict=True)]
    return facts


if __name__ == "__main__":
    worker_main(run)
