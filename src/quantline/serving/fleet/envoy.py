"""From a fleet to Envoy's three documents: how it starts, its clusters, its routes. Pure: no file is read or written.

Tried with Envoy 1.40.0. What the documents rest on:

- A body is never rewritten. Every server answers to every name, and the filter `transform` puts the body's `model` into a
  header by which the routes are chosen.
- A chain of variants is an aggregate cluster. A retry goes to the next of it; so does a first attempt while the ones before
  are unhealthy, or degraded by the header x-envoy-degraded of their health checks.
- The default of 3 retries at a time would fail requests although another variant is idle, so it is raised on every cluster.
- Answers with 5xx eject nobody: a full queue answers 503, and ejecting for that would leave a busy variant idle. Health
  checks do, and failures to connect or to answer in time.
- Clusters and routes come from files, which Envoy reads again when another is moved into their place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.serving.fleet.routes import (
    CLIENT,
    FILTERS,
    MODEL,
    PRECISION,
    SCORES,
    TYPE,
    WEIGHTS,
    canary_cluster,
    chain_cluster,
    is_address,
    routes,
    scores_cluster,
    scoring,
    seconds,
)
from quantline.serving.fleet.spec import VLLM, Fleet, Key, Variant

# The most at a time, of each cluster; what waits in a variant is limited by the variant itself.
_MOST = {"max_requests": 65536, "max_pending_requests": 65536, "max_connections": 65536, "max_retries": 65536}
ROUTES, CLUSTERS, BOOT = "routes.json", "clusters.json", "envoy.json"
ACCESS_LOG, ATTEMPTS_LOG, CAPTURES = "access.jsonl", "attempts.jsonl", "captures"
STAT_PREFIX = "fleet"


@dataclass(frozen=True)
class Documents:
    """Envoy's documents as plain values."""

    boot: dict[str, Any]
    clusters: dict[str, Any]
    routes: dict[str, Any]

    @property
    def whole(self) -> dict[str, Any]:
        """One document with everything in it, for `envoy --mode validate`, which does not look into files of clusters."""
        boot = json.loads(json.dumps(self.boot))
        boot.pop("dynamic_resources")
        resources = boot["static_resources"]
        resources["clusters"] = [_untyped(cluster) for cluster in self.clusters["resources"]]
        manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        manager.pop("rds")
        manager["route_config"] = {**_untyped(self.routes["resources"][0]), "validate_clusters": True}
        return dict(boot)


def _untyped(resource: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in resource.items() if key != "@type"}


def documents(fleet: Fleet, keys: Sequence[Key] = ()) -> Documents:
    """The documents of a fleet. keys: of its clients, if it asks for any."""
    version = str(fleet.generation)
    return Documents(
        _boot(fleet), {"version_info": version, "resources": _clusters(fleet)},
        {"version_info": version, "resources": [routes(fleet, keys)]},
    )  # fmt: skip


def _clusters(fleet: Fleet) -> list[dict[str, Any]]:
    found = [_leaf(fleet, variant) for variant in fleet.variants]
    found += [_aggregate(chain_cluster(name), chain) for name, chain in fleet.precisions.items()]
    canary = fleet.canary
    if canary.share and canary.variant and canary.precision:
        chain = fleet.precisions[canary.precision]
        rest = [name for name in chain if name != canary.variant]
        found.append(_aggregate(canary_cluster(canary.precision), [canary.variant, *rest]))
    for name in fleet.precisions:
        if served := scoring(fleet, name):
            found.append(_aggregate(scores_cluster(name), served))
    return found


