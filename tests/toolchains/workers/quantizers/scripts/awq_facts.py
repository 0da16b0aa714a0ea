"""What AutoAWQ does by itself on a CPU, beside what it does in the worker; and whether it reads the worker's results."""

import numpy as np
import torch

from quantline.checkpoints.float_view import iter_dequantized
from quantline.toolchains.protocol import Reporter, worker_main
from quantline.toolchains.workers.quantizers import autoawq
from quantline.toolchains.workers.quantizers import model as _common


def load(job):
    _common.start(job)
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP

    from quantline.checkpoints.model_config import read_config

    work = _common.load(job, read_config(job["model"]))
    model = AWQ_CAUSAL_LM_MODEL_MAP["qwen2"](work.model, "qwen2", False, work.model.config, None, None)
    return work, model


def logits(work):
    """Of the model as it is: the library's own packed layers cannot be computed in float32."""
    rows = torch.from_numpy(work.probe_ids.astype(np.int64))
    with torch.no_grad():
        return np.stack([work.model(input_ids=row[None], use_cache=False).logits[0].float().numpy() for row in rows])


def changed(work):
    """How far the float function moved, in standard deviations."""
    return float(np.abs(logits(work) - work.probe_logits).max() / work.probe_logits.std())


def scale_only(job, mended):
    """Scaling alone, without clipping or rounding, must not change what the model computes."""
    work, model = load(job)
    quantizer = {"quantizer_cls": autoawq.quantizer_class(work, "awq_gemm", Reporter())} if mended else {}
    samples, length = work.calibration.shape
    model.quantize(
        quant_config={"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
        calib_data=work.calibration.tolist(), max_calib_samples=samples, max_calib_seq_len=length,
        apply_clip=False, export_compatible=True, **quantizer,
    )  # fmt: skip
    return changed(work)


def plain_rms(job):
    """The library's own result: logits error relative to their deviation."""
    import awq.modules.linear.gemm

    awq.modules.linear.gemm.TRITON_AVAILABLE = False
    work, model = load(job)
    samples, length = work.calibration.shape
    model.quantize(
        quant_config={"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
        calib_data=work.calibration.tolist(), max_calib_samples=samples, max_calib_seq_len=length,
    )  # fmt: skip
    return rms(work)


def rounded_rms(job):
    """The same for a checkpoint of the worker's, dequantized into the float model."""
    work, _ = load(job)
    state = {name: torch.from_numpy(values) for name, values in iter_dequantized(job["rounded"])}
    work.model.load_state_dict(state, strict=False)
    return rms(work)


def rms(work):
    difference = logits(work) - work.probe_logits
    return float(np.sqrt(np.mean(difference**2)) / work.probe_logits.std())


def one_sided_groups(job):
    from awq.quantize.quantizer import AwqQuantizer

    work, _ = load(job)
    weight = torch.linspace(0.2, 0.3, 128).reshape(2, 64)

    def error(kind):
        quantizer = kind.__new__(kind)
        quantizer.group_size, quantizer.w_bit, quantizer.zero_point = 64, 4, True
        return float((quantizer.pseudo_quantize_tensor(weight)[0] - weight).abs().max())

    return {"plain": error(AwqQuantizer), "ours": error(autoawq.quantizer_class(work, "awq_gemm", Reporter()))}


def clipping_agreement(job):
    """Share of groups for which the worker chooses the same range as the library's own, slower code."""
    from awq.quantize.quantizer import AwqQuantizer

    work, _ = load(job)
    kind = autoawq.quantizer_class(work, "awq_gemm", Reporter())
    quantizer = kind.__new__(kind)
    quantizer.group_size = 64
    weight, inputs = torch.randn(128, 256) ** 3, torch.randn(4, 300, 256) * (1 + torch.arange(256) % 7)
    same = (
        kind._compute_best_clip(quantizer, weight, inputs),
        AwqQuantizer._compute_best_clip(quantizer, weight, inputs),
    )
    assert same[0].shape == same[1].shape
    return float((same[0] == same[1]).float().mean())


def read_back(job):
    """The library's own reader on a written result: logits against the float reference."""
    import awq.models.base
    import awq.modules.linear.gemm
    from awq import AutoAWQForCausalLM

    from quantline.checkpoints.model_config import legacy_copy

    awq.models.base.get_best_device = lambda: "cpu:0"
    awq.modules.linear.gemm.TRITON_AVAILABLE = False
    work, _ = load(job)
    folder = legacy_copy(job["written"], work_folder(job))
    model = AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False, device_map={"": "cpu"})
    work.model = model.model
    return rms(work)


def work_folder(job):
    from pathlib import Path

    return Path(job["output"]) / "legacy"


def run(job, report):
    return {
        "plain_scaling_moves_logits": scale_only(job, mended=False),
        "mended_scaling_moves_logits": scale_only(job, mended=True),
        "one_sided": one_sided_groups(job),
        "plain_rms": plain_rms(job),
        "rounded_rms": rounded_rms(job),
        "clipping_agreement": clipping_agreement(job),
        "read_back_rms": read_back(job),
    }


if __name__ == "__main__":
    worker_main(run)
