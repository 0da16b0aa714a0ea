"""The worker on real models of a few hundred thousand weights, all jobs in one process of the reference environment."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_quantized import LAYER, VOCAB, float_weights, write_float

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.linears import linear_shapes
from quantline.toolchains.environments import ensure
from quantline.toolchains.toolchain import worker_environment
from quantline.toolchains.workers.quantizers import native

pytestmark = pytest.mark.toolchain("reference")

RUN = """
import json, sys
from pathlib import Path
import quantline.toolchains.workers.reference.engine as reference
import quantline.toolchains.workers.reference.evaluate as evaluation_worker
from quantline.toolchains.protocol import JobError

answers = {}
for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
    try:
        told = []
        answer = (reference if "input_ids" in job else evaluation_worker).run(job, lambda *step: told.append(step))
        answers[name] = {**answer, "progress": told}
    except JobError as error:
        answers[name] = {"refused": str(error)}
Path(sys.argv[2]).write_text(json.dumps(answers))
"""
LENGTHS = [32, 20, 32, 7]
WORST = f"{LAYER}mlp.gate_proj"


def quantized(model, folder, linears=None):
    """Rounded to nearest at 3 bits, all linears or the given ones."""
    folder.mkdir()
    names = linears or list(linear_shapes(Checkpoint.open(model), {}))
    widths = {name: {"bits": 3, "group_size": 128} for name in names}
    job = {"model": str(model), "output": str(folder), "bits": 3, "group_size": 128, "options": {}, "linears": widths}
    native.run(job, lambda *progress: None)
    return folder


def spoiled(weights):
    """One linear's weights spread so wide that it rounds far worse than the others."""
    name = f"{WORST}.weight"
    wild = np.random.default_rng(3).standard_t(2, weights[name].shape) * 0.03
    return {**weights, name: wild.clip(-2, 2).astype(np.float16)}


def folded(weights):
    """The same function, with scales of what goes into the MLP moved from its linears to the norm before, as AWQ does."""
    scales = np.exp(np.random.default_rng(4).normal(size=256) * 0.3).astype(np.float32)
    changed = dict(weights)
    norm = f"{LAYER}post_attention_layernorm.weight"
    changed[norm] = (weights[norm] / scales).astype(np.float16)
    for name in ("gate", "up"):
        key = f"{LAYER}mlp.{name}_proj.weight"
        changed[key] = (weights[key].astype(np.float32) * scales).astype(np.float16)
    return changed


