"""The context length of the server: what `auto` is, and what needs more than a server or a model has."""

from __future__ import annotations

import pytest

from quantline.config.context import automatic, fitting, longest_window, model_faults, served_length, window_note
from quantline.core.errors import ConfigError
from quantline.pipeline.config import parse


@pytest.fixture
def config(composed):
    return lambda *overrides: parse(composed(*overrides))


WIKITEXT = ("evaluate=wikitext2", "evaluate.path=x.parquet")


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        ((), 1024),
        (WIKITEXT, 2049),
        ((*WIKITEXT, "evaluate.window=512"), 1024),
        (("evaluate.window=4096", "evaluate.max_document_tokens=null"), 4097),
        (("evaluate.window=4096", "evaluate.max_document_tokens=2000", "evaluate.bos=add"), 2002),
        (("evaluate.window=4096",), 1024),
        (("speed=sweep", "speed.input_tokens=3000"), 3256),
        (("speed=none", "speed.input_tokens=3000"), 1024),
        (("tasks=standard",), 4096),
        (("tasks.local.multiple_choice.context_words=400",), 1600),
        (("serve.smoke.max_tokens=900",), 1412),
    ],
)
def test_the_server_takes_what_evaluation_speed_and_tasks_need(config, overrides, length):
    assert config(*overrides).serve.max_model_len == length


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            (*WIKITEXT, "serve.max_model_len=1024"),
            "evaluate.window=2048: the server needs serve.max_model_len=2049 for it",
        ),
        (
            ("evaluate.window=512", "serve.max_model_len=512"),
            "evaluate.window=512: the server needs serve.max_model_len=513",
        ),
        (
            ("speed.input_tokens=2000", "serve.max_model_len=1024"),
            "speed.input_tokens=2000 speed.output_tokens=32: the",
        ),
    ],
)
def test_a_given_length_that_is_too_short_is_refused_before_compute(config, overrides, says):
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    assert says in str(caught.value)
    assert "leave serve.max_model_len=auto" in str(caught.value)


def test_a_model_that_takes_less_is_served_with_what_it_takes(config):
    assert served_length(config(), 600) == 600
    assert served_length(config(), 4096) == served_length(config(), None) == automatic(config()) == 1024
    assert served_length(config("serve.max_model_len=2048"), 600) == 2048  # the server says why that cannot be


def test_what_the_model_does_not_take_is_told_all_at_once(config):
    asked = config(*WIKITEXT, "serve.max_model_len=5000", "speed.input_tokens=2100")
    assert [fault.split(":")[0] for fault in model_faults(asked, 500, calibrated=True)] == [
        "evaluate.window=2048", "speed.input_tokens=2100 speed.output_tokens=32", "calibration.seq_len=512",
        "serve.max_model_len=5000",
    ]  # fmt: skip
    assert len(model_faults(asked, 500, calibrated=False)) == 3
    assert model_faults(asked, None, calibrated=True) == []
    assert model_faults(config(), 513, calibrated=True) == []
    (fault,) = model_faults(config("evaluate.window=512"), 512, calibrated=True)
    assert "and the server one more than a window; give 511 or less" in fault


@pytest.mark.parametrize("positions", [40, 128, 512])
@pytest.mark.parametrize(
    "overrides",
    [
        ("evaluate.window=512",), ("method=gptq", "evaluate.window=2048", "evaluate.stride=1024"),
        ("speed=sweep", "speed.input_tokens=3000"), (*WIKITEXT, "serve.max_model_len=5000", "speed.output_tokens=600"),
        ("speed=none", "method=float", "evaluate.window=512"),
    ],
)  # fmt: skip
def test_what_mends_all_lengths_can_be_pasted(config, overrides, positions):
    words = fitting(config(*overrides), positions, calibrated=True)
    mended = [old for old in overrides if old.partition("=")[0] not in {word.partition("=")[0] for word in words}]
    assert model_faults(config(*overrides), positions, calibrated=True)
    assert model_faults(config(*mended, *words), positions, calibrated=True) == []


def test_nothing_is_mended_where_the_model_takes_all_or_does_not_say(config):
    assert fitting(config(), 513, calibrated=True) == fitting(config(), None, calibrated=True) == []
    assert fitting(config("evaluate.window=512"), 512, calibrated=True) == ["evaluate.window=511"]


def test_a_window_that_was_not_given_follows_a_model_that_takes_less_and_says_so(config):
    usual = config("speed=none")
    for positions, window in ((512, 511), (128, 127), (513, 512), (None, 512)):
        assert usual.evaluate.fitted(positions).lengths == (window, window)
        assert longest_window(usual.evaluate, positions) == window
        assert model_faults(usual, positions, calibrated=False) == []
        assert fitting(usual, positions, calibrated=False) == []
        note = window_note(usual.evaluate, positions)
        assert (note is None) == (window == 512)
        if note:
            assert note.startswith(f"evaluate.window=auto: {window} tokens, since the model takes {positions}")
    assert window_note(config("evaluate.window=511").evaluate, 512) is None
    assert config("evaluate.stride=256").evaluate.fitted(128).lengths == (127, 127)
    assert config("evaluate.stride=64").evaluate.fitted(128).lengths == (127, 64)


def test_a_published_window_follows_no_model(config):
    (fault,) = model_faults(config(*WIKITEXT, "speed=none"), 1024, calibrated=False)
    assert fault.startswith("evaluate.window=2048: the model takes at most 1024 tokens")
