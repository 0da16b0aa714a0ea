"""The proof that a conversion changed nothing: `conversion_proof.json` beside the weights, which no loader reads.

A linear has an entry only if its codes, zero points and group index, read back from the disk, equal those of the source,
and its scales equal the source's up to the cast that the entry names. A carried tensor has an entry only if its bytes on
the disk, and so their SHA-256, equal the source's. Any difference raises, and leaves neither a proof nor an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.checkpoint import Checkpoint, quantization_of, quantized_layers
from quantline.checkpoints.layouts import AffineLinear, Layout
from quantline.checkpoints.layouts.affine import Grid
from quantline.checkpoints.layouts.folder import FolderForm
from quantline.conversion.architecture import NOT_CHECKED, ArchitectureCheck
from quantline.conversion.errors import ProofError
from quantline.core.files import write_json

PROOF_NAME = "conversion_proof.json"
SCHEMA = 1


@dataclass(frozen=True)
class LinearProof:
    """One linear. `largest_relative_difference` is over all its weights except the groups that were quantized again.

    sha256: of the bytes of its tensors, by suffix, if they are kept unchanged.
    """

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    symmetric: bool
    scales: str
    largest_relative_difference: float
    requantized: tuple[dict[str, Any], ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """The linear's entry in the file."""
        entry: dict[str, Any] = {
            "bits": self.bits, "group_size": self.group_size, "in_features": self.in_features,
            "out_features": self.out_features, "symmetric": self.symmetric, "codes": "equal", "zero_points": "equal",
            "group_index": "equal", "scales": self.scales,
            "largest_relative_weight_difference": self.largest_relative_difference,
        }  # fmt: skip
        if self.sha256:
            entry["sha256"] = dict(self.sha256)
        return {**entry, "requantized_groups": list(self.requantized)} if self.requantized else entry


@dataclass(frozen=True)
class CarriedProof:
    """One unchanged tensor; `source` is its name in the source."""

    name: str
    source: str
    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Proof:
    """The full record of a conversion."""

    source: str
    target: str
    rewritten: bool
    linears: Sequence[LinearProof]
    carried: Sequence[CarriedProof]
    left_out_tensors: Mapping[str, str]
    left_out_files: Mapping[str, str]
    warnings: Sequence[str]
    files: Mapping[str, str] = field(default_factory=dict)
    architecture: ArchitectureCheck = NOT_CHECKED

    @property
    def requantized(self) -> list[dict[str, Any]]:
        """Every group that was quantized again."""
        return [group for linear in self.linears for group in linear.requantized]

    @property
    def counts(self) -> dict[str, int]:
        """Counts of linears, tensors, files and groups."""
        return {
            "linears": len(self.linears), "carried_tensors": len(self.carried),
            "left_out_tensors": len(self.left_out_tensors), "left_out_files": len(self.left_out_files),
            "requantized_groups": len(self.requantized),
            "linears_with_cast_scales": sum(linear.scales != "equal" for linear in self.linears),
        }  # fmt: skip

    @property
    def metrics(self) -> dict[str, float]:
        """The counts and the largest differences, as metrics of the stage."""
        difference = max((linear.largest_relative_difference for linear in self.linears), default=0.0)
        added = max((float(group["max_abs_error"]) for group in self.requantized), default=0.0)
        return {
            **{name: float(count) for name, count in self.counts.items()}, "rewritten": float(self.rewritten),
            "largest_relative_weight_difference": difference, "largest_requantization_error": added,
        }  # fmt: skip

    def write(self, out: Path) -> None:
        """Write the file into the folder of the checkpoint."""
        write_json(out / PROOF_NAME, {
            "schema": SCHEMA, "source": self.source, "target": self.target, "rewritten": self.rewritten,
            "counts": self.counts, "metrics": self.metrics, "warnings": list(self.warnings),
            "linears": {linear.name: linear.entry() for linear in self.linears},
            "carried": {
                tensor.name: {"source": tensor.source, "sha256": tensor.sha256, "bytes": tensor.nbytes}
                for tensor in self.carried
            },
            "architecture": self.architecture.entry(),
            "left_out": {"tensors": dict(self.left_out_tensors), "files": dict(self.left_out_files)},
            "files": dict(self.files),
        })  # fmt: skip

    def summary(self) -> list[str]:
        """A few lines for a terminal."""
        counts, metrics = self.counts, self.metrics
        head = f"{self.source} to {self.target}" if self.rewritten else f"{self.target}, kept as it is"
        lines = [
            f"proof: {head}: codes and zero points of {counts['linears']} linears are equal on the disk",
            f"  scales cast in {counts['linears_with_cast_scales']}, largest relative weight difference "
            f"{metrics['largest_relative_weight_difference']:.3g}",
            f"  {counts['carried_tensors']} tensors carried over with equal SHA-256, "
            f"{counts['left_out_tensors']} tensors and {counts['left_out_files']} files left out",
        ]
        lines.append(f"  {self.architecture.line()}")
        if self.requantized:
            lines.append(
                f"  {counts['requantized_groups']} groups quantized again, largest error added "
                f"{metrics['largest_requantization_error']:.3g}"
            )
        return lines


