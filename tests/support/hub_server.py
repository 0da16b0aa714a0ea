"""A local HTTP server that speaks as much of the hub's API as downloading and uploading need, and can misbehave on request.

Uploads go by git LFS over HTTP (HF_HUB_DISABLE_XET=1): large files are stored first, then one commit names them. Downloads
go over HTTP, or by Xet for the files in `xet`: a token, how the file is put together, and one pack of all its chunks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
XET_CHUNK = 65_536
LARGE = 512  # files from this size on are "large files", named by SHA-256 as on the hub


@dataclass
class Hub:
    """What the server serves, how it misbehaves, and what it was asked.

    repos: (`models` or `datasets`, name) -> file -> content. token: needed for everything where set.
    broken_once: file -> bytes after which the connection breaks, once; broken: the same, for good.
    corrupt: file -> content that is sent in the place of the right one, of the same length.
    sent: file -> bytes of it that were sent.
    cards: repository -> the YAML header of its card. private: repositories that are. stored: large files by SHA-256.
    commits: what each commit said: repository, summary, description, names of added and of deleted files.
    rejects: the token is not valid. read_only: it may not write. refuses: part of a path -> status, for what is sent.
    spoils: files whose content the hub changes. xet: files that are downloaded by Xet.
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
    sent: dict[str, int] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    stored: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    rejects: bool = False
    read_only: bool = False
    refuses: dict[str, int] = field(default_factory=dict)
    spoils: set[str] = field(default_factory=set)
    xet: set[str] = field(default_factory=set)
    address: str = ""

    @property
    def head(self) -> str:
        """The newest commit."""
        return f"{len(self.commits):040x}" if self.commits else COMMIT

    def puts(self) -> list[str]:
        """The SHA-256 of each large file that was sent."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "PUT"]

    def gets(self, file: str) -> list[str | None]:
        """The Range headers of the GET requests for a file."""
        return [sent for method, path, sent in self.requests if method == "GET" and path.endswith(f"/{file}")]


def oid(content: bytes) -> str:
    """Git's name of a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(content: bytes) -> str:
    """The hub's name of a content: SHA-256 of a large file, git's of a small one."""
    return hashlib.sha256(content).hexdigest() if len(content) >= LARGE else oid(content)


