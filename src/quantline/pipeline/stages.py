"""The table of the pipeline's stages, in order. dvc.yaml defines the same stages for DVC, and a test compares the two.

Each fact about a stage is written only here: which stages it follows, which options it reads, which environments it
uses, whether its output is reproducible byte for byte, and whether the float baseline skips it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantline.config.evaluate import WINDOW_KEYS
from quantline.config.method import BASELINE
from quantline.config.tasks import ITEM_KEYS
from quantline.core.errors import UserError
from quantline.pipeline import options
from quantline.pipeline.config import Config
from quantline.quantization.capabilities import calibrated

# What others read of an output by itself: the calibration's token ids, and whether the server takes a variant.
TOKENS, VERDICT = "tokens.safetensors", "verdict.json"
_SERVING = ("serve.runtime", "serve.max_model_len", "serve.dtype", "serve.enforce_eager")
_GENERATIONS = tuple(f"evaluate.generations.{key}" for key in ("prompts", "prompt_tokens", "new_tokens"))
_WINDOWS = tuple(f"evaluate.{key}" for key in WINDOW_KEYS)
_Values = Callable[[Config, options.Context], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: of the entrypoint stages/<name>.py, of its output folder and of its result.
        after: the stages directly before it, whose outputs it depends on.
        options: returns the plain values that it reads, see `quantline.pipeline.options`.
        inputs: returns the hashes of the files that its options name by path, see `quantline.pipeline.own_files`.
        reads: the keys of the frozen configuration that it reads; a change of their values makes DVC run it again.
        takes: the one file that it reads of an earlier stage's output, by stage; of the other stages it takes the whole
            output. It does not run again where only other files changed.
        decide: for a file of its output that not all of its options decide, by name: returns those that do.
        locks: the environments that it runs in, as keys of `frozen.locks`.
        exact: equal inputs give equal bytes. A server's answers are not exact.
        shared: all variants share one output.
        skipped: whether a configuration skips it.
        beside_float: compares its output with the float baseline's output of the same stage. These are the options that
            must then be the same for both.
        compared: its metrics are logged to the variant's own run, where variants are compared.
        gated: promoting a variant needs an up-to-date result of it.
        rebuilt: runs again when a variant is rebuilt.
        kept: a rebuild returns its output. The other outputs are large and only intermediate.
        by_hand: run only manually, not a part of the pipeline.
    """

    name: str
    after: tuple[str, ...]
    options: _Values
    reads: tuple[str, ...] = ()
    locks: tuple[str, ...] = ()
    inputs: Callable[[Config, Path], dict[str, Any]] | None = None
    takes: Mapping[str, str] = field(default_factory=dict)
    decide: Mapping[str, _Values] = field(default_factory=dict)
    exact: bool = False
    shared: bool = False
    skipped: Callable[[Config], bool] = lambda config: False
    beside_float: tuple[str, ...] = ()
    compared: bool = False
    gated: bool = False
    rebuilt: bool = False
    kept: bool = True
    by_hand: bool = False


def is_baseline(config: Config) -> bool:
    """Whether a configuration is the float baseline."""
    return config.method.name == BASELINE


def _uncalibrated(config: Config) -> bool:
    return not calibrated(config.method.name, config.method.model_dump())


