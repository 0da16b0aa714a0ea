"""llm-compressor 0.14.0.1 as a worker (methods gptq, rtn, awq, fp8, fp4 and mxfp8), in the layouts of compressed-tensors.

The library's modifiers run in its own pipeline on a model that this worker loaded and verified; the library saves nothing.
Bits, groups and skips by linear are its `config_groups` and `ignore`. Differences from the library's defaults:

- Scales are rounded to float16, as they are stored, before anything is rounded with them (`scale_dtype`).
- If a Hessian cannot be inverted, the library rounds to nearest. Here the damping is raised tenfold, up to 1, with a
  warning; after that the layer is refused. See `llmcompressor_modifiers`.
- `library` replaces three things. `SequentialTracer.create_arg` rebuilds a config that a traced model reads, but without its
  attention implementation. Then no causal mask is made, and Mistral, Mixtral, Phi3, Qwen3-MoE and others are calibrated with
  attention to later tokens. Here the config stays the model's own. `IntermediatesCache` fails on such configs; here it
  passes them through. On a CPU its memory is not pinned, because pinning needs a GPU.

With activation_bits (W8A8, W4A8, W4AFP8), weights are quantized the same way, and the config tells the runtime to round the
inputs of each linear per token. Weights of floating-point codes are those of `llmcompressor_floats`. desc_act works within
fixed groups only: the library has no reordered groups.

With `gpus` above 1, gptq computes on that many GPUs, see `ranks`: each rank calibrates with its share of the samples. The
Hessians are added up, and each rank quantizes a part of the linears. Sums in another order give other last bits, so that the
weights depend on the number of GPUs. Other methods are refused: on CPUs, AWQ's ranks divided their shared weights twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.layouts.choice import compressed_tensors_of, float_scheme
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.quantizers import model, output, selection
from quantline.toolchains.workers.ranks import Team, team

if TYPE_CHECKING:
    from quantline.toolchains.workers.quantizers.llmcompressor_modifiers import Run

DEFAULTS: dict[str, dict[str, Any]] = {
    "gptq": {
        "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True, "static_groups": False,
        "activation_bits": None,
    },
    "rtn": {"sym": True, "activation_bits": None},
    "awq": {"zero_point": True, "version": "gemm", "clip": False},
    "fp8": {"scheme": "dynamic"}, "fp4": {"scheme": "nvfp4a16"}, "mxfp8": {"scheme": "mxfp8"},
}  # fmt: skip
BITS = (2, 3, 4, 8)
# Between the names of a linear and of its tensor, in the file that a rank leaves.
_OF = "\n"


def check(job: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Method and options. First refuses what the library would reject late or accept wrongly.

    Raises:
        JobError: method, bits, group sizes, or options that llm-compressor or the layouts do not support.
    """
    method = job.get("method", "gptq")
    if method not in DEFAULTS:
        raise JobError(f"method={method}: llmcompressor takes {', '.join(DEFAULTS)}")
    options = output.method_options(job, DEFAULTS[method], method)
    widths = {(width["bits"], width["group_size"]) for width in (job.get("linears") or {"": job}).values()}
    scheme = float_scheme(method, options)
    if "scheme" in options and (scheme is None or widths != {(scheme.bits, scheme.group_size)}):
        given = f"method={method} method.scheme={options['scheme']}"
        raise JobError(f"{given}: there is no such scheme with bits and groups {sorted(widths)}")
    for bits, size in widths:
        if bits not in BITS:
            raise JobError(f"bits={bits}: {method} takes {', '.join(map(str, BITS))}")
        if type(size) is not int or size == 0 or size < -1:
            raise JobError(f"group_size={size}: {method} takes -1 or a divisor of every width, such as 128")
    if method == "gptq" and not 0 < options["damp_percent"] < 1:
        raise JobError(
            f"method.damp_percent={options['damp_percent']}: gptq takes a number between 0 and 1, such as 0.01"
        )
    if options.get("desc_act") and not options["static_groups"] and any(size != -1 for _, size in widths):
        raise JobError(
            "method.desc_act=true with method.static_groups=false: llmcompressor reorders columns within fixed groups only; "
            "give method.static_groups=true, group_size=-1, or another backend"
        )
    if method == "awq" and options["clip"]:
        raise JobError(
            "method.clip=true: awq with llmcompressor has no search for a clipping range; give method.clip=false"
        )
    if method == "awq" and options["version"] != "gemm":
        raise JobError(
            f"method.version={options['version']}: llmcompressor always writes compressed-tensors; give gemm, or "
            "backend=autoawq"
        )
    if options.get("activation_bits") is not None:
        _check_activations(options, widths)
    if int(job.get("gpus") or 1) > 1 and method != "gptq":
        raise JobError(f"quantize.gpus={job['gpus']}: {method} by llmcompressor takes 1; give 1, or method=gptq")
    return method, options


