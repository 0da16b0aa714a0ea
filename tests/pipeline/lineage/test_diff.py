"""The first difference of two lineages, with results as the stages write them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from quantline.checkpoints.safetensors_file import write_safetensors
from quantline.core.errors import UserError
from quantline.pipeline.config import parse
from quantline.pipeline.execute import execute
from quantline.pipeline.lineage.chain import Lineage, folder_lineage, local_lineage, require_lineage
from quantline.pipeline.lineage.diff import first_difference


def tensors(**arrays):
    """A stage's work that writes weights."""

    def work(run):
        with run.output() as out:
            write_safetensors(out / "model.safetensors", arrays)
            run.metrics["quantize_seconds"] = float(len(run.overrides))

    return work


WEIGHTS = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.ones(4, np.float16)}


@pytest.fixture(scope="module")
def checkout(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("envs", "assets"):
        (folder / name).symlink_to(root / name)
    return folder


@pytest.fixture(scope="module")
def chain(checkout, composed):
    """The chain of a variant of which two stages ran, each writing the same."""

    def of(name, *overrides, **arrays):
        config = parse(composed(*overrides, f"variant={name}"))
        for stage in ("calibrate", "quantize"):
            execute(stage, tensors(**{**WEIGHTS, **arrays}), config, checkout, overrides)
        found = local_lineage(checkout, f"by-hand/{name}")
        assert found is not None
        return found

    return of


@pytest.fixture(scope="module")
def plain(chain):
    return chain("plain", "method=gptq")


def test_the_same_made_twice_does_not_differ(plain, chain):
    again = chain("again", "method=gptq", "serve.process.port=9000")
    assert list(again.results) == ["calibrate", "quantize"]
    assert again.results["quantize"]["timings"] != plain.results["quantize"]["timings"]
    assert first_difference(plain, again) is None


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("bits=8", ("quantize", "options.bits", "4", "8")),
        ("threads=1", ("quantize", "options.threads", "2", "1")),
        ("method.damp_percent=0.02", ("quantize", "options.method.damp_percent", "0.01", "0.02")),
        ("calibration.seed=7", ("calibrate", "options.calibration.seed", "0", "7")),
    ],
)
def test_the_option_that_differs_is_named_with_both_values(plain, chain, override, named):
    found = first_difference(plain, chain("other", "method=gptq", override))
    assert found.kind == "identity"
    assert (found.stage, found.key, found.one, found.other) == named


def test_a_tensor_that_differs_is_named_with_its_first_element(plain, chain):
    values = WEIGHTS["a"].copy()
    values[1, 1:] = 40, 50
    found = first_difference(plain, chain("odd", "method=gptq", a=values))
    assert (found.stage, found.kind, found.key) == ("calibrate", "tensor", "a")
    assert found.notes == ["I32 [2, 3], 2 of 6 elements; the first is [1, 1]: 4 | 40"]


def test_a_negative_zero_is_another_value(plain, chain):
    found = first_difference(
        chain("zero", "method=gptq", b=np.zeros(4, np.float16)),
        chain("minus", "method=gptq", b=np.array([0, 0, -0.0, 0], np.float16)),
    )
    assert found.notes == ["F16 [4], 1 of 4 elements; the first is [2]: 0.0 | -0.0"]


def test_another_shape_of_the_same_bytes_is_a_difference(plain, chain):
    found = first_difference(plain, chain("turned", "method=gptq", a=WEIGHTS["a"].reshape(3, 2)))
    assert (found.key, found.notes) == ("a", ["dtype and shape: I32 [2, 3] | I32 [3, 2]"])


def test_a_tensor_that_only_one_has_is_a_difference(plain, chain):
    found = first_difference(plain, chain("more", "method=gptq", c=np.zeros(1, np.float32)))
    assert (found.key, found.one, found.more) == ("c", "nothing", [])


def altered(chain, stage, change):
    results = json.loads(json.dumps(chain.results))
    change(results[stage])
    return replace(chain, name="altered", origin="here", results=results)


def test_a_source_file_that_differs_is_named(plain):
    file = "src/quantline/quantization/quantize.py"
    found = first_difference(plain, altered(plain, "quantize", lambda r: r["identity"]["code"].update({file: "0"})))
    assert (found.stage, found.kind, found.key, found.other) == ("quantize", "identity", f"code.{file}", "0")


def test_a_lock_that_differs_is_named(plain):
    found = first_difference(
        plain, altered(plain, "quantize", lambda r: r["identity"]["options"].update(environment="0"))
    )
    assert (found.key, found.other) == ("options.environment", "0")


