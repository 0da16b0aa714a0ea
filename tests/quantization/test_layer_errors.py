"""The gate on layer errors on tiny models: every number against one that plain hooks on the float model give."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_model import write_tokenizer

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.linears import select_linears
from quantline.checkpoints.model_config import read_config
from quantline.config.layer_errors import LayerErrorsConfig
from quantline.core.errors import WorkerError
from quantline.quantization import layer_errors
from quantline.toolchains.environments import ensure
from quantline.toolchains.protocol import JobResult
from quantline.toolchains.toolchain import worker_environment
from quantline.toolchains.workers.quantizers import native
from quantline.toolchains.workers.reference.linear_locations import Linear, mark_unseen

pytestmark = pytest.mark.toolchain("reference")

# Makes the float models.
MAKE = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config, Qwen2MoeConfig

common = dict(
    vocab_size=256, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
)
configs = {
    "dense": Qwen2Config(**common, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**common, tie_word_embeddings=False, num_local_experts=8, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **common, tie_word_embeddings=True, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=128, decoder_sparse_step=2,
    ),
}
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(Path(sys.argv[1]) / name)
"""

# Measures jobs, and what is expected of them: inputs taken by hooks, experts from the router's choice, one by one.
RUN = """
import json, re, sys
from pathlib import Path
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from quantline.checkpoints.float_view import iter_dequantized
from quantline.toolchains.workers.reference import layer_errors
from quantline.toolchains.workers.reference.layer_errors import run
from quantline.toolchains.protocol import JobError

logging.disable_progress_bar()

def expected(job):
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    inputs, routes, hooks = {}, {}, []
    def keep(place, name):
        return lambda module, args, *rest: place.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_hook(keep(inputs, name)))
        if name.endswith("mlp.gate"):
            hooks.append(module.register_forward_hook(keep(inputs, name)))
            hooks.append(module.register_forward_hook(
                lambda module, args, out, name=name: routes.setdefault(name, []).append(out[2])))
    floats, quantized = (
        {name: torch.tensor(values) for name, values in iter_dequantized(job[key])} for key in ("model", "checkpoint"))
    found = {}
    for chosen, ids in enumerate((load_file(job["calibration"])["input_ids"][:job["samples"]],
                                  load_file(job["calibration"])["input_ids"])):
        inputs.clear(), routes.clear()
        for row in ids:
            model(input_ids=torch.tensor(row)[None].long(), use_cache=False)
        for name in job["linears"]:
            if name.removesuffix(".weight") in inputs:
                x = torch.cat(inputs[name])
            else:
                block, _, rest = name.replace("block_sparse_moe", "mlp").partition(".experts.")
                expert, _, part = rest.partition(".")
                x = torch.cat(inputs[block + ".gate"])[(torch.cat(routes[block + ".gate"]) == int(expert)).any(1)]
                if part in ("w2", "down_proj"):
                    gate, up = (name.replace("w2", a).replace("down_proj", b) + ".weight"
                                for a, b in (("w1", "gate_proj"), ("w3", "up_proj")))
                    x = torch.nn.functional.silu(x @ floats[gate].T) * (x @ floats[up].T)
            w, q = floats[name + ".weight"], quantized[name + ".weight"]
            own = found.setdefault(name, {})
            own["tokens"] = len(x)
            if chosen == 0:
                own["output_error"] = float((x @ (q - w).T).norm() / (x @ w.T).norm()) if len(x) else None
                own["weight_error"] = float((q - w).norm() / w.norm())
                own["weight_error_max"] = float((q - w).abs().max())
                own["weight_error_mean"] = float((q - w).abs().mean())
    return found

answers = {}
for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
    layer_errors.EXPERT = re.compile("(?!)" if job.get("unnamed") else r"\\.experts\\.")
    try:
        answer = run(job, lambda *progress: None)
        with torch.inference_mode():
            answers[name] = {**answer, "expected": expected(job) if job["compare"] else None}
    except JobError as error:
        answers[name] = {"refused": str(error)}
Path(sys.argv[2]).write_text(json.dumps(answers))
"""

