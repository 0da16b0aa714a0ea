"""The quantize stage's work: choose the backend, check the layers' shapes, run it, check its output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers
from quantline.checkpoints.layouts import LAYOUTS
from quantline.checkpoints.layouts.choice import own_width, own_widths
from quantline.checkpoints.layouts.linear_spec import LM_HEAD, LinearSpec
from quantline.checkpoints.linears import inventory, numbered, select_linears
from quantline.checkpoints.model_config import ties_head
from quantline.core.errors import UserError, WorkerError
from quantline.core.files import read_json
from quantline.quantization.capabilities import Requirements, calibrated, choose, toolchain_of
from quantline.toolchains.protocol import JobResult

# Largest difference of a toolchain's float logits from the reference engine's, in units of the logits' standard
# deviation. Computed in float32, correct toolchains differed by 1e-5 on CPU and GPU, a misread rope_theta by 0.3 or more.
PROBE_TOLERANCE = 0.05

RunWorker = Callable[[str, str, dict[str, Any], str], JobResult]


@dataclass(frozen=True)
class Request:
    """What to quantize, and how: the options of a variant that this stage reads.

    backend: a name, or auto. order: the backends that auto tries, the preferred one first. rules: exceptions by name, see
    `select_linears`.
    """

    method: Mapping[str, Any]
    bits: int
    group_size: int
    backend: str
    order: Sequence[str]
    requirements: Requirements
    rules: Sequence[Mapping[str, Any]] = ()
    seed: int = 0
    threads: int = 2
    device: str = "cpu"

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options that are set; null means not set, and so do values that every backend has."""
        unset = (("solver", "gptq"), ("grid", "absmax"))
        found = {key: value for key, value in self.method.items() if key != "name" and value is not None}
        return {key: value for key, value in found.items() if (key, value) not in unset}


@dataclass(frozen=True)
class Outcome:
    """What the stage reports: the backend, metrics, per-layer rows (as the backend gives them) and warnings."""

    backend: str
    metrics: dict[str, float]
    layers: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    linears: Mapping[str, LinearSpec] = field(default_factory=dict)


def check_group_size(shapes: Mapping[str, tuple[int, int]], widths: Mapping[str, LinearSpec]) -> None:
    """Refuse a group size that does not divide a linear's in-features.

    Args:
        shapes: (in_features, out_features) by name.
        widths: the requested bits and group sizes, by name.

    Raises:
        UserError: with the layers, their widths and the group sizes that fit.
    """
    bad = {
        name: (shapes[name][0], width.group_size) for name, width in widths.items()
        if name in shapes and width.group_size > 0 and shapes[name][0] % width.group_size
    }  # fmt: skip
    if bad:
        layer, (wide, size) = next(iter(bad.items()))
        fits = [size for size in (32, 64, 128, 256) if all(shapes[name][0] % size == 0 for name in widths)]
        advice = f"group_size={' or '.join(map(str, fits))} divides them all" if fits else "try group_size=-1"
        raise UserError(
            f"group_size={size}: does not divide the in-features of {len(bad)} linears (first: {layer}, {wide}); {advice}"
        )


