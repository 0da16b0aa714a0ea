"""The server of a serving stage: its interpreter, version and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.checkpoints.layouts.choice import runtime_of
from quantline.checkpoints.model_config import dimensions, read_config
from quantline.config.context import served_length
from quantline.config.method import BASELINE
from quantline.pipeline.config import parse
from quantline.pipeline.stages import is_baseline
from quantline.toolchains.environments import distribution_of, distribution_version

if TYPE_CHECKING:
    from quantline.pipeline.config import Config
    from quantline.pipeline.records import VariantRecord
    from quantline.pipeline.run import StageRun
    from quantline.serving.command import ServerOptions
    from quantline.serving.server import Vllm


# The table of serve_smoke's result that has the flags of `vllm serve` by which it served the checkpoint, one a row.
PROVEN = "serving"


def proven_flags(served: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The flags by which serve_smoke served a checkpoint, from its result; None if it did not, or did not note them."""
    rows = (served.get("tables") or {}).get(PROVEN)
    return tuple(str(row["flag"]) for row in rows) if rows and served.get("status") == "ok" else None


def server_of(run: StageRun, folder: Path | None = None) -> Vllm:
    """Interpreter and version of the server's environment; it is recorded as the stage's environment.

    folder: a checkpoint that decides which server it is; without it the method does.

    Raises:
        UserError: this vLLM lacks an option of the server's process.
    """
    from quantline.serving.rules import checkpoint_facts, refuse_options
    from quantline.serving.server import Vllm

    name = runtime_of(run.config.method.name if folder is None else checkpoint_facts(folder).method)
    chosen = run.toolchain(name)
    version = distribution_version(chosen, distribution_of(name))
    if name == "vllm":
        refuse_options(version, run.device, run.config.serve.process)
    run.environment.update(toolchain=name, lock_sha256=chosen.lock_sha256, versions={distribution_of(name): version})
    return Vllm(chosen.python, version)


def server_options(run: StageRun, *, quantized: bool) -> ServerOptions:
    """The options to start the server for a checkpoint."""
    return options_of(run.config, run.device, quantized=quantized, model=read_config(run.checkpoint()))


def options_of(
    config: Config, device: str, *, quantized: bool, model: Mapping[str, Any] | None = None
) -> ServerOptions:
    """The options by which a variant with this configuration is served on a device, `cpu` or `cuda`.

    model: its config.json; None if that is not here. Prompts share no cache, so that an answer does not depend on those
    before it.
    """
    from quantline.serving.command import ServerOptions
    from quantline.serving.rules import architecture_of, serves_text_alone, serving_dtype

    serve = config.serve
    process = serve.process.model_copy(update={"enable_prefix_caching": False})
    return ServerOptions(
        process, device=device,
        dtype=serving_dtype(serve.dtype, quantized=quantized, architecture=architecture_of(model or {})),
        max_model_len=served_length(config, dimensions(model).positions if model else None),
        enforce_eager=serve.enforce_eager,
        kv_cache_dtype=serve.kv_cache_dtype,
        trust_remote_code=config.model.trust_remote_code,
        text_only=serves_text_alone(model or {}),
        runtime=runtime_of(config.method.name if quantized else BASELINE),
    )  # fmt: skip


def proven_line(config: Config, served: Mapping[str, Any], checkpoint: Path | None, model: str) -> str | None:
    """The `vllm serve` line by which a variant was served; None if it was not.

    Args:
        config: of the variant.
        served: its result of serve_smoke; empty if there is none.
        checkpoint: the model, if it is here.
        model: what the line serves: a folder, or a repository on the hub.
    """
    from quantline.serving.command import served_line

    if served.get("status") != "ok":
        return None
    model_config = read_config(checkpoint) if checkpoint is not None else None
    device = str(served["environment"]["device"])
    options = options_of(config, device, quantized=not is_baseline(config), model=model_config)
    return served_line(model, replace(options, proven=proven_flags(served)))


def record_line(record: VariantRecord, model: str) -> str | None:
    """The same by the record of a variant, or of the float model."""
    config = parse(record.config)
    served = next((result for result in record.results if result["stage"] == "serve_smoke"), {})
    folder = record.outputs.get("download" if is_baseline(config) else "convert")
    checkpoint = folder / "model" if folder is not None and is_baseline(config) else folder
    here = checkpoint is not None and (checkpoint / "config.json").is_file()
    return proven_line(config, served, checkpoint if here else None, model)
