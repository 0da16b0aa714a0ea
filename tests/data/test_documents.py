from __future__ import annotations

import gzip
import hashlib
import json
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from text_files import lines_of, parquet, zstd

from quantline.core.errors import UserError
from quantline.data import documents


@pytest.mark.parametrize(
    ("name", "encode"),
    [("t.jsonl", lambda c: c), ("t.json.gz", gzip.compress), ("t.jsonl.gz", gzip.compress), ("t.jsonl.zst", zstd)],
)
def test_json_lines_are_read_plain_and_compressed(tmp_path, name, encode):
    path = tmp_path / name
    path.write_bytes(encode(lines_of([{"text": "one"}, {"text": "two ü"}])))
    found = list(documents.read_documents(path, documents.format_of(path, None), ("text",)))
    assert [(document.line, document.text) for document in found] == [(1, "one"), (2, "two ü")]


ENCODERS = {"t.json.gz": gzip.compress, "t.jsonl.zst": zstd, "t.parquet": None}


def written(path, rows):
    encode = ENCODERS[path.name]
    path.write_bytes(encode(lines_of(rows)) if encode else parquet(rows))
    return path


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("damage", ["cut", "overwritten", "one byte cut"])
def test_damaged_files_are_refused_by_name(tmp_path, name, damage):
    rows = [{"text": hashlib.sha256(bytes([index])).hexdigest()} for index in range(250)]
    path = written(tmp_path / name, rows)
    content = path.read_bytes()
    half = len(content) // 2
    changes = {"cut": content[:half], "overwritten": bytes(80) + content[80:], "one byte cut": content[:-1]}
    path.write_bytes(changes[damage])
    with pytest.raises(UserError, match=r"t\.(json|parquet).*fetch it again"):
        list(documents.read_documents(path, documents.format_of(path, None), ("text",)))


def test_zstandard_frames_may_follow_each_other(tmp_path):
    path = tmp_path / "t.jsonl.zst"
    path.write_bytes(zstd(b'{"text": "one"}\n{"te') + zstd(b'xt": "two"}\n') + zstd(b'{"text": "three"}'))
    assert [document.text for document in documents.read_documents(path, "jsonl.zst", ("text",))] == [
        "one",
        "two",
        "three",
    ]


def test_parquet_columns_may_be_nested_lists(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet([{"context": {"contexts": ["a", "b"]}, "other": 1}]))
    [document] = documents.read_documents(path, "parquet", ("context.contexts",))
    assert document.text == "a\nb"
    with pytest.raises(UserError, match=r"has no column text \(it has context, other\); set text_field"):
        list(documents.read_documents(path, "parquet", ("text",)))


def test_wikitext_rows_are_joined_to_articles(tmp_path):
    rows = ["", " = One = \n", "", " First line . \n", " = = Part = = \n", " Second . \n", " = Two = \n", " Third . \n"]
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet([{"text": row} for row in rows]))
    found = list(documents.read_documents(path, "wikitext", ("text",)))
    assert [document.line for document in found] == [2, 7]
    assert found[0].text == " = One = \n First line . \n = = Part = = \n Second . \n"


def test_plain_text_is_read_by_paragraphs(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one\nstill one\n\n\ntwo\n")
    found = list(documents.read_documents(path, documents.format_of(path, None), ("text",)))
    assert [(document.line, document.text) for document in found] == [(1, "one\nstill one"), (5, "two")]


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(UserError, match="allowed are jsonl"):
        documents.format_of(tmp_path / "t", "csv")
    with pytest.raises(UserError, match="the format cannot be told"):
        documents.format_of(tmp_path / "t.csv", None)


def read(path: Path, content: bytes, *fields: str) -> list[documents.Document]:
    path.write_bytes(content)
    return list(documents.read_documents(path, documents.format_of(path, None), fields or ("text",)))


def texts(found):
    return [(document.line, document.text) for document in found]


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["t.jsonl", "T.JSONL", "t.NdJson", "t.json", "T.JSONL.GZ", "t.Jsonl.Zst"])
def test_lines_from_an_editor_on_windows_are_read_like_others(tmp_path, name):
    content = BOM + b'{"text": "one"}\r\n\r\n' + BOM + b'{"text": "two"}\r\n'
    encode = {"gz": gzip.compress, "zst": zstd}.get(name.lower().rpartition(".")[2], bytes)
    assert texts(read(tmp_path / name, encode(content))) == [(1, "one"), (2, ""), (3, "two")]


