from __future__ import annotations

from quantline.toolchains.workers.reference.progress import Parts


def test_parts_of_different_size_are_one_way_from_beginning_to_end():
    seen = []
    parts = Parts(lambda done, total, label: seen.append((done, total, label)), {"score": 900, "layers": 40})
    for done in (450, 900):
        parts.of("score", "scoring")(done, 900, "tokens")
    parts.of("layers", "errors")(7, 7, "model.layers.0.mlp.up_proj")
    assert [done for done, *_ in seen] == [450, 900, 940]
    assert {total for _, total, _ in seen} == {940}
    assert seen[2][2] == "errors"


def test_a_part_without_steps_is_no_division_by_zero():
    seen = []
    Parts(lambda *step: seen.append(step), {"score": 0}).of("score", "scoring")(0, 0)
    assert seen == [(0, 1, "scoring")]
