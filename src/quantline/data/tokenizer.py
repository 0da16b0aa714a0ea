"""A model's tokenizer, loaded from its folder without network access and without running the model's code."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.checkpoints.model_config import dimensions, language_config, read_config
from quantline.checkpoints.model_files import TOKENIZER, matching, tokenizer_fault
from quantline.core.errors import UserError
from quantline.core.files import sha256_of
from quantline.data.documents import Document

# Texts that a tokenizer is asked for: words, numbers and signs, other scripts.
_ASKED = ("the time of a day", "def f(x):\n    return x[0] + 12.5  # 1 % 2", "Zoë Łódź, Привет, 你好, 😀")


@dataclass(frozen=True)
class TextEncoder:
    """Turns documents into token ids.

    separator: the end-of-sequence id, None if there is none. vocab_size: rows of the model's embedding. max_length: the
    most tokens that the model takes, None if config.json does not say. sha256: of the tokenizer's files.
    """

    tokenizer: Any
    chat: bool
    separator: int | None
    vocab_size: int
    max_length: int | None
    sha256: str

    @classmethod
    def load(cls, model_dir: Path, *, chat: bool) -> TextEncoder:
        """Load the tokenizer of a model.

        Raises:
            UserError: it is missing or damaged, needs custom code, or has no chat template although `chat` is set.
        """
        config = read_config(model_dir)
        tokenizer = _load(model_dir)
        if chat and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"calibration.chat_template=true: the tokenizer in {model_dir} has no chat template; "
                "set calibration.chat_template=false or use a chat model"
            )
        numbers = dimensions(config)
        if numbers.vocabulary is None:
            given = language_config(config).get("vocab_size")
            raise UserError(f"{model_dir}: config.json has vocab_size={given!r}; it must be a positive integer")
        return cls(
            tokenizer, chat, tokenizer.eos_token_id, numbers.vocabulary, numbers.positions, tokenizer_sha256(model_dir)
        )  # fmt: skip

    def encode(self, documents: Sequence[Document], path: Path) -> list[list[int]]:
        """The ids of each document, of any length. `path` is for error messages.

        Raises:
            UserError: a row has messages but `chat` is off, or the chat template rejects a row.
        """
        texts = [self._text(document, path) for document in documents]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return ids

    def _text(self, document: Document, path: Path) -> str:
        if not self.chat:
            if document.text is None:
                raise UserError(
                    f"{path}:{document.line}: is a conversation; set calibration.chat_template=true to render them"
                )
            return document.text
        messages = (
            [{"role": "user", "content": document.text}] if document.messages is None else list(document.messages)
        )
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        except Exception as error:  # a template is a program from the model; any error is about this row
            raise UserError(
                f"{path}:{document.line}: the chat template rejects this row ({error}); change the row"
            ) from error


def check_tokenizer(model_dir: Path) -> None:
    """Load a model's tokenizer and ask it for the tokens of a few texts.

    Raises:
        UserError: it cannot be loaded, gives no tokens, gives tokens that the model does not have, or drops white space.
    """
    encoder = TextEncoder.load(model_dir, chat=False)
    for text, ids in zip(_ASKED, encoder.encode([Document(1, text) for text in _ASKED], model_dir), strict=True):
        top = max([*ids, encoder.separator or 0])
        if not ids:
            raise UserError(f"{model_dir}: its tokenizer gives no tokens for {text!r}; use the tokenizer of this model")
        if top >= encoder.vocab_size:
            raise UserError(
                f"{model_dir}: its tokenizer gives id {top}, but the model's vocabulary has {encoder.vocab_size}; use the "
                "tokenizer of this model"
            )
        words = encoder.tokenizer.decode(ids).split()
        if words != text.split() and "".join(words) == "".join(text.split()):
            raise UserError(
                f"{model_dir}: its tokenizer makes {' '.join(words)!r} of {text!r}: its vocabulary and its class do not "
                "belong together; use the tokenizer of this model"
            )


def tokenizer_sha256(model_dir: Path) -> str:
    """One hash over the names and the content of a tokenizer's files."""
    digest = hashlib.sha256()
    for name in matching(model_dir, TOKENIZER):
        digest.update(f"{sha256_of(model_dir / name)} {name}\n".encode())
    return digest.hexdigest()


def _load(model_dir: Path) -> Any:
    if fault := tokenizer_fault(model_dir):  # without this check transformers would create an empty tokenizer
        raise UserError(f"{model_dir}: {fault}")
    # Nothing here needs torch, so suppress transformers' advice to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # A tokenizer.json is used exactly as it is. The class that AutoTokenizer picks by model type takes only its vocabulary
    # and merges, and replaces its splitting and normalization by those usual for the model family.
    loader = PreTrainedTokenizerFast if (model_dir / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types of exception for an unusable folder
        first = next(iter(str(error).strip().splitlines()), "")
        raise UserError(
            f"{model_dir}: its tokenizer cannot be loaded ({type(error).__name__}: {first}); "
            "tokenizers that need custom code are not supported"
        ) from error
    tokenizer.model_max_length = 10**9  # Quantline cuts texts itself, so a warning about long ones would be wrong
    return tokenizer
