"""The routes of a fleet in Envoy's terms: which name and header leads to which chain, and what an answer says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from quantline.serving.fleet.spec import VLLM, Fleet, Key, Variant

TYPE = "type.googleapis.com/envoy."
FILTERS = f"{TYPE}extensions.filters.http."
MODEL, PRECISION, CLIENT = "x-quantline-model", "x-quantline-precision", "x-quantline-client"
# What a client may ask for; everything else of a server stays on loopback.
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/tokenize", "/detokenize")
# What llama.cpp answers otherwise than vLLM, or not at all: paths, and values of a body, which the router puts into headers.
# It takes `echo` and `prompt_logprobs` and gives no such scores, without a word.
VLLM_PATHS = ("/v1/embeddings", "/tokenize", "/detokenize")
SCORES = {"x-quantline-echo": ("echo", "true"), "x-quantline-scores": ("prompt_logprobs", "-?[0-9].*")}
WEIGHTS = 10_000  # of all clusters of a route together


def chain_cluster(name: str) -> str:
    """The aggregate cluster of a precision."""
    return f"chain/{name}"


def canary_cluster(name: str) -> str:
    """The aggregate cluster that begins with the canary of a precision."""
    return f"canary/{name}"


def scores_cluster(name: str) -> str:
    """The aggregate cluster of those of a precision's variants that vLLM serves."""
    return f"scores/{name}"


def scoring(fleet: Fleet, name: str) -> tuple[str, ...] | None:
    """Of the variants that may answer to a name those that vLLM serves; None if all are."""
    chain, canary = list(fleet.names[name]), fleet.canary
    if canary.share and canary.precision == name and canary.variant:
        chain.append(canary.variant)
    served = [member for member in dict.fromkeys(chain) if fleet.variant(member).runtime == VLLM]
    return None if len(served) == len(set(chain)) else tuple(served)


def is_address(host: str) -> bool:
    """Whether a host is an address, and no name that has to be looked up."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def seconds(value: float) -> str:
    """A duration as Envoy reads it."""
    return f"{value:g}s" if value >= 0.001 else "0.001s"


def routes(fleet: Fleet, keys: Sequence[Key]) -> dict[str, Any]:
    """All routes of a fleet, one virtual host. keys: of its clients, if it asks for any."""
    found: list[dict[str, Any]] = [
        {"name": "models", "match": {"path": "/v1/models"}, **_answer(200, _models(fleet))},
        {"name": "health", "match": {"path": "/health"}, **_answer(200, {"status": "up"})},
    ]
    found[1]["typed_per_filter_config"] = {}
    may = [key.client for key in keys if key.precision]
    if may or not fleet.keys_file:
        only = [_matches(CLIENT, f"({'|'.join(map(re.escape, may))})")] if fleet.keys_file else []
        for name in fleet.precisions:
            found += _to_chain(fleet, name, [_equals(PRECISION, name), *only])
    for name in fleet.names:
        if name in fleet.precisions:
            found += _to_chain(fleet, name, [_equals(MODEL, name)])
        else:
            found += _to_variant(fleet, name)
    absent = {"name": MODEL, "present_match": True, "invert_match": True}
    message = "the body is no JSON object with a model, or content-type is not application/json"
    found += [
        {"name": "no-model", "match": {"path": path, "headers": [absent]}, **_error(400, message)} for path in PATHS
    ]
    found += [
        {"name": "unknown-model", "match": {"path": path}, **_error(404, f"no such model; there are {_listed(fleet)}")}
        for path in PATHS
    ]
    found.append({"name": "unknown-path", "match": {"prefix": "/"}, **_error(404, f"no such path; {', '.join(PATHS)}")})
    host: dict[str, Any] = {
        "name": "fleet", "domains": ["*"], "include_attempt_count_in_response": False, "routes": found,
    }  # fmt: skip
    if fleet.keys_file:
        host["typed_per_filter_config"] = {"keys": _credentials(keys)}
        found[1]["typed_per_filter_config"] = {
            "keys": {"@type": f"{TYPE}config.route.v3.FilterConfig", "disabled": True}
        }
    if not found[1]["typed_per_filter_config"]:
        del found[1]["typed_per_filter_config"]
    return {"@type": f"{TYPE}config.route.v3.RouteConfiguration", "name": "fleet", "virtual_hosts": [host]}


def _credentials(keys: Sequence[Key]) -> dict[str, Any]:
    return {
        "@type": f"{FILTERS}api_key_auth.v3.ApiKeyAuthPerRoute",
        "credentials": [{"key": key.key, "client": key.client} for key in keys],
        "key_sources": [{"header": "authorization"}],
        "forwarding": {"header": CLIENT, "hide_credentials": True},
    }


def _listed(fleet: Fleet) -> str:
    return ", ".join(fleet.names)


def _models(fleet: Fleet) -> dict[str, Any]:
    def card(name: str, chain: Sequence[str]) -> dict[str, Any]:
        lengths = [fleet.variant(member).max_model_len for member in chain]
        known = [length for length in lengths if length is not None]
        more = {"max_model_len": min(known)} if known else {}
        return {"id": name, "object": "model", "created": 0, "owned_by": "quantline", **more}

    return {"object": "list", "data": [card(name, chain) for name, chain in fleet.names.items()]}


def _answer(status: int, value: Any) -> dict[str, Any]:
    return {
        "direct_response": {"status": status, "body": {"inline_string": json.dumps(value)}},
        "response_headers_to_add": [_header("content-type", "application/json")],
    }


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    return _answer(status, {"error": {"message": message, "type": kind, "code": status}})


def _equals(header: str, value: str) -> dict[str, Any]:
    return {"name": header, "string_match": {"exact": value}}


def _matches(header: str, pattern: str) -> dict[str, Any]:
    return {"name": header, "string_match": {"safe_regex": {"regex": pattern}}}


def _header(key: str, value: str) -> dict[str, Any]:
    return {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _told(asked: str, first: Variant, reason: str = "first") -> list[dict[str, Any]]:
    """The headers that say who answered, after how many attempts, and why that one."""
    chosen = f"upstream.address == '{first.address}' ? '{reason}' : 'passed over'"
    if not is_address(first.host):  # behind a name there can be any address
        chosen = "'answered'"
    return [
        _header("x-quantline-variant", "%UPSTREAM_HOST_NAME_WITHOUT_PORT%"),
        _header("x-quantline-attempts", "%UPSTREAM_REQUEST_ATTEMPT_COUNT%"),
        _header("x-quantline-reason", f"%CEL(upstream.request_attempt_count > 1u ? 'retried' : {chosen})%"),
        _header("x-quantline-asked", asked),
    ]


def _to_chain(fleet: Fleet, name: str, headers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The routes of a precision: those of requests that only vLLM answers, then one a path."""
    chain, canary, shadow = fleet.precisions[name], fleet.canary, fleet.shadow
    first = fleet.variant(chain[0])
    is_shared = bool(canary.share and canary.precision == name and canary.variant)
    attempts = len(chain) + (1 if is_shared and canary.variant not in chain else 0)
    action: dict[str, Any] = {"timeout": "0s", "idle_timeout": seconds(fleet.hang_seconds * attempts + 5)}
    if is_shared and canary.variant:
        weight = min(WEIGHTS, max(1, round(canary.share * WEIGHTS)))
        told = _told(name, fleet.variant(canary.variant), "canary")
        split = [
            {"name": canary_cluster(name), "weight": weight, "response_headers_to_add": told},
            {"name": chain_cluster(name), "weight": WEIGHTS - weight, "response_headers_to_add": _told(name, first)},
        ]
        action["weighted_clusters"] = {"clusters": [part for part in split if part["weight"]]}
    else:
        action["cluster"] = chain_cluster(name)
    if attempts > 1:
        action["retry_policy"] = _retries(fleet, attempts - 1)
    if shadow.share and shadow.precision == name and shadow.variant:
        part = round(shadow.share * WEIGHTS)
        fraction = {"default_value": {"numerator": part, "denominator": "TEN_THOUSAND"}}
        action["request_mirror_policies"] = [{"cluster": shadow.variant, "runtime_fraction": fraction}]
    own = {} if is_shared else {"response_headers_to_add": _told(name, first)}
    plain = [{"name": name, "match": {"path": path, "headers": headers}, "route": action, **own} for path in PATHS]
    return [*_of_vllm(fleet, name, headers), *plain]


