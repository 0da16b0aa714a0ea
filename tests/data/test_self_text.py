"""Text that the float model writes itself: where it starts, and what becomes of it as calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sections
from tiny_model import CHAT_TEMPLATE, write_model

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.config.data import SelfTextConfig
from quantline.core.errors import UserError
from quantline.data.calibration import build, load
from quantline.data.self_text import TEXTS_NAME, Writer, chat_start, starts
from quantline.data.tokenizer import TextEncoder
from quantline.toolchains import runner
from quantline.toolchains.environments import ensure
from quantline.toolchains.protocol import JobResult

HOW = SelfTextConfig(temperature=1.0, chat_share=0.5)
CHAT = SelfTextConfig(temperature=1.0, chat_share=1.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return TextEncoder.load(write_model(tmp_path_factory.mktemp("plain")), chat=False)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return TextEncoder.load(write_model(tmp_path_factory.mktemp("chat"), chat_template=CHAT_TEMPLATE), chat=False)


def test_a_chat_starts_with_the_template_up_to_the_users_words(chatty, plain):
    assert chatty.tokenizer.decode(chat_start(chatty)) == "<|user|>"
    assert chat_start(plain) == []


def test_a_template_that_fails_or_drops_the_words_gives_free_starts_only(tmp_path):
    for number, template in enumerate(("{{ raise_exception('no') }}", "{{ 'always the same' }}")):
        encoder = TextEncoder.load(write_model(tmp_path / str(number), chat_template=template), chat=False)
        assert {kind for kind, _ in starts(encoder, 6, 0, HOW)} == {"free"}


def test_kinds_are_mixed_by_share_and_free_texts_start_apart(chatty, plain):
    found = starts(chatty, 40, 0, HOW)
    assert sum(kind == "chat" for kind, _ in found) == 20
    free = [ids for kind, ids in found if kind == "free"]
    special = set(chatty.tokenizer.all_special_ids)
    assert all(ids[0] == chatty.separator and ids[1] not in special for ids in free)
    assert len({ids[1] for ids in free}) > 15
    assert {kind for kind, _ in starts(chatty, 5, 0, CHAT)} == {"chat"}
    assert {kind for kind, _ in starts(plain, 5, 0, CHAT)} == {"free"}
    assert starts(plain, 5, 0, HOW) == starts(plain, 5, 0, HOW) != starts(plain, 5, 1, HOW)


def test_without_an_engine_only_a_text_can_be_taken(tmp_path, plain):
    spec = sections.calibration({}, self_text=HOW)
    with pytest.raises(UserError, match=r"calibration\.path=FILE"):
        build(write_model(tmp_path / "model"), spec, tmp_path / "out")


def test_where_the_hub_cannot_be_reached_the_model_writes_and_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    asked = []

    def run(_toolchain, _module, job, _label):
        asked.append(job)
        write_safetensors(Path(job["output"]), {"input_ids": np.ones((len(job["starts"]), job["length"]), np.int32)})
        return JobResult({}, 1.0, 0)

    source = {"repo": "owner/texts", "revision": "0" * 40, "file": "texts.jsonl"}
    spec = sections.calibration({"auto": source}, n_samples=3, held_back=2, self_text=HOW)
    made = build(write_model(tmp_path / "model"), spec, tmp_path / "out", Writer(run, "cpu", 1))
    assert len(asked[0]["starts"]) == 5
    assert load(tmp_path / "out")[0].shape == (3, 16)
    assert (made["held_back"], list(made["sources"])) == (2, ["self"])
    assert "127.0.0.1:9 cannot be reached" in made["notes"][0]
    (tmp_path / "own.jsonl").write_text('{"text": "' + "a model of a model " * 40 + '"}\n')
    there = {"auto": spec.sources["auto"].model_copy(update={"path": str(tmp_path / "own.jsonl")})}
    own = spec.model_copy(update={"sources": there})
    assert list(build(tmp_path / "model", own, tmp_path / "taken", Writer(run, "cpu", 1))["sources"]) == ["auto"]
    assert len(asked) == 1


@pytest.mark.toolchain("reference")
def test_the_demo_model_writes_the_same_text_again_and_its_file_says_what(tmp_path, root):
    toolchain = ensure(root, "reference", platform="cpu")

    def run(_toolchain, module, job, label):
        return runner.run_worker(toolchain, module, job, log=tmp_path / "log", threads=1, label=label)

    spec = sections.calibration({}, n_samples=3, seq_len=24, self_text=HOW)
    made = [
        build(root / "assets/demo/model", one, tmp_path / str(number), Writer(run, "cpu", 1))
        for number, one in enumerate((spec, spec))
    ]
    tokens, manifest = load(tmp_path / "0")
    assert tokens.shape == (3, 24)
    assert made[0]["input_ids_sha256"] == made[1]["input_ids_sha256"]
    texts = [json.loads(line) for line in (tmp_path / "0" / TEXTS_NAME).read_text(encoding="utf-8").splitlines()]
    encoder = TextEncoder.load(root / "assets/demo/model", chat=False)
    assert [text["text"] for text in texts] == encoder.tokenizer.batch_decode(tokens.tolist())
    assert sum(manifest["sources"]["self"]["starts"].values()) == 3
