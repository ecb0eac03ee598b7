"""One file at every address, with ranges, by sendfile: python -m bench._file_server FILE [BYTES_A_SECOND].

It prints its port. The limit, where there is one, is for each connection.
"""

import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

PIECE = 1 << 18


def main() -> None:
    file, limit = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else None
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection, file, limit), daemon=True).start()


def serve(connection: socket.socket, file: Path, limit: float | None) -> None:
    """Answer one connection's requests until it closes."""
    with connection, file.open("rb") as source, suppress(ConnectionError):
        size, requests = os.fstat(source.fileno()).st_size, connection.makefile("rb")
        while head := read_head(requests):
            wanted = re.search(rb"range: *bytes=(\d+)-(\d+)", head, re.IGNORECASE)
            start, end = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
            status = f"206 Partial Content\r\nContent-Range: bytes {start}-{end - 1}/{size}" if wanted else "200 OK"
            answer = f'HTTP/1.1 {status}\r\nContent-Length: {end - start}\r\nETag: "{size}"\r\n\r\n'
            connection.sendall(answer.encode())
            send(connection, source.fileno(), start, end, limit)


def read_head(requests: IO[bytes]) -> bytes:
    """A request's lines; nothing when the connection has ended."""
    head = b""
    while (line := requests.readline()) not in (b"", b"\r\n"):
        head += line
    return head


def send(connection: socket.socket, file: int, start: int, end: int, limit: float | None) -> None:
    """The bytes from `start` to `end`, no faster than `limit`."""
    at, due = start, time.monotonic()
    while at < end:
        sent = os.sendfile(connection.fileno(), file, at, min(end - at, PIECE if limit else 1 << 30))
        if sent == 0:
            return
        at += sent
        if limit:
            due += sent / limit
            time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main()
