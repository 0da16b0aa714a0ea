"""A running fleet in the terminal: its variants, their load, where requests went, and the memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from tabulate import tabulate

from quantline.core.files import read_json
from quantline.core.gpu import visible_gpus
from quantline.core.text import binary_size, percent
from quantline.serving.fleet.router import figures
from quantline.serving.fleet.running import STATUS
from quantline.serving.fleet.spec import Fleet

_CHAIN = re.compile(r"^cluster\.(?:chain|canary)/(?P<name>[^.]+)\.upstream_rq_(?P<what>[a-z_]+)$")


def shown(fleet: Fleet) -> list[str]:
    """The lines of a status; what does not answer is told, not raised."""
    lines = [f"{fleet.url}/v1"]
    try:
        state: Mapping[str, Any] = httpx.get(
            f"http://127.0.0.1:{fleet.gauge_port}/state", timeout=2.0, trust_env=False
        ).json()
    except (httpx.HTTPError, ValueError):
        state = {}
        lines.append("the gauge does not answer; the router asks the servers themselves")
    try:
        counted = figures(fleet, r"^cluster\..*upstream_rq_(total|active|retry|retry_success|retry_limit_exceeded)$")
    except httpx.HTTPError:
        counted = {}
        lines.append("the router does not answer")
    lines += ["", tabulate(_variants(fleet, state, counted), headers="keys")]
    lines += ["", tabulate(_precisions(fleet, counted), headers="keys"), ""]
    memory = [f"{device} {percent(share, 0)}" for device, share in (state.get("memory") or {}).items()]
    memory += [
        f"{gpu.name}: {binary_size(gpu.memory_used_bytes)} of {binary_size(gpu.memory_total_bytes)}"
        for gpu in visible_gpus()
    ]
    return [*lines, f"memory: {', '.join(memory) or 'unknown'}"]


def _variants(fleet: Fleet, state: Mapping[str, Any], counted: Mapping[str, float]) -> list[dict[str, Any]]:
    path = Path(fleet.folder) / STATUS
    noted = read_json(path) if path.exists() else {}
    rows = []
    for variant in fleet.variants:
        seen = (state.get("variants") or {}).get(variant.name) or {}
        known = noted.get(variant.name) or {}
        rows.append({
            "variant": variant.name, "state": seen.get("level", "unknown"),
            "why": ", ".join(seen.get("reasons") or []) or known.get("fault") or "",
            "runs": seen.get("running"), "waits": seen.get("waiting"), "KV cache": _percent(seen.get("kv_cache")),
            "attempts": counted.get(f"cluster.{variant.name}.upstream_rq_total"), "starts": known.get("starts"),
            "weights": binary_size(variant.weight_bytes),
        })  # fmt: skip
    return rows


def _precisions(fleet: Fleet, counted: Mapping[str, float]) -> list[dict[str, Any]]:
    totals: dict[str, dict[str, float]] = {name: {} for name in fleet.precisions}
    for key, value in counted.items():
        found = _CHAIN.match(key)
        if found and found["name"] in totals:
            own = totals[found["name"]]
            own[found["what"]] = own.get(found["what"], 0) + value
    rows = []
    for name, chain in fleet.precisions.items():
        canary = fleet.canary
        shared = f" ({canary.share:.3g} to {canary.variant})" if canary.share and canary.precision == name else ""
        own = totals[name]
        rows.append({
            "precision": name, "order": " -> ".join(chain) + shared, "retries": own.get("retry"),
            "that helped": own.get("retry_success"), "all failed": own.get("retry_limit_exceeded"),
        })  # fmt: skip
    return rows


def _percent(share: float | None) -> str:
    return "" if share is None else percent(share, 0)
