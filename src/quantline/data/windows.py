"""Token windows of an evaluation text, and the words and bytes of their scored text.

Perplexity per token cannot be compared between models with different tokenizers; per word and per byte it can. Words are
separated by white space, and a word belongs to the window in which it begins. Bytes are UTF-8. A window's words and bytes
are those of its whole text minus those of its context. So a space that a tokenizer drops at the start of a text is not
lost. A character that a window's border cuts in two counts as the text that the tokenizer decodes it to.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.safetensors_file import write_safetensors
from quantline.config.evaluate import ProtocolConfig
from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.data.documents import Document, format_of, read_documents
from quantline.data.tokenizer import TextEncoder


def count_units(tokenizer: Any, windows: Windows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Words and bytes of each document's scored text, int64 (documents,) each.

    tokenizer: the transformers tokenizer that made the windows.
    """
    words = np.zeros(len(windows.document_ids), dtype=np.int64)
    size = np.zeros_like(words)
    bounds = zip(windows.offsets[:-1], windows.offsets[1:], windows.context, windows.document, strict=True)
    for begin, end, context, document in bounds:
        whole, before = (_text(tokenizer, windows.input_ids[begin:stop]) for stop in (end, begin + context))
        words[document] += len(whole.split()) - len(before.split())
        size[document] += len(whole.encode()) - len(before.encode())
    return words, size


def _text(tokenizer: Any, ids: NDArray[np.int32]) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows, stored one after another.

    Attributes:
        input_ids: int32 (tokens,).
        offsets: int64 (windows + 1,), the start of each window; the last entry is the number of tokens.
        document: int32 (windows,), index into `document_ids`.
        context: int32 (windows,), leading tokens that are not scored; at least 1, less than the window's length.
        document_ids: names of the units of the statistics.
        protocol: the protocol's values.
        words, text_bytes: int64 (documents,), of the scored text; None if the windows were made from tokens without text.
    """

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    document: NDArray[np.int32]
    context: NDArray[np.int32]
    document_ids: tuple[str, ...]
    protocol: Mapping[str, Any]
    words: NDArray[np.int64] | None = None
    text_bytes: NDArray[np.int64] | None = None

    @property
    def scored(self) -> NDArray[np.bool_]:
        """bool (tokens,), true for the scored tokens."""
        lengths = np.diff(self.offsets)
        place = np.arange(len(self.input_ids)) - np.repeat(self.offsets[:-1], lengths)
        mask: NDArray[np.bool_] = place >= np.repeat(self.context, lengths)
        return mask

    @property
    def sha256(self) -> str:
        """Hash of the tokens, the window starts, the scored ranges and the documents."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.offsets, self.document, self.context):
            digest.update(f"{array.dtype.str} {len(array)}\n".encode() + array.tobytes())
        return digest.hexdigest()


def some_documents(windows: Windows, tokens: int) -> tuple[Windows, NDArray[np.int64]]:
    """Select whole documents, evenly spaced: about `tokens` tokens, at least two documents; and their numbers, int64."""
    count = len(windows.document_ids)
    kept = min(count, max(2, round(count * tokens / len(windows.input_ids))))
    chosen = np.unique(np.linspace(0, count - 1, kept).round().astype(np.int64))
    return of_documents(windows, chosen), chosen


def of_documents(windows: Windows, chosen: NDArray[np.int64]) -> Windows:
    """The windows of some documents; chosen: their numbers, int64, ascending."""
    number_of = {int(document): number for number, document in enumerate(chosen)}
    members = np.flatnonzero(np.isin(windows.document, chosen))
    lengths = np.diff(windows.offsets)[members]
    pieces = [windows.input_ids[windows.offsets[index] : windows.offsets[index + 1]] for index in members]
    return Windows(
        input_ids=np.concatenate(pieces),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        document=np.array([number_of[int(windows.document[index])] for index in members], dtype=np.int32),
        context=windows.context[members],
        document_ids=tuple(windows.document_ids[document] for document in chosen),
        protocol=windows.protocol,
        words=None if windows.words is None else windows.words[chosen],
        text_bytes=None if windows.text_bytes is None else windows.text_bytes[chosen],
    )


def spans(tokens: int, capacity: int, stride: int) -> list[tuple[int, int, int]]:
    """Cut `tokens` tokens into windows: (begin, end, overlap with the window before).

    Args:
        capacity: the most tokens of text in a window.
        stride: at most `capacity`.
    """
    cuts: list[tuple[int, int, int]] = []
    begin, previous = 0, 0
    while previous < tokens:
        end = min(begin + capacity, tokens)
        cuts.append((begin, end, previous - begin if cuts else 0))
        begin, previous = begin + stride, end
    return cuts


def build_windows(model_dir: Path, protocol: ProtocolConfig) -> Windows:
    """Read the text, tokenize it with the model's tokenizer and cut it.

    Raises:
        UserError: the text is missing or damaged, or gives fewer than two documents; the window is longer than the model
            allows; `bos=add` with a tokenizer that has no such token.
    """
    encoder = TextEncoder.load(model_dir, chat=False)
    protocol = protocol.fitted(encoder.max_length)
    window, _ = protocol.lengths
    if encoder.max_length is not None and window > encoder.max_length:
        raise UserError(
            f"evaluate.window={window}: the model takes at most {encoder.max_length} (max_position_embeddings); "
            "set evaluate.window to that or less, but then the results are not comparable with published ones"
        )
    prefix = [encoder.tokenizer.bos_token_id] if protocol.bos == "add" else []
    if prefix == [None]:
        raise UserError(
            "evaluate.bos=add: the model's tokenizer has no beginning-of-sequence token; set evaluate.bos=none"
        )
    windows = cut_documents(_tokenized(encoder, protocol), protocol, prefix)
    words, text_bytes = count_units(encoder.tokenizer, windows)
    return replace(windows, words=words, text_bytes=text_bytes)


