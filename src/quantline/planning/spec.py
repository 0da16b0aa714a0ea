"""The types of preflight: a planned variant, the float model, the machine that runs it, and findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts.linear_spec import LM_HEAD
from quantline.checkpoints.linears import Inventory, inventory, why_not_float
from quantline.checkpoints.model_config import Dimensions, dimensions, read_config, ties_head, why_not_causal
from quantline.checkpoints.quantization_config import described_in
from quantline.core.errors import UserError
from quantline.planning.checkpoint_memory import Weights
from quantline.planning.quantization_memory import Peak
from quantline.quantization.capabilities import Requirements
from quantline.serving.memory import KvCache, Limits
from quantline.serving.rules import Target

FLOAT = "float"
Step = Literal["quantize", "convert", "serve", "memory"]


@dataclass(frozen=True)
class VariantSpec:
    """A requested variant; names and values as in conf/.

    options: the method's own. backend: a name or auto. rules: by layer, see `select_linears`. dtype: of the quantizer;
    serve_dtype: of the server. convert: the target layout.
    """

    method: str
    bits: int = 4
    group_size: int = 128
    options: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    rules: tuple[Mapping[str, Any], ...] = ()
    lm_head: bool = False
    low_memory: bool = False
    dtype: str = "auto"
    convert: str = "auto"
    serve_dtype: str = "auto"
    tensor_parallel_size: int = 1
    quantize_gpus: int = 1

    @property
    def requirements(self) -> Requirements:
        """What the variant requires of a backend."""
        bits = tuple(rule["bits"] for rule in self.rules if rule.get("bits") is not None)
        groups = tuple(rule["group_size"] for rule in self.rules if rule.get("group_size") is not None)
        layers = "widths" if bits or groups else "skip" if self.rules else "none"
        return Requirements(
            self.method, self.bits, self.group_size, self.options, layers, bits, groups, self.lm_head, self.low_memory,
            self.dtype, self.quantize_gpus,
        )  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A float model, known from its headers."""

    name: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, name: str = "") -> Model:
        """Read the headers of a model's folder.

        Raises:
            UserError: the folder has no model, its config.json is damaged, or the model is quantized already.
        """
        checkpoint, config = Checkpoint.open(folder), read_config(folder)
        if described_in(folder) is not None:
            raise UserError(f"{folder}: is quantized already; give the float model instead")
        if reason := why_not_causal(config):
            raise UserError(f"{folder}: {reason}; give a model that predicts the next token")
        if fault := why_not_float(checkpoint):
            raise UserError(f"{folder}: {fault}")
        return cls(name or folder.name, checkpoint, config)

    @cached_property
    def dimensions(self) -> Dimensions:
        """The numbers of its config."""
        return dimensions(self.config)

    @cached_property
    def inventory(self) -> Inventory:
        """Which of its tensors are linears."""
        return inventory(self.checkpoint, self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of every linear, including the output layer unless it is tied."""
        found = dict(self.inventory.linears)
        if f"{LM_HEAD}.weight" in self.checkpoint.names and not ties_head(self.config):
            rows, columns = self.checkpoint.info(f"{LM_HEAD}.weight").shape
            found[LM_HEAD] = (columns, rows)
        return found


@dataclass(frozen=True)
class Work:
    """What the reference engine is asked for, in tokens.

    scored: of the evaluated text, at most. compared: of them with the float model. batch_tokens: computed at once. measured:
    for the errors of linears; 0 measures none. restored, restored_tokens: linears that are put back to float, and tokens
    scored for each.
    """

    scored: int = 100_000
    compared: int = 20_000
    batch_tokens: int = 2048
    measured: int = 8 * 512
    restored: int = 5
    restored_tokens: int = 2000


@dataclass(frozen=True)
class Machine:
    """The machine on which a variant should run.

    order: the backends of each method, in the order in which `backend=auto` tries them. context, batch: tokens per sequence
    and concurrent sequences that the server must hold. memory_bytes: of each GPU (or what a server on a CPU may take); None
    skips the check. utilization: the share of it that the server gets. quantizer_bytes: what quantizing may take; None if
    unknown. calibration_tokens: of all samples. limits: of the server's process. notes: what is only assumed of it. work:
    of the reference engine. host_bytes: of main memory; None if unknown. cache_bytes: that the
    server's cache takes in any case. versions: of each server; `target` is that of the planned variant.
    """

    target: Target
    order: Mapping[str, Sequence[str]]
    context: int = 4096
    batch: int = 1
    memory_bytes: int | None = None
    utilization: float = 1.0
    quantizer_bytes: int | None = None
    calibration_tokens: int = 128 * 2048
    limits: Limits = field(default_factory=Limits)
    notes: tuple[str, ...] = ()
    work: Work = field(default_factory=Work)
    host_bytes: int | None = None
    cache_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A reason against a variant, or a note on it."""

    id: str
    step: Step
    reason: str
    remedy: str = ""
    source: str = ""
    refused: bool = True


@dataclass(frozen=True)
class Plan:
    """The plan of a variant before anything is computed. layout: as it is served. Sizes are bytes, None if unknown.

    offloaded_bytes: of each GPU's weights, which stay in main memory.
    """

    planned: VariantSpec
    backend: str
    layout: str
    findings: tuple[Finding, ...]
    weights: Weights | None = None
    kv: KvCache | None = None
    kv_bytes: int | None = None
    overhead_bytes: int | None = None
    peak: Peak | None = None
    kv_heads: int = 1
    offloaded_bytes: int = 0

    @property
    def refused(self) -> list[Finding]:
        """The findings that make it impossible."""
        return [finding for finding in self.findings if finding.refused]

    def passes(self, *steps: Step) -> bool:
        """Whether no finding refuses it at these steps; all steps if none are named."""
        return not any(not steps or finding.step in steps for finding in self.refused)

    def serving_bytes(self) -> int | None:
        """Memory that each GPU needs: its share of weights and cache, activations and context; None if unknown.

        Weights that stay in main memory do not count.

        GPUs beyond the key-value heads hold copies of the cache.
        """
        if self.kv_bytes is None or self.overhead_bytes is None:
            return None
        ranks = self.planned.tensor_parallel_size
        total = self.weights.total if self.weights else 0
        return (
            -(-total // ranks)
            - self.offloaded_bytes
            + -(-self.kv_bytes // min(ranks, self.kv_heads))
            + self.overhead_bytes
        )


def line(finding: Finding) -> str:
    """A finding in one line."""
    source = f" [{finding.id}]" if finding.step == "serve" else ""
    return f"{finding.reason}{'; ' if finding.remedy else ''}{finding.remedy}{source}"


class RefusedError(UserError):
    """The variant cannot work. `nearest`: the overrides of one that works, or None."""

    def __init__(self, findings: Sequence[Finding], nearest: str | None) -> None:
        self.findings, self.nearest = tuple(findings), nearest
        near = f"\n  the nearest that works: {nearest}" if nearest else ""
        super().__init__("\n".join(["this variant cannot work:", *(f"  {line(one)}" for one in findings)]) + near)
