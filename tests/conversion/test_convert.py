import errno
import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import LAYOUTS, AffineLinear, quantize_rtn
from quantline.checkpoints.layouts.affine import sequential_groups
from quantline.checkpoints.quantization_config import describe
from quantline.config.convert import ConvertConfig
from quantline.conversion import passthrough
from quantline.conversion.convert import convert as convert_with
from quantline.conversion.errors import ProofError
from quantline.conversion.proof import PROOF_NAME
from quantline.core.errors import UserError
from quantline.core.files import sha256_of
from quantline.pipeline.hashing import hash_folder


def convert(source, out, target, threads=2, **options):
    return convert_with(source, out, ConvertConfig(target=target, **options), threads=threads)


def make_checkpoint(folder, layout, bits, *, symmetric, shards=1):
    folder.mkdir()
    random = np.random.default_rng(0)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": symmetric}
    if layout.startswith("awq"):
        settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
        settings["version"] = layout.removeprefix("awq_")
    else:
        settings["checkpoint_format"] = layout
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "quantization_config": settings}))
    (folder / "tokenizer_config.json").write_text("{}")
    weight_map = {}
    for index in range(2):
        weight = random.normal(size=(64, 96)).astype(np.float32)
        weight[0, :32] = np.abs(weight[0, :32])  # a one-sided group: its zero point is 0
        name = f"model.layers.{index}.mlp.up_proj"
        stored = LAYOUTS[layout].write(quantize_rtn(weight, bits, 32, symmetric))
        tensors = {f"{name}.{suffix}": value for suffix, value in stored.items()}
        tensors[f"model.layers.{index}.norm.weight"] = np.ones(96, np.float16)
        if shards == 1:
            weight_map.update(tensors)
            continue
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        write_safetensors(folder / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weight_map)
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def weights(folder):
    return {name: np.array(value) for name, value in iter_dequantized(folder)}


def format_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shards", [1, 2])
def test_gptq_v1_to_v2_and_back_keeps_every_weight(tmp_path, bits, shards):
    source = make_checkpoint(tmp_path / "v1", "gptq", bits, symmetric=True, shards=shards)
    for name, target in (("a", "gptq_v2"), ("b", "gptq")):
        (tmp_path / name).mkdir()
        report = convert(source, tmp_path / name, target)
        assert (report.target, len(report.linears), len(report.carried)) == (target, 2, 2)
        assert format_of(tmp_path / name)["checkpoint_format"] == target
        assert json.loads((tmp_path / name / "quantize_config.json").read_text())["checkpoint_format"] == target
        source = tmp_path / name
    before, after = weights(tmp_path / "v1"), weights(source)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert hash_folder(source).tensors == hash_folder(tmp_path / "v1").tensors


def test_v1_and_v2_differ_by_one_in_every_zero_point_field(tmp_path):
    source = make_checkpoint(tmp_path / "v1", "gptq", 4, symmetric=True)
    (tmp_path / "v2").mkdir()
    convert(source, tmp_path / "v2", "gptq_v2")
    name = "model.layers.0.mlp.up_proj.qzeros"
    one, two = (Checkpoint.open(tmp_path / folder).tensor(name).view(np.uint32) for folder in ("v1", "v2"))
    assert np.array_equal(one + np.uint32(0x11111111), two)


def test_auto_keeps_a_layout_that_serves_byte_for_byte(tmp_path):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    (tmp_path / "out").mkdir()
    report = convert(source, tmp_path / "out", "auto")
    assert report.source == report.target == "gptq"
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_auto_brings_awq_gemv_to_gemm_with_equal_weights(tmp_path):
    source = make_checkpoint(tmp_path / "in", "awq_gemv", 4, symmetric=False)
    (tmp_path / "out").mkdir()
    assert convert(source, tmp_path / "out", "auto").target == "awq_gemm"
    assert format_of(tmp_path / "out")["version"] == "gemm"
    before, after = weights(source), weights(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_source_is_not_touched(tmp_path):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", "gptq_v2")
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}


def test_a_float_checkpoint_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    write_safetensors(tmp_path / "in" / "model.safetensors", {"w": np.zeros((2, 2), np.float16)})
    with pytest.raises(UserError, match="not quantized"):
        convert(tmp_path / "in", tmp_path / "out", "auto")


LAYOUT_OF = {"awq": "awq_gemm", "gptq": "gptq", "gptq_v2": "gptq_v2", "compressed_tensors": "compressed_tensors"}


