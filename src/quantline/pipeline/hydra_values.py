"""Plain values of a composed Hydra configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain values, interpolations resolved."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
