"""What `stages.fleet` starts: names of variants, aliases and folders turned into a fleet that can run here."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from quantline.checkpoints.model_config import read_config
from quantline.checkpoints.model_files import WEIGHTS
from quantline.config.fleet import FleetConfig
from quantline.core.errors import ConfigError, QuantlineError, UserError
from quantline.core.gpu import visible_gpus
from quantline.lifecycle import serve
from quantline.lifecycle.promotion_gates import faults_of
from quantline.lifecycle.serve import Subject, Typed
from quantline.pipeline.config import Config, parse
from quantline.pipeline.fit import positions_of
from quantline.pipeline.overrides import key_of
from quantline.pipeline.paths import BY_HAND, MANUAL_HOME, run_names
from quantline.pipeline.records import by_stage, variant_record
from quantline.pipeline.stages import PIPELINE, is_baseline
from quantline.planning.placement import Device, Need, Place, need_of, place
from quantline.serving import llamacpp
from quantline.serving.command import ServerOptions, title_of
from quantline.serving.fleet.servers import Start
from quantline.serving.fleet.spec import Fleet, Variant, checked, config_faults, fleet_command
from quantline.serving.memory import GIB
from quantline.serving.ports import free_port
from quantline.serving.server import Vllm

# Below scratch/: the state of each fleet. No run has a name that begins with a dot.
HOME = f"{MANUAL_HOME}/.fleet"
# On the command line of `stages.fleet` the section's name may be left out before these.
SECTIONS = tuple(FleetConfig.model_fields)


ServerFor = Callable[[Path], Vllm]


@dataclass(frozen=True)
class Member:
    """One variant of a fleet.

    given: as the options name it. quality: what its evaluation found, for the gauge. content: the hash of its checkpoint;
    empty where no stage of this project recorded one.
    """

    given: str
    name: str
    subject: Subject
    quality: Mapping[str, Any]
    proven: bool
    content: str = ""


@dataclass(frozen=True)
class Resolved:
    """A fleet that can run here, how its servers are started, and what there is to say of it.

    contents: the hashes of its checkpoints by variant. by: the servers, with their versions.
    """

    fleet: Fleet
    starts: tuple[Start, ...]
    notes: tuple[str, ...]
    contents: Mapping[str, str] = field(default_factory=dict)
    by: str = ""


def with_section(arguments: Sequence[str]) -> list[str]:
    """A command line with the section's name before its options: `precisions.low=[a]` sets `fleet.precisions.low`.

    `++` lets it name a precision that the defaults do not have.
    """
    found = []
    for argument in arguments:
        first = key_of(argument).partition(".")[0]
        is_ours = "=" in argument and first in SECTIONS and not argument.startswith(("+", "~"))
        found.append(f"++fleet.{argument}" if is_ours else argument)
    return found


def folder_of(root: Path, name: str) -> Path:
    """Of the state of a fleet."""
    return root / HOME / name


def resolve(root: Path, typed: Typed, server_for: ServerFor, device: str, former: Fleet | None = None) -> Resolved:
    """The fleet that the options describe.

    Args:
        root: the checkout.
        typed: the command line.
        server_for: what serves the checkpoint in a folder.
        device: `cpu` or `cuda`.
        former: the running fleet that is to become this one; its variants keep their ports.

    Raises:
        ConfigError: everything that is wrong with the options and the variants, at once.
        UserError: the variants do not fit together in memory.
    """
    config = parse(typed.values)
    members, faults = _members(root, config, typed)
    faults = [*config_faults(config.fleet, root), *faults]
    starts: dict[str, ServerOptions] = {}
    servers: dict[str, Vllm] = {}
    notes: list[str] = []
    for member in members.values():
        try:
            own = servers[member.name] = server_for(member.subject.folder)
            options, note = serve.options_for(member.subject, own.version, device, 0)
            starts[member.name] = options
            notes += [f"{member.name}: {note}"] if note else []
        except QuantlineError as error:
            faults.append(str(error))
    of_llamacpp = {name for name, options in starts.items() if options.runtime == llamacpp.NAME}
    if config.fleet.limits.queued_tokens is not None and of_llamacpp:
        faults.append(
            f"fleet.limits.queued_tokens={config.fleet.limits.queued_tokens}: llama.cpp, which serves "
            f"{', '.join(sorted(of_llamacpp))}, does not say how many tokens wait in it; leave it null, and give "
            "fleet.limits.queued_requests"
        )
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    different = {member.name: member for member in members.values()}
    # The wheel of llama.cpp computes on the CPU.
    devices = {name: "cpu" if name in of_llamacpp else device for name in starts}
    needs = [_need(one, starts[one.name], devices[one.name]) for one in different.values()]
    known = {variant.name for variant in former.variants} if former is not None else set()
    places: dict[str, Place] = {}
    for kind in dict.fromkeys(devices.values()):
        new = [need for need in needs if need.name not in known and devices[need.name] == kind]
        places |= place(new, _devices(kind))
    fleet = checked(_fleet(root, config.fleet, members, needs, former))
    names = (*fleet.precisions, *fleet.aliases)
    # Where there is nobody to go on to, a request waits and is not refused.
    limited = set(starts) - {chain[-1] for chain in fleet.precisions.values()}
    limits = config.fleet.limits.model_dump(include={"queued_requests", "queued_tokens"})
    variants = tuple(
        one.model_copy(update={
            "runtime": starts[one.name].runtime,
            "queued_requests": limits["queued_requests"] if one.name in limited & of_llamacpp else None,
        })
        for one in fleet.variants
    )  # fmt: skip
    fleet = fleet.model_copy(update={"variants": variants})
    found = []
    for name, options in starts.items():
        beside = [other for other in starts if devices[other] == devices[name]]
        threads = max(1, (os.cpu_count() or 1) // len(beside)) if devices[name] == "cpu" else None
        process = options.process.model_copy(update={"port": fleet.variant(name).port, "host": "127.0.0.1"})
        start = _start(
            name, replace(options, process=process, threads=threads), servers[name], names, different[name]
        )  # fmt: skip
        own_limits = limits if name in limited - of_llamacpp else {}
        log = str(Path(fleet.folder) / "logs" / f"{name}.log")
        found.append(start.model_copy(update={"log": log, **own_limits, **_placed(places.get(name))}))
    by = " and ".join(
        sorted({f"{title_of(options.runtime)} {servers[name].version}" for name, options in starts.items()})
    )
    contents = {name: one.content for name, one in different.items()}
    return Resolved(fleet, tuple(found), tuple(notes), contents, by)


def _members(root: Path, config: Config, typed: Typed) -> tuple[dict[str, Member], list[str]]:
    """The variants by how the options name them, and what is wrong with them."""
    shares = [share.variant for share in (config.fleet.canary, config.fleet.shadow) if share.share and share.variant]
    wanted = dict.fromkeys([*(member for chain in config.fleet.precisions.values() for member in chain), *shares])
    # The command line says of serving what holds for all of them; the fleet's own options are no business of theirs.
    own = [override for override in typed.overrides if key_of(override).lstrip("~").partition(".")[0] in serve.READS]
    found: dict[str, Member] = {}
    faults: list[str] = []
    for given in wanted:
        try:
            member = _member(root, given, Typed(typed.values, own), config)
        except QuantlineError as error:
            faults.append(str(error))
            continue
        other = next((one for one in found.values() if one.name == member.name), None)
        if other is not None and other.subject.folder != member.subject.folder:
            faults.append(
                f"{given} and {other.given}: are different files of the same name, {member.name}; leave one out"
            )
        found[given] = member
    for name, chain in config.fleet.precisions.items():
        last = found.get(chain[-1]) if chain else None
        if last is not None and not last.proven:
            faults.append(
                f"fleet.precisions.{name}: ends with {chain[-1]}, a folder that no stage has proven; end it with float or a "
                "variant that was served and passed its gates"
            )
    return found, faults


def _member(root: Path, given: str, typed: Typed, config: Config) -> Member:
    if "@" in given:
        model, _, alias = given.rpartition("@")
        subject = serve.subject_of(root, {"alias": alias, "model": model or None}, typed)
        return Member(given, subject.name.replace("/", "-"), subject, {}, proven=True)
    if "/" in given and not given.startswith(BY_HAND) and given not in run_names(root, *PIPELINE):
        subject = serve.subject_of(root, {"folder": given}, typed)
        return Member(given, subject.name, subject, {}, proven=False)
    subject = serve.subject_of(root, {"variant": given}, typed)
    record = variant_record(root, given)
    results = by_stage(record.results)
    is_float = is_baseline(parse(record.config))
    gated = config.fleet.gates and not is_float
    if gated and (faults := faults_of(results, config.promote, record.remedy)):
        raise UserError(
            f"{given}: did not pass its gates: {'; '.join(faults)}; or, to take it all the same: fleet.gates=false"
        )
    measured = dict((results.get("evaluate") or {}).get("metrics") or {})
    quality: dict[str, Any] = {}
    if isinstance(measured.get("nll_difference"), float):
        quality["perplexity_increase"] = math.expm1(measured["nll_difference"])
    if "alarms" in measured:
        quality["alarms"] = int(measured["alarms"])
    content = str((results.get("download" if is_float else "convert") or {}).get("output_hash", ""))
    return Member(given, subject.name.replace("/", "-"), subject, quality, proven=True, content=content)


def _need(member: Member, options: ServerOptions, device: str) -> Need:
    folder, process = member.subject.folder, options.process
    asked = process.kv_cache_gib
    return need_of(
        member.name, read_config(folder), weight_bytes(folder),
        context=options.max_model_len or positions_of(folder) or 4096,
        cache_bytes=None if asked is None else int(asked * GIB), ranks=process.tensor_parallel_size, device=device,
    )  # fmt: skip


def weight_bytes(folder: Path) -> int:
    """Size of a checkpoint's weights."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS)


