"""MLflow's model registry: promoted variants, with their files, conversion proof, evaluation and lineage.

A version's files are artifacts of the variant's run, so that any client of the server can download them. Their hashes are
in `registry/files.json`, which is uploaded last. An interrupted upload does not have it and is restarted; a complete
upload is not repeated.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tabulate

from quantline.checkpoints.model_files import CARD
from quantline.config.tracking import TrackingConfig
from quantline.core.errors import TrackingError, UserError
from quantline.core.files import building
from quantline.lifecycle.tracking import schema
from quantline.lifecycle.tracking.reader import artifact, connected
from quantline.lifecycle.tracking.store import locked, resolve_uri, sqlite_path
from quantline.pipeline.identity import file_hashes
from quantline.pipeline.inputs import command_for
from quantline.pipeline.paths import BY_HAND

FILES, MODEL = "registry/files.json", "model"
# A version's `vllm serve` line, for the folder of its files.
SERVING_TAG = "quantline.serve"
# Each file is one request, and a file can have gigabytes.
TRANSFER_SECONDS = 3600.0


@dataclass(frozen=True)
class Promotion:
    """What to register.

    model: name of the registered model. run_id: the variant's run, current and complete. checkpoint: the converted model.
    files: path below it -> SHA-256, as the convert stage recorded. tags: of the version. documents: name -> text, kept with
    the run under registry/. description: of the version.
    """

    model: str
    variant: str
    run_id: str
    checkpoint: Path
    files: Mapping[str, str]
    tags: Mapping[str, str]
    documents: Mapping[str, str]
    description: str


@dataclass(frozen=True)
class Promoted:
    """The version that has the alias now. uploaded: bytes; 0 if the server already had the files."""

    model: str
    version: str
    created: bool
    uploaded: int
    before: str | None


@dataclass(frozen=True)
class Version:
    """A version of a registered model, for the list."""

    model: str
    version: str
    aliases: tuple[str, ...]
    run_id: str
    tags: dict[str, str]


def promote(
    tracking: TrackingConfig, root: Path, what: Promotion, alias: str, *, upload_again: bool = False
) -> Promoted:
    """Upload a variant's checkpoint if the server does not have it, register it, and move the alias to it.

    upload_again: also where the server has it by its list, such as with a file that was damaged there.

    Raises:
        UserError: the checkpoint differs from its recorded hashes, or the alias is not valid.
        TrackingError: MLflow does not answer.
    """
    found = file_hashes(what.checkpoint)
    changed = sorted(name for name in {*found, *what.files} if found.get(name) != what.files.get(name))
    if changed:
        command = f"dvc checkout --force {os.path.relpath(what.checkpoint, root)}"
        if what.variant.startswith(BY_HAND):
            command = command_for("convert", shlex.split(what.tags.get("quantline.overrides", "")))
        raise UserError(f"{what.checkpoint / changed[0]}: differs from the convert stage's output; run: {command}")
    with connected(tracking, root, timeout_seconds=TRANSFER_SECONDS) as client, _alone(tracking, root):
        uploaded = _upload(client, what, again=upload_again)
        _ensure_model(client, what.model)
        before = _holder(client, what.model, alias)
        same = [item for item in _versions(client, what.model) if item.run_id == what.run_id]
        if same:
            version = same[0].version
            for key, value in what.tags.items():
                if same[0].tags.get(key) != value:
                    client.set_model_version_tag(what.model, version, key, value)
            client.update_model_version(what.model, version, what.description)
        else:
            source = f"runs:/{what.run_id}/{MODEL}"
            made = client.create_model_version(
                what.model, source, what.run_id, dict(what.tags), description=what.description
            )
            version = str(made.version)
        if before != version:
            client.set_registered_model_alias(what.model, alias, version)
        return Promoted(what.model, version, not same, uploaded, before if before != version else None)


def check_alias(alias: str) -> None:
    """Refuse a name that MLflow does not accept as an alias.

    Raises:
        UserError: the alias is not valid.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", alias) or re.fullmatch(r"v?[0-9]+|latest", alias, re.IGNORECASE):
        raise UserError(
            f"alias={alias}: use letters, digits, '_' and '-', such as production; not a number and not latest"
        )


