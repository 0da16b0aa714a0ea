"""The only module that turns YAML into types.

`parse` takes a composed configuration as plain values. It returns a frozen `Config`, or raises one `ConfigError` that
lists every fault: unknown keys, wrong types, values out of range, combinations that no backend supports. OmegaConf
objects are not used beyond this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from quantline.config.context import automatic, length_faults
from quantline.config.convert import ConvertConfig, ConvertSourceConfig
from quantline.config.data import EMBEDDED_MODEL, CalibrationConfig, ModelConfig
from quantline.config.evaluate import EvaluateConfig, NoiseConfig, SensitivityConfig
from quantline.config.fleet import FleetConfig, FleetSmokeConfig
from quantline.config.layer_errors import LayerErrorsConfig
from quantline.config.method import Backend, LayersConfig, Method
from quantline.config.promote import PromoteConfig
from quantline.config.quantize import QuantizeConfig
from quantline.config.report import ReportConfig
from quantline.config.section import Section
from quantline.config.serve import ServeConfig
from quantline.config.speed import SpeedConfig
from quantline.config.tasks import TasksConfig
from quantline.config.tracking import TrackingConfig
from quantline.core.errors import ConfigError
from quantline.core.text import as_configured
from quantline.quantization.requirements import method_faults, with_own_widths
from quantline.toolchains.environments import HEALTH_CHECKS

GROUP_SIZES = (32, 64, 128, 256, 512, 1024)


class FrozenConfig(Section):
    """The section that `compose` adds when it freezes a variant."""

    variant: str
    overrides: str
    backends: list[str]
    locks: dict[str, str]


class Config(Section):
    """The configuration of a variant."""

    variant: str | None
    bits: int
    group_size: int
    seed: int = Field(ge=0, lt=2**32)
    threads: int = Field(ge=1)
    device: Literal["auto", "cpu", "cuda"]
    model: ModelConfig
    method: Method
    backend: Backend
    backends: dict[str, list[str]]
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    lm_head: Literal["float", "quantized"]
    low_memory: bool
    quantize: QuantizeConfig = QuantizeConfig()
    layers: LayersConfig
    calibration: CalibrationConfig
    layer_errors: LayerErrorsConfig
    convert: ConvertConfig
    source: ConvertSourceConfig = ConvertSourceConfig()
    out: str | None = None
    serve: ServeConfig
    evaluate: EvaluateConfig
    tasks: TasksConfig
    noise: NoiseConfig
    sensitivity: SensitivityConfig = SensitivityConfig()
    speed: SpeedConfig
    tracking: TrackingConfig
    promote: PromoteConfig = PromoteConfig()
    fleet: FleetConfig = FleetConfig()
    fleet_smoke: FleetSmokeConfig = FleetSmokeConfig()
    report: ReportConfig
    toolchains: dict[str, str | None]
    frozen: FrozenConfig | None = None


def parse(values: Mapping[str, Any]) -> Config:
    """Validate plain values and return the configuration.

    Raises:
        ConfigError: every fault at once, each naming the key, what was given and what is allowed.
    """
    faults: list[str] = []
    config: Config | None = None
    values = with_own_widths(_repository_over_embedded(_with_later_limits(values)))
    try:
        config = _with_context(Config.model_validate(dict(values)))
        faults.extend([*length_faults(config), *config.speed.library_faults(), *config.fleet_smoke.faults()])
    except ValidationError as error:
        faults.extend(_described(error.errors(include_url=False)))
    for check in (method_faults, _source_faults, _convert_faults, _tracking_faults, _toolchain_faults):
        try:
            faults.extend(check(values))
        except (AttributeError, KeyError, TypeError, ValueError):
            if config is not None:
                raise  # otherwise the types are wrong, which is reported already
    if faults or config is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    return config


# Limits that configurations of older versions do not have. Their section has no defaults of its own, as it is a part of a
# stage's code, so that a default there would run the evaluation of every variant again.
_LATER_LIMITS = ("rounding_ratio",)


def _with_later_limits(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Set limits that an older configuration does not have to null, which is no limit."""
    evaluate = values.get("evaluate")
    limits = evaluate.get("limits") if isinstance(evaluate, Mapping) else None
    if not isinstance(evaluate, Mapping) or not isinstance(limits, Mapping):
        return values
    return {**values, "evaluate": {**evaluate, "limits": {**dict.fromkeys(_LATER_LIMITS), **limits}}}


def _with_context(config: Config) -> Config:
    if config.serve.max_model_len != "auto":
        return config
    return config.model_copy(update={"serve": config.serve.model_copy(update={"max_model_len": automatic(config)})})


# Former names of groups and options.
_RENAMED = {"coverage": "layer_errors", "promote.coverage": "promote.layer_errors"}


def renamed(key: str) -> str | None:
    """The new name of an option that was renamed; None for all other names."""
    for old, new in _RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return None


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of an older version, as plain values, with its options under the names of today."""
    current: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }
    for old, new in _RENAMED.items():
        *section, name = old.split(".")
        place = current.get(section[0]) if section else current
        if isinstance(place, dict) and name in place:
            place[new.rpartition(".")[2]] = place.pop(name)
    return current


_AUTO = "literal['auto']"


def _described(faults: Sequence[Mapping[str, Any]]) -> list[str]:
    """The faults as sentences. An option that takes a number or `auto` has one for each, of which the number's is told."""
    or_auto = {fault["loc"][:-1] for fault in faults if fault["loc"][-1:] == (_AUTO,)}
    told = []
    for fault in faults:
        place = fault["loc"]
        if place[:-1] not in or_auto:
            told.append(_describe(fault, place))
        elif place[-1] != _AUTO:
            told.append(f"{_describe(fault, place[:-1])}, or auto")
    return told


