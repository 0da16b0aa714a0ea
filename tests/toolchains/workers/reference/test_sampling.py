"""Drawing tokens: by the model's own distribution, and whatever the batches are."""

from __future__ import annotations

import pytest

from quantline.checkpoints.safetensors_file import SafetensorsFile
from quantline.core.errors import UserError
from quantline.toolchains import runner
from quantline.toolchains.environments import ensure
from quantline.toolchains.workers.reference.sampling import uniforms

pytestmark = pytest.mark.toolchain("reference")
MODULE = "quantline.toolchains.workers.reference.sampling"


@pytest.fixture(scope="module")
def draw(root, tmp_path_factory):
    toolchain, folder = ensure(root, "reference", platform="cpu"), tmp_path_factory.mktemp("drawn")

    def texts(starts, **values):
        job = {
            "checkpoint": str(root / "assets/demo/model"), "starts": starts, "length": 20, "seed": 0, "temperature": 1.0,
            "output": str(folder / "texts.safetensors"), "device": "cpu", "threads": 1, **values,
        }  # fmt: skip
        runner.run_worker(toolchain, MODULE, job, log=folder / "log", threads=1, label="draw")
        return SafetensorsFile.open(folder / "texts.safetensors").read("input_ids")

    return texts


def test_random_numbers_depend_on_seed_and_text_alone():
    assert (uniforms(0, 3, 8)[:4] == uniforms(0, 3, 4)).all()
    assert (uniforms(0, 3, 8) != uniforms(0, 4, 8)).all()
    assert (uniforms(0, 3, 8) != uniforms(1, 3, 8)).all()


def test_a_text_is_the_same_in_any_batch_and_a_low_temperature_is_greedy(draw):
    starts = [[5, 9], [5, 9, 7], [5, 9], [5, 9, 7]]
    texts = draw(starts)
    assert [list(text[: len(start)]) for text, start in zip(texts, starts, strict=True)] == starts
    assert (texts[:1] == draw(starts[:1])).all()
    assert (texts[0] != texts[2]).any()
    cold = draw([[5, 9], [5, 9]], temperature=0.01, seed=3)
    assert (cold[0] == cold[1]).mean() > 0.9


def test_a_start_that_leaves_no_room_is_refused(draw):
    with pytest.raises(UserError, match="starts with 20 tokens"):
        draw([[1] * 20])
