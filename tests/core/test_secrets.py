from __future__ import annotations

import logging

import pytest

from quantline.core.secrets import SECRET_VARIABLES, Scrubber, hide_requests


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch):
    for name in SECRET_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://ann:s3cr%40t@host/x failed", "http://***@host/x failed"),
        ("the server said s3cr@t", "the server said ***"),
        ("postgres://bob:other@db", "postgres://***@db"),
        ("?token=abc&x=1", "?token=***&x=1"),
        ("mail ann@host about passwords", "mail ann@host about passwords"),
    ],
)
def test_credentials_are_taken_out_of_text_and_other_words_stay(text, clean):
    assert Scrubber("http://ann:s3cr%40t@host")(text) == clean


def test_secrets_of_the_environment_are_taken_out_unless_they_are_very_short(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_4711")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "abc")
    assert Scrubber("sqlite:///a@b.db")("hf_4711 abc a@b.db") == "*** abc a@b.db"


def test_in_nested_values_a_string_under_a_secret_key_goes_altogether():
    values = {"password": "x", "hf_token": "y", "max_tokens": 5, "list": [{"api_key": "z"}, "a://b:c@d"], "token": ""}
    assert Scrubber("").value(values) == {
        "password": "***", "hf_token": "***", "max_tokens": 5, "list": [{"api_key": "***"}, "a://***@d"], "token": "",
    }  # fmt: skip


def test_the_addresses_that_the_hubs_client_asks_are_not_logged(caplog):
    from huggingface_hub.utils import get_session

    client, _, _ = type(get_session()).__mro__[-2].__module__.partition(".")
    caplog.set_level(logging.INFO)
    hide_requests()
    for name in ("httpx", client):
        logging.getLogger(name).info("HTTP Request: PUT https://storage.example/x?signature=s")
    assert client.startswith("httpx")
    assert caplog.text == ""
