from __future__ import annotations

import fake_fleet
import pytest

from quantline.core.errors import UserError
from quantline.lifecycle.chat import names_of, partners
from quantline.lifecycle.serve import Typed
from quantline.serving.chat import Conversation, Sampling


def test_names_are_read_as_they_are_typed():
    assert names_of("a") == ["a"]
    assert names_of("[a, b]") == ["a", "b"]
    for wrong in (None, "", "a,a"):
        with pytest.raises(UserError, match="give one name, or several different ones"):
            names_of(wrong)


@pytest.mark.toolchain("router")
def test_a_running_fleet_that_has_the_variants_is_asked(composed, tmp_path):
    typed = Typed(composed(), [])
    folder = tmp_path / "scratch" / ".fleet" / "fleet"
    with fake_fleet.up(tmp_path / "fakes", folder=str(folder)) as running:
        with partners(tmp_path, typed, ["low", "float"], None, None) as found:
            assert {partner.url for partner in found} == {running.fleet.url}
            said = Conversation(found[0], Sampling(max_tokens=1)).ask("hello")
        assert (said.variant, said.text) == ("w4", "w4 w0")
        with pytest.raises(UserError, match=r"params\.yaml"), partners(tmp_path, typed, ["low", "w5"], None, None):
            pass
    with partners(tmp_path, typed, ["x"], "http://127.0.0.1:1/v1", "sk-secret") as found:
        assert (found[0].url, found[0].headers) == ("http://127.0.0.1:1", {"authorization": "Bearer sk-secret"})
