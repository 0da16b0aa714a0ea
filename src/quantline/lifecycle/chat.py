"""Whom `stages.chat` talks to: a running fleet or server, or servers that it starts for the conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quantline.core.errors import UserError
from quantline.lifecycle.fleet import HOME
from quantline.lifecycle.serve import HOME as LOGS
from quantline.lifecycle.serve import Subject, Typed, options_for, subject_of
from quantline.pipeline.run import StageRun
from quantline.pipeline.server import server_of
from quantline.serving import server as vllm_server
from quantline.serving.chat import Partner
from quantline.serving.fleet.gauge import FLEET
from quantline.serving.fleet.orders import is_running, running_fleet


@contextmanager
def partners(root: Path, typed: Typed, names: list[str], url: str | None, key: str | None) -> Iterator[list[Partner]]:
    """The models to talk to, for as long as the block runs.

    Args:
        root: the checkout.
        typed: the command line.
        names: variants, aliases (MODEL@ALIAS) or names that a server knows.
        url: of a running server; None looks for a running fleet that has all the names, and else starts a server for each.
        key: of the server; None sends none.

    Raises:
        QuantlineError: there is no such variant, or its server does not start.
    """
    headers: Mapping[str, str] = {"authorization": f"Bearer {key}"} if key else {}
    if url is None:
        url = _of_fleet(root, names)
    if url is not None:
        base = url.rstrip("/").removesuffix("/v1")
        yield [Partner(name, base, name, headers) for name in names]
        return
    with ExitStack() as stack:
        found = []
        for name in names:
            subject = subject_of_name(root, name, typed)
            run = StageRun("serve", subject.config, root, tuple(typed.overrides))
            vllm = server_of(run, subject.folder)
            options, _ = options_for(subject, vllm.version, run.device, 0)
            log = root / LOGS / f"chat-{subject.name.replace('/', '-')}.log"
            server = stack.enter_context(vllm_server.serve(vllm.python, subject.folder, options, log=log))
            found.append(Partner(name, server.url, options.name))
        yield found


def subject_of_name(root: Path, name: str, typed: Typed) -> Subject:
    """What a name stands for: a variant, MODEL@ALIAS, or a folder.

    Raises:
        UserError: as for `lifecycle.serve.subject_of`.
    """
    given: dict[str, str | None] = {"variant": name}
    if "@" in name:
        model, _, alias = name.rpartition("@")
        given = {"alias": alias, "model": model or None}
    elif "/" in name and Path(name).expanduser().is_dir():
        given = {"folder": name}
    return subject_of(root, given, typed)


def _of_fleet(root: Path, names: list[str]) -> str | None:
    """The URL of a running fleet that has all these names."""
    for path in sorted((root / HOME).glob(f"*/{FLEET}")):
        if is_running(path.parent):
            fleet = running_fleet(path.parent)
            if set(names) <= set(fleet.names):
                return fleet.url
    return None


def names_of(text: str | None) -> list[str]:
    """The names of `variant=a,b`.

    Raises:
        UserError: there are none, or one is given twice.
    """
    names = [name.strip() for name in (text or "").strip("[]").split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"variant={text}: give one name, or several different ones: variant=awq-w4-g128,float")
    return names