def _describe(fault: Mapping[str, Any], place: Sequence[object]) -> str:
    # The location of a method's fault contains the discriminator's tag, which is not a part of the option's name.
    places = [str(part) for part in place]
    if len(places) > 2 and places[0] == "method":
        del places[1]
    key, given, kind = ".".join(places), fault["input"], fault["type"]
    if kind == "extra_forbidden" and (now := renamed(key)):
        return f"{key}: was renamed; use {now}"
    if kind == "extra_forbidden":
        return f"{key}: no such option; see the allowed ones with --help"
    if kind == "missing":
        return f"{key}: is missing; give it a value"
    if kind == "literal_error":
        return f"{key}={as_configured(given)}: allowed are {fault['ctx']['expected'].replace(chr(39), '')}"
    return f"{key}={as_configured(given)}: {_lower(fault['msg'])}"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _repository_over_embedded(values: Mapping[str, Any]) -> Mapping[str, Any]:
    # `model.repo=... model.revision=...` with the default model selects that repository, not both.
    model = values.get("model")
    if isinstance(model, Mapping) and model.get("repo") and model.get("path") == EMBEDDED_MODEL:
        return {**values, "model": {**model, "path": None}}
    return values


def _source_faults(values: Mapping[str, Any]) -> list[str]:
    faults = []
    model, calibration = values.get("model"), values.get("calibration")
    if isinstance(model, Mapping):
        given = [key for key in ("repo", "path") if model.get(key)]
        if not given:
            faults.append("model: neither path nor repo is set; give model.path=DIR, or model.repo and model.revision")
        elif len(given) == 2:
            faults.append(
                f"model.repo={model['repo']} model.path={model['path']}: give only one and set the other to null"
            )
        elif model.get("repo") and not re.fullmatch(r"[0-9a-f]{40}", str(model.get("revision") or "")):
            faults.append(
                f"model.revision={as_configured(model.get('revision'))}: give the commit of {model['repo']}, 40 hex digits; "
                "branches and tags move"
            )
    if isinstance(calibration, Mapping) and isinstance(calibration.get("sources"), Mapping):
        for name, source in calibration["sources"].items():
            if isinstance(source, Mapping) and not (source.get("path") or source.get("repo")):
                key = "calibration.path" if name == "jsonl" else f"calibration.sources.{name}.path"
                faults.append(f"{key}: is not set; give a file of text, {key}=FILE")
        path = calibration.get("path")
        if path and not any(isinstance(s, Mapping) and s.get("path") == path for s in calibration["sources"].values()):
            faults.append(
                f"calibration.path={path}: calibration={calibration.get('name')} does not read it; give "
                "calibration=jsonl with it"
            )
    return faults


def _tracking_faults(values: Mapping[str, Any]) -> list[str]:
    tracking = values.get("tracking")
    if not isinstance(tracking, Mapping):
        return []
    faults = []
    # Configurations are frozen, cached and shared, so they must not contain a password.
    if re.match(r"[a-z+]+://[^/@]*:[^/@]*@", str(tracking.get("uri") or "")):
        faults.append(
            "tracking.uri: contains a password, which would be saved with every variant; remove it and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    name = tracking.get("experiment")
    if name is not None and not re.fullmatch(r"[\w][\w .:-]*(/[\w][\w .:-]*)*", str(name)):
        faults.append(f"tracking.experiment={name}: use letters, digits, spaces and '_.:-', and '/' between parts")
    return faults


def _toolchain_faults(values: Mapping[str, Any]) -> list[str]:
    given, known = values.get("toolchains"), list(HEALTH_CHECKS)
    if not isinstance(given, Mapping):
        return []
    return [
        f"toolchains.{name}: no such environment; there are {', '.join(known)}" for name in given if name not in known
    ]


def _servable(target: str) -> bool:
    from quantline.checkpoints.layouts import TARGETS  # NumPy, which most commands need not import

    return target not in TARGETS or TARGETS[target].servable


def _convert_faults(values: Mapping[str, Any]) -> list[str]:
    source, out = values.get("source"), values.get("out")
    if not isinstance(source, Mapping):
        return []
    kind, path = source.get("kind", "pipeline"), source.get("path")
    if kind == "pipeline" and path:
        return [f"source.path={path}: the source is the pipeline's own checkpoint; add source=auto"]
    if kind == "pipeline" and out:
        return [f"out={out}: needs source=auto, msmodelslim or gguf; otherwise the pipeline chooses the output folder"]
    target = str((values.get("convert") or {}).get("target"))
    if kind == "pipeline" and target not in ("auto", "keep") and not _servable(target):
        return [
            f"convert.target={target}: the pipeline serves what it converts, and vLLM does not read msModelSlim; convert "
            "a folder instead, with source=auto source.path=DIR"
        ]
    if kind != "pipeline" and not path:
        return [f"source.path: is not set; give the checkpoint's folder, source={kind} source.path=DIR"]
    return []
