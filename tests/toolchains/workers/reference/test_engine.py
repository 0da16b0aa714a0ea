from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantline.checkpoints.checkpoint import write_safetensors
from quantline.checkpoints.float_view import iter_dequantized
from quantline.checkpoints.layouts import LAYOUTS, quantize_rtn
from quantline.checkpoints.model_config import read_config, to_transformers4, write_config
from quantline.core.errors import UserError
from quantline.evaluation.perplexity import load_scores
from quantline.toolchains.environments import ensure
from quantline.toolchains.runner import run_worker
from quantline.toolchains.toolchain import Toolchain, worker_environment
from quantline.toolchains.workers.reference.accounting import unaccounted
from quantline.toolchains.workers.reference.scoring import plan_batches

# Makes the float models and, with transformers alone, what is expected of them.
MAKE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoConfig, MixtralConfig, Qwen2Config

folder = Path(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
torch.manual_seed(0)
common = dict(
    vocab_size=256, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
)
configs = {
    "tied": Qwen2Config(**common, tie_word_embeddings=True, rope_theta=1e6),
    "untied": Qwen2Config(**common, tie_word_embeddings=False, rope_theta=1e6),
    "near": Qwen2Config(**common, tie_word_embeddings=False, rope_theta=1e4),
    "experts": MixtralConfig(**common, tie_word_embeddings=False, num_local_experts=4, num_experts_per_tok=2),
    "capped": Gemma2Config(**common, head_dim=32, query_pre_attn_scalar=32, attn_logit_softcapping=1.0),
    "eager-only": GPTNeoConfig(
        vocab_size=256, hidden_size=128, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
    ),
}
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    (model.to(torch.bfloat16) if name == "tied" else model).save_pretrained(folder / name)
    attention = "eager" if name in ("capped", "eager-only") else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, attn_implementation=attention)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        greedy = model.generate(ids[:1, :20], attention_mask=torch.ones(1, 20), do_sample=False, max_new_tokens=12)
        model.set_attn_implementation("eager" if name == "eager-only" else "sdpa")
        sdpa = model(input_ids=ids).logits
    tensors = {"logits": logits, "sdpa": sdpa, "greedy": greedy[0, 20:].contiguous()}
    save_file(tensors, folder / f"{name}.expected.safetensors")
"""

# Runs many jobs in one process, since starting one takes longer than a tiny model.
RUN = """
import json, sys
from pathlib import Path
from quantline.toolchains.protocol import JobError
from quantline.checkpoints import model_parts
from quantline.toolchains.workers.reference import engine, evaluate

keep_bytes, answers = model_parts.KEEP_BYTES, []
for job in json.loads(Path(sys.argv[1]).read_text()):
    model_parts.KEEP_BYTES = 0 if job.pop("part by part", False) else keep_bytes
    try:
        answers.append((evaluate if "windows" in job else engine).run(job, lambda *progress: None))
    except JobError as error:
        answers.append({"refused": str(error)})