def _leaf(fleet: Fleet, variant: Variant) -> dict[str, Any]:
    interval = seconds(fleet.health.interval_seconds)
    endpoint: dict[str, Any] = {
        "address": {"socket_address": {"address": variant.host, "port_value": variant.port}},
        "hostname": variant.name,  # labels the endpoint's metrics and answers
    }
    path, misses = "/health", 2
    if fleet.gauge_port is not None:
        # What the gauge calls unhealthy is so at once, by 503. No answer at all is the gauge's fault, not the variant's, and
        # leaves time to send the checks to the variants.
        path, misses = f"/health/{variant.name}", 5
        endpoint["health_check_config"] = {"port_value": fleet.gauge_port}
    return {
        "@type": f"{TYPE}config.cluster.v3.Cluster", "name": variant.name, "connect_timeout": "1s",
        "type": "STATIC" if is_address(variant.host) else "STRICT_DNS",
        "load_assignment": {
            "cluster_name": variant.name, "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
        # Without it Envoy would send requests to unhealthy variants once half of them are.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "health_checks": [{
            "timeout": interval, "interval": interval, "no_traffic_interval": interval, "unhealthy_threshold": misses,
            "healthy_threshold": 1, "http_health_check": {"path": path},
        }],
        "outlier_detection": {
            "split_external_local_origin_errors": True, "consecutive_local_origin_failure": 3,
            "enforcing_consecutive_local_origin_failure": 100, "enforcing_consecutive_5xx": 0,
            "enforcing_consecutive_gateway_failure": 0, "enforcing_success_rate": 0,
            "enforcing_local_origin_success_rate": 0, "enforcing_failure_percentage": 0,
            "enforcing_failure_percentage_local_origin": 0, "interval": "1s", "base_ejection_time": "2s",
            "max_ejection_time": "10s", "max_ejection_percent": 100,
        },
        "circuit_breakers": {"thresholds": [_MOST]},
        "track_cluster_stats": {"per_endpoint_stats": True},
    }  # fmt: skip


def _aggregate(name: str, chain: Sequence[str]) -> dict[str, Any]:
    return {
        "@type": f"{TYPE}config.cluster.v3.Cluster", "name": name, "connect_timeout": "1s",
        "lb_policy": "CLUSTER_PROVIDED", "circuit_breakers": {"thresholds": [_MOST]},
        "cluster_type": {
            "name": "envoy.clusters.aggregate",
            "typed_config": {
                "@type": f"{TYPE}extensions.clusters.aggregate.v3.ClusterConfig", "clusters": list(chain),
            },
        },
    }  # fmt: skip


