"""As much of the Hugging Face Hub as a download needs, over HTTP on this machine, for the real huggingface_hub.

    GET  /api/models/{repository}[/revision/{revision}]       commit and files
    GET  /api/models/{repository}/tree/{commit}               files with their sizes
    HEAD, GET /{repository}/resolve/{revision}/{file}         ETag, X-Repo-Commit, Content-Length, Range

Errors are the hub's: 401 or 404 with RepoNotFound, 403 with GatedRepo, 404 with RevisionNotFound or EntryNotFound.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


@dataclass
class Repository:
    """`revisions`: branch or tag -> folder with its files."""

    revisions: dict[str, Path]
    gated: bool = False  # files are for those who come with TOKEN

    def commit(self, revision: str) -> str | None:
        """The commit of a branch or tag, or of itself: a hash of the files."""
        commits = {name: self._commit(folder) for name, folder in self.revisions.items()}
        return commits.get(revision, revision if revision in commits.values() else None)

    def folder(self, revision: str) -> Path:
        return next(f for name, f in self.revisions.items() if revision in (name, self._commit(f)))

    @staticmethod
    def _commit(folder: Path) -> str:
        files = "".join(f"{file.name} {_sha(file)}\n" for file in sorted(folder.iterdir()))
        return hashlib.sha1(files.encode()).hexdigest()


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclass
class Hub:
    """Files of the server and its requests. `cut_after`: bytes of one file, by name, after which it hangs up."""

    repositories: dict[str, Repository]
    url: str = ""
    log: list[str] = field(default_factory=list)  # "GET /path range", in order
    sent: int = 0  # bytes of files, not of listings
    claimed: dict[str, int] = field(default_factory=dict)  # file -> the size that listings say it has
    cut_after: dict[str, int] = field(default_factory=dict)

    def forget(self) -> None:
        self.log.clear()
        self.sent = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        self.hub.log.append(f"{self.command} {unquote(self.path)} {self.headers.get('Range') or ''}".strip())

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self._list(match[1], match[2] or "revision", match[3] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)/([^/]+)", path):
            self._file(match[1], match[2], match[3])
        else:
            self._fail(404, "", "no such page")

    def _repository(self, name: str, revision: str) -> Repository | None:
        """The repository, if it has the revision; otherwise the error is sent."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._fail(401, "RepoNotFound", "Repository not found")
        elif repository.commit(revision) is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def _list(self, name: str, kind: str, revision: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        files = sorted(file for file in repository.folder(revision).iterdir())
        sizes = {file: self.hub.claimed.get(file.name, file.stat().st_size) for file in files}
        if kind == "tree":
            body: object = [{"type": "file", "path": f.name, "size": sizes[f], "oid": _sha(f)[:40]} for f in files]
        else:
            siblings = [{"rfilename": f.name, "size": sizes[f], "blobId": _sha(f)[:40]} for f in files]
            body = {"id": name, "sha": repository.commit(revision), "siblings": siblings, "private": False}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, filename: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._fail(403, "GatedRepo", f"Access to model {name} is restricted")
            return
        file = repository.folder(revision) / filename
        commit = repository.commit(revision)
        if not file.is_file():
            self._fail(404, "EntryNotFound", "Entry not found")
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{_sha(file)[:40]}"', "X-Repo-Commit": str(commit), "Accept-Ranges": "bytes"}
        status, begin, end = 200, 0, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            status, begin = 206, int(match[1])
            end = min(len(content), int(match[2]) + 1) if match[2] else len(content)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        cut_after = self.hub.cut_after.pop(filename, None) if self.command == "GET" else None
        self._send(status, content[begin:end], headers, cut_after)

    def _fail(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut_after: int | None = None) -> None:
        self.send_response(status)  # also logs the request
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = body[:cut_after]
        self.hub.sent += len(sent) if "ETag" in headers else 0
        with suppress(ConnectionError):  # the client has hung up
            self.wfile.write(sent)
        if len(sent) < len(body):
            self.close_connection = True


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub on a free port; `hub.url` says where."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
