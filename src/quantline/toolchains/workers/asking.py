"""Ask a checkpoint questions in a row by its own library, without a server: transformers, AutoAWQ or GPTQModel.

A job holds (paths are strings):

`checkpoint`    the model's folder.
`library`       `transformers`: AutoModelForCausalLM, for float models, and for AWQ where GPTQModel is installed beside it.
                `autoawq`: AutoAWQForCausalLM.from_quantized, with its fused modules where `fuse` is true.
                `gptqmodel`: GPTQModel.load.
`attention`     `eager`, `sdpa` or `flash_attention_2`, as transformers names it; null for `autoawq`, which has its own.
`fuse`, `fuse_max_seq_len`   AutoAWQ's fused modules, and the tokens that their cache holds.
`questions`     asked one after the other, each alone; greedy answers of at most `max_tokens` tokens.
`device`, `threads`.

Result: `load_seconds`, `memory_before` (loaded, before the first question) and `memory_after`, `dtype`, `linear` (the class
that computes a quantized linear), `used_attention` (what the loaded model says), and `answers`: question, answer, tokens,
seconds. Memory is in bytes: what torch holds on the GPU, or the process's resident memory on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.toolchains.protocol import JobError, Reporter, worker_main

LIBRARIES = ("transformers", "autoawq", "gptqmodel")


def _memory(device: str) -> int:
    import psutil
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        return sum(int(torch.cuda.memory_reserved(index)) for index in range(torch.cuda.device_count()))
    return int(psutil.Process().memory_info().rss)


def _load(job: Mapping[str, Any]) -> Any:
    folder, device = str(job["checkpoint"]), str(job["device"])
    match job["library"]:
        case "autoawq":
            from awq import AutoAWQForCausalLM

            fused = {"fuse_layers": True, "max_seq_len": int(job["fuse_max_seq_len"])} if job["fuse"] else {}
            own = {} if job["fuse"] else {"fuse_layers": False}
            return AutoAWQForCausalLM.from_quantized(
                folder, device_map="auto" if device == "cuda" else "cpu", trust_remote_code=False, **fused, **own
            ).model
        case "gptqmodel":
            from gptqmodel import GPTQModel

            place = f"{device}:0" if device == "cuda" else device
            return GPTQModel.load(folder, device=place, attn_implementation=job["attention"]).model
        case "transformers":
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation=job["attention"], dtype="auto", device_map=device, local_files_only=True
            )
    raise JobError(f"library {job['library']}: allowed are {', '.join(LIBRARIES)}")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # As in `quantline.data.tokenizer`: AutoTokenizer would replace the file's splitting by that of the model family.
    loader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    return loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def _linear(model: Any) -> str:
    names = {type(module).__name__ for name, module in model.named_modules() if name.endswith(("q_proj", "qkv_proj"))}
    return ", ".join(sorted(names)) or "unknown"


def run(job: dict[str, Any], report: Reporter) -> dict[str, Any]:
    """Load and ask.

    Raises:
        JobError: the library does not load it as the job says.
    """
    import torch

    torch.set_num_threads(int(job["threads"]))
    device, started = str(job["device"]), time.monotonic()
    try:
        model = _load(job)
    except (ImportError, ValueError, TypeError, NotImplementedError) as error:
        raise JobError(f"{job['library']} does not load it: {error}") from error
    tokenizer = _tokenizer(Path(str(job["checkpoint"])))
    loaded, before = time.monotonic() - started, _memory(device)
    answers: list[dict[str, Any]] = []
    for number, question in enumerate(job["questions"], start=1):
        text = question
        if tokenizer.chat_template:
            asked = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt").input_ids.to(device)
        begun = time.monotonic()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(job["max_tokens"]), do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )  # fmt: skip
        new = out[0, ids.shape[1] :].tolist()
        answers.append({
            "question": question, "answer": tokenizer.decode(new, skip_special_tokens=True), "tokens": len(new),
            "seconds": time.monotonic() - begun,
        })  # fmt: skip
        report(number, len(job["questions"]), "questions")
    return {
        "load_seconds": loaded, "memory_before": before, "memory_after": _memory(device), "answers": answers,
        "used_attention": getattr(model.config, "_attn_implementation", None),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "linear": _linear(model),
    }  # fmt: skip


if __name__ == "__main__":
    worker_main(run)
