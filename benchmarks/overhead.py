"""What the quantize stage costs beyond the library: `python -m benchmarks.overhead [--rounds 3]`.

The same job, GPTQ at 4 bits on the demo model and its calibration tokens, twice:

bare    a script in AutoGPTQ's environment: import, load, the library's `quantize`, the library's own `save_pretrained`
        (with what the library needs on a machine without a GPU, or it does not run at all)
stage   `python -m stages.quantize method=gptq`: configuration, preflight, the parity probe, the same library call, our
        writer, the reading back of the result, the coverage gate

The stage starts two interpreters more, the pipeline's and the coverage gate's. What these take until their imports are
done is measured apart and stated, as is what remains: the overhead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.methods import ROOT, result, stage
from quantline import toolchains

BARE = """
import sys, time
started = time.time()
import torch
torch.cuda.is_available, torch.cuda.synchronize = (lambda: True), (lambda *_: None)
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.modeling import _base
from safetensors.torch import load_file
_base.CUDA_0 = torch.device("cpu")
model, tokens, out, threads = sys.argv[1:5]
torch.set_num_threads(int(threads))
settings = BaseQuantizeConfig(bits=4, group_size=128, desc_act=False, sym=True, damp_percent=0.01)
gptq = AutoGPTQForCausalLM.from_pretrained(model, settings, torch_dtype=torch.float32)
gptq.model.config.pad_token_id = 1
imported = time.time()
ids = load_file(tokens)["input_ids"].long()
gptq.quantize([{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids])
quantized = time.time()
gptq.model.half()
gptq.save_pretrained(out, use_safetensors=True)
print(imported - started, quantized - imported, time.time() - quantized)
"""
# Until these are done an interpreter has only been started.
STARTS = {
    "pipeline": ([sys.executable, "-m", "stages.quantize", "method=gptq", "--cfg", "job"], None),
    "coverage": (None, "import torch, transformers, numpy"),
}


def seconds(command: list[str]) -> float:
    """How long a command takes."""
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def bare(python: Path, model: Path, tokens: Path, threads: int) -> dict[str, float]:
    """The library alone, by step, and the whole process."""
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        command = [str(python), "-c", BARE, str(model), str(tokens), out, str(threads)]
        # The worker's own number of threads and waiting policy: two spinning threads can take several times as long.
        variables = toolchains.worker_environment(threads)
        done = subprocess.run(command, cwd=out, env=variables, check=False, capture_output=True, text=True)
        total = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    load, quantize, save = (float(word) for word in done.stdout.split()[-3:])
    return {"total": total, "import and load": load, "quantize": quantize, "save": save}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    rounds, threads = (parser.parse_args().rounds, parser.parse_args().threads)
    python = toolchains.ensure(ROOT, "auto_gptq").python
    reference = toolchains.ensure(ROOT, "reference").python
    options = ("method=gptq", "backend=auto_gptq", "bits=4", f"threads={threads}")
    stage("download", *options)
    stage("calibrate", "variant=overhead", *options)
    model, tokens = ROOT / "scratch/shared/download/model", ROOT / "scratch/overhead/calibrate/tokens.safetensors"
    alone: list[dict[str, float]] = []
    staged: list[float] = []
    starts: dict[str, list[float]] = {"pipeline": [], "coverage": []}
    # In turns, so that a busy moment of the machine does not fall on one of them alone.
    for _ in range(rounds):
        alone.append(bare(python, model, tokens, threads))
        started = time.perf_counter()
        stage("quantize", "variant=overhead", *options)
        staged.append(time.perf_counter() - started)
        starts["pipeline"].append(seconds(STARTS["pipeline"][0]))
        starts["coverage"].append(seconds([str(reference), "-c", STARTS["coverage"][1]]))
    best = min(alone, key=lambda one: one["total"])
    begun = {name: min(times) for name, times in starts.items()}
    overhead = min(staged) - best["total"] - sum(begun.values())
    print(f"bare   {best['total']:.1f} s: " + ", ".join(f"{k} {v:.1f}" for k, v in best.items() if k != "total"))
    print(f"stage  {min(staged):.1f} s, of it interpreters {', '.join(f'{k} {v:.1f}' for k, v in begun.items())}")
    print(f"overhead {overhead:+.1f} s, {100 * overhead / best['total']:+.1f} % of the bare run")
    print(json.dumps(result("overhead", "quantize")["metrics"]))


if __name__ == "__main__":
    main()
