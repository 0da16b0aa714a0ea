"""The files of a model other than its weights."""

from __future__ import annotations

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


# Any one of these is enough for a tokenizer.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")


def has_chat_template(model: Path) -> bool:
    """Whether the checkpoint's tokenizer has a chat template; vLLM refuses chat requests without one."""
    if (model / "chat_template.jinja").is_file() or (model / "chat_template.json").is_file():
        return True
    settings = model / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