Path(sys.argv[2]).write_text(json.dumps(answers))
"""

PROBE = np.random.default_rng(0).integers(0, 256, (2, 40)).tolist()
PROMPTS = [PROBE[0][:20], PROBE[1][:7]]
LENGTHS = [40, 1, 16, 40, 2, 16]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
QUANTIZED: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "awq": ("awq_gemm", 4, 32, {"quant_method": "awq", "version": "gemm", "zero_point": True}),
    "gemv": ("awq_gemv", 4, 32, {"quant_method": "awq", "version": "gemv", "zero_point": True}),
    "gptq2": ("gptq", 2, 32, {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": False}),
    "gptq3": ("gptq", 3, 64, {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": True}),
    "gptq4": ("gptq_v2", 4, -1, {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "sym": False}),
    "gptq8": ("gptq", 8, 32, {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": True}),
}

pytestmark = pytest.mark.toolchain("reference")
Tensors = dict[str, np.ndarray]


def tensors_of(folder: Path) -> Tensors:
    return dict(iter_dequantized(folder))


def copy_of(source: Path, folder: Path, tensors: Tensors, **config: object) -> Path:
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    write_config(folder / "config.json", {**read_config(source), **config})
    return folder


def quantized(source: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    """A quantized checkpoint with an invented bias of zeros, and the float one that its weights stand for."""
    layout, bits, group_size, config = QUANTIZED[kind]
    packed, plain = {}, {}
    for name, tensor in tensors_of(source).items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in LINEARS:
            packed[name] = plain[name] = tensor
            continue
        linear = quantize_rtn(tensor, bits, group_size, symmetric=bool(config.get("sym")))
        bare = replace(linear, bias=None)
        packed.update({f"{layer}.{suffix}": array for suffix, array in LAYOUTS[layout].write(bare).items()})
        steps = linear.codes.astype(np.float32) - linear.zeros[linear.group_index].astype(np.float32)
        plain[name] = (steps * linear.scales[linear.group_index].astype(np.float32)).T
        if layer.endswith("down_proj"):
            packed[f"{layer}.bias"] = np.zeros(len(tensor), np.float16)
    settings = {**config, "bits": bits, "group_size": group_size}
    return (
        copy_of(source, folder / kind, packed, quantization_config=settings),
        copy_of(source, folder / f"{kind}-plain", plain),
    )


@pytest.fixture(scope="module")
def toolchain(root: Path) -> Toolchain:
    return ensure(root, "reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toolchain: Toolchain) -> Path:
    """Float models, what transformers makes of them, and checkpoints derived from them."""
    folder = tmp_path_factory.mktemp("reference")
    command = [str(toolchain.python), "-c", MAKE, str(folder), json.dumps(PROBE)]
    subprocess.run(command, check=True, env=worker_environment(1), capture_output=True)
    old = folder / "old-config"
    shutil.copytree(folder / "untied", old)
    write_config(old / "config.json", to_transformers4(read_config(folder / "untied")))
    for kind in QUANTIZED:
        quantized(folder / "tied", folder, kind)
    quantized(folder / "experts", folder / "experts", "gptq8")

    whole, packed = tensors_of(folder / "untied"), dict(_raw(folder / "gptq8"))
    norm = "model.layers.1.input_layernorm.weight"
    copy_of(folder / "untied", folder / "missing", {name: value for name, value in whole.items() if name != norm})
    copy_of(folder / "untied", folder / "leftover", {**whole, "model.layers.2.extra.weight": np.zeros(3, np.float32)})
    copy_of(folder / "untied", folder / "float-bias", {**whole, "lm_head.bias": np.zeros(256, np.float32)})
    copy_of(folder / "untied", folder / "shape", {**whole, norm: np.ones(64, np.float32)})
    copy_of(folder / "tied", folder / "own-head", {**whole, "lm_head.weight": whole["lm_head.weight"] + 1})
    copy_of(folder / "untied", folder / "flash", whole, attn_implementation="flash_attention_2")
    bias = "model.layers.0.mlp.down_proj.bias"
    copy_of(folder / "gptq8", folder / "bias", {**packed, bias: packed[bias] + np.float16(1)})
    copy_of(
        folder / "gptq8",
        folder / "damaged",
        {k: v for k, v in packed.items() if not k.endswith("0.mlp.up_proj.scales")},
    )
    copy_of(folder / "untied", folder / "unknown", whole, model_type="no-such-model")
    copy_of(folder / "untied", folder / "quoted", whole, rms_norm_eps="1e-6")
    copy_of(folder / "untied", folder / "activation", whole, hidden_act="siluu")
    copy_of(folder / "untied", folder / "overflow", {**whole, norm: np.full(128, 3e38, np.float32)})

    offsets = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    flat = np.random.default_rng(1).integers(0, 256, offsets[-1]).astype(np.int32)
    flat[:40], flat[57:97] = PROBE[0], PROBE[1]
    write_safetensors(folder / "windows.safetensors", {"input_ids": flat, "offsets": offsets})
    write_safetensors(folder / "foreign.safetensors", {"input_ids": flat + 1, "offsets": offsets})
    return folder


def _raw(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return dict(load_file(folder / "model.safetensors"))


REFUSALS: dict[str, str] = {
    "missing": "has no tensor for model.layers.1.input_layernorm.weight",
    "leftover": "tensors that the model does not: model.layers.2.extra.weight",
    "float-bias": "tensors that the model does not: lm_head.bias",
    "shape": "of another shape for model.layers.1.input_layernorm.weight",
    "own-head": "a head of its own",
    "bias": "tensors that the model does not: model.layers.0.mlp.down_proj.bias",
    "damaged": "model.layers.0.mlp.up_proj lacks scales",
    "unknown": "does not recognize this architecture. Give a model of another type, or name an interpreter",
    "quoted": "config.json: StrictDataclassFieldValidationError: Validation error for field 'rms_norm_eps': TypeError",
    "activation": "transformers cannot build the model that its config.json describes: KeyError: 'siluu'",
    "absent": "is not a folder",
    "overflow": "log-probabilities are NaN",
}


@pytest.fixture(scope="module")
def answers(folder: Path, toolchain: Toolchain) -> dict[str, dict[str, Any]]:
    """Every job's answer, from one process."""
    jobs: dict[str, dict[str, Any]] = {}
    windows = str(folder / "windows.safetensors")
    for name in ("tied", "untied", "near", "experts", "capped", "eager-only", "old-config", "flash"):
        jobs[f"probe {name}"] = {"checkpoint": name, "input_ids": PROBE}
        jobs[f"generate {name}"] = {
            "checkpoint": name, "windows": windows, "generate": {"prompts": PROMPTS, "new_tokens": 12},
        }  # fmt: skip
    scored = ["tied", "untied", "near", "experts/gptq8", "experts/gptq8-plain", *REFUSALS]
    for name in [*scored, *QUANTIZED, *(f"{kind}-plain" for kind in QUANTIZED)]:
        jobs[f"score {name}"] = {"checkpoint": name, "windows": windows, "batch_tokens": 80}
    for name in ("tied", "untied", "experts", "capped", "eager-only"):
        for kind in ("probe", "generate"):
            jobs[f"{kind} {name} part by part"] = {**jobs[f"{kind} {name}"], "part by part": True}
    jobs["score gptq4 part by part"] = {**jobs["score gptq4"], "part by part": True}
    jobs["again"] = jobs["score untied"]
    jobs["small batches"] = {**jobs["score untied"], "batch_tokens": 1}
    jobs["foreign"] = {**jobs["score untied"], "windows": str(folder / "foreign.safetensors")}
    jobs["ragged"] = {**jobs["probe tied"], "input_ids": [[1, 2], [3]]}
    jobs["empty prompt"] = {**jobs["generate tied"], "generate": {"prompts": [[]], "new_tokens": 1}}
    jobs["device"] = {**jobs["probe tied"], "device": "cuda:99"}
    listed = []
    for number, job in enumerate(jobs.values()):
        listed.append({**job, "checkpoint": str(folder / job["checkpoint"]), "output": str(folder / f"{number}.out")})
    (folder / "jobs.json").write_text(json.dumps(listed))
    command = [str(toolchain.python), "-c", RUN, str(folder / "jobs.json"), str(folder / "answers.json")]
    done = subprocess.run(command, check=False, env=worker_environment(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "answers.json").read_text())
    assert "warning" not in done.stderr.lower()
    return {
        key: {**answer, "output": Path(job["output"])} for key, answer, job in zip(jobs, results, listed, strict=True)
    }


