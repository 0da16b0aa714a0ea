"""The options that each stage reads from a configuration, as plain values: the options in its identity.

There is one function per stage, with the stage's name; the table in `quantline.pipeline.stages` refers to them. Keep the
structure of these values, because their hash identifies results: where possible, a new option at its default should not
change the hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.pipeline.config import Config
from quantline.pipeline.own_files import model_hashes, text_hash
from quantline.planning.layouts import is_symmetric
from quantline.toolchains.environments import locks_identity


@dataclass(frozen=True)
class Context:
    """Inputs besides the configuration: the checkout, the hashes of the locks, the backends that may quantize it."""

    root: Path
    locks: Mapping[str, str]
    backends: list[str]


def download(config: Config, context: Context) -> dict[str, Any]:
    """The float model, and its files if it is a local folder."""
    content = model_inputs(config, context.root).get(str(config.model.path))
    model = config.model.model_dump(exclude={"name"})
    return {"model": model, "content": content, "reference": context.locks["reference"]}


def calibrate(config: Config, context: Context) -> dict[str, Any]:
    """The calibration options, and the hashes of local text files; the engine's lock where the float model may write."""
    texts, sources = calibration_inputs(config, context.root), config.calibration.sources
    files = {name: texts[source.path] for name, source in sources.items() if source.path and texts[source.path]}
    own = {"calibration": config.calibration.model_dump(), "files": files}
    if config.calibration.self_text is None:
        own["calibration"].pop("self_text")
        return own
    return {**own, "environment": context.locks["reference"]}


def quantize(config: Config, context: Context) -> dict[str, Any]:
    """The method and all options that determine the weights."""
    # Options that came later are left out at their defaults, so that existing results stay valid.
    later = (("solver", "gptq"), ("grid", "absmax"))
    method = {key: value for key, value in config.method.model_dump().items() if (key, value) not in later}
    own = {"method": method, "bits": config.bits, "group_size": config.group_size}
    own.update(backends=context.backends, seed=config.seed, threads=config.threads, dtype=config.dtype)
    own.update(coverage=config.layer_errors.model_dump())  # the old name, so that existing results stay valid
    own.update(layers=config.layers.model_dump(), lm_head=config.lm_head, low_memory=config.low_memory)
    if config.quantize.gpus > 1:
        own.update(gpus=config.quantize.gpus)
    return {**own, "environment": context.locks["quantizer"]}


def convert(config: Config, context: Context) -> dict[str, Any]:
    """The layout; options at their defaults are left out, so that a new option does not invalidate existing outputs."""
    return {"convert": config.convert.model_dump(exclude_defaults=True), "runtime": config.serve.runtime}


def serve_smoke(config: Config, context: Context) -> dict[str, Any]:
    """The server, its test questions, the text that it scores, and the prompts of a large model that it continues."""
    serve = _serve(config, exclude={"process"})
    asked = config.evaluate.generations.model_dump(include={"prompts", "prompt_tokens", "new_tokens"})
    return {**_scored(config, context), "serve": serve, "generations": asked, "environment": context.locks["server"]}


def verdict(config: Config, context: Context) -> dict[str, Any]:
    """What decides whether the server takes a checkpoint: neither the questions nor the text that it scores."""
    return {"serve": _serve(config, exclude={"process", "smoke"}), "environment": context.locks["server"]}


def evaluate(config: Config, context: Context) -> dict[str, Any]:
    """The text and all measurements on it; the number of GPUs does not change them."""
    evaluation = config.evaluate.fitted().model_dump(exclude={"gpus"})
    return {**_scored(config, context), "evaluate": evaluation, "environment": context.locks["reference"]}


def noise(config: Config, context: Context) -> dict[str, Any]:
    """The text, and the number of seeds."""
    return {
        **_scored(config, context), "noise": config.noise.model_dump(), "environment": context.locks["reference"],
    }  # fmt: skip


def sensitivity(config: Config, context: Context) -> dict[str, Any]:
    """The grid, the widths and samples, and the calibration, also for a method that does not calibrate."""
    method = config.method.model_dump()
    return {
        **calibrate(config, context), "sensitivity": config.sensitivity.model_dump(), "group_size": config.group_size,
        "symmetric": is_symmetric(method["name"], method), "lm_head": config.lm_head,
        "environment": context.locks["reference"],
    }  # fmt: skip


def speed(config: Config, context: Context) -> dict[str, Any]:
    """The benchmark and the server, or the questions and the libraries that load the models."""
    if config.speed.runtime == "transformers":
        libraries = {name: locks_identity(context.root, name) for name in ("reference", "gptqmodel", "autoawq")}
        return {"speed": config.speed.identity(), "environments": libraries}
    serve = _serve(config, exclude={"process", "smoke"})
    return {"speed": config.speed.identity(), "serve": serve, "environment": context.locks["server"]}


def tasks(config: Config, context: Context) -> dict[str, Any]:
    """The tasks, and the server if it is one of the engines."""
    asked = config.tasks
    own: dict[str, Any] = {"tasks": asked.model_dump()}
    if not asked.any:
        return own
    own.update(text=task_inputs(config, context.root).get(asked.path), environment=context.locks["tasks"])
    own["max_length"] = config.serve.length
    if "vllm" in asked.engines:
        own.update(serve=_serve(config, exclude={"process", "smoke"}), server=context.locks["server"])
    return own


def _serve(config: Config, exclude: set[str]) -> dict[str, Any]:
    """The server's options; that of the cache is left out at its default, so that existing results stay valid."""
    own = config.serve.model_dump(exclude=exclude)
    return {key: value for key, value in own.items() if (key, value) != ("kv_cache_dtype", "auto")}


def model_inputs(config: Config, root: Path) -> dict[str, Any]:
    """The hashes of the model's files by name, by its path; empty for a model on the hub."""
    return {config.model.path: model_hashes(root, config.model)} if config.model.path else {}


def calibration_inputs(config: Config, root: Path) -> dict[str, Any]:
    """The hash of each local calibration text, by its path."""
    return _texts(root, *(source.path for source in config.calibration.sources.values()))


def evaluation_inputs(config: Config, root: Path) -> dict[str, Any]:
    """The hash of the evaluation text, by its path."""
    return _texts(root, config.evaluate.path)


def task_inputs(config: Config, root: Path) -> dict[str, Any]:
    """The hash of the text that local tasks are built from, by its path; empty where none is asked."""
    return _texts(root, config.tasks.path) if config.tasks.any else {}


def _texts(root: Path, *paths: str | None) -> dict[str, Any]:
    return {path: text_hash(root, path) for path in paths if path}


def _scored(config: Config, context: Context) -> dict[str, Any]:
    text = evaluation_inputs(config, context.root).get(str(config.evaluate.path))
    return {"evaluate": config.evaluate.windows(), "text": text}
