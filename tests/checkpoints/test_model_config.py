from __future__ import annotations

import json

import pytest

from quantline.checkpoints.model_config import (
    ConfigTranslationError,
    Dimensions,
    dimensions,
    legacy_copy,
    misread_values,
    number_fault,
    read_config,
    restore_config,
    to_transformers4,
    why_not_causal,
)
from quantline.core.errors import UserError

NEW = {
    "model_type": "qwen2",
    "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "hidden_size": 128,
}
OLD = {"model_type": "qwen2", "torch_dtype": "bfloat16", "rope_theta": 1e6, "hidden_size": 128}


def test_default_rope_parameters_become_rope_theta_and_dtype_becomes_torch_dtype():
    assert to_transformers4(NEW) == OLD


def test_translation_leaves_its_input_unchanged():
    before = json.dumps(NEW)
    to_transformers4(NEW)
    assert json.dumps(NEW) == before


@pytest.mark.parametrize("config", [OLD, {**OLD, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"a": None}])
def test_configs_of_transformers_4_stay_as_they_are(config):
    result = to_transformers4(config)
    assert result == config
    assert result is not config


def test_other_rope_types_become_rope_scaling_without_the_base():
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    assert to_transformers4({"model_type": "llama", "rope_parameters": rope}) == {
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
    }


def test_rope_parameters_win_over_leftovers_of_the_older_vocabulary():
    config = {**NEW, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert to_transformers4(config) == OLD


def test_partial_rotary_factor_moves_to_the_top():
    rope = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}
    assert to_transformers4({"model_type": "stablelm", "rope_parameters": rope}) == {
        "model_type": "stablelm",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
    }


def test_gpt_neox_gets_its_own_names():
    rope = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    assert to_transformers4({"model_type": "gpt_neox", "rope_parameters": rope}) == {
        "model_type": "gpt_neox",
        "rotary_emb_base": 1e4,
        "rotary_pct": 0.5,
    }


def test_phi3_longrope_gets_exactly_the_three_keys_its_check_wants():
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [2.0],
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    assert to_transformers4({"model_type": "phi3", "rope_parameters": rope}) == {
        "model_type": "phi3",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    }


def test_rope_parameters_by_layer_type_are_refused():
    rope = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(ConfigTranslationError, match=r"layer type \(full_attention, sliding_attention\)") as caught:
        to_transformers4({"model_type": "gemma3_text", "rope_parameters": rope})
    assert isinstance(caught.value, ValueError)


