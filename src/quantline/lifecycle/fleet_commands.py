"""The actions of `stages.fleet`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from quantline.config.fleet import ShareConfig
from quantline.core.errors import ServerError, UserError
from quantline.core.files import read_json, write_json
from quantline.lifecycle.fleet import HOME, curl_line, described, folder_of, refuse_new_names, resolve
from quantline.lifecycle.serve import Typed
from quantline.pipeline.compose import compose_values
from quantline.pipeline.config import parse
from quantline.pipeline.overrides import key_of
from quantline.pipeline.run import StageRun
from quantline.pipeline.server import server_of
from quantline.serving.fleet import export as exported
from quantline.serving.fleet.observe import write
from quantline.serving.fleet.orders import Order, give, is_running, running_fleet
from quantline.serving.fleet.running import RunningFleet
from quantline.serving.fleet.servers import Start
from quantline.serving.fleet.spec import Fleet, checked, fleet_command, read_keys
from quantline.serving.fleet.status import shown
from quantline.toolchains.router import envoy

OVERRIDES = "overrides.json"
_TAKES = {
    "up": (), "reload": (), "down": (), "status": ("watch",), "canary": ("variant", "precision", "share"),
    "drain": ("variant", "undo"), "export": ("form", "to"),
}  # fmt: skip


def refuse_unused(action: str, arguments: Mapping[str, str | None], typed: Typed) -> None:
    """Refuse options that an action does not read.

    Raises:
        UserError: one is given.
    """
    given = [name for name, value in arguments.items() if name != "action" and value not in (None, "false", "systemd")]
    if extra := [name for name in given if name not in _TAKES[action]]:
        takes = ", ".join(_TAKES[action]) or "none of its own"
        raise UserError(f"{extra[0]}: `fleet {action}` does not read it; its options are {takes}")
    if action not in ("up", "reload", "export"):
        others = [one for one in typed.overrides if key_of(one) != "fleet.name"]
        if others:
            raise UserError(f"{others[0]}: only `fleet up`, `reload` and `export` take options of the configuration")


def up(root: Path, typed: Typed) -> None:
    """Start a fleet and stay until it is told to end.

    Raises:
        QuantlineError: it cannot run here, or something did not start; nothing is left running then.
    """
    config = parse(typed.values)
    folder = folder_of(root, config.fleet.name)
    if is_running(folder):
        raise UserError(
            f"fleet.name={config.fleet.name}: is running; run `{fleet_command('down', folder)}`, or give another name"
        )
    run = StageRun("serve", config, root, tuple(typed.overrides))
    program = envoy(root, config.toolchains.get("router"))
    made = resolve(root, typed, partial(server_of, run), run.device)
    for note in made.notes:
        print(f"  note: {note}", file=sys.stderr)
    _say(f"starting {', '.join(variant.name for variant in made.fleet.variants)} by {made.by} on {run.device}, "
         f"behind Envoy {program.version}; logs: {folder}")  # fmt: skip
    with RunningFleet(made.fleet, program, made.starts, config.fleet.restart, config.fleet.capture) as running:
        write_json(folder / OVERRIDES, {"overrides": list(typed.overrides)})
        try:
            for line in described(made.fleet):
                _say(line)
            _say(f"  watch it: {write(made.fleet)} has targets and rules for Prometheus, and a dashboard")
            _say(f"  ask it: {curl_line(made.fleet)}")
            _say(f"  Ctrl-C or `{fleet_command('down', folder)}` ends it")
            running.stay()
        except KeyboardInterrupt:
            _say("ending: what has begun is answered")
        finally:
            (folder / OVERRIDES).unlink(missing_ok=True)
    _say("ended, no process is left")


def reload(root: Path, typed: Typed) -> None:
    """Give a running fleet other options: those of its `up`, with what the command line says otherwise.

    Raises:
        QuantlineError: the new fleet cannot run, or the old one cannot become it; the old one goes on.
    """
    folder = _folder(root, typed)
    former = running_fleet(folder)
    if not (folder / OVERRIDES).is_file():
        raise UserError(f"fleet.name={folder.name}: is still starting, or `stages.fleet up` did not start it")
    saved = [str(one) for one in read_json(folder / OVERRIDES)["overrides"]]
    new = {key_of(one).lstrip("~") for one in typed.overrides}
    overrides = [*(one for one in saved if key_of(one).lstrip("~") not in new), *typed.overrides]
    again = Typed(compose_values(root / "conf", overrides), overrides)
    config = parse(again.values)
    run = StageRun("serve", config, root, tuple(overrides))
    made = resolve(root, again, partial(server_of, run), run.device, former)
    fleet = as_ordered(former, made.fleet, typed.overrides)
    refuse_new_names(former, fleet)
    _give(folder, fleet, former, starts=made.starts)
    write_json(folder / OVERRIDES, {"overrides": overrides})
    write(fleet)
    for line in described(fleet):
        _say(line)


def as_ordered(former: Fleet, fleet: Fleet, overrides: Sequence[str]) -> Fleet:
    """The fleet of a reload with what commands ordered since `up`: drained variants, and the canary where it is not given.

    Of variants that the fleet no longer has, nothing is kept.
    """
    names, canary = {variant.name for variant in fleet.variants}, former.canary
    changes: dict[str, object] = {"draining": tuple(name for name in former.draining if name in names)}
    is_given = any(key_of(one).lstrip("~+").startswith("fleet.canary") for one in overrides)
    if not is_given and (not canary.share or (canary.variant in names and canary.precision in fleet.precisions)):
        changes["canary"] = canary
    return checked(fleet.model_copy(update=changes))


def canary(root: Path, typed: Typed, arguments: Mapping[str, str | None]) -> None:
    """Move a share of a precision's requests to another variant of a running fleet.

    Raises:
        UserError: no fleet runs, or there is no such variant, precision or share.
    """
    folder = _folder(root, typed)
    former = running_fleet(folder)
    try:
        share = float(arguments["share"] or "")
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"share={arguments['share']}: give the part of the requests, 0 to 1; 0 ends the canary")
    precision = arguments["precision"] or former.canary.precision or next(iter(former.precisions))
    wanted = ShareConfig(precision=precision, variant=arguments["variant"] or former.canary.variant, share=share)
    fleet = checked(former.model_copy(update={"canary": wanted if share else ShareConfig()}))
    _give(folder, fleet, former)
    _say(f"{share:.3g} of {precision} goes to {wanted.variant} first" if share else "the canary has ended")


def drain(root: Path, typed: Typed, arguments: Mapping[str, str | None]) -> None:
    """Let a variant get requests only where no other can answer, or give it its requests back.

    Raises:
        UserError: no fleet runs, or there is no such variant.
    """
    folder = _folder(root, typed)
    former = running_fleet(folder)
    name = arguments["variant"]
    names = [variant.name for variant in former.variants]
    if name not in names:
        raise UserError(f"variant={name}: give one of {', '.join(names)}")
    rest = tuple(one for one in former.draining if one != name)
    draining = rest if arguments["undo"] == "true" else (*rest, name)
    _give(folder, former.model_copy(update={"draining": draining}), former)
    _say(f"drained: {', '.join(draining) or 'none'}")


def down(root: Path, typed: Typed) -> None:
    """End a running fleet; what has begun is answered first.

    Raises:
        UserError: no fleet runs.
        ServerError: it does not end.
    """
    folder = _folder(root, typed)
    give(folder, Order(number=time.time_ns(), end=True))
    limit = time.monotonic() + 120
    while is_running(folder):
        if time.monotonic() > limit:
            raise ServerError(f"the fleet of {folder} has not ended after 120 s; see the logs there")
        time.sleep(0.1)
    _say("ended, no process is left")


def export(root: Path, typed: Typed, arguments: Mapping[str, str | None]) -> None:
    """Write what keeps a fleet running without this command: a unit of systemd, a compose file, or manifests.

    Raises:
        QuantlineError: the fleet cannot run as it is described, or not in containers.
    """
    config = parse(typed.values)
    if arguments["form"] != "systemd" and config.fleet.endpoint.certificate:
        raise UserError(
            f"form={arguments['form']} fleet.endpoint.certificate={config.fleet.endpoint.certificate}: the router in a "
            "container speaks no TLS; leave certificate and private_key out and put a gateway with TLS before it, or take "
            "form=systemd"
        )
    form, run = str(arguments["form"]), StageRun("serve", config, root, tuple(typed.overrides))
    made = resolve(root, typed, partial(server_of, run), run.device)
    fleet, name = made.fleet, config.fleet.name
    if form != "systemd":
        exported.refuse_alike(fleet)
        exported.refuse_llamacpp(fleet, form)
    out = Path(arguments["to"] or root / HOME / name / "export").absolute()
    out.mkdir(parents=True, exist_ok=True)
    if form == "systemd":
        path = out / f"quantline-fleet-{name}.service"
        _write(path, exported.systemd(root, Path(sys.executable), typed.overrides, name))
    else:
        keys = read_keys(Path(fleet.keys_file)) if fleet.keys_file else ()
        path = out / f"{form}.yaml"
        if form == "compose":
            router = out / "router"
            router.mkdir(exist_ok=True, mode=0o700)
            for file, text in exported.documents(fleet, keys).items():
                _write(router / file, text)
            _write(path, exported.as_yaml([exported.compose(fleet, made.starts, router)]))
        else:
            _write(path, exported.as_yaml(exported.kubernetes(fleet, made.starts, keys)))
    _say(str(path))


def _write(path: Path, text: str) -> None:
    """Write a file that this user alone can read from the start, since keys may be in it."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(text, encoding="utf-8")


def status(root: Path, typed: Typed, *, watch: bool) -> None:
    """Show a running fleet: variants, load, fallbacks, memory. watch: again every two seconds.

    Raises:
        UserError: no fleet runs.
    """
    folder = _folder(root, typed)
    while True:
        text = "\n".join(shown(running_fleet(folder)))
        if not watch:
            _say(text)
            return
        _say(f"\x1b[H\x1b[2J{text}")
        time.sleep(2.0)


def _folder(root: Path, typed: Typed) -> Path:
    return folder_of(root, parse(typed.values).fleet.name)


def _give(folder: Path, fleet: Fleet, former: Fleet, starts: tuple[Start, ...] = ()) -> None:
    number = time.time_ns()
    give(
        folder,
        Order(number=number, fleet=fleet.model_copy(update={"generation": former.generation + 1}), starts=starts),
    )


def _say(line: str) -> None:
    print(line, flush=True)
