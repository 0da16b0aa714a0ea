"""What a fleet's servers are started with."""

from __future__ import annotations

from dataclasses import fields

import sections

from quantline.serving.command import ServerOptions, flags_of
from quantline.serving.fleet.servers import Start


def start(**changes):
    given = {
        "names": ("w4", "low"),
        "python": "python",
        "folder": "w4",
        "log": "",
        "process": sections.server().process,
    }
    return Start(**{**given, **changes})


def test_no_option_of_a_server_is_lost_in_a_fleet():
    assert {one.name for one in fields(ServerOptions)} - {"name"} <= set(Start.model_fields)
    flags = flags_of(start(kv_cache_dtype="fp8", trust_remote_code=True, max_model_len=64, dtype="float16").options())
    alone = ServerOptions(
        sections.server().process, kv_cache_dtype="fp8", trust_remote_code=True, max_model_len=64, dtype="float16"
    )
    assert flags[: len(flags_of(alone))] == flags_of(alone)
    assert flags[flags.index("--kv-cache-dtype") + 1] == "fp8"


def test_a_server_answers_to_all_its_names_and_refuses_what_its_queue_does_not_hold():
    flags = flags_of(start(queued_requests=4).options())
    assert flags[-5:] == ["--served-model-name", "w4", "low", "--max-num-queued-reqs", "4"]
