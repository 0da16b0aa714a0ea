"""The tensors of a source folder, by name.

`read` and `chunks` copy, so a conversion holds only what it works on. `view` maps a tensor instead. It is for the codes of
large linears, one linear per thread, since copying them would take as long as packing them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from quantline.checkpoints.safetensors_file import SafetensorsFile, TensorInfo

# Values compared at a time. They stay in the processor's cache between the two passes.
_PASS = 1 << 18


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a folder; several threads may read at once."""

    folder: Path
    files: Mapping[str, str]  # tensor -> file
    infos: Mapping[str, TensorInfo]

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as an array of its own."""
        return self._file(name).read(name)

    def view(self, name: str) -> NDArray[Any]:
        """A tensor as a read-only array over the mapped file. The mapping ends with the last reference to the array.

        Raises:
            CheckpointError: the file ends inside it.
        """
        return self._file(name).view(name)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of a tensor, piece by piece."""
        return self._file(name).chunks(name)

    def extremes(self, name: str) -> tuple[int, int]:
        """The smallest and the largest value of an int8 tensor that is not empty."""
        low, high = 127, -128
        values = self.view(name).reshape(-1)
        for start in range(0, values.size, _PASS):
            part = values[start : start + _PASS]
            low, high = min(low, int(part.min())), max(high, int(part.max()))
        return low, high

    def _file(self, name: str) -> SafetensorsFile:
        return SafetensorsFile(self.folder / self.files[name], self.infos)