SETTINGS = {
    "enabled": True, "samples": 2, "min_tokens": 1, "few_tokens": "warn", "levels": {"moderate": 0.1, "high": 0.25},
    "max_output_error": {"bits8": 0.1, "bits4": 0.6, "bits3": 0.9, "bits2": None},
    "max_weight_error": {"bits8": 0.1, "bits4": 0.6, "bits3": 0.9, "bits2": None},
}  # fmt: skip
DAMAGED = "model.layers.1.self_attn.o_proj"
RULES = {"widths": [{"match": "*.0.mlp.*", "skip": True}, {"match": "*_attn*", "bits": 8}]}
CASES = ["dense", "head", "mixtral", "qwen2_moe", "widths"]


def python_of(root, code, *arguments):
    command = [ensure(root, "reference").python, "-c", code, *arguments]
    done = subprocess.run(command, env=worker_environment(1), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def quantized(model, output, *, bits=4, lm_head=False, rules=(), sym=True):
    """Rounded to nearest by the native backend; returns what was asked for, by name."""
    output.mkdir()
    config = read_config(model)
    widths = select_linears(Checkpoint.open(model), config, bits=bits, group_size=32, rules=rules, lm_head=lm_head)
    linears = {name: {"bits": width.bits, "group_size": width.group_size} for name, width in widths.items()}
    job = {"model": str(model), "output": str(output), "linears": linears, "bits": bits, "group_size": 32}
    native.run({**job, "options": {"sym": sym}}, lambda *progress: None)
    return widths


def folded(model, folder):
    """The same model with scales folded into its norms and rows, as AWQ does it; returns the folder."""
    shutil.copytree(model, folder)
    tensors, random = dict(load_file(model / "model.safetensors")), np.random.default_rng(0)

    def spread(size):
        return np.exp(random.normal(size=size) * 0.5).astype(np.float32)

    for index in range(2):
        layer = f"model.layers.{index}."
        for norm, names in (("input_layernorm", "qkv"), ("post_attention_layernorm", ("gate", "up"))):
            columns = spread(128)
            tensors[f"{layer}{norm}.weight"] = tensors[f"{layer}{norm}.weight"] / columns
            for name in names:
                own = f"{layer}{'self_attn' if len(name) == 1 else 'mlp'}.{name}_proj.weight"
                tensors[own] = tensors[own] * columns
        columns = spread(192)
        tensors[f"{layer}mlp.up_proj.weight"] = tensors[f"{layer}mlp.up_proj.weight"] / columns[:, None]
        tensors[f"{layer}mlp.down_proj.weight"] = tensors[f"{layer}mlp.down_proj.weight"] * columns
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def damage(quantized, folder):
    """One linear's codes shifted by a column, which no check of shapes sees."""
    shutil.copytree(quantized, folder)
    checkpoint = Checkpoint.open(quantized)
    tensors = {name: checkpoint.tensor(name).copy() for name in checkpoint.names}
    tensors[f"{DAMAGED}.qweight"] = np.roll(tensors[f"{DAMAGED}.qweight"], 1, axis=1)
    write_safetensors(folder / "model.safetensors", tensors)


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    """Models, their quantized checkpoints, and what the worker says of each, with what is expected."""
    folder = tmp_path_factory.mktemp("coverage")
    python_of(root, MAKE, folder)
    random = np.random.default_rng(0)
    for name, shape, vocabulary in (("tokens", (6, 24), 256), ("few", (1, 4), 256), ("foreign", (2, 9), 999)):
        ids = random.integers(0, vocabulary, shape, dtype=np.int32)
        write_safetensors(folder / f"{name}.safetensors", {"input_ids": ids})
    ids = load_file(folder / "tokens.safetensors")["input_ids"]
    write_safetensors(folder / "held.safetensors", {"input_ids": ids, "held_ids": ids[:2]})
    for name in ("dense", "mixtral", "qwen2_moe"):
        write_tokenizer(folder / name)
    folded(folder / "dense", folder / "folded")
    widths = {
        "dense": quantized(folder / "dense", folder / "dense-w4"),
        "head": quantized(folder / "dense", folder / "head-w4", lm_head=True),
        "widths": quantized(
            folder / "dense", folder / "widths-w4", rules=RULES["widths"],
        ),
        "mixtral": quantized(folder / "mixtral", folder / "mixtral-w4"),
        "qwen2_moe": quantized(folder / "qwen2_moe", folder / "qwen2_moe-w4"),
        "folded": quantized(folder / "folded", folder / "folded-w4"),
        "minima": quantized(folder / "dense", folder / "minima-w4", sym=False),
    }  # fmt: skip

    def job(name, **changes):
        model = {"head": "dense", "widths": "dense", "folded": "dense", "minima": "dense"}.get(name, name)
        return {
            "model": str(folder / model), "checkpoint": str(folder / f"{name}-w4"), "linears": list(widths[name]),
            "calibration": str(folder / "tokens.safetensors"), "samples": 2, "compare": True, "threads": 1, **changes,
        }  # fmt: skip

    jobs = {name: job(name) for name in CASES}
    few = {"calibration": str(folder / "few.safetensors"), "samples": 1}
    jobs["few"] = job("mixtral", **few)
    jobs["unnamed"] = job("mixtral", compare=False, unnamed=True)
    jobs["folded"] = job("folded", compare=False)
    jobs["not unfolded"] = job("folded", compare=False, unfold=False)
    jobs["unfolded"] = job("dense", compare=False, unfold=True)
    jobs["float"] = job("dense", checkpoint=str(folder / "dense"))
    jobs["skipped"] = job("widths", linears=["model.layers.0.mlp.up_proj"])
    jobs["foreign"] = job("dense", calibration=str(folder / "foreign.safetensors"))
    damage(folder / "dense-w4", folder / "damaged-w4")
    jobs["damaged"] = job("dense", checkpoint=str(folder / "damaged-w4"), compare=False)
    held = {"calibration": str(folder / "held.safetensors"), "rounding": True, "compare": False}
    for name in ("dense", "minima", "mixtral"):
        jobs[f"held {name}"] = job(name, **held)
    jobs["held damaged"] = job("dense", checkpoint=str(folder / "damaged-w4"), **held)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    python_of(root, RUN, folder / "jobs.json", folder / "answers.json")
    answers = json.loads((folder / "answers.json").read_text())
    return SimpleNamespace(folder=folder, widths=widths, answers=answers)


@pytest.fixture
def gate(made, tmp_path):
    """Run the gate on one case with the worker's true answer; `change` damages the output or the answer first."""

    def measure(name, *, method="rtn", answer=None, change=None, also=None, **settings):
        output = tmp_path / "output"
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(made.folder / f"{name}-w4", output)
        said = json.loads(json.dumps(made.answers[answer or name]))
        jobs = []

        def worker(toolchain, module, job, label):
            assert (toolchain, module) == ("reference", "quantline.toolchains.workers.reference.layer_errors")
            jobs.append(job)
            if change:
                change(said["rows"])
            return JobResult(said, 1.0, 0)

        model = {"head": "dense", "widths": "dense"}.get(name, name)
        result = layer_errors.measure(
            layer_errors.Quantized(
                made.folder / model, output, made.folder / "tokens.safetensors", {**made.widths[name], **(also or {})},
                method, RULES.get(name, ()),
            ),
            LayerErrorsConfig.model_validate({**SETTINGS, **settings}), run_worker=worker, failed=tmp_path / "failed",
        )  # fmt: skip
        return SimpleNamespace(result=result, output=output, jobs=jobs)

    return measure


@pytest.mark.parametrize("name", [*CASES, "few"])
def test_every_number_is_what_plain_hooks_give(made, name):
    answer = made.answers[name]
    assert [row["name"] for row in answer["rows"]] == list(made.widths["mixtral" if name == "few" else name])
    for row in answer["rows"]:
        expected = answer["expected"][row["name"]]
        assert row["tokens"] == expected["tokens"], row["name"]
        for key in ("output_error", "weight_error", "weight_error_max", "weight_error_mean"):
            assert row[key] == (expected[key] and pytest.approx(expected[key], rel=1e-4)), (row["name"], key)


@pytest.mark.parametrize(("name", "experts", "parts"), [("mixtral", 8, 2 * 3), ("qwen2_moe", 6, 3)])
def test_tokens_are_counted_for_each_expert_over_all_samples(made, name, experts, parts):
    rows = [row for row in made.answers[name]["rows"] if ".experts." in row["name"]]
    assert len(rows) == experts * parts
    # Two experts a token; each is three linears that see the same tokens.
    assert sum(row["tokens"] for row in rows) == 6 * 24 * 2 * parts
    assert len({row["tokens"] for row in rows}) > experts / 2
    others = [row for row in made.answers[name]["rows"] if ".experts." not in row["name"]]
    assert {row["tokens"] for row in others} == {6 * 24}


@pytest.mark.parametrize("name", ["dense", "minima", "mixtral"])
def test_rounding_to_nearest_is_as_far_as_itself_on_what_was_held_back(made, name):
    rows = made.answers[f"held {name}"]["rows"]
    assert len(rows) == len(made.widths[name])
    for row in rows:
        if row["output_error"] is None:  # an expert that no token reached
            assert row["held_error"] is row["rounding_error"] is None
        else:  # the samples that were held back are those that were measured
            assert row["held_error"] == pytest.approx(row["output_error"], rel=1e-5)
            assert row["rounding_error"] == pytest.approx(row["held_error"], rel=1e-5)
        assert row["tokens"] == 144 or name == "mixtral"


def test_what_is_worse_than_rounding_is_said_with_its_ratio(gate, made):
    none = dict.fromkeys(("bits8", "bits4", "bits3", "bits2"))
    found = gate("dense", method="gptq", answer="held damaged", max_output_error=none, max_weight_error=none)
    result = found.result
    assert found.jobs[0]["rounding"]
    assert result.metrics["worse_than_rounding"] == 1
    assert result.metrics["rounding_ratio"] > 1
    (said,) = [warning for warning in result.warnings if "rounding to nearest" in warning]
    assert DAMAGED in said
    assert "calibration=auto" in said
    own = gate("dense", method="gptq", answer="held dense").result
    assert own.metrics["rounding_ratio"] == pytest.approx(1, rel=1e-4)
    assert "rounding_ratio" not in gate("dense").result.metrics


def test_tokens_are_counted_over_all_samples_whatever_experts_are_called(made):
    assert made.answers["unnamed"]["rows"] == made.answers["mixtral"]["rows"]


def test_an_expert_without_a_token_has_no_output_error_but_one_of_its_weights(made):
    blind = [row for row in made.answers["few"]["rows"] if row["tokens"] == 0]
    assert blind
    assert all(row["output_error"] is None and 0 < row["weight_error"] < 0.2 for row in blind)


def test_a_quantized_output_layer_is_measured_too(made):
    row = made.answers["head"]["rows"][-1]
    assert (row["name"], row["tokens"]) == ("lm_head", 6 * 24)
    assert 0.05 < row["output_error"] < 0.2


def test_scales_folded_into_norms_are_found_and_undone(made):
    fitted, blunt, plain = (made.answers[name] for name in ("folded", "not unfolded", "dense"))
    assert (fitted["unfolded"], blunt["unfolded"], plain["unfolded"]) == (True, False, False)
    assert min(row["output_error"] for row in blunt["rows"] if "o_proj" not in row["name"]) > 0.3
    # Spread columns share a group's scale, so these round worse than the plain ones, though not by much.
    assert max(row["output_error"] for row in fitted["rows"]) < 0.25


def test_unfolding_what_has_no_scales_changes_little(made):
    for fitted, plain in zip(made.answers["unfolded"]["rows"], made.answers["dense"]["rows"], strict=True):
        assert fitted["weight_error"] == pytest.approx(plain["weight_error"], rel=0.05)
        assert fitted["output_error"] == pytest.approx(plain["output_error"], rel=0.05)


def test_the_worker_refuses_what_cannot_be_compared(made):
    assert "is not quantized" in made.answers["float"]["refused"]
    assert "model.layers.0.mlp.up_proj is not quantized" in made.answers["skipped"]["refused"]
    assert "another model's tokenizer" in made.answers["foreign"]["refused"]


def test_experts_whose_calls_cannot_be_seen_are_told_from_those_without_tokens():
    def linears(*tokens):
        names = [f"model.layers.0.mlp.experts.{number}.w1" for number in range(len(tokens))]
        return [Linear(name, None, seen=True, tokens=count) for name, count in zip(names, tokens, strict=True)]

    some, none = linears(3, 0), linears(0, 0)
    dense = Linear("model.layers.0.self_attn.q_proj", None, seen=True)
    mark_unseen([*some, dense])
    mark_unseen(none)
    assert [linear.seen for linear in (*some, dense, *none)] == [True, True, False, False, False]


def test_what_passes_is_a_table_a_picture_and_metrics(gate):
    passed = gate("mixtral", method="gptq")
    result = passed.result
    assert result.files == ["coverage/layers.csv", "coverage/output_error.png"]
    assert all((passed.output / name).stat().st_size for name in result.files)
    with (passed.output / "coverage/layers.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [row["name"] for row in result.rows]
    errors = [row["output_error"] for row in result.rows if row["output_error"] is not None]
    assert result.metrics["output_error_max"] == max(errors)
    assert result.metrics["output_error_mean"] == pytest.approx(sum(errors) / len(errors))
    assert result.metrics["linears_quantized"] == result.metrics["linears_expected"] == len(result.rows)
    assert result.metrics["min_tokens"] == min(row["tokens"] for row in result.rows)
    assert result.worst.startswith(next(row["name"] for row in result.rows if row["output_error"] == max(errors)))
    assert passed.jobs[0]["samples"] == 2


def test_a_row_has_the_linears_own_bits_and_level(gate):
    levels = {"moderate": 0.05, "high": 0.5}
    rows = {row["name"]: row for row in gate("widths", levels=levels).result.rows}
    attention, mlp = rows["model.layers.1.self_attn.q_proj"], rows["model.layers.1.mlp.up_proj"]
    assert (attention["bits"], mlp["bits"]) == (8, 4)
    assert attention["effective_bits"] > 8 > mlp["effective_bits"] > 4
    assert (attention["level"], mlp["level"]) == ("low", "moderate")
    assert not [name for name in rows if ".0.mlp." in name]


def test_awq_is_always_unfolded_and_others_where_norms_differ(gate):
    assert gate("dense", method="awq").jobs[0]["unfold"] is True
    assert gate("dense", method="gptq").jobs[0]["unfold"] is None


def test_an_error_above_the_limit_fails_and_names_the_worst_linears(made, gate, tmp_path):
    worst = max(made.answers["dense"]["rows"], key=lambda row: row["output_error"])
    with pytest.raises(WorkerError, match=r"layer_errors\.max_output_error\.bits4.* in 14 of 14 linears") as caught:
        gate("dense", max_output_error={**SETTINGS["max_output_error"], "bits4": 0.01})
    assert f"{worst['name']} {worst['output_error']:.3g}" in str(caught.value)
    assert (tmp_path / "failed/coverage/layers.csv").is_file()
    assert str(tmp_path / "failed/coverage/layers.csv") in str(caught.value)
    with pytest.raises(WorkerError, match=r"layer_errors\.max_weight_error\.bits4"):
        gate("dense", max_weight_error={**SETTINGS["max_weight_error"], "bits4": 0.01})
    # The option that is named lets it pass, and nothing much smaller does.
    (raised,) = re.findall(r"raise the limit.*: layer_errors\.max_output_error\.bits4=([0-9.]+)", str(caught.value))
    assert worst["output_error"] <= float(raised) < worst["output_error"] + 0.01
    gate("dense", max_output_error={**SETTINGS["max_output_error"], "bits4": float(raised)})
    none = dict.fromkeys(SETTINGS["max_output_error"])
    assert gate("dense", max_output_error=none, max_weight_error=none).result.metrics["linears_high"] == 0


def test_a_limit_is_that_of_the_linears_own_bits(gate):
    strict = {**SETTINGS["max_output_error"], "bits8": 1e-6}
    with pytest.raises(WorkerError, match=r"bits8\) in 8 of 11 linears"):
        gate("widths", max_output_error=strict)
    gate("dense", max_output_error=strict)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_fails_without_any_limit(gate, value):
    told = r"in 1 of 14 linears: model\.layers\.0\.mlp\.down_proj (nan|inf)"
    none = dict.fromkeys(SETTINGS["max_output_error"])
    with pytest.raises(WorkerError, match=told):
        gate("dense", max_output_error=none, change=lambda rows: rows[0].update(output_error=value))


def test_a_blind_expert_warns_fails_or_is_ignored(gate):
    def blind(**settings):
        return gate("mixtral", answer="few", **settings).result.warnings

    (few, untouched) = blind(method="gptq")
    assert "too little data" in few
    assert "no token of layer_errors.samples reached them" in untouched
    assert blind(method="gptq", few_tokens="ignore") == [untouched]
    # What needs no calibration is not blind without it.
    assert blind(method="rtn", few_tokens="fail") == [untouched]
    with pytest.raises(WorkerError, match=r"fewer than 1 calibration tokens \(layer_errors\.min_tokens\)"):
        blind(method="gptq", few_tokens="fail")
    with pytest.raises(WorkerError, match="fewer than 500 calibration tokens"):
        gate("dense", method="gptq", few_tokens="fail", min_tokens=500)


def test_calls_that_cannot_be_seen_are_a_warning(gate):
    def hide(rows):
        rows[3].update(tokens=None, output_error=None)

    (warning,) = gate("dense", method="gptq", change=hide).result.warnings
    assert "calls cannot be observed" in warning


def test_a_fault_of_the_files_ends_it_before_the_worker(gate):
    reached = []
    with pytest.raises(WorkerError, match=r"1 of 15 linears were not quantized: model\.layers\.9\.mlp\.up_proj"):
        gate("dense", also={"model.layers.9.mlp.up_proj": LinearSpec(4, 32)}, change=reached.append)
    assert not reached


def test_without_errors_the_files_are_still_checked(gate):
    passed = gate("dense", enabled=False)
    assert (passed.jobs, passed.result.files) == ([], [])
    assert passed.result.metrics["effective_bits"] > 4
    assert "output_error_max" not in passed.result.metrics
    assert not (passed.output / "coverage").exists()


def test_what_the_backend_says_of_a_linear_joins_its_row(made):
    found = layer_errors.inspect(made.folder / "dense", made.folder / "dense-w4", list(made.widths["dense"]))
    said = [
        {"layer": 1, "module": "mlp.up_proj", "loss": 0.25, "bits": 99},
        {"module": "model.layers.0.self_attn.q_proj", "relative_error": 0.5},
    ]
    rows = {row["name"]: row for row in layer_errors._rows(found, made.widths["dense"], said)}
    assert (rows["model.layers.1.mlp.up_proj"]["loss"], rows["model.layers.1.mlp.up_proj"]["bits"]) == (0.25, 4)
    assert rows["model.layers.0.self_attn.q_proj"]["relative_error"] == 0.5
    assert "loss" not in rows["model.layers.0.mlp.up_proj"]


def test_damaged_codes_are_found_by_their_error(gate):
    with pytest.raises(
        WorkerError, match=rf"output's error is above its limit .* in 1 of 14 linears: {DAMAGED} 1\.[0-9]+"
    ) as caught:
        gate("dense", answer="damaged")
    assert "are broken" in str(caught.value)
    assert "raise the limit" not in str(caught.value)
