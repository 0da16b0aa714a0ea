from __future__ import annotations

import itertools
import json

import pytest

from quantline.config.fleet import EndpointConfig, ShareConfig
from quantline.core.errors import UserError
from quantline.serving.fleet import envoy as of
from quantline.serving.fleet.routes import CLIENT
from quantline.serving.fleet.spec import Fleet, Key, Variant, checked
from quantline.toolchains.router import envoy

VARIANTS = tuple(Variant(name=name, port=port) for name, port in (("float", 9001), ("w8", 9002), ("w4", 9003)))
CHAINS = {"high": ("float",), "low": ("w4", "w8", "float")}
CANARY = ShareConfig(precision="low", variant="w8", share=0.05)
KEYS = (Key(client="team.a", key="sk-secret-1", precision=True), Key(client="b", key="sk-secret-2"))


def fleet(**changes):
    made = {"folder": "/tmp/f", "variants": VARIANTS, "precisions": CHAINS, "endpoint": EndpointConfig(port=8080)}
    return checked(Fleet(**{**made, **changes}))


def clusters(made):
    return {cluster["name"]: cluster for cluster in made.clusters["resources"]}


def routes(made):
    return made.routes["resources"][0]["virtual_hosts"][0]["routes"]


def targets(route):
    action = route.get("route", {})
    split = action.get("weighted_clusters", {}).get("clusters", [])
    mirrors = [mirror["cluster"] for mirror in action.get("request_mirror_policies", [])]
    return [action["cluster"]] if "cluster" in action else [part["name"] for part in split] + mirrors


def every_fleet():
    """Fleets with and without each part."""
    parts = [
        {"canary": CANARY}, {"canary": ShareConfig(precision="low", variant="w8", share=1.0)},
        {"shadow": ShareConfig(precision="high", variant="w4", share=0.2)}, {"capture_share": 0.25},
        {"keys_file": "keys.yaml"}, {"gauge_port": 9999}, {"aliases": {"m@production": "w4"}},
        {"precisions": {"only": ("w4",)}},
    ]  # fmt: skip
    for count in (0, 1, 2):
        for chosen in itertools.combinations(parts, count):
            changes = {key: value for part in chosen for key, value in part.items()}
            precisions = changes.get("precisions", CHAINS)
            shares = [changes.get(key, ShareConfig()) for key in ("canary", "shadow")]
            if all(not share.share or share.precision in precisions for share in shares):
                yield fleet(**changes)


def test_every_route_leads_to_a_cluster_that_exists_and_every_chain_to_variants():
    for one in every_fleet():
        made = of.documents(one, KEYS if one.keys_file else ())
        known = clusters(made)
        for route in routes(made):
            assert set(targets(route)) <= set(known)
        for cluster in known.values():
            chain = cluster.get("cluster_type", {}).get("typed_config", {}).get("clusters", [])
            assert set(chain) <= {variant.name for variant in VARIANTS}


@pytest.mark.toolchain("router")
def test_envoy_takes_every_document(root, tmp_path):
    program = envoy(root)
    for number, one in enumerate(every_fleet()):
        if number % 4 == 0:  # a validation takes 0.2 s
            here = one.model_copy(update={"folder": str(tmp_path)})
            program.validate(of.documents(here, KEYS if one.keys_file else ()).whole, tmp_path / "checked.json")
    assert not (tmp_path / "checked.json").exists()


@pytest.mark.toolchain("router")
def test_envoy_refuses_a_route_to_nowhere_before_it_is_moved_into_place(root, tmp_path):
    whole = of.documents(fleet(folder=str(tmp_path))).whole
    whole["static_resources"]["clusters"] = whole["static_resources"]["clusters"][:3]
    with pytest.raises(UserError, match="unknown cluster 'chain/high'"):
        envoy(root).validate(whole, tmp_path / "checked.json")


def test_a_chain_is_tried_in_order_and_a_canary_comes_before_it():
    known = clusters(of.documents(fleet(canary=CANARY)))
    chain = {name: known[name]["cluster_type"]["typed_config"]["clusters"] for name in ("chain/low", "canary/low")}
    assert chain == {"chain/low": ["w4", "w8", "float"], "canary/low": ["w8", "w4", "float"]}


def test_a_canary_gets_its_share_and_answers_say_so():
    route = next(route for route in routes(of.documents(fleet(canary=CANARY))) if route["name"] == "low")
    split = {part["name"]: part["weight"] for part in route["route"]["weighted_clusters"]["clusters"]}
    assert split == {"canary/low": 500, "chain/low": 9500}
    told = route["route"]["weighted_clusters"]["clusters"][0]["response_headers_to_add"]
    assert "'127.0.0.1:9002' ? 'canary'" in json.dumps(told)


def test_a_retry_goes_on_for_as_long_as_there_are_variants_and_a_single_one_is_not_asked_twice():
    by_name = {route["name"]: route for route in routes(of.documents(fleet()))}
    assert by_name["low"]["route"]["retry_policy"]["num_retries"] == 2
    assert "retry_policy" not in by_name["high"]["route"]
    assert "retry_policy" not in by_name["w4"]["route"]


def test_health_checks_go_to_the_gauge_where_there_is_one_and_else_to_the_server():
    def check(made):
        leaf = clusters(made)["w4"]
        endpoint = leaf["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
        return leaf["health_checks"][0]["http_health_check"]["path"], endpoint.get("health_check_config")

    assert check(of.documents(fleet(gauge_port=9999))) == ("/health/w4", {"port_value": 9999})
    assert check(of.documents(fleet())) == ("/health", None)


def test_no_cluster_keeps_the_three_retries_at_a_time_of_envoy():
    for cluster in of.documents(fleet(canary=CANARY)).clusters["resources"]:
        assert cluster["circuit_breakers"]["thresholds"][0]["max_retries"] > 1000


def test_keys_stand_before_the_capture_and_only_clients_that_may_choose_the_precision():
    made = of.documents(fleet(keys_file="keys.yaml", capture_share=0.1), KEYS)
    manager = made.boot["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    assert [one["name"] for one in manager["http_filters"]] == ["keys", "capture", "model", "router"]
    chosen = [
        header for route in routes(made) for header in route["match"].get("headers", []) if header["name"] == CLIENT
    ]
    assert {header["string_match"]["safe_regex"]["regex"] for header in chosen} == {r"(team\.a)"}
    assert "sk-secret" not in json.dumps([made.boot, made.clusters])


def test_the_same_fleet_gives_the_same_documents():
    assert of.documents(fleet(canary=CANARY)) == of.documents(fleet(canary=CANARY))