def quantize(
    request: Request, *, model: Path, probe: Path, calibration: Path, out: Path, work: Path, run_worker: RunWorker
) -> Outcome:
    """Quantize the checkpoint in `model` into the empty folder `out` and check the result.

    Args:
        request: what to quantize, and how.
        model: folder of the float model.
        probe: the reference engine's logits on a few tokens.
        calibration: token ids.
        out: an empty folder.
        work: a folder for a backend's own files, kept after a crash.
        run_worker: (toolchain, module, job, label) -> its result.

    Raises:
        UserError: the options do not fit the model's layers, or no backend supports the model.
        WorkerError: the backend failed, or its output is not what was requested.
    """
    checkpoint, config = Checkpoint.open(model), read_json(model / "config.json")
    backend, notes = choose(request.backend, request.order, request.requirements, config)
    method = str(request.method["name"])
    widths = select_linears(
        checkpoint, config, bits=request.bits, group_size=request.group_size, rules=request.rules,
        lm_head=request.requirements.lm_head,
    )  # fmt: skip
    stock = inventory(checkpoint, config)
    notes += [stock.note] if stock.note else []
    widths = with_own_types(method, request.options, checkpoint, config, widths)[0]
    grouped = not (method == "bnb" and request.bits == 8)
    if grouped and own_width(method, request.options) is None:
        check_group_size(stock.linears, widths)
    job: dict[str, Any] = {
        "model": str(model),
        "output": str(out),
        "calibration": str(calibration) if calibrated(method, request.options) else None,
        "method": method,
        "bits": request.bits,
        "group_size": request.group_size,
        "linears": {name: plain(width) for name, width in widths.items()},
        "options": request.options,
        "seed": request.seed,
        "threads": request.threads,
        "device": request.device,
        "dtype": request.requirements.dtype,
        "low_memory": request.requirements.low_memory,
        "gpus": request.requirements.gpus,
        "work": str(work),
        "probe": str(probe),
        "probe_tolerance": PROBE_TOLERANCE,
    }
    toolchain, module = toolchain_of(backend), f"quantline.toolchains.workers.quantizers.{backend}"
    if toolchain is None:
        data = _run_here(module, job)
    else:
        data = run_worker(toolchain, module, job, f"quantize with {backend}").data
    check_output(out, widths, groups=grouped)
    return Outcome(backend, data["metrics"], data.get("layers", []), [*notes, *data.get("warnings", [])], widths)


def plain(width: LinearSpec) -> dict[str, Any]:
    """A width in a job; of a type only where it has one."""
    return {key: value for key, value in asdict(width).items() if (key, value) != ("kind", "")}


def with_own_types(
    method: str,
    options: Mapping[str, Any],
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    widths: dict[str, LinearSpec],
) -> tuple[dict[str, LinearSpec], dict[str, LinearSpec]]:
    """The widths of a method that decides about every linear by itself, and those of all modules; others' as they are.

    Args:
        method, options: of the variant.
        checkpoint, config: of the float model.
        widths: of the linears that should be quantized.
    """
    shapes = {
        name.removesuffix(".weight"): checkpoint.info(name).shape for name in checkpoint.names
        if name.endswith(".weight") and not (name == f"{LM_HEAD}.weight" and ties_head(config))
    }  # fmt: skip
    own = own_widths(method, options, shapes, config)
    if own is None:
        return widths, widths
    return {name: own[name] for name in widths if name in own}, own


def _run_here(module: str, job: dict[str, Any]) -> dict[str, Any]:
    from importlib import import_module

    from quantline.core.progress import bar
    from quantline.toolchains.protocol import JobError

    try:
        with bar(f"quantize with {module.rsplit('.', 1)[-1]}") as progress:
            return dict(import_module(module).run(job, progress.update))
    except JobError as error:
        raise UserError(str(error)) from error


def check_output(out: Path, widths: Mapping[str, LinearSpec], *, groups: bool = True) -> None:
    """Refuse an output that is not what was requested: other bits or groups, linears left out, files missing.

    Args:
        out: the backend's output.
        widths: the requested bits and group sizes, by name.
        groups: whether the method has groups.

    Raises:
        WorkerError: with the first such fault.
    """
    info = quantization_of(out)
    if info is None:
        raise WorkerError("the backend wrote no quantization_config: nothing was quantized")
    found = set(quantized_layers(Checkpoint.open(out), info))
    missing = [name for name in widths if name not in found]
    if missing or not found:
        kinds = Counter(name.rpartition(".")[2] for name in missing)
        raise WorkerError(
            f"{len(missing)} of {len(widths)} linears were silently left in float ({_counted(kinds)}); first: "
            f"{missing[0] if missing else 'all'}"
        )
    extra = sorted(name for name in found - set(widths) if not LAYOUTS[info.layout].whole or numbered(name))
    if extra:
        raise WorkerError(f"{extra[0]} was quantized but should have stayed float ({len(extra)} such linears)")
    for name, width in widths.items():
        actual = info.of(name)
        if actual.bits != width.bits or (groups and actual.group_size != width.group_size):
            raise WorkerError(
                f"{name}: requested {width.bits} bits in groups of {width.group_size}, "
                f"got {actual.bits} in {actual.group_size}"
            )
    for name in ("config.json", "tokenizer_config.json"):
        if not (out / name).is_file():
            raise WorkerError(f"the backend's output has no {name}")


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
