"""A loopback server that stands in for the three hubs and for any other: their paths, redirects, headers and faults.

Hugging Face's real client library can read what `Web.hugging_face` puts there.
"""

import hashlib
import io
import json
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from safetensors.numpy import save

COMMIT = "5f0c7a6e" * 5


@dataclass
class Fault:
    """What goes wrong with the bodies of files, `times` times."""

    times: int = 1
    only: str = ""  # of files whose paths end so
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body after which the connection breaks
    body: bytes | None = None  # sent in place of the file
    ranges: str = "kept"  # or "ignored", "shifted", "short", "undeclared"
    drip: float | None = None  # seconds between two bytes
    endless: bool = False
    wait: threading.Event | None = None  # the second half of the body comes after it


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    query: str = ""


@dataclass
class Web:
    """What is on the server, by path, and what was asked of it."""

    files: dict[str, bytes] = field(default_factory=dict)
    pages: dict[str, Any] = field(default_factory=dict)  # answered as JSON
    redirects: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)  # the path's first part -> what opens it
    gated: set[str] = field(default_factory=set)  # those first parts whose licence has to be accepted
    validators: bool = True  # ETag and Last-Modified
    fault: Fault | None = None
    broken_pages: str | None = None  # how the answers in JSON end before their end
    broken_times: int = 99
    failing: int | None = None  # answer everything with this status
    asked: list[Request] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> list[Request]:
        return [request for request in self.asked if request.method == "GET" and request.path in self.files]

    def hugging_face(
        self, repo: str, files: dict[str, bytes], commit: str = COMMIT, revision: str = "main", card: Any = None
    ) -> None:
        """A repo whose only commit is `commit`, at main and at `revision`."""
        large = {
            name: {"size": len(body), "sha256": hashlib.sha256(body).hexdigest(), "pointerSize": 134}
            for name, body in files.items()
        }
        siblings = [{"rfilename": name, "size": len(body), "lfs": large[name]} for name, body in files.items()]
        info = {"id": repo, "sha": commit, "siblings": siblings, "private": False, "cardData": card or {}}
        tree: list[dict[str, Any]] = [
            {"type": "file", "path": name, "size": len(body), "oid": etag_of(body)} for name, body in files.items()
        ]
        for entry in tree:
            if entry["path"].endswith(".safetensors"):
                about = large[entry["path"]]
                entry["lfs"] = {"oid": about["sha256"], "size": about["size"], "pointerSize": about["pointerSize"]}
        self.pages[f"/api/models/{repo}"] = info
        for name in {"main", commit, revision}:
            self.pages[f"/api/models/{repo}/revision/{name}"] = info
            self.pages[f"/api/models/{repo}/tree/{name}"] = tree
        for name, body in files.items():
            self.files[f"/{repo}/resolve/{commit}/{name}"] = body

    def replicate(self, model: str, archive: bytes, version: str | None = None) -> None:
        tar = f"/delivery/{hashlib.sha256(archive).hexdigest()[:12]}/trained_model.tar"
        self.files[tar] = archive
        for path in (f"/{model}/_weights", f"/{model}/versions/{version}/_weights")[: 2 if version else 1]:
            self.redirects[path] = f"{self.url}{tar}?signature=sig-secret"

    def civitai(self, model: int, versions: dict[int, tuple[str, bytes]], kind: str = "LORA") -> None:
        """Versions oldest first, as id -> (base model, file)."""
        entries = [
            {
                "id": number,
                "modelId": model,
                "baseModel": base,
                "publishedAt": f"2025-01-{day + 1:02}T00:00:00.000Z",
                "model": {"name": "stand-in", "type": kind},
                "files": [
                    {"name": "preview.zip", "type": "Training Data", "downloadUrl": f"{self.url}/none"},
                    {
                        "name": "lora.safetensors",
                        "type": "Model",
                        "primary": True,
                        "sizeKB": len(body) / 1024,
                        "hashes": {"AutoV2": "0", "SHA256": hashlib.sha256(body).hexdigest().upper()},
                        "downloadUrl": f"https://civitai.com/api/download/models/{number}?type=Model",
                    },
                ],
            }
            for day, (number, (base, body)) in enumerate(versions.items())
        ]
        self.pages[f"/api/v1/models/{model}"] = {"id": model, "type": kind, "modelVersions": entries}
        for entry, (number, (_, body)) in zip(entries, versions.items(), strict=True):
            self.pages[f"/api/v1/model-versions/{number}"] = entry
            self.files[f"/api/download/models/{number}"] = body


