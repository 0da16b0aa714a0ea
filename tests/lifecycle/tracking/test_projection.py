from __future__ import annotations

from typing import Any

from quantline.lifecycle.tracking.projection import flatten, variant_metrics


def test_later_compared_stage_keeps_a_name_and_other_stages_are_prefixed() -> None:
    results: list[dict[str, Any]] = [
        {"stage": "download", "metrics": {"files": 7}},
        {"stage": "quantize", "metrics": {"size_bytes": 1, "seconds": 5}, "timings": {"total_seconds": 6.0}},
        {"stage": "evaluate", "metrics": {"size_bytes": 2, "note": "x"}, "peak_memory_bytes": 9},
    ]
    assert variant_metrics(results) == {
        "download/files": 7, "quantize/size_bytes": 1, "seconds": 5, "size_bytes": 2, "seconds/quantize": 6,
        "peak_memory_bytes/evaluate": 9,
    }  # fmt: skip


def test_long_parameter_is_cut_with_the_hash_of_the_whole() -> None:
    flat = flatten({"a": {"b+c": [1, None, "x"], "d": None, "e": True}, "long": "y" * 9000})
    assert flat["a.b_c"] == '[1, null, "x"]'
    assert (flat["a.d"], flat["a.e"]) == ("null", "true")
    assert len(flat["long"]) == 6000
    assert "sha256" in flat["long"]