def write_checkpoint(folder, layout, linears, *, symmetric=False, extra=()):
    """A checkpoint of given linears in one layout, described as the project describes it."""
    folder.mkdir()
    (one, *_) = linears.values()
    tensors = {
        f"{name}.{suffix}": value for name, linear in linears.items() for suffix, value in written(layout, linear)
    }
    tensors["model.norm.weight"] = np.ones(8, np.float16)
    write_safetensors(folder / "model.safetensors", {**tensors, **dict(extra)})
    described = describe(
        layout, bits=one.bits, group_size=one.group_size, symmetric=symmetric,
        desc_act=any(not linear.sequential for linear in linears.values()),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "quantization_config": described}))
    return folder


def written(layout, linear):
    options = {"zero_points": True} if layout == "compressed_tensors" else {}
    return LAYOUTS[layout].write(linear, **options).items()


@st.composite
def extreme_linears(draw):
    """Linears of 4 bits that every layout holds, with the extremes of each field."""
    group = draw(st.sampled_from([-1, 8, 16, 32]))
    rows, columns = draw(st.sampled_from([8, 32, 64])) if group == -1 else 32 * draw(st.integers(1, 2)), 8
    columns *= draw(st.integers(1, 5))
    groups = 1 if group == -1 else rows // group
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["random", "low", "high", "equal"]))
    codes = {
        "random": random.integers(0, 16, (rows, columns)), "low": np.zeros((rows, columns)),
        "high": np.full((rows, columns), 15), "equal": np.full((rows, columns), random.integers(0, 16)),
    }[kind].astype(np.uint8)  # fmt: skip
    zeros = draw(st.sampled_from([0, 8, 15, None]))
    zeros = random.integers(0, 16, (groups, columns)) if zeros is None else np.full((groups, columns), zeros)
    scales = random.choice(np.array([2.0**-24, 1e-3, 1.0, 65504.0], np.float16), (groups, columns))
    index = sequential_groups(rows, group)
    return AffineLinear(codes, scales, zeros.astype(np.int16), index, 4, group)


@pytest.mark.parametrize("one", LAYOUT_OF)
@pytest.mark.parametrize("other", LAYOUT_OF)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(linears=st.lists(extreme_linears(), min_size=1, max_size=2), data=st.data())
def test_every_pair_of_layouts_goes_round_without_a_change(tmp_path_factory, one, other, linears, data):
    linears = [linear for linear in linears if linear.group_size == linears[0].group_size]
    named = {f"model.layers.{index}.mlp.up_proj": linear for index, linear in enumerate(linears)}
    home = tmp_path_factory.mktemp("round")
    source = write_checkpoint(home / "in", LAYOUT_OF[one], named)
    for label, folder, target in (("there", home / "in", other), ("back", home / "there", one)):
        (home / label).mkdir()
        convert(folder, home / label, target, shard_size=data.draw(st.sampled_from(["1KB", "4GB"])))
    before, after = (Checkpoint.open(folder) for folder in (source, home / "back"))
    assert {name: np.array(before.tensor(name)).tobytes() for name in before.names if "zero_point" not in name} == {
        name: np.array(after.tensor(name)).tobytes() for name in after.names if "zero_point" not in name
    }
    assert {name: value.tobytes() for name, value in weights(source).items()} == {
        name: value.tobytes() for name, value in weights(home / "back").items()
    }


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("target", ["gptq", "gptq_v2"])
def test_other_widths_go_round_through_compressed_tensors(tmp_path, bits, target):
    random = np.random.default_rng(0)
    linear = quantize_rtn(random.normal(size=(64, 96)).astype(np.float32), bits, 32, False)
    source = write_checkpoint(tmp_path / "in", target, {"model.layers.0.mlp.up_proj": linear})
    for label, folder, goal in (("ct", "in", "compressed_tensors"), ("back", "ct", target)):
        (tmp_path / label).mkdir()
        convert(tmp_path / folder, tmp_path / label, goal)
    assert hash_folder(tmp_path / "back").tensors == hash_folder(source).tensors


def test_desc_act_is_kept_by_gptq_and_compressed_tensors(tmp_path):
    random = np.random.default_rng(0)
    linear = quantize_rtn(random.normal(size=(64, 64)).astype(np.float32), 4, 32, True)
    order = random.permutation(linear.group_index).astype(np.int32)
    source = write_checkpoint(
        tmp_path / "in", "gptq", {"model.layers.0.mlp.up_proj": replace(linear, group_index=order)}, symmetric=True
    )
    for label, folder, goal in (("ct", "in", "compressed_tensors"), ("back", "ct", "gptq")):
        (tmp_path / label).mkdir()
        convert(tmp_path / folder, tmp_path / label, goal)
    assert hash_folder(tmp_path / "back").tensors == hash_folder(source).tensors
    assert format_of(tmp_path / "back")["desc_act"] is True


