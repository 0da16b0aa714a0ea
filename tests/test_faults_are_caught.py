"""The instruments on the demo model by the real reference engine: sound variants come out in order and without an alarm, a
model against itself is the same, and a checkpoint with two rows of scales swapped raises several.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from itertools import pairwise

import numpy as np
import pytest
import sections
from safetensors.numpy import load_file

from quantline.checkpoints.checkpoint import Checkpoint, write_safetensors
from quantline.checkpoints.layouts.linear_spec import LinearSpec
from quantline.checkpoints.linears import linear_shapes
from quantline.config.evaluate import GenerationsConfig, RestoreConfig
from quantline.config.layer_errors import LayerErrorsConfig
from quantline.data.windows import build_windows
from quantline.evaluation.bootstrap import bootstrap
from quantline.evaluation.evaluate import Inputs, evaluate
from quantline.evaluation.measurements import LayerInputs, MeasurementOptions
from quantline.evaluation.perplexity import document_sums
from quantline.pipeline.config import parse
from quantline.quantization import layer_errors
from quantline.toolchains.environments import ensure
from quantline.toolchains.protocol import JobResult
from quantline.toolchains.toolchain import worker_environment
from quantline.toolchains.workers.quantizers import native

pytestmark = pytest.mark.toolchain("reference")

# One process for all jobs: each of its own would load torch anew.
SERVE = """
import importlib, json, sys
out, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    request = json.loads(line)
    data = importlib.import_module(request["module"]).run(request["job"], lambda *progress: None)
    print(json.dumps(dict(data)), file=out, flush=True)
"""
BITS = (4, 3, 2)
BROKEN = "model.layers.4.self_attn.o_proj"
SWAPPED = (0, 2)  # groups of input columns, whose scales are rows in GPTQ's layout


class Bench:
    """The demo model, a text, and a process that computes."""

    def __init__(self, root, folder, options):
        self.root, self.folder, self.options = root, folder, options
        self.model = root / "assets" / "demo" / "model"
        limited = {"max_tokens": 4000, "max_document_tokens": 128}
        text = options.model_copy(update={"path": str(root / options.path), **limited})
        self.windows = build_windows(self.model, text)
        path = str(root / "assets/demo/calibration.jsonl")
        text = sections.protocol(name="c", path=path, max_tokens=512, max_document_tokens=128)
        samples = build_windows(self.model, text).input_ids[:512].reshape(4, 128)
        write_safetensors(folder / "tokens.safetensors", {"input_ids": samples})
        command = [str(ensure(root, "reference").python), "-c", SERVE]
        self.process = subprocess.Popen(
            command, env=worker_environment(2), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def worker(self, _toolchain, module, job, _label):
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"module": module, "job": job}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the worker ended"
        return JobResult(json.loads(answer), 0.0, 0)

    def quantize(self, bits):
        """Round to nearest into GPTQ's layout."""
        out = self.folder / f"rtn-w{bits}"
        out.mkdir()
        job = {"model": str(self.model), "output": str(out), "bits": bits, "group_size": 128, "options": {}}
        native.run(job, lambda *progress: None)
        return out

    def measure(self, checkpoint, bits):
        """Measure every linear, as the quantize stage does."""
        linears = {name: LinearSpec(bits, 128) for name in linear_shapes(Checkpoint.open(self.model), {})}
        made = layer_errors.Quantized(self.model, checkpoint, self.folder / "tokens.safetensors", linears, "rtn")
        layer_errors.measure(made, self.settings, run_worker=self.worker)

    @property
    def settings(self):
        limits = {f"bits{bits}": None for bits in (8, 4, 3, 2)}
        return LayerErrorsConfig.model_validate({
            "enabled": True, "samples": 4, "max_output_error": limits, "max_weight_error": limits, "min_tokens": 0,
            "few_tokens": "warn", "levels": {"moderate": 0.1, "high": 0.25},
        })  # fmt: skip

    def swap(self, source, linear, rows):
        """A copy of a checkpoint with two rows of one linear's scales swapped."""
        out = self.folder / "broken"
        shutil.copytree(source, out)
        tensors = dict(load_file(out / "model.safetensors"))
        scales = tensors[f"{linear}.scales"].copy()
        scales[list(rows)] = scales[list(reversed(rows))]
        assert not np.array_equal(scales, tensors[f"{linear}.scales"])
        tensors[f"{linear}.scales"] = scales
        write_safetensors(out / "model.safetensors", tensors)
        return out

    def evaluate(self, name, checkpoint, *, quantized=None, baseline=True, restore=0):
        out = self.folder / f"evaluate-{name}"
        out.mkdir()
        layers = None
        if quantized:
            layers = LayerInputs(
                quantized, self.folder / "tokens.safetensors", 4, None, RestoreConfig(layers=restore, tokens=1000)
            )
        tools = MeasurementOptions(
            divergence=None, layers=layers, limits=self.options.limits,
            generations=GenerationsConfig(prompts=16, prompt_tokens=32, new_tokens=24, tie_margin=1e-4),
        )  # fmt: skip
        how = sections.bootstrap(resamples=1000)
        options = self.options.model_copy(update={"bootstrap": how, "batch_tokens": 2048, "engine_tolerance": 0.01})
        base = self.folder / "evaluate-float" if baseline else None
        return evaluate(
            Inputs(checkpoint, self.model, self.folder, base), self.windows, options, device="cpu", threads=2, out=out,
            run_worker=self.worker, instruments=tools,
        )  # fmt: skip


