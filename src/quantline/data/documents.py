"""Documents from text files: JSON (lines or one list), plain text, both also compressed, parquet, and WikiText's parquet.

A document is a text or a list of chat messages. Every error names the file and the line or row, counted from 1.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.core.errors import UserError

# Format -> its file name extensions, in lower case. `wikitext` is parquet in which each row is one line of an article.
FORMATS: dict[str, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "json.gz": (".json.gz", ".jsonl.gz", ".ndjson.gz"),
    "jsonl.zst": (".jsonl.zst", ".json.zst", ".ndjson.zst"),
    "parquet": (".parquet",),
    "txt": (".txt",),
    "txt.gz": (".txt.gz",),
    "txt.zst": (".txt.zst",),
    "wikitext": (),
}
# Where rows hold a conversation: OpenAI's name, ShareGPT's, LMSYS's.
_CONVERSATIONS = ("messages", "conversations", "conversation")
# ShareGPT's names for the roles of a message.
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool",
}  # fmt: skip
# How a file begins that is no text in UTF-8 -> what it is, and the command that makes it text.
_OTHER_CONTENT = {
    b"\xff\xfe\0\0": ("UTF-32", "iconv -f UTF-32 -t UTF-8 {} > NEW"),
    b"\0\0\xfe\xff": ("UTF-32", "iconv -f UTF-32 -t UTF-8 {} > NEW"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {} > NEW"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 {} > NEW"),
    b"\x1f\x8b": ("gzip", "gzip -dc {} > NEW"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd -dc {} > NEW"),
    b"PAR1": ("parquet", "mv {} NEW.parquet"),
}
_ARTICLE = re.compile(r" = [^=].* = ?\n?")


@dataclass(frozen=True)
class Document:
    """One row of a file: exactly one of `text` and `messages` (`role` and `content` each). `line` counts from 1.

    `id` is the row's own, None if it has none.
    """

    line: int
    text: str | None
    messages: tuple[Mapping[str, Any], ...] | None = None
    id: str | None = None

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
    named = next((name for name, ends in FORMATS.items() if ends and path.name.lower().endswith(ends)), None)
    if named or given:
        return named or str(given)
    raise UserError(
        f"{path}: the format cannot be told from the name; {_option('format')} to one of {', '.join(FORMATS)}"
    )


def _option(name: str) -> str:
    return f"set {name} (evaluate.{name}, tasks.{name}, or calibration.sources.NAME.{name})"


def read_documents(path: Path, format_name: str, fields: tuple[str, ...]) -> Iterator[Document]:
    """Yield the documents of a file in order.

    fields: names of the text field; the first that a row has is used. A dot goes into a nested object, and a list of texts
    is joined by newlines. A row without any of these fields may have `messages`, or ShareGPT's `conversations`. A null is
    an empty row. In a text file, each paragraph is one document.

    Raises:
        UserError: the file is missing, damaged or not in UTF-8, a row is not a JSON object, or a row has no text or one
            that no file can hold (half of a surrogate pair).
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'does not exist'}; check the path")
    try:
        if format_name.startswith("txt"):
            yield from _paragraphs(path, _lines(path, format_name))
        elif format_name == "wikitext":
            yield from _articles(path, fields)
        else:
            rows = _parquet_rows(path, fields) if format_name == "parquet" else _json_rows(path, format_name)
            yield from (_document(path, line, row, fields) for line, row in rows)
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(
            f"{path}: cannot be read as {format_name} ({reason}); check the file, or fetch it again"
        ) from error


