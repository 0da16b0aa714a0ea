from __future__ import annotations

from dataclasses import replace
from threading import Thread

import fake_fleet
import pytest

from quantline.config.fleet import ShareConfig
from quantline.core.errors import UserError
from quantline.lifecycle import fleet_commands as commands
from quantline.lifecycle.fleet import Resolved
from quantline.lifecycle.serve import Typed
from quantline.serving.fleet.child import wait_until
from quantline.serving.fleet.load import Load, run
from quantline.serving.fleet.spec import Fleet, Variant
from quantline.serving.ports import free_port

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
    # The router's next check of the variant finds it ready again.
    assert wait_until(lambda: answered() == {"w4": 30}, 10)
    told = capsys.readouterr().out
    assert "1 of low goes to float first\nthe canary has ended\ndrained: w4\ndrained: none\n" in told


@pytest.mark.toolchain("router")
def test_a_reload_adds_and_removes_variants_and_no_request_is_lost(up, typed, capsys, monkeypatch):
    root, running = up
    before = running.fleet
    overrides = root / "scratch" / ".fleet" / "fleet" / "overrides.json"
    overrides.write_text('{"overrides": ["fleet.limits.hang_seconds=2"]}')
    start = running.keepers["w4"].start
    port = free_port("127.0.0.1")
    fresh = start.model_copy(
        update={
            "names": ("w2", *start.names[1:]),
            "server": replace(start.server, process=start.server.process.model_copy(update={"port": port})),
        }
    )
    variants = (*[one for one in before.variants if one.name != "w8"], Variant(name="w2", port=port))
    chains = {"high": ("float",), "medium": ("float",), "low": ("w2", "w4", "float")}

    def resolved(_root, asked, _vllm, _device, former):
        assert list(asked.overrides) == ["fleet.limits.hang_seconds=2", "++fleet.gates=false"]
        made = former.model_copy(update={"variants": variants, "precisions": chains})
        return Resolved(made, (*[keeper.start for keeper in running.keepers.values()], fresh), ())

    monkeypatch.setattr(commands, "resolve", resolved)
    monkeypatch.setattr(commands, "server_of", lambda run: None)
    monkeypatch.setattr(commands, "compose_values", lambda conf, given: typed.values)
    change = lambda: commands.reload(root, Typed(typed.values, ["++fleet.gates=false"]))  # noqa: E731
    outcome = run(Load(before.url, "low", 300, 4, streamed=0.5), change)
    assert (outcome.lost, outcome.broken, outcome.quiet) == (0, 0, 0)
    assert set(outcome.variants) >= {"w4", "w2"}
    assert dict(run(Load(before.url, "low", 5)).variants) == {"w2": 5}
    assert wait_until(lambda: "w8" not in running.keepers and not running._leaving, 10)
    assert "w2 -> w4 -> float" in capsys.readouterr().out


@pytest.mark.toolchain("router")
def test_the_status_shows_variants_precisions_and_memory(up, typed, capsys):
    root, running = up
    run(Load(running.fleet.url, "low", 3))
    commands.status(root, typed, watch=False)
    told = capsys.readouterr().out
    for words in (running.fleet.url, "w4 -> float", "retries", "memory: host "):
        assert words in told
    assert {line.split(" ")[0] for line in told.splitlines()} >= {variant.name for variant in running.fleet.variants}


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


@pytest.mark.toolchain("router")
def test_of_two_changes_of_the_same_fleet_at_the_same_time_the_second_is_refused(up):
    _, running = up
    former, folder = running.fleet, running.folder
    commands._give(folder, former.model_copy(update={"draining": ("w4",)}), former)
    with pytest.raises(UserError, match="another command changed the fleet meanwhile"):
        commands._give(folder, former.model_copy(update={"draining": ("float",)}), former)
    assert running.fleet.draining == ("w4",)
    commands._give(folder, former, running.fleet)


def test_a_reload_keeps_what_was_drained_and_the_canary_unless_it_says_otherwise():
    variants = tuple(Variant(name=name, port=port) for name, port in (("a", 1), ("b", 2), ("c", 3)))
    canary = ShareConfig(precision="low", variant="b", share=0.1)
    plain = Fleet(folder="x", variants=variants, precisions={"low": ("a", "b")})
    former = plain.model_copy(update={"draining": ("b", "c"), "canary": canary})
    kept = commands.as_ordered(former, plain, ["++fleet.gates=false"])
    assert (kept.draining, kept.canary) == (("b", "c"), canary)
    other = plain.model_copy(update={"canary": ShareConfig(precision="low", variant="c", share=0.5)})
    assert commands.as_ordered(former, other, ["++fleet.canary.share=0.5"]).canary == other.canary
    without = Fleet(folder="x", variants=variants[:1], precisions={"low": ("a",)})
    assert commands.as_ordered(former, without, []).draining == ()
    assert commands.as_ordered(former, without, []).canary == ShareConfig()


def test_where_no_fleet_runs_every_action_says_so(tmp_path, typed):
    for action in (commands.canary, commands.drain):
        with pytest.raises(UserError, match="no fleet runs"):
            action(tmp_path, typed, asked(share="0"))
    with pytest.raises(UserError, match=r"start one: python -m stages\.fleet up$"):
        commands.down(tmp_path, typed)
    with pytest.raises(UserError, match=r"start one: python -m stages\.fleet up name=b$"):  # not another fleet
        commands.running_fleet(tmp_path / "b")
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


@pytest.mark.parametrize("form", ["compose", "kubernetes"])
def test_containers_that_were_to_speak_tls_are_refused_and_nothing_is_written(tmp_path, composed, form):
    given = Typed(composed("fleet.endpoint.certificate=a.pem", "fleet.endpoint.private_key=b.pem"), [])
    with pytest.raises(UserError, match="the router in a container speaks no TLS"):
        commands.export(tmp_path, given, {"form": form, "to": None})
    assert list(tmp_path.iterdir()) == []
