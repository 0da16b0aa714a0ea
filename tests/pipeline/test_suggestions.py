from __future__ import annotations

import pytest

from quantline.pipeline.suggestions import choice_meant, option_meant
from quantline.pipeline.user_messages import option_names


@pytest.fixture(scope="module")
def names(root):
    return option_names(root / "conf")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("method.damp", "method.damp_percent"), ("damp_percent", "method.damp_percent"), ("desc_act", "method.desc_act"),
        ("method.act_order", "method.desc_act"), ("act-order", "method.desc_act"), ("group", "group_size"),
        ("groupsize", "group_size"), ("q_group_size", "group_size"), ("w_bit", "bits"), ("wbits", "bits"),
        ("symmetric", "method.sym"), ("method.asym", "method.zero_point"), ("nsamples", "calibration.n_samples"),
        ("calibration.nsamples", "calibration.n_samples"), ("seqlen", "calibration.seq_len"),
        ("calibration.max_seq_length", "calibration.seq_len"), ("max_len", "serve.max_model_len"),
        ("serve.max_len", "serve.max_model_len"), ("trust_remote", "model.trust_remote_code"),
        ("trust_remote_code", "model.trust_remote_code"), ("model_path", "model.path"),
        ("tp", "serve.process.tensor_parallel_size"), ("serve.ctx", "serve.max_model_len"),
        ("window", "evaluate.window"), ("methods", "method"), ("dataset", "calibration"), ("bitss", "bits"),
        ("evaluate.windw", "evaluate.window"),
    ],
)  # fmt: skip
def test_the_words_of_the_field_are_understood(names, key, meant):
    assert meant in names
    assert option_meant(key, names) == f" (did you mean {meant}?)"


def test_nothing_is_suggested_for_a_word_like_none_of_ours(names):
    assert option_meant("xqzw", names) == ""
    assert choice_meant("xqzw", ["awq", "gptq"]) == ""


@pytest.mark.parametrize(
    ("word", "choices", "meant"),
    [
        ("bitsandbytes", ["awq", "bnb"], "bnb"), ("auto-round", ["autoround", "awq"], "autoround"),
        ("gptqq", ["awq", "gptq"], "gptq"), ("GPTQ", ["awq", "gptq"], "gptq"), ("off", ["none", "short"], "none"),
    ],
)  # fmt: skip
def test_the_fields_names_of_a_choice_are_understood(word, choices, meant):
    assert choice_meant(word, choices) == f" (did you mean {meant}?)"
