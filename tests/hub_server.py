"""A small server on the loopback that speaks the hub's protocol, and can be told to misbehave.

As far as downloads go: `/api/models/ID[/revision/REV]`, `/api/models/ID/tree/REV`, and HEAD and GET
of `/ID/resolve/REV/FILE` with Range. Errors carry the hub's X-Error-Code and X-Error-Message.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    """What was asked for."""

    method: str
    path: str
    token: str | None
    range: str | None
    port: int


@dataclass
class Repository:
    """A repository: its revisions' files, and who may read them."""

    revisions: dict[str, dict[str, bytes]]
    access: str = "public"
    """"public", "private" or "gated"; the latter two ask for `GOOD`, which `MEMBER` may read."""
    listed: tuple[str, ...] = ()
    """Names that are listed beside the files."""

    def commit(self, revision: str) -> str | None:
        """A commit's hash by the name of a branch or by itself."""
        for name, files in self.revisions.items():
            text = json.dumps([name, sorted((n, len(c)) for n, c in files.items())])
            commit = hashlib.sha1(text.encode()).hexdigest()
            if revision in (name, commit):
                return commit
        return None

    def files(self, commit: str) -> dict[str, bytes]:
        """A commit's files."""
        return next(f for name, f in self.revisions.items() if self.commit(name) == commit)


GOOD = "hf_good"
"""A valid token, without access to anything gated."""
MEMBER = "hf_member"
"""A valid token with access to everything."""


@dataclass
class Hub:
    """A running server: what it has, what it was asked, how it misbehaves.

    Attributes:
        failing: the status of every answer instead, if not None.
        cuts: file name -> after how many bytes of each answer the connection is cut, in order.
        large: files from this size on are redirected to a second port, as to another host.
    """

    endpoint: str
    storage: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    failing: int | None = None
    cuts: dict[str, list[int]] = field(default_factory=dict)
    large: int | None = None
    body: bytes | None = None
    """What every answer to the API is instead, if not None."""

    def got(self, name: str) -> list[Request]:
        """The requests for the content of a file."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(f"/{name}")]

    def downloaded(self) -> set[str]:
        """Names of the files whose content was asked for."""
        found = (re.fullmatch(r".*/resolve/[^/]+/(.+)", r.path) for r in self.requests)
        pairs = zip(found, self.requests, strict=True)
        return {match[1] for match, r in pairs if match and r.method == "GET"}


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a server on two free ports of the loopback."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Handler) for _ in range(2)]
    hub = Hub(*(f"http://127.0.0.1:{server.server_port}" for server in servers))
    threads = []
    for server in servers:
        server.daemon_threads = True
        server.hub = hub  # type: ignore[attr-defined]
        threads.append(threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True))
        threads[-1].start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """As GET, without a body."""
        self._answer()

    def do_GET(self) -> None:
        """Answer."""
        self._answer()

    def _answer(self) -> None:
        hub: Hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        port = self.server.server_port
        hub.requests.append(Request(self.command, path, token, self.headers.get("Range"), port))
        if hub.failing is not None:
            return self._send(hub.failing)
        if token is not None and token not in (GOOD, MEMBER):
            return self._error(401, None, "Invalid credentials in Authorization header")
        api = path.startswith("/api/models/")
        if api and hub.body is not None:
            return self._send(200, hub.body)
        if api:
            found = re.fullmatch(
                r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path.removesuffix("/")
            )
        else:
            found = re.fullmatch(r"/(.+?)/(resolve)/([^/]+)/(.+)", path)
        if found is None:
            return self._error(404, None, "Not found")
        repository = hub.repositories.get(found[1])
        revision = found[3] or "main"
        at_storage = hub.storage.endswith(f":{port}")
        if repository is None or (
            repository.access == "private" and token != MEMBER and not at_storage
        ):
            return self._error(
                401 if token is None else 404, "RepoNotFound", "Repository not found"
            )
        if repository.access == "gated" and token != MEMBER and not api and not at_storage:
            return self._error(403 if token else 401, "GatedRepo", "Access is restricted.")
        commit = repository.commit(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.files(commit)
        if not api:
            return self._file(found[4], files, commit, hub, at_storage)
        names = [*files, *repository.listed]
        if found[2] == "tree":
            entries = [
                {"type": "file", "path": n, "size": len(files.get(n, b"")), "oid": "0" * 40}
                for n in names
            ]
            return self._send(200, json.dumps(entries).encode())
        info = {
            "id": found[1],
            "sha": commit,
            "siblings": [{"rfilename": n} for n in names],
            "private": repository.access == "private",
            "tags": [],
        }
        return self._send(200, json.dumps(info).encode())

    def _file(
        self, name: str, files: Mapping[str, bytes], commit: str, hub: Hub, at_storage: bool
    ) -> None:
        if name not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        content = files[name]
        etag = hashlib.sha256(name.encode() + content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if hub.large is not None and len(content) >= hub.large and not at_storage:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
            return self._send(302, headers | {"Location": hub.storage + self.path})
        start = 0
        if requested := self.headers.get("Range"):
            start = int(requested.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = None
        if self.command == "GET" and hub.cuts.get(name):
            cut = hub.cuts[name].pop(0)
        return self._send(206 if start else 200, content[start:], headers, cut)

    def _error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(
        self,
        status: int,
        body: bytes | Mapping[str, str] = b"",
        headers: Mapping[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        if not isinstance(body, bytes):
            body, headers = b"", body
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
