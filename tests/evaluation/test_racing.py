"""Shares of documents: nested, each document scored once, found again after a stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sections

from quantline.checkpoints.safetensors_file import SafetensorsFile, write_safetensors
from quantline.data.windows import Windows
from quantline.evaluation.racing import Engine, Race, compared
from quantline.toolchains.protocol import JobResult

SHARES = (0.25, 0.5, 1.0)


def windows(documents=40):
    random = np.random.default_rng(0)
    lengths = random.integers(4, 9, documents)
    return Windows(
        random.integers(0, 99, lengths.sum(), dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.arange(documents, dtype=np.int32), np.ones(documents, np.int32), tuple(map(str, range(documents))), {},
    )  # fmt: skip


@pytest.fixture
def race(tmp_path):
    """A race whose engine gives -id/100 for each token, and notes what it was asked for."""
    asked = []

    def worker(toolchain, module, job, label):
        ids = SafetensorsFile.open(Path(job["windows"])).read("input_ids")
        asked.append((job["checkpoint"], len(ids)))
        logprobs = -ids.astype(np.float32) / 100
        write_safetensors(Path(job["output"]), {"logprobs": logprobs, "top1": ids})
        return JobResult({}, 1.0, 0)

    def make():
        return Race(windows(), SHARES, Engine(worker, "cpu", 1, 64), tmp_path / "kept")

    return make, asked


def test_shares_are_nested_and_each_document_is_scored_once(race):
    make, asked = race
    one = make()
    assert [len(share) for share in one.shares] == [10, 20, 40]
    assert set(one.shares[0]) < set(one.shares[1]) < set(one.shares[2])
    sums = [one.sums("a", lambda: Path("a"), share) for share in range(3)]
    whole = windows()
    assert sum(count for _, count in asked) == len(whole.input_ids)
    nll, tokens = sums[2]
    for number in range(40):
        ids = whole.input_ids[whole.offsets[number] : whole.offsets[number + 1]][1:]
        assert (nll[number], tokens[number]) == (pytest.approx(ids.sum() / 100, rel=1e-6), len(ids))
    for share in range(2):
        assert (sums[share][0] == nll[one.shares[share]]).all()


def test_what_was_scored_is_found_again_and_nothing_is_made_for_it(race):
    make, asked = race
    first = make().sums("a", lambda: Path("a"), 1)
    before = len(asked)
    again = make()

    def never():
        raise AssertionError("made again")

    assert (again.sums("a", never, 1)[0] == first[0]).all()
    assert (again.scored, len(asked)) == (0, before)
    again.sums("b", lambda: Path("b"), 0)
    assert again.scored == 1
    assert asked[-1][0] == "b"


def test_the_same_scores_lose_nothing(race):
    make, _ = race
    sums = make().sums("a", lambda: Path("a"), 2)
    same = compared(sums, sums, sections.bootstrap(resamples=200))
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    worse = compared((sums[0] + 0.1 * sums[1], sums[1]), sums, sections.bootstrap(resamples=200))
    assert worse.estimate == pytest.approx(np.expm1(0.1))


def test_the_divergence_is_measured_on_the_smallest_share_beside_the_float_model(tmp_path):
    jobs = []

    def worker(toolchain, module, job, label):
        jobs.append(job)
        ids = SafetensorsFile.open(Path(job["windows"])).read("input_ids")
        scores = {"logprobs": -ids.astype(np.float32) / 100, "top1": ids}
        if "baseline" in job:
            scores["kl"] = np.full(len(ids), 0.25, np.float32)
        write_safetensors(Path(job["output"]), scores)
        return JobResult({}, 1.0, 0)

    def race():
        return Race(windows(), SHARES, Engine(worker, "cpu", 1, 64), tmp_path / "kept", Path("float"))

    first = race()
    first.sums("a", lambda: Path("a"), 2)
    assert [job.get("baseline") for job in jobs] == ["float", None, None]
    assert race().divergence("a", lambda: Path("never")) == pytest.approx(0.25)
    first.sums("float", lambda: Path("float"), 0)
    assert "baseline" not in jobs[-1], "the float model beside itself"
    assert first.divergence("float", lambda: Path("float")) is None
