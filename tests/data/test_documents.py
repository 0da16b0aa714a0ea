from __future__ import annotations

import gzip
import hashlib

import pytest
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