def test_sym_is_said_only_where_every_zero_point_is_the_middle_one(tmp_path):
    random = np.random.default_rng(0)
    symmetric, other = (quantize_rtn(random.normal(size=(64, 64)).astype(np.float32), 4, 32, s) for s in (True, False))
    for label, linears, said in (("a", [symmetric, symmetric], True), ("b", [symmetric, other], False)):
        named = {f"model.layers.{index}.mlp.up_proj": linear for index, linear in enumerate(linears)}
        source = write_checkpoint(tmp_path / label, "awq_gemm", named)
        (tmp_path / f"{label}-out").mkdir()
        convert(source, tmp_path / f"{label}-out", "gptq")
        assert format_of(tmp_path / f"{label}-out")["sym"] is said


def test_biases_and_float_linears_are_carried_over_and_named(tmp_path):
    linear = quantize_rtn(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), 4, 32, True)
    extra = {
        "model.layers.0.mlp.up_proj.bias": np.arange(64, dtype=np.float32) + 1e-7,
        "model.layers.0.mlp.gate.weight": np.ones((4, 64), np.float32),
        "lm_head.weight": np.ones((8, 64), np.float16),
        "model.embed_tokens.weight": np.ones((8, 64), np.float16),
    }
    source = write_checkpoint(tmp_path / "in", "gptq", {"model.layers.0.mlp.up_proj": linear}, extra=extra.items())
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for target in ("awq", "gptq_v2", "compressed_tensors"):
        out = tmp_path / target
        out.mkdir()
        convert(source, out, target)
        checkpoint = Checkpoint.open(out)
        assert all(checkpoint.tensor(name).tobytes() == value.tobytes() for name, value in extra.items())
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
        said = format_of(out)
        named = said.get("ignore") or said["modules_to_not_convert"]
        assert set(named) == {"model.layers.0.mlp.gate", "lm_head"}
        if target == "gptq_v2":  # what vLLM and GPTQModel honour of a GPTQ config
            assert list(said["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.gate$"]


def test_output_shards_hold_to_their_size_and_the_index_names_every_tensor(tmp_path):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True, shards=2)
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", "awq", shard_size="3KB")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    before, after = weights(source), weights(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_partners_of_a_linear_may_lie_in_other_shards(tmp_path):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    tensors = {name: np.array(Checkpoint.open(source).tensor(name)) for name in Checkpoint.open(source).names}
    (source / "model.safetensors").unlink()
    weight_map = {}
    for index, name in enumerate(sorted(tensors)):
        file = f"model-{index % 3 + 1:05d}-of-00003.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        write_safetensors(source / file, {name: tensors[name] for name, place in weight_map.items() if place == file})
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", "awq")
    before, after = weights(source), weights(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_writer_that_changes_a_code_is_caught_by_reading_the_disk(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    (tmp_path / "out").mkdir()
    from quantline.checkpoints.safetensors_stream import StreamedFile

    put = StreamedFile.put

    def faulty(self, name, array):
        if name.endswith("layers.1.mlp.up_proj.qweight"):
            array = array.copy()
            array[3, 1] ^= 16
        put(self, name, array)

    monkeypatch.setattr(StreamedFile, "put", faulty)
    with pytest.raises(ProofError, match=r"model.layers.1.mlp.up_proj: codes read back from .* differ"):
        convert(source, tmp_path / "out", "awq")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_carried_tensor_that_changes_on_its_way_is_caught(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    (tmp_path / "out").mkdir()
    from quantline.checkpoints.safetensors_stream import StreamedFile

    put = StreamedFile.put_chunks
    monkeypatch.setattr(
        StreamedFile, "put_chunks",
        lambda self, name, dtype, shape, chunks: put(self, name, dtype, shape, (bytes(len(c)) for c in chunks)),
    )  # fmt: skip
    with pytest.raises(ProofError, match=r"norm.weight: reads back from .* with other bytes"):
        convert(source, tmp_path / "out", "awq")


def test_a_full_disk_leaves_no_file_behind(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    (tmp_path / "out").mkdir()
    written = []

    def full(descriptor, data, position):
        written.append(len(data))
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, position)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "out", "awq")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_same_source_gives_the_same_bytes_whatever_the_threads(tmp_path):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    files = []
    for threads in (1, 2):
        out = tmp_path / f"out{threads}"
        out.mkdir()
        convert(source, out, "compressed_tensors", threads=threads)
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1]


def test_the_proof_of_what_is_kept_lists_every_file(tmp_path):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", "auto")
    proof = json.loads((tmp_path / "out" / PROOF_NAME).read_text())
    assert set(proof["files"]) == {path.name for path in source.iterdir()}
    assert proof["rewritten"] is False
    assert proof["counts"]["linears"] == 2


@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_kept_is_hashed_tensor_by_tensor_too(tmp_path, monkeypatch, shards):
    monkeypatch.setattr(passthrough, "_CHUNK", 100)  # so that tensors lie across pieces, and pieces across tensors
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True, shards=shards)
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", "auto")
    proof = json.loads((tmp_path / "out" / PROOF_NAME).read_text())
    checkpoint = Checkpoint.open(source)
    hashes = {name: hashlib.sha256(checkpoint.tensor(name).tobytes()).hexdigest() for name in checkpoint.names}
    found = {name: entry["sha256"] for name, entry in proof["carried"].items()}
    for name, entry in proof["linears"].items():
        found |= {f"{name}.{suffix}": value for suffix, value in entry["sha256"].items()}
    assert found == hashes
    assert proof["files"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(source.iterdir())
    }


