"""Run by vLLM's interpreter: load checkpoints, many in one process, and ask their linears.

    python vllm_loads.py JOB RESULT

JOB is JSON: `avx512` (false hides it from torch, so that vLLM takes its library for AVX2) and `runs`, each with `ranks` (a
process each, forked from this one, which has vLLM imported) and `loads`: triples of a path, a dtype and a tensor parallel
size. RESULT gets `avx512`, what torch says of the CPU, and for each run and load `error` (empty where it loaded and
computes on all ranks) and `worst`: how far its linears' outputs are from those of the dequantized weights, relative to
their size. With several ranks only linears that are split along their input are asked, each rank for its share.
"""

from __future__ import annotations

import glob
import json
import os
import sys
import tempfile
from typing import Any

# Names the ranks' shared memory, which they leave behind.
IDENTITY = f"quantline-{os.getpid()}"
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_DIST_IDENT=IDENTITY,
)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def main(job_path: str, result_path: str) -> None:
    import torch

    with open(job_path) as file:
        job = json.load(file)
    avx512 = bool(torch.cpu._is_avx512_supported())
    if not job["avx512"]:
        torch.cpu._is_avx512_supported = lambda: False
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()  # as vLLM's own worker does on a CPU
    current_platform.import_kernels()
    runs = []
    for run in job["runs"]:
        with tempfile.TemporaryDirectory() as folder:
            ranks = [forked(run, rank, folder) for rank in range(run["ranks"])]
            failed = [os.waitpid(rank, 0)[1] for rank in ranks]
            for left in glob.glob(f"/dev/shm/{IDENTITY}-*"):
                os.unlink(left)
            if any(failed):
                sys.exit(f"a rank failed: {failed}")
            runs.append(
                [merged(parts) for parts in zip(*(read(folder, rank) for rank in range(run["ranks"])), strict=True)]
            )
    with open(result_path, "w") as file:
        json.dump({"avx512": avx512, "runs": runs}, file)


def read(folder: str, rank: int) -> list[dict[str, Any]]:
    with open(os.path.join(folder, f"{rank}.json")) as file:
        return json.load(file)


def merged(parts: Any) -> dict[str, Any]:
    error = next((part["error"] for part in parts if part["error"]), "")
    return {"error": error, "worst": None if error else max(part["worst"] for part in parts)}


def forked(run: dict[str, Any], rank: int, folder: str) -> int:
    process = os.fork()
    if process:
        return process
    try:
        results = loads(run, rank, os.path.join(folder, "rendezvous"))
        with open(os.path.join(folder, f"{rank}.json"), "w") as file:
            json.dump(results, file)
        os._exit(0)
    finally:
        os._exit(1)


def loads(run: dict[str, Any], rank: int, rendezvous: str) -> list[dict[str, Any]]:
    import numpy as np
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    results, first = [], True
    for folder, dtype, size in run["loads"]:
        try:
            config = EngineArgs(
                model=folder, dtype=dtype, max_model_len=32, enforce_eager=True, tensor_parallel_size=size
            ).create_engine_config()
            with set_current_vllm_config(config), torch.no_grad():
                if first:
                    init_distributed_environment(run["ranks"], rank, f"file://{rendezvous}", rank, "gloo")
                    initialize_model_parallel(run["ranks"], 1)
                    first = False
                model = get_model(vllm_config=config)
                reference = dict(np.load(os.path.join(folder, "dequantized.npz")))
                if run["ranks"] > 1:
                    rows = {name: value for name, value in reference.items() if name.endswith(("o_proj", "down_proj"))}
                    reference = {name: np.split(value, run["ranks"], axis=1)[rank] for name, value in rows.items()}
                worst = worst_error(model, reference, config.model_config.dtype)
            results.append({"error": "", "worst": worst})
        except Exception as error:  # whatever vLLM says is what is asked for
            results.append({"error": f"{type(error).__name__}: {error}", "worst": None})
    return results


def worst_error(model: Any, reference: dict[str, Any], dtype: Any) -> float:
    import numpy as np
    import torch

    worst, compared = 0.0, 0
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in FUSED.get(last, ())] or [name]
        if not all(part in reference for part in parts) or not hasattr(module, "quant_method"):
            continue
        weight = torch.from_numpy(np.concatenate([reference[part] for part in parts])).float()
        inputs = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        outputs = module.quant_method.apply(module, inputs, None).float()[:, : weight.shape[0]]
        expected = inputs.float() @ weight.T
        worst = max(worst, float((outputs - expected).norm() / expected.norm()))
        compared += 1
    if reference and not compared:
        raise RuntimeError("no linear of the loaded model is a quantized one of the checkpoint")
    return worst


if __name__ == "__main__":
    main(*sys.argv[1:])
