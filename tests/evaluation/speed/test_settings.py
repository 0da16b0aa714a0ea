from __future__ import annotations

from typing import Any

from quantline.evaluation.speed.settings import AFTER, BEFORE, relabelled, render


def row(model: str, speed: float, itl: float) -> dict[str, Any]:
    return {"model": model, "concurrency": 8, "output_tokens_per_second": speed, "ttft_ms_median": 30.0,
            "itl_ms_median": itl, "latency_ms_median": 300.0}  # fmt: skip


DOCUMENT = {
    "session": {}, "rounds": [], "offline": [],
    "rows": [row("variant", 50.0, 20.0), row("float", 100.0, 10.0)],
    "servers": [{"model": "float", "peak_memory_bytes": 9e9, "gpu_memory_bytes": 8e9},
                {"model": "variant", "peak_memory_bytes": 12e9, "gpu_memory_bytes": 5e9}],
    "ratios": [{"concurrency": 8, "speed_up": 0.5, "low": 0.45, "high": 0.55, "slower_than_float": True}],
}  # fmt: skip


def test_one_checkpoint_is_told_by_its_settings_and_not_as_float_and_variant():
    found = relabelled(DOCUMENT)
    assert {one["model"] for name in ("rows", "servers") for one in found[name]} == {BEFORE, AFTER}
    assert found["ratios"] == [{"concurrency": 8, "speed_up": 0.5, "low": 0.45, "high": 0.55, "changed_slower": True}]


def test_a_row_has_what_the_change_costs_and_saves():
    header, before, after = render(relabelled(DOCUMENT)).splitlines()
    assert header.split() == ["at", "a", "time", "served", "memory", "first", "token", "between", "request", "tokens/s"]
    assert before.split() == ["8", "as", "it", "is", "8.00", "GB", "30.0", "ms", "10.0", "ms", "300", "ms", "100"]
    assert "5.00 GB" in after
    assert after.endswith("0.50x as fast [0.45, 0.55], 3.00 GB less")
    assert render({**relabelled(DOCUMENT), "rows": []}) == ""
