"""A variant's model card: README.md with the hub's header, for a folder or repository that leaves the project.

The figures are those of the report, from the same tables. Paths of this machine are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from quantline import __version__
from quantline.core.errors import UserError
from quantline.core.secrets import Scrubber
from quantline.core.text import as_configured
from quantline.data.licence import OTHER, UNKNOWN, Licence, licence_of
from quantline.pipeline.config import Config, parse
from quantline.pipeline.records import VariantRecord
from quantline.pipeline.server import proven_line
from quantline.pipeline.stages import STAGES, is_baseline
from quantline.report import run_tables, tables
from quantline.report.evidence import Evidence, gather
from quantline.report.markdown import escaped, grid
from quantline.report.units import MISSING, written

# Columns of the report's tables that say what the variant is, which the card says in words.
_SAID = ("variant", "bits", "alarms", "served")


@dataclass(frozen=True)
class Card:
    """What a card says of a variant beside its results.

    model: what `vllm serve` is given: a repository on the hub, or `.` for the card's own folder. faults: the gates of
    promotion that it fails, a sentence each. run_id: of its run in MLflow, if it has one.
    """

    config: Config
    licence: Licence
    model: str
    faults: Sequence[str]
    run_id: str | None = None


def card_of(record: VariantRecord, *, model: str, faults: Sequence[str], run_id: str | None = None) -> str:
    """The card of a variant, Markdown.

    Args:
        record: of the variant, with its current results. What was not measured is said to be so.
        model: what `vllm serve` is given: a repository on the hub, or `.` for the card's own folder.
        faults: the gates of promotion that it fails, a sentence each.
        run_id: of its run in MLflow.

    Raises:
        UserError: it is the float model.
    """
    config = parse(record.config)
    if is_baseline(config):
        raise UserError(f"variant={record.name}: is the float model itself; give a quantized variant")
    download = record.outputs.get("download")
    licence = licence_of(config.model, None if download is None else download / "model")
    (item,) = gather([record], record.folder / "artifacts")
    about = Card(config, licence, model, faults, run_id)
    return Scrubber()("\n".join([*_header(item, about), *_body(item, about)]).rstrip() + "\n")


def _header(item: Evidence, about: Card) -> Iterator[str]:
    """The metadata by which the hub files the model: its base, its licence, its tags."""
    config, licence = about.config, about.licence
    served = item.summary["served"]
    values: dict[str, Any] = {}
    if config.model.repo:
        values |= {"base_model": config.model.repo, "base_model_relation": "quantized"}
    values["license"] = licence.name
    values |= {
        key: value for key, value in (("license_name", licence.own_name), ("license_link", licence.link)) if value
    }
    library = "gguf" if item.proof.get("target") == "gguf" else "vllm"
    values |= {"library_name": library} if served else {}
    values["pipeline_tag"] = "text-generation"
    layout = str(item.proof.get("target") or "")
    tags = ["quantline", config.method.name, f"{config.bits}-bit", layout, library if served else ""]
    values["tags"] = list(dict.fromkeys(tag for tag in tags if tag))
    yield from ("---", yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(), "---", "")


def _body(item: Evidence, about: Card) -> Iterator[str]:
    yield from (f"# {_base(about.config)}, {_method(about.config)}", "")
    yield f"The variant `{item.name}` of {_base(about.config)}, made and measured with Quantline {__version__}."
    yield from ("", *(f"- **{label}**: {text}" for label, text in _facts(item, about)))
    yield from ("", "## Beside the float model", "", *_figures(item, about.config))
    yield from ("", "## How to serve it", "", *_serving(item, about))
    yield from ("", "## How it was proven", "", *(f"- {line}" for line in _proofs(item, about)))


def _base(config: Config) -> str:
    from quantline.data.download import spoken_name

    return spoken_name(config.model.model_dump())


def _method(config: Config) -> str:
    group = "one group a channel" if config.group_size == -1 else f"groups of {config.group_size}"
    return f"{config.method.name.upper()} with {config.bits} bits, {group}"


def _facts(item: Evidence, about: Card) -> Iterator[tuple[str, str]]:
    config, licence = about.config, about.licence
    revision = f" at commit `{config.model.revision}`" if config.model.revision and config.model.repo else ""
    yield "Base model", f"`{config.model.repo}`{revision}" if config.model.repo else f"`{_base(config)}`, a folder"
    if licence.name == UNKNOWN:
        yield (
            "Licence",
            "not known: neither the base model's card nor a file of it says one. Find out before you share it.",
        )
    else:
        name = licence.own_name or licence.name if licence.name == OTHER else licence.name
        yield (
            "Licence",
            f"{escaped(name)}, as {escaped(licence.said_by)} says"
            + (f" ([text]({licence.link}))" if licence.link else ""),
        )
    settings = {key: value for key, value in config.method.model_dump().items() if key != "name" and value is not None}
    backend = (item.results.get("quantize", {}).get("environment") or {}).get("backend") or config.backend
    shown = ", ".join(f"{key}={as_configured(value)}" for key, value in settings.items())
    yield "Method", f"{_method(config)}, by {backend}" + (f" ({shown})" if shown else "")
    if config.layers.rules:
        yield "Exceptions", f"{len(config.layers.rules)} rules for single linears (other bits, or float)"
    if item.proof.get("target"):
        yield "Layout", f"{item.proof['target']}, safetensors"
    yield "Calibration", _calibration(config)


def _calibration(config: Config) -> str:
    if STAGES["calibrate"].skipped(config):
        return "none, the method needs no text"
    text = config.calibration
    sources = []
    for name, source in text.sources.items():
        public = source.repo if not source.path else None
        sources.append(f"`{name}`" + (f" (`{public}` at `{source.revision}`, {source.file})" if public else ""))
    return f"{text.n_samples} samples of {text.seq_len} tokens from {', '.join(sources)}, seed {text.seed}"


def _figures(item: Evidence, config: Config) -> Iterator[str]:
    measured = item.metrics("evaluate")
    if not measured:
        yield "Not measured: the variant was not evaluated."
        return
    tokens, documents = (written(measured.get(key), "count") for key in ("tokens_scored", "documents"))
    yield f"Both models scored the same {tokens} tokens of {documents} documents. Intervals are of {_level(config)} %."
    shown: dict[str, str] = {}
    for table in (tables.variants([item]), tables.quality([item]), tables.generations([item])):
        for column in table.columns:
            if column.key not in _SAID and (text := column.text(table.rows[0])) != MISSING:
                shown.setdefault(column.label, text)
    yield from ("", "| figure | value |", "|---|---|", *(f"| {key} | {escaped(text)} |" for key, text in shown.items()))
    for table in (tables.tasks([item]), run_tables.speed_ratios([item])):
        if table.page_rows:
            yield from ("", table.caption, "", grid(table.columns[1:], table.page_rows))
    yield ""
    if item.flags is None:
        yield "Alarms: not checked."
    else:
        yield "Alarms: none." if not item.flags else "Alarms:"
        yield from (f"- {escaped(str(flag.get('message')))}" for flag in item.flags)


def _level(config: Config) -> str:
    return f"{100 * config.evaluate.bootstrap.level:g}"


def _serving(item: Evidence, about: Card) -> Iterator[str]:
    served: Mapping[str, Any] = item.results.get("serve_smoke", {})
    line = proven_line(about.config, served, item.record.outputs.get("convert"), about.model)
    if line is None:
        reason = escaped(str(served.get("reason") or "serving was not tried"))
        yield f"It was not served: {reason}."
        return
    environment = served["environment"]
    versions = environment.get("versions") or {}
    if "vllm" not in versions:
        yield from ("```sh", line, "```", "")
        yield f"llama.cpp, as in xllamacpp {versions.get('xllamacpp', '')}, served it when it was measured."
        return
    version = versions["vllm"]
    yield from ("```sh", line, "```", "")
    yield f"By this line vLLM {version} on {environment['device']} served it when it was measured.".replace("  ", " ")
    yield "`--kv-cache-memory-bytes` and `--gpu-memory-utilization` are the machine's: set them, or leave them out."
    yield "`--no-enable-prefix-caching` and `--enforce-eager` keep answers comparable, and are slower."


def _proofs(item: Evidence, about: Card) -> Iterator[str]:
    quantize, counts = item.metrics("quantize"), item.proof.get("counts") or {}
    if quantize.get("linears_expected") is not None:
        linears = (
            f"{written(quantize.get('linears_quantized'), 'count')} of {written(quantize['linears_expected'], 'count')}"
        )
        worst = quantize.get("output_error_max")
        error = f", each compared with its float layer; the largest output error is {written(worst, 'nats')}"
        yield f"{linears} linears were quantized{error if worst is not None else ''}."
    if counts:
        yield (
            f"Conversion: codes and zero points of {counts['linears']} linears equal on the disk, "
            f"{counts['carried_tensors']} tensors carried over with equal SHA-256 (`conversion_proof.json`)."
        )
    gap = item.metrics("evaluate").get("engine_relative_difference")
    if gap is not None:
        yield f"Served and reference engine score the text alike: their perplexities differ by {100 * gap:.2g} %."
    yield (
        "It passes every gate of promotion."
        if not about.faults
        else "It FAILS these gates of promotion: "
        + "; ".join(escaped(fault.partition("; run")[0]) for fault in about.faults)
    )
    if convert := item.results.get("convert"):
        yield f"The hash over its files is `{convert['output_hash']}`."
    if item.record.commit:
        yield f"Code: commit `{item.record.commit}`{' with changes' if item.record.dirty else ''}."
    if about.run_id:
        yield f"MLflow run `{about.run_id}` holds its configuration and results; `python -m stages.rebuild` makes it again."