def demote(tracking: TrackingConfig, root: Path, variant: str, alias: str, model: str | None = None) -> tuple[str, str]:
    """Remove an alias from a variant; its version stays.

    model: the registered model with the alias; null searches all models.

    Returns:
        name of the registered model, and the version.

    Raises:
        UserError: the variant does not have the alias, or has it in several models; the message names who has it.
    """
    listed = versions(tracking, root)
    held = [item for item in listed if alias in item.aliases and model in (None, item.model)]
    own = [item for item in held if item.tags["quantline.variant"] == variant]
    if len(own) != 1:
        shown = ", ".join(f"{item.tags['quantline.variant']} ({item.model} version {item.version})" for item in held)
        advice = "give model=NAME" if own else "see `python -m stages.registry`"
        raise UserError(f"alias={alias} of {variant}: {shown or 'no variant'} has this alias; {advice}")
    with connected(tracking, root) as client, _alone(tracking, root):
        client.delete_registered_model_alias(own[0].model, alias)
    return own[0].model, own[0].version


def versions(tracking: TrackingConfig, root: Path) -> list[Version]:
    """Every version that Quantline registered, by model, the newest first; empty if nothing was published yet."""
    database = sqlite_path(resolve_uri(tracking.uri, root))
    if database is not None and not database.is_file():
        return []
    with connected(tracking, root) as client:
        models = sorted(str(model.name) for model in _pages(client.search_registered_models))
        return [item for model in models for item in _versions(client, model) if "quantline.variant" in item.tags]


def fetch(tracking: TrackingConfig, root: Path, model: str, alias: str, out: Path) -> Version:
    """Download a registered model by its alias into the new folder `out` and verify every file; its card is added.

    Raises:
        UserError: no such model or alias, or `out` exists.
        TrackingError: MLflow does not answer, or a file differs from the registered one; nothing is left then.
    """
    if out.exists():
        raise UserError(f"out={out}: already exists; give a new folder")
    with connected(tracking, root, timeout_seconds=TRANSFER_SECONDS) as client:
        version = _held(client, model, alias)
        _download(client, version, out)
        return version


def kept(tracking: TrackingConfig, root: Path, model: str, alias: str, home: Path) -> tuple[Version, Path]:
    """The version with an alias and a folder below `home` that has it: fetched once, verified each time.

    Raises:
        UserError: no such model or alias.
        TrackingError: MLflow does not answer, or a file differs from the registered one; nothing is left then.
    """
    with connected(tracking, root, timeout_seconds=TRANSFER_SECONDS) as client:
        version = _held(client, model, alias)
        folder = home / f"{model}-{version.version}"
        files = _files(client, version)
        if not folder.is_dir() or {**file_hashes(folder), CARD: ""} != {**files, CARD: ""}:
            _download(client, version, folder)
        return version, folder


def serving_line(version: Version, folder: Path) -> str | None:
    """The `vllm serve` line of a version for its files in a folder; None for a version of before there was one."""
    words = shlex.split(version.tags.get(SERVING_TAG, ""))
    return shlex.join([*words[:2], str(folder), *words[3:]]) if words else None


def _held(client: Any, model: str, alias: str) -> Version:
    number = _holder(client, model, alias)
    known = {item.version: item for item in _versions(client, model)}
    if number is None or number not in known:
        held = sorted(f"{model}@{name}" for item in known.values() for name in item.aliases)
        raise UserError(f"{model}@{alias}: is not registered; the model has {', '.join(held) or 'no aliases'}")
    return known[number]


def command_about(name: str, version: Version) -> str:
    """A command about a version and its first alias: promote or demote."""
    command = {"promote": "python -m stages.promote", "demote": "python -m stages.demote"}[name]
    return f"{command} variant={version.tags['quantline.variant']} alias={version.aliases[0]}"


def _files(client: Any, version: Version) -> dict[str, str]:
    files: dict[str, str] = json.loads(artifact(client, version.run_id, FILES) or "{}")
    if not files:
        raise UserError(
            f"{version.model} version {version.version}: has no list of files; "
            f"run where it was promoted: {command_about('promote', version)}"
        )
    return files


