"""Documents from text files: JSON lines (plain, gzip, zstandard), parquet, plain text, and WikiText's parquet.

A document is a text or a list of chat messages. Every error names the file and the line or row, counted from 1.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError

# Format -> its file name extensions. `wikitext` is parquet in which each row is one line of an article.
FORMATS: dict[str, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson"),
    "json.gz": (".json.gz", ".jsonl.gz"),
    "jsonl.zst": (".jsonl.zst", ".json.zst"),
    "parquet": (".parquet",),
    "txt": (".txt",),
    "wikitext": (),
}
_ARTICLE = re.compile(r" = [^=].* = ?\n?")


@dataclass(frozen=True)
class Document:
    """One row of a file: exactly one of `text` and `messages` (`role` and `content` each). `line` counts from 1."""

    line: int
    text: str | None
    messages: tuple[Mapping[str, str], ...] | None = None

    @property
    def empty(self) -> bool:
        """Whether it contains only white space."""
        if self.messages is not None:
            return not any(message["content"].strip() for message in self.messages)
        return not (self.text or "").strip()


def format_of(path: Path, given: str | None) -> str:
    """The format of a file: from its name if that has a known extension, else `given`.

    Raises:
        UserError: neither gives the format, or the given one is unknown.
    """
    if given is not None and given not in FORMATS:
        raise UserError(f"format={given}: allowed are {', '.join(FORMATS)}")
    if given == "wikitext":
        return given
    named = next((name for name, ends in FORMATS.items() if path.name.endswith(ends)), None) if path.suffix else None
    if named or given:
        return named or str(given)
    raise UserError(f"{path}: the format cannot be told from the name; set format to one of {', '.join(FORMATS)}")


def read_documents(path: Path, format_name: str, fields: tuple[str, ...]) -> Iterator[Document]:
    """Yield the documents of a file in order.

    fields: names of the text field; the first that a row has is used. A dot goes into a nested object, and a list of texts
    is joined by newlines. A row without any of these fields may have `messages`. In a .txt file, each paragraph is one
    document.

    Raises:
        UserError: the file is missing or damaged, a line is not a JSON object, or a row has no text.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'does not exist'}; check the path")
    try:
        if format_name == "txt":
            yield from _paragraphs(path)
        elif format_name == "wikitext":
            yield from _articles(path, fields)
        elif format_name == "parquet":
            yield from (_document(path, line, row, fields) for line, row in _parquet_rows(path, fields))
        else:
            yield from _json_lines(path, format_name, fields)
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(
            f"{path}: cannot be read as {format_name} ({reason}); check the file, or fetch it again"
        ) from error


def _lines(path: Path, format_name: str) -> Iterator[bytes]:
    if format_name == "jsonl.zst":
        yield from _zstd_lines(path)
        return
    with gzip.open(path, "rb") if format_name == "json.gz" else path.open("rb") as file:
        yield from file


def _zstd_lines(path: Path) -> Iterator[bytes]:
    """Read frame by frame, because the library's stream reader does not notice a truncated file."""
    import zstandard

    rest = b""
    with path.open("rb") as file:
        frame, pending = zstandard.ZstdDecompressor().decompressobj(), b""
        started = False
        while compressed := pending or file.read(1 << 20):
            try:
                head, *lines = (rest + frame.decompress(compressed)).split(b"\n")
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            started, pending = True, b""
            if frame.eof:
                started, pending = False, frame.unused_data
                frame = zstandard.ZstdDecompressor().decompressobj()
            if lines:
                yield from (head, *lines[:-1])
                rest = lines[-1]
            else:
                rest = head
    if started:
        raise EOFError("the file is truncated")
    if rest:
        yield rest


def _json_lines(path: Path, format_name: str, fields: tuple[str, ...]) -> Iterator[Document]:
    for line, raw in enumerate(_lines(path, format_name), 1):
        if not raw.strip():
            yield Document(line, "")
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{line}: is not valid JSON ({error}); each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{line}: is a JSON {type(row).__name__}; each line must be one JSON object")
        yield _document(path, line, row, fields)


def _document(path: Path, line: int, row: Mapping[str, Any], fields: tuple[str, ...]) -> Document:
    for field in fields:
        value: Any = row
        for part in field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            continue
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = "\n".join(value)
        if not isinstance(value, str):
            raise UserError(f"{path}:{line}: {field} is a {type(value).__name__}; it must be a text or a list of texts")
        return Document(line, value)
    messages = row.get("messages")
    if messages is None:
        has = ", ".join(sorted(row)) or "nothing"
        raise UserError(
            f"{path}:{line}: has neither {' nor '.join(fields)} nor messages (it has {has}); set text_field"
        )
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UserError(f"{path}:{line}: messages must be a list of objects with the texts role and content")
    return Document(line, None, tuple(messages))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _parquet_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            heads = {field.split(".")[0] for field in (*fields, "messages")}
            columns = [name for name in file.schema_arrow.names if name in heads]
            if not columns:
                has = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: has no column {' or '.join(fields)} (it has {has}); set text_field")
            line = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except arrow.ArrowInvalid as error:
        raise UserError(f"{path}: is not a valid parquet file ({error}); fetch it again") from error


def _articles(path: Path, fields: tuple[str, ...]) -> Iterator[Document]:
    """Yield WikiText's articles. Its rows are lines, and a line ` = Title = ` starts an article."""
    start, lines = 1, list[str]()
    for line, row in _parquet_rows(path, fields):
        text = _document(path, line, row, fields).text or ""
        if _ARTICLE.fullmatch(text):
            if "".join(lines).strip():
                yield Document(start, "".join(lines))
            start, lines = line, []
        lines.append(text)
    if "".join(lines).strip():
        yield Document(start, "".join(lines))


def _paragraphs(path: Path) -> Iterator[Document]:
    """Yield the paragraphs: runs of lines between blank lines."""
    start, lines = 1, list[str]()
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{line}: is not UTF-8 ({error.reason}); convert the file") from None
            if text.strip():
                if not lines:
                    start = line
                lines.append(text)
            elif lines:
                yield Document(start, "".join(lines).rstrip("\n"))
                lines = []
    if lines:
        yield Document(start, "".join(lines).rstrip("\n"))
