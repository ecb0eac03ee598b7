"""One file from one address onto the disk: in parallel where that helps, resumed, bounded, hashed while it arrives.

The first request asks for the first segment. A server that answers with that range (206) is asked for the rest over
several connections; one that sends everything (200) is read to its end. What a server says about ranges is checked, and
one that contradicts itself is read in one stream instead.
"""

import hashlib
import http.client
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import requests
from urllib3.exceptions import HTTPError

from fetch.errors import CacheError, UnavailableError
from fetch.limits import too_large
from fetch.network import Client, host_of, plain_reason, same_server
from fetch.remote import Downloaded, RemoteFile, check_answer
from lora.errors import LoraError
from settings import MB

log = logging.getLogger("flux-lora")

BLOCK = 1 << 20
HASH_BLOCK = 1 << 22  # smaller ones wait more often for the interpreter than they hash


@dataclass
class _Segment:
    start: int
    end: int | None  # None: wherever the server stops
    position: int = field(init=False)  # everything before it is on disk

    def __post_init__(self) -> None:
        self.position = self.start


class _BadRangesError(Exception):
    """The server's ranges cannot be trusted: the file has to come in one stream."""


def download(
    client: Client, remote: RemoteFile, path: Path, most_bytes: int, make_room: Callable[[int], None]
) -> Downloaded | None:
    """Download `remote` to `path`; None when the server says that the caller's copy is current (304).

    Raises `UnavailableError` when the server does not deliver, `LoraError` for everything else, `FetchCancelledError`.
    What is at `path` then is not to be used. `make_room` is called with the size as soon as that is known.
    """
    if remote.size is not None and remote.size > most_bytes:
        raise too_large(remote.label, remote.size, most_bytes)
    with _open_file(path) as file:
        transfer = _Transfer(client, remote, file, most_bytes, make_room)
        try:
            downloaded = transfer.run(ranged=True)
        except _BadRangesError:
            log.info("%s: the server's ranges do not fit together, so the file is read in one stream", remote.label)
            downloaded = transfer.run(ranged=False)
    if downloaded and remote.sha256 and downloaded.sha256 != remote.sha256.lower():
        raise LoraError(f"{remote.label} did not arrive as its hub describes it: its SHA-256 is another. Try again.")
    return downloaded


