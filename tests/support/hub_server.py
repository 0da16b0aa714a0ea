"""A local HTTP server that speaks as much of the hub's API as downloading needs, and can misbehave on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 512  # files from this size on are "large files", named by SHA-256 as on the hub


@dataclass
class Hub:
    """What the server serves, how it misbehaves, and what it was asked.

    repos: (`models` or `datasets`, name) -> file -> content. token: needed for everything where set.
    broken_once: file -> bytes after which the connection breaks, once; broken: the same, for good.
    corrupt: file -> content that is sent in the place of the right one, of the same length.
    """

    repos: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    status: int | None = None
    broken_once: dict[str, int] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    corrupt: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    authorizations: list[str | None] = field(default_factory=list)
    address: str = ""

    def gets(self, file: str) -> list[str | None]:
        """The Range headers of the GET requests for a file."""
        return [sent for method, path, sent in self.requests if method == "GET" and path.endswith(f"/{file}")]


def oid(content: bytes) -> str:
    """Git's name of a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(content: bytes) -> str:
    """The hub's name of a content: SHA-256 of a large file, git's of a small one."""
    return hashlib.sha256(content).hexdigest() if len(content) >= LARGE else oid(content)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port of this machine; `hub.address` is where."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path, self.headers.get("Range")))
        self.state.authorizations.append(self.headers.get("Authorization"))
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        resolve = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        kind, repo, what, revision = ("models", "", None, None)
        if api:
            kind, repo, what, revision = api.groups()
        elif resolve:
            kind, repo, revision = ("datasets" if resolve[1] else "models"), resolve[2], resolve[3]
        files = self.state.repos.get((kind, repo))
        refusal = self._refusal(files, revision)
        if refusal:
            self._fail(*refusal)
        elif files is not None and api:
            self._json(self._tree(files) if what == "tree" else self._info(repo, files), body)
        elif files is not None and resolve and resolve[4] in files:
            self._file(resolve[4], files[resolve[4]], body)
        else:
            self._fail(404, "EntryNotFound")

    def _refusal(self, files: dict[str, bytes] | None, revision: str | None) -> tuple[int, str | None] | None:
        if self.state.status is not None:
            return self.state.status, None
        if self.state.gated:
            return 403, "GatedRepo"
        if files is None or (self.state.token and self.headers.get("Authorization") != f"Bearer {self.state.token}"):
            return 401, "RepoNotFound"
        return (404, "RevisionNotFound") if revision not in (None, "main", COMMIT) else None

    def _fail(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _info(self, repo: str, files: dict[str, bytes]) -> dict[str, Any]:
        return {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}

    def _tree(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        rows = []
        for name, content in files.items():
            row: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": oid(content)}
            if len(content) >= LARGE:
                row["lfs"] = {"oid": etag(content), "size": len(content), "pointerSize": 134}
            rows.append(row)
        return rows

    def _json(self, value: Any, body: bool) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _file(self, name: str, content: bytes, body: bool) -> None:
        whole, start = len(content), 0
        sent = self.headers.get("Range")
        if sent:
            start = int(re.fullmatch(r"bytes=(\d+)-", sent)[1])  # type: ignore[index]
        self.send_response(206 if sent else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag(content)}"')
        if whole >= LARGE:
            self.send_header("X-Linked-Etag", f'"{etag(content)}"')
            self.send_header("X-Linked-Size", str(whole))
        if sent:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.send_header("Content-Length", str(whole - start))
        self.end_headers()
        if not body:
            return
        content = self.state.corrupt.get(name, content)
        stop = self.state.broken.get(name) or self.state.broken_once.pop(name, None)
        self.wfile.write(content[start:stop])
        if stop is not None:
            self.wfile.flush()
            self.close_connection = True