@pytest.fixture(scope="module")
def outcome(answers: dict[str, dict[str, Any]]) -> Callable[[str], Tensors]:
    from safetensors.numpy import load_file

    def tensors(key: str) -> Tensors:
        assert "refused" not in answers[key], answers[key]
        return dict(load_file(answers[key]["output"]))

    return tensors


@pytest.mark.parametrize("name", ["tied", "untied", "near", "experts", "capped", "eager-only"])
def test_logits_are_those_of_transformers(folder: Path, outcome: Callable[[str], Tensors], name: str) -> None:
    from safetensors.numpy import load_file

    expected = load_file(folder / f"{name}.expected.safetensors")["logits"]
    found = outcome(f"probe {name}")
    assert (found["logits"].dtype, found["logits"].shape) == (np.float32, (2, 40, 256))
    assert (found["input_ids"].dtype, found["input_ids"].tolist()) == (np.int32, PROBE)
    np.testing.assert_allclose(found["logits"], expected, atol=2e-4 * np.abs(expected).max())


def test_a_cap_on_attention_scores_counts(folder: Path, outcome: Callable[[str], Tensors]) -> None:
    from safetensors.numpy import load_file

    without = load_file(folder / "capped.expected.safetensors")["sdpa"]
    assert np.abs(outcome("probe capped")["logits"] - without).max() > 0.1 * without.std()


