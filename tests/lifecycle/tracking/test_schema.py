from __future__ import annotations

import yaml

from quantline.lifecycle.tracking.schema import mlmodel


def test_mlflow_reads_what_a_version_takes_and_gives() -> None:
    from mlflow.models import Model

    read = Model.from_dict(yaml.safe_load(mlmodel("gptq-w4", "a" * 32, "vllm serve . --dtype float16")))
    assert read.signature is not None
    assert [(one.name, one.required) for one in read.signature.inputs] == [
        ("prompt", True), ("max_tokens", False), ("temperature", False),
    ]  # fmt: skip
    assert [one.name for one in read.signature.outputs] == ["text", "finish_reason"]
    assert read.flavors["quantline"]["serve"] == "vllm serve . --dtype float16"


def test_a_variant_that_is_not_served_has_no_line() -> None:
    assert "serve" not in yaml.safe_load(mlmodel("gptq-w8", "a" * 32, None))["flavors"]["quantline"]


def test_the_server_is_the_one_whose_line_it_is() -> None:
    for line, server in (("vllm serve . --dtype float16", "vllm"), ("llama-server --model model.gguf", "llama.cpp")):
        assert yaml.safe_load(mlmodel("q", "a" * 32, line))["flavors"]["quantline"]["server"] == server
