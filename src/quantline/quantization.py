"""The quantize stage's work: choose the backend, refuse what its layers cannot take, run it, check what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantline.checkpoint import Checkpoint, quantization_of, quantized_layers
from quantline.errors import UserError, WorkerError
from quantline.jobs import JobResult
from quantline.lineage import TOOLCHAIN_OF

# Largest difference of a toolchain's float logits from the reference engine's, in units of the logits' standard
# deviation. Computed in float32, faithful toolchains came to 1e-5 on CPU and GPU; a misread rope_theta to 0.3 and more.
PROBE_TOLERANCE = 0.05
_NEVER_QUANTIZED = ("lm_head", "embed", "norm", "wte", "wpe", "router")

RunWorker = Callable[[str, str, dict[str, Any], str], JobResult]


@dataclass(frozen=True)
class Outcome:
    """What the stage reports: metrics, per-layer rows (as the backend gives them) and warnings."""

    metrics: dict[str, float]
    layers: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of the decoder's layers, from the headers alone."""
    checkpoint = Checkpoint.open(model)
    shapes = {}
    for name in checkpoint.names:
        shape = checkpoint.info(name).shape
        layer = name.removesuffix(".weight")
        if len(shape) == 2 and name.endswith(".weight") and not any(word in layer for word in _NEVER_QUANTIZED):
            shapes[layer] = (int(shape[0]), int(shape[1]))
    return shapes


def check_group_size(model: Path, group_size: int) -> None:
    """Refuse a group size that does not divide every linear's in-features.

    Raises:
        UserError: naming the layers, their width and the group sizes that would do.
    """
    if group_size == -1:
        return
    shapes = linear_shapes(model)
    bad = {layer: width for layer, (_, width) in shapes.items() if width % group_size}
    if bad:
        layer, width = next(iter(bad.items()))
        fits = [size for size in (32, 64, 128, 256) if all(wide % size == 0 for _, wide in shapes.values())]
        advice = f"group_size={' or '.join(map(str, fits))} divides them all" if fits else "try group_size=-1"
        raise UserError(
            f"group_size={group_size}: does not divide the in-features of {len(bad)} linears (first: {layer}, {width}); "
            f"{advice}"
        )


def quantize(
    *,
    method: Mapping[str, Any],
    bits: int,
    group_size: int,
    seed: int,
    threads: int,
    device: str,
    model: Path,
    probe: Path,
    calibration: Path | None,
    out: Path,
    run_worker: RunWorker,
) -> Outcome:
    """Quantize the checkpoint in `model` into the empty folder `out` and check the result.

    Raises:
        UserError: the model's layers and the options do not go together, or the backend refuses the model.
        WorkerError: the backend failed, or what it wrote is not what was asked for.
    """
    check_group_size(model, group_size)
    backend = str(method["backend"])
    job: dict[str, Any] = {
        "model": str(model),
        "output": str(out),
        "calibration": str(calibration) if calibration else None,
        "bits": bits,
        "group_size": group_size,
        "options": {key: value for key, value in method.items() if key not in ("name", "backend")},
        "seed": seed,
        "threads": threads,
        "device": device,
        "probe": str(probe),
        "probe_tolerance": PROBE_TOLERANCE,
    }
    toolchain = TOOLCHAIN_OF[backend]
    module = f"quantline.backends.{backend}"
    if toolchain is None:
        data = _run_here(module, job)
    else:
        data = run_worker(toolchain, module, job, f"quantize with {backend}").data
    check_output(out, bits, group_size, expected=len(linear_shapes(model)))
    return Outcome(data["metrics"], data.get("layers", []), data.get("warnings", []))


def _run_here(module: str, job: dict[str, Any]) -> dict[str, Any]:
    from importlib import import_module

    from quantline.jobs import JobError
    from quantline.progress import bar

    try:
        with bar(f"quantize with {module.rsplit('.', 1)[-1]}") as progress:
            return dict(import_module(module).run(job, progress.update))
    except JobError as error:
        raise UserError(str(error)) from error


def check_output(out: Path, bits: int, group_size: int, expected: int) -> None:
    """Refuse an output that is not what was asked for: other bits or groups, linears left out, files missing.

    Raises:
        WorkerError: naming the first such fault.
    """
    info = quantization_of(out)
    if info is None:
        raise WorkerError("the backend wrote no quantization_config: nothing was quantized")
    if (info.bits, info.group_size) != (bits, group_size):
        raise WorkerError(f"asked for {bits} bits in groups of {group_size}, got {info.bits} in {info.group_size}")
    linears = len(quantized_layers(Checkpoint.open(out), info))
    if linears == 0 or linears != expected:
        raise WorkerError(f"{linears} of {expected} linears were quantized; the backend skipped the others silently")
    for name in ("config.json", "tokenizer_config.json"):
        if not (out / name).is_file():
            raise WorkerError(f"the backend's output lacks {name}")
