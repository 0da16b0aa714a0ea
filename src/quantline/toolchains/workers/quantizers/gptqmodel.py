"""GPTQModel 7.6.0 as a worker (methods gptq and awq): the library rounds, `quantline.checkpoints.layouts` packs.

The library's own classes run on a model that this worker loaded and verified, not on one from the library's loader. Its
packing is not used: codes, scales, zero points and group indexes are taken when a linear is done. So nothing is compiled at
run time. Other differences:

- `act_group_aware` is off with static_groups (the groups would be in the wrong order) and without groups (it fails).
- If a task fails, the library's worker thread silently ends the whole process. Here the error is raised.
- `prepare_dataset`: the calibration's tokens are passed unchanged; the library would trim them to the model's length.

The fixes of the methods themselves are in `gptqmodel_gptq` and `gptqmodel_awq`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

from quantline.checkpoints.layouts import LAYOUTS
from quantline.checkpoints.layouts.awq import MADE
from quantline.checkpoints.layouts.linear_spec import LM_HEAD
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.quantizers import model as _common
from quantline.toolchains.workers.quantizers import output, rounding, selection
from quantline.toolchains.workers.quantizers.resume_layers import LayerStore

DEFAULTS: dict[str, dict[str, Any]] = {
    "gptq": {
        "damp_percent": 0.05, "desc_act": False, "sym": True, "true_sequential": True, "static_groups": False,
        "activation_bits": None, "solver": "gptq",
    },
    "awq": {"zero_point": True, "version": "gemm", "clip": True},
}  # fmt: skip
SOLVERS = ("gptq", "gptaq", "foem")
BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
# exllama is a choice of kernels at loading time; its weights are stored as gemm.


@dataclass
class Run:
    """One quantize job inside the library: its parameters and its results.

    layout: key in `layouts.LAYOUTS`. store: finished layers, including those of an earlier run. wanted: linears to quantize,
    name in the files -> module. rows: one per linear. notes: linear -> how the library deviated from the job.
    unmasked: number of groups with the zero point 0 in a layout that stores it minus 1.
    """

    work: _common.Work
    report: Reporter
    options: Mapping[str, Any]
    layout: str
    store: LayerStore
    wanted: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    unmasked: int = 0
    lock: Any = field(default_factory=Lock)

    def done(self, name: str, row: dict[str, Any], arrays: _common.LayerArrays) -> None:
        """Add a quantized linear; `name` as in the files."""
        _common.add_layer(self.work, name, self.layout, arrays)
        if LAYOUTS[self.layout].zero_hazard:
            with self.lock:
                self.unmasked += int((arrays.zeros == 0).sum())
        found = re.search(r"\.(\d+)\.(.+)$", name)
        where = {"layer": int(found[1]), "module": found[2]} if found else {"layer": -1, "module": name}
        self.add_packed(name, {**where, **row}, self.work.packed[name])

    def add_packed(self, name: str, row: Mapping[str, Any], packed: dict[str, Any]) -> None:
        """Add a packed linear, perhaps of an earlier run. packed: its tensors by full name."""
        with self.lock:
            self.work.packed[name] = packed
            self.rows[name] = dict(row)
            self.report(len(self.rows), len(self.wanted), name)


def check(job: Mapping[str, Any]) -> dict[str, Any]:
    """The job's options. First refuses what the library would reject late or accept wrongly.

    Raises:
        JobError: method, bits, group size or options that GPTQModel does not support.
    """
    method = job.get("method", "gptq")
    if method not in DEFAULTS:
        raise JobError(f"method={method}: gptqmodel takes {' or '.join(DEFAULTS)}")
    options = output.method_options(job, DEFAULTS[method], method)
    widths = {(job["bits"], job["group_size"])}
    widths |= {(width["bits"], width["group_size"]) for width in (job.get("linears") or {}).values()}
    for bits, size in widths:
        if bits not in BITS[method]:
            raise JobError(f"bits={bits}: {method} takes {', '.join(map(str, BITS[method]))}")
        if type(size) is not int or size == 0 or size < -1 or (method == "awq" and size < 8):
            allowed = "32, 64 or 128 (or another divisor" if method == "awq" else "-1 or a divisor (such as 128"
            raise JobError(f"group_size={size}: {method} takes {allowed} of every width)")
    if method == "gptq" and not 0 < options["damp_percent"] < 1:
        raise JobError(
            f"method.damp_percent={options['damp_percent']}: gptq takes a number between 0 and 1, such as 0.05"
        )
    if options.get("activation_bits") is not None:
        raise JobError(f"method.activation_bits={options['activation_bits']}: gptqmodel rounds weights only; give null")
    if method == "gptq" and options["solver"] not in SOLVERS:
        raise JobError(f"method.solver={options['solver']}: gptqmodel takes {', '.join(SOLVERS)}")
    if method == "gptq" and options["static_groups"] and any(size == -1 for _, size in widths):
        raise JobError(
            "method.static_groups=true with group_size=-1: there are no groups; give method.static_groups=false"
        )
    if method == "awq":
        options["version"] = str(options["version"]).lower()
        if options["version"] not in MADE:
            raise JobError(f"method.version={options['version']}: awq takes {', '.join(MADE)}")
        if LM_HEAD in (job.get("linears") or {}):
            raise JobError("lm_head=quantized: awq with gptqmodel leaves the output layer float; use method=gptq")
        if len(widths) > 1:
            raise JobError("awq with gptqmodel has one group size for all linears; give one, or use method=gptq")
    if job.get("low_memory"):
        raise JobError("low_memory=true: gptqmodel holds the whole model in main memory; give low_memory=false")
    return options


def environment(scratch: Path) -> None:
    """Set the library's environment variables. Call this before importing it.

    With two CPUs or fewer, the library starts one worker thread by default, and then fails because it needs two.
    """
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    os.environ["GPTQMODEL_TORCH_EXTENSIONS_DIR"] = str(scratch / "extensions")


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Quantize one model; see `quantline.toolchains.protocol` for job and result.

    Raises:
        JobError: the job cannot be done as given.
    """
    config = output.float_config(job["model"])
    options = check(job)
    method = job.get("method", "gptq")
    with TemporaryDirectory(prefix="quantline-gptqmodel-") as scratch:
        environment(Path(scratch))
        _common.start(job)
        import defuser
        from gptqmodel.models.auto import MODEL_MAP

        # Split experts into separate linears before the probe, which then also shows that splitting changes nothing.
        defuser.replace_fused_blocks(config["model_type"])
        work = _common.load(job, config, translate=False)
        layout = MADE[options["version"]] if method == "awq" else "gptq"
        versions = " ".join(f"{name} {metadata.version(name)}" for name in ("gptqmodel", "torch", "transformers"))
        state = Run(work, report, options, layout, LayerStore.of(job, versions))
        model = MODEL_MAP[config["model_type"]](
            work.model, quantized=False, quantize_config=settings(job, options), model_local_path=job["model"]
        )
        found, linears = linears_of(model, work)
        state.wanted = selection.chosen(job, found)
        skipped = [name for name in found if name not in state.wanted]
        selection.check_selection(job, state.wanted, layout)
        started = time.perf_counter()
        names = {work.renamed(name): name for name, _ in work.model.named_modules()}
        model.quantize_config.lm_head = LM_HEAD in state.wanted
        model.quantize_config.dynamic = dynamic(state, found, names) if method == "gptq" else None
        with library(state, Path(scratch)):
            _quantize(state, model)
        if left := [name for name in state.wanted if name not in work.packed]:
            raise JobError(
                f"the library left {left[0]} and {len(left) - 1} other linears in float; skip them (layers.rules), "
                "or use another backend"
            )
        work.metrics["quantize_seconds"] = time.perf_counter() - started
    work.warnings += [f"{name}: {note}" for name, note in sorted(state.notes.items())]
    _common.note_unmasked(work, state.unmasked)
    quantization = _quantization(job, options, state, skipped)
    if state.store.found:
        work.warnings.append(
            f"resumed an interrupted run: {state.store.found} {'decoder layers' if method == 'awq' else 'linears'} were done"
        )
    # If the job has no list of linears, those that the library does not know are reported.
    result = _common.finish(work, state.wanted if "linears" in job else linears, quantization)
    state.store.clear()
    return {**result, "layers": [state.rows[name] for name in found if name in state.rows]}