def _of_vllm(fleet: Fleet, name: str, headers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The routes of requests for a name that llama.cpp would answer otherwise than vLLM; none if vLLM serves all of it."""
    served = scoring(fleet, name)
    if served is None:
        return []
    answer: dict[str, Any] = _error(
        400, f"{name} is served by llama.cpp, which gives no embeddings, no tokens of a text and no log-probabilities of a "
        "prompt; ask a variant that vLLM serves",
    )  # fmt: skip
    if served:
        action: dict[str, Any] = {
            "cluster": scores_cluster(name), "timeout": "0s",
            "idle_timeout": seconds(fleet.hang_seconds * len(served) + 5),
        }  # fmt: skip
        if len(served) > 1:
            action["retry_policy"] = _retries(fleet, len(served) - 1)
        answer = {
            "route": action,
            "response_headers_to_add": _told(name, fleet.variant(served[0]), "runtime"),
        }
    matches: list[dict[str, Any]] = [{"path": path, "headers": headers} for path in VLLM_PATHS]
    for header, (_, pattern) in SCORES.items():
        asked = [*headers, _matches(header, pattern)]
        matches += [{"path": path, "headers": asked} for path in PATHS if path not in VLLM_PATHS]
    return [{"name": name, "match": match, **answer} for match in matches]


def _to_variant(fleet: Fleet, name: str) -> list[dict[str, Any]]:
    """The routes of one variant by its name or alias, one a path: it answers itself, or nobody."""
    variant = fleet.variant(fleet.names[name][0])
    action = {"cluster": variant.name, "timeout": "0s", "idle_timeout": seconds(fleet.hang_seconds + 5)}
    headers = [_equals(MODEL, name)]
    plain = [
        {
            "name": name, "match": {"path": path, "headers": headers}, "route": action,
            "response_headers_to_add": _told(name, variant),
        }
        for path in PATHS
    ]  # fmt: skip
    return [*_of_vllm(fleet, name, headers), *plain]


def _retries(fleet: Fleet, count: int) -> dict[str, Any]:
    return {
        "retry_on": "5xx,reset,connect-failure,refused-stream,retriable-status-codes", "retriable_status_codes": [429],
        "num_retries": count, "per_try_idle_timeout": seconds(fleet.hang_seconds),
        "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.1s"},
        "retry_priority": {
            "name": "envoy.retry_priorities.previous_priorities",
            "typed_config": {
                "@type": f"{TYPE}extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                "update_frequency": 1,
            },
        },
    }  # fmt: skip
