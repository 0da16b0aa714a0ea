from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny_quantized import float_config, write_float

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.layouts import LAYOUTS, Storage, choice, quantize_rtn
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.layouts.sizes import LinearBytes
from quantline.checkpoints.linears import planned
from quantline.planning.checkpoint_memory import weights_of
from quantline.planning.quantization_memory import computed_in, quantization_peak
from quantline.serving.memory import GIB, KvCache, activations, kv_cache
from quantline.toolchains.toolchain import worker_environment
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
    widths = planned(checkpoint, config, bits=bits, group_size=64)
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


def test_llama_2_7b_keeps_half_a_mebibyte_a_token():
    assert kv_cache(LLAMA_2_7B) == KvCache(2 * 32 * 32 * 128 * 2)
    assert kv_cache(LLAMA_2_7B).bytes(4096, 8) == 16 * GIB


def test_grouped_heads_keep_their_share_and_a_head_may_have_a_size_of_its_own():
    assert kv_cache({**LLAMA_2_7B, "num_key_value_heads": 8}).bytes_per_token == 2**19 // 4
    assert kv_cache({**LLAMA_2_7B, "head_dim": 256}).bytes_per_token == 2**20


def test_mla_keeps_its_latent():
    deepseek_v2_lite = {
        "num_hidden_layers": 27, "num_attention_heads": 16, "hidden_size": 2048, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
    }  # fmt: skip
    assert kv_cache(deepseek_v2_lite).bytes_per_token == 27 * 576 * 2


def test_a_sliding_window_bounds_the_layers_that_have_one():
    layers = 32
    a_layer = 2 * 32 * 128 * 2
    mistral = kv_cache({**LLAMA_2_7B, "sliding_window": 1024})
    assert mistral.bytes(4096, 1) == 1024 * layers * a_layer
    unused = kv_cache({**LLAMA_2_7B, "sliding_window": 1024, "use_sliding_window": False})
    assert unused.bytes(4096, 1) == 4096 * layers * a_layer
    qwen = kv_cache({**LLAMA_2_7B, "sliding_window": 1024, "max_window_layers": 24})
    assert qwen.bytes(4096, 1) == (4096 * 24 + 1024 * 8) * a_layer
    types = ["sliding_attention", "full_attention"] * 16
    assert (
        kv_cache({**LLAMA_2_7B, "sliding_window": 1024, "layer_types": types}).bytes(512, 2)
        == 2 * 512 * layers * a_layer
    )


def test_activations_grow_with_the_batch_by_its_logits():
    assert activations(LLAMA_2_7B, 9) - activations(LLAMA_2_7B, 8) == 2 * 32000 * 4
    assert activations(LLAMA_2_7B, 1) < GIB


def peak(model, **changes):
    checkpoint, config = Checkpoint.open(model), json.loads((model / "config.json").read_text())
    options = {
        "method": "gptq", "backend": "auto_gptq", "dtype": "float32", "tokens": 1000,
        "low_memory": False, "output": 10_000, **changes,
    }  # fmt: skip
    return quantization_peak(checkpoint, config, **options)


def test_gptq_holds_the_model_the_activations_and_three_hessians(tmp_path):
    found = peak(write_float(tmp_path / "model", tied=True, layers=2))
    values = sum(
        np.prod(Checkpoint.open(tmp_path / "model").info(name).shape)
        for name in Checkpoint.open(tmp_path / "model").names
    )
    assert found.model == values * 4
    assert found.calibration == 2 * 1000 * 256 * 4
    assert found.solver == 3 * 4 * (512 * 512 + 512 * 256)
    assert found.total == found.model + found.calibration + found.solver + found.process
    assert peak(tmp_path / "model", dtype=computed_in("auto", "cuda")).model == values * 2


def test_low_memory_holds_a_block_and_what_is_outside_the_blocks(tmp_path):
    model = write_float(tmp_path / "model", tied=True, layers=4)
    block = 4 * (256 * 256 * 2 + 2 * 128 * 256 + 3 * 256 * 512)
    assert peak(model).model - peak(model, low_memory=True).model == 3 * block


def test_rounding_to_nearest_takes_no_more_than_it_says(tmp_path):
    size = 3000
    folder = tmp_path / "model"
    folder.mkdir()
    random = np.random.default_rng(0)
    weights = {
        f"model.layers.{index}.mlp.up_proj.weight": random.random((size, size), dtype=np.float32) for index in range(3)
    }
    write_safetensors(folder / "model.safetensors", weights)
    config = {"model_type": "qwen2", "hidden_size": size, "num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    code = (
        "import json, sys; from quantline.toolchains.workers.quantizers import native;"
        "native.run(json.loads(sys.argv[1]), lambda *_: None);"
        # Not ru_maxrss, which a process inherits from the one that started it.
        "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) * 1024)"
    )
    (tmp_path / "output").mkdir()
    job = {"model": str(folder), "output": str(tmp_path / "output"), "bits": 8, "group_size": -1, "options": {}}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(job)],
        env=worker_environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = int(done.stdout)
    said = peak(folder, method="rtn", backend="native", output=3 * size * size)
    print(f"{seen / 1e6:.0f} MB seen, {said.total / 1e6:.0f} MB said")
    assert size * size * 4 < seen < said.total + 3 * size * size * 4  # the mapped model counts as memory too
