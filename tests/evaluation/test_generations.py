from __future__ import annotations

import numpy as np
import pytest
import sections
from sections import protocol

from quantline.checkpoints import model_parts
from quantline.checkpoints.checkpoint import write_safetensors
from quantline.core.errors import UserError
from quantline.core.files import write_json
from quantline.data.windows import cut_documents
from quantline.evaluation.generations import (
    Prompts,
    choose_prompts,
    compare_generations,
    load_generations,
    served_prompts,
)

WINDOWS = cut_documents(
    [(f"d{number}", [10 * number + place for place in range(9 if number != 2 else 3)]) for number in range(6)],
    protocol(window=4, stride=4), [],
)  # fmt: skip


def made(*rows):
    return {"tokens": [row[0] for row in rows], "margins": [row[1] for row in rows]}


def test_prompts_are_beginnings_of_documents_that_are_long_enough_spread_over_the_text():
    assert choose_prompts(WINDOWS, 2, 4) == Prompts(("d0", "d5"), ((0, 1, 2, 3), (50, 51, 52, 53)))
    every = choose_prompts(WINDOWS, 100, 4)
    assert every.documents == ("d0", "d1", "d3", "d4", "d5")
    assert choose_prompts(WINDOWS, 3, 5).tokens == choose_prompts(WINDOWS, 0, 4).tokens == ()


def test_the_server_continues_the_prompts_of_a_model_that_the_engine_does_not_keep_alone(tmp_path, monkeypatch):
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    write_safetensors(tmp_path / "model.safetensors", {"model.norm.weight": np.zeros(64, np.float32)})
    asked = sections.generations(prompts=2, prompt_tokens=4)
    assert served_prompts(tmp_path, WINDOWS, asked).tokens == ()
    monkeypatch.setattr(model_parts, "KEEP_BYTES", 64 * 4 - 1)
    assert served_prompts(tmp_path, WINDOWS, asked) == choose_prompts(WINDOWS, 2, 4)


def test_a_model_never_leaves_its_own_continuations():
    own = made(([1, 2, 3], [0.0, 0.0, 0.0]))
    found = compare_generations(["a"], own, own, 0.1)
    assert (found["identical"], found["first_divergence_median"], found["ties"]) == (1.0, 3, 0)
    assert found["rows"][0]["first_divergence"] is None


def test_the_first_token_that_differs_counts_and_what_comes_after_does_not():
    floats = made(([1, 2, 3], [1.0] * 3), ([1, 2, 3], [1.0] * 3), ([1, 2, 3], [1.0] * 3))
    own = made(([1, 9, 3], [1.0] * 3), ([1, 2, 3], [1.0] * 3), ([9, 9, 9], [1.0] * 3))
    found = compare_generations(["a", "b", "c"], own, floats, 0.1)
    assert [row["first_divergence"] for row in found["rows"]] == [1, None, 0]
    assert (found["identical"], found["first_divergence_median"]) == (pytest.approx(1 / 3), 1)


@pytest.mark.parametrize(("float_margin", "margin"), [(0.05, 1.0), (1.0, 0.05)])
def test_where_either_model_was_undecided_nothing_is_said(float_margin, margin):
    floats, own = made(([1, 2], [float_margin, 1.0])), made(([3, 2], [margin, 1.0]))
    found = compare_generations(["a"], own, floats, 0.1)
    assert (found["ties"], found["identical"], found["first_divergence_median"]) == (1, None, None)
    assert compare_generations(["a"], own, floats, 0.01)["first_divergence_median"] == 0


def test_continuations_of_other_prompts_are_refused(tmp_path):
    prompts = Prompts(("a",), ((1, 2),))
    with pytest.raises(UserError, match="evaluate the float model again"):
        load_generations(tmp_path, prompts)
    write_json(tmp_path / "generations.json", {"prompts": [[1, 2]], **made(([5], [1.0]))})
    assert load_generations(tmp_path, prompts)["tokens"] == [[5]]
    with pytest.raises(UserError, match="no continuations of these prompts"):
        load_generations(tmp_path, Prompts(("a",), ((1, 3),)))
