"""Search for the variant that meets a goal.

A candidate is an ordinary variant, made by the pipeline's stages and scored by the reference engine beside the float
model. A search that was stopped goes on where it was.

Examples:
    python -m stages.search loss.at_most=0.01 size.at_most_gb=5
    python -m stages.search loss.at_most=0.01 minimize=size methods=gptq,awq apply=best
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, WORK, main

OPTIONS = [
    Option("loss.at_most", "0.01", "growth of the perplexity, relative; met by the upper end of the paired interval"),
    Option("size.at_most_gb", "5", "size of the checkpoint, in 10**9 bytes"),
    Option(
        "memory.at_most_gb", "24", "memory for serving with the KV cache of serve.max_model_len tokens, in 2**30 bytes"
    ),
    Option("minimize", "size", "what to minimize", allowed=("size", "loss")),
    Option("methods", "gptq,rtn", "methods to choose from; gguf has llama.cpp's types", default="gptq,awq,rtn"),
    Option("groups", "64,128", "group sizes to choose from; without it the given group_size"),
    Option("kv_cache", "auto,fp8", "serve.kv_cache_dtype to choose from: the first one that fits memory.at_most_gb"),
    Option("step", "0.25", "bits between two plans by budget", default="0.25"),
    Option("measurements", "20", "candidates to measure at most", default="20"),
    Option("served", "false", "also variants that the server does not take", allowed=("true", "false")),
    Option("measure_speed", "true", "speed of the finalists beside the float model", allowed=("true", "false")),
    Option("apply", "NAME", "write the best variant into params.yaml under this name"),
]

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from omegaconf import DictConfig

    from quantline.pipeline.config import Config
    from quantline.planning.search import Candidate, Found, Goal, Measurement
    from quantline.planning.search_space import Space

READS = (
    "model",
    "group_size",
    "backend",
    "calibration",
    "sensitivity",
    "convert",
    "serve",
    "evaluate",
    "speed",
    "device",
)
_SHARES = (0.125, 0.25, 0.5, 1.0)
_FOLDER = ROOT / "scratch" / "search"


def search(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.lifecycle.publish import publish_search
    from quantline.pipeline.chosen import keep
    from quantline.pipeline.config import parse
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.identity import fingerprint
    from quantline.pipeline.params_file import add_variant, refuse_unwritable
    from quantline.pipeline.paths import PIPELINE_HOME
    from quantline.planning.search import search as find
    from quantline.planning.search_record import search_record
    from quantline.report.choice import write_search
    from stages.allocate import own_line

    goal, most, started = _goal(arguments), _count("measurements", arguments["measurements"]), time.time()
    config = parse(plain(cfg))
    _methods(arguments["methods"])
    _number("step", arguments["step"])
    if arguments["apply"] is not None:
        refuse_unwritable(ROOT / "params.yaml", arguments["apply"])
    chosen = {"method", "bits", *(["group_size"] if arguments["groups"] else [])}
    chosen |= {"serve.kv_cache_dtype"} if arguments["kv_cache"] else set()
    overrides = [one for one in HydraConfig.get().overrides.task if one.partition("=")[0] not in chosen]
    choices, losses = _space(config, overrides, arguments)
    print(f"{len(choices.candidates)} candidates; {len(choices.pruned)} that do not work", file=sys.stderr)
    judge, documents = _judge(config, overrides)
    found = find(
        choices.candidates, goal, judge, shares=len(_SHARES), most=most,
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    line = [*found.best.overrides, *overrides] if found.best else None
    typed = [*sys.argv[1:], *(f"{name}={value}" for name, value in arguments.items() if _given(name, value))]
    record = search_record(
        found, choices.candidates, choices.pruned, goal, documents=documents, line=line,
        command=shlex.join(["python", "-m", "stages.search", *sorted(typed)]), times=(started, time.time() - started),
    )  # fmt: skip
    if arguments["measure_speed"] == "true":
        _measure_speed(record, overrides)
    files = write_search(record, _FOLDER / fingerprint(record["command"])[:12])
    print(_text(found, choices, goal, record, overrides))
    if line is not None and (name := arguments["apply"]) is not None:
        named, own = own_line(line)
        add_variant(ROOT / "params.yaml", name, own)
        group = choices.variants[record["answer"]].group_size
        known = losses.get(group, next(iter(losses.values())))  # GGUF has groups of its own
        timeless = {**record, "started": None, "seconds": None}  # equal results make equal reports
        keep(ROOT / PIPELINE_HOME / named, name, own, known, group_size=group, search=timeless)
        print(f"params.yaml: {name}", file=sys.stderr)
    if config.tracking.enabled:
        publish_search(record, files, config, ROOT)
    if found.best is None:
        sys.exit(1)


def _given(name: str, value: str | None) -> bool:
    """Whether an option says what is searched for, and not only what is done with the answer."""
    usual = next(option.default for option in OPTIONS if option.name == name)
    return name != "apply" and value is not None and value != usual


def _judge(config: Config, overrides: list[str]) -> tuple[Callable[[Candidate, int], Measurement], list[int]]:
    """What makes a candidate and scores it on a share of the documents, beside the float model; and each share's number."""
    import stages.calibrate
    import stages.convert
    import stages.quantize  # noqa: F401  # they register their functions
    from quantline.core.errors import DiskFullError, QuantlineError
    from quantline.data.windows import build_windows
    from quantline.evaluation.racing import Engine, Race, compared
    from quantline.pipeline.execute import made
    from quantline.pipeline.identity import fingerprint, stage_fingerprint
    from quantline.pipeline.run import StageRun
    from quantline.planning.search import Measurement
    from quantline.toolchains.environments import locks_identity

    run = StageRun("search", config, ROOT, tuple(overrides))
    float_model, lock = run.input("download") / "model", locks_identity(ROOT, "reference")
    engine = Engine(run.side_worker, run.device, config.threads, config.evaluate.batch_tokens)
    race = Race(build_windows(float_model, config.evaluate), _SHARES, engine, _FOLDER / "losses", float_model)
    configs: dict[str, Config] = {}

    def key(stage: str, of: Config) -> str:
        return fingerprint({"of": stage_fingerprint(of, stage, ROOT), "engine": lock})

    def judge(one: Candidate, share: int) -> Measurement:
        if one.name not in configs:
            configs[one.name] = _composed([*overrides, *one.overrides])
        own, variant = configs[one.name], _folder(one.overrides)
        named = key("convert", own)

        def checkpoint() -> Path:
            return made(own, variant, WORK, ROOT)[0]

        try:
            scored, kl = race.sums(named, checkpoint, share), race.divergence(named, checkpoint)
        except DiskFullError:  # no fault of the candidate
            raise
        except QuantlineError as error:
            print(f"  {one.name}: {error}", file=sys.stderr)
            return Measurement(one.name, share, math.inf, math.inf, math.inf)
        base = race.sums(key("download", config), lambda: float_model, share)
        found = compared(scored, base, config.evaluate.bootstrap)
        return Measurement(one.name, share, found.estimate, found.low, found.high, kl)

    return judge, [len(share) for share in race.shares]


