"""What each unit of linears costs at each width, as divergence from the float model, in the `reference` toolchain.

A unit is what a server fuses: the projections of queries, keys and values, of gate and up, or all experts of a layer. Its
weights are rounded to nearest, everything else stays float. Up to its layer a unit makes no difference, so each probe
branches off there and computes only the layers behind it; the weights are read once for all probes. The outputs of all
branches wait in main memory: tokens x width of the model x 4 bytes for each probe.

Job: `model` (folder), `units` (name -> linears), `grids` (lists of `bits`, `group_size`, `symmetric`), `calibration`
(safetensors: input_ids int32 (n, length)), `samples` (of the n), `device`, `threads`. Result: `rows`, one for each unit and
grid, with `unit`, `bits`, `group_size` and `kl`, the mean of KL(float || probe) in nats per token; `tokens`; `seconds`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from quantline.checkpoints.layouts.linear_spec import LayerSettings
from quantline.checkpoints.linears import place_of
from quantline.toolchains.protocol import JobError, Reporter, worker_main
from quantline.toolchains.workers.reference.divergence import kl_divergence
from quantline.toolchains.workers.reference.engine import check_ids, measuring
from quantline.toolchains.workers.reference.linear_locations import Linear, locate
from quantline.toolchains.workers.reference.nearest import rounded
from quantline.toolchains.workers.reference.streaming import Batch, StreamedModel, first_tensor

if TYPE_CHECKING:
    from torch import Tensor

_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
# Float32 values of the logits computed at a time, of two models.
_MAX_LOGITS = 2**27


class Probes:
    """The probes of one job on their way through the model."""

    def __init__(
        self, model: StreamedModel, units: Mapping[str, Sequence[str]], grids: Sequence[LayerSettings]
    ) -> None:
        self._model, self._grids = model, grids
        self._units = {name: [Linear(linear) for linear in linears] for name, linears in units.items()}
        self._homes = {
            linear.name: model.skeleton.homes(f"{linear.name}.weight")
            for ones in self._units.values()
            for linear in ones
        }
        self.branches: dict[tuple[str, LayerSettings], list[Batch]] = {}

    def measure(self, batches: Sequence[Batch], report: Reporter) -> dict[tuple[str, LayerSettings], float]:
        """Compute all probes for batches of samples; returns the mean divergence of each, nats per token.

        Raises:
            JobError: a unit was in no part, its weights are not the model's own, or it changed nothing, so it never ran.
        """
        model, total, done = self._model, len(self._units) * len(self._grids), 0
        if not batches:
            raise JobError("no samples to measure on")
        while (part := model.next_part(batches[0])) is not None:
            model.skeleton.fill(part)
            before = [batch.copy() for batch in batches]
            for branch in [batches, *self.branches.values()]:
                for batch in branch:
                    model.advance(batch)
            for unit, linears in self._within(part):
                self._locate(unit, part, linears)
                for grid in self._grids:
                    with rounded_in_place(linears, grid) as changed:
                        branch = [batch.copy() for batch in before]
                        for batch in branch:
                            model.advance(batch)
                    if changed and all(_same(own, base) for own, base in zip(branch, batches, strict=True)):
                        raise JobError(f"{unit}: at {grid.bits} bits nothing changes, so the model never runs it")
                    self.branches[unit, grid] = branch
                    report(done := done + 1, total, unit)
                for linear in linears:
                    linear.weight = None
            model.release()
        if left := [unit for unit in self._units if (unit, self._grids[0]) not in self.branches]:
            raise JobError(
                f"{', '.join(left[:5])}: in no part of the model that runs, so nothing can be said of its loss"
            )
        return self._divergences(batches)

    def _within(self, part: str) -> Iterator[tuple[str, list[Linear]]]:
        layer = place_of(f"{part}.weight")[0]
        for unit, linears in self._units.items():
            first = linears[0].name
            if part in self._homes[first] or (not self._homes[first] and layer >= 0 and place_of(first)[0] == layer):
                yield unit, linears

    def _locate(self, unit: str, part: str, linears: Sequence[Linear]) -> None:
        locate(part, self._model.skeleton, linears, self._homes)
        if hidden := [linear.name for linear in linears if not linear.seen]:
            raise JobError(
                f"{unit}: the weights of {hidden[0]} are not rows of the model's own, so they cannot be replaced"
            )

    def _divergences(self, batches: Sequence[Batch]) -> dict[tuple[str, LayerSettings], float]:
        model = self._model
        sums, tokens = dict.fromkeys(self.branches, 0.0), sum(batch.ids.numel() for batch in batches)
        for number, batch in enumerate(batches):
            rows = max(1, _MAX_LOGITS // model.logits_width // batch.ids.shape[1])
            floats = [model.logits(piece) for piece in batch.split(rows)]
            for key, branch in self.branches.items():
                for base, piece in zip(floats, branch[number].split(rows), strict=True):
                    sums[key] += float(kl_divergence(base, model.logits(piece)).sum())
        return {key: value / tokens for key, value in sums.items()}


def _same(own: Batch, base: Batch) -> bool:
    import torch

    return bool(torch.equal(first_tensor(own.output), first_tensor(base.output)))


@contextmanager
def rounded_in_place(linears: Sequence[Linear], grid: LayerSettings) -> Iterator[bool]:
    """Inside the block the weights of located linears are rounded to nearest; yields whether that changes any."""
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        for linear in linears:
            assert linear.weight is not None, "it is located"
            originals.append((linear.weight, linear.weight.detach().clone()))
            linear.weight.copy_(rounded(linear.weight, grid))
        yield any(bool((weight != original).any()) for weight, original in originals)
    finally:
        for weight, original in originals:
            weight.copy_(original)


def measure(model: StreamedModel, job: Mapping[str, Any], report: Reporter) -> dict[str, Any]:
    """Run one job on the float model, see the module's description.

    Raises:
        JobError: no samples, ids outside the vocabulary, or as `Probes.measure`.
    """
    from safetensors.numpy import load_file

    started = time.perf_counter()
    tokens = np.asarray(load_file(job["calibration"])["input_ids"], np.int32)[: job["samples"]]
    if not tokens.size:
        raise JobError(f"{job['calibration']}: has no samples")
    check_ids(model.vocabulary, tokens)
    rows = max(1, _BATCH_TOKENS["cuda" if model.device.startswith("cuda") else "cpu"] // tokens.shape[1])
    batches = [model.batch(tokens[start : start + rows]) for start in range(0, len(tokens), rows)]
    grids = [LayerSettings(grid["bits"], grid["group_size"], grid["symmetric"]) for grid in job["grids"]]
    found = Probes(model, job["units"], grids).measure(batches, report)
    return {
        "rows": [
            {"unit": unit, "bits": grid.bits, "group_size": grid.group_size, "kl": kl} for (unit, grid), kl in found.items()
        ],
        "tokens": int(tokens.size), "seconds": time.perf_counter() - started,
    }  # fmt: skip


run = measuring(measure)


if __name__ == "__main__":
    worker_main(run)
