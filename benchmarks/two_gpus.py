"""Two GPUs: `python -m benchmarks.two_gpus [PART ...] [NAME=VALUE ...]`; without a part, all of them.

serve     tensor_parallel_size=2: variants of Llama-2-7B's shape in the layouts that vLLM runs, served and scored, each
          compared with the reference engine, which computes on one GPU
quantize  GPTQ by llm-compressor on one and on two GPUs, of Qwen3-8B's shape: seconds, memory of each GPU, equal weights
evaluate  the same model scored on one and on two GPUs: seconds, equal results
sweep     four variants by the local launcher on one and on two GPUs: seconds, and the GPU that each job had

The models have random weights and the demo's tokenizer, see `benchmarks.large`; `--layers N` are their first layers. Without
GPUs, `quantize evaluate sweep --shape tiny device=cpu` tries the script itself, with processes in the place of GPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from benchmarks.large import folder_of, make_model, shape_of
from benchmarks.methods import ROOT
from quantline.pipeline.paths import SAVED

PARTS = {"serve": "llama-2-7b", "quantize": "qwen3-8b", "evaluate": "qwen3-8b", "sweep": "qwen3-8b"}
# What is served; weights rounded to nearest in one layout and converted into another are as good as any for this.
SERVED = {
    "float": "method=float",
    "awq": "method=rtn method.sym=false bits=4 group_size=128 convert.target=awq",
    "gptq-w4": "method=rtn bits=4 group_size=128 convert.target=gptq",
    "gptq-w8": "method=rtn bits=8 group_size=128 convert.target=gptq",
    "compressed-tensors": "method=rtn bits=4 group_size=128 convert.target=compressed_tensors",
    "fp8": "method=fp8",
}
SWEPT = ("rtn-w4", "rtn-w8", "gptq-w4", "gptq-w8")
# Short measurements: what is compared is whether two GPUs say the same as one.
SHORT = (
    "evaluate.generations.prompts=8 evaluate.restore.layers=0 calibration=demo tasks=none "
    "speed=none tracking.enabled=false"
).split()
GPTQ = "method=gptq bits=4 group_size=128 backend=llmcompressor".split()


def made(name: str) -> Path:
    """The folder of a shape's model, written if it is not there."""
    folder = folder_of(name)
    if not (folder / "config.json").exists():
        started = time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        make_model(folder, shape_of(name))
        print(f"made {folder.name} in {time.perf_counter() - started:.0f} s", flush=True)
    return folder


def run(stage: str, *overrides: str, root: Path = ROOT, **variables: str) -> float:
    """Run a stage; returns its seconds. Where it fails, its last lines are printed.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    started = time.perf_counter()
    command = [sys.executable, "-m", f"stages.{stage}", *overrides]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        print(f"{stage} {' '.join(overrides)}: exit {done.returncode}\n{done.stdout[-3000:]}", flush=True)
        raise subprocess.CalledProcessError(done.returncode, command)
    return time.perf_counter() - started


def results(model: Path, stage: str) -> dict[str, dict[str, Any]]:
    """The results of a stage of a model by hand, by the name of the variant."""
    found = {}
    for path in sorted(ROOT.glob(f"scratch/**/{stage}.json")):
        saved = path.parent / SAVED
        if saved.is_file() and json.loads(saved.read_text())["config"]["model"]["path"] == str(model):
            found[path.parent.name] = {**json.loads(path.read_text()), "folder": path.parent / stage}
    return found


def serve(shape: str, given: Sequence[str]) -> None:
    """See the module's description."""
    model = made(shape)
    common = [
        "model=custom",
        f"model.path={model}",
        *SHORT,
        *given,
        "evaluate.max_tokens=8000",
        "serve.process.gpu_memory_utilization=0.15",
    ]
    split = "serve.process.tensor_parallel_size=2"
    run("run", "until=evaluate", "variant=float", *SERVED["float"].split(), *common, split)
    names = [name for name in SERVED if name != "float"]

    def one(name: str) -> str:
        try:
            run("run", "until=evaluate", f"variant=tp2-{name}", *SERVED[name].split(), *common, split)
        except subprocess.CalledProcessError:
            return "failed"
        return "served"

    with ThreadPoolExecutor(len(names)) as pool:
        told = dict(zip(names, pool.map(one, names), strict=True))
    judged, smoked = results(model, "evaluate"), results(model, "serve_smoke")
    print(f"{'tensor_parallel_size=2':<22} {'':<8} {'engine':>10} {'reference':>10} {'vLLM':>10} {'GPU GB':>8}")
    for name in SERVED:
        place = name if name == "float" else f"tp2-{name}"
        metrics = judged.get(place, {}).get("metrics", {})
        memory = smoked.get(place, {}).get("metrics", {}).get("gpu_memory_bytes")
        keys = ("engine_relative_difference", "reference_perplexity", "vllm_perplexity")
        apart, own, served = (metrics.get(key, float("nan")) for key in keys)
        shown = "-" if memory is None else f"{memory / 1e9:.2f}"
        print(f"{name:<22} {told.get(name, 'served'):<8} {apart:>10.2e} {own:>10.1f} {served:>10.1f} {shown:>8}")


