"""What transformers makes of a folder's config.json, and what its model lacks or has too much of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.toolchains.protocol import JobError


def config_of(folder: Path) -> Any:
    """The config of a folder as transformers reads it, without its quantization.

    Raises:
        JobError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a value that transformers does not expect raises anything
        raise JobError(f"{folder}: transformers cannot read its config.json: {_advised(error)}") from error
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def _advised(error: Exception) -> str:
    """What transformers says, without its advice to upgrade it by pip, which changes nothing in this environment."""
    fact, upgrade, _ = said(error).partition(" This could be because of an issue")
    return (
        f"{fact} Give a model of another type, or name an interpreter with toolchains.reference=PYTHON"
        if upgrade
        else fact
    )


def said(error: Exception) -> str:
    """What a library says in an error, in one line. By itself, the text of a KeyError is only the key."""
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def unaccounted(loaded: Mapping[str, Any], zero_biases: set[str]) -> list[str]:
    """What a model lacks, or has too much, or in another shape, by what transformers says about loading it.

    zero_biases: of quantized linears, all zero; some quantizers add them to linears without a bias.
    """
    faults = []
    missing = sorted(loaded["missing_keys"])
    if missing:
        faults.append(f"has no tensor for {_names(missing)}")
    mismatched = sorted(f"{name} ({list(own)}, not {list(other)})" for name, own, other in loaded["mismatched_keys"])
    if mismatched:
        faults.append(f"has tensors of another shape for {_names(mismatched)}")
    leftover = sorted(set(loaded["unexpected_keys"]) - zero_biases)
    if leftover:
        faults.append(f"has tensors that the model does not: {_names(leftover)}")
    return [*faults, *(str(message) for message in loaded.get("error_msgs", ()))]


def _names(names: list[str], shown: int = 5) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