def _boot(fleet: Fleet) -> dict[str, Any]:
    folder = Path(fleet.folder)

    def file(name: str) -> dict[str, Any]:
        # The folder is watched: a file that is moved into place is read at once, one that is edited in place is not.
        source = {"path": str(folder / name), "watched_directory": {"path": str(folder)}}
        return {"path_config_source": source, "resource_api_version": "V3"}

    end = fleet.endpoint
    chain: dict[str, Any] = {"filters": [{"name": "http", "typed_config": _manager(fleet, file(ROUTES))}]}
    if end.certificate and end.private_key:
        certificate = {
            "certificate_chain": {"filename": str(Path(end.certificate).expanduser().absolute())},
            "private_key": {"filename": str(Path(end.private_key).expanduser().absolute())},
        }
        chain["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{TYPE}extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": {
                    "tls_certificates": [certificate], "alpn_protocols": ["h2", "http/1.1"],
                    "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                },
            },
        }  # fmt: skip
    return {
        "node": {"id": "quantline", "cluster": "quantline"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": fleet.admin_port}}},
        "dynamic_resources": {"cds_config": file(CLUSTERS)},
        "static_resources": {"listeners": [{
            "name": "fleet", "address": {"socket_address": {"address": end.host, "port_value": end.port}},
            "per_connection_buffer_limit_bytes": int(end.body_mib * 2**20), "filter_chains": [chain],
        }]},
    }  # fmt: skip


def _manager(fleet: Fleet, source: dict[str, Any]) -> dict[str, Any]:
    log = {
        "time": "%START_TIME%", "id": "%REQ(x-request-id)%", "asked": f"%REQ({MODEL})%",
        "precision": f"%REQ({PRECISION})%", "client": f"%REQ({CLIENT})%", "route": "%ROUTE_NAME%",
        "variant": "%UPSTREAM_HOST_NAME_WITHOUT_PORT%", "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "code": "%RESPONSE_CODE%", "flags": "%RESPONSE_FLAGS%", "details": "%RESPONSE_CODE_DETAILS%",
        "milliseconds": "%DURATION%", "bytes": "%BYTES_SENT%",
    }  # fmt: skip
    # What only the router may say; and what no log, capture or server may see.
    removed = [
        MODEL,
        CLIENT,
        *_scores(fleet),
        "cookie",
        "proxy-authorization",
        *([] if fleet.keys_file else ["authorization"]),
    ]
    return {
        "@type": f"{TYPE}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": STAT_PREFIX, "server_name": "quantline", "use_remote_address": True, "normalize_path": True,
        "generate_request_id": True, "always_set_request_id_in_response": True, "stream_idle_timeout": "0s",
        "early_header_mutation_extensions": [{
            "name": "removed",
            "typed_config": {
                "@type": f"{TYPE}extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                "mutations": [{"remove": name} for name in removed],
            },
        }],
        "rds": {"route_config_name": "fleet", "config_source": source},
        "access_log": [_file_log(fleet, ACCESS_LOG, log)],
        "http_filters": [*_filters(fleet), _router(fleet, log)],
    }  # fmt: skip


def _filters(fleet: Fleet) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if fleet.keys_file:  # before the capture, so that no capture has a key
        found.append({"name": "keys", "typed_config": {"@type": f"{FILTERS}api_key_auth.v3.ApiKeyAuth"}})
    if fleet.capture_share:
        share = {"numerator": round(fleet.capture_share * WEIGHTS), "denominator": "TEN_THOUSAND"}
        size = int(fleet.endpoint.body_mib * 2**20)
        sink = {
            "format": "JSON_BODY_AS_STRING",
            "file_per_tap": {"path_prefix": str(Path(fleet.folder) / CAPTURES / "c")},
        }
        found.append({"name": "capture", "typed_config": {
            "@type": f"{FILTERS}tap.v3.Tap",
            "common_config": {"static_config": {
                "match": {"any_match": True}, "tap_enabled": {"default_value": share},
                "output_config": {"max_buffered_rx_bytes": size, "max_buffered_tx_bytes": size, "sinks": [sink]},
            }},
        }})  # fmt: skip
    read = {MODEL: "model", **{header: key for header, (key, _) in _scores(fleet).items()}}
    mutations = [
        {"append": {
            "header": {"key": header, "value": f"%REQUEST_BODY({key})%"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }}
        for header, key in read.items()
    ]  # fmt: skip
    found.append({"name": "model", "typed_config": {
        "@type": f"{FILTERS}transform.v3.TransformConfig", "clear_route_cache": True,
        "request_transformation": {"headers_mutations": mutations},
    }})  # fmt: skip
    return found


def _scores(fleet: Fleet) -> dict[str, tuple[str, str]]:
    """The headers by which requests that only vLLM answers are told apart, where it does not serve all variants."""
    return {} if all(variant.runtime == VLLM for variant in fleet.variants) else SCORES


def _router(fleet: Fleet, log: dict[str, str]) -> dict[str, Any]:
    """The last filter. Its own log has every attempt, so that a retry's cause can be found by the request's id."""
    keys = ("time", "id", "route", "variant", "attempts", "code", "flags", "details")
    attempts = _file_log(fleet, ATTEMPTS_LOG, {key: log[key] for key in keys})
    return {"name": "router", "typed_config": {
        "@type": f"{FILTERS}router.v3.Router", "suppress_envoy_headers": True,
        "upstream_log": [{**attempts, "filter": {"or_filter": {"filters": [
            {"status_code_filter": {
                "comparison": {"op": "GE", "value": {"default_value": 400, "runtime_key": "fleet.log_from"}},
            }},
            {"response_flag_filter": {}},
        ]}}}],
    }}  # fmt: skip


def _file_log(fleet: Fleet, name: str, fields: dict[str, str]) -> dict[str, Any]:
    return {"name": name, "typed_config": {
        "@type": f"{TYPE}extensions.access_loggers.file.v3.FileAccessLog", "path": str(Path(fleet.folder) / name),
        "log_format": {"json_format": fields},
    }}  # fmt: skip
