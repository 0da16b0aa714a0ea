from __future__ import annotations

import json

import pytest
from tiny_model import VOCAB_SIZE, write_config, write_model

from quantline.core.errors import UserError
from quantline.data.tokenizer import check_tokenizer


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


def edit(model, change):
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_tokenizers_of_usual_models_pass(model, root):
    check_tokenizer(model)
    check_tokenizer(root / "assets" / "demo" / "model")


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0", "model": {"type": "Unknown"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(model, content):
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=rf"{model}: its tokenizer cannot be loaded"):
        check_tokenizer(model)


def test_tokens_that_the_model_does_not_have_are_refused(model):
    write_config(model, vocab_size=VOCAB_SIZE - 50)
    with pytest.raises(
        UserError, match=rf"its tokenizer gives id \d+, but the model's vocabulary has {VOCAB_SIZE - 50}"
    ):
        check_tokenizer(model)


def test_an_end_token_that_the_model_does_not_have_is_refused(model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<a token of another model>"}))
    with pytest.raises(UserError, match=rf"gives id {VOCAB_SIZE}, but"):
        check_tokenizer(model)


def test_a_tokenizer_that_loses_spaces_is_refused(model):
    """As transformers builds it of SentencePiece's vocabulary for a family of byte-level tokenizers (5.19, qwen2)."""

    def split_only(content):
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}]}

    edit(model, split_only)
    with pytest.raises(UserError, match="makes 'thetimeofaday' of 'the time of a day'"):
        check_tokenizer(model)


def test_a_tokenizer_without_tokens_for_a_text_is_refused(model):
    def drop_all(content):
        content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[^\\x00]"}, "content": ""}

    edit(model, drop_all)
    with pytest.raises(UserError, match="gives no tokens for 'the time of a day'"):
        check_tokenizer(model)
