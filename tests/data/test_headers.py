from __future__ import annotations

import json
import os

import numpy as np
import pytest
import sections
from hub_server import COMMIT, Hub, serving
from tiny_model import write_model

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.core.errors import UserError
from quantline.data.headers import fetch_headers

REPO = "owner/tiny"
FIRST = 100_001  # bytes that huggingface_hub asks for at first


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a model of two large shards, and a cache of this test's own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    model = write_model(tmp_path / "source", shards=2)
    for number, shard in enumerate(sorted(model.glob("model-*.safetensors"))):
        tensors = {f"layer{2 * number + at}.weight": np.ones((512, 1024), np.float32) for at in range(2)}
        write_safetensors(shard, tensors)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with serving(Hub({("models", REPO): files})) as state:
        monkeypatch.setenv("HF_ENDPOINT", state.address)
        yield state


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def source(**changes):
    return sections.model(**{"repo": REPO, "revision": COMMIT, **changes})


def shards(hub):
    return {name: content for name, content in hub.repos["models", REPO].items() if name.endswith(".safetensors")}


def test_a_model_is_known_by_its_headers_and_no_weight_is_sent(hub, out):
    fetch_headers(source(), out)
    opened = Checkpoint.open(out)
    assert {name: (opened.info(name).dtype, opened.info(name).shape) for name in opened.names} == {
        f"layer{at}.weight": ("F32", (512, 1024)) for at in range(4)
    }
    assert (out / "tokenizer.json").read_bytes() == hub.repos["models", REPO]["tokenizer.json"]
    for name, content in shards(hub).items():
        assert len(content) > 4_000_000
        assert hub.sent[name] == FIRST
        assert hub.gets(name) == ["bytes=0-100000"]
        assert 0 <= len(content) - (out / name).stat().st_size < 100  # the metadata of the header are left out
        assert os.stat(out / name).st_blocks * 512 < 100_000  # a hole


def test_a_long_header_is_read_by_a_second_range(hub, out):
    files = hub.repos["models", REPO]
    name = "model.safetensors"
    for old in [*shards(hub), "model.safetensors.index.json"]:
        del files[old]
    path = out / "long.safetensors"
    write_safetensors(path, {f"model.layers.{at:05d}.weight": np.zeros((16, 16), np.float32) for at in range(2000)})
    files[name] = path.read_bytes()
    path.unlink()
    fetch_headers(source(), out)
    length = int.from_bytes(files[name][:8], "little")
    assert length > FIRST
    assert hub.gets(name) == ["bytes=0-100000", f"bytes=8-{length + 7}"]
    assert len(list(Checkpoint.open(out).names)) == 2000


def test_a_model_without_safetensors_is_refused(hub, out):
    files = hub.repos["models", REPO]
    for old in [*shards(hub), "model.safetensors.index.json"]:
        del files[old]
    files["pytorch_model.bin"] = b"pickle"
    with pytest.raises(UserError, match=r"holds pickled weights only \(pytorch_model.bin\).*model.allow_pickle=true"):
        fetch_headers(source(), out)


def test_a_shard_that_is_not_there_or_damaged_is_named(hub, out):
    files = hub.repos["models", REPO]
    name = sorted(shards(hub))[1]
    files[name] = b"\xff" * 2000
    with pytest.raises(UserError, match=f"owner/tiny at {COMMIT}, file {name}: "):
        fetch_headers(source(), out)
    del files[name]
    with pytest.raises(UserError, match="no such file"):
        fetch_headers(source(), out)


def test_without_access_the_remedy_is_told(hub, out):
    hub.gated = True
    with pytest.raises(UserError, match="is gated: accept its licence"):
        fetch_headers(source(), out)
    assert json.loads(json.dumps(hub.sent)) == {}