@pytest.mark.parametrize(("name", "encode"), [("t.TXT", bytes), ("t.txt.gz", gzip.compress), ("t.txt.zst", zstd)])
def test_plain_text_from_an_editor_on_windows_is_read_like_others(tmp_path, name, encode):
    found = read(tmp_path / name, encode(BOM + b"one\r\nstill one\r\n\r\n\r\ntwo\r\n"))
    assert texts(found) == [(1, "one\nstill one"), (5, "two")]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_that_is_one_json_list_is_read_row_by_row(tmp_path, indent):
    rows = [{"text": "one"}, None, {"text": None}, {"text": "four"}]
    found = read(tmp_path / "t.json", json.dumps(rows, indent=indent).encode())
    assert texts(found) == [(1, "one"), (2, ""), (3, ""), (4, "four")]


@pytest.mark.parametrize(
    "row",
    ["null", '{"text": null}', '{"text": null, "other": 1}', '{"messages": null}', '{"id": "a", "text": null}', ""],
)
def test_a_null_is_an_empty_row(tmp_path, row):
    first, second = read(tmp_path / "t.jsonl", f'{row}\n{{"text": "two"}}\n'.encode())
    assert (first.line, first.text, first.empty) == (1, "", True)
    assert second.text == "two"


def test_a_null_in_a_nested_field_and_in_parquet_is_an_empty_row(tmp_path):
    for row in ({"meta": None}, {"meta": {"text": None}}):
        assert texts(read(tmp_path / "t.jsonl", lines_of([row]), "meta.text")) == [(1, "")]
    assert texts(read(tmp_path / "t.parquet", parquet([{"text": None}, {"text": "two"}]))) == [(1, ""), (2, "two")]


SAID = [("user", "hi"), ("assistant", "ho")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": role, "content": text} for role, text in SAID]},
        {"conversation": [{"role": role, "content": text} for role, text in SAID]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"id": "7", "conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "ho"}]},
        {"messages": [{"from": "human", "value": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in SAID]},
        {"text": None, "messages": [{"role": role, "content": text} for role, text in SAID]},
        {"text": [{"role": role, "content": text} for role, text in SAID]},
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.parquet"])
def test_conversations_are_read_under_the_names_that_data_sets_use(tmp_path, row, name):
    rows = [row, {"text": None}] if name != "t.json" else [row]
    content = parquet(rows) if name == "t.parquet" else json.dumps(row).encode() + b"\n"
    first = read(tmp_path / name, content)[0]
    assert first.messages is not None
    assert [(message["role"], message["content"]) for message in first.messages] == SAID


def test_parts_of_a_message_are_joined_and_a_call_without_text_is_empty(tmp_path):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    [found] = read(tmp_path / "t.jsonl", lines_of([{"messages": [{"role": "user", "content": parts}, call]}]))
    assert found.messages == ({"role": "user", "content": "one\ntwo"}, {**call, "content": ""})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "no text .image_url"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, "from bard; known are human, user, gpt"),
        ({"conversations": [{"from": "human"}]}, None),
        ({"messages": [{"role": "user"}]}, "texts role and content, or from and value"),
        ({"messages": [{"content": "x"}]}, "texts role and content, or from and value"),
        ({"messages": "x"}, "messages is a str; it must be a list of messages; or set text_field"),
        ({"text": 5}, "text is a int; it must be a text or a list of texts"),
        ({"prompt": "x"}, "has neither text nor messages nor conversations .it has prompt.; set text_field"),
        ([], "is a JSON list; each row"),
    ],
)
def test_a_row_that_holds_no_text_is_refused_with_its_line(tmp_path, row, reason):
    content = b'{"text": "one"}\n' + json.dumps(row).encode()
    if reason is None:  # a message without a text is an empty one
        assert read(tmp_path / "t.jsonl", content)[1].empty
        return
    with pytest.raises(UserError, match=rf"t\.jsonl:2: .*{reason}"):
        read(tmp_path / "t.jsonl", content)


HALF = r'"broken \ud83d here"'


