from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from quantline.serving.ports import require_free


@pytest.mark.parametrize(
    ("host", "port"), [("203.0.113.7", 8000), ("no-such-host.invalid", 8000), ("127.0.0.1", 70000)]
)
def test_an_address_that_is_not_ours_is_a_user_error(host, port):
    with pytest.raises(UserError, match="cannot listen there"):
        require_free(host, port)
