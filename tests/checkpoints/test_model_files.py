from __future__ import annotations

import json
import re

import pytest

from quantline.checkpoints.model_files import COMPANIONS, beside, files_of, has_chat_template, matching, tokenizer_fault


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (["tokenizer.json"], None),
        (["tokenizer.json", "tokenizer.model"], None),
        (["vocab.json", "merges.txt"], None),
        (["vocab.txt"], None),
        (
            ["tokenizer.model", "tokenizer_config.json"],
            "SentencePiece's tokenizer.model .*needs tokenizer.json; .*'own'",
        ),
        (["spiece.model"], "SentencePiece's spiece.model"),
        (["vocab.json"], "vocab.json without merges.txt"),
        (["tokenizer_config.json"], "has no tokenizer; add one of tokenizer.json"),
    ],
)
def test_files_that_are_read_as_different_tokenizers_are_none(tmp_path, files, fault):
    for name in files:
        (tmp_path / name).touch()
    found = tokenizer_fault(tmp_path, "own")
    assert found is None if fault is None else re.search(fault, found)


def test_a_chat_template_is_found_in_a_file_or_in_the_tokenizer_config(tmp_path):
    assert not has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": None}))
    assert not has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert has_chat_template(tmp_path)


def test_files_below_other_folders_and_other_files_are_not_of_the_model(tmp_path):
    for name in (
        "additional_chat_templates/a.jinja",
        "onnx/tokenizer.json",
        "tokenizer.json",
        "README.md",
        "vocab.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert matching(tmp_path, COMPANIONS) == ["additional_chat_templates/a.jinja", "tokenizer.json", "vocab.json"]
    assert files_of(tmp_path) == ["README.md", "additional_chat_templates/a.jinja", "tokenizer.json", "vocab.json"]


@pytest.mark.parametrize(
    ("index", "shards", "names"),
    [
        ("model.safetensors.index.json", ["a.safetensors", "b.safetensors"], []),
        (
            "model.safetensors.index.json",
            ["w/a.x", "b"],
            ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"],
        ),
        (
            "pytorch_model.bin.index.json",
            ["w/1.bin", "w/2.bin"],
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ),
    ],
)
def test_files_in_folders_get_the_usual_names_of_their_index(tmp_path, index, shards, names):
    content = {"metadata": {"total_size": 8}, "weight_map": {"x": shards[0], "y": shards[1], "z": shards[0]}}
    (tmp_path / index).write_text(json.dumps(content))
    moved, anew = beside(tmp_path / index)
    assert moved == dict(zip(shards, names, strict=False))
    expected = {**content, "weight_map": {"x": names[0], "y": names[1], "z": names[0]}} if names else {}
    assert anew == expected