def _measure_speed(record: dict[str, Any], overrides: list[str]) -> None:
    """Measure the speed of those that were scored on all documents, in one session with the float model each."""
    import stages.download
    import stages.speed  # noqa: F401  # they register their functions
    from quantline.pipeline.execute import run_until
    from quantline.pipeline.figures import mean_ratio
    from quantline.pipeline.paths import read_result
    from quantline.pipeline.run import StageRun

    for row in record["candidates"]:
        if row["state"] not in ("winner", "finalist"):
            continue
        line = shlex.split(row["line"])
        own = _composed([*overrides, *line]).model_copy(update={"variant": _folder(line)})
        run_until("speed", WORK, own, ROOT, [*overrides, *line])
        result = read_result(StageRun("speed", own, ROOT, ()).paths.result)
        ratios = [value for name, value in result["metrics"].items() if name.startswith("speed_up_c") and value]
        row["speed_up"] = mean_ratio(ratios)


def _folder(line: Sequence[str]) -> str:
    """The folder below scratch/ in which a candidate is made."""
    from quantline.pipeline.identity import fingerprint

    return f"search-{fingerprint(line)[:12]}"


def _number(name: str, text: str | None) -> float:
    from quantline.core.errors import UserError

    try:
        value = float(str(text))
    except ValueError:
        raise UserError(f"{name}={text}: is not a number") from None
    if not 0 < value < float("inf"):
        raise UserError(f"{name}={text}: give a positive number")
    return value


def _count(name: str, text: str | None) -> int:
    from quantline.core.errors import UserError

    if not str(text).isdecimal() or int(str(text)) < 1:
        raise UserError(f"{name}={text}: give a whole number of at least 1")
    return int(str(text))


def _goal(arguments: dict[str, str | None]) -> Goal:
    from quantline.core.errors import UserError
    from quantline.planning.search import Goal

    loss, size = (
        None if arguments[name] is None else _number(name, arguments[name])
        for name in ("loss.at_most", "size.at_most_gb")
    )
    if arguments["minimize"] == "size" and loss is None:
        raise UserError("minimize=size: the smallest variant of all is of no use; give loss.at_most=0.01")
    if arguments["minimize"] == "loss" and size is None:
        raise UserError("minimize=loss: the float model loses nothing; give size.at_most_gb=5")
    return Goal(
        "loss" if arguments["minimize"] == "loss" else "size", loss, None if size is None else int(size * 10**9)
    )


def _methods(names: str | None) -> dict[str, dict[str, object]]:
    """The methods to choose from, with their options.

    Raises:
        UserError: one is no method.
    """
    from quantline.core.errors import UserError
    from quantline.pipeline import preflight

    defaults = preflight.method_defaults(ROOT)
    known, asked = sorted(set(defaults) - {"float"}), str(names).split(",")
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"methods={names}: {unknown[0]} is no method; there are {', '.join(known)}")
    return {name: {key: value for key, value in defaults[name].items() if value is not None} for name in asked}