def _download(client: Any, version: Version, out: Path) -> None:
    files = _files(client, version)
    with building(out) as folder:
        place = Path(client.download_artifacts(version.run_id, MODEL, str(folder)))
        (place / schema.FILE).unlink(missing_ok=True)  # of the registry's page, not of the model
        for path in list(place.iterdir()):
            shutil.move(path, folder / path.name)
        place.rmdir()
        received = file_hashes(folder)
        wrong = sorted(name for name in {*received, *files} if received.get(name) != files.get(name))
        if wrong:
            raise TrackingError(
                f"{wrong[0]} of {version.model} version {version.version} differs from the registered file; "
                f"run where it was promoted: {command_about('promote', version)} upload=again"
            )
        card = artifact(client, version.run_id, f"registry/{CARD}")
        if card is not None and CARD not in files:  # a version of before there were cards has none
            (folder / CARD).write_text(card, encoding="utf-8")


def _alone(tracking: TrackingConfig, root: Path) -> Any:
    return locked(resolve_uri(tracking.uri, root), 60.0)


def _upload(client: Any, what: Promotion, *, again: bool) -> int:
    listed = artifact(client, what.run_id, FILES)
    uploaded = 0
    if again or listed is None or json.loads(listed) != dict(what.files):
        for name in what.files:
            folder, _, _ = f"{MODEL}/{name}".rpartition("/")
            client.log_artifact(what.run_id, str(what.checkpoint / name), folder)
            uploaded += (what.checkpoint / name).stat().st_size
    with tempfile.TemporaryDirectory(prefix="quantline-registry-") as scratch:
        documents = {f"registry/{name}": text for name, text in what.documents.items()}
        documents[f"{MODEL}/{schema.FILE}"] = schema.mlmodel(what.variant, what.run_id, what.tags.get(SERVING_TAG))
        # Last: it marks the upload as complete.
        documents[FILES] = json.dumps(dict(what.files), indent=2, sort_keys=True)
        for name, text in documents.items():
            if artifact(client, what.run_id, name) != text:
                place, _, file = name.rpartition("/")
                Path(scratch, file).write_text(text, encoding="utf-8")
                client.log_artifact(what.run_id, str(Path(scratch, file)), place)
    return uploaded


def _ensure_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name, description=schema.about(name))


def _holder(client: Any, model: str, alias: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(model, alias).version)
    except MlflowException as error:
        # A store answers INVALID_PARAMETER_VALUE for an alias that no version has, and for an invalid alias.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _versions(client: Any, model: str) -> list[Version]:
    aliases: dict[str, list[str]] = {}
    for item in _pages(client.search_registered_models, filter_string=f"name = '{model}'"):
        for alias, number in dict(item.aliases).items():
            aliases.setdefault(str(number), []).append(str(alias))
    found = _pages(client.search_model_versions, filter_string=f"name = '{model}'")
    listed = [
        Version(model, str(item.version), tuple(sorted(aliases.get(str(item.version), []))), str(item.run_id),
                dict(item.tags))
        for item in found
    ]  # fmt: skip
    return sorted(listed, key=lambda item: int(item.version), reverse=True)


def _pages(search: Any, **arguments: Any) -> list[Any]:
    items: list[Any] = []
    token = None
    while True:
        page = search(max_results=200, page_token=token, **arguments)
        items.extend(page)
        token = page.token
        if not token:
            return items


HEADERS = ("model", "version", "aliases", "variant", "fingerprint", "ppl", "Δ ppl at most", "served", "MB")
_MISSING = "-"


def render(versions: Sequence[Version]) -> str:
    """One row per version. Δ ppl at most: upper end of the interval of the increase over float. MB are 10^6 bytes."""
    if not versions:
        return "nothing is registered yet; `python -m stages.promote variant=NAME alias=production` registers a variant"
    return tabulate.tabulate([_row(item) for item in versions], HEADERS, disable_numparse=True)


def _row(item: Version) -> tuple[str, ...]:
    tags = item.tags
    high = _scaled(tags.get("quantline.perplexity_increase_high"), 100, "+.2f")
    return (
        item.model, item.version, " ".join(item.aliases) or _MISSING, tags["quantline.variant"],
        tags.get("quantline.fingerprint", "")[:12], _scaled(tags.get("quantline.perplexity"), 1, ".2f"),
        high if high == _MISSING else f"{high} %", tags.get("quantline.served", _MISSING),
        _scaled(tags.get("quantline.size_bytes"), 1e-6, ".1f"),
    )  # fmt: skip


def _scaled(text: str | None, factor: float, form: str) -> str:
    try:
        return format(float(text or "") * factor, form)
    except ValueError:
        return _MISSING