def _devices(device: str) -> list[Device]:
    if device != "cuda":
        memory = psutil.virtual_memory()
        return [Device(None, memory.total, memory.available)]
    return [
        Device(index, gpu.memory_total_bytes, gpu.memory_total_bytes - gpu.memory_used_bytes)
        for index, gpu in enumerate(visible_gpus())
    ]


def _placed(where: Place | None) -> dict[str, Any]:
    """What a place means for a server's start."""
    if where is None or not where.gpus:
        return {}
    return {
        "environment": {"CUDA_VISIBLE_DEVICES": ",".join(map(str, where.gpus))},
        "more": ("--gpu-memory-utilization", f"{where.share:g}"),
    }


def _fleet(
    root: Path, config: FleetConfig, members: Mapping[str, Member], needs: Sequence[Need], former: Fleet | None
) -> Fleet:
    weights = {need.name: need.weights for need in needs}
    ports = {variant.name: variant.port for variant in former.variants} if former is not None else {}
    name_of = {given: member.name for given, member in members.items()}
    variants = {
        member.name: Variant(
            name=member.name, port=ports.get(member.name) or free_port("127.0.0.1"), weight_bytes=weights[member.name],
            max_model_len=member.subject.config.serve.length, **member.quality,
        )
        for member in members.values()
    }  # fmt: skip
    end = config.endpoint
    if former is not None:
        end = former.endpoint if end.port == 0 else end
    elif end.port == 0:
        end = end.model_copy(update={"port": free_port(end.host)})

    def absolute(path: str | None) -> str | None:
        return None if path is None else str((root / Path(path).expanduser()).absolute())

    files = {"certificate": absolute(end.certificate), "private_key": absolute(end.private_key)}
    shares = {
        key: share.model_copy(update={"variant": name_of.get(share.variant or "")}) if share.share else share
        for key, share in (("canary", config.canary), ("shadow", config.shadow))
    }
    return Fleet(
        folder=str(folder_of(root, config.name)), variants=tuple(variants.values()),
        precisions={name: tuple(name_of[given] for given in chain) for name, chain in config.precisions.items()},
        aliases={given: name for given, name in name_of.items() if "@" in given}, endpoint=end.model_copy(update=files),
        admin_port=former.admin_port if former is not None else free_port("127.0.0.1"),
        gauge_port=former.gauge_port if former is not None else free_port("127.0.0.1"),
        hang_seconds=config.limits.hang_seconds, health=config.health, canary=shares["canary"], shadow=shares["shadow"],
        capture_share=config.capture.share, keys_file=absolute(config.keys_file),
        generation=former.generation + 1 if former is not None else 0,
    )  # fmt: skip


