"""Shared code of the workers on torch and transformers: start, load, verify the model, write, verify the result.

Runs in a toolchain's interpreter. torch is imported inside functions, because `start` must set the environment first.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.layouts import AffineLinear
from quantline.checkpoints.layouts.affine import sequential_groups
from quantline.checkpoints.model_config import legacy_copy, misread_values
from quantline.core.errors import naming
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.quantizers import output as _output
from quantline.toolchains.workers.quantizers.legacy_headers import said_to_be_torch
from quantline.toolchains.workers.quantizers.selection import file_name, width_of
from quantline.toolchains.workers.reference.skeleton import attention_of


@dataclass
class Work:
    """One running quantize job.

    model: the transformers model, on the CPU. config: the source's config.json. calibration: int32 (samples, length).
    probe_ids: int32 (n, t). probe_logits: float32 (n, t, vocab), of the reference engine. packed: layer -> its tensors.
    renamed: name of a tensor in memory -> its name in the files.
    """

    job: Mapping[str, Any]
    config: dict[str, Any]
    model: Any
    calibration: NDArray[np.int32]
    probe_ids: NDArray[np.int32]
    probe_logits: NDArray[np.float32]
    metrics: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    packed: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    renamed: Callable[[str], str] = str

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return str(self.job["device"])

    def width(self, layer: str) -> tuple[int, int]:
        """The requested bits and group size of a linear."""
        return width_of(self.job, layer)


def samples(work: Work) -> list[dict[str, Any]]:
    """The calibration in the libraries' form: per sample, `input_ids` and `attention_mask`, int64 (1, length)."""
    import torch

    ids = torch.from_numpy(work.calibration.astype("int64"))
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]


