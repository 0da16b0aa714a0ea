from __future__ import annotations

import pytest

from quantline.pipeline.config import parse
from quantline.pipeline.server import PROVEN, options_of, proven_flags, proven_line


@pytest.mark.parametrize(("quantized", "dtype"), [(True, "float16"), (False, "bfloat16")])
def test_a_server_is_started_with_the_options_of_the_variant(composed, quantized, dtype):
    config = parse(composed("serve.max_model_len=600", "serve.enforce_eager=true", "device=cpu"))
    options = options_of(config, "cpu", quantized=quantized)
    assert (options.device, options.dtype, options.max_model_len, options.enforce_eager) == ("cpu", dtype, 600, True)


@pytest.mark.parametrize(
    ("named", "text_only"),
    [
        (["Gemma3ForConditionalGeneration"], True),
        (["InternVLChatModel"], True),
        (["Qwen2ForCausalLM"], False),
        ([], False),
    ],
)
def test_a_model_that_takes_images_is_served_for_text_alone(composed, named, text_only):
    model = {"architectures": named, "auto_map": {"AutoModel": "its.Own"}}
    options = options_of(parse(composed("serve.max_model_len=600")), "cpu", quantized=True, model=model)
    assert options.text_only == text_only


def test_answers_that_are_measured_never_share_a_cache(composed):
    config = parse(composed("serve.process.enable_prefix_caching=true"))
    assert not options_of(config, "cpu", quantized=True).process.enable_prefix_caching


def test_the_line_for_a_shell_has_the_flags_that_served_it_whatever_todays_would_be(composed):
    config = parse(composed("method=gptq", "serve.max_model_len=600"))
    noted = {PROVEN: [{"flag": flag} for flag in ("--dtype", "float16", "--older-flag", "two words")]}
    served = {"status": "ok", "environment": {"device": "cpu"}, "tables": noted}
    assert proven_line(config, served, None, "DIR") == "vllm serve DIR --dtype float16 --older-flag 'two words'"
    assert "--max-model-len 600" in proven_line(config, {**served, "tables": {}}, None, "DIR")  # a result of older code
    assert proven_flags({**served, "status": "unsupported"}) is None


def test_a_gguf_variant_is_served_by_llama_cpp_and_the_float_model_beside_it_by_vllm(composed):
    config = parse(composed("method=gguf"))
    assert options_of(config, "cpu", quantized=True).runtime == "llamacpp"
    assert options_of(config, "cpu", quantized=False).runtime == "vllm"
    assert options_of(parse(composed("method=awq")), "cpu", quantized=True).runtime == "vllm"
