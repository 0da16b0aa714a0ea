"""What a monitoring system needs to watch a fleet: targets for Prometheus, its alert rules, and a dashboard for Grafana."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from quantline.core.files import write_json
from quantline.serving.fleet.spec import Fleet

FOLDER, ALERTS, TARGETS, DASHBOARD = "observe", "alerts.yaml", "targets.json", "dashboard.json"
# Names of metrics in an expression: those of the three that a fleet scrapes.
_METRIC = re.compile(r"\b(?:envoy|quantline|vllm)[:_][a-zA-Z0-9_:]+")
_LABELS = re.compile(r"\{[^}]*\}|\bby \([^)]*\)")
_CLASSES = 'envoy_http_downstream_rq_xx{envoy_http_conn_manager_prefix="fleet"}'
_EACH = "sum by (le, model_name) (rate(vllm:request_time_per_output_token_seconds_bucket[5m]))"
_CHAINS = '{envoy_cluster_name=~"(chain|canary)/.+"}'
# title, unit, (expression, legend)...
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("State (0 healthy, 1 degraded, 2 unhealthy)", "short", (("quantline_variant_state", "{{variant}}"),)),
    (
        "Requests a second, by variant", "reqps",
        (("sum by (model_name) (rate(vllm:request_success_total[1m]))", "{{model_name}}"),),
    ),
    (
        "Answers, by class", "reqps",
        (
            (
                f"sum by (envoy_response_code_class) (rate({_CLASSES}[1m]))",
                "{{envoy_response_code_class}}xx",
            ),
        ),
    ),
    (
        "Retries a second, and those that failed to the end", "reqps",
        (
            (f"rate(envoy_cluster_upstream_rq_retry{_CHAINS}[1m])", "{{envoy_cluster_name}}"),
            (f"rate(envoy_cluster_upstream_rq_retry_limit_exceeded{_CHAINS}[1m])", "{{envoy_cluster_name}} failed"),
        ),
    ),
    ("Requests that are computed", "short", (("quantline_variant_requests_running", "{{variant}}"),)),
    ("Requests that wait", "short", (("quantline_variant_requests_waiting", "{{variant}}"),)),
    (
        "Turned away by a full queue", "reqps",
        (("sum by (model_name) (rate(vllm:admission_rejections_total[1m]))", "{{model_name}}"),),
    ),
    ("KV cache", "percentunit", (("vllm:kv_cache_usage_perc", "{{model_name}}"),)),
    ("Memory", "percentunit", (("quantline_memory_used_ratio", "{{device}}"),)),
    (
        "Time to the first token, p50 and p99", "s",
        tuple(
            (
                f"histogram_quantile({share}, sum by (le, model_name) (rate(vllm:time_to_first_token_seconds_bucket[5m])))",
                f"{{{{model_name}}}} p{share * 100:.0f}",
            )
            for share in (0.5, 0.99)
        ),
    ),
    (
        "Time a token, p50", "s",
        (
            (
                f"histogram_quantile(0.5, {_EACH})",
                "{{model_name}}",
            ),
        ),
    ),
    (
        "Tokens a second", "short",
        (("sum by (model_name) (rate(vllm:generation_tokens_total[1m]))", "{{model_name}}"),),
    ),
    ("Perplexity over the float model", "percentunit", (("quantline_variant_perplexity_increase_ratio", "{{variant}}"),)),
    ("Starts of a server", "short", (("quantline_variant_starts", "{{variant}}"),)),
)  # fmt: skip


def alerts() -> str:
    """The alert rules, as Prometheus reads them."""
    return resources.files("quantline.serving.fleet").joinpath(ALERTS).read_text(encoding="utf-8")


def expressions() -> Iterator[str]:
    """Every expression of the rules and the dashboard."""
    for group in yaml.safe_load(alerts())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for _, _, lines in _PANELS:
        yield from (expression for expression, _ in lines)


def metrics() -> set[str]:
    """Every metric that the rules and the dashboard name and something exports; recorded ones are left out."""
    recorded = {
        rule["record"] for group in yaml.safe_load(alerts())["groups"] for rule in group["rules"] if "record" in rule
    }
    return {name for expression in expressions() for name in _METRIC.findall(_LABELS.sub("", expression))} - recorded


def targets(fleet: Fleet) -> list[dict[str, Any]]:
    """What Prometheus is to scrape, for `file_sd_configs`. All of it is on loopback, so Prometheus runs on this machine."""
    name = Path(fleet.folder).name

    def target(port: int, path: str, job: str, **labels: str) -> dict[str, Any]:
        return {
            "targets": [f"127.0.0.1:{port}"], "labels": {"__metrics_path__": path, "fleet": name, "part": job, **labels},
        }  # fmt: skip

    found = [target(fleet.admin_port, "/stats/prometheus", "router")]
    if fleet.gauge_port is not None:
        found.append(target(fleet.gauge_port, "/metrics", "gauge"))
    return found + [target(one.port, "/metrics", "server", variant=one.name) for one in fleet.variants]


def dashboard() -> dict[str, Any]:
    """A dashboard for Grafana, two panels a row."""
    panels = [
        {
            "id": number + 1, "type": "timeseries", "title": title,
            "datasource": {"type": "prometheus", "uid": "${source}"},
            "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [
                {"refId": chr(ord("A") + place), "expr": expression, "legendFormat": legend}
                for place, (expression, legend) in enumerate(lines)
            ],
        }
        for number, (title, unit, lines) in enumerate(_PANELS)
    ]  # fmt: skip
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "title": "Quantline fleet", "uid": "quantline-fleet", "schemaVersion": 39, "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"}, "templating": {"list": [source]}, "panels": panels,
    }  # fmt: skip


def write(fleet: Fleet) -> Path:
    """Write targets, rules and dashboard to the fleet's folder; returns the folder that they are in."""
    folder = Path(fleet.folder) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TARGETS, targets(fleet))
    write_json(folder / DASHBOARD, dashboard())
    (folder / ALERTS).write_text(alerts(), encoding="utf-8")
    return folder