@pytest.fixture(scope="module")
def bench(root, tmp_path_factory, composed):
    made = Bench(root, tmp_path_factory.mktemp("faults"), parse(composed()).evaluate)
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture(scope="module")
def judged(bench):
    """The float model, itself as if it were a variant, sound variants, and the broken one."""
    found = {"float": bench.evaluate("float", bench.model, baseline=False)}
    found["itself"] = bench.evaluate("itself", bench.model)
    made = {bits: bench.quantize(bits) for bits in BITS}
    bench.measure(made[4], 4)
    found["w4"] = bench.evaluate("w4", made[4], quantized=made[4], restore=3)
    for bits in (3, 2):
        found[f"w{bits}"] = bench.evaluate(f"w{bits}", made[bits])
    broken = bench.swap(made[4], BROKEN, SWAPPED)
    found["broken"] = bench.evaluate("broken", broken, quantized=broken, restore=3)
    return found


def alarms(verdict):
    return {row["instrument"] for row in verdict.tables["flags"]}


def test_a_model_against_itself_is_the_same_to_the_last_bit(judged):
    own = judged["itself"]
    assert (own.verdict, alarms(own)) == ("same", set())
    for name in ("nll_difference", "kl_divergence"):
        assert [own.metrics[f"{name}{end}"] for end in ("", "_low", "_high")] == [0.0, 0.0, 0.0]
    assert own.metrics["top1_agreement_low"] == own.metrics["identical_generations"] == 1.0
    assert own.metrics["first_divergence_median"] == 24


def test_fewer_bits_lose_more_by_every_instrument(judged):
    by_bits = [judged[f"w{bits}"].metrics for bits in BITS]
    for name in ("kl_divergence", "reference_perplexity", "word_perplexity", "bits_per_byte"):
        values = [metrics[name] for metrics in by_bits]
        assert values == sorted(values), name
    for name in ("top1_agreement", "first_divergence_median", "identical_generations"):
        values = [metrics[name] for metrics in by_bits]
        assert values == sorted(values, reverse=True), name
    # Neighbours are told apart: their intervals do not meet.
    for more, fewer in pairwise(by_bits):
        assert more["kl_divergence_high"] < fewer["kl_divergence_low"]
        assert more["top1_agreement_low"] > fewer["top1_agreement_high"]


def test_a_sound_variant_of_4_bits_raises_no_alarm_and_2_bits_do(judged):
    assert alarms(judged["w4"]) == set()
    assert judged["w4"].metrics["output_error_change"] < 1e-3  # it is what was quantized
    assert alarms(judged["w2"]) >= {"perplexity_increase", "kl_divergence", "top1_agreement"}


def test_two_swapped_rows_of_scales_are_caught_by_three_instruments_at_least(judged):
    assert len(alarms(judged["broken"])) >= 3
    assert {"output_error_change", "weight_error_change"} <= alarms(judged["broken"])
    assert judged["broken"].tables["restored"][0]["name"] == BROKEN


@pytest.mark.parametrize("seed", [1, 2])
def test_another_seed_and_either_half_of_the_text_say_the_same(judged, bench, seed):
    def interval(name, documents):
        kl = load_file(bench.folder / f"evaluate-{name}" / "reference.safetensors")["kl"]
        sums, tokens = document_sums(bench.windows, kl)
        return bootstrap(sums[documents], tokens[documents], sections.bootstrap(seed=seed, resamples=1000))

    names = [f"w{bits}" for bits in BITS]
    for name in names:
        first, again = judged[name].metrics, interval(name, slice(None))
        assert again.estimate == pytest.approx(first["kl_divergence"])
        assert again.low == pytest.approx(first["kl_divergence_low"], rel=0.02)
        assert again.high == pytest.approx(first["kl_divergence_high"], rel=0.02)
    halves = [[interval(name, slice(start, None, 2)) for name in names] for start in (0, 1)]
    for one, other in zip(*halves, strict=True):
        assert max(one.low, other.low) < min(one.high, other.high)
    for half in halves:
        assert all(more.high < fewer.low for more, fewer in pairwise(half))
