from __future__ import annotations

import pytest

from quantline.core import progress


def test_where_nobody_watches_a_line_now_and_then_tells_the_time_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.bar("quantize") as shown:
        for done in range(1, 11):
            clock[0] = 20.0 * done
            shown.update(done, 10, f"layer {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "quantize: 20 % after 40 s, 2 min 40 s left  layer 2"
    assert len(lines) == 4


def test_a_limit_is_not_told_as_work_that_is_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.bar("loading", milestones=False) as shown:
        clock[0] = 60.0
        shown.update(60, 600, "seconds")
    assert "left" not in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (65, "1 min 5 s"), (7260, "2 h 1 min")])
def test_times_are_told_in_two_units_at_most(seconds, text):
    assert progress._time(seconds) == text
