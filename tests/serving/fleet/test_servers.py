"""What a fleet's servers are started with."""

from __future__ import annotations

import sections

from quantline.serving.command import ServerOptions, flags_of
from quantline.serving.fleet.servers import Start


def start(server=None, **changes):
    server = server or ServerOptions(sections.server().process)
    return Start(names=("w4", "low"), python="python", folder="w4", log="", server=server, **changes)


def test_no_option_of_a_server_is_lost_in_a_fleet_nor_where_a_running_one_is_told_of_it():
    alone = ServerOptions(
        sections.server(max_num_seqs=3).process, kv_cache_dtype="fp8", trust_remote_code=True, max_model_len=64,
        dtype="float16", environment={"A": "b"}, text_only=True, proven=None,
    )  # fmt: skip
    told = Start.model_validate_json(start(alone).model_dump_json())
    assert told == start(alone)
    flags = flags_of(told.options())
    assert flags[: len(flags_of(alone))] == flags_of(alone)
    assert flags[flags.index("--kv-cache-dtype") + 1] == "fp8"


def test_a_server_answers_to_all_its_names_and_refuses_what_its_queue_does_not_hold():
    flags = flags_of(start(queued_requests=4).options())
    assert flags[-5:] == ["--served-model-name", "w4", "low", "--max-num-queued-reqs", "4"]