def same_layer(one: AffineLinear, other: AffineLinear) -> list[str]:
    """The parts in which two layers differ: codes, zero points, scales, group index."""
    return [*([] if _equal(one.codes, other.codes) else ["codes"]), *same_grid(one.grid, other.grid)]


def same_grid(one: Grid, other: Grid) -> list[str]:
    """The parts besides codes in which two layers differ: zero points, scales, group index."""
    pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
        "zero points": (one.zeros, other.zeros),
        "scales": (one.scales, other.scales),
        "group index": (one.group_index, other.group_index),
    }
    return [what for what, (left, right) in pairs.items() if not _equal(left, right)]


def _equal(left: NDArray[Any], right: NDArray[Any]) -> bool:
    """Whether all bits are equal, so -0 differs from 0; nothing here is NaN."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.flags.f_contiguous and right.flags.f_contiguous:
        left, right = left.T, right.T
    left, right = _words(left), _words(right)
    # One piece at a time: the result stays in the cache, and the first difference stops the comparison.
    step = max(1, (1 << 17) // max(1, left[:1].nbytes))
    return all(
        np.array_equal(left[start : start + step], right[start : start + step])
        for start in range(0, left.shape[0], step)
    )


def _words(array: NDArray[Any]) -> NDArray[Any]:
    """The same bytes as the widest integers that the rows allow, so that eight codes are compared at a time."""
    rows = np.ascontiguousarray(array)
    return rows.view(np.uint64 if rows.shape[-1] * rows.itemsize % 8 == 0 else f"u{rows.itemsize}")


def check_output(out: Path, linears: Sequence[LinearProof], carried: Sequence[CarriedProof], layout: Layout) -> None:
    """Open the finished checkpoint as a loader would: config, index, headers and the list of linears must agree.

    Raises:
        ProofError: they do not.
    """
    if layout.folder is not None:
        _check_folder(layout.folder, out, linears, carried)
        return
    checkpoint, info = Checkpoint.open(out), quantization_of(out)
    if info is None or info.layout != layout.name:
        raise ProofError(f"{out.name}: config.json does not name the layout {layout.name}")
    found = quantized_layers(checkpoint, info)
    if set(found) != {linear.name for linear in linears}:
        raise ProofError(f"{out.name}: holds {len(found)} linears, {len(linears)} were written")
    for linear in linears:
        settings = info.of(linear.name)
        if (settings.bits, settings.group_size) != (linear.bits, linear.group_size):
            raise ProofError(
                f"{linear.name}: config.json gives it {settings.bits} bits in groups of {settings.group_size}"
            )
        if settings.symmetric and not linear.symmetric:
            raise ProofError(f"{linear.name}: config.json calls it symmetric, but its zero points are not")
    lost = {tensor.name for tensor in carried} - set(checkpoint.names)
    if lost:
        raise ProofError(f"{out.name}: lacks {sorted(lost)[0]}")


def _check_folder(form: FolderForm, out: Path, linears: Sequence[LinearProof], carried: Sequence[CarriedProof]) -> None:
    plan = form.contents(out)
    if plan.refusals:
        raise ProofError(f"{out.name}: {plan.refusals[0]}")
    if set(plan.layers) != {linear.name for linear in linears}:
        raise ProofError(f"{out.name}: holds {len(plan.layers)} linears, {len(linears)} were written")
    for linear in linears:
        found = plan.layers[linear.name]
        whole = linear.group_size == linear.in_features  # one group: it has one scale per channel
        if (found.bits, found.group_size) != (linear.bits, -1 if whole else linear.group_size):
            raise ProofError(f"{linear.name}: reads as {found.bits} bits in groups of {found.group_size}")
        if (found.out_features, found.in_features) != (linear.out_features, linear.in_features):
            raise ProofError(f"{linear.name}: reads as ({found.out_features}, {found.in_features})")
    lost = {tensor.name for tensor in carried} - set(plan.carried)
    if lost:
        raise ProofError(f"{out.name}: lacks {sorted(lost)[0]}")
