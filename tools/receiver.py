"""A loopback server that takes whatever is sent to it, webhooks and uploads: for tests and benchmarks."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Received:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.body)


@contextmanager
def receiver(location: str | None = None) -> Iterator[tuple[str, list[Received]]]:
    """Its address, and what has come so far. With a `location` it answers that what came is kept there now; `{}` is
    where the prediction's id goes."""
    received: list[Received] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            received.append(Received(self.command, self.path, headers, body))
            self.send_response(200)
            if location:
                self.send_header("Location", location.format(headers["x-prediction-id"]) + self.path + "?signature=1")
            self.end_headers()

        do_PUT = do_POST  # noqa: N815 - http.server's name

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", received
        server.shutdown()
