from __future__ import annotations

from pathlib import Path

import pytest

from quantline.core.errors import UserError
from quantline.serving.ports import free_port, require_free


@pytest.mark.parametrize(
    ("host", "port"), [("203.0.113.7", 8000), ("no-such-host.invalid", 8000), ("127.0.0.1", 70000)]
)
def test_an_address_that_is_not_ours_is_a_user_error(host, port):
    with pytest.raises(UserError, match="cannot listen there"):
        require_free(host, port, "take another")


def test_a_free_port_is_none_that_a_connection_gets_while_the_server_loads():
    low, high = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    found = [free_port("127.0.0.1") for _ in range(20)]
    assert len(set(found)) > 10
    assert not [port for port in found if max(low, 32_768) <= port <= high]
    with pytest.raises(UserError, match="cannot listen there"):
        free_port("203.0.113.7")
