"""The files of a model other than its weights."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

# Files that are kept whatever the layout of the weights.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates", "LICENSE*", "NOTICE*",
)  # fmt: skip


TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "*.tiktoken", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip


# The model card, which is written where a model leaves the project; no stage's output has one.
CARD = "README.md"

# Any one of these can be a tokenizer, see `tokenizer_fault`.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")


# Makes tokenizer.json from any other vocabulary, as transformers understands it.
_MAKE = (
    "uv run --no-project --with transformers --with sentencepiece --with protobuf python -c "
    "\"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{0}').save_pretrained('{0}')\""
)


def tokenizer_fault(model: Path, shown: str = "DIR") -> str | None:
    """Why the files of a folder are no tokenizer that every stage reads alike; None if they are. Nothing is loaded.

    SentencePiece's own file is none: transformers reads it by the rules of the model's family, and where the family has
    others than the file, it makes another tokenizer without a word (5.19, model_type qwen2). Most environments lack the
    library, too.

    shown: the folder, in the command that makes tokenizer.json.
    """
    names = sorted(path.name for path in model.iterdir())
    found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in VOCABULARIES)]
    if not found:
        return f"has no tokenizer; add one of {', '.join(VOCABULARIES)} to the model"
    if all(name.endswith(".model") for name in found):
        lacks = f"has only SentencePiece's {found[0]} for a tokenizer, and needs tokenizer.json"
    elif found == ["vocab.json"] and "merges.txt" not in names:
        lacks = "has vocab.json without merges.txt, and needs both, or tokenizer.json"
    else:
        return None
    return f"{lacks}; take a revision that has it, or make it in a copy of the model: {_MAKE.format(shown)}"


def has_chat_template(model: Path) -> bool:
    """Whether the checkpoint's tokenizer has a chat template; vLLM refuses chat requests without one."""
    if (model / "chat_template.jinja").is_file() or (model / "chat_template.json").is_file():
        return True
    settings = model / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
