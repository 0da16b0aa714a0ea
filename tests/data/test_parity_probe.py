from __future__ import annotations

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.model_config import write_config
from quantline.core.errors import UserError
from quantline.data.parity_probe import TOKENS, probe_ids, record_probe, vocab_size_of
from quantline.toolchains.protocol import JobResult


@pytest.mark.parametrize("vocabulary", [97, 300, 32000, 151936])
def test_the_probe_is_two_long_rows_of_different_valid_tokens(vocabulary):
    rows = probe_ids(vocabulary)
    assert [len(row) for row in rows] == [TOKENS, TOKENS]
    assert all(0 <= token < vocabulary for row in rows for token in row)
    assert len(set(rows[0])) == min(TOKENS, vocabulary)
    assert rows[0] != rows[1]
    assert probe_ids(vocabulary) == rows


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight", "word_embeddings.weight"],
)
def test_the_vocabulary_is_the_rows_of_the_embedding(tmp_path, name):
    tensors = {name: np.zeros((11, 4), np.float16), "model.layers.0.up.weight": np.zeros((8, 4), np.float16)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    write_config(tmp_path / "config.json", {"model_type": "gemma3", "text_config": {}})
    assert vocab_size_of(tmp_path) == 11


@pytest.mark.parametrize("config", [{"vocab_size": 11}, {"text_config": {"vocab_size": 11}}, {"n_words": 11}])
def test_the_vocabulary_is_what_the_config_says_whatever_the_embedding_is_called(tmp_path, config):
    write_config(tmp_path / "config.json", config)
    assert vocab_size_of(tmp_path) == 11


def test_a_model_without_an_embedding_is_refused(tmp_path):
    write_config(tmp_path / "config.json", {})
    write_safetensors(tmp_path / "model.safetensors", {"encoder.weight": np.zeros((8, 4), np.float16)})
    with pytest.raises(UserError, match="has no token embedding"):
        vocab_size_of(tmp_path)


def test_the_probe_is_recorded_by_the_reference_worker(tmp_path, root):
    model, jobs = root / "assets" / "demo" / "model", []

    def worker(toolchain, module, job, label):
        jobs.append((toolchain, module, job))
        return JobResult({}, 1.5, 0)

    assert record_probe(worker, model, tmp_path / "probe.safetensors") == {"probe_seconds": 1.5}
    ((toolchain, module, job),) = jobs
    assert (toolchain, module) == ("reference", "quantline.toolchains.workers.reference.engine")
    assert job["input_ids"] == probe_ids(vocab_size_of(model))
    assert job["output"] == str(tmp_path / "probe.safetensors")
