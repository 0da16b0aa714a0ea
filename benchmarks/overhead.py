"""The overhead of the quantize stage over the library: `python -m benchmarks.overhead [--method gptq|awq] [--rounds 3]`.

The same job at 4 bits on the demo model and its calibration tokens, twice:

bare    a script in AutoGPTQ's or AutoAWQ's environment: import, load, the library's `quantize`, the library's own save
        function (with the workarounds that the library needs on a machine without a GPU)
stage   `python -m stages.quantize`: configuration, preflight, the parity probe, the same library call, our writer, the
        reading back of the result, the gate on layer errors

The stage starts two more interpreters. The pipeline's starts first; its time until the imports are done is measured
separately, printed and subtracted. The one that measures layer errors starts in parallel with the library's and imports on
the other core, so only its CPU time is subtracted, not its wall time. Bare and staged runs alternate in pairs; medians over
the rounds are printed. CPU seconds cover all processes; on a shared machine they are more reliable than wall time.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.methods import ROOT, result, stage
from quantline.toolchains import environments, toolchain

BARE = {
    "gptq": """
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
""",
    "awq": """
import sys, time
started = time.time()
import torch
import awq.modules.linear.gemm
from awq import AutoAWQForCausalLM
from safetensors.torch import load_file
awq.modules.linear.gemm.TRITON_AVAILABLE = False
model, tokens, out, threads = sys.argv[1:5]
torch.set_num_threads(int(threads))
awq = AutoAWQForCausalLM.from_pretrained(model, torch_dtype=torch.float32, device_map="cpu", use_cache=False)
imported = time.time()
ids = load_file(tokens)["input_ids"]
awq.quantize(
    quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, calib_data=ids.tolist(),
    max_calib_samples=len(ids), max_calib_seq_len=ids.shape[1],
)
quantized = time.time()
awq.save_quantized(out)
print(imported - started, quantized - imported, time.time() - quantized)
""",
}
BACKENDS = {"gptq": "auto_gptq", "awq": "autoawq"}
# The start of an interpreter ends when these are done.
PIPELINE = [sys.executable, "-m", "stages.quantize", "method=gptq", "--cfg", "job"]
IMPORTS = "from quantline.toolchains.workers.reference.layer_errors import imports; imports()"


@dataclass(frozen=True)
class Cost:
    """Wall and CPU seconds, or shares of them."""

    wall: float
    cpu: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall - other.wall, self.cpu - other.cpu)


@contextmanager
def costs(found: list[Cost]) -> Iterator[None]:
    """Record the cost of the processes that are started inside the block."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    started, before = time.perf_counter(), cpu()
    yield
    found.append(Cost(time.perf_counter() - started, cpu() - before))


def bare(method: str, python: Path, model: Path, tokens: Path, threads: int) -> dict[str, float]:
    """Run only the library; returns its seconds by step."""
    with tempfile.TemporaryDirectory() as out:
        command = [str(python), "-c", BARE[method], str(model), str(tokens), out, str(threads)]
        # The worker's number of threads and wait policy: two spinning threads can take several times as long.
        variables = toolchain.worker_environment(threads)
        done = subprocess.run(command, cwd=out, env=variables, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(zip(("load", "quantize", "save"), map(float, done.stdout.split()[-3:]), strict=True))


def median(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(one.wall for one in costs), statistics.median(one.cpu for one in costs))


def told(name: str, cost: Cost) -> str:
    return f"{name:<28}{cost.wall:7.1f} s {cost.cpu:7.1f} s of CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=BACKENDS, default="gptq")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--samples", type=int, default=32, help="calibration samples of 512 tokens; the field takes 128"
    )
    asked = parser.parse_args()
    method, rounds, threads = asked.method, asked.rounds, asked.threads
    python = environments.ensure(ROOT, BACKENDS[method]).python
    reference = environments.ensure(ROOT, "reference").python
    options = (f"method={method}", f"backend={BACKENDS[method]}", "bits=4", f"threads={threads}")
    options += (f"calibration.n_samples={asked.samples}",)
    stage("download", *options)
    stage("calibrate", "variant=overhead", *options)
    model = next(ROOT.glob("scratch/float/demo-*/download/model"))
    tokens = ROOT / "scratch/overhead/calibrate/tokens.safetensors"
    alone: list[Cost] = []
    staged: list[Cost] = []
    starts: dict[str, list[Cost]] = {"pipeline": [], "coverage": []}
    steps: list[dict[str, float]] = []
    shares: list[Cost] = []
    for number in range(rounds):
        with costs(starts["pipeline"]):
            subprocess.run(PIPELINE, cwd=ROOT, check=True, capture_output=True)
        with costs(starts["coverage"]):
            subprocess.run(
                [str(reference), "-c", IMPORTS], check=True, capture_output=True, env=toolchain.worker_environment(1)
            )
        for what in ("bare", "stage") if number % 2 == 0 else ("stage", "bare"):
            with costs(alone if what == "bare" else staged):
                if what == "bare":
                    steps.append(bare(method, python, model, tokens, threads))
                else:
                    stage("quantize", "variant=overhead", *options)
    print(told("bare library", median(alone)), steps[-1])
    print(told("stage", median(staged)), result("overhead", "quantize")["metrics"])
    print(told("start of the pipeline", median(starts["pipeline"])))
    print(told("start of the gate's worker", median(starts["coverage"])))
    rest: list[Cost] = []
    for number, base in enumerate(alone):
        first, second = starts["pipeline"][number], starts["coverage"][number]
        over = staged[number] - first - base - Cost(0.0, second.cpu)
        rest.append(over)
        shares.append(Cost(100 * over.wall / base.wall, 100 * over.cpu / base.cpu))
        print(f"round {number + 1}: {shares[-1].wall:+.1f} % by the clock, {shares[-1].cpu:+.1f} % of CPU")
    print(told("overhead beside the starts", median(rest)))
    print(f"{'median share':<28}{median(shares).wall:+.1f} % by the clock, {median(shares).cpu:+.1f} % of CPU")


if __name__ == "__main__":
    main()
