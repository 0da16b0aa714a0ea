"""Why a variant does not load, lost accuracy, or is slow: the cause and the remedy, from what is recorded of it.

The files are hashed again and the rules of the server are asked for this machine. Everything else is in the results and logs
of its stages. Where nothing is found, that is said: it is no proof that nothing is wrong.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from quantline.checkpoints.model_config import read_config
from quantline.core.errors import QuantlineError
from quantline.core.files import replaced, sha256_of
from quantline.core.gpu import visible_gpus
from quantline.core.secrets import Scrubber
from quantline.core.text import binary_size, percent
from quantline.lifecycle.fleet import HOME, weight_bytes
from quantline.lifecycle.serve import HOME as SERVE_LOGS
from quantline.pipeline.config import Config, parse
from quantline.pipeline.identity import differing, file_hashes
from quantline.pipeline.paths import PIPELINE_HOME
from quantline.pipeline.records import VariantRecord, by_stage
from quantline.pipeline.server import options_of
from quantline.pipeline.stages import is_baseline
from quantline.planning.placement import need_of
from quantline.serving.memory import GIB
from quantline.serving.rules import checkpoint_facts, here, verdicts
from quantline.serving.server_log import failure_reason, kernels
from quantline.toolchains.environments import (
    environment_folder,
    environment_state,
    expected_version,
    lock_file,
    usable_platform,
)

LOADING, ACCURACY, SPEED = "does not load", "lost accuracy", "slow"
TROUBLES = (LOADING, ACCURACY, SPEED)
# Alarms of an evaluation, by what they mean together.
_OTHER_FILES = {"changed_files", "weight_error_change", "output_error_change"}
_ONE_LINEAR = {"output_error_outlier", "restored_share"}
# Alarm of a method that is worse than plain rounding on samples that it did not see.
_TEXT = "rounding_ratio"
_LOG_LINES = 400


@dataclass(frozen=True)
class Cause:
    """Something that was found. trouble: one of `TROUBLES`; fact: what was seen; remedy: what to do."""

    trouble: str
    cause: str
    fact: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """causes: what was found; facts: what was looked at, by name, for a reader and for the bundle."""

    variant: str
    causes: tuple[Cause, ...]
    facts: Mapping[str, Any]


def examine_variant(root: Path, record: VariantRecord) -> Report:
    """Look at a variant."""
    config = parse(record.config)
    results = by_stage(record.results)
    stage = "download" if is_baseline(config) else "convert"
    output = record.outputs.get(stage)
    folder = output / "model" if output is not None and stage == "download" else output
    device = usable_platform("auto")
    version = expected_version(root, "vllm", device)[0]
    facts: dict[str, Any] = {"device": device, "vllm": version, "folder": str(folder) if folder else None}
    causes = list(_missing(record, results))
    if folder is None or not (folder / "config.json").is_file():
        causes.append(
            Cause(LOADING, "there are no files", f"no output of {stage} is here", f"run: {record.restoring(stage)}")
        )
    else:
        causes += _files(record, results, stage, output or folder)
        causes += _rules(folder, config, version, device, facts)
        causes += _memory(record.name, folder, config, device, facts)
    causes += _environment(root, device)
    causes += _logs(root, record.name, facts)
    causes += _accuracy(record, results, facts)
    causes += _speed(root, record, config, results, facts)
    return Report(record.name, tuple(causes), facts)


def _missing(record: VariantRecord, results: Mapping[str, Mapping[str, Any]]) -> Iterator[Cause]:
    served = results.get("serve_smoke")
    if served is None:
        remedy = f"run: {record.remedy('serve_smoke')}"
        yield Cause(LOADING, "it was never served", "no result of serve_smoke is up to date", remedy)
    elif served.get("status") != "ok":
        yield Cause(
            LOADING, "vLLM does not serve it", str(served.get("reason")), "change the variant as the reason says"
        )
    if "evaluate" not in results:
        remedy = f"run: {record.remedy('evaluate')}"
        yield Cause(ACCURACY, "it was never evaluated", "no result of evaluate is up to date", remedy)


def _files(
    record: VariantRecord, results: Mapping[str, Mapping[str, Any]], stage: str, output: Path
) -> Iterator[Cause]:
    changed = differing((results.get(stage) or {}).get("outputs") or {}, file_hashes(output))
    if changed:
        yield Cause(
            LOADING, "its files are not those that were made", f"{', '.join(map(str, changed[:5]))} differ from the record",
            f"run: {record.restoring(stage)}",
        )  # fmt: skip


def _rules(folder: Path, config: Config, version: str, device: str, facts: dict[str, Any]) -> Iterator[Cause]:
    try:
        found = checkpoint_facts(folder)
    except QuantlineError as error:
        yield Cause(LOADING, "its checkpoint is damaged", str(error), "make it again")
        return
    facts["checkpoint"] = asdict(found)
    options = options_of(config, device, quantized=found.method != "float", model=read_config(folder))
    for ruling in verdicts(here(options.runtime, version, device, options.dtype), found):
        yield Cause(LOADING, "this server does not serve it on this machine", ruling.reason, ruling.remedy)


def _memory(name: str, folder: Path, config: Config, device: str, facts: dict[str, Any]) -> Iterator[Cause]:
    process = config.serve.process
    cache = None if process.kv_cache_gib is None else int(process.kv_cache_gib * GIB)
    need = need_of(
        name, read_config(folder), weight_bytes(folder), context=config.serve.length, cache_bytes=cache,
        ranks=process.tensor_parallel_size, device=device,
    )  # fmt: skip
    gpus = visible_gpus() if device == "cuda" else []
    free = max(
        (gpu.memory_total_bytes - gpu.memory_used_bytes for gpu in gpus), default=psutil.virtual_memory().available
    )
    facts["memory"] = {"needed": need.each, "free": free}
    if need.each > free:
        yield Cause(
            LOADING, "the memory is too small", f"it needs {binary_size(need.each)}, {binary_size(free)} are free",
            "end what else runs, or lower serve.process.kv_cache_gib or serve.max_model_len",
        )  # fmt: skip


def _environment(root: Path, device: str) -> Iterator[Cause]:
    lock = lock_file(root, "vllm", device)
    if environment_state(environment_folder(root, "vllm", device)) != sha256_of(lock):
        yield Cause(
            LOADING, "vLLM's environment is not built", f".venvs/{lock.stem} is missing or of another lock",
            "the next stage that serves builds it; or set toolchains.vllm=PATH",
        )  # fmt: skip


def _own_logs(root: Path, name: str) -> list[Path]:
    plain = name.replace("/", "-")
    found = [*(root / SERVE_LOGS).glob(f"{plain}-*.log"), *(root / SERVE_LOGS).glob(f"chat-{plain}.log")]
    for state in (root / HOME).glob("*"):
        found += [path for ending in ("", ".previous") if (path := state / "logs" / f"{plain}{ending}.log").is_file()]
    found += (root / PIPELINE_HOME / name).glob("*.log")
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _logs(root: Path, name: str, facts: dict[str, Any]) -> Iterator[Cause]:
    """The reason in the newest log of a server that did not become ready."""
    servers = [path for path in _own_logs(root, name) if path.parent != root / PIPELINE_HOME / name]
    if not servers:
        return
    newest = servers[-1]
    text = newest.read_text(encoding="utf-8", errors="replace")
    facts["newest_server_log"] = str(newest)
    if "Application startup complete" not in text and ("Error" in text or "error:" in text):
        yield Cause(
            LOADING, "its last start failed", failure_reason(newest), f"see {newest}; the other findings may say why"
        )


def _accuracy(
    record: VariantRecord, results: Mapping[str, Mapping[str, Any]], facts: dict[str, Any]
) -> Iterator[Cause]:
    evaluated = results.get("evaluate") or {}
    measured = dict(evaluated.get("metrics") or {})
    keys = ("nll_difference", "kl_divergence", "top1_agreement", "alarms", "engine_relative_difference")
    facts["accuracy"] = {key: measured[key] for key in keys if key in measured}
    flags = {str(row["instrument"]): str(row["message"]) for row in (evaluated.get("tables") or {}).get("flags") or []}
    if other := [flags[name] for name in flags if name in _OTHER_FILES]:
        yield Cause(
            ACCURACY, "the weights are not those that were quantized", "; ".join(other),
            f"run: {record.restoring('convert')}",
        )  # fmt: skip
    worst = _worst_linear(evaluated)
    if one := [flags[name] for name in flags if name in _ONE_LINEAR]:
        yield Cause(
            ACCURACY, f"one linear is damaged or badly quantized{f': {worst}' if worst else ''}", "; ".join(one),
            "quantize again with another seed or more samples; or keep it float by a rule of `layers`",
        )  # fmt: skip
    if _TEXT in flags:
        yield Cause(
            ACCURACY, "the calibration text does not suit the model", flags[_TEXT],
            "calibrate on text of its own kind, calibration=self or calibration=jsonl; or take method=rtn",
        )  # fmt: skip
    rest = [message for name, message in flags.items() if name not in _OTHER_FILES | _ONE_LINEAR | {_TEXT}]
    if rest and not other and not one and _TEXT not in flags:
        yield Cause(
            ACCURACY, "too few bits for this model, everywhere", "; ".join(rest),
            "smaller groups (group_size=64), more bits, or another method; python -m stages.plan recommends some",
        )  # fmt: skip
    elif rest:
        yield Cause(ACCURACY, "the answers differ more than allowed", "; ".join(rest), "mend the other findings first")


def _worst_linear(evaluated: Mapping[str, Any]) -> str:
    rows = (evaluated.get("tables") or {}).get("restored") or []
    shares = [(float(row.get("recovered_kl_share") or 0), str(row.get("name") or "")) for row in rows]
    return max(shares, default=(0.0, ""))[1]


def _speed(
    root: Path, record: VariantRecord, config: Config, results: Mapping[str, Mapping[str, Any]], facts: dict[str, Any]
) -> Iterator[Cause]:
    measured = dict((results.get("speed") or {}).get("metrics") or {})
    ratios = {key: value for key, value in measured.items() if key.startswith("speed_up")}
    facts["speed"] = ratios or "not measured"
    logs = [path for path in _own_logs(root, record.name) if "serve" in path.name or path.parent.name == "logs"]
    used = kernels(logs[-1].read_text(encoding="utf-8", errors="replace")) if logs else []
    facts["kernels"] = used
    slow = any(value < 1 for value in ratios.values())
    if logs and not used and not is_baseline(config):
        yield Cause(
            SPEED, "no kernel for quantized weights ran", f"{logs[-1].name} names none",
            "check the memory of the weights in the log: vLLM may have loaded them as float; convert again",
        )  # fmt: skip
    if config.serve.process.cpu_offload_gib:
        yield Cause(
            SPEED, "weights in main memory", f"serve.process.cpu_offload_gib={config.serve.process.cpu_offload_gib:g}",
            "set it to 0 where the GPU has room",
        )  # fmt: skip
    busy = _busy_before(results.get("speed") or results.get("serve_smoke") or {})
    if busy:
        yield Cause(SPEED, "something else used the machine", busy, "measure again on an idle machine")
    if slow and not busy:
        worst = min(ratios, key=lambda key: ratios[key])
        yield Cause(
            SPEED, "4-bit kernels do not pay off here", f"{worst} is {ratios[worst]:.2f} of float's",
            "small models and large batches compute more than they read: serve the float model or 8 bits at that load",
        )  # fmt: skip


def _busy_before(result: Mapping[str, Any]) -> str:
    """A sentence if much memory was in use before the stage began."""
    before = (result.get("monitor") or {}).get("before") or {}
    total, used = before.get("system_memory_total_bytes"), before.get("system_memory_used_bytes")
    if total and used and used / total > 0.8:
        return f"{percent(used / total, 0)} of the memory was in use before the stage began"
    return ""


def as_lines(report: Report) -> list[str]:
    """The report for a terminal."""
    shown = {"kernels": report.facts.get("kernels") or "unknown", "speed": report.facts.get("speed")}
    lines = [f"{report.variant}, {report.facts['device']}, vLLM {report.facts['vllm']}"]
    lines += [f"  {key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in shown.items()]
    for trouble in TROUBLES:
        own = [cause for cause in report.causes if cause.trouble == trouble]
        lines.append(f"{trouble}: {'nothing found' if not own else ''}".rstrip())
        for cause in own:
            lines += [f"  {cause.cause}", f"    seen: {cause.fact}", f"    do:   {cause.remedy}"]
    return lines


def bundle(root: Path, record: VariantRecord, report: Report, path: Path) -> Path:
    """Write a ZIP file for a report of a bug: findings, results and the ends of logs; no weights, no secrets.

    Returns:
        The file.
    """
    scrub = Scrubber(str((record.config.get("tracking") or {}).get("uri") or ""))

    def text(value: Any) -> str:
        return json.dumps(scrub.value(json.loads(json.dumps(value, default=str))), indent=1, sort_keys=True)

    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("report.json", text(asdict(report)))
        file.writestr("config.json", text(dict(record.config)))
        file.writestr("commit.txt", f"{record.commit}{' with changes' if record.dirty else ''}\n")
        for result in record.results:
            file.writestr(f"results/{result['stage']}.json", text(result))
        for log in _own_logs(root, record.name)[-8:]:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
            file.writestr(f"logs/{'-'.join(log.relative_to(root).parts)}", scrub("\n".join(lines)))
    return path
