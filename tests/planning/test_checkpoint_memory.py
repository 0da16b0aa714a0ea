from __future__ import annotations

import numpy as np
import pytest
from tiny_quantized import float_config, write_float

from quantline.checkpoints.checkpoint import Checkpoint
from quantline.checkpoints.layouts import Storage, choice
from quantline.checkpoints.linears import select_linears
from quantline.planning.checkpoint_memory import weights_of
from quantline.toolchains.workers.quantizers import native

LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (8, True), (4, False)])
def test_the_planned_size_of_a_checkpoint_is_that_of_the_one_that_is_made(tmp_path, bits, sym, tied):
    model, output = write_float(tmp_path / "model", tied=tied, layers=2), tmp_path / "output"
    output.mkdir()
    checkpoint, config = Checkpoint.open(model), float_config(tied=tied, layers=2)
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