def _space(
    config: Config, overrides: list[str], arguments: dict[str, str | None]
) -> tuple[Space, dict[int, dict[tuple[str, int], float]]]:
    """The candidates, and the losses of the units at each group size, which are measured where they are not yet."""
    from quantline.config.method import GGUF_TYPES
    from quantline.evaluation.unit_losses import BUDGETED
    from quantline.pipeline import preflight
    from quantline.pipeline.run import StageRun
    from quantline.planning.budget import SERVED
    from quantline.planning.search_space import Axes, space
    from stages.allocate import measured_losses

    methods, groups, memory = (
        _methods(arguments["methods"]),
        _groups(arguments["groups"]),
        arguments["memory.at_most_gb"],
    )
    options = preflight.PlanOptions(gpu_memory_gb=None if memory is None else _number("memory.at_most_gb", memory))
    caches = {}
    for kind in str(arguments["kv_cache"] or config.serve.kv_cache_dtype).split(","):
        own = _composed([*overrides, f"serve.kv_cache_dtype={kind}"])  # refuses what is no kind of cache
        machine = preflight.machine_of(own, ROOT, options)
        caches[kind] = machine if memory else replace(machine, memory_bytes=None)
    losses = {}
    for group in groups or [config.group_size]:
        # The grid of GPTQ is that of rounding, and it calibrates.
        plain_gptq = [*overrides, "method=gptq", *([f"group_size={group}"] if groups else [])]
        losses[group] = measured_losses(_composed(plain_gptq), plain_gptq)
    model = preflight.model_of(StageRun("search", config, ROOT, ()))
    steps = SERVED if arguments["served"] == "true" else SERVED[:2]
    axes = Axes(
        methods, losses, caches, BUDGETED, _number("step", arguments["step"]), GGUF_TYPES,
        (*steps, *(("memory",) if memory else ())), named_groups=bool(groups),
    )  # fmt: skip
    return space(preflight.variant_spec(config.model_dump()), model, axes), losses


def _groups(names: str | None) -> list[int]:
    from quantline.core.errors import UserError

    if names is None:
        return []
    asked = names.split(",")
    if wrong := [one for one in asked if one != "-1" and not one.isdecimal()]:
        raise UserError(
            f"groups={names}: {wrong[0]} is no group size; give 32,64,128 or others, or -1 for one a channel"
        )
    return list(dict.fromkeys(map(int, asked)))


def _composed(overrides: list[str]) -> Config:
    from quantline.pipeline.compose import compose_values
    from quantline.pipeline.config import parse

    return parse(compose_values(ROOT / "conf", overrides))


def _text(found: Found, choices: Space, goal: Goal, record: Mapping[str, Any], overrides: list[str]) -> str:
    from quantline.core.text import binary_size
    from quantline.pipeline.params_file import line_of

    last = {one.candidate: one for one in found.measurements}
    rows = {row["name"]: row for row in record["candidates"]}
    sizes = {one.name: one.size for one in choices.candidates}

    def told(name: str) -> str:
        if name not in last:
            return f"{name}: {binary_size(sizes[name])}, not measured"
        one = last[name]
        speed_up = rows[name]["speed_up"]
        fast = "" if speed_up is None else f", {speed_up:.2f}x as fast as float"
        return (
            f"{name}: {binary_size(sizes[name])}, perplexity {100 * one.loss:+.2f} % [{100 * one.low:+.2f}, "
            f"{100 * one.high:+.2f}] on {rows[name]['documents']} of {record['documents']} documents{fast}"
        )

    lines = [
        f"measured {len(last)} of {len(choices.candidates)} candidates; {len(choices.pruned)} do not work",
        "front:", *(f"  {told(name)}" for name in found.front),
    ]  # fmt: skip
    if found.best is not None:
        lines.append(f"best: {told(found.best.name)}")
        if cache := next((one for one in found.best.overrides if one.startswith("serve.kv_cache_dtype")), None):
            lines.append(f"{cache}: what the cache loses is not in these figures; stages.run measures it by the server")
        return "\n".join([*lines, "", line_of([*found.best.overrides, *overrides])])
    if found.nearest is None:
        return "\n".join([*lines, "no variant works here: " + "; ".join(list(choices.pruned.values())[:3])])
    needs = []
    if found.nearest.name in last:
        needs.append(f"loss.at_most={last[found.nearest.name].high:.3g}")
    if goal.size_at_most is not None and found.nearest.size > goal.size_at_most:
        needs.append(f"size.at_most_gb={found.nearest.size / 10**9:.4g}")
    return "\n".join(
        [*lines, f"nothing here meets it; the nearest is {told(found.nearest.name)}; it would need {' '.join(needs)}"]
    )


if __name__ == "__main__":
    main(search, __file__, OPTIONS, __doc__, reads=READS)
