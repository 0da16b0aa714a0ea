"""Removes secrets from everything that is stored or shown."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

SECRET_KEY = re.compile(r"(^|_)(password|secret|api_key|access_key)$|^token$|(hf|auth|access)_token$", re.IGNORECASE)
SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)  # fmt: skip


def hide_requests() -> None:
    """Keep HTTP clients from logging each request, as Hydra shows level INFO: addresses of storage carry signatures."""
    for client in ("httpx", "httpx2"):  # huggingface_hub 2.4 has the second
        logging.getLogger(client).setLevel(logging.WARNING)


class Scrubber:
    """Removes credentials from text: of `uri`, the environment and `also`, and anything like user:password@."""

    def __init__(self, uri: str = "", also: Iterable[str | None] = ()) -> None:
        _, mark, rest = uri.partition("://")
        userinfo, at, _ = ("", "", rest) if uri.startswith("sqlite:///") else rest.rpartition("@")
        secrets = [(secret or "").strip() for secret in (*map(os.environ.get, SECRET_VARIABLES), *also)]
        self._userinfo = f"{mark}{userinfo}{at}" if at else ""
        if at:
            password = userinfo.partition(":")[2]
            secrets += [password, unquote(password)]
        # Shorter ones would blank out half of every message.
        self._secrets = [secret for secret in secrets if len(secret) >= 4]

    def __call__(self, text: str) -> str:
        """`text` with credentials replaced by `***`."""
        if self._userinfo:
            text = text.replace(self._userinfo, "://***@")
        text = re.sub(r"://[^/\s'\"@]+@", "://***@", text)
        text = re.sub(r"(?i)\b(password|passwd|token|secret)=[^&\s'\"]+", r"\1=***", text)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def value(self, value: Any) -> Any:
        """The same for nested plain values; a string under a key such as `password` is replaced entirely."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {key: self._entry(str(key), item) for key, item in value.items()}
        return value

    def _entry(self, key: str, item: Any) -> Any:
        return "***" if isinstance(item, str) and item and SECRET_KEY.search(key) else self.value(item)
