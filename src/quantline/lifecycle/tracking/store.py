"""The MLflow store: its URI, a check that it answers, the lock of an SQLite file, limits and outcome of a publish."""

from __future__ import annotations

import os
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock, Timeout

from quantline.config.data import ModelConfig
from quantline.config.tracking import TrackingConfig
from quantline.core.errors import TrackingError

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Limits:
    """Seconds for one request, and for all of them; None is no limit."""

    request: float = 10
    whole: float | None = None


@dataclass(frozen=True)
class PublishReport:
    """The outcome of a publish; created, completed and unchanged are names of variants, or `report`.

    uri: the tracking server without credentials. run_ids: variant -> its parent run. seconds: wall time.
    """

    uri: str
    experiment: str
    experiment_id: str
    created: tuple[str, ...]
    completed: tuple[str, ...]
    unchanged: tuple[str, ...]
    run_ids: dict[str, str]
    warnings: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        """One line for the terminal."""
        counts = ((len(self.created), "new"), (len(self.completed), "completed"), (len(self.unchanged), "unchanged"))
        done = ", ".join(f"{count} {word}" for count, word in counts if count) or "nothing to publish"
        return f"{self.uri}, experiment {self.experiment}: {done}"


def resolve_uri(uri: str | None, root: Path) -> str:
    """The tracking server to use: `uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` in `root`.

    A relative SQLite path is relative to `root`, not to the working directory.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    database = sqlite_path(chosen)
    if database is None:
        return chosen
    query = chosen.partition("?")[2]
    return f"{SQLITE}{root.resolve() / database}" + (f"?{query}" if query else "")


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI; None for every other URI."""
    if not uri.startswith(SQLITE):
        return None
    return Path(uri.removeprefix(SQLITE).partition("?")[0])


def check_reachable(uri: str, timeout_seconds: float) -> None:
    """Check that a server answers before mlflow connects, since mlflow takes minutes to fail.

    Any answer is accepted, also a refusal: mlflow sends the credentials and reports the server's error.

    Raises:
        TrackingError: no connection, no answer in time, or a gateway error because the server is down.
    """
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme in ("http", "https"):
        health = urlunsplit((parts.scheme, host, f"{parts.path.rstrip('/')}/health", "", ""))
        try:
            urllib.request.urlopen(health, timeout=timeout_seconds).close()  # noqa: S310 - the scheme was checked
        except urllib.error.HTTPError as error:
            if error.code in (502, 503, 504):
                raise TrackingError(f"it answers {error.code} {error.reason}") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if not isinstance(reason, ssl.SSLError):  # mlflow may be configured to trust it
                raise TrackingError(_no_answer(reason, timeout_seconds)) from None
        return
    port = DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    if port is not None and parts.hostname:
        try:
            socket.create_connection((parts.hostname, parts.port or port), timeout_seconds).close()
        except OSError as error:
            raise TrackingError(_no_answer(error, timeout_seconds)) from None


def _no_answer(reason: object, timeout_seconds: float) -> str:
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout_seconds:g} s; is the server up, or tracking.timeout_seconds too short?"
    return f"no connection ({reason}); is the server up, and tracking.uri right?"


@contextmanager
def locked(uri: str, wait_seconds: float) -> Iterator[None]:
    """Allow only one process at a time to publish to an SQLite file. Servers serialize writes and need no lock.

    Raises:
        TrackingError: another process held the lock for longer than `wait_seconds`.
    """
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(database.with_name(f"{database.name}.lock"))
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        raise TrackingError(f"another publish has held {lock.lock_file} for more than {wait_seconds:g} s") from None
    try:
        yield
    finally:
        lock.release()


def experiment_name(tracking: TrackingConfig, model: ModelConfig) -> str:
    """The configured experiment, else a name from the model."""
    from quantline.data.download import model_name

    return tracking.experiment or f"quantline/{model.name or model_name(model)}"
