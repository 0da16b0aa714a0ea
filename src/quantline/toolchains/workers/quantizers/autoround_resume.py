"""Resuming after a crash: AutoRound's finished blocks are saved one by one.

The library has its own class for this (`AR_RESUME_DIR`). It was tested with a kill after the first block and has faults:

- With a model in memory, the second run skips that block and leaves its weights in float. If the library saves as it goes,
  the result has that block's float weights beside its packed ones.
- Random numbers restart at the seed, so the other blocks differ from those of an uninterrupted run.
- Runs with another seed are treated as the same run.
- By its source, the next block's inputs overwrite the last ones before the block is marked as done. So a crash between the
  two pairs inputs and blocks wrongly.

So its class is replaced, at the same hook. A folder has one file per finished block, with weights, scales and zero points as
the library left them. One more file, replaced atomically and last, has the next block's inputs and the random state.
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
    """A class to replace the library's `ResumeState`. It adds to `done` the names of blocks finished by an earlier run."""

    class Blocks:
        def __init__(self, folder: str, _signature: str, names: Sequence[str]) -> None:
            self.folder, self.names, self.saving = Path(folder), list(names), True
            self.completed = self._read()
            done.extend(self.names[: len(self.completed)])

        @property
        def resume_index(self) -> int:
            """Index of the first unfinished block."""
            return len(self.completed)

        def load_q_input(self) -> Any:
            """The next block's inputs, as computed by the quantized blocks before it."""
            return self._next["quantized"]

        def load_input_ids(self) -> Any:
            """The next block's float inputs. The library calls this last, so all other state is restored here."""
            for file in self.completed:
                _restore(work.model, _load(file))
            _set_random(self._next["random"])
            return self._next["float"]

        def mark_block_done(self, name: str, quantized: Any, reference: Any) -> None:
            """Save a block. If the disk is full, the run continues without saving blocks."""
            if not self.saving:
                return
            count = len(self.completed) + 1
            file = self.folder / f"block-{count:05d}.pt"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _save(file, _layers(work.model, name))
                state = {"count": count, "quantized": quantized, "float": reference, "random": _random()}
                _save(self.folder / _NEXT, state)
            except OSError as error:
                self.saving = False
                shutil.rmtree(root, ignore_errors=True)
                work.warnings.append(f"finished blocks are not saved, a crash would start over: {error.strerror}")
            self.completed.append(file)

        def clear(self) -> None:
            """Does nothing: the blocks are kept until the result is written, see `resume_files.forget`."""

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
