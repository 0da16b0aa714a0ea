from __future__ import annotations

from typing import Any

from quantline.evaluation.speed import trust

ROW = {"model": "variant", "concurrency": 8, "itl_ms_median": 2.2, "itl_ms_p99": 4.0, "tpot_ms_median": 2.4,
       "ttft_ms_median": 9.0, "ttft_ms_p99": 12.0, "output_tokens_per_second": 70.0}  # fmt: skip
SERVER = {"model": "variant", "weights_memory_bytes": 4.0e9, "checkpoint_bytes": 3.8e9}


def document(**changes: Any) -> dict[str, Any]:
    session = {"cores_in_use": 0.4, "threads": 2}
    return {"session": session, "rows": [ROW], "servers": [SERVER], "ratios": [{"concurrency": 8}], **changes}


def test_of_a_sound_session_nothing_is_left_out():
    assert trust.trusted(document()) == (document(), [])
    assert trust.notes(document()) == []
    assert trust.trusted({}) == ({"rows": []}, [])


def test_speeds_of_a_busy_machine_are_left_out_and_their_ratios_stay():
    busy = document(session={"cores_in_use": 1.26, "threads": 2})
    kept, why = trust.trusted(busy)
    assert (kept["rows"], kept["ratios"]) == ([], busy["ratios"])
    assert why == ["tokens/s and times, since other programs used the machine"]
    (note,) = trust.notes(busy)
    assert note.startswith("other programs kept 1.3 of the 2 cores busy when the measurement began, so tokens/s")
    assert "the ratios to the float model hold" in note


def test_speeds_of_float_weights_are_not_the_variants():
    kept, (why,) = trust.trusted(document(servers=[{**SERVER, "weights_memory_bytes": 13.5e9}]))
    assert (kept["rows"], kept["ratios"]) == ([], [])
    assert "did not load the quantized weights" in why


def test_times_of_tokens_in_bunches_are_left_out_and_the_throughput_stays():
    kept, why = trust.trusted(document(rows=[{**ROW, "itl_ms_median": 0.0024}]))
    assert kept["rows"][0] == {**ROW, **dict.fromkeys(
        ("itl_ms_median", "itl_ms_p99", "ttft_ms_median", "ttft_ms_p99")
    )}  # fmt: skip
    assert why == ["times of tokens that arrived in bunches"]


def test_a_server_that_holds_more_weights_than_its_checkpoint_is_told_of():
    server = {"model": "variant", "weights_memory_bytes": 3.9e9, "checkpoint_bytes": 3.8e9}
    assert trust.memory_notes([server]) == []
    (note,) = trust.memory_notes([server, {**server, "weights_memory_bytes": 13.5e9}])
    assert "holds 13.50 GB of weights, the checkpoint has 3.80 GB" in note


def test_tokens_that_arrive_in_bunches_are_told_of():
    row = {"model": "variant", "concurrency": 8, "itl_ms_median": 2.2, "tpot_ms_median": 2.4}
    assert trust.bunch_notes([row]) == []
    (note,) = trust.bunch_notes([row, {**row, "itl_ms_median": 0.0024}])
    assert "variant, 8 at a time: tokens arrived in bunches, half of them within 0.0024 ms" in note