def _check_activations(options: Mapping[str, Any], widths: set[tuple[int, int]]) -> None:
    rounded = options["activation_bits"]
    if rounded not in (8, "fp8"):
        raise JobError(f"method.activation_bits={rounded}: llmcompressor takes 8, fp8 or null")
    four = len(widths) == 1 and next(iter(widths))[0] == 4
    if not options["sym"] or not (four or (rounded == 8 and widths == {(8, -1)})):
        found = ", ".join(f"bits={bits} group_size={size}" for bits, size in sorted(widths))
        eight = "bits=8 group_size=-1 or bits=4" if rounded == 8 else "bits=4"
        raise JobError(
            f"method.activation_bits={rounded} with {found} method.sym={str(options['sym']).lower()}: kernels take {eight} "
            "with method.sym=true, all linears alike; give those, or method.activation_bits=null"
        )


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Quantize one model; see `quantline.toolchains.protocol` for job and result.

    Raises:
        JobError: the job cannot be done as given.
    """
    config = output.float_config(job["model"])
    method, options = check(job)
    with team(__spec__.name, job, Path(job["output"])) as ranks:
        model.start(job)
        ranks.connect(job["device"])
        return _run(job, report, config, (method, options), ranks)


def _run(
    job: dict[str, Any], report: Reporter, config: dict[str, Any], asked: tuple[str, dict[str, Any]], ranks: Team
) -> dict[str, Any]:
    from llmcompressor.modeling.moe.linearize import linearize_moe

    from quantline.toolchains.workers.quantizers import llmcompressor_modifiers as modifiers

    method, options = asked
    work = model.load(job, config, translate=False)
    if ranks.size > 1:
        from compressed_tensors.offload import from_accelerate

        from_accelerate(work.model)  # the weights that rank 0 has read, in memory that all ranks share
    linearize_moe(work.model)  # experts as separate linears, as in the files
    symmetric = not options["zero_point"] if method == "awq" else bool(options.get("sym", True))
    scheme = float_scheme(method, options)
    layout = compressed_tensors_of(options.get("activation_bits")) if scheme is None else scheme.layout
    state = modifiers.Run(work, report, options, symmetric, layout, team=ranks)
    _survey(state)
    started = time.perf_counter()
    with library(state):
        if scheme is None:
            modifiers.METHODS[method](state)
        else:
            from quantline.toolchains.workers.quantizers import llmcompressor_floats

            llmcompressor_floats.quantize(state, scheme)
    if ranks.rank:
        return _leave(state, ranks)
    for left in ranks.results():
        _take_over(state, left)
    if method == "gptq":
        modifiers.refuse_unreached(state)
    _clean(state)
    work.metrics["quantize_seconds"] = time.perf_counter() - started
    result = model.finish(work, state.wanted, state.settings())
    return {**result, "layers": state.rows}


def _leave(state: Run, ranks: Team) -> dict[str, Any]:
    """Write this rank's linears for rank 0; returns what goes with them."""
    assert ranks.folder is not None
    path = ranks.folder / f"packed.{ranks.rank}.safetensors"
    layers = state.work.packed.items()
    write_safetensors(path, {f"{name}{_OF}{key}": array for name, layer in layers for key, array in layer.items()})
    return {"packed": str(path), "rows": state.rows, "warnings": state.work.warnings}