def _start(name: str, options: ServerOptions, vllm: Vllm, names: Sequence[str], member: Member) -> Start:
    return Start(
        names=(name, *names), python=str(vllm.python.absolute()), folder=str(member.subject.folder), log="",
        server=options,
    )  # fmt: skip


def refuse_new_names(former: Fleet, fleet: Fleet) -> None:
    """Refuse a change of a running fleet that its servers would not know the names of.

    Raises:
        UserError: there is a new precision or alias.
    """
    known = {*former.precisions, *former.aliases}
    if new := [name for name in (*fleet.precisions, *fleet.aliases) if name not in known]:
        raise UserError(
            f"{', '.join(new)}: the running servers do not know a new name; run "
            f"`{fleet_command('down', Path(former.folder))}`, then `up`"
        )


def described(fleet: Fleet) -> list[str]:
    """What a user is told of a fleet that is up: where it is, and where each name goes."""
    width = max(map(len, fleet.names))
    lines = [f"ready: {fleet.url}/v1"]
    for name, chain in fleet.names.items():
        shared = ""
        if fleet.canary.share and fleet.canary.precision == name:
            shared = f"; {fleet.canary.share:.3g} of it to {fleet.canary.variant} first"
        lines.append(f"  {name:<{width}}  {' -> '.join(chain)}{shared}")
    lines.append("  keys are asked for" if fleet.keys_file else "  no key is asked for")
    return lines


def curl_line(fleet: Fleet) -> str:
    """A line of a shell that asks the fleet something."""
    asked = f'{{"model": "{next(iter(fleet.precisions))}", "prompt": "An index is", "max_tokens": 32}}'
    key = ["-H", "Authorization: Bearer $KEY"] if fleet.keys_file else []
    return shlex.join(
        ["curl", f"{fleet.url}/v1/completions", "-H", "Content-Type: application/json", *key, "-d", asked]
    )