_TABLE = (
    Stage(
        "download", (), options.download, ("model",), ("reference",), options.model_inputs,
        exact=True, shared=True, gated=True, rebuilt=True, kept=False,
    ),
    Stage(
        "calibrate", ("download",), options.calibrate, ("calibration", "device"), ("reference",),
        inputs=options.calibration_inputs, exact=True, skipped=_uncalibrated, rebuilt=True,
    ),
    Stage(
        "quantize", ("download", "calibrate"), options.quantize,
        ("method", "bits", "group_size", "backend", "dtype", "lm_head", "low_memory", "quantize", "layers", "layer_errors",
         "seed", "threads", "device", "frozen.backends"), ("quantizer",),
        takes={"calibrate": TOKENS}, exact=True, skipped=is_baseline, compared=True, gated=True, rebuilt=True, kept=False,
    ),
    Stage(
        "convert", ("quantize",), options.convert, ("convert", "serve.runtime", "serve.dtype", "device"),
        ("reference", "server"),
        exact=True, skipped=is_baseline, gated=True, rebuilt=True,
    ),
    Stage(
        "serve_smoke", ("convert",), options.serve_smoke,
        (*_SERVING, "serve.smoke", *_WINDOWS, *_GENERATIONS, "device"), ("server",),
        decide={VERDICT: options.verdict}, inputs=options.evaluation_inputs,
        beside_float=("serve.smoke", *_WINDOWS, *_GENERATIONS), compared=True, gated=True, rebuilt=True,
    ),
    Stage(
        "evaluate", ("serve_smoke",), options.evaluate, ("evaluate",), ("reference",),
        takes={"calibrate": TOKENS}, inputs=options.evaluation_inputs,
        beside_float=("evaluate.level", *_WINDOWS, *_GENERATIONS), compared=True, gated=True, rebuilt=True,
    ),
    Stage(
        "tasks", ("serve_smoke",), options.tasks, ("tasks", *_SERVING, "device"), ("tasks", "server"),
        takes={"serve_smoke": VERDICT}, inputs=options.task_inputs, compared=True,
        beside_float=(*(f"tasks.{key}" for key in ITEM_KEYS), "serve.max_model_len"),
    ),
    Stage("speed", ("convert",), options.speed, ("speed", *_SERVING, "device"), ("server",), compared=True),
    Stage(
        "noise", ("quantize",), options.noise,
        ("noise", "seed", "method", "bits", "group_size", "backend", "layers", "calibration", "evaluate", "device"),
        by_hand=True,
    ),
    Stage(
        "sensitivity", ("download", "calibrate"), options.sensitivity,
        ("sensitivity", "method", "group_size", "lm_head", "calibration", "device"), ("reference",),
        takes={"calibrate": TOKENS}, exact=True, by_hand=True,
    ),
)  # fmt: skip

STAGES = {stage.name: stage for stage in _TABLE}
PIPELINE = tuple(stage.name for stage in _TABLE if not stage.by_hand)


def names(holds: Callable[[Stage], bool]) -> tuple[str, ...]:
    """The pipeline's stages for which `holds` is true, in order."""
    return tuple(name for name in PIPELINE if holds(STAGES[name]))


def refuse_source(config: Config, reader: str) -> None:
    """Refuse a checkpoint of another tool, which only stages.convert by hand takes. reader: what would not read it.

    Raises:
        UserError: the configuration has such a source.
    """
    if config.source.kind != "pipeline":
        raise UserError(
            f"source={config.source.kind}: only stages.convert by hand takes a checkpoint of another tool, and {reader} "
            "would not read it; leave source and source.path out"
        )


def of_config(config: Config) -> tuple[str, ...]:
    """The pipeline's stages that run for a configuration; the float baseline is not quantized."""
    return names(lambda stage: not (is_baseline(config) and _left_out_by_baseline(stage)))


def baseline_stages() -> tuple[str, ...]:
    """The pipeline's stages that run for the float baseline."""
    return names(lambda stage: not _left_out_by_baseline(stage))


def _left_out_by_baseline(stage: Stage) -> bool:
    return stage.name == "calibrate" or stage.skipped is is_baseline


def baseline_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides of a variant that its float baseline reads, too: no name, and none of how the weights are quantized."""

    def of_stages(of: Iterable[str]) -> set[str]:
        return {key.partition(".")[0] for name in of for key in STAGES[name].reads}

    of_float = baseline_stages()
    skipped = of_stages(name for name in PIPELINE if name not in of_float) - of_stages(of_float) - {"threads"}
    skipped |= {"variant", "backends", "noise", "sensitivity"}
    return [part for part in overrides if re.split(r"[.@=]", part.lstrip("+~"), maxsplit=1)[0] not in skipped]


def needed(config: Config, stage: str) -> tuple[str, ...]:
    """The stages whose outputs a stage reads; a method without calibration is measured on the calibration text, too."""
    stages: list[str] = []
    for name in STAGES[stage].after:
        stages += needed(config, name) if is_baseline(config) and _left_out_by_baseline(STAGES[name]) else [name]
    return tuple(dict.fromkeys(stages))


def before(config: Config, stage: str) -> tuple[str, ...]:
    """The stages that a stage directly depends on in a configuration; a skipped one is replaced by those before it."""
    stages: list[str] = []
    for name in STAGES[stage].after:
        stages += before(config, name) if STAGES[name].skipped(config) else [name]
    return tuple(dict.fromkeys(stages))
