"""What `stages.serve` serves: a variant, a promoted one or a folder, with the options that serve_smoke proved."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantline.checkpoints.layouts.choice import runtime_of
from quantline.checkpoints.model_config import dimensions, read_config
from quantline.checkpoints.model_files import has_chat_template
from quantline.config.context import automatic
from quantline.config.speed import SpeedConfig
from quantline.core.errors import UserError
from quantline.core.text import nearest
from quantline.evaluation.speed.vllm_bench import Subject as Measured
from quantline.lifecycle.tracking import registry
from quantline.lifecycle.tracking.reader import read_run, tracking_of
from quantline.pipeline.compose import compose_values
from quantline.pipeline.config import Config, parse, with_current_names
from quantline.pipeline.identity import differing, file_hashes
from quantline.pipeline.overrides import key_of
from quantline.pipeline.paths import MANUAL_HOME
from quantline.pipeline.records import variant_record
from quantline.pipeline.server import options_of, proven_flags
from quantline.pipeline.stages import is_baseline
from quantline.serving.command import SERVED_NAME, ServerOptions
from quantline.serving.ports import require_free
from quantline.serving.rules import checkpoint_facts, here, verdict

# Below scratch/: the logs of servers, and the files of promoted variants. No run has a name that begins with a dot.
HOME = f"{MANUAL_HOME}/.serve"
DEFAULT_PORT = 8000
# The sections of the configuration that this command reads from the command line.
READS = ("serve", "device", "toolchains", "tracking")
_MODEL_CODE = "model.trust_remote_code"


@dataclass(frozen=True)
class Typed:
    """The command line: the composed configuration as plain values, and the overrides that the user gave."""

    values: Mapping[str, Any]
    overrides: Sequence[str]


@dataclass(frozen=True)
class Subject:
    """A checkpoint to serve.

    name: under which requests ask for it. config: of the variant, with what the command line changes. proven: serve_smoke
    served it with this configuration; False for a folder of unknown origin. flags: by which it did, on the device
    `device`; None if the command line asks for others, or they were not noted.
    """

    name: str
    folder: Path
    config: Config
    proven: bool
    flags: tuple[str, ...] | None = None
    device: str = ""


def subject_of(root: Path, arguments: Mapping[str, str | None], typed: Typed) -> Subject:
    """What the command line asks for.

    arguments: `variant`, `alias` with or without `model`, or `folder`.

    Raises:
        UserError: none or several of them are given, there is no such thing, its files were changed, it was not served by
            serve_smoke, or an override is given that serving does not read.
        TrackingError: MLflow does not answer.
    """
    given = [f"{name}={arguments[name]}" for name in ("variant", "alias", "folder") if arguments.get(name)]
    if len(given) != 1:
        shown = f"{' '.join(given)}: are several" if given else "nothing to serve is given"
        raise UserError(f"{shown}; give variant=NAME, alias=NAME, or the folder of a checkpoint")
    folder = arguments.get("folder")
    _refuse_unread(typed.overrides, (*READS, _MODEL_CODE) if folder else READS)
    if folder:
        return _of_folder(root, folder, typed)
    if arguments.get("alias"):
        return _of_alias(root, str(arguments["alias"]), arguments.get("model"), typed)
    return _of_variant(root, str(arguments["variant"]), typed)


def options_for(subject: Subject, version: str, device: str, port: int) -> tuple[ServerOptions, str]:
    """How a subject is served here, and a note; empty if there is nothing to say.

    Args:
        subject: what is served.
        version: of vLLM.
        device: `cpu` or `cuda`.
        port: of the server; 0 takes a free one.

    Raises:
        UserError: this vLLM or this machine does not serve it (a folder is tried all the same), the model takes fewer tokens
            than asked for, or the port is taken.
    """
    facts, model = checkpoint_facts(subject.folder), read_config(subject.folder)
    positions = dimensions(model).positions
    options = options_of(subject.config, device, quantized=facts.method != "float", model=model)
    if positions and options.max_model_len and options.max_model_len > positions:
        raise UserError(f"serve.max_model_len={options.max_model_len}: the model takes at most {positions} tokens")
    if port:
        require_free(options.process.host, port, "give port=NUMBER, 0 for a free one")
    shared = subject.config.serve.process.enable_prefix_caching  # which is off only where answers are measured
    process = options.process.model_copy(update={"port": port or None, "enable_prefix_caching": shared})
    flags = subject.flags if subject.device == device and not shared else None
    runtime = runtime_of(facts.method)
    options = replace(options, process=process, name=subject.name, proven=flags, runtime=runtime)
    ruling = verdict(here(options.runtime, version, device, options.dtype), facts)
    if ruling.supported:
        return options, ""
    if subject.proven:
        raise UserError(f"{subject.name}: {ruling.reason}; {ruling.remedy}, {_anyway(subject.folder)}")
    return options, f"{ruling.reason}; {ruling.remedy}"


def serve_overrides(typed: Typed) -> list[str]:
    """What the command line changes of how it is served."""
    return [override for override in typed.overrides if key_of(override).lstrip("~").startswith("serve")]


def settings_of(
    root: Path, arguments: Mapping[str, str | None], typed: Typed
) -> tuple[tuple[Subject, Subject], SpeedConfig]:
    """One checkpoint as it is served and with what the command line changes of that, and what to measure.

    Raises:
        UserError: as for `subject_of`, the command line changes nothing, or nothing would be measured.
    """
    plan = SpeedConfig.model_validate(typed.values["speed"])
    changes = serve_overrides(typed)
    if not changes:
        raise UserError("there is nothing to compare; give options of serve, such as serve.process.max_num_seqs=1")
    if "serve" not in plan.tools:
        raise UserError(f"speed.tools={list(plan.tools)}: nothing would be compared; give speed=short or speed=sweep")
    others = [override for override in typed.overrides if key_of(override).lstrip("~").partition(".")[0] != "speed"]
    plain = [override for override in others if override not in changes]
    before = subject_of(root, arguments, replace(typed, overrides=plain, values=_default_serve(root, typed.values)))
    return (before, subject_of(root, arguments, replace(typed, overrides=others))), plan


def measured_settings(pair: tuple[Subject, Subject], version: str, device: str) -> tuple[Measured, Measured]:
    """The two settings as the subjects of a measurement; the first takes the place of the float model.

    Raises:
        UserError: as for `options_for`.
    """
    found = []
    for label, subject in zip(("float", "variant"), pair, strict=True):
        options, _ = options_for(subject, version, device, 0)
        found.append(Measured(label, subject.folder, replace(options, name=SERVED_NAME, proven=None)))
    return found[0], found[1]


def port_of(text: str | None, config: Config) -> int:
    """The port to serve on, by the command's own option, else by the configuration, else 8000; 0 is a free one.

    Raises:
        UserError: it is no port.
    """
    if text is None:
        return config.serve.process.port or DEFAULT_PORT
    if not text.isdecimal() or int(text) > 65535:
        raise UserError(f"port={text}: give a number from 1 to 65535, or 0 for a free one")
    return int(text)


def curl_line(url: str, subject: Subject) -> str:
    """A line of a shell that asks the served model something, by the chat API where it has a chat template."""
    smoke = subject.config.serve.smoke
    asked: dict[str, Any]
    if has_chat_template(subject.folder):
        question = (smoke.chat_prompts or smoke.prompts)[0]
        path, asked = "chat/completions", {"messages": [{"role": "user", "content": question}]}
    else:
        path, asked = "completions", {"prompt": smoke.prompts[0]}
    body = json.dumps({"model": subject.name, **asked, "max_tokens": 32}, ensure_ascii=False)
    return shlex.join(["curl", f"{url}/v1/{path}", "-H", "Content-Type: application/json", "-d", body])


def _of_variant(root: Path, name: str, typed: Typed) -> Subject:
    record = variant_record(root, name)
    results = {str(result["stage"]): result for result in record.results}
    config = parse(record.config)
    stage = "download" if is_baseline(config) else "convert"
    folder = record.outputs.get(stage)
    if folder is None:
        raise UserError(f"variant={name}: has no result of {stage} that is up to date; run: {record.remedy(stage)}")
    model = folder / "model" if stage == "download" else folder
    _refuse_unserved(f"variant={name}", results.get("serve_smoke"), record.remedy("serve_smoke"), model)
    if changed := differing(results[stage]["outputs"], file_hashes(folder) if folder.is_dir() else {}):
        raise UserError(f"{folder / changed[0]}: differs from the output of {stage}; run: {record.restoring(stage)}")
    noted = _noted(results["serve_smoke"], typed)
    return Subject(record.name, model, _as_typed(config, typed), proven=True, **noted)


def _of_alias(root: Path, alias: str, model: str | None, typed: Typed) -> Subject:
    tracking = tracking_of(typed.values, typed.overrides, root)
    everything = registry.versions(tracking, root)
    models = sorted({item.model for item in everything})
    if model is not None and model not in models:
        known_models = f"{', '.join(models) or 'none'}{nearest(model, models)}"
        raise UserError(f"model={model}: no registered model has this name; there are {known_models}")
    listed = [item for item in everything if model in (None, item.model)]
    held = [item for item in listed if alias in item.aliases]
    if len(held) != 1:
        known = sorted(f"{item.model}@{name}" for item in listed for name in item.aliases)
        if held:
            raise UserError(f"alias={alias}: {', '.join(item.model for item in held)} have it; give model=NAME")
        raise UserError(f"alias={alias}: no variant has it; there are {', '.join(known) or 'no aliases'}")
    run = read_run(tracking, root, held[0].run_id)
    version, folder = registry.kept(tracking, root, held[0].model, alias, root / HOME)
    shown = f"{version.model}@{alias}"
    _refuse_unserved(shown, run.results.get("serve_smoke"), "dvc repro, then promote it again", folder)
    config = parse(with_current_names(run.config))
    return Subject(run.name, folder, _as_typed(config, typed), proven=True, **_noted(run.results["serve_smoke"], typed))


def _of_folder(root: Path, given: str, typed: Typed) -> Subject:
    folder = Path(given).expanduser().absolute()
    if not (folder / "config.json").is_file():
        known = [path.parent.parent.name for path in root.glob("artifacts/*/convert/config.json")]
        hint = f" (did you mean variant={given}?)" if given in known else nearest(given, known)
        raise UserError(f"{given}: is no folder of a checkpoint, it has no config.json{hint}")
    asked = dict(typed.values["serve"])
    length = asked.pop("max_model_len")
    # The length is checked against this model alone, not against what an evaluation would need.
    config = parse({**typed.values, "serve": {**asked, "max_model_len": "auto"}})
    name = folder.parent.name if folder.name in ("convert", "model") else folder.name
    return Subject(name, folder, _with_length(config, length), proven=False)


def _default_serve(root: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The composed values with the section `serve` as conf/ has it."""
    return {**values, "serve": compose_values(root / "conf", [])["serve"]}