def settings(job: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The library's configuration for a job."""
    from gptqmodel.models._const import DEVICE
    from gptqmodel.quantization import METHOD, QuantizeConfig
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig

    common = {
        "bits": job["bits"], "group_size": job["group_size"], "offload_to_disk": False, "device": DEVICE(job["device"]),
        "pack_impl": "original",
    }  # fmt: skip
    if job.get("method") == "awq":
        return QuantizeConfig(method=METHOD.AWQ, sym=not options["zero_point"], **common)
    gptq_options = {
        key: options[key] for key in ("damp_percent", "desc_act", "sym", "true_sequential", "static_groups")
    }
    by_groups = job["group_size"] != -1 and not options["desc_act"] and not options["static_groups"]
    solvers = {"gptq": {}, "gptaq": {"gptaq": GPTAQConfig()}, "foem": {"foem": FOEMConfig()}}
    solver = solvers[options["solver"]]
    return QuantizeConfig(method=METHOD.GPTQ, act_group_aware=by_groups, **gptq_options, **solver, **common)


def linears_of(model: Any, work: _common.Work) -> tuple[dict[str, Any], dict[str, Any]]:
    """The linears that the library quantizes, and all linears of the decoder, by their names in the files."""
    from torch import nn

    modules = dict(work.model.named_modules())
    prefixes = [name for name in model.extract_layers_node() if name in modules]
    linears = selection.linears_inside(
        (f"{prefix}.{number}", layer) for prefix in prefixes for number, layer in enumerate(modules[prefix])
    )
    groups = model.full_layer_modules(model_config=work.model.config, is_awq_quantize=False)
    known = {name.split(":", 1)[0] for group in groups for name in group if ":!" not in name}
    inside = re.compile(rf"(?:{'|'.join(map(re.escape, prefixes))})\.\d+\.(.+)$")
    found = {name: module for name, module in linears.items() if (m := inside.match(name)) and m[1] in known}
    head = modules.get(model.lm_head) if model.lm_head else None
    if (
        isinstance(head, nn.Linear)
        and not work.model.config.tie_word_embeddings
        and model.lm_head in (work.job.get("linears") or {})
    ):
        found[model.lm_head] = head
    return (
        {work.renamed(name): module for name, module in found.items()},
        {work.renamed(name): module for name, module in linears.items()},
    )


def dynamic(state: Run, found: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The library's rules by name: for linears with other bits or groups than the job's, and for those that stay float.

    Args:
        state: the running job.
        found: linears that the library would quantize, by name in the files.
        names: name in the files -> name in memory.
    """
    rules: dict[str, dict[str, Any]] = {}
    options, main = state.options, (state.work.job["bits"], state.work.job["group_size"])
    for name in found:
        pattern = f"^{re.escape(names[name])}$"
        if name not in state.wanted:
            rules[f"-:{pattern}"] = {}
            continue
        bits, size = state.work.width(name)
        if (bits, size) != main or name == LM_HEAD:
            by_groups = size != -1 and not options["desc_act"] and not options["static_groups"]
            rules[f"+:{pattern}"] = {"bits": bits, "group_size": size, "act_group_aware": by_groups}
    return rules


def _quantize(state: Run, model: Any) -> None:
    from gptqmodel import BACKEND

    awq = state.work.job.get("method") == "awq"
    examples = _common.samples(state.work)
    model.prepare_dataset = lambda **_: examples
    try:
        model.quantize(
            examples, calibration_sort=None, batch_size=1, backend=BACKEND.AWQ_TORCH if awq else BACKEND.AUTO
        )
    except JobError:
        raise
    except Exception as error:
        at = f" (after {len(state.rows)} of {len(state.wanted)} linears)"
        raise RuntimeError(f"{type(error).__name__}: {error}{at}") from error


@contextmanager
def library(state: Run, scratch: Path) -> Iterator[None]:
    """Apply the replacements named above; undone on exit."""
    from gptqmodel.looper import awq_processor, gptq_processor, loop_processor, stage_layer
    from gptqmodel.quantization import foem, gptaq, gptq
    from gptqmodel.utils import threadx

    from quantline.toolchains.workers.quantizers import gptqmodel_awq, gptqmodel_gptq

    replaced: list[tuple[Any, str, Any]] = [
        (threadx._DeviceWorker, "_abort_process", _abort_warmup_only),
        (loop_processor, "_PROJECT_LOG_DIR", scratch / "logs"),
        (gptq, "Quantizer", rounding.gptq_quantizer(gptq.Quantizer, lambda quantizer: quantizer.qcfg.sym)),
        (gptq_processor, "GPTQ", gptqmodel_gptq.gptq_class(gptq.GPTQ, state)),
        (gptq_processor, "GPTAQ", gptqmodel_gptq.gptq_class(gptaq.GPTAQ, state)),
        (gptq_processor, "FOEM", gptqmodel_gptq.gptq_class(foem.FOEM, state)),
        (gptq_processor, "GPTQProcessor", _without_packing(gptq_processor.GPTQProcessor)),
        (
            awq_processor,
            "AWQProcessor",
            _without_packing(gptqmodel_awq.processor_class(awq_processor.AWQProcessor, state)),
        ),
    ]
    if LM_HEAD in state.wanted:
        # If the last decoder layers are skipped, the library would stop before the output layer.
        replaced.append((stage_layer, "find_last_quantized_layer_index", lambda *_, **__: None))
    with _common.replaced(replaced):
        yield


def _abort_warmup_only(worker: Any, error: BaseException) -> None:
    # A task's error is already in its future. A warm-up's is not; raising it here puts it there.
    if worker._pending_warmups:
        raise error


def _without_packing(base: Any) -> Any:
    """A processor that keeps the rounded weights in the model instead of packing them."""

    class Processor(base):  # type: ignore[misc]
        def submodule_finalize(self, module: Any, model: Any, **_: Any) -> None:
            module.state.clear()

    return Processor


def _quantization(job: Mapping[str, Any], options: Mapping[str, Any], state: Run, skipped: list[str]) -> dict[str, Any]:
    """The `quantization_config` of the result."""
    awq = job.get("method") == "awq"
    described = output.described(
        job, state.layout, {name: state.work.width(name) for name in state.wanted}, skipped,
        symmetric=not options["zero_point"] if awq else options["sym"], desc_act=options.get("desc_act", False),
    )  # fmt: skip
    if awq:
        return {**described, "version": options["version"]}
    return {**described, **{key: options[key] for key in ("damp_percent", "true_sequential", "static_groups")}}


if __name__ == "__main__":
    worker_main(run)