@contextmanager
def replaced(values: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Inside the block, replace attributes of modules and classes, given as (owner, name, value)."""
    values = list(values)
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


def note_unmasked(work: Work, groups: int) -> None:
    """Warn about `groups` groups with the zero point 0, in a layout that stores it minus 1."""
    if groups:
        work.warnings.append(
            f"{groups} groups have the zero point 0, stored masked; readers that add 1 without masking misread "
            "them (convert to gptq_v2 for those)"
        )


def start(job: Mapping[str, Any]) -> None:
    """Set devices, threads and seeds. Call this before anything imports torch.

    On `cpu` the GPUs are hidden, because the libraries use one if they see it. On `cuda` only the job's `gpus` are visible,
    by default one, because AutoAWQ would spread the layers over all of them.

    Raises:
        JobError: a device that does not exist.
    """
    device = job["device"]
    if device not in ("cpu", "cuda"):
        raise JobError(f"device={device!r}: use cpu or cuda")
    gpus = int(job.get("gpus") or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[:gpus]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible) if device == "cuda" else ""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise JobError(
            "device=cuda: torch sees no GPU in this toolchain; use device=cpu or a CUDA build of the toolchain"
        )
    if device == "cuda" and torch.cuda.device_count() < gpus:
        raise JobError(f"quantize.gpus={gpus}: torch sees {torch.cuda.device_count()} in this toolchain; give as many")
    torch.set_num_threads(int(job["threads"]))
    torch.use_deterministic_algorithms(True, warn_only=True)
    seed = int(job["seed"])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def load(job: Mapping[str, Any], config: dict[str, Any], *, translate: bool = True) -> Work:
    """Read calibration, probe and float model, and check that the model's logits match the reference engine's.

    Under dtype=auto: float32 on the CPU (twice as fast there as float16, and exact for bfloat16 sources), float16 on a
    GPU. A rank other than 0 gets the model without its weights, and checks nothing. `translate`: the library uses
    transformers 4 and gets a config.json translated to it; False for 5.

    Raises:
        JobError: weights are missing or not finite, or the model's logits differ from the reference.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    # The path is None for a method without calibration.
    calibration = _tensors(job["calibration"])["input_ids"] if job["calibration"] else np.zeros((0, 0), dtype=np.int32)
    probe = _tensors(job["probe"])
    if calibration.ndim != 2 or (job["calibration"] and not calibration.size):
        raise JobError(f"{job['calibration']}: input_ids has shape {calibration.shape}; it must be (samples, length)")
    dtype = torch.float32 if job["device"] == "cpu" else torch.float16
    if job.get("dtype", "auto") != "auto":
        dtype = getattr(torch, job["dtype"])
    with (
        tempfile.TemporaryDirectory(prefix="quantline-model-") as scratch,
        _output.refusals(),
        naming(Path(scratch), str(job["model"])),
        replaced(said_to_be_torch(transformers.modeling_utils) if translate else ()),
    ):
        folder = legacy_copy(job["model"], Path(scratch)) if translate else Path(job["model"])
        settings: dict[str, Any] = {"torch_dtype" if translate else "dtype": dtype}
        if job.get("rank"):  # the library shares the weights that rank 0 has read
            settings["device_map"] = "meta"
        config_read = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, **settings, attn_implementation=attention_of(config_read), trust_remote_code=False,
            use_safetensors=True, local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    model.eval()
    model.config.use_cache = False  # AutoAWQ would pass one growing cache from forward to forward
    missing = sorted(set(info["missing_keys"]) - set(model._tied_weights_keys or ()))
    if missing or info["mismatched_keys"]:
        names = missing or [entry[0] for entry in info["mismatched_keys"]]
        raise JobError(
            f"{job['model']} lacks {len(names)} tensors that the model needs ({names[0]}); download it again"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            fits = "use dtype=bfloat16, or device=cpu if the backend takes float16 only"
            remedy = fits if dtype == torch.float16 else "the weights are damaged: run download again"
            raise JobError(f"{name} has infinities or NaN in {dtype}; {remedy}")
    work = Work(job, config, model, calibration, probe["input_ids"], probe["logits"], {})
    if not translate:  # transformers 5 renames in memory
        work.renamed = lambda name: file_name(name, config["model_type"])
    if info["unexpected_keys"]:
        work.warnings.append(f"left out as not part of the model: {', '.join(sorted(info['unexpected_keys']))}")
    if not job.get("rank"):
        _check_probe(work)
    work.metrics["load_seconds"] = time.perf_counter() - started
    work.metrics["calibration_tokens"] = int(calibration.size)
    return work


def _check_probe(work: Work) -> None:
    import transformers

    measured = np.abs(probe_logits(work) - work.probe_logits).max() / work.probe_logits.std()
    tolerance = float(work.job["probe_tolerance"])
    work.metrics["probe_max_difference"] = float(measured)
    if measured <= tolerance:  # false for NaN as well
        return
    old = int(transformers.__version__.split(".")[0]) < 5
    faults = misread_values(work.config, work.model.config.to_dict()) if old else []
    cause = f"likely cause: {'; '.join(faults[:4])}" if faults else "config.json was read as written"
    raise JobError(
        f"this toolchain misreads the model: before quantizing, its logits differ from the reference engine's by "
        f"{measured:.3g} standard deviations, allowed are {tolerance:g} (transformers "
        f"{transformers.__version__}); {cause}; use another backend or method, such as method=rtn, "
        "or make the probe again if it is from another version of the model"
    )


def probe_logits(work: Work) -> NDArray[np.float32]:
    """float32 (n, t, vocab): the model's logits on the probe, computed in float32 on the job's device.

    In float16, rounding alone moved a logit by 0.02 standard deviations with 5 layers and by 0.054 with 32, so a correct
    model would look misread. One sample is computed at a time, so that memory does not grow with the probe.
    """
    import torch

    rows = []
    with torch.no_grad(), widened(work.model, work.device):
        for row in work.probe_ids:
            ids = torch.from_numpy(row.astype(np.int64))[None].to(work.device)
            rows.append(work.model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy())
    return np.stack(rows)


@contextmanager
def widened(model: Any, device: str) -> Iterator[None]:
    """Inside the block, each module's own tensors are moved to `device` in float32 while it computes, then moved back.

    So the device holds one module at a time, and a float16 model is computed in float32 without a copy of the whole model.
    """
    import torch

    originals: dict[Any, list[tuple[Any, Any]]] = {}

    def before(module: Any, _arguments: Any) -> None:
        tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
        originals[module] = [(tensor, tensor.data) for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    def after(module: Any, _arguments: Any, _output: Any) -> None:
        for tensor, data in originals.pop(module):
            tensor.data = data

    hooks = [hook for module in model.modules() for hook in (
        module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True),
    )]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(path: str) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load_file

    tensors: dict[str, NDArray[Any]] = load_file(path)
    return tensors


@dataclass(frozen=True)
class LayerArrays:
    """One quantized layer as torch tensors.

    Attributes:
        codes: (out, in), integral.
        scales, zeros: (out, groups); scales have float16 values.
        bias: (out,) or None.
        group_index: (in,); None means groups of consecutive columns.
    """

    codes: Any
    scales: Any
    zeros: Any
    bias: Any
    group_index: Any = None


def add_layer(work: Work, name: str, layout: str, layer: LayerArrays, *, zero_points: bool | None = None) -> None:
    """Pack one quantized layer.

    Args:
        zero_points: whether to write them, if the layout (compressed_tensors) can omit them; None omits them if all are
            the middle one.

    Raises:
        JobError: the layout cannot represent it; nothing is clamped.
    """
    bits, group_size = work.width(name)
    values = {"codes": _numpy(layer.codes), "zeros": _numpy(layer.zeros)}
    for what, array in values.items():
        if not ((array == np.rint(array)) & (array >= 0) & (array < 2**bits)).all():
            raise JobError(
                f"{name}: {what} exceed [0, {2**bits - 1}], so {bits} bits cannot represent this layer; "
                "use method.sym=true, more bits, or method=rtn"
            )
    consecutive = layer.group_index is None
    index = sequential_groups(layer.codes.shape[1], group_size) if consecutive else _numpy(layer.group_index)
    with _output.refusals():
        linear = AffineLinear(
            codes=np.ascontiguousarray(values["codes"].T.astype(np.uint8)),
            scales=np.ascontiguousarray(_output.half(f"{name}.scales", _numpy(layer.scales)).T),
            zeros=np.ascontiguousarray(values["zeros"].T.astype(np.int16)),
            group_index=index.astype(np.int32),
            bits=bits,
            group_size=group_size,
            bias=None if layer.bias is None else _output.half(f"{name}.bias", _numpy(layer.bias)),
        )
    work.packed[name] = _output.pack(name, linear, layout, zero_points)


def finish(work: Work, expected: Iterable[str], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Write the result and verify it. The model in memory has the dequantized weights.

    Raises:
        JobError: nothing was quantized, or a value does not fit float16.
        RuntimeError: the written weights differ from the computed ones.
    """
    output, source = Path(work.job["output"]), Path(work.job["model"])
    expected = list(expected)
    left = [name for name in expected if name not in work.packed]
    work.metrics.update(linears_quantized=len(work.packed), linears_expected=len(expected))
    if not work.packed:
        raise JobError(f"none of {len(expected)} linear layers was quantized; use another backend for this model")
    if left:
        work.warnings.append(f"left in float16: {', '.join(left)}")
    difference = probe_logits(work) - work.probe_logits
    work.metrics["probe_quantized_rms"] = float(np.sqrt(np.mean(difference**2)) / work.probe_logits.std())
    _output.write_weights(output, _result_tensors(work))
    _output.write_configs(source, output, work.config, quantization)
    _verify(work, output)
    return {"metrics": work.metrics, "layers": [], "warnings": work.warnings}


def _state(work: Work) -> dict[str, Any]:
    """The model's tensors, without those that are only a second name of another."""
    state = dict(work.model.state_dict())
    if work.model.config.tie_word_embeddings:
        for name in work.model._tied_weights_keys or ():
            state.pop(name, None)
    return {work.renamed(name): tensor for name, tensor in state.items()}


def _result_tensors(work: Work) -> Iterator[_output.Named]:
    for name, tensor in _state(work).items():
        layer, _, suffix = name.rpartition(".")
        if layer not in work.packed:
            yield name, _output.half(name, _numpy(tensor))
        elif suffix == "weight":  # a bias is among the packed tensors
            yield from work.packed[layer].items()


def _verify(work: Work, output: Path) -> None:
    state = _state(work)
    largest = 0.0
    for name, written, quantized in _output.verify(output, work.packed):
        tensor = state.pop(name)
        # In a 16-bit model each weight is rounded once more than in the file.
        unit = {"torch.float16": 2.0**-11, "torch.bfloat16": 2.0**-8}.get(str(tensor.dtype), 0.0)
        computed = _numpy(tensor).astype(np.float32)
        error = np.abs(written - computed)
        if quantized:
            largest = max(largest, float(error.max()))
        allowed = np.abs(computed) * (unit if quantized else 2.0**-11) + 2.0**-24
        if not (error <= allowed).all():
            raise RuntimeError(f"{name} was written wrong: it differs from the computed weight by {error.max():.3g}")
    if state:
        raise RuntimeError(f"tensors were not written: {', '.join(sorted(state))}")
    work.metrics["written_max_difference"] = largest


def _numpy(tensor: Any) -> NDArray[Any]:
    import torch

    tensor = tensor.detach().cpu()
    array: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
