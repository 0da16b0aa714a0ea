"""What a fleet is: its variants with their addresses, which of them answer a name, and the limits.

A `Fleet` is complete and plain: names, aliases and files are resolved, ports are chosen. Everything else of a fleet (the
router's documents, health, rules, manifests) follows from it. It knows nothing of the router.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from quantline.config.fleet import EndpointConfig, FleetConfig, HealthConfig, ShareConfig
from quantline.config.section import Section
from quantline.core.errors import ConfigError, UserError
from quantline.core.text import nearest

# Headers and metrics carry these names, and the router's own clusters are told apart from them by a slash.
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
VLLM = "vllm"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Variant(Section):
    """A served checkpoint.

    weight_bytes: of its files. perplexity_increase: relative to the float model, and alarms: of its evaluation; None if they
    are not known. max_model_len: tokens of prompt and answer. runtime: the server, `vllm` or `llamacpp`. queued_requests:
    from which on the gauge sends requests elsewhere; None where the server refuses them itself, or has no limit.
    """

    name: str
    port: int
    host: str = "127.0.0.1"
    weight_bytes: int = 0
    perplexity_increase: float | None = None
    alarms: int | None = None
    max_model_len: int | None = None
    runtime: str = VLLM
    queued_requests: int | None = None

    @property
    def address(self) -> str:
        """HOST:PORT, as the router writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Fleet(Section):
    """A fleet.

    Attributes:
        folder: of its state: documents, logs, captures.
        variants: every served checkpoint.
        precisions: what a client asks for -> names of variants, in the order in which they are tried.
        aliases: further names of variants, such as `model@production`.
        gauge_port: of the process that says how healthy a variant is; None lets the router ask the variants themselves.
        hang_seconds: without a byte from a variant until the next is tried.
        draining: variants that get requests only where no other can answer.
        generation: counts the changes of a running fleet.
    """

    folder: str
    variants: tuple[Variant, ...]
    precisions: dict[str, tuple[str, ...]]
    aliases: dict[str, str] = Field(default={})
    endpoint: EndpointConfig = EndpointConfig()
    admin_port: int = 0
    gauge_port: int | None = None
    hang_seconds: float = Field(default=300, gt=0)
    health: HealthConfig = HealthConfig()
    canary: ShareConfig = ShareConfig()
    shadow: ShareConfig = ShareConfig()
    capture_share: float = 0.0
    keys_file: str | None = None
    draining: tuple[str, ...] = ()
    generation: int = 0

    def variant(self, name: str) -> Variant:
        """The variant with this name.

        Raises:
            KeyError: there is none.
        """
        return {variant.name: variant for variant in self.variants}[name]

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Every name that a client may give as `model` -> the variants that answer it, in order."""
        alone = {variant.name: (variant.name,) for variant in self.variants}
        return {**self.precisions, **alone, **{alias: (name,) for alias, name in self.aliases.items()}}

    @property
    def url(self) -> str:
        """Of the endpoint, for a client on this machine."""
        scheme = "https" if self.endpoint.certificate else "http"
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.endpoint.host, self.endpoint.host)  # noqa: S104
        return f"{scheme}://{host}:{self.endpoint.port}"


class Key(Section):
    """A client's key. precision: whether it may choose the precision by header."""

    client: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    key: str = Field(min_length=8)
    precision: bool = False


class _Keys(Section):
    keys: list[Key] = Field(min_length=1)


# As conf/fleet/default.yaml has it.
_USUAL_NAME = "fleet"


