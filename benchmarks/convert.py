"""The speed and memory of conversion: `python -m benchmarks.convert [--gigabytes 2] [--folder DIR]`.

An msModelSlim checkpoint (W4A16, groups of 128, one int8 per code, asymmetric) of about two gigabytes is made and converted
to awq and to gptq, each in a child process, including the proof, with warm caches. For comparison, in the same run:

copy      shutil.copyfile of the same input bytes, the best of three. A conversion is flushed to disk before its file is
          renamed, a copy is only in memory when it returns, so a copy with a flush is timed too.
per row   the packing of vendors' converters: a uint32 matrix (in, out), one word row (gptq) or word column (awq) and one
          field at a time. It takes minutes for the whole input, so it packs one linear of 4096 x 4096 and is compared by
          codes per second, twice: with our packing of the same linear, from signed codes (out, in) to the same words, and
          with the whole conversion, which also reads, writes, flushes, reads back, decodes and compares.

The kernels are compiled before the first round, as after any earlier conversion on the machine, and the compile time is
printed; loading them is part of a conversion's time. The memory is the peak of the child (VmHWM) minus that of an
interpreter without imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from quantline.checkpoints.layouts import LAYOUTS, TARGETS  # noqa: E402
from quantline.conversion.source import SourceLayer  # noqa: E402

HIDDEN, INNER, GROUP, VOCABULARY = 4096, 11008, 128, 16384
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip

CHILD = """
import json, os, sys, time
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
before = peak()
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from quantline.config.convert import ConvertConfig
from quantline.conversion.convert import convert
options = ConvertConfig(target=sys.argv[4])
used, started = sum(os.times()[:4]), time.perf_counter()
convert(Path(sys.argv[2]), Path(sys.argv[3]), options)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "cpu": sum(os.times()[:4]) - used, "bytes": peak() - before}))
"""


def write_checkpoint(folder: Path, size: float) -> tuple[int, int]:
    """A checkpoint of about `size` bytes; returns the bytes and the codes."""
    from quantline.checkpoints.safetensors_stream import TensorSpec, streamed

    random = np.random.default_rng(0)
    layer_bytes = sum(rows * columns for rows, columns in LINEARS.values())
    layers = max(1, round((size - 2 * VOCABULARY * HIDDEN) / (layer_bytes * (1 + 8 / GROUP))))
    specs = {"model.embed_tokens.weight": TensorSpec("F16", (VOCABULARY, HIDDEN))}
    described: dict[str, str] = {"model_quant_type": "W4A16", "model.embed_tokens.weight": "FLOAT"}
    for index in range(layers):
        for name, (rows, columns) in LINEARS.items():
            linear = f"model.layers.{index}.{name}"
            specs[f"{linear}.weight"] = TensorSpec("I8", (rows, columns))
            for suffix in ("weight_scale", "weight_offset"):
                specs[f"{linear}.{suffix}"] = TensorSpec("F32", (rows, columns // GROUP))
            described.update(
                dict.fromkeys((f"{linear}.weight", f"{linear}.weight_scale", f"{linear}.weight_offset"), "W4A16")
            )
    with streamed(folder / "quant_model_weight_w4a16.safetensors", specs) as file:
        for name, spec in specs.items():
            if name.endswith(".weight_scale"):
                file.put(name, random.uniform(1e-3, 2e-2, spec.shape).astype(np.float32))
            elif spec.dtype == "F16":
                file.put(name, random.standard_normal(spec.shape, dtype=np.float32).astype(np.float16))
            else:
                codes = random.integers(-8, 8, spec.shape, dtype=np.int8)
                file.put(name, codes if spec.dtype == "I8" else codes.astype(np.float32))
    (folder / "quant_model_description_w4a16.json").write_text(json.dumps(described), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.iterdir()), layers * layer_bytes


def per_row(codes: NDArray[np.int8], target: str) -> NDArray[np.uint32]:
    """Pack like the vendors' converters."""
    values = (codes.astype(np.int32) + 8).T.astype(np.uint32)  # (in, out)
    rows, columns = values.shape
    if target == "gptq":
        words = np.zeros((rows // 8, columns), dtype=np.uint32)
        for row in range(rows // 8):
            for field in range(8):
                words[row] |= values[row * 8 + field] << np.uint32(4 * field)
        return words
    words = np.zeros((rows, columns // 8), dtype=np.uint32)
    for column in range(columns // 8):
        for field in range(8):
            words[:, column] |= values[:, column * 8 + AWQ_ORDER[field]] << np.uint32(4 * field)
    return words


def packed(codes: NDArray[np.int8], target: str) -> NDArray[np.uint32]:
    """Pack the same codes like the conversion, band by band."""
    from quantline.conversion import bands

    rows, columns = codes.shape
    layer = SourceLayer("sample", LAYOUTS["msmodelslim"], 4, GROUP, columns, rows, {})
    words = np.empty(codes.size // 8, dtype=np.uint32)
    place = words.ctypes.data
    for size, pack, _ in bands.bands(LAYOUTS[TARGETS[target]].affine.bands.kernel, layer, codes):
        pack(place)
        place += 4 * size
    return words.reshape((-1, rows) if target == "gptq" else (columns, -1))


def best(work: Callable[[], Any], rounds: int = 3) -> float:
    """The shortest time of several rounds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def copy(source: Path, out: Path, fsync: bool) -> None:
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
        if fsync:
            descriptor = os.open(out / path.name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def compile_kernels() -> float:
    """Seconds to compile the kernels; near zero if they were compiled before."""
    command = [sys.executable, "-c", "from quantline.conversion.kernels_jit import kernel; kernel('pack_flat')"]
    started = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=None, help="working folder; a temporary folder by default")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, out = Path(name) / "source", Path(name) / "out"
        source.mkdir()
        size, codes = write_checkpoint(source, options.gigabytes * 1e9)
        print(f"kernels compiled in {compile_kernels():.1f} s")
        print(f"input {size / 1e9:.2f} GB, {codes / 1e9:.2f} G codes, {os.cpu_count()} cores")
        times: dict[str, list[float]] = {"copy": [], "flushed": [], "awq": [], "gptq": []}
        peaks: dict[str, int] = {}
        cores: dict[str, float] = {}
        # Alternating, so that a busy moment of the machine does not affect only one of them.
        for _ in range(options.rounds):
            for kind, measured in times.items():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                if kind in ("copy", "flushed"):
                    started = time.perf_counter()
                    copy(source, out, kind == "flushed")
                    measured.append(time.perf_counter() - started)
                    continue
                command = [sys.executable, "-c", CHILD, str(ROOT / "src"), str(source), str(out), kind]
                report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                measured.append(report["seconds"])
                cores[kind] = min(cores.get(kind, report["cpu"]), report["cpu"])
                peaks[kind] = max(peaks.get(kind, 0), report["bytes"])
        copied, flushed = min(times["copy"]), min(times["flushed"])
        for kind, said in (("copy", "copy"), ("flushed", "copy, flushed")):
            seconds, rounds = min(times[kind]), ", ".join(f"{t:.2f}" for t in times[kind])
            print(f"{said:13} {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s  (all: {rounds})")
        sample = np.random.default_rng(1).integers(-8, 8, (4096, 4096), dtype=np.int8)
        for kind in ("awq", "gptq"):
            seconds = min(times[kind])
            rowwise = sample.size / best(lambda kind=kind: per_row(sample, kind))  # type: ignore[misc]
            ours = sample.size / best(lambda kind=kind: packed(sample, kind), 9)  # type: ignore[misc]
            if not np.array_equal(per_row(sample, kind), packed(sample, kind)):
                raise SystemExit(f"{kind}: the two ways to pack differ")
            print(
                f"{kind:5} {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s, {copied / seconds:.2f} x copy, "
                f"{flushed / seconds:.2f} x flushed copy, "
                f"{codes / seconds / rowwise:.0f} x per row ({rowwise / 1e6:.0f} M codes/s), "
                f"{cores[kind]:.2f} s of processor, peak {peaks[kind] / 1e9:.2f} GB  "
                f"(all: {', '.join(f'{t:.2f}' for t in times[kind])})"
            )
            print(f"      packing alone {ours / 1e6:.0f} M codes/s, {ours / rowwise:.0f} x per row")


if __name__ == "__main__":
    main()
