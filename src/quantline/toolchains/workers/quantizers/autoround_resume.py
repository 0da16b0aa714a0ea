"""Going on after a crash: AutoRound's blocks, kept as they are finished.

The library has a state of its own for this (`AR_RESUME_DIR`). As it was tried with a kill after the first block: with a
model in memory, the second run skips that block and leaves its weights in float; where the library saves as it goes, the
result holds that block's float weights beside its packed ones. Random numbers start over at the seed, so that the other
blocks come out otherwise than without the crash. Runs of another seed are taken for the same one. And by its source, the
next block's inputs are written over the last ones before the block is noted as done, so that a crash between the two pairs
inputs and blocks wrongly. So its class is replaced, at the same hook.

A folder holds one file a finished block with codes, scales and zero points as the library left them, and one, replaced at
once and last, with the next block's inputs and the state of the random numbers.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline.toolchains.workers.quantizers import model as _common
from quantline.toolchains.workers.quantizers import resume_files

KIND = "autoround"
_NEXT = "next.pt"


def blocks_class(work: _common.Work, root: Path, done: list[str]) -> type:
    """A class in place of the library's `ResumeState`; `done` gets the names of blocks that were finished before."""

    class Blocks:
        def __init__(self, folder: str, _signature: str, names: Sequence[str]) -> None:
            self.folder, self.names, self.kept = Path(folder), list(names), True
            self.completed = self._read()
            done.extend(self.names[: len(self.completed)])

        @property
        def resume_index(self) -> int:
            """Index of the first block to do."""
            return len(self.completed)

        def load_q_input(self) -> Any:
            """The next block's inputs as the quantized blocks before it give them."""
            return self._next["quantized"]

        def load_input_ids(self) -> Any:
            """The next block's inputs in float. The library's last question, so everything else is put back here."""
            for file in self.completed:
                _restore(work.model, _load(file))
            _set_random(self._next["random"])
            return self._next["float"]

        def mark_block_done(self, name: str, quantized: Any, reference: Any) -> None:
            """Keep a block; where the disk is full nothing is kept any more and the run goes on."""
            if not self.kept:
                return
            count = len(self.completed) + 1
            file = self.folder / f"block-{count:05d}.pt"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _save(file, _layers(work.model, name))
                state = {"count": count, "quantized": quantized, "float": reference, "random": _random()}
                _save(self.folder / _NEXT, state)
            except OSError as error:
                self.kept = False
                shutil.rmtree(root, ignore_errors=True)
                work.warnings.append(f"finished blocks are not kept, a crash would start over: {error.strerror}")
            self.completed.append(file)

        def clear(self) -> None:
            """The library is through; what was kept is kept until the result is written, see `_kept.forget`."""

        def _read(self) -> list[Path]:
            if not (self.folder / _NEXT).exists():
                return []
            self._next = _load(self.folder / _NEXT)
            return [self.folder / f"block-{count:05d}.pt" for count in range(1, self._next["count"] + 1)]

    return Blocks


def _layers(model: Any, block: str) -> dict[str, Any]:
    return {
        f"{block}.{name}": {"weight": layer.weight.detach().cpu(), "scale": layer.scale, "zp": layer.zp}
        for name, layer in model.get_submodule(block).named_modules()
        if getattr(layer, "scale", None) is not None and hasattr(layer, "weight")
    }


def _restore(model: Any, layers: Mapping[str, Mapping[str, Any]]) -> None:
    for name, values in layers.items():
        layer = model.get_submodule(name)
        layer.weight.data = values["weight"].to(layer.weight.device)
        layer.scale, layer.zp = values["scale"], values["zp"]


def _random() -> dict[str, Any]:
    import torch

    version, state, gauss = random.getstate()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": [version, list(state), gauss], "torch": torch.get_rng_state(), "cuda": gpu}


def _set_random(state: Mapping[str, Any]) -> None:
    import torch

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _save(path: Path, value: Any) -> None:
    import torch

    with resume_files.whole(path) as file:
        torch.save(value, file)


def _load(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)
