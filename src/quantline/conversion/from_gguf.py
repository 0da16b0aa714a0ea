"""A GGUF file as a float model to start from: its exact weights in float32 safetensors, under transformers' names.

What the file lost when it was quantized stays lost: the result is that of the file, not of the model it was made from.
Losses of variants that are made of it are losses against the file. config.json and the tokenizer are taken from the folder,
since a GGUF file describes both in llama.cpp's words.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from quantline.checkpoints.float_view import FloatView
from quantline.checkpoints.layouts.gguf.layout import info_of
from quantline.checkpoints.model_config import read_config
from quantline.checkpoints.model_files import COMPANIONS, matching, tokenizer_fault
from quantline.checkpoints.quantization_config import float_config
from quantline.checkpoints.safetensors_stream import TensorSpec, streamed
from quantline.conversion.errors import ConversionError
from quantline.core.files import write_json

KIND = "gguf"


def restore_float(folder: Path, out: Path) -> list[str]:
    """Write the float model of a folder with one GGUF file to the empty folder `out`.

    Args:
        folder: has the GGUF file, config.json and the tokenizer's files of the model.
        out: gets model.safetensors in float32, config.json and the tokenizer's files.

    Returns:
        what was done, in lines for a person.

    Raises:
        ConversionError: there is no single GGUF file, no config.json or no tokenizer, or a tensor does not read back.
        CheckpointError: the file or its family cannot be read.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ConversionError([f"{folder}: has {len(files)} GGUF files; give a folder with one"])
    if not (folder / "config.json").is_file():
        raise ConversionError([f"{folder}: has no config.json; copy it and the tokenizer's files from the model"])
    if fault := tokenizer_fault(folder, str(folder)):
        raise ConversionError([f"{folder}: {fault}"])
    view = FloatView.open(folder, info_of(files[0]))
    specs = {name: TensorSpec("F32", view.shape(name)) for name in sorted(view.names)}
    with streamed(out / "model.safetensors", specs) as file:
        for name in specs:
            values = np.ascontiguousarray(view.values(name), dtype=np.float32)
            file.put(name, values)
            if not np.array_equal(file.get(name).view(np.uint32), values.view(np.uint32)):
                raise ConversionError([f"{name}: does not read back as it was written; check the disk"])
    write_json(out / "config.json", {**float_config(read_config(folder)), "dtype": "float32"})
    for name in matching(folder, COMPANIONS):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    kinds = sorted({suffix for one in view.quantized.values() for suffix in one if suffix != "bias"})
    return [
        f"{len(specs)} tensors in float32, of which {len(view.quantized)} were in the block types {', '.join(kinds)}",
        "these are the weights of the file, to the bit: what it lost when it was quantized stays lost, and what variants of "
        "this model lose is counted from here",
        f"go on with model.path={out}",
    ]
