"""Run by vLLM's interpreter: load checkpoints one after the other, a process each, and score tokens with them.

    python vllm_answers.py JOB RESULT

JOB is JSON, a list of objects: `path`, `dtype`, `text_only` and `ids` (lists of token ids). RESULT is a list in the same
order, with the `error` of a load or a forward pass, empty where there is none, and `scores`: the log-probability of every
token of `ids` but the first of each list.
"""

from __future__ import annotations

import glob
import json
import os
import sys
from typing import Any

IDENTITY = f"quantline-answers-{os.getpid()}"  # names the shared memory that is left behind
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_DIST_IDENT=IDENTITY,
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)


def main(job_path: str, result_path: str) -> None:
    import vllm  # noqa: F401  (imported once, before the forks)
    from vllm.model_executor.models import registry

    # A class is looked at in a process of its own; this one is.
    registry._run_in_subprocess = lambda function: function()
    with open(job_path) as file:
        job = json.load(file)
    results = []
    for one in job:
        part = f"{result_path}.part"
        process = os.fork()
        if not process:
            with open(part, "w") as file:
                json.dump(answered(one), file)
            os._exit(0)
        os.waitpid(process, 0)
        for left in glob.glob(f"/dev/shm/{IDENTITY}*"):
            os.unlink(left)
        with open(part) as file:
            results.append(json.load(file))
    with open(result_path, "w") as file:
        json.dump(results, file)


def answered(one: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    try:
        model = LLM(
            model=one["path"], dtype=one["dtype"], max_model_len=128, enforce_eager=True, max_num_seqs=4,
            kv_cache_memory_bytes=64 << 20, enable_prefix_caching=False, generation_config="vllm",
            language_model_only=one.get("text_only", False),
        )  # fmt: skip
        outputs = model.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in one["ids"]],
            SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=1), use_tqdm=False,
        )  # fmt: skip
        scores = [
            [place[token].logprob for place, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, one["ids"], strict=True)
        ]
    except Exception as error:  # whatever vLLM says is what is asked for
        return {"error": f"{type(error).__name__}: {error}", "scores": None}
    return {"error": "", "scores": scores}


if __name__ == "__main__":
    main(*sys.argv[1:])