def fleet_command(action: str, folder: Path) -> str:
    """The command line of an action of `stages.fleet` on the fleet of a folder, as a message advises it."""
    name = "" if folder.name == _USUAL_NAME else f" name={folder.name}"
    return f"python -m stages.fleet {action}{name}"


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file: `keys: [{client: NAME, key: SECRET, precision: true}]`.

    Raises:
        UserError: it cannot be read, has another form, or names a key or client twice. No message shows a key.
    """
    try:
        keys = _Keys.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).keys
    except OSError as error:
        raise UserError(
            f"fleet.keys_file={path}: {error.strerror}; give a file with `keys: [{{client: NAME, key: SECRET}}]`"
        ) from None
    except yaml.YAMLError:
        raise UserError(f"fleet.keys_file={path}: is no YAML; give `keys: [{{client: NAME, key: SECRET}}]`") from None
    except ValidationError as error:
        places = sorted({".".join(map(str, fault["loc"])) + ": " + fault["msg"] for fault in error.errors()})
        raise UserError(f"fleet.keys_file={path}: {'; '.join(places)}") from None
    if len({key.key for key in keys}) < len(keys) or len({key.client for key in keys}) < len(keys):
        raise UserError(f"fleet.keys_file={path}: a key or a client stands there twice; give each client one key")
    return tuple(keys)


def config_faults(config: FleetConfig, root: Path) -> list[str]:
    """What is wrong with the options of a fleet by themselves, before any variant is looked at.

    root: the checkout, where relative paths start.
    """
    faults = list(_chain_faults({name: tuple(chain) for name, chain in config.precisions.items()}))
    members = {member for chain in config.precisions.values() for member in chain}
    for key, share in (("canary", config.canary), ("shadow", config.shadow)):
        faults += _share_faults(key, share, list(config.precisions))
    if config.canary.variant in members and config.canary.precision:
        first = config.precisions.get(config.canary.precision, [""])[0]
        if first == config.canary.variant:
            faults.append(
                f"fleet.canary.variant={first}: is the first of {config.canary.precision} already; give another"
            )
    end = config.endpoint
    if (end.certificate is None) != (end.private_key is None):
        faults.append("fleet.endpoint: give both certificate and private_key, or neither")
    for key in ("certificate", "private_key"):
        path = getattr(end, key)
        if path and not (root / Path(path).expanduser()).is_file():
            faults.append(f"fleet.endpoint.{key}={path}: is no file")
    if end.host not in LOOPBACK and not config.keys_file:
        faults.append(
            f"fleet.endpoint.host={end.host}: others than this machine could ask it; give fleet.keys_file=FILE with the "
            "clients' keys, or keep 127.0.0.1"
        )
    health = config.health
    for what in ("kv_cache", "memory"):
        low, high = getattr(health, f"{what}_low"), getattr(health, f"{what}_high")
        if low >= high:
            faults.append(f"fleet.health.{what}_low={low:g}: must be less than {what}_high={high:g}")
    if config.restart.first_seconds > config.restart.most_seconds:
        faults.append("fleet.restart.first_seconds: must not be more than most_seconds")
    return faults


def _chain_faults(precisions: dict[str, tuple[str, ...]]) -> Iterator[str]:
    if not precisions:
        yield "fleet.precisions: is empty; give one, such as precisions.low=[awq-w4-g128,float]"
    for name, chain in precisions.items():
        if not _NAME.match(name):
            yield f"fleet.precisions.{name}: use letters, digits and '._-'"
        if not chain:
            yield f"fleet.precisions.{name}=[]: give at least one variant"
        for twice in sorted({member for member in chain if chain.count(member) > 1}):
            yield f"fleet.precisions.{name}: has {twice} twice"
        for member in chain:
            if member in precisions:
                yield f"fleet.precisions.{name}: {member} is a precision; give names of variants"


def _share_faults(key: str, share: ShareConfig, precisions: Sequence[str]) -> Iterator[str]:
    if not share.share:
        return
    if not share.variant or not share.precision:
        yield f"fleet.{key}.share={share.share:g}: give fleet.{key}.precision and fleet.{key}.variant with it"
    elif share.precision not in precisions:
        near = nearest(share.precision, list(precisions))
        yield f"fleet.{key}.precision={share.precision}: there are {', '.join(precisions)}{near}"


def checked(fleet: Fleet) -> Fleet:
    """The fleet itself, if it is sound.

    Raises:
        ConfigError: every fault at once: names that no variant has, names that stand for two things, empty chains.
    """
    faults = list(_chain_faults(fleet.precisions))
    names = [variant.name for variant in fleet.variants]
    faults += [f"variant {name}: use letters, digits and '._-', 100 at most" for name in names if not _NAME.match(name)]
    faults += [
        f"variant {name}: stands there twice" for name in sorted({name for name in names if names.count(name) > 1})
    ]
    ports = [variant.address for variant in fleet.variants]
    faults += [
        f"address {port}: two variants have it" for port in sorted({port for port in ports if ports.count(port) > 1})
    ]
    for alias, name in fleet.aliases.items():
        if name not in names:
            faults.append(f"alias {alias}: there is no variant {name}")
        if alias in names or alias in fleet.precisions:
            faults.append(f"alias {alias}: a variant or precision has this name")
    for precision, chain in fleet.precisions.items():
        faults += [
            f"fleet.precisions.{precision}: there is no variant {name}{nearest(name, names)}"
            for name in chain
            if name not in names
        ]
        if precision in names:
            faults.append(f"fleet.precisions.{precision}: a variant has this name, too; name the precision otherwise")
    for key, share in (("canary", fleet.canary), ("shadow", fleet.shadow)):
        faults += _share_faults(key, share, list(fleet.precisions))
        if share.share and share.variant and share.variant not in names:
            faults.append(f"fleet.{key}.variant={share.variant}: there are {', '.join(names)}")
    if fleet.canary.share and fleet.precisions.get(fleet.canary.precision or "", ("",))[0] == fleet.canary.variant:
        faults.append(f"fleet.canary.variant={fleet.canary.variant}: is the first of {fleet.canary.precision} already")
    faults += [f"draining {name}: there is no such variant" for name in fleet.draining if name not in names]
    if faults:
        raise ConfigError(faults)
    return fleet
