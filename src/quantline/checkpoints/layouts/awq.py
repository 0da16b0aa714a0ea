"""What the two AWQ layouts share: the config section of AutoAWQ, and what they cannot store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.checkpoints.layouts.config_values import bits_and_groups, flag, names, one_of, patterns
from quantline.checkpoints.layouts.description import Description, QuantizationInfo
from quantline.checkpoints.layouts.layout import Fault, Shape, Storage, bits_faults, order_faults, word_faults
from quantline.checkpoints.layouts.linear_spec import LayerSettings, LinearSpec
from quantline.core.errors import CheckpointError

METHOD = "awq"
OLD_FILE = "quant_config.json"
# version in the config -> layout. exllama only selects kernels at load time: its weights are stored as GEMM.
VERSIONS = {"gemm": "awq_gemm", "gemv": "awq_gemv", "exllama": "awq_gemm", "exllamav2": "awq_gemm"}
# Those that a backend can be asked for -> layout.
MADE = {version: VERSIONS[version] for version in ("gemm", "gemv", "exllama")}
_TITLE = "AWQ"


def version_of(config: Mapping[str, Any]) -> str:
    """The version of a section; AutoAWQ's first sections name none."""
    return str(config.get("version") or config.get("checkpoint_format") or "gemm")


def describe(layout: str, wanted: Description) -> dict[str, Any]:
    """The section. ``zero_point`` is always true: the tensors hold zero points, which readers ignore if it is false.

    Raises:
        CheckpointError: linears have different settings, bits other than 4, or reordered groups.
    """
    if wanted.overrides:
        raise CheckpointError(
            f"{layout}: {next(iter(wanted.overrides))} and {len(wanted.overrides) - 1} other linears have settings of "
            "their own, which readers of this layout do not support: convert to gptq or compressed_tensors"
        )
    if wanted.main.bits != 4 or wanted.desc_act:
        raise CheckpointError(f"{layout}: stores 4 bits only and no desc_act: convert to gptq or compressed_tensors")
    return {
        "quant_method": METHOD,
        "bits": wanted.main.bits,
        "group_size": wanted.main.group_size,
        "version": next(version for version, name in VERSIONS.items() if name == layout),
        "zero_point": True,
        **({"lm_head": True} if wanted.quantized_head else {}),
        "modules_to_not_convert": list(wanted.left_float) or None,
    }


def parse(path: Path, config: Mapping[str, Any]) -> QuantizationInfo:
    """Read a section.

    Raises:
        CheckpointError: the version is unknown, bits are not 4, or the group size is invalid.
    """
    layout = one_of(path, METHOD, version_of(config), VERSIONS)
    bits, group_size = bits_and_groups(path, METHOD, config, (4,))
    symmetric = not flag(path, config, "zero_point", True)
    return QuantizationInfo(
        method=METHOD, layout=layout, bits=bits, group_size=group_size, desc_act=flag(path, config, "desc_act", False),
        symmetric=symmetric, modules_to_not_convert=names(path, config, "modules_to_not_convert"),
        patterns=patterns(path, config, LayerSettings(bits, group_size, symmetric)),
    )  # fmt: skip


def faults(layout: str, shape: Shape, spec: LinearSpec, storage: Storage) -> list[Fault]:
    """Faults of bits other than 4, reordered groups, and widths that are not multiples of 8."""
    return [
        *bits_faults(_TITLE, (4,), spec),
        *order_faults(_TITLE, storage, "use gptq"),
        *word_faults(layout, shape, 8),
    ]
