from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from quantline.config.fleet import HealthConfig
from quantline.serving.fleet.gauge import (
    ALARM,
    DEGRADED,
    DOWN,
    DRAINING,
    HEALTHY,
    KV_CACHE,
    MEMORY,
    STUCK,
    UNHEALTHY,
    GaugeProcess,
    Seen,
    Watch,
    read_metrics,
)
from quantline.serving.fleet.spec import Fleet, Variant
from quantline.serving.ports import free_port

HOW = HealthConfig(kv_cache_high=0.9, kv_cache_low=0.7, memory_high=0.95, memory_low=0.9, looks=3, stuck_seconds=30)
NOTHING = frozenset()


def looked(watch, *values, memory=None, notes=NOTHING, start=0.0):
    """The levels after looks at these shares of the KV cache, one a second."""
    levels = []
    for second, value in enumerate(values):
        watch.look(Seen(True, kv_cache=value), memory, notes, HOW, start + second)
        levels.append(watch.level)
    return levels


def test_a_full_cache_degrades_after_three_looks_and_only_a_low_one_for_three_ends_it():
    watch = Watch()
    assert looked(watch, 0.95, 0.95, 0.95) == [HEALTHY, HEALTHY, DEGRADED]
    assert watch.reasons == (KV_CACHE,)
    assert looked(watch, 0.8, 0.8, 0.8, 0.8) == [DEGRADED] * 4  # between the limits nothing changes
    assert looked(watch, 0.6, 0.6, 0.6) == [DEGRADED, DEGRADED, HEALTHY]


def test_a_variant_does_not_swing_with_looks_that_do_not_agree():
    assert looked(Watch(), *[0.95, 0.95, 0.1] * 5) == [HEALTHY] * 15


def test_a_server_that_is_down_is_unhealthy_at_once_and_healthy_again_at_once():
    watch = Watch()
    watch.look(Seen(False), None, NOTHING, HOW, 0)
    assert (watch.level, watch.reasons) == (UNHEALTHY, (DOWN,))
    watch.look(Seen(True, kv_cache=0.1), None, NOTHING, HOW, 1)
    assert (watch.level, watch.reasons) == (HEALTHY, ())


def test_memory_draining_and_alarms_degrade():
    watch = Watch()
    assert looked(watch, 0.1, 0.1, 0.1, memory=0.97)[-1] == DEGRADED
    assert watch.reasons == (MEMORY,)
    assert looked(Watch(), 0.1, notes=frozenset({DRAINING})) == [DEGRADED]
    assert looked(Watch(), 0.1, notes=frozenset({ALARM})) == [DEGRADED]


def test_requests_that_run_without_a_token_make_it_unhealthy_until_one_comes():
    watch = Watch()
    levels = []
    for second in range(0, 61, 10):
        watch.look(Seen(True, running=2, tokens=100), None, NOTHING, HOW, second)
        levels.append(watch.level)
    assert levels == [HEALTHY] * 3 + [UNHEALTHY] * 4
    assert watch.reasons == (STUCK,)
    watch.look(Seen(True, running=2, tokens=101), None, NOTHING, HOW, 61)
    assert watch.level == HEALTHY
    for second in (70, 200):  # an idle server makes no token
        watch.look(Seen(True, running=0, tokens=101), None, NOTHING, HOW, second)
        assert watch.level == HEALTHY


def test_metrics_are_summed_over_their_labels():
    text = '# HELP x\nvllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_running{engine="1"} 1.0\nother 7\n'
    assert read_metrics(text) == {"vllm:num_requests_running": 3.0}


def test_what_is_scraped_is_whole_while_the_next_look_is_counted(tmp_path):
    variant = Variant(name="w4", port=free_port("127.0.0.1"))
    (tmp_path / "fleet.json").write_text(
        Fleet(folder=str(tmp_path), variants=(variant,), precisions={"low": ("w4",)}).model_dump_json()
    )
    gauge = GaugeProcess(tmp_path)
    with httpx.Client(trust_env=False) as client, ThreadPoolExecutor(1) as pool:
        gauge.look(client, pool)
    for one in gauge._gauges.values():  # as a look begins
        one.clear()
    assert b'quantline_variant_state{variant="w4"} 2.0' in gauge.answer("/metrics")[2]


@pytest.mark.toolchain("router")
def test_a_full_cache_moves_the_traffic_to_the_next_variant_and_back(tmp_path):
    import fake_fleet

    from quantline.serving.fleet.child import wait_until
    from quantline.serving.fleet.load import Load, run

    quick = HealthConfig(interval_seconds=0.2, looks=2, stuck_seconds=1.0)
    with fake_fleet.up(tmp_path, health=quick) as running:
        answered = lambda: run(Load(running.fleet.url, "low", 5)).variants  # noqa: E731
        fake_fleet.order(running)("w4", "full_cache")
        assert wait_until(lambda: answered() == {"w8": 5}, 10)
        assert run(Load(running.fleet.url, "low", 5)).reasons == {"passed over": 5}
        fake_fleet.order(running)("w4", "")
        assert wait_until(lambda: answered() == {"w4": 5}, 10)
        (tmp_path / "state" / "alarms.json").write_text(json.dumps({"w4": "the verdict of its canary"}))
        assert wait_until(lambda: answered() == {"w8": 5}, 10)