def test_a_legacy_copy_links_every_file_and_translates_the_config(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(NEW))
    (source / "model.safetensors").write_bytes(b"weights")
    copy = legacy_copy(source, tmp_path / "copy")
    assert json.loads((copy / "config.json").read_text()) == OLD
    assert (copy / "model.safetensors").is_symlink()
    assert (copy / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((source / "config.json").read_text()) == NEW


@pytest.mark.parametrize(
    ("architectures", "reason"),
    [
        (["Qwen2Model"], "names Qwen2Model, which is no causal LM"),
        (["BertModel"], "names BertModel"),
        (["BertForMaskedLM"], "names BertForMaskedLM"),
        (["LlamaForSequenceClassification"], "names LlamaForSequenceClassification"),
        (["Qwen2ForRewardModel"], "names Qwen2ForRewardModel"),
        ([], "no architectures as a list"),
        (None, "no architectures as a list"),
        ("Qwen2ForCausalLM", "no architectures as a list"),
        (["RWForCausalLM"], None),
    ],
)
def test_a_model_that_does_not_predict_the_next_token_is_no_causal_lm(architectures, reason):
    found = why_not_causal({"model_type": "qwen2", "architectures": architectures})
    assert found is None if reason is None else reason in found
    assert "encoder with a decoder" in why_not_causal(
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    )
    assert "no model_type" in why_not_causal({"architectures": ["Qwen2ForCausalLM"]})


def test_every_causal_lm_of_transformers_is_one():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        assert (
            why_not_causal({"model_type": "x", "architectures": [name] if isinstance(name, str) else list(name)})
            is None
        ), name


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"num_attention_heads": "6"}, 'num_attention_heads="6"'),
        ({"n_layer": 6.5}, "n_layer=6.5"),
        ({"vocab_size": True}, "vocab_size=true"),
        ({"hidden_size": float("nan")}, "hidden_size=NaN"),
        ({"intermediate_size": [64, "64"]}, 'intermediate_size=[64, "64"]'),
        ({"attn_config": {"kv_n_heads": "2"}}, 'attn_config.kv_n_heads="2"'),
        ({"hidden_size": "8", "text_config": {"hidden_size": 8, "head_dim": {}}}, "text_config.head_dim={}"),
        ({"sliding_window": "4096"}, 'sliding_window="4096"'),
        ({"num_attention_heads": 6, "n_inner": None, "sliding_window": False, "moe_num_experts": [4, 8]}, None),
        ({"_name_or_path": "6", "rope_theta": 1e6}, None),
    ],
)
def test_a_number_of_another_type_is_a_fault_by_its_key(tmp_path, config, shown):
    fault = number_fault(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if shown is None:
        assert fault is None
        assert read_config(tmp_path) == config
        return
    assert fault.startswith(f"config.json has {shown}; it must be a whole number")
    with pytest.raises(UserError, match=f"^{tmp_path}: config.json has "):
        read_config(tmp_path)


def test_restoring_keeps_the_sources_own_config_and_its_name_for_the_dtype():
    quantization = {"quant_method": "awq", "bits": 4}
    saved = {"quantization_config": quantization, "torch_dtype": "float16", "rope_theta": 10000.0}
    assert restore_config(NEW, saved) == {**NEW, "dtype": "float16", "quantization_config": quantization}
    assert restore_config(OLD, saved) == {**OLD, "torch_dtype": "float16", "quantization_config": quantization}


def test_misread_values_are_named_with_rotary_ones_first():
    loaded = {**OLD, "hidden_size": 64, "rope_theta": 10000.0, "torch_dtype": "float32"}
    assert misread_values(NEW, loaded) == [
        "rope_theta is 1000000.0 in config.json and was read as 10000.0",
        "hidden_size is 128 in config.json and was read as 64",
    ]
    assert misread_values(NEW, OLD) == []


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_missing_or_damaged_config_is_an_error_with_its_path(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bloom", "n_layer": 2, "n_head": 4, "hidden_size": 64, "vocab_size": 9},
         Dimensions(2, 4, 4, 16, 64, None, 9)),
        ({"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 32, "n_inner": None},
         Dimensions(2, 4, 4, 16, 64, None, None, 32)),
        ({"model_type": "mpt", "n_layers": 2, "n_heads": 4, "d_model": 64, "max_seq_len": 32},
         Dimensions(2, 4, 4, 16, 64, None, None, 32)),
        ({"model_type": "gpt_neo", "num_layers": 2, "num_heads": 4, "hidden_size": 64}, Dimensions(2, 4, 4, 16, 64)),
        ({"model_type": "opt", "num_hidden_layers": 2, "ffn_dim": 8, "hidden_size": 64},
         Dimensions(layers=2, hidden=64, inner=8)),
        ({"model_type": "dbrx", "n_heads": 4, "d_model": 64, "attn_config": {"kv_n_heads": 2},
          "ffn_config": {"ffn_hidden_size": 7, "moe_num_experts": 5}},
         Dimensions(None, 4, 2, 16, 64, 7, experts=5)),
        ({"model_type": "falcon", "num_attention_heads": 71, "num_kv_heads": 71, "hidden_size": 4544, "multi_query": True},
         Dimensions(None, 71, 1, 64, 4544)),
        ({"model_type": "bart", "encoder_layers": 3, "decoder_layers": 2, "d_model": 64}, Dimensions(2, hidden=64)),
        ({"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention"]}, Dimensions(3)),
        ({"model_type": "gemma3n_text", "intermediate_size": [8, 16], "num_hidden_layers": 2}, Dimensions(2, inner=16)),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 9}},
         Dimensions(2)),
        ({"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 64}, Dimensions(2, hidden=64)),
        ({"num_hidden_layers": "two", "hidden_size": True, "num_attention_heads": -1, "text_config": None}, Dimensions()),
    ],
    ids=lambda value: value.get("model_type", "nonsense") if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_model_has_its_numbers_whatever_its_family_calls_them(config, expected):
    assert dimensions(config) == expected
