from __future__ import annotations

import numpy as np
import pytest
from tiny_quantized import float_config, write_float

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts import LAYOUTS, Storage, choice, quantize_rtn
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.layouts.sizes import LinearBytes
from quantline.checkpoints.linears import select_linears
from quantline.planning.checkpoint_memory import weights_of
from quantline.toolchains.workers.quantizers import native

LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.parametrize("group_size", [-1, 32, 64])
@pytest.mark.parametrize(
    ("layout", "bits", "symmetric"),
    [
        *[(layout, bits, True) for layout in ("gptq", "gptq_v2", "compressed_tensors") for bits in (2, 3, 4, 8)],
        *[("compressed_tensors", bits, False) for bits in (2, 3, 4, 8)],
        ("awq_gemm", 4, False), ("awq_gemv", 4, False),
    ],
)  # fmt: skip
def test_the_bytes_of_a_linear_are_those_of_the_tensors_that_its_layout_writes(layout, bits, symmetric, group_size):
    weight = np.random.default_rng(0).normal(size=(96, 192)).astype(np.float32)
    tensors = LAYOUTS[layout].write(quantize_rtn(weight, bits, group_size, symmetric))
    found = LAYOUTS[layout].bytes_of((192, 96), LinearSpec(bits, group_size), Storage(zero_points=not symmetric))
    assert found.total == sum(tensor.nbytes for tensor in tensors.values())
    codes = tensors.get("qweight", tensors.get("weight_packed"))
    assert found.codes == codes.nbytes
    assert found.scales == tensors.get("scales", tensors.get("weight_scale")).nbytes


def test_w8a8_takes_a_byte_a_weight_and_a_scale_a_row():
    linear = quantize_rtn(np.random.default_rng(0).normal(size=(96, 192)).astype(np.float32), 8, -1, True)
    tensors = LAYOUTS["compressed_tensors_int"].write(linear)
    found = LAYOUTS["compressed_tensors_int"].bytes_of((192, 96), LinearSpec(8, -1), Storage())
    assert found == LinearBytes(codes=192 * 96, scales=96 * 2)
    assert found.total == sum(tensor.nbytes for tensor in tensors.values())


def test_nf4_in_blocks_of_64_takes_4_127_bits_a_weight():
    # 4 bits, 8 bits of scale a block, 32 bits a 256 blocks: 4 + 8/64 + 32/(64*256), as in arXiv:2305.14314
    found = LAYOUTS["bitsandbytes"].bytes_of((4096, 4096), LinearSpec(4, 64), Storage())
    assert 8 * found.total / 4096**2 == pytest.approx(4.127, abs=1e-3)
    plain = LAYOUTS["bitsandbytes"].bytes_of((4096, 4096), LinearSpec(4, 64), Storage(double_quant=False))
    assert 8 * plain.total / 4096**2 == pytest.approx(4.5, abs=1e-3)


def test_a_group_size_of_128_costs_0_156_bits_a_weight_in_awq():
    found = LAYOUTS["awq_gemm"].bytes_of((4096, 4096), LinearSpec(4, 128), Storage())
    assert 8 * found.total / 4096**2 == 4 + (16 + 4) / 128


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (8, True), (4, False)])
def test_the_planned_size_of_a_checkpoint_is_that_of_the_one_that_is_made(tmp_path, bits, sym, tied):
    model, output = write_float(tmp_path / "model", tied=tied, layers=2), tmp_path / "output"
    output.mkdir()
    checkpoint, config = Checkpoint.open(model), float_config(tied=tied)
    widths = select_linears(checkpoint, config, bits=bits, group_size=64)
    layout = choice.layout_of(set(widths.values()), sym)
    job = {"model": str(model), "output": str(output), "bits": bits, "group_size": 64, "options": {"sym": sym}}
    native.run(job, lambda *_: None)
    made = Checkpoint.open(output)
    found = weights_of(checkpoint, config, widths, layout, Storage(zero_points=not sym))
    assert found.total == sum(made.info(name).nbytes for name in made.names)
    assert found.float_source == sum(checkpoint.info(name).nbytes for name in checkpoint.names)
    assert found.parameters == sum(np.prod(checkpoint.info(name).shape) for name in checkpoint.names)
    assert found.bits_per_quantized_weight > bits
    assert found.total < found.float_source


def test_a_tied_head_that_is_stored_twice_is_counted_once(tmp_path):
    model = write_float(tmp_path / "model", tied=False)
    config = float_config(tied=True)
    untied = weights_of(Checkpoint.open(model), float_config(tied=False), {}, "gptq", Storage())
    tied = weights_of(Checkpoint.open(model), config, {}, "gptq", Storage())
    rows, columns = Checkpoint.open(model).info("lm_head.weight").shape
    assert untied.total - tied.total == rows * columns * 2
