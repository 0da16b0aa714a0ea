"""How many requests the verdict on a canary needs: `python -m benchmarks.canary_swaps FOLDER [--limits 0.0005 0.02]`.

FOLDER is a GPTQ or AWQ checkpoint, which the canary is to follow. In each of its linears in turn two rows of scales are
swapped, those that differ most; with --together in all of them at once. Requests are the demo's evaluation text, 30 words
each. Both are scored by the reference engine, and judged by the verdict of `stages.shadow` on the first 20, 50, 100, ...
requests. A line a canary says what the swap costs, and for each limit the verdict and the number of requests from which on
it stays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

WEIGHTS = "model.safetensors"
WORDS = 30
STEPS = (20, 50, 100, 150, 200, 300, 400, 600, 800, 1200)


def main() -> int:
    import numpy as np
    from tabulate import tabulate

    from quantline.checkpoints.checkpoint import write_safetensors
    from quantline.checkpoints.safetensors_file import SafetensorsFile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limits", type=float, nargs="*", default=[0.0005, 0.02])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--only", default="", help="linears whose names contain this")
    parser.add_argument(
        "--together", action="store_true", help="one canary with all of them, as a faulty converter makes it"
    )
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        requests = asked(given.folder, given.requests)
        offsets = np.cumsum([0, *map(len, requests)])
        windows = {"input_ids": np.concatenate(requests).astype(np.int32), "offsets": offsets.astype(np.int64)}
        write_safetensors(place / "windows.safetensors", windows)
        sound = scored(given.folder, place, offsets)
        infos = SafetensorsFile.open(given.folder / WEIGHTS).infos
        keys = [
            key for key, info in infos.items() if key.endswith(".scales") and given.only in key and info.shape[0] > 1
        ]
        for group in [keys] if given.together else [[key] for key in keys]:
            canary = swapped(given.folder, place / "canary", [infos[key] for key in group])
            found = judged(scored(canary, place, offsets), sound, given.limits)
            name = f"{len(group)} linears" if len(group) > 1 else group[0].removesuffix(".scales")
            rows.append({"swapped in": name, **found})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    rows.sort(key=lambda row: -row["perplexity %"])
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    return 0


def swapped(model: Path, canary: Path, tensors: list[Any]) -> Path:
    """A copy of a checkpoint with two rows swapped of each of these tensors of float16 scales."""
    import numpy as np

    shutil.rmtree(canary, ignore_errors=True)
    shutil.copytree(model, canary)
    for info in tensors:
        scales = np.memmap(canary / WEIGHTS, np.float16, "r+", offset=info.offset, shape=tuple(info.shape))
        values = scales.astype(np.float32)
        pairs = [(one, two) for one in range(len(values)) for two in range(one)]
        one, two = max(pairs, key=lambda pair: float(np.abs(values[pair[0]] - values[pair[1]]).sum()))
        scales[[one, two]] = scales[[two, one]]
        scales.flush()
    return canary


def asked(model: Path, most: int) -> list[Any]:
    """The requests as token ids."""
    import numpy as np

    from quantline.data.tokenizer import TextEncoder

    texts = [json.loads(line)["text"] for line in (ROOT / "assets/demo/evaluation.jsonl").open(encoding="utf-8")]
    words = [word for text in texts for word in text.split()]
    chunks = [" ".join(words[start : start + WORDS]) for start in range(0, len(words), WORDS)]
    chunks = chunks[:: max(1, len(chunks) // most)][:most]
    tokenizer = TextEncoder.load(model, chat=False).tokenizer
    return [np.array(ids) for ids in tokenizer(chunks, add_special_tokens=False)["input_ids"]]


def scored(model: Path, place: Path, offsets: Any) -> list[Any]:
    """The log-probabilities of each request's tokens, without that of the first, which has none."""
    import numpy as np

    from quantline.checkpoints.safetensors_file import SafetensorsFile
    from quantline.toolchains import environments
    from quantline.toolchains.runner import run_worker

    job = {
        "checkpoint": str(model.absolute()), "windows": str(place / "windows.safetensors"), "output": str(place / "scores"),
        "device": "cpu", "threads": 1, "batch_tokens": 2048,
    }  # fmt: skip
    worker = "quantline.toolchains.workers.reference.evaluate"
    run_worker(environments.ensure(ROOT, "reference"), worker, job, log=place / "log", threads=1, label="scoring")
    values = SafetensorsFile.open(place / "scores").read("logprobs").astype(np.float64)
    return [values[start + 1 : end] for start, end in itertools.pairwise(offsets)]


def judged(canary: list[Any], sound: list[Any], limits: list[float]) -> dict[str, Any]:
    """What the swap costs, and the verdict by each limit with the number of requests from which on it stays."""
    from quantline.config.evaluate import BootstrapConfig
    from quantline.core.text import percent
    from quantline.evaluation.nats import growth
    from quantline.evaluation.shadow_verdict import judge

    how = BootstrapConfig(resamples=2000, level=0.95, seed=0)
    row: dict[str, Any] = {}
    steps = [step for step in STEPS if step < len(sound)] + [len(sound)]
    for limit in limits:
        verdicts = [judge(canary[:step], sound[:step], most_increase=limit, how=how) for step in steps]
        last = verdicts[-1]
        row.setdefault("perplexity %", 100 * growth(last.difference.estimate))
        since = steps[-1]
        for step, verdict in zip(reversed(steps), reversed(verdicts), strict=True):
            if verdict.verdict != last.verdict:
                break
            since = step
        text = f"undecided, about {last.enough}" if last.verdict == "undecided" else f"{last.verdict} from {since} on"
        row[f"limit {percent(limit, 2)}"] = text
        row.setdefault("worse at all from", next(
            (step for step, verdict in zip(steps, verdicts, strict=True) if verdict.difference.low > 0), None
        ))  # fmt: skip
    return row


if __name__ == "__main__":
    sys.exit(main())
