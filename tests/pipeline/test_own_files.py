from __future__ import annotations

import hashlib
import json
import os

import pytest
import sections
from tiny_model import write_model

from quantline.pipeline import own_files
from quantline.pipeline.config import parse
from quantline.pipeline.own_files import INPUTS_FILE, missing_texts, model_hashes, text_hash


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def kept_from(monkeypatch):
    """The size from which hashes are kept."""

    def set_to(count):
        monkeypatch.setattr(own_files, "_KEPT_FROM_BYTES", count)
        own_files._hash_of.cache_clear()

    return set_to


def test_a_text_is_known_by_its_content_wherever_it_is(tmp_path, monkeypatch):
    (tmp_path / "own.txt").write_text("one")
    assert text_hash(tmp_path, "own.txt") == text_hash(tmp_path, str(tmp_path / "own.txt")) == sha256(b"one")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text_hash(tmp_path / "checkout", "~/own.txt") == sha256(b"one")
    (tmp_path / "own.txt").write_text("two")
    assert text_hash(tmp_path, "own.txt") == sha256(b"two")
    assert text_hash(tmp_path, "none.txt") is None


def test_every_text_that_is_not_here_is_named_by_its_option_as_typed(tmp_path, composed):
    (tmp_path / "here.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    own = ["calibration=jsonl", "calibration.path=/no/own.txt", "evaluate.path=folder", "tasks.path=none.txt"]
    assert missing_texts(tmp_path, parse(composed(*own))) == [
        "calibration.path=/no/own.txt: does not exist; give an existing file",
        f"evaluate.path=folder: is not a file (looked in {tmp_path}); give an existing file",
        f"tasks.path=none.txt: does not exist (looked in {tmp_path}); give an existing file",
    ]
    (fault,) = missing_texts(
        tmp_path,
        parse(composed("calibration=c4", "calibration.sources.c4.path=no.txt", "evaluate.path=here.txt", "tasks=none")),
    )
    assert fault.startswith("calibration.sources.c4.path=no.txt: does not exist")


def test_a_text_that_a_variant_does_not_read_may_be_missing(tmp_path, composed):
    (tmp_path / "here.txt").write_text("text")
    own = [
        "evaluate.path=here.txt",
        "tasks=none",
        "tasks.path=none.txt",
        "calibration=jsonl",
        "calibration.path=none.txt",
    ]
    assert len(missing_texts(tmp_path, parse(composed(*own)))) == 1
    assert missing_texts(tmp_path, parse(composed(*own, "method=float"))) == []
    (fault,) = missing_texts(tmp_path, parse(composed("evaluate=wikitext2", "tasks=none", "calibration=pileval")))
    assert fault == "evaluate.path=null: is not set; give an existing file"


def test_a_model_is_known_by_the_files_that_are_downloaded(tmp_path):
    folder = write_model(tmp_path / "model")
    found = model_hashes(tmp_path, sections.model(path="model"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= found.keys()
    assert found["LICENSE"] == sha256(b"free to use\n")
    (folder / "README.md").write_text("read me")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert model_hashes(tmp_path, sections.model(path="model")) == found
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert model_hashes(tmp_path, sections.model(path="model")).keys() - found.keys() == {"chat_template.jinja"}


def test_a_large_file_is_read_once_and_again_after_a_change(tmp_path, kept_from, monkeypatch):
    kept_from(1)
    path, reads = tmp_path / "large.txt", []
    monkeypatch.setattr(own_files, "sha256_of", lambda one: reads.append(one) or sha256(one.read_bytes()))
    path.write_bytes(b"a" * 100)
    os.utime(path, (1e9, 1e9))
    for _ in range(3):
        assert text_hash(tmp_path, "large.txt") == sha256(b"a" * 100)
        kept_from(1)  # another process
    assert len(reads) == 1
    path.write_bytes(b"b" * 100)  # the same size and time, in the same place
    os.utime(path, (1e9 + 1, 1e9 + 1))
    assert text_hash(tmp_path, "large.txt") == sha256(b"b" * 100)
    replacement = tmp_path / "new"
    replacement.write_bytes(b"c" * 100)
    os.utime(replacement, (1e9 + 1, 1e9 + 1))
    os.replace(replacement, path)
    assert text_hash(tmp_path, "large.txt") == sha256(b"c" * 100)


def test_a_hash_taken_right_after_a_change_is_not_kept(tmp_path, kept_from):
    kept_from(1)
    (tmp_path / "new.txt").write_bytes(b"new")
    assert text_hash(tmp_path, "new.txt") == sha256(b"new")
    assert not (tmp_path / "scratch" / ".hashes.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "null"])
def test_hashes_that_were_kept_and_are_damaged_are_taken_again(tmp_path, kept_from, content):
    kept_from(1)
    path, place = tmp_path / "large.txt", tmp_path / "scratch" / ".hashes.json"
    path.write_bytes(b"large")
    os.utime(path, (1e9, 1e9))
    place.parent.mkdir()
    place.write_text(content)
    assert text_hash(tmp_path, "large.txt") == sha256(b"large")
    assert json.loads(place.read_text())[str(path)][-1] == sha256(b"large")


def test_a_file_that_is_elsewhere_keeps_the_hash_that_is_recorded(tmp_path):
    (tmp_path / INPUTS_FILE).write_text(
        "files: {model: {config.json: abc}, own.txt: def, none.txt: null}\nreads: {float: {download: 0123}}\n"
    )
    assert text_hash(tmp_path, "own.txt") == "def"
    assert text_hash(tmp_path, "none.txt") is None
    assert model_hashes(tmp_path, sections.model(path="model")) == {"config.json": "abc"}
    (tmp_path / "own.txt").write_text("here")
    assert text_hash(tmp_path, "own.txt") == sha256(b"here")
