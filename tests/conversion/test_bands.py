import errno
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.layouts import TARGETS, FormatError
from quantline.checkpoints.safetensors_stream import StreamedFile
from quantline.config.convert import ConvertConfig
from quantline.conversion import bands, kernels_jit, write
from quantline.conversion.convert import convert
from quantline.conversion.errors import ProofError
from quantline.conversion.plan import make_plan
from quantline.conversion.source import open_source


def write_source(folder, shapes, bits=4, group=8):
    """A msModelSlim checkpoint of linears of the given (out, in), one code a byte, and a float tensor."""
    folder.mkdir()
    random, kind, half = np.random.default_rng(0), f"W{bits}A16", 2 ** (bits - 1)
    tensors = {"model.embed_tokens.weight": random.normal(size=(16, 64)).astype(np.float16)}
    described = {"model_quant_type": kind, "model.embed_tokens.weight": "FLOAT"}
    for index, (rows, columns) in enumerate(shapes):
        name, groups = f"model.layers.{index}.mlp.up_proj", 1 if group == -1 else columns // group
        tensors[f"{name}.weight"] = random.integers(-half, half, (rows, columns)).astype(np.int8)
        tensors[f"{name}.weight_scale"] = random.uniform(1e-3, 1e-2, (rows, groups)).astype(np.float32)
        tensors[f"{name}.weight_offset"] = random.integers(-half, half, (rows, groups)).astype(np.float32)
        described |= {f"{name}.{suffix}": kind for suffix in ("weight", "weight_scale", "weight_offset")}
    write_safetensors(folder / f"quant_model_weight_{kind.lower()}.safetensors", tensors)
    write.write_json(folder / f"quant_model_description_{kind.lower()}.json", described)
    write.write_json(folder / "config.json", {"model_type": "qwen2"})
    return folder


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source", [(160, 64)] * 6)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def in_bands(monkeypatch):
    """Bands of a few columns or rows, whatever the size of the checkpoint."""
    monkeypatch.setattr(bands, "LEAST_CODES", 0)
    monkeypatch.setattr(bands, "BAND", 1 << 11)


CASES = [
    ("awq", 4, [(160, 64), (136, 72), (128, 16), (24, 40)]),
    *((target, bits, [(160, 64), (48, 72), (32, 32), (8, 64)]) for target in ("gptq", "gptq_v2") for bits in (4, 8)),
    *(("compressed_tensors", bits, [(160, 64), (33, 72), (17, 24), (1, 16), (33, 21)]) for bits in (4, 8)),
]


@pytest.mark.usefixtures("in_bands")
@pytest.mark.parametrize("group", [8, -1])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_bands_write_what_the_layouts_write(tmp_path, monkeypatch, case, group):
    target, bits, shapes = case
    if group != -1:
        shapes = [shape for shape in shapes if shape[1] % group == 0]
    source = write_source(tmp_path / "source", shapes, bits, group)
    done = []
    monkeypatch.setattr(bands, "convert", lambda plan, layer, file: done.append(layer) or work(plan, layer, file))
    files = []
    for label, least in (("in bands", 0), ("whole", 2**40)):
        monkeypatch.setattr(bands, "LEAST_CODES", least)
        (tmp_path / label).mkdir()
        convert(source, tmp_path / label, ConvertConfig(target=target))
        files.append({path.name: path.read_bytes() for path in (tmp_path / label).iterdir()})
    assert files[0] == files[1]
    assert len(done) >= 3


work = bands.convert


@pytest.mark.parametrize(
    ("shape", "fitting"),
    [
        ((128, 64), {"awq", "gptq", "compressed_tensors"}), ((120, 64), {"gptq", "compressed_tensors"}),
        ((8, 64), {"compressed_tensors"}), ((128, 20), set()),
    ],
)  # fmt: skip
def test_linears_too_small_for_the_kernels_go_the_other_way(tmp_path, shape, fitting):
    opened = open_source(write_source(tmp_path / "source", [shape], group=-1))
    (layer,) = opened.layers.values()
    plan = make_plan(opened, TARGETS["compressed_tensors"])
    plans = {target: replace(plan, layout=TARGETS[target]) for target in ("awq", "gptq", "compressed_tensors")}
    assert {target for target, plan in plans.items() if bands.fits(plan, layer)} == fitting


