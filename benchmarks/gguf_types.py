"""What llama.cpp's mixtures cost: `python -m benchmarks.gguf_types [--model FOLDER] [--tokens N] [--types Q8_0,Q4_K_M]`.

Of each type it prints a row of Markdown: the change of llama.cpp's own perplexity against the same model in float32, with
the 95 % interval of a paired bootstrap over windows, with an importance matrix and without; real bits a weight of the
linears; bits a weight and size of the whole file. Text is the demo's: evaluation.jsonl in windows of 512 tokens, the
importance matrix from calibration.jsonl. Everything runs in one process of the environment `llamacpp`, with one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,IQ4_XS,Q4_0,Q3_K_M,IQ3_S,Q2_K,IQ2_M"
WINDOW, SAMPLES = 512, 32


def pieces(tokenizer: Any, path: Path, tokens: int) -> list[list[int]]:
    """Windows of the first documents of a file, of so many tokens together."""
    found: list[list[int]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids = list(tokenizer(json.loads(line)["text"])["input_ids"])
        found += [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        if sum(map(len, found)) >= tokens:
            break
    return [one for one in found if len(one) > 1]


def losses(file: Path, windows: list[list[int]]) -> Any:
    """The summed loss of each window, in nats."""
    import numpy as np

    from quantline.toolchains.workers.llamacpp.library import log_probabilities, opened

    with opened(file, window=WINDOW) as llama:
        return np.array([-log_probabilities(llama.logits(one)[:-1], one[1:]).sum() for one in windows])


def importance(model: Path, samples: list[list[int]], names: dict[str, str]) -> dict[str, Any]:
    """As the worker measures it, by the tensors' names in the file."""
    import numpy as np
    import transformers

    from quantline.toolchains.workers.quantizers import llamacpp

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    ids = np.array([one for one in samples if len(one) == WINDOW], dtype=np.int32)
    work = SimpleNamespace(model=loaded, calibration=ids, renamed=str)
    linears = {
        module: name for name, module in names.items() if module.startswith("model.layers.") and "norm" not in module
    }
    found = llamacpp._importance(work, linears, lambda *_step: None)  # type: ignore[arg-type]
    return {linears[module]: values for module, values in found.items()}


def inside(model: Path, tokens: int, kinds: list[str]) -> None:
    """All rows; in the environment `llamacpp`."""
    import numpy as np
    import transformers

    from quantline.checkpoints.layouts.gguf.blocks import BlockType
    from quantline.checkpoints.layouts.gguf.header import read_gguf
    from quantline.checkpoints.layouts.gguf.mixtures import NEEDS_IMATRIX
    from quantline.checkpoints.layouts.gguf.names import parameters
    from quantline.toolchains.workers.llamacpp.conversion import convert
    from quantline.toolchains.workers.llamacpp.writing import quantize_file

    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    windows = pieces(tokenizer, ROOT / "assets/demo/evaluation.jsonl", tokens)
    samples = pieces(tokenizer, ROOT / "assets/demo/calibration.jsonl", SAMPLES * WINDOW * 2)
    samples = [one for one in samples if len(one) == WINDOW][:SAMPLES]
    counts = np.array([len(one) - 1 for one in windows])
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(windows), (2000, len(windows)))
    with tempfile.TemporaryDirectory() as scratch:
        floats, file = Path(scratch, "float.gguf"), Path(scratch, "model.gguf")
        convert(model, floats, [])
        header = read_gguf(floats)
        names = {one.stored: name.rpartition(".")[0] for name, one in parameters(header).items() if ".weight" in name}
        weighed = importance(model, samples, names)
        base = losses(floats, windows)
        print(
            f"float32: perplexity {np.exp(base.sum() / counts.sum()):.4f}, {counts.sum()} tokens",
            file=sys.stderr,
            flush=True,
        )
        print("| type | with importance matrix | without | bits a weight of linears | of the file | size |")
        print("| --- | --- | --- | ---: | ---: | ---: |", flush=True)
        for kind in kinds:
            told = []
            for given in (weighed, None):
                if given is None and kind in NEEDS_IMATRIX:
                    told.append("-")
                    continue
                quantize_file(floats, file, kind, given, threads=1, report=lambda *_step: None)
                change = losses(file, windows) - base
                ratios = np.expm1(change[drawn].sum(axis=1) / counts[drawn].sum(axis=1)) * 100
                low, high = np.quantile(ratios, [0.025, 0.975])
                told.append(f"{100 * np.expm1(change.sum() / counts.sum()):+.2f} % [{low:+.2f}, {high:+.2f}]")
            tensors = read_gguf(file).tensors
            inner = [
                one for name, one in tensors.items() if name.startswith("blk.") and isinstance(one.kind, BlockType)
            ]
            every = [one for one in tensors.values() if len(one.shape) > 1]

            def bits(chosen: list[Any]) -> float:
                return 8 * sum(one.nbytes for one in chosen) / sum(int(np.prod(one.shape)) for one in chosen)

            size = sum(one.nbytes for one in tensors.values()) / 1e6
            print(
                f"| {kind} | {' | '.join(told)} | {bits(inner):.2f} | {bits(every):.2f} | {size:.2f} MB |", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "assets/demo/model", help="folder of a float model")
    parser.add_argument("--tokens", type=int, default=85_000, help="of the text that is scored")
    parser.add_argument("--types", default=TYPES, help="mixtures, with commas between them")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.model, options.tokens, options.types.split(","))
        return
    from quantline.toolchains.environments import ensure
    from quantline.toolchains.toolchain import worker_environment

    python = ensure(ROOT, "llamacpp").python
    command = [str(python), __file__, "--inside", "--model", str(options.model), "--tokens", str(options.tokens)]
    sys.exit(subprocess.run([*command, "--types", options.types], env=worker_environment(1), check=False).returncode)


if __name__ == "__main__":
    main()