def _hashes(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def quantize(shape: str, given: Sequence[str]) -> None:
    """See the module's description."""
    model = made(shape)
    common = [
        "model=custom",
        f"model.path={model}",
        *SHORT,
        *given,
        *GPTQ,
        "instruments=none",
    ]
    run("run", "until=calibrate", *common)
    print(f"{'GPTQ':<34} {'stage s':>8} {'library s':>10} {'GPU GB':>14}  weights")
    for sequential in (True, False):
        for gpus in (1, 2):
            name = f"gptq-{'linear' if sequential else 'layer'}-{gpus}"
            wanted = [f"variant={name}", f"quantize.gpus={gpus}", f"method.true_sequential={str(sequential).lower()}"]
            seconds = run("quantize", *common, *wanted)
            result = results(model, "quantize")[name]
            peaks = [
                value / 1e9
                for key, value in sorted(result["monitor"]["peak"].items())
                if "gpu" in key and "memory_used" in key
            ]
            label = f"{'linear by linear' if sequential else 'layer by layer'}, {gpus} GPU{'s' if gpus > 1 else ''}"
            print(
                f"{label:<34} {seconds:>8.0f} {result['metrics']['quantize_seconds']:>10.0f} "
                f"{' + '.join(f'{peak:.2f}' for peak in peaks):>14}  {_hashes(result['folder'])}  "
                f"rms {result['metrics']['probe_quantized_rms']:.4f}", flush=True,
            )  # fmt: skip


def evaluate(shape: str, given: Sequence[str]) -> None:
    """See the module's description."""
    model = made(shape)
    common = ["model=custom", f"model.path={model}", *SHORT, *given, "evaluate.max_tokens=60000", "variant=rtn"]
    common += "method=rtn bits=4 group_size=128 convert.target=gptq evaluate.divergence.tokens=null".split()
    common += ["serve.process.gpu_memory_utilization=0.4"]
    run("run", "until=evaluate", *common)
    found = {}
    for gpus in (1, 2):
        seconds = run("evaluate", *common, f"evaluate.gpus={gpus}")
        result = results(model, "evaluate")["rtn"]
        found[gpus] = {key: value for key, value in result["metrics"].items() if "per_second" not in key}
        found[gpus]["scores"] = _hashes(result["folder"])
        rate = result["metrics"]["reference_tokens_per_second"]
        print(
            f"evaluate on {gpus} GPU: {seconds:.0f} s, {rate:.0f} tokens/s while scoring, {found[gpus]['scores']}",
            flush=True,
        )
    unlike = [key for key in found[1] if found[1][key] != found[2][key]]
    print(f"results: {'equal' if not unlike else 'other values of ' + ', '.join(unlike)}")


def sweep(shape: str, given: Sequence[str]) -> None:
    """See the module's description."""
    model = made(shape)
    methods = {"rtn": "method=rtn", "gptq": "method=gptq backend=llmcompressor"}
    lines = {name: f"{methods[name.split('-')[0]]} bits={name[-1]} group_size=128" for name in SWEPT}
    shared = " ".join(["model=custom", f"model.path={model}", *SHORT, *given])
    asked = yaml.safe_dump({"shared": shared, "baseline": "method=float", "variants": lines}, width=10_000)
    taken = {}
    for workers in (1, 2):
        home = ROOT / ".bench" / f"sweep-{workers}"
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(home)], check=True)
        (home / "params.yaml").write_text(asked)
        if (ROOT / ".venvs").is_dir():
            (home / ".venvs").symlink_to((ROOT / ".venvs").resolve())
        settings = [f"workers={workers}", "gpus=1", "launcher=local", "until=convert"]
        taken[workers] = run("sweep", *settings, root=home, CUDA_VISIBLE_DEVICES="0,1")
        jobs = [json.loads(path.read_text()) for path in sorted(home.glob("scratch/sweep/*/jobs/*.json"))]
        for job in jobs:
            began = job["started"] - min(other["started"] for other in jobs)
            print(f"  {workers} at a time: {job['variant']:<8} {job['state']} on GPU {','.join(job['gpus'])}, "
                  f"{began:.0f} s to {began + job['seconds']:.0f} s")  # fmt: skip
        for gpu in {gpu for job in jobs for gpu in job["gpus"]}:
            spans = sorted((job["started"], job["started"] + job["seconds"]) for job in jobs if gpu in job["gpus"])
            free = all(before[1] <= after[0] + 1 for before, after in pairwise(spans))
            print(f"  GPU {gpu}: {len(spans)} jobs, {'one after the other' if free else 'AT THE SAME TIME'}")
        files = {path.relative_to(home).as_posix(): _hashes(path) for path in sorted(home.glob("artifacts/*/convert"))}
        print(f"  {files}")
    print(f"sweep of {len(SWEPT)}: {taken[1]:.0f} s by one worker, {taken[2]:.0f} s by two", flush=True)


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default all")
    parser.add_argument("--layers", type=int, default=8, help="of each model; default 8")
    parser.add_argument("--shape", help="of all parts; default Llama-2-7B's for serve, Qwen3-8B's for the others")
    given, overrides = parser.parse_known_args()
    overrides += [word for word in given.parts if "=" in word]
    parts = [word for word in given.parts if "=" not in word] or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"{unknown[0]}: give one of {', '.join(PARTS)}")
    for part in parts:
        started = time.perf_counter()
        print(f"== {part}", flush=True)
        {"serve": serve, "quantize": quantize, "evaluate": evaluate, "sweep": sweep}[part](
            given.shape or f"{PARTS[part]}:{given.layers}", overrides
        )
        print(f"== {part}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
