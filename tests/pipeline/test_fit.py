from __future__ import annotations

import json

import pytest

from quantline.core.errors import ConfigError, UserError
from quantline.data.download import fetch
from quantline.pipeline.config import parse
from quantline.pipeline.fit import positions_of, refuse_what_the_model_does_not_take


@pytest.mark.parametrize("word", ["max_position_embeddings", "n_positions"])
def test_a_model_in_a_folder_is_asked_before_the_download(tmp_path, composed, word):
    (tmp_path / "config.json").write_text(json.dumps({word: 256}))
    assert positions_of(tmp_path) == 256
    config = parse(composed("model=custom", f"model.path={tmp_path}", "method=gptq", "evaluate.window=512"))
    with pytest.raises(ConfigError) as caught:
        refuse_what_the_model_does_not_take(config, tmp_path)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["evaluate.window=512", "calibration.seq_len=512"]
    assert str(caught.value).endswith("\nall that it takes: evaluate.window=255 calibration.seq_len=256")


def test_a_model_that_is_not_here_yet_is_asked_later(tmp_path, composed):
    hub = parse(composed("model=qwen2_5_0_5b"))
    refuse_what_the_model_does_not_take(hub, tmp_path)
    refuse_what_the_model_does_not_take(parse(composed("model=custom", "model.path=nowhere")), tmp_path)


@pytest.mark.parametrize("text", ['{"max_position', "[]", '{"max_position_embeddings": 256, "hidden_size": "x"}'])
def test_a_config_that_is_damaged_is_left_to_the_download_which_says_so(tmp_path, composed, text):
    (tmp_path / "config.json").write_text(text)
    config = parse(composed("model=custom", f"model.path={tmp_path}"))
    refuse_what_the_model_does_not_take(config, tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}: "):
        fetch(config.model, tmp_path / "out")
