from __future__ import annotations

import json
import shutil

import pytest
from tiny_quantized import write_float

from quantline.core.errors import ConfigError, UserError, naming
from quantline.data.download import check_contents, fetch
from quantline.pipeline.command_line import read
from quantline.pipeline.config import parse
from quantline.pipeline.preflight import PlanOptions, model_of, plan_options, preflight, refuse_beside_weights
from quantline.pipeline.run import StageRun
from quantline.planning.spec import RefusedError
from stages.plan import OPTIONS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_float(tmp_path_factory.mktemp("m") / "tiny", layers=2)


def on(model, *arguments):
    return ["model=custom", f"model.path={model}", "calibration=demo", "device=cpu", *arguments]


def run_of(composed, root, *overrides):
    return StageRun("quantize", parse(composed(*overrides)), root, overrides)


@pytest.mark.usefixtures("serves_4_bits")  # another variant is the nearest elsewhere
def test_the_preflight_runs_before_the_quantize_stage_computes(root, composed, model):
    own = on(model)
    assert preflight(run_of(composed, root, *own)) == []
    (note,) = preflight(run_of(composed, root, *own, "method=gptq", "bits=8"))
    assert "GPTQ with 4 bits only" in note
    with pytest.raises(
        RefusedError, match=rf"nearest that works: .*model.path={model} .*method=gptq bits=4 group_size=128"
    ):
        preflight(run_of(composed, root, *own, "method=gptq", "bits=8", "convert.for=vllm"))
    with pytest.raises(RefusedError, match="group_size=1024: does not divide"):
        preflight(run_of(composed, root, *own, "method=gptq", "group_size=1024"))


def test_the_demos_text_is_refused_for_another_model_unless_asked_for_by_name(root, composed, model):
    own = [word for word in on(model) if word != "calibration=demo"]
    with pytest.raises(RefusedError, match=r"the demo model's text.*calibration=auto"):
        preflight(run_of(composed, root, *own, "method=gptq"))
    assert any("the demo model's text" in note for note in preflight(run_of(composed, root, *own, "method=rtn")))
    for text in ("calibration=demo", "calibration=self", "calibration=auto"):
        assert not any("demo" in note for note in preflight(run_of(composed, root, *own, "method=gptq", text)))


def test_what_download_would_refuse_is_refused_before(root, composed, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "own")
    run = run_of(composed, root, *on(folder))
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(
        UserError, match=rf"{folder}: has only SentencePiece's tokenizer\.model .*: uv run .*'{folder}'"
    ):
        model_of(run)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2Model"]}))
    with pytest.raises(UserError, match="names Qwen2Model, which is no causal LM"):
        model_of(run)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (("tokenizer.json", '{"version": "1.0", "mod'), "tokenizer.json is not valid JSON"),
        (("tokenizer.json", '{"version": "1.0"}'), "its tokenizer cannot be loaded (Exception: Model missing"),
        (("special_tokens_map.json", "{"), "special_tokens_map.json is not valid JSON"),
    ],
)
def test_what_is_broken_beside_the_weights_is_refused_in_the_words_of_the_download(
    root, composed, tmp_path, broken, words
):
    folder = shutil.copytree(root / "assets" / "demo" / "model", tmp_path / "own")
    config = parse(composed("model=custom", f"model.path={folder}"))
    refuse_beside_weights(config, root)
    (folder / broken[0]).write_text(broken[1])

    def download():
        fetch(config.model, tmp_path / "out")
        with naming(tmp_path / "out", str(folder), ": "):
            check_contents(tmp_path / "out")

    said = []
    for refuse in (lambda: refuse_beside_weights(config, root), download):
        with pytest.raises(UserError) as caught:
            refuse()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"{folder}: {words}")


def test_a_type_that_the_reference_engine_does_not_build_is_refused_before_the_download(
    root, composed, model, tmp_path
):
    folder = shutil.copytree(model, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="aya_vision", architectures=["AyaVisionForConditionalGeneration"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"{folder}: model_type=aya_vision .*toolchains\.reference=PYTHON"):
        model_of(run_of(composed, root, *on(folder)))


def test_a_machine_that_only_quantizes_needs_no_server(root, composed, model):
    note, *_ = preflight(run_of(composed, root, *on(model, "method=rtn", "bits=8", "toolchains.vllm=/no/such/python")))
    assert note.startswith("toolchains.vllm=/no/such/python: is not on this machine; assumed is vllm ")


def test_the_preflight_returns_nothing_without_a_model(root, composed):
    assert preflight(run_of(composed, root, "model=qwen2_5_3b", "method=gptq")) == []


def test_options_of_the_command_are_checked_and_not_passed_to_hydra():
    own, rest = read(
        ["method=gptq", "gpu_memory_gb=24", "critical=true", "serve.dtype=float16"], OPTIONS, configured=True
    )
    options = plan_options(own)
    assert (options.gpu_memory_gb, options.critical, options.as_json) == (24, True, False)
    assert rest == ["method=gptq", "serve.dtype=float16"]
    for wrong in ("gpu_memory_gb=-1", "gpu_memory_gb=much", "critical=maybe", "batch=0", "context=1.5"):
        name, _, value = wrong.partition("=")
        with pytest.raises(ConfigError, match=wrong.replace(".", r"\.")):
            plan_options({name: value})
    assert {option.name for option in OPTIONS} == {
        field.alias or name for name, field in PlanOptions.model_fields.items()
    }