def _lines(path: Path, format_name: str) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines. Byte order marks, which editors on Windows write, and carriage returns are dropped."""
    for line, raw in enumerate(_raw_lines(path, format_name), 1):
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(path, line, raw, error.start)) from None
        yield line, f"{text[:-2]}\n" if text.endswith("\r\n") else text


def _not_utf8(path: Path, line: int, raw: bytes, position: int) -> str:
    name, remedy = next(
        (found for mark, found in _OTHER_CONTENT.items() if line == 1 and raw.startswith(mark)), ("", "")
    )
    if name:
        return f"{path}:{line}: is {name}, not text in UTF-8; convert it: {remedy.format(shlex.quote(str(path)))}"
    return (
        f"{path}:{line}: is not UTF-8 (byte 0x{raw[position]:02x} at position {position + 1} of the line); convert the "
        f"file, from Windows-1252 for example: iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(str(path))} > NEW"
    )


def _raw_lines(path: Path, format_name: str) -> Iterator[bytes]:
    if format_name.endswith(".zst"):
        yield from _zstd_lines(path)
        return
    with gzip.open(path, "rb") if format_name.endswith(".gz") else path.open("rb") as file:
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
                yield from (line + b"\n" for line in (head, *lines[:-1]))
                rest = lines[-1]
            else:
                rest = head
    if started:
        raise EOFError("the file is truncated")
    if rest:
        yield rest


def _json_rows(path: Path, format_name: str) -> Iterator[tuple[int, Any]]:
    """Numbers and rows: of the lines, or of one list that is the whole file. A blank line is None."""
    lines = _lines(path, format_name)
    for line, text in lines:
        if line == 1 and text.lstrip().startswith("["):
            yield from enumerate(_parsed(path, line, text + "".join(more for _, more in lines)), 1)
            return
        yield line, _parsed(path, line, text) if text.strip() else None


def _parsed(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}:{line}: is not valid JSON ({error}); each line must be one JSON object, or the file one list of them"
        ) from None


def _document(path: Path, line: int, row: Any, fields: tuple[str, ...]) -> Document:
    if row is None:
        return Document(line, "")
    if not isinstance(row, Mapping):
        raise UserError(f"{path}:{line}: is a JSON {type(row).__name__}; each row must be one JSON object")
    own = None if row.get("id") is None else _whole(path, line, "id", str(row["id"]))
    empty = False
    for field in (*fields, *_CONVERSATIONS):
        value: Any = row
        for part in field.split("."):
            empty = empty or (isinstance(value, Mapping) and part in value and value[part] is None)
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            continue
        if isinstance(value, list) and all(isinstance(item, str) for item in value) and field in fields:
            value = "\n".join(value)
        if isinstance(value, str) and field in fields:
            return Document(line, _whole(path, line, field, value), id=own)
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            allowed = (
                "a text or a list of texts" if field in fields else f"a list of messages; or {_option('text_field')}"
            )
            raise UserError(f"{path}:{line}: {field} is a {type(value).__name__}; it must be {allowed}")
        return Document(line, None, tuple(_message(path, line, field, item) for item in value), own)
    if empty:
        return Document(line, "", id=own)
    has = ", ".join(sorted(row)) or "nothing"
    wanted = " nor ".join(dict.fromkeys((*fields, *_CONVERSATIONS[:2])))
    raise UserError(f"{path}:{line}: has neither {wanted} (it has {_shown(has)}); {_option('text_field')}")


def _message(path: Path, line: int, field: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the texts `role` and `content`, from those or from ShareGPT's `from` and `value`."""
    message = dict(given)
    if given.get("role") is None and given.get("from") is not None:
        if str(given["from"]) not in _ROLES:
            known = ", ".join(_ROLES)
            raise UserError(f"{path}:{line}: {field} has a message from {_shown(given['from'])}; known are {known}")
        message.update(role=_ROLES[message.pop("from")], content=message.pop("value", ""))
    content = message.get("content")
    if isinstance(content, list):
        content = _parts(path, line, field, content)
    elif content is None and "content" in message:
        content = ""  # a call of a tool has none
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise UserError(
            f"{path}:{line}: {field} must be a list of objects with the texts role and content, or from and value"
        )
    message["content"] = content
    try:
        _whole(path, line, field, json.dumps(message, ensure_ascii=False, default=str))
    except RecursionError:
        raise UserError(f"{path}:{line}: {field} is nested too deeply; remove this row") from None
    return message


def _parts(path: Path, line: int, field: str, parts: list[Any]) -> str:
    """The text of a message whose content is a list of parts, joined by newlines."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(
                f"{path}:{line}: {field} has a part that is no text ({_shown(kind)}); remove it, or this row"
            )
        texts.append(text)
    return "\n".join(texts)


def _whole(path: Path, line: int, field: str, text: str) -> str:
    """The text, if it can be encoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{path}:{line}: {field} has half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character: "
            "a text was cut in the middle of one; remove it, or this row"
        ) from None
    return text


def _shown(value: object) -> str:
    """A value of a file in a message: short, and printable whatever it holds."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else f"{text[:200]}..."


def _parquet_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            heads = {field.split(".")[0] for field in (*fields, *_CONVERSATIONS)}
            columns = [name for name in file.schema_arrow.names if name in heads]
            if not columns:
                has = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: has no column {' or '.join(fields)} (it has {has}); {_option('text_field')}")
            line = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(_shown(error).split())
        raise UserError(f"{path}: is not a valid parquet file ({reason}); fetch it again") from error


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


def _paragraphs(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Document]:
    """Yield the paragraphs: runs of lines between blank lines."""
    start, texts = 1, list[str]()
    for line, text in lines:
        if "\0" in text:
            raise UserError(f"{path}:{line}: has a zero byte: it is UTF-16 or no text; convert it to UTF-8")
        if text.strip():
            if not texts:
                start = line
            texts.append(text)
        elif texts:
            yield Document(start, "".join(texts).rstrip("\n"))
            texts = []
    if texts:
        yield Document(start, "".join(texts).rstrip("\n"))