def test_an_attention_that_the_config_names_does_not_count(outcome: Callable[[str], Tensors]) -> None:
    assert np.array_equal(outcome("probe flash")["logits"], outcome("probe untied")["logits"])


def test_the_rotary_base_counts_in_the_old_and_the_new_vocabulary(
    folder: Path, outcome: Callable[[str], Tensors]
) -> None:
    assert read_config(folder / "old-config")["rope_theta"] == 1e6
    assert "rope_theta" not in read_config(folder / "untied")
    logits = outcome("probe untied")["logits"]
    assert np.array_equal(outcome("probe old-config")["logits"], logits)
    assert np.abs(outcome("probe near")["logits"] - logits).max() > 0.1 * np.abs(logits).max()


def test_scores_are_the_log_softmax_of_the_logits(outcome: Callable[[str], Tensors]) -> None:
    logits = outcome("probe untied")["logits"].astype(np.float64)
    expected = (
        logits
        - np.log(np.exp(logits - logits.max(2, keepdims=True)).sum(2, keepdims=True))
        - logits.max(2, keepdims=True)
    )
    scores = outcome("score untied")
    assert (scores["logprobs"].dtype, scores["top1"].dtype) == (np.float32, np.int32)
    for row, start in ((0, 0), (1, 57)):
        own = expected[row, np.arange(39), PROBE[row][1:]]
        np.testing.assert_allclose(scores["logprobs"][start + 1 : start + 40], own, atol=1e-3)
        assert np.array_equal(scores["top1"][start + 1 : start + 40], logits[row, :-1].argmax(1))


def test_only_the_first_token_of_a_window_has_no_score(outcome: Callable[[str], Tensors]) -> None:
    firsts = np.concatenate([[0], np.cumsum(LENGTHS)[:-1]])
    scores = outcome("score untied")
    assert np.flatnonzero(np.isnan(scores["logprobs"])).tolist() == firsts.tolist()
    assert np.flatnonzero(scores["top1"] == -1).tolist() == firsts.tolist()


def test_scoring_is_repeatable_and_batches_do_not_matter(outcome: Callable[[str], Tensors]) -> None:
    first, alone = outcome("score untied"), outcome("small batches")
    assert np.array_equal(outcome("again")["logprobs"], first["logprobs"], equal_nan=True)
    np.testing.assert_allclose(alone["logprobs"], first["logprobs"], atol=1e-3)


@pytest.mark.parametrize("name", [*QUANTIZED, "experts/gptq8"])
def test_a_quantized_checkpoint_scores_as_the_float_weights_it_stands_for(
    outcome: Callable[[str], Tensors], name: str
) -> None:
    found, expected = outcome(f"score {name}"), outcome(f"score {name}-plain")
    assert np.array_equal(found["logprobs"], expected["logprobs"], equal_nan=True)
    assert np.array_equal(found["top1"], expected["top1"])
    assert not np.array_equal(found["logprobs"], outcome("score tied")["logprobs"], equal_nan=True)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_the_model_is_refused_by_name(answers: dict[str, dict[str, Any]], name: str) -> None:
    assert REFUSALS[name] in answers[f"score {name}"]["refused"]
    assert not answers[f"score {name}"]["output"].exists()


@pytest.mark.parametrize(
    ("key", "fact"),
    [
        ("foreign", "the model knows 256"),
        ("ragged", "not equally long"),
        ("empty prompt", "prompt 1 has no tokens"),
        ("device", "set device=cpu"),
    ],
)
def test_jobs_that_make_no_sense_are_refused(answers: dict[str, dict[str, Any]], key: str, fact: str) -> None:
    assert fact in answers[key]["refused"]


