from __future__ import annotations

import pytest

from quantline.config.fleet import EndpointConfig, FleetConfig, HealthConfig, ShareConfig
from quantline.core.errors import ConfigError, UserError
from quantline.serving.fleet.spec import Fleet, Variant, checked, config_faults, read_keys

VARIANTS = (Variant(name="float", port=9001), Variant(name="w4", port=9002))


def fleet(**changes):
    return Fleet(folder="/tmp/f", **{"variants": VARIANTS, "precisions": {"low": ("w4", "float")}, **changes})


def test_a_name_leads_to_the_variants_that_answer_it_in_order():
    names = checked(fleet(aliases={"model@production": "w4"})).names
    assert names == {"low": ("w4", "float"), "float": ("float",), "w4": ("w4",), "model@production": ("w4",)}


def test_a_fleet_survives_being_written_and_read():
    whole = fleet(
        canary=ShareConfig(precision="low", variant="float", share=0.1), draining=("w4",), aliases={"a@b": "w4"}
    )
    assert Fleet.model_validate_json(whole.model_dump_json()) == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precisions": {"low": ("w4", "w3")}}, "there is no variant w3"),
        ({"precisions": {"low": ()}}, "give at least one variant"),
        ({"precisions": {"low": ("w4", "w4")}}, "has w4 twice"),
        ({"precisions": {"w4": ("float",)}}, "a variant has this name, too"),
        ({"precisions": {}}, "is empty"),
        ({"variants": (*VARIANTS, Variant(name="w8", port=9002))}, "two variants have it"),
        ({"variants": (*VARIANTS, Variant(name="a/b", port=9003))}, "use letters, digits"),
        ({"aliases": {"prod": "w3"}}, "there is no variant w3"),
        ({"aliases": {"w4": "float"}}, "a variant or precision has this name"),
        ({"canary": ShareConfig(precision="low", variant="w9", share=0.1)}, "fleet.canary.variant=w9"),
        ({"canary": ShareConfig(precision="low", variant="w4", share=0.1)}, "is the first of low already"),
        ({"canary": ShareConfig(share=0.1)}, "give fleet.canary.precision and fleet.canary.variant"),
        ({"shadow": ShareConfig(precision="lo", variant="w4", share=0.1)}, "did you mean low"),
        ({"draining": ("w9",)}, "draining w9"),
    ],
)
def test_a_fleet_that_cannot_work_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        checked(fleet(**changes))


def test_all_faults_of_a_fleet_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        checked(fleet(precisions={"low": ("w4", "w3"), "high": ()}, draining=("w9",)))
    assert len(caught.value.faults) == 3


def test_options_that_exclude_each_other_are_told_before_any_variant_is_looked_at(tmp_path):
    config = FleetConfig(
        precisions={"low": ["w4", "high"], "high": ["float"]}, endpoint=EndpointConfig(host="0.0.0.0", certificate="no.pem"),
        health=HealthConfig(kv_cache_low=0.95), canary=ShareConfig(precision="low", variant="w4", share=0.5),
    )  # fmt: skip
    told = "\n".join(config_faults(config, tmp_path))
    for words in (
        "high is a precision", "give fleet.keys_file", "both certificate and private_key", "no.pem: is no file",
        "kv_cache_low=0.95: must be less", "is the first of low already",
    ):  # fmt: skip
        assert words in told
    assert config_faults(FleetConfig(precisions={"low": ["w4"]}), tmp_path) == []


def test_a_certificate_is_looked_for_where_it_is_read_from_not_in_the_current_folder(tmp_path, monkeypatch):
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    for folder in (checkout, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(elsewhere)
    end = EndpointConfig(certificate="own.pem", private_key="own.key")
    config = FleetConfig(precisions={"low": ["w4"]}, endpoint=end)
    for name in ("own.pem", "own.key"):
        (elsewhere / name).touch()
    assert [one.rpartition(": ")[2] for one in config_faults(config, checkout)] == ["is no file"] * 2
    for name in ("own.pem", "own.key"):
        (elsewhere / name).rename(checkout / name)
    assert config_faults(config, checkout) == []


def test_keys_are_read_and_no_message_shows_one(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("keys:\n- {client: team, key: sk-secret-1, precision: true}\n- {client: other, key: sk-secret-2}\n")
    first, second = read_keys(path)
    assert (first.client, first.precision, second.precision) == ("team", True, False)
    for text in (
        "keys: [{client: team, key: sk-secret-1}, {client: b, key: sk-secret-1}]", "keys: [{client: t, key: short}]",
        "keys: [{client: 'a b', key: sk-secret-1}]", "keys: []", "keys: [", "sk-secret-1",
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            read_keys(path)
        assert "sk-secret" not in str(caught.value)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read_keys(tmp_path / "none.yaml")