@contextmanager
def serve(web: Web) -> Iterator[Web]:
    class Handler(_Handler):
        state = web

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError, ValueError):  # a client that hangs up
            super().handle()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        web, url = self.state, urlsplit(self.path)
        path = unquote(url.path)
        web.asked.append(Request(self.command, path, dict(self.headers), url.query))
        token = next((token for start, token in web.tokens.items() if path.startswith(start)), None)
        if web.failing:
            self._answer(web.failing, b"")
        elif token and self.headers.get("Authorization") != f"Bearer {token}":
            gated = {"X-Error-Code": "GatedRepo"} if path.startswith(tuple(web.gated)) else {}
            self._answer(401, b'{"error":"Unauthorized"}', gated)
        elif path in web.redirects:
            self._answer(302, b"", {"Location": web.redirects[path]})
        elif path.startswith("/api/") and web.broken_pages and web.broken_times:
            web.broken_times -= 1
            self._broken_page(web.broken_pages)
        elif path in web.pages:
            self._answer(200, json.dumps(web.pages[path]).encode(), {"Content-Type": "application/json"})
        elif path in web.files:
            self._file(path, web.files[path])
        else:
            repo = {"X-Error-Code": "RepoNotFound"} if path.startswith("/api/models/") else {}
            self._answer(404, b'{"error":"not found"}', repo)

    def _broken_page(self, how: str) -> None:
        self.send_response(200)
        chunked = how == "breaks its chunks"
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", "1000")))
        self.end_headers()
        self.wfile.write(b'5\r\n{"id"\r\nzz\r\n' if chunked else b'{"id"')
        self.close_connection = True
        deadline = time.monotonic() + {"stalls": 1.0, "drips": 3.0}.get(how, 0)
        while time.monotonic() < deadline:
            time.sleep(0.05)
            if how == "drips":
                self.wfile.write(b" ")

    def _fault(self, path: str) -> Fault:
        fault = self.state.fault
        if fault and fault.times > 0 and self.command == "GET" and path.endswith(fault.only):
            fault.times -= 1
            return fault
        return Fault(0)

    def _file(self, path: str, body: bytes) -> None:
        fault = self._fault(path)
        headers = {"Content-Type": "application/octet-stream", **fault.headers}
        if match := re.search(r"/resolve/([^/]+)/", path):
            headers["X-Repo-Commit"] = match[1]
        etag = f'"{etag_of(body)}"'
        if self.state.validators:
            headers |= {"ETag": etag, "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        if fault.status:
            self._answer(fault.status, b"", headers)
            return
        if self.headers.get("If-None-Match") == etag and self.state.validators:
            self._answer(304, b"", headers)
            return
        body, status = fault.body if fault.body is not None else body, 200
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if wanted and fault.ranges != "ignored" and fault.body is None:
            first, _, end = wanted.partition("-")
            size, status = len(body), 206
            start, last = int(first), min(int(end or size), size - 1)
            body = body[start : last + 1]
            if fault.ranges == "shifted":
                start += 1
            elif fault.ranges == "short":
                body = body[:-1]
            if fault.ranges != "undeclared":
                headers["Content-Range"] = f"bytes {start}-{last}/{size}"
        self._answer(status, body, headers, fault)

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: Fault | None = None
    ) -> None:
        fault = fault or Fault(0)
        self.send_response(status)
        if fault.endless or "Content-Length" in fault.headers:
            self.close_connection = True
        elif "Content-Length" not in (headers or {}) and status != 304:
            self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self._send(body, fault)

    def _send(self, body: bytes, fault: Fault) -> None:
        if fault.cut_after is not None and fault.cut_after < len(body):
            self.wfile.write(body[: fault.cut_after])
            self.close_connection = True
        elif fault.drip is not None:
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(fault.drip)
        elif fault.wait is not None:
            self.wfile.write(body[: len(body) // 2])
            fault.wait.wait(60)
            self.wfile.write(body[len(body) // 2 :])
        else:
            self.wfile.write(body)
            while fault.endless:
                self.wfile.write(b"\0" * 65536)


def etag_of(body: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def read_folder(folder: Path) -> dict[str, bytes]:
    """What a repo with the files of this folder holds."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def lora_file(seed: int = 0, columns: int = 2500, name: str = "lora_A") -> bytes:
    """A small LoRA of 40 KB, or so."""
    weight = np.random.default_rng(seed).standard_normal((4, columns)).astype(np.float32)
    return save({f"transformer.transformer_blocks.0.attn.to_q.{name}.weight": weight})


def tar_file(members: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for other in others:
            archive.addfile(other)
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def trained(lora: bytes) -> bytes:
    """What Replicate's trainer leaves."""
    folder = "output/flux_train_replicate"
    return tar_file(
        {f"{folder}/config.yaml": b"job: train", f"{folder}/lora.safetensors": lora, "captions/a.txt": b"a"}
    )