def _refuse_unread(overrides: Sequence[str], reads: Sequence[str]) -> None:
    for override in overrides:
        key = key_of(override).lstrip("~").partition("@")[0]
        if not any(key == known or key.startswith(f"{known}.") for known in reads):
            raise UserError(
                f"{override}: serving does not read {key}; name what to serve by variant=NAME, alias=NAME or a folder, and "
                f"give options of {', '.join(reads)}"
            )


def _refuse_unserved(shown: str, served: Mapping[str, Any] | None, remedy: str, folder: Path) -> None:
    if served is None:
        raise UserError(f"{shown}: no result of serve_smoke is up to date; run: {remedy}; {_anyway(folder)}")
    if served["status"] != "ok":
        raise UserError(f"{shown}: serve_smoke found that it is not served: {served['reason']}; {_anyway(folder)}")


def _noted(served: Mapping[str, Any], typed: Typed) -> dict[str, Any]:
    """The flags that serve_smoke noted and their device; nothing if the command line changes how it is served."""
    if serve_overrides(typed):
        return {}
    return {"flags": proven_flags(served), "device": str(served["environment"]["device"])}


def _anyway(folder: Path) -> str:
    return f"or to try it all the same: python -m stages.serve {shlex.quote(str(folder))}"


def _as_typed(config: Config, typed: Typed) -> Config:
    """A variant's configuration with what the command line says of serving and of this machine."""
    serve: dict[str, Any] = config.serve.model_dump()
    length = serve["max_model_len"]
    for override in typed.overrides:
        key = key_of(override).lstrip("~")
        if key == "serve.max_model_len":
            length = typed.values["serve"]["max_model_len"]
        elif key.startswith("serve."):
            *inner, last = key.split(".")[1:]
            place, source = serve, typed.values["serve"]
            for part in inner:
                place, source = place.setdefault(part, {}), source[part]
            place[last] = source[last]
    values = {"serve": {**serve, "max_model_len": "auto"}, "device": typed.values["device"]}
    checked = parse({**config.model_dump(), **values, "toolchains": typed.values["toolchains"]})
    return _with_length(checked, length)


def _with_length(config: Config, length: object) -> Config:
    if length == "auto":
        length = automatic(config)
    if not isinstance(length, int) or length < 16:
        raise UserError(f"serve.max_model_len={length}: give 16 tokens or more, or auto")
    return config.model_copy(update={"serve": config.serve.model_copy(update={"max_model_len": length})})