@pytest.mark.parametrize("name", ["tied", "untied", "experts"])
def test_continuations_are_greedy(folder: Path, answers: dict[str, dict[str, Any]], name: str) -> None:
    from safetensors.numpy import load_file

    answer = answers[f"generate {name}"]["generations"]
    assert answer["tokens"][0] == load_file(folder / f"{name}.expected.safetensors")["greedy"].tolist()
    assert [len(tokens) for tokens in answer["tokens"]] == [12, 12]
    assert all(margin >= 0 for margins in answer["margins"] for margin in margins)


@pytest.mark.parametrize("name", ["tied", "untied", "experts", "capped", "eager-only"])
def test_a_model_that_is_emptied_after_each_part_gives_the_same_logits(
    answers: dict[str, dict[str, Any]], outcome: Callable[[str], Tensors], name: str
) -> None:
    assert np.array_equal(outcome(f"probe {name} part by part")["logits"], outcome(f"probe {name}")["logits"])
    kept, emptied = (answers[f"generate {name}{how}"]["generations"] for how in ("", " part by part"))
    assert emptied["tokens"] == kept["tokens"]
    # Without a cache of keys and values, matrix products are of other shapes.
    np.testing.assert_allclose(emptied["margins"], kept["margins"], atol=1e-3)


def test_a_quantized_model_that_is_emptied_after_each_part_gives_the_same_scores(
    outcome: Callable[[str], Tensors],
) -> None:
    found, expected = outcome("score gptq4 part by part"), outcome("score gptq4")
    assert np.array_equal(found["logprobs"], expected["logprobs"], equal_nan=True)


def test_the_worker_scores_and_measures_across_the_process_border(
    folder: Path, toolchain: Toolchain, tmp_path: Path, outcome: Callable[[str], Tensors]
) -> None:
    job = {
        "checkpoint": str(folder / "untied"), "windows": str(folder / "windows.safetensors"),
        "output": str(tmp_path / "scores.safetensors"), "device": "cpu", "threads": 1, "batch_tokens": 80,
    }  # fmt: skip
    result = run_worker(
        toolchain,
        "quantline.toolchains.workers.reference.evaluate",
        job,
        log=tmp_path / "log.txt",
        threads=1,
        label="scores",
    )
    assert result.data["tokens"] == sum(LENGTHS)
    assert result.data["tokens_per_second"] == result.data["tokens"] / result.data["seconds"]["score"]
    logprobs = load_scores(tmp_path / "scores.safetensors")["logprobs"]
    assert np.array_equal(logprobs, outcome("score untied")["logprobs"], equal_nan=True)


def test_a_refusal_crosses_the_process_border_as_a_message(folder: Path, toolchain: Toolchain, tmp_path: Path) -> None:
    job = {"checkpoint": str(folder / "missing"), "input_ids": PROBE, "output": str(tmp_path / "x")}
    with pytest.raises(UserError, match=r"has no tensor for model\.layers\.1"):
        run_worker(
            toolchain,
            "quantline.toolchains.workers.reference.engine",
            job,
            log=tmp_path / "log.txt",
            threads=1,
            label="probe",
        )


def test_only_biases_of_zeros_may_be_left_over() -> None:
    loaded = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": {"a.bias", "b.bias"}}
    assert unaccounted(loaded, {"a.bias", "b.bias"}) == []
    assert unaccounted(loaded, {"a.bias"}) == ["has tensors that the model does not: b.bias"]


def test_batches_hold_windows_of_one_length_longest_first() -> None:
    offsets = np.array([0, 3, 4, 8, 11, 15, 19, 19, 21])  # lengths 3 1 4 3 4 4 0 2
    found = [batch.tolist() for batch in plan_batches(offsets, 8)]
    assert found == [[2, 4], [5], [0, 3], [7]]
    assert [batch.tolist() for batch in plan_batches(offsets, 1)] == [[2], [4], [5], [0], [3], [7]]