def cut_documents(documents: list[tuple[str, list[int]]], protocol: ProtocolConfig, prefix: list[int]) -> Windows:
    """Cut documents, (name, token ids) each, into a protocol's windows. Every window starts with `prefix`, [] or [bos].

    protocol: one that is `fitted`.

    Raises:
        UserError: fewer than two windows or documents remain.
    """
    window, stride = protocol.lengths
    capacity = window - len(prefix)
    stride = min(stride, capacity)
    pieces: list[tuple[str, list[int], tuple[int, int, int]]] = []
    for name, ids in documents:
        cuts = spans(len(ids), capacity, stride)
        if protocol.mode == "concatenated":
            full = (cut for cut in cuts if cut[1] - cut[0] == capacity)
            pieces += [(f"window-{number:06d}", ids, cut) for number, cut in enumerate(full)]
        else:
            # A single token without a prefix predicts nothing and is not predicted.
            pieces += [(name, ids, cut) for cut in cuts if len(prefix) + cut[1] - cut[0] > 1]
    names = tuple(dict.fromkeys(name for name, _, _ in pieces))
    if len(names) < 2:
        unit = "full windows" if protocol.mode == "concatenated" else "documents with enough tokens"
        raise UserError(
            f"{protocol.path}: gives {len(names)} {unit}, but a confidence interval needs at least 2; "
            "give more text, a smaller evaluate.window, or evaluate.mode=concatenated for one long document"
        )
    number_of = {name: number for number, name in enumerate(names)}
    lengths = [len(prefix) + end - begin for _, _, (begin, end, _) in pieces]
    return Windows(
        input_ids=np.array([i for _, ids, (begin, end, _) in pieces for i in prefix + ids[begin:end]], dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        document=np.array([number_of[name] for name, _, _ in pieces], dtype=np.int32),
        context=np.array([max(1, len(prefix) + overlap) for _, _, (_, _, overlap) in pieces], dtype=np.int32),
        document_ids=names,
        protocol=protocol.protocol(),
    )


def _tokenized(encoder: TextEncoder, protocol: ProtocolConfig) -> list[tuple[str, list[int]]]:
    """Names and ids of the documents, within the protocol's limits; one document in mode `concatenated`."""
    documents, names = _documents(protocol)
    path = Path(str(protocol.path))
    if protocol.mode == "concatenated":
        ids = encoder.encode(
            [Document(1, protocol.separator.join(document.text or "" for document in documents))], path
        )[0]
        return [("", ids[: protocol.max_tokens])]
    encoded = encoder.encode(documents, path)
    left = protocol.max_tokens if protocol.max_tokens is not None else sum(map(len, encoded))
    kept = []
    for name, ids in zip(names, encoded, strict=True):
        cut = ids[: protocol.max_document_tokens][:left]
        if len(cut) >= protocol.min_tokens:
            kept.append((name, cut))
            left -= len(cut)
    return kept


def _documents(protocol: ProtocolConfig) -> tuple[list[Document], list[str]]:
    if protocol.path is None:
        raise UserError("evaluate.path is null; fetch the text and set evaluate.path=FILE")
    path = Path(protocol.path).expanduser()
    form = format_of(path, protocol.format)
    # Empty rows are part of the joined text, as in the protocol of the GPTQ paper.
    documents = [
        document
        for document in islice(read_documents(path, form, (protocol.text_field,)), protocol.max_documents)
        if protocol.mode == "concatenated" or not document.empty
    ]
    for document in documents:
        if document.text is None:
            raise UserError(
                f"{path}:{document.line}: has messages, but perplexity is measured on text; set evaluate.text_field"
            )
    if all(document.empty for document in documents):
        raise UserError(f"{path}: has no text; give a file with text")
    own = form == "jsonl"
    names = [document.id if own and document.id is not None else f"line-{document.line:06d}" for document in documents]
    if len(set(names)) < len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise UserError(f"{path}: id {twice!r} occurs twice; ids must be unique")
    return documents, names


def save_windows(windows: Windows, folder: Path) -> Path:
    """Write `windows.safetensors` and, last, `windows.json`; return the path of the former, for a `score` job.

    Equal windows give equal bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(windows, name) for name in ("input_ids", "offsets", "document", "context")}
    tensors |= {name: units for name in ("words", "text_bytes") if (units := getattr(windows, name)) is not None}
    write_safetensors(folder / "windows.safetensors", tensors)
    manifest = {
        "protocol": dict(windows.protocol),
        "sha256": windows.sha256,
        "windows": len(windows.document),
        "tokens": len(windows.input_ids),
        "scored_tokens": int(windows.scored.sum()),
        "document_ids": list(windows.document_ids),
    }
    write_json(folder / "windows.json", manifest)
    return folder / "windows.safetensors"