def xet_hash(name: str) -> str:
    """The name of a file in Xet storage here."""
    return hashlib.sha256(name.encode()).hexdigest()


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
        if self._xet(path, body):
            return
        files = self.state.repos.get((kind, repo))
        refusal = self._refusal(files, revision)
        if "/xet-write-token/" in path:
            refusal = (self.state.refuses.get("/xet-write-token/", 404), None)
        if refusal:
            self._fail(*refusal)
        elif files is not None and api:
            self._json(self._tree(files) if what == "tree" else self._info(repo, files), body)
        elif files is not None and resolve and resolve[4] in files:
            self._file(resolve[4], files[resolve[4]], body)
        else:
            self._fail(404, "EntryNotFound")

    def _xet(self, path: str, body: bool) -> bool:
        """Answer what a Xet client asks; whether it was that. A pack holds a file, in chunks that are not compressed."""
        if "/xet-read-token/" in path:
            expiry = str(int(time.time()) + 3600)
            headers = {
                "X-Xet-Cas-Url": self.state.address,
                "X-Xet-Access-Token": "of-xet",
                "X-Xet-Token-Expiration": expiry,
            }
            self._json({}, body, headers)
            return True
        if path.startswith("/v2/reconstructions/"):  # the client then asks by the first version
            self._fail(404, None)
            return True
        asked = re.fullmatch(r"/(?:v1/reconstructions|pack)/([0-9a-f]{64})", path)
        name = next((name for name in self.state.xet if asked and xet_hash(name) == asked[1]), None)
        if name is None:
            return False
        content = next(files[name] for files in self.state.repos.values() if name in files)
        content = self.state.corrupt.get(name, content)
        parts = [content[at : at + XET_CHUNK] for at in range(0, len(content), XET_CHUNK)]
        packed = b"".join(b"\0" + len(part).to_bytes(3, "little") + b"\0" + len(part).to_bytes(3, "little") + part
                          for part in parts)  # fmt: skip
        if path.startswith("/pack/"):
            self._bytes(packed, body)
            return True
        whole, every = xet_hash(name), {"start": 0, "end": len(parts)}
        pack = {
            "range": every,
            "url": f"{self.state.address}/pack/{whole}",
            "url_range": {"start": 0, "end": len(packed) - 1},
        }
        terms = [{"hash": whole, "unpacked_length": len(content), "range": every}]
        self._json({"offset_into_first_range": 0, "terms": terms, "fetch_info": {whole: [pack]}}, body)
        return True

    def _bytes(self, content: bytes, body: bool) -> None:
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 0-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _refusal(self, files: dict[str, bytes] | None, revision: str | None) -> tuple[int, str | None] | None:
        if self.state.status is not None:
            return self.state.status, None
        if self.state.rejects:
            return 401, "InvalidToken"
        if self.state.gated:
            return 403, "GatedRepo"
        if files is None or (self.state.token and self.headers.get("Authorization") != f"Bearer {self.state.token}"):
            return 401, "RepoNotFound"
        return (404, "RevisionNotFound") if revision not in (None, "main", COMMIT, self.state.head) else None

    def _fail(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code == "InvalidToken":
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        elif code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _info(self, repo: str, files: dict[str, bytes]) -> dict[str, Any]:
        return {
            "id": repo, "sha": self.state.head, "siblings": [{"rfilename": name} for name in files],
            "private": repo in self.state.private, "cardData": self.state.cards.get(repo),
        }  # fmt: skip

    def _tree(self, files: dict[str, bytes]) -> list[dict[str, Any]]:
        rows = []
        for name, content in files.items():
            row: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": oid(content)}
            if len(content) >= LARGE:
                row["lfs"] = {"oid": etag(content), "size": len(content), "pointerSize": 134}
            rows.append(row)
        return rows

    def do_PUT(self) -> None:
        content = self._received()
        oid = self.path.rpartition("/")[2]
        refused = next((status for part, status in self.state.refuses.items() if part in self.path), None)
        if refused is not None or hashlib.sha256(content).hexdigest() != oid:
            self._fail(refused or 400, None)
            return
        self.state.stored[oid] = content
        self._json({}, body=True)

    def do_POST(self) -> None:
        content = self._received()
        path = unquote(urlsplit(self.path).path)
        refused = next((status for part, status in self.state.refuses.items() if part in path), None)
        write = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+?)(?:/(preupload|commit)/main|(\.git)/info/lfs/objects/batch)", path
        )
        refusal = self._refusal({}, None)
        if refusal is None and (refused is not None or self.state.read_only):
            refusal = (refused or 403, None)
        if refusal:
            self._fail(*refusal)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []}, body=True)
        elif path == "/api/repos/create":
            self._create(json.loads(content))
        elif write and write[2] == "preupload":
            modes = [{"path": one["path"], "shouldIgnore": False, "oid": None,
                      "uploadMode": "lfs" if one["size"] >= LARGE else "regular"}
                     for one in json.loads(content)["files"]]  # fmt: skip
            self._json({"files": modes}, body=True)
        elif write and write[2] == "commit":
            self._commit(write[1], [json.loads(line) for line in content.splitlines()])
        elif write:
            objects = [{**one, **({} if one["oid"] in self.state.stored else
                                  {"actions": {"upload": {"href": f"{self.state.address}/lfs/{one['oid']}"}}})}
                       for one in json.loads(content)["objects"]]  # fmt: skip
            self._json({"transfer": "basic", "objects": objects}, body=True)
        else:
            self._fail(404, "EntryNotFound")

    def _received(self) -> bytes:
        """The body of a request, which is noted like all others."""
        self.state.requests.append((self.command, unquote(urlsplit(self.path).path), None))
        self.state.authorizations.append(self.headers.get("Authorization"))
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        if ("models", repo) in self.state.repos:
            self._fail(409, None)
            return
        self.state.repos["models", repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.state.private.add(repo)
        self._json({"url": f"{self.state.address}/{repo}"}, body=True)

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.state.repos["models", repo]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, self.state.head):
            self._fail(412, None)
            return
        added, deleted = [], []
        for line in lines:
            value, name = line["value"], line["value"].get("path")
            if line["key"] == "file":
                files[name] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[name] = self.state.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[name]
            (deleted if line["key"] == "deletedFile" else added).append(name)
        for name in self.state.spoils & set(files):
            files[name] = files[name][:-1] + b"?"
        self.state.commits.append({"repo": repo, "summary": header["summary"], "description": header["description"],
                                   "added": sorted(filter(None, added)), "deleted": sorted(deleted)})  # fmt: skip
        url = f"{self.state.address}/{repo}/commit/{self.state.head}"
        self._json({"commitUrl": url, "commitOid": self.state.head}, body=True)

    def _json(self, value: Any, body: bool, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _file(self, name: str, content: bytes, body: bool) -> None:
        whole, start, end = len(content), 0, len(content)
        sent = self.headers.get("Range")
        if sent:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", sent).groups()  # type: ignore[union-attr]
            start, end = int(first), min(whole, int(last) + 1) if last else whole
        self.send_response(206 if sent else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag(content)}"')
        if whole >= LARGE:
            self.send_header("X-Linked-Etag", f'"{etag(content)}"')
            self.send_header("X-Linked-Size", str(whole))
        if name in self.state.xet:
            token = f"{self.state.address}/api/models/owner/tiny/xet-read-token/{COMMIT}"
            self.send_header("X-Xet-Hash", xet_hash(name))
            self.send_header("Link", f'<{token}>; rel="xet-auth"')
        if sent:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{whole}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if not body:
            return
        content = self.state.corrupt.get(name, content)
        stop = self.state.broken.get(name) or self.state.broken_once.pop(name, None)
        self.state.sent[name] = self.state.sent.get(name, 0) + (end if stop is None else stop) - start
        self.wfile.write(content[start : end if stop is None else stop])
        if stop is not None:
            self.wfile.flush()
            self.close_connection = True
