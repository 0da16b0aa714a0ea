"""The reference engine on a model of a large shape: `python -m benchmarks.engine SHAPE [--tokens 20480] [--device cuda]`.

SHAPE is as in `benchmarks.large`: qwen3-8b:10 has the first ten layers. A model with random weights and its rounding to 4
bits are written to .bench/. Then one process of the reference environment does what the evaluate stage asks for:
continuations of 32 prompts by three tokens, errors of every linear, scores and divergences of all tokens, three linears put
back to float. It prints the seconds of each part, and the peaks of what torch allocated on the device and of the process's
memory on the host.

`--python` names another interpreter with torch and transformers; `--gpu-gib N` holds it to N GiB of the GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

from benchmarks.large import SHAPES, folder_of, make_model, shape_of
from benchmarks.methods import ROOT
from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.linears import linear_shapes
from quantline.toolchains.environments import ensure
from quantline.toolchains.workers.quantizers import native

_WINDOW = 512

MEASURE = """
import json, resource, sys, time
import torch
from quantline.toolchains.workers.reference import evaluate

job, gib = json.loads(sys.argv[1]), float(sys.argv[2])
cuda = job["device"].startswith("cuda")
if cuda and gib:
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
started = time.perf_counter()
result = evaluate.run(job, lambda *step: None)
names = {"generate": "continuations", "layers": "errors of linears", "score": "scores", "restore": "restored linears"}
parts = ", ".join(f"{names[part]} {value:.1f} s" for part, value in result["seconds"].items())
print(f"{time.perf_counter() - started:.0f} s in all: {parts}")
if cuda:
    held, reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
    print(f"device: {held:.2f} GB allocated, {reserved:.2f} GB reserved")
print(f"host: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")
"""


def prepared(shape: str) -> tuple[Path, Path]:
    """The folders of a float model of the shape, and of its rounding to 4 bits; made if they are missing."""
    sizes, floats, rounded = shape_of(shape), folder_of(shape), folder_of(shape, "-rtn-w4")
    if not (floats / "config.json").exists():
        shutil.rmtree(floats, ignore_errors=True)
        make_model(floats, sizes)
    if not (rounded / "config.json").exists():
        shutil.rmtree(rounded, ignore_errors=True)
        rounded.mkdir()
        widths = {name: {"bits": 4, "group_size": 128} for name in names(floats)}
        job = {
            "model": str(floats),
            "output": str(rounded),
            "bits": 4,
            "group_size": 128,
            "options": {},
            "linears": widths,
        }
        native.run(job, lambda *step: None)  # type: ignore[arg-type]  # reports nothing
    return floats, rounded


def names(model: Path) -> list[str]:
    """The linears of a model."""
    return list(linear_shapes(Checkpoint.open(model), {}))


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}; :N behind it for its first N layers")
    parser.add_argument("--tokens", type=int, default=20480, help="to score; %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; %(default)s")
    parser.add_argument("--gpu-gib", type=float, default=0.0, help="of the GPU's memory; 0: all")
    parser.add_argument("--python", default=None, help="an interpreter with torch and transformers")
    given = parser.parse_args()
    if given.tokens < 8 * _WINDOW:
        parser.error(f"--tokens {given.tokens}: give at least {8 * _WINDOW}")
    floats, rounded = prepared(given.shape)
    work = ROOT / ".bench" / "work"
    work.mkdir(exist_ok=True)
    ids = np.random.default_rng(0).integers(0, 8000, given.tokens // _WINDOW * _WINDOW).astype(np.int32)
    for name, tokens in (("windows", ids), ("part", ids[: 4 * _WINDOW])):
        offsets = np.arange(len(tokens) // _WINDOW + 1, dtype=np.int64) * _WINDOW
        write_safetensors(work / name, {"input_ids": tokens, "offsets": offsets})
    write_safetensors(work / "calibration", {"input_ids": ids[: 8 * _WINDOW].reshape(8, _WINDOW)})
    job = {
        "checkpoint": str(rounded), "baseline": str(floats), "windows": str(work / "windows"),
        "output": str(work / "scores"),
        "batch_tokens": 2048, "divergence_tokens": None, "threads": given.threads, "device": given.device,
        "generate": {"prompts": ids[:1024].reshape(32, 32).tolist(), "new_tokens": 3},
        "layers": {"linears": names(floats), "calibration": str(work / "calibration"), "samples": 8, "unfold": None},
        "restore": {"count": 3, "windows": str(work / "part"), "output": str(work / "restored")},
    }  # fmt: skip
    python = given.python or str(ensure(ROOT, "reference").python)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([python, "-c", MEASURE, json.dumps(job), str(given.gpu_gib)], check=True, env=environment)


if __name__ == "__main__":
    main()