def _take_over(state: Run, left: Mapping[str, Any]) -> None:
    """Add another rank's linears; the rows are in the order of the linears."""
    from safetensors.numpy import load_file

    from quantline.toolchains.workers.quantizers import llmcompressor_modifiers as modifiers

    for key, array in load_file(left["packed"]).items():
        name, _, own = key.partition(_OF)
        state.work.packed.setdefault(name, {})[own] = array
    order = {tuple(modifiers.place(name).values()): number for number, name in enumerate(state.wanted)}
    state.rows = sorted([*state.rows, *left["rows"]], key=lambda row: order.get((row["layer"], row["module"]), 0))
    state.work.warnings += [warning for warning in left["warnings"] if warning not in state.work.warnings]


def _survey(state: Run) -> None:
    """Find the linears to quantize and the matrices that stay float; refuse shapes that do not fit the groups."""
    from torch import nn

    work = state.work
    found = {}
    for path, module in work.model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            state.paths[work.renamed(path)] = path
            found[work.renamed(path)] = module
    linears = {name: module for name, module in found.items() if isinstance(module, nn.Linear)}
    if "linears" not in work.job:
        linears = {name: module for name, module in linears.items() if re.search(r"\.\d+\.", name)}
    state.wanted = selection.chosen(work.job, linears)
    state.floats = [name for name in found if name not in state.wanted]
    selection.check_selection(work.job, state.wanted, state.layout)


@contextmanager
def library(state: Run) -> Iterator[None]:
    """Apply the replacements named above, undone on exit; errors of the library name the current layer."""
    from llmcompressor.core import reset_session
    from llmcompressor.pipelines.cache import IntermediatesCache, IntermediateValue
    from llmcompressor.pipelines.sequential.helpers import SequentialTracer
    from transformers import PretrainedConfig

    offload, onload = IntermediatesCache._offload_value.__func__, IntermediatesCache._onload_value.__func__
    create = SequentialTracer.create_arg

    def stored(cls: Any, value: Any, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(value, PretrainedConfig):
            return IntermediateValue(value=value, device=None)
        return offload(cls, value, *arguments, **keywords)

    def fetched(cls: Any, entry: Any) -> Any:
        return entry.value if isinstance(entry.value, PretrainedConfig) else onload(cls, entry)

    def traced(tracer: Any, value: Any) -> Any:
        if isinstance(value, PretrainedConfig):
            return tracer.create_node("call_function", lambda: value, (), {})
        return create(tracer, value)

    replaced: list[tuple[Any, str, Any]] = [
        (IntermediatesCache, "_offload_value", classmethod(stored)),
        (IntermediatesCache, "_onload_value", classmethod(fetched)),
        (SequentialTracer, "create_arg", traced),
    ]
    if state.work.device == "cpu":
        replaced.append((IntermediatesCache, "pin_memory", lambda *_: None))
    try:
        with model.replaced(replaced):
            yield
    except (JobError, MemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"{state.current}: {type(error).__name__}: {error}") from error
    finally:
        reset_session()


def _clean(state: Run) -> None:
    """Remove the library's parameters and wrappers, which leaves a plain model with rounded weights."""
    from compressed_tensors.offload import remove_dispatch
    from compressed_tensors.quantization import disable_quantization

    remove_dispatch(state.work.model)
    state.work.model.apply(disable_quantization)
    for module in state.wanted.values():
        for name in [name for name in module._parameters if name not in ("weight", "bias")]:
            del module._parameters[name]


if __name__ == "__main__":
    worker_main(run)
