from __future__ import annotations

from threading import Thread

import fake_fleet
import pytest

from quantline.core.errors import UserError
from quantline.lifecycle import fleet_commands as commands
from quantline.lifecycle.serve import Typed
from quantline.serving.fleet.load import Load, run

NOTHING = {"variant": None, "precision": None, "share": None, "undo": "false", "watch": "false"}


@pytest.fixture(scope="module")
def typed(composed):
    return Typed(composed(), [])


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    """A running fleet of fakes in the place of the project's own, and the project."""
    root = tmp_path_factory.mktemp("project")
    with fake_fleet.up(root / "fakes", folder=str(root / "scratch" / ".fleet" / "fleet")) as running:
        keeper = Thread(target=running.stay)
        keeper.start()
        yield root, running
        running.should_end = True
        keeper.join()


def asked(**given):
    return {**NOTHING, **given}


@pytest.mark.toolchain("router")
def test_a_canary_is_moved_and_ended_and_a_variant_drained_and_given_back(up, typed, capsys):
    root, running = up

    def answered():
        return dict(run(Load(running.fleet.url, "low", 30)).variants)

    commands.canary(root, typed, asked(precision="low", variant="float", share="1"))
    assert answered() == {"float": 30}
    commands.canary(root, typed, asked(share="0"))
    assert answered() == {"w4": 30}
    commands.drain(root, typed, asked(variant="w4"))
    assert running.fleet.draining == ("w4",)
    commands.drain(root, typed, asked(variant="w4", undo="true"))
    assert running.fleet.draining == ()
    told = capsys.readouterr().out
    assert "1 of low goes to float first\nthe canary has ended\ndrained: w4\ndrained: none\n" in told


@pytest.mark.toolchain("router")
def test_the_status_shows_variants_precisions_and_memory(up, typed, capsys):
    root, running = up
    run(Load(running.fleet.url, "low", 3))
    commands.status(root, typed, watch=False)
    told = capsys.readouterr().out
    for words in (running.fleet.url, "w4 -> w8 -> float", "retries", "memory: host "):
        assert words in told
    assert [line.split()[0] for line in told.splitlines() if line.startswith(("float ", "w8 ", "w4 "))] == [
        "float", "w8", "w4"
    ]  # fmt: skip


@pytest.mark.toolchain("router")
@pytest.mark.parametrize(
    ("action", "given", "words"),
    [
        (commands.canary, {"share": "2"}, "share=2: give the part"), (commands.canary, {}, "share=None"),
        (commands.canary, {"variant": "w9", "precision": "low", "share": "0.1"}, "fleet.canary.variant=w9"),
        (commands.drain, {"variant": "w9"}, "variant=w9: give one of"),
    ],
)  # fmt: skip
def test_an_order_that_makes_no_sense_is_refused_and_changes_nothing(up, typed, action, given, words):
    root, running = up
    before = running.fleet
    with pytest.raises(UserError, match=words):
        action(root, typed, asked(**given))
    assert running.fleet == before


def test_where_no_fleet_runs_every_action_says_so(tmp_path, typed):
    for action in (commands.canary, commands.drain):
        with pytest.raises(UserError, match="no fleet runs"):
            action(tmp_path, typed, asked(share="0"))
    with pytest.raises(UserError, match=r"start one: python -m stages\.fleet up"):
        commands.down(tmp_path, typed)
    with pytest.raises(UserError, match="no fleet runs"):
        commands.status(tmp_path, typed, watch=False)
    with pytest.raises(UserError, match="no fleet runs"):
        commands.reload(tmp_path, typed)


def test_options_that_an_action_does_not_read_are_refused(typed):
    with pytest.raises(UserError, match="share: `fleet down` does not read it"):
        commands.refuse_unused("down", asked(share="0.1"), typed)
    with pytest.raises(UserError, match="only `fleet up`, `reload` and `export`"):
        commands.refuse_unused("drain", asked(variant="w4"), Typed({}, ["fleet.gates=false"]))
    commands.refuse_unused("drain", asked(variant="w4"), Typed({}, ["fleet.name=b"]))