def test_small_checkpoints_need_no_kernels(source, out, monkeypatch):
    monkeypatch.setattr(bands, "convert", None)
    convert(source, out, ConvertConfig(target="awq"))
    plan = make_plan(open_source(source), TARGETS["awq"])
    assert not bands.worth_it(plan)
    monkeypatch.setattr(bands, "LEAST_CODES", 6 * 160 * 64)
    assert bands.worth_it(plan)
    monkeypatch.setattr(kernels_jit, "version", lambda _: "0.99.0")  # an untried numba
    assert not bands.worth_it(plan)


@pytest.mark.parametrize("target", ["awq", "gptq", "compressed_tensors"])
def test_a_code_that_changes_on_its_way_to_the_disk_is_caught(source, out, in_bands, monkeypatch, target):
    put = StreamedFile.put_chunks

    def faulty(self, name, dtype, shape, chunks):
        return put(self, name, dtype, shape, (changed(chunk) if ".4." in name else chunk for chunk in chunks))

    def changed(chunk):
        chunk = bytearray(chunk)
        chunk[-1] ^= 128
        return chunk

    monkeypatch.setattr(StreamedFile, "put_chunks", faulty)
    with pytest.raises(ProofError, match=r"model.layers.4.mlp.up_proj: codes read back from .* differ"):
        convert(source, out, ConvertConfig(target=target))
    assert list(out.iterdir()) == []


@pytest.mark.usefixtures("in_bands")
@pytest.mark.parametrize("partner", [("qzeros", "zero points"), ("scales", "scales"), ("g_idx", "group index")])
def test_partners_that_change_on_their_way_to_the_disk_are_caught(source, out, monkeypatch, partner):
    put, (suffix, said) = StreamedFile.put, partner

    def faulty(self, name, array):
        array = array.copy()
        if name.endswith(f".2.mlp.up_proj.{suffix}"):
            array.reshape(-1).view(np.uint8)[0] ^= 1
        put(self, name, array)

    monkeypatch.setattr(StreamedFile, "put", faulty)
    with pytest.raises(ProofError, match=rf"model.layers.2.mlp.up_proj: {said} read back from .* differ"):
        convert(source, out, ConvertConfig(target="gptq"))
    assert list(out.iterdir()) == []


def test_a_source_that_ends_early_is_an_error_and_no_crash(source, out, in_bands, monkeypatch):
    plan = make_plan(open_source(source), TARGETS["gptq"])
    (weights,) = source.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(Exception, match="fetch or write it again"):
        write.write_weights(plan, out)
    assert list(out.iterdir()) == []


def fail(monkeypatch, error):
    def failing(plan, name, file, in_bands):
        if name.startswith("model.layers.3"):
            raise error
        return linear(plan, name, file, in_bands)

    linear = write._linear
    monkeypatch.setattr(write, "_linear", failing)


@pytest.mark.usefixtures("in_bands")
@pytest.mark.parametrize(
    "error",
    [
        ProofError("x: codes differ"), FormatError("x: codes range over [0, 99]"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ZeroDivisionError("a fault of ours"),
    ],
)  # fmt: skip
def test_what_a_thread_raises_is_raised_and_nothing_is_left(source, out, monkeypatch, error):
    fail(monkeypatch, error)
    before = threading.active_count()
    with pytest.raises(type(error)) as caught:
        convert(source, out, ConvertConfig(target="gptq"))
    assert caught.value is error
    assert list(out.iterdir()) == []
    assert threading.active_count() == before


def test_linears_that_were_not_begun_when_one_fails_are_not_begun(source, out, monkeypatch):
    begun = []

    def failing(plan, name, file, in_bands):
        begun.append(name)
        time.sleep(0.05)
        raise ProofError(name)

    monkeypatch.setattr(write, "_linear", failing)
    with pytest.raises(ProofError):
        convert(source, out, ConvertConfig(target="gptq"))
    assert len(begun) < 6