@pytest.mark.parametrize(
    "row",
    [
        f'{{"text": {HALF}}}',
        f'{{"text": ["a", {HALF}]}}',
        f'{{"text": "a", "id": {HALF}}}',
        f'{{"messages": [{{"role": "user", "content": {HALF}}}]}}',
        f'{{"messages": [{{"role": {HALF}, "content": "a"}}]}}',
        f'{{"messages": [{{"role": "user", "content": "a", "name": {HALF}}}]}}',
        f'{{"conversations": [{{"from": "human", "value": {HALF}}}]}}',
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_line(tmp_path, row):
    with pytest.raises(UserError, match=r"t\.jsonl:2: \w+ has half of a surrogate pair \(\\ud83d\)"):
        read(tmp_path / "t.jsonl", b'{"text": "one"}\n' + row.encode())
    assert texts(read(tmp_path / "t.jsonl", rb'{"text": "\ud83d\ude00", "other": "\ud83d"}')) == [(1, "\U0001f600")]


LINE = '{"text": "ä"}\n'


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("t.jsonl", lambda: LINE.encode("utf-16"), "1: is UTF-16, not text in UTF-8; convert it: iconv -f UTF-16 "),
        ("t.txt", lambda: LINE.encode("utf-32"), "1: is UTF-32, not text"),
        ("t.txt", lambda: b"text\n".decode().encode("utf-16-le"), "1: has a zero byte: it is UTF-16 or no text"),
        (
            "t.jsonl",
            lambda: b"null\n" + LINE.encode("latin-1"),
            "2: is not UTF-8 .byte 0xe4 at position 11 .*WINDOWS-1252",
        ),
        ("t.txt", lambda: b"one\n\n\xe9t\xe9\n", "3: is not UTF-8 .byte 0xe9 at position 1 "),
        ("t.json", lambda: b'[{"text": "a"},\n{"text": "\xe9"}]', "2: is not UTF-8 .byte 0xe9"),
        ("t.jsonl", lambda: gzip.compress(LINE.encode()), "1: is gzip, not text in UTF-8; convert it: gzip -dc"),
        ("t.jsonl", lambda: zstd(LINE.encode()), "1: is Zstandard, not text"),
        ("t.txt", lambda: parquet([{"text": "ä"}]), "1: is parquet, not text"),
    ],
    ids=range(9),
)
def test_what_is_no_utf_8_is_named_with_its_line(tmp_path, name, make, reason):
    with pytest.raises(UserError, match=rf"{name}:{reason}"):
        read(tmp_path / name, make(), "other", "text")


LIKELY = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(string.printable + "\ud83dé"),
    lambda inner: (
        some.lists(inner, max_size=3)
        | some.dictionaries(
            some.sampled_from(["text", "messages", "conversations", "role", "content", "from", "value", "id", "type"])
            | some.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FORMATS = [name for name in documents.FORMATS if name != "wikitext"]
EXTENSION = {name: ends[0] for name, ends in documents.FORMATS.items() if ends}


def accepted_or_refused(path: Path, format_name: str, content: bytes) -> None:
    """Documents that can be written and tokenized, or a refusal that names the file; any other exception fails."""
    path.write_bytes(content)
    for fields in (("text",), ("messages.content", "text"), ("id",)):
        refusal = str(path)
        try:
            for document in documents.read_documents(path, format_name, fields):
                json.dumps([document.text, document.messages, document.id], default=str, ensure_ascii=False).encode()
                assert (document.text is None) != (document.messages is None)
                assert document.empty in (True, False)
        except UserError as error:
            refusal = str(error)
        assert refusal.encode().startswith(str(path).encode())


fast = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(content=some.binary(max_size=200), format_name=some.sampled_from(list(documents.FORMATS)))
@fast
def test_any_bytes_are_read_or_refused(tmp_path, content, format_name):
    accepted_or_refused(tmp_path / "t", format_name, content)


@given(rows=some.lists(LIKELY, max_size=4), whole=some.booleans(), escaped=some.booleans())
@fast
def test_any_json_is_read_or_refused(tmp_path, rows, whole, escaped):
    parts = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    content = f"[{','.join(parts)}]" if whole else "\n".join(parts)
    accepted_or_refused(tmp_path / "t", "jsonl", content.encode("utf-8", "surrogatepass"))


CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]
ROWS = [{"id": "a", "text": "one é"}, {"id": "b", "text": None}, {"id": "c", "messages": CONVERSATION}]


@given(
    format_name=some.sampled_from(FORMATS),
    changes=some.lists(some.tuples(some.integers(0, 10**4), some.binary(max_size=3)), min_size=1, max_size=4),
)
@fast
def test_a_file_with_any_changed_bytes_is_read_or_refused(tmp_path, format_name, changes):
    plain = lines_of(ROWS) * 3
    encode = {"gz": gzip.compress, "zst": zstd, "parquet": lambda _: parquet(ROWS)}.get(
        format_name.rpartition(".")[2], bytes
    )
    content = bytearray(encode(plain))
    for position, new in changes:
        start = position % (len(content) + 1)
        content[start:] = new + content[start + len(new) :] if new else b""  # nothing new: the file ends here
    accepted_or_refused(tmp_path / f"t{EXTENSION[format_name]}", format_name, bytes(content))


@pytest.mark.parametrize("opening", ["[", '{"text":', '{"id":[', '{"messages":[{"role":"a","content":"b","x":['])
@pytest.mark.parametrize("depth", [300, 900, 980, 990, 100_000])
def test_deep_nesting_is_read_or_refused(tmp_path, opening, depth):
    close = "".join({"[": "]", "{": "}"}[char] for char in reversed(opening) if char in "[{")
    accepted_or_refused(tmp_path / "t", "jsonl", f"{opening}{'[' * depth}{']' * depth}{close}".encode())
