"""The memory and disk that each stage takes at its peak, from headers and options.

Bytes of all processes of a stage on the host (pages that they share count once per process, as the stage's monitor counts
them), of what it allocates on a GPU, and of its output on the disk. The reference engine, which runs in download, quantize
and evaluate, holds parts of a model as `checkpoints.model_parts` says. For the demo's variants, which are tiny, `evaluate`
took 0.4 to 1.1 GB more on a CPU than is planned here, of which the cause was not measured (docs/benchmarks.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from quantline.checkpoints.model_parts import MOST_LOGITS, Parts, parts_of
from quantline.core.text import binary_size
from quantline.planning.quantization_memory import PLAIN_PROCESS, Peak
from quantline.planning.spec import FLOAT, Finding, Machine, Model, Plan
from quantline.quantization.capabilities import calibrated

# torch and transformers, with a model's code; with a GPU also its context and libraries. Measured: 0.5 GB on a CPU with the
# demo model, of which 0.04 are its weights; 7.2 GB on an H200, of which 4 are the parts of Qwen3-8B on their way to the GPU.
_ENGINE = {"cpu": 450_000_000, "cuda": 3_000_000_000}
# A stage's own process with its monitor, measured with the demo; a tokenizer, and each of its entries (49,152 took 70 MB).
_STAGE, _TOKENIZER, _TOKENIZER_ENTRY = 100_000_000, 20_000_000, 1500
# A worker that waits for its turn with torch and transformers, and one that builds a model without weights.
_WAITING, _BARE_MODEL = 350_000_000, 380_000_000
# One of vLLM's three processes on a CPU, without weights and cache.
_SERVER_PROCESS = 720_000_000
# Rows of logits that are normalised at a time, and copies of them (scoring and divergence).
_ROWS, _COPIES = 512, 2


@dataclass(frozen=True)
class Need:
    """What a stage takes, in bytes. formula: what the largest part of it is, in words."""

    stage: str
    host: int
    device: int
    disk: int
    formula: str


def stage_needs(plan: Plan, model: Model, machine: Machine) -> tuple[Need, ...]:
    """What the stages of a variant take, in their order; empty if the variant cannot be stored."""
    if plan.weights is None:
        return ()
    parts, source, size = parts_of(model.checkpoint, model.config), plan.weights.float_source, plan.weights.total
    engine = _Engine(parts, model.dimensions.hidden or 0, model.dimensions.vocabulary or 0, machine)
    needs = [_engine_need("download", engine, engine.probe(), source)]
    if plan.planned.method != FLOAT:
        if calibrated(plan.planned.method, plan.planned.options):
            tokens = 4 * machine.calibration_tokens
            entries = _TOKENIZER_ENTRY * (model.dimensions.vocabulary or 0)
            needs.append(Need("calibrate", _STAGE + _TOKENIZER + entries + 2 * tokens, 0, tokens, "the tokenizer"))
        needs += [_quantize(plan.peak, engine, size, machine), _convert(model, size)]
    if (serving := plan.serving_bytes()) is not None:
        formula = "weights, cache and activations of the server"
        cache = max((machine.cache_bytes or 0) - (plan.kv_bytes or 0), 0)  # the option takes more than the requests
        serving += 0 if machine.memory_bytes is not None and engine.on_gpu else cache
        on_host = _STAGE + 3 * _SERVER_PROCESS + (0 if engine.on_gpu else serving)
        needs.append(Need("serve_smoke", on_host, serving if engine.on_gpu else 0, 0, formula))
    scores = 12 * machine.work.scored
    needs.append(_engine_need("evaluate", engine, engine.compared(float_only=plan.planned.method == FLOAT), scores))
    return tuple(needs)


def too_large(needs: tuple[Need, ...], machine: Machine) -> list[Finding]:
    """Findings for stages of the reference engine that fit neither the main memory nor the GPU."""
    found = []
    for need in needs:
        if need.stage not in ("download", "evaluate"):  # quantizing and serving have findings of their own
            continue
        for what, taken, given in (
            ("main memory", need.host, machine.host_bytes),
            ("the GPU", need.device, machine.memory_bytes if machine.target.device == "cuda" else None),
        ):
            if given is None or taken <= given:
                continue
            remedy = "use a machine that has it"
            if need.stage == "evaluate":
                remedy = (
                    "set evaluate.divergence.tokens=0 and evaluate.restore.layers=0, which leave the float model out; or "
                    + ("a smaller evaluate.batch_tokens" if what == "the GPU" else "fewer evaluate.max_tokens")
                )
            reason = f"{need.stage} takes {binary_size(taken)} of {what} ({need.formula}), of {binary_size(given)}"
            found.append(Finding(f"{need.stage}-memory", "memory", reason, remedy, refused=False))
    return found


@dataclass(frozen=True)
class _Held:
    """What the engine holds on the device, and what waits on the host beside it."""

    device: int
    host: int
    formula: str


class _Engine:
    """The reference engine on a float model."""

    def __init__(self, parts: Parts, hidden: int, vocabulary: int, machine: Machine) -> None:
        self._parts, self._hidden, self._vocabulary, self._work = parts, hidden, vocabulary, machine.work
        self.on_gpu = machine.target.device == "cuda"

    def probe(self) -> _Held:
        """One model, whose probe is short."""
        return _Held(*self._weights(1), self._name())

    def errors(self) -> _Held:
        """Errors of linears: the float model, the differences of a layer, the values of that layer and the next one."""
        layer = self._parts.layer
        differences, values = 4 * layer, 2 * 4 * layer
        states = 4 * self._hidden * self._work.measured
        formula = f"{self._name()} and, of each linear of a layer, the dequantized values and the difference"
        device, host = self._weights(1)
        if self._parts.kept:
            return _Held(device + differences, host + values + states, formula)
        return _Held(max(device, differences + 6 * layer), host + values + states, formula)

    def compared(self, *, float_only: bool) -> _Held:
        """The float model and the variant side by side, after the errors of linears."""
        work = self._work
        models = 1 if float_only or not work.compared else 2
        rows = min(work.batch_tokens, MOST_LOGITS // max(self._vocabulary, 1) // models)
        logits = 4 * self._vocabulary * (models * rows + _COPIES * min(rows, _ROWS))
        states = 4 * self._hidden * (work.scored + (work.compared if models == 2 else 0))
        device, host = self._weights(models, logits)
        copies = 2 * work.restored * work.restored_tokens * 4 * self._hidden if models == 2 else 0
        scored = _Held(device, host + states + copies, f"{self._name(models)}, logits, hidden states of the text")
        if models == 1 or not work.measured:
            return scored
        errors = self.errors()
        return max(scored, errors, key=lambda held: held.device + held.host)

    def _weights(self, models: int, logits: int = 0) -> tuple[int, int]:
        """Bytes of weights on the device, with logits where they are computed; and on their way there on the host."""
        parts = self._parts
        if parts.kept:
            return models * 4 * parts.total + logits, 0
        # The next part waits as it is stored: float weights have 2 bytes, dequantized ones 4. None waits behind the head.
        waiting = parts.layer * (2 + 4 * (models - 1))
        layers, head = models * 4 * max(parts.table, parts.layer) + waiting, models * 4 * parts.table + logits
        return max(layers, head), models * 2 * parts.table if self.on_gpu else 0

    def _name(self, models: int = 1) -> str:
        name = "all weights in float32" if self._parts.kept else "two parts of the model in float32"
        return name if models == 1 else f"{name}, of both models"


def _engine_need(stage: str, engine: _Engine, held: _Held, disk: int) -> Need:
    if engine.on_gpu:
        return Need(stage, _STAGE + _ENGINE["cuda"] + held.host, held.device, disk, held.formula)
    return Need(stage, _STAGE + _ENGINE["cpu"] + held.device + held.host, 0, disk, held.formula)


def _quantize(peak: Peak | None, engine: _Engine, size: int, machine: Machine) -> Need:
    """The larger of the quantizer's own peak, while the engine waits, and the engine's, which comes after it."""
    errors = engine.errors()
    after = (
        _engine_need("quantize", engine, errors, size) if machine.work.measured else Need("quantize", 0, 0, size, "")
    )
    if peak is None:
        return after
    on_gpu = engine.on_gpu and peak.process != PLAIN_PROCESS
    host = _STAGE + (_WAITING if machine.work.measured else 0) + (peak.process if on_gpu else peak.total)
    device = peak.total - peak.process if on_gpu else 0
    own = Need("quantize", max(host, after.host), max(device, after.device), size, peak.formula)
    return own if host + device > after.host + after.device else Need(
        "quantize", own.host, own.device, size, after.formula
    )  # fmt: skip


def _convert(model: Model, size: int) -> Need:
    largest = max((model.checkpoint.info(name).nbytes for name in model.checkpoint.names), default=0)
    formula = "the model without weights, whose linears are counted"
    if 2 * largest > _BARE_MODEL:
        formula = "a tensor as it is and as it becomes"
    return Need("convert", _STAGE + max(_BARE_MODEL, 2 * largest), 0, size, formula)
