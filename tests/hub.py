"""A loopback server that speaks Hugging Face's protocol to the real client library, faults included."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "5f0c7a6e" * 5


@dataclass
class Hub:
    """The hub's state. `repos` maps a repo id to a folder; a request for anything else finds no repo."""

    repos: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    token: str | None = None  # opens gated repos
    cut_after: int | None = None  # bytes of a file's body after which the next answer breaks off, once
    failing: int | None = None  # answer everything with this status
    fetched: list[str] = field(default_factory=list)  # "<repo>/<file> <range>"
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.state.failing:
            self._answer(self.state.failing, b"")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/.+)?", path):
            self._describe(match[1], tree=match[2] == "tree")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(match[1], match[2])
        else:
            self._answer(404, b"")

    def _describe(self, repo: str, *, tree: bool) -> None:
        folder = self.state.repos.get(repo)
        if folder is None:
            self._answer(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        names = [str(file.relative_to(folder)) for file in files]
        if tree:
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                for name, file in zip(names, files, strict=True)
            ]
            self._answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        else:
            info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names], "private": False}
            self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, name: str) -> None:
        if repo in self.state.gated and self.headers.get("Authorization") != f"Bearer {self.state.token}":
            self._answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {repo} is restricted."})
            return
        file = self.state.repos[repo] / name
        body, etag = file.read_bytes(), _etag(file)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range", "")
        if self.command == "GET":
            self.state.fetched.append(f"{repo}/{name} {wanted}".strip())
        if match := re.fullmatch(r"bytes=(\d+)-", wanted):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._answer(206, body[start:], headers)
        else:
            self._answer(200, body, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.state.cut_after
        if cut is not None and cut < len(body) and "ETag" in (headers or {}):
            self.state.cut_after = None
            self.wfile.write(body[:cut])
            self.close_connection = True
        else:
            self.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