def test_another_device_is_a_note_and_not_a_difference(plain):
    def moved(result):
        result["environment"]["device"] = "cuda"

    assert first_difference(plain, altered(plain, "quantize", moved)) is None

    def moved_and_changed(result):
        moved(result)
        result["metrics"]["probe"] = 1.0

    found = first_difference(plain, altered(plain, "quantize", moved_and_changed))
    assert (found.kind, found.key, found.one, found.other) == ("metric", "probe", "nothing", "1.0")
    assert found.notes == [f"made with another device: {plain.results['quantize']['environment']['device']} | cuda"]


def test_times_and_memory_are_no_difference(plain):
    changes = {"quantize_seconds": 99.0, "load_memory_bytes": 1.0, "output_tokens_per_second": 3.0, "ttft_ms_c4": 1.0}
    assert first_difference(plain, altered(plain, "quantize", lambda r: r["metrics"].update(changes))) is None


@pytest.mark.parametrize(("name", "differs"), [("vllm_perplexity", False), ("reference_perplexity", True)])
def test_scores_through_a_server_may_differ_in_their_last_digits(plain, name, differs):
    one, other = (
        altered(plain, "quantize", lambda r, value=value: r["metrics"].update({name: value}))
        for value in (12.9, 12.9001)
    )
    assert (first_difference(one, other) is not None) == differs
    far = altered(plain, "quantize", lambda r: r["metrics"].update({name: 13.5}))
    assert first_difference(one, far).key == name


def test_a_stage_that_only_one_has_is_a_difference(plain):
    short = Lineage("short", "here", {"calibrate": plain.results["calibrate"]})
    assert str(first_difference(short, plain)) == "quantize, stage quantize: nothing | ran"


def test_a_chain_is_found_by_folder_by_result_and_by_output(checkout, plain):
    folder = checkout / "scratch" / "plain"
    for path in (folder, folder / "quantize.json", folder / "quantize"):
        assert folder_lineage(path, checkout).results == plain.results
    assert folder_lineage(checkout, checkout) is None
    assert local_lineage(checkout, "by-hand/missing") is None


def test_a_run_by_hand_is_not_compared_with_itself_under_the_pipelines_name(checkout, plain):
    for name in ("plain", "by-hand/missing", "by-hand/../artifacts/plain"):
        with pytest.raises(UserError, match=rf"{name}: is not one of the results here, which are .*by-hand/plain"):
            require_lineage(local_lineage(checkout, name), name, checkout)
    shutil.copytree(checkout / "scratch" / "plain", checkout / "artifacts" / "plain")
    result = checkout / "artifacts" / "plain" / "quantize.json"
    result.write_text(result.read_text().replace('"ok"', '"unsupported"'))
    try:
        ours, theirs = (local_lineage(checkout, name) for name in ("plain", "by-hand/plain"))
        assert str(first_difference(ours, theirs)) == "quantize, result status: unsupported | ok"
    finally:
        shutil.rmtree(checkout / "artifacts")


def test_an_output_that_was_replaced_since_breaks_the_chain(plain):
    assert plain.broken() == []
    for name in ("calibrate", "calibrate/model.safetensors"):
        asked = altered(plain, "quantize", lambda r, name=name: r["inputs"].update({name: "0"}))
        assert asked.broken() == [
            "quantize was made from another output of calibrate than the current one; run: python -m stages.quantize "
            "method=gptq"
        ]
    right = plain.results["calibrate"]["outputs"]["model.safetensors"]
    same = altered(plain, "quantize", lambda r: r["inputs"].update({"calibrate/model.safetensors": right}))
    assert same.broken() == []


def test_what_a_run_took_from_another_by_one_file_is_found_unless_runs_of_other_options_have_the_same(checkout, plain):
    folder = checkout / "scratch" / "later"
    taken = {name: result["outputs"]["model.safetensors"] for name, result in plain.results.items()}
    shutil.copytree(checkout / "scratch" / "plain", checkout / "scratch" / "source")
    (checkout / "scratch" / "source" / "quantize.json").rename(checkout / "scratch" / "source" / "serve_smoke.json")
    smoke = json.loads((checkout / "scratch" / "source" / "serve_smoke.json").read_text())
    smoke["outputs"]["verdict.json"] = "v"
    (checkout / "scratch" / "source" / "serve_smoke.json").write_text(json.dumps(smoke))
    folder.mkdir()
    inputs = {"calibrate/model.safetensors": taken["calibrate"], "serve_smoke/verdict.json": "v"}
    (folder / "tasks.json").write_text(json.dumps({"stage": "tasks", "inputs": inputs}))
    try:
        found = local_lineage(checkout, "by-hand/later")
        assert list(found.results) == ["calibrate", "tasks"]
    finally:
        for name in ("later", "source"):
            shutil.rmtree(checkout / "scratch" / name)
