from __future__ import annotations

from quantline.serving.memory import GIB, KvCache, activations, kv_cache

LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip


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


def test_what_the_config_does_not_say_is_unknown():
    assert kv_cache({"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 9}) is None
    assert activations({"model_type": "mamba", "hidden_size": 64, "vocab_size": 9}, 1) is not None
    assert kv_cache({}) is None
    assert activations({}, 1) is None


def test_a_cache_in_fewer_bits_is_smaller():
    plain = kv_cache(LLAMA_2_7B).bytes_per_token
    assert kv_cache(LLAMA_2_7B, "fp8").bytes_per_token == plain // 2
    assert kv_cache(LLAMA_2_7B, "int8_per_token_head").bytes_per_token == 2 * 32 * 32 * (128 + 4)
    assert kv_cache(LLAMA_2_7B, "int4_per_token_head").bytes_per_token == 2 * 32 * 32 * (64 + 4)