@pytest.fixture(scope="module")
def outcome(root, tmp_path_factory):
    """Every job's answer, with the tensors it wrote."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = write_float(folder / "float")
    weights = spoiled(float_weights())
    write_safetensors(model / "model.safetensors", weights)
    moved = write_float(folder / "moved")
    write_safetensors(moved / "model.safetensors", folded(weights))
    names = [name for name in linear_shapes(Checkpoint.open(model), {}) if name != WORST]
    for source, name in ((model, "q"), (moved, "f")):
        quantized(source, folder / name)
        quantized(source, folder / f"{name}-but-worst", names)
    other = write_float(folder / "other")
    write_safetensors(
        other / "model.safetensors", {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:-1]}
    )
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB - 1}))
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    ids = np.random.default_rng(1).integers(0, VOCAB - 1, offsets[-1]).astype(np.int32)
    write_safetensors(folder / "windows.safetensors", {"input_ids": ids, "offsets": offsets})
    write_safetensors(folder / "tokens.safetensors", {"input_ids": ids[:64].reshape(2, 32)})
    common = {"windows": str(folder / "windows.safetensors"), "batch_tokens": 64, "baseline": str(model)}
    layers = {
        "linears": [WORST, *names],
        "calibration": str(folder / "tokens.safetensors"),
        "samples": 2,
        "unfold": None,
    }
    parts = {
        "generate": {"prompts": [ids[:9].tolist(), ids[9:18].tolist()], "new_tokens": 6}, "layers": layers,
        "restore": {"count": 2, "windows": common["windows"], "output": str(folder / "restored.safetensors")},
    }  # fmt: skip
    jobs = {
        "itself": {**common, "checkpoint": str(model)},
        "q": {**common, **parts, "checkpoint": str(folder / "q")},
        "q-but-worst": {**common, "checkpoint": str(folder / "q-but-worst")},
        "f": {
            **common, "checkpoint": str(folder / "f"), "layers": layers,
            "restore": {**parts["restore"], "count": 1, "output": str(folder / "f-restored.safetensors")},
        },
        "f-but-worst": {**common, "checkpoint": str(folder / "f-but-worst")},
        "a third": {**common, "checkpoint": str(folder / "q"), "divergence_tokens": 30},
        "other": {**common, "checkpoint": str(other)},
        "q by two": {
            **common, **parts, "checkpoint": str(folder / "q"), "gpus": 2,
            "restore": {**parts["restore"], "output": str(folder / "two-restored.safetensors")},
        },
        "probe float": {"checkpoint": str(model), "input_ids": [ids[:32].tolist()]},
        "probe q": {"checkpoint": str(folder / "q"), "input_ids": [ids[:32].tolist()]},
        "one by one": {
            **common, "checkpoint": str(folder / "q"), "generate": {**parts["generate"], "prompts": [ids[9:18].tolist()]},
        },
    }  # fmt: skip
    for name, job in jobs.items():
        job["output"] = str(folder / f"{name}.out")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [
        str(ensure(root, "reference").python),
        "-c",
        RUN,
        str(folder / "jobs.json"),
        str(folder / "answers.json"),
    ]
    done = subprocess.run(command, check=False, env=worker_environment(1), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads((folder / "answers.json").read_text())
    tensors = {path.name: load_file(path) for path in [*folder.glob("*.out"), *folder.glob("*restored.safetensors")]}
    return answers, tensors


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def mean(values):
    return float(np.nanmean(values.astype(np.float64)))


def test_a_model_diverges_from_itself_by_exactly_nothing(outcome):
    kl = outcome[1]["itself.out"]["kl"]
    firsts = np.concatenate([[0], np.cumsum(LENGTHS)[:-1]])
    assert np.flatnonzero(np.isnan(kl)).tolist() == firsts.tolist()
    assert np.nanmax(np.abs(kl)) == 0.0


def test_the_divergence_is_that_of_the_whole_distributions_from_the_float_model(outcome):
    _, tensors = outcome
    expected, own = (log_softmax(tensors[f"probe {name}.out"]["logits"][0, :-1]) for name in ("float", "q"))
    by_hand = (np.exp(expected) * (expected - own)).sum(axis=1)
    assert by_hand.min() > 1e-4
    np.testing.assert_allclose(tensors["q.out"]["kl"][1:32], by_hand, rtol=1e-3)


def test_of_a_part_of_the_tokens_the_divergence_is_what_it_is_of_all(outcome):
    whole, part = outcome[1]["q.out"], outcome[1]["a third.out"]
    assert np.array_equal(part["logprobs"], whole["logprobs"], equal_nan=True)
    measured = ~np.isnan(part["kl"])
    assert 10 < measured.sum() < 70
    assert np.array_equal(part["kl"][measured], whole["kl"][measured])


def test_two_processes_find_the_same_as_one_to_the_last_bit(outcome):
    answers, tensors = outcome
    one, two = answers["q"], answers["q by two"]
    assert [one[key] for key in ("states", "generations", "errors", "restored")] == [
        two[key] for key in ("states", "generations", "errors", "restored")
    ]
    for left, right in (("q.out", "q by two.out"), ("restored.safetensors", "two-restored.safetensors")):
        assert tensors[left].keys() == tensors[right].keys()
        assert all(np.array_equal(value, tensors[right][key], equal_nan=True) for key, value in tensors[left].items())


def test_other_vocabularies_are_refused_with_the_way_out(outcome):
    assert "set evaluate.divergence.tokens=0" in outcome[0]["other"]["refused"]


def test_continuations_in_a_batch_are_those_of_the_prompts_one_by_one(outcome):
    answers, _ = outcome
    assert answers["q"]["generations"]["tokens"][1:] == answers["one by one"]["generations"]["tokens"]
    margins = (answers[name]["generations"]["margins"][-1] for name in ("q", "one by one"))
    np.testing.assert_allclose(*margins, atol=1e-3)


def test_progress_goes_from_the_first_prompt_to_the_last_window_once(outcome):
    told = outcome[0]["q"]["progress"]
    done, totals, labels = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert (set(totals), done[-1]) == ({totals[0]}, totals[0])
    assert list(dict.fromkeys(labels)) == ["continuing prompts", "errors of linears", "scoring"]


def test_the_worst_linears_are_put_back_first(outcome):
    answers, _ = outcome
    errors = {row["name"]: row["output_error"] for row in answers["q"]["errors"]}
    assert len(errors) == 7
    assert max(errors, key=errors.get) == WORST
    second = sorted(errors, key=errors.get)[-2]
    assert [row["name"] for row in answers["q"]["restored"]] == [WORST, second]


def test_a_restored_linear_computes_what_it_would_if_it_had_not_been_quantized(outcome):
    _, tensors = outcome
    restored, truth, before = tensors["restored.safetensors"], tensors["q-but-worst.out"], tensors["q.out"]
    np.testing.assert_allclose(restored["logprobs"][1], truth["logprobs"], atol=2e-3)
    np.testing.assert_allclose(restored["kl"][1], truth["kl"], atol=2e-3)
    assert mean(restored["kl"][1]) < 0.8 * mean(before["kl"])
    assert np.array_equal(restored["logprobs"][0], before["logprobs"], equal_nan=True)
    # The second one is put back alone: the first is quantized again by then.
    assert mean(restored["kl"][2]) > mean(restored["kl"][1])


def test_scales_that_a_method_folded_away_are_kept_when_a_linear_is_put_back(outcome):
    answers, tensors = outcome
    assert [row["name"] for row in answers["f"]["restored"]] == [WORST]
    truth, before = mean(tensors["f-but-worst.out"]["kl"]), mean(tensors["f.out"]["kl"])
    restored = mean(tensors["f-restored.safetensors"]["kl"][1])
    assert restored == pytest.approx(truth, rel=0.1)
    assert restored < 0.8 * before