class _Transfer:
    def __init__(
        self, client: Client, remote: RemoteFile, file: int, most_bytes: int, make_room: Callable[[int], None]
    ) -> None:
        self.client, self.limits, self.cancellation = client, client.limits, client.cancellation
        self.remote, self.file, self.most_bytes, self.make_room = remote, file, most_bytes, make_room
        self.location = remote.url  # where redirects led
        self.total: int | None = None
        self.segments: list[_Segment] = []
        self.headers: Mapping[str, str] = {}
        self.ended = threading.Event()  # of the present attempt

    def run(self, *, ranged: bool) -> Downloaded | None:
        """The file from its first byte on."""
        os.truncate(self.file, 0)
        self.total, self.segments, self.location = None, [], self.remote.url
        return self.client.retrying(self._ranged_attempt if ranged else self._plain_attempt)

    def _ranged_attempt(self) -> Downloaded | None:
        with self._request(f"bytes=0-{self.limits.segment_bytes - 1}") as response:
            if response.status_code == 304:
                return None
            if response.status_code != 206:
                return self._read_all(response)
            self._plan(response)
            with ThreadPoolExecutor(self.limits.connections + 1) as pool:
                rest: SimpleQueue[_Segment] = SimpleQueue()
                for segment in self.segments[1:]:
                    rest.put(segment)
                others = min(self.limits.connections, len(self.segments)) - 1
                workers = [pool.submit(self._first_segment, response, rest)]
                workers += [pool.submit(self._more_segments, rest) for _ in range(others)]
                return self._hash_along(workers)

    def _plain_attempt(self) -> Downloaded | None:
        with self._request(None) as response:
            return None if response.status_code == 304 else self._read_all(response)

    def _plan(self, response: requests.Response) -> None:
        start, end, total = _content_range(response)
        step = self.limits.segment_bytes
        if start != 0 or end != min(step, total) or _length(response) not in (None, end):
            raise _BadRangesError
        self._expect(total)
        self.ended.clear()
        self.segments = [_Segment(start, min(start + step, total)) for start in range(0, total, step)]
        self.headers = response.headers

    def _read_all(self, response: requests.Response) -> Downloaded:
        os.truncate(self.file, 0)
        length = _length(response)
        if length is not None:
            self._expect(length)
        self.ended.clear()
        self.segments, self.headers = [_Segment(0, length)], response.headers
        with ThreadPoolExecutor(1) as pool:
            return self._hash_along([pool.submit(self._read, response, self.segments[0])])

    def _expect(self, total: int) -> None:
        if total > self.most_bytes:
            raise too_large(self.remote.label, total, self.most_bytes)
        self.make_room(total)
        self.total = total

    def _first_segment(self, response: requests.Response, rest: "SimpleQueue[_Segment]") -> None:
        try:
            self._read(response, self.segments[0])
        except UnavailableError:
            self.cancellation.sleep(self.limits.retry_pauses[0] if self.limits.retry_pauses else 0.0)
            self._segment(self.segments[0])
        self._more_segments(rest)

    def _more_segments(self, rest: "SimpleQueue[_Segment]") -> None:
        while not self.ended.is_set():
            try:
                segment = rest.get_nowait()
            except Empty:
                return
            self._segment(segment)

    def _segment(self, segment: _Segment) -> None:
        self.client.retrying(lambda: self._rest_of(segment))

    def _rest_of(self, segment: _Segment) -> None:
        """From where the segment broke off; a second try starts at the first address, since signed ones expire."""
        if segment.position == segment.end or self.ended.is_set():
            return
        try:
            with self._request(f"bytes={segment.position}-{(segment.end or 0) - 1}") as response:
                expected = (segment.position, segment.end, self.total)
                if response.status_code != 206 or _content_range(response) != expected:
                    raise _BadRangesError
                if response.headers.get("ETag") != self.headers.get("ETag"):
                    raise _BadRangesError  # another file by now
                self._read(response, segment)
        except LoraError:
            self.location = self.remote.url
            raise

    @contextmanager
    def _request(self, byte_range: str | None) -> Iterator[requests.Response]:
        """The answer, when it is a good one."""
        url, remote = self.location, self.remote
        headers = {**remote.headers, **({"Range": byte_range} if byte_range else {})}
        token = remote.token if same_server(url, remote.url) else None
        with self.client.get(url, remote.label, token, headers) as response:
            if byte_range and response.status_code == 416:
                raise _BadRangesError
            check_answer(response, remote)
            self.location = response.url
            yield response

    def _read(self, response: requests.Response, segment: _Segment) -> None:
        """The body into the file, block by block."""
        while segment.end is None or segment.position < segment.end:
            self.cancellation.check()
            if self.ended.is_set():
                return
            try:
                block = response.raw.read1(BLOCK, decode_content=False)
            except (HTTPError, OSError, http.client.HTTPException) as error:
                raise self._broken_off(plain_reason(error)) from None
            if not block:
                break
            if segment.end is not None:
                block = block[: segment.end - segment.position]
            elif segment.position + len(block) > self.most_bytes:
                raise too_large(self.remote.label, None, self.most_bytes)
            _write(self.file, block, segment.position)
            segment.position += len(block)
        if segment.end is None:
            segment.end = segment.position
        if segment.position < segment.end:
            raise self._broken_off("the connection broke")

    def _broken_off(self, reason: str) -> LoraError:
        self.cancellation.check()
        host = host_of(self.location)
        return UnavailableError(f"{self.remote.label} broke off on its way from {host} ({reason}).", retry_after=0)

    def _hash_along(self, workers: "list[Future[None]]") -> Downloaded:
        """Hash what is on disk while the rest arrives, in order; the first worker that fails ends them all."""
        digest, position, reported = hashlib.sha256(), 0, time.monotonic()
        block = memoryview(bytearray(HASH_BLOCK))  # one for all: a fresh one a time costs as much as the hashing
        try:
            for segment in self.segments:
                while segment.end is None or position < segment.end:
                    self.cancellation.check()
                    failed = next((worker for worker in workers if worker.done() and worker.exception()), None)
                    if failed is not None:
                        failed.result()
                    ready = segment.position - position
                    if ready == 0:
                        time.sleep(0.001)
                    else:
                        read = os.preadv(self.file, [block[: min(ready, HASH_BLOCK)]], position)
                        digest.update(block[:read])
                        position += read
                    if time.monotonic() - reported > self.limits.progress_interval:
                        reported = time.monotonic()
                        self._report()
            for worker in workers:
                worker.result()
        finally:
            self.ended.set()
        return Downloaded(digest.hexdigest(), self.headers.get("ETag"), self.headers.get("Last-Modified"))

    def _report(self) -> None:
        here = sum(segment.position - segment.start for segment in self.segments)
        of = f" of {self.total / MB:.0f}" if self.total else ""
        log.info("%s: %.0f%s MB", self.remote.label, here / MB, of)


def _content_range(response: requests.Response) -> tuple[int, int, int]:
    """Start, end (behind the last byte) and the file's size (RFC 9110, 14.4)."""
    match = re.fullmatch(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})", response.headers.get("Content-Range", "").strip())
    if not match:
        raise _BadRangesError
    start, last, total = map(int, match.groups())
    return start, last + 1, total


def _length(response: requests.Response) -> int | None:
    """None where the server does not say, or says what is no length: the body then ends where the connection does."""
    text = response.headers.get("Content-Length", "")
    known = re.fullmatch(r"[0-9]{1,18}", text) and "Transfer-Encoding" not in response.headers
    return int(text) if known else None


@contextmanager
def _open_file(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)  # less the umask
    try:
        yield file
    finally:
        os.close(file)


def _write(file: int, block: bytes, at: int) -> None:
    view = memoryview(block)
    try:
        while view:
            written = os.pwrite(file, view, at)
            view, at = view[written:], at + written
    except OSError as error:
        raise CacheError(f"The file cannot be written into LORA_CACHE_DIR: {error.strerror}.") from None
