from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from quantline.planning.placement import Device, Need, need_of, place
from quantline.serving.memory import GIB

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip


def needs(*sizes, ranks=1):
    return [Need(f"v{number}", size * GIB, GIB, GIB, ranks) for number, size in enumerate(sizes)]


def test_the_cache_of_a_server_is_what_is_asked_for_or_eight_sequences():
    asked = need_of("v", LLAMA, 13 * GIB, context=2048, cache_bytes=GIB, ranks=1, device="cuda")
    assert (asked.cache, asked.weights) == (GIB, 13 * GIB)
    # 2 (keys and values) x 32 layers x 4096 values x 2 bytes a token
    own = need_of("v", LLAMA, 13 * GIB, context=2048, cache_bytes=None, ranks=2, device="cuda")
    assert own.cache == 8 * 2048 * 2 * 32 * 4096 * 2
    assert own.each == (own.weights + own.cache) // 2 + own.other


def test_servers_go_where_the_most_room_is_left():
    gpus = [Device(0, 80 * GIB, 79 * GIB), Device(1, 80 * GIB, 79 * GIB)]
    found = place(needs(60, 30, 30), gpus)
    assert [found[name].gpus for name in ("v0", "v1", "v2")] == [(0,), (1,), (1,)]
    assert found["v1"].share == pytest.approx(32 / 80, abs=0.01)
    assert place(needs(60, ranks=2), gpus)["v0"].gpus == (0, 1)
    assert place(needs(2, 3), [Device(None, 24 * GIB, 20 * GIB)])["v0"].gpus == ()


@pytest.mark.parametrize(
    ("wanted", "devices"),
    [
        (needs(40, 40), [Device(0, 80 * GIB, 79 * GIB)]), (needs(60, ranks=2), [Device(0, 80 * GIB, 79 * GIB)]),
        (needs(1), []), (needs(10), [Device(None, 24 * GIB, 12 * GIB)]),
    ],
)  # fmt: skip
def test_variants_that_do_not_fit_together_are_refused_with_what_each_needs(wanted, devices):
    with pytest.raises(UserError, match="do not fit together") as caught:
        place(wanted, devices)
    for need in wanted:
        assert f"  {need.name}: " in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "measured"),
    [(int(3.95 * GIB), 15_146_483_712), (int(3.74 * GIB), 14_904_000_512), (int(12.55 * GIB), 24_299_307_008)],
)
def test_what_is_reserved_is_what_a_server_took_on_an_h200(weights, measured):
    """Llama-2-7B's shape as AWQ in groups of 64 and 128 and as float, cache of 8 GiB, vLLM 0.25.1 with CUDA graphs."""
    asked = need_of("v", LLAMA, weights, context=1024, cache_bytes=8 * GIB, ranks=1, device="cuda")
    assert asked.each == pytest.approx(measured, rel=0.03)