@pytest.mark.parametrize("target", ["auto", "awq"])
def test_a_source_with_weights_in_folders_is_read_and_its_output_has_them_beside_the_index(tmp_path, target):
    flat, source = (make_checkpoint(tmp_path / name, "gptq", 4, symmetric=True, shards=2) for name in ("flat", "in"))
    index = source / "model.safetensors.index.json"
    (source / "weights").mkdir()
    first = "model-00001-of-00002.safetensors"
    (source / first).rename(source / "weights" / "z.safetensors")
    index.write_text(index.read_text().replace(first, "weights/z.safetensors"))
    (source / first).write_bytes(b"of an earlier version")
    for name in ("out", "expected"):
        (tmp_path / name).mkdir()
    convert(source, tmp_path / "out", target)
    convert(flat, tmp_path / "expected", target)
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "expected").iterdir()
    }
    assert (source / first).read_bytes() == b"of an earlier version"
    proof = json.loads((tmp_path / "out" / PROOF_NAME).read_text())
    if target == "auto":
        written = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").iterdir()}
        assert proof["files"] == {name: value for name, value in written.items() if name != PROOF_NAME}


def test_a_file_that_changes_while_it_is_copied_is_noticed(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    (tmp_path / "out").mkdir()

    def copied(path, target):
        target.write_bytes(path.read_bytes())
        if path.name == "tokenizer_config.json":
            path.write_text('{"a": 1}')

    monkeypatch.setattr(passthrough, "carry_file", copied)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: changed while it was carried over"):
        convert(source, tmp_path / "out", "auto")


def test_a_section_that_stands_elsewhere_is_written_where_servers_look(tmp_path):
    """AutoAWQ's quant_config.json alone, converted and kept."""
    source = make_checkpoint(tmp_path / "awq", "awq_gemm", 4, symmetric=True)
    config = json.loads((source / "config.json").read_text())
    section = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    old = {"zero_point": True, "q_group_size": section["group_size"], "w_bit": 4, "version": "GEMM"}
    (source / "quant_config.json").write_text(json.dumps(old))
    for target in ("keep", "gptq_v2"):
        (tmp_path / target).mkdir()
        proof = convert(source, tmp_path / target, target)
        assert len(proof.linears) == 2
        assert (format_of(tmp_path / target)["bits"], format_of(tmp_path / target)["group_size"]) == (4, 32)
    assert format_of(tmp_path / "keep")["quant_method"] == "awq"
    assert proof_file(tmp_path / "keep")["files"]["config.json"] == sha256_of(tmp_path / "keep" / "config.json")


def proof_file(folder):
    return json.loads((folder / PROOF_NAME).read_text())


@pytest.mark.parametrize("target", ["keep", "gptq_v2"])
def test_pickles_beside_the_weights_are_left_out_and_named(tmp_path, target):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    pickles = ["optimizer.pt", "pytorch_model.bin", "pytorch_model.bin.index.json", "scheduler.pkl"]
    for name in pickles:
        (source / name).write_bytes(b"{}")
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", target)
    assert not [name for name in pickles if (tmp_path / "out" / name).exists()]
    told = proof_file(tmp_path / "out")["left_out"]["files"]
    assert {name: told[name] for name in pickles} == dict.fromkeys(pickles, "a pickle, which can run code")


@pytest.mark.parametrize("target", ["keep", "gptq_v2"])
def test_chat_templates_in_their_folder_are_carried_over(tmp_path, target):
    source = make_checkpoint(tmp_path / "in", "gptq", 4, symmetric=True)
    for name in ("additional_chat_templates/tool_use.jinja", "notes/mine.txt"):
        (source / name).parent.mkdir()
        (source / name).write_text("{{ messages }}")
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", target)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out" / "notes").exists()
    if target != "keep":
        assert proof_file(tmp_path / "out")["left_out"]["files"]["notes"] == "a folder"
