"""One file from one address into one place on disk: in parallel where that helps, resumed, bounded, hashed on the way.

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
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import requests
from urllib3.exceptions import HTTPError

from fetch.network import HubDownError, Pace, RetryError, Stop, host_of, open_url, plain_reason, retrying, same_server
from fetch.remote import Arrived, Remote, check_answer, check_space, too_large
from lora.errors import LoraError
from settings import MB

log = logging.getLogger("flux-lora")

BLOCK = 1 << 20
HASH_BLOCK = 1 << 22  # smaller ones wait more often for the interpreter than they hash


@dataclass
class _Segment:
    start: int
    end: int | None  # None: to wherever the server stops
    at: int = field(init=False)  # everything before it is on disk

    def __post_init__(self) -> None:
        self.at = self.start


class _UnrangedError(Exception):
    """The server's ranges are not to be trusted: everything is to come in one stream."""


def download(
    session: requests.Session, remote: Remote, path: Path, most_bytes: int, stop: Stop, pace: Pace
) -> Arrived | None:
    """Fetch `remote` to `path`; None when the server says that the caller's copy is current (304).

    Raises `HubDownError` when the server does not deliver, `LoraError` for everything else, `StoppedError` when told
    to. What is at `path` then is not to be used.
    """
    if remote.size is not None and remote.size > most_bytes:
        raise too_large(remote.label, remote.size, most_bytes)
    with _open_file(path) as file:
        transfer = _Transfer(session, remote, file, path, most_bytes, stop, pace)
        try:
            arrived = transfer.run(ranged=True)
        except _UnrangedError:
            log.info("%s: the server's ranges cannot be relied on, one stream it is", remote.label)
            arrived = transfer.run(ranged=False)
    if arrived and remote.sha256 and arrived.sha256 != remote.sha256.lower():
        raise LoraError(f"{remote.label} did not arrive as its hub describes it: its SHA-256 is another. Try again.")
    return arrived


class _Transfer:
    def __init__(  # noqa: PLR0913, PLR0917 - what `download` takes
        self,
        session: requests.Session,
        remote: Remote,
        file: int,
        path: Path,
        most_bytes: int,
        stop: Stop,
        pace: Pace,
    ) -> None:
        self.session, self.remote, self.file, self.path = session, remote, file, path
        self.most_bytes, self.stop, self.pace = most_bytes, stop, pace
        self.location = remote.url  # where redirects led
        self.total: int | None = None
        self.segments: list[_Segment] = []
        self.headers: Mapping[str, str] = {}
        self.over = threading.Event()

    def run(self, *, ranged: bool) -> Arrived | None:
        """All of the file, from its first byte."""
        os.truncate(self.file, 0)
        self.total, self.segments, self.location = None, [], self.remote.url
        if ranged:
            return retrying(self._ranged_attempt, self.stop, self.pace)
        return retrying(self._plain_attempt, self.stop, self.pace)

    def _ranged_attempt(self) -> Arrived | None:
        with self._request(f"bytes=0-{self.pace.segment - 1}") as response:
            if response.status_code == 304:
                return None
            if response.status_code != 206:
                return self._plain(response)
            self._plan(response)
            with ThreadPoolExecutor(self.pace.connections + 1) as pool:
                rest: SimpleQueue[_Segment] = SimpleQueue()
                for segment in self.segments[1:]:
                    rest.put(segment)
                workers = [pool.submit(self._first_segment, response, rest)]
                workers += [pool.submit(self._more_segments, rest) for _ in range(self._helpers())]
                return self._hash_along(workers)

    def _plain_attempt(self) -> Arrived | None:
        with self._request(None) as response:
            return None if response.status_code == 304 else self._plain(response)

    def _helpers(self) -> int:
        return min(self.pace.connections, len(self.segments)) - 1

    def _plan(self, response: requests.Response) -> None:
        start, end, total = _content_range(response)
        if start != 0 or end != min(self.pace.segment, total) or _length(response) not in (None, end):
            raise _UnrangedError
        self._expect(total)
        self.over.clear()
        step = self.pace.segment
        self.segments = [_Segment(at, min(at + step, total)) for at in range(0, total, step)]
        self.headers = response.headers

    def _plain(self, response: requests.Response) -> Arrived:
        os.truncate(self.file, 0)
        length = _length(response)
        if length is not None:
            self._expect(length)
        self.over.clear()
        self.segments, self.headers = [_Segment(0, length)], response.headers
        with ThreadPoolExecutor(1) as pool:
            return self._hash_along([pool.submit(self._read, response, self.segments[0])])

    def _expect(self, total: int) -> None:
        if total > self.most_bytes:
            raise too_large(self.remote.label, total, self.most_bytes)
        check_space(self.path, total)
        self.total = total

    def _first_segment(self, response: requests.Response, rest: "SimpleQueue[_Segment]") -> None:
        try:
            self._read(response, self.segments[0])
        except RetryError:
            self.stop.wait(self.pace.pauses[0] if self.pace.pauses else 0.0)
            self._segment(self.segments[0])
        self._more_segments(rest)

    def _more_segments(self, rest: "SimpleQueue[_Segment]") -> None:
        while not self.over.is_set():
            try:
                segment = rest.get_nowait()
            except Empty:
                return
            self._segment(segment)

    def _segment(self, segment: _Segment) -> None:
        try:
            retrying(lambda: self._rest_of(segment), self.stop, self.pace)
        except RetryError as error:  # enough tries: the file is not begun again
            raise HubDownError(str(error)) from None

    def _rest_of(self, segment: _Segment) -> None:
        """From where the segment broke off; a second try starts at the first address, since signed ones expire."""
        if segment.at == segment.end or self.over.is_set():
            return
        try:
            with self._request(f"bytes={segment.at}-{(segment.end or 0) - 1}") as response:
                if response.status_code != 206 or _content_range(response) != (segment.at, segment.end, self.total):
                    raise _UnrangedError
                if response.headers.get("ETag") != self.headers.get("ETag"):
                    raise _UnrangedError  # another file by now
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
        try:
            answer = open_url(self.session, url, headers, token, self.pace)
        except HubDownError as error:
            raise RetryError(f"{remote.label}: {error}") from None
        with self.stop.reading(answer) as response:
            if byte_range and response.status_code == 416:
                raise _UnrangedError
            check_answer(response, remote)
            self.location = response.url
            yield response

    def _read(self, response: requests.Response, segment: _Segment) -> None:
        """The body into the file, block by block."""
        while segment.end is None or segment.at < segment.end:
            self.stop.check()
            if self.over.is_set():
                return
            try:
                block = response.raw.read1(BLOCK, decode_content=False)
            except (HTTPError, OSError, http.client.HTTPException) as error:
                raise self._broken(plain_reason(error)) from None
            if not block:
                break
            if segment.end is not None:
                block = block[: segment.end - segment.at]
            elif segment.at + len(block) > self.most_bytes:
                raise too_large(self.remote.label, None, self.most_bytes)
            _write(self.file, block, segment.at)
            segment.at += len(block)
        if segment.end is None:
            segment.end = segment.at
        if segment.at < segment.end:
            raise self._broken("the connection broke")

    def _broken(self, reason: str) -> LoraError:
        self.stop.check()
        return RetryError(f"{self.remote.label} broke off on its way from {host_of(self.location)} ({reason}).")

    def _hash_along(self, workers: "list[Future[None]]") -> Arrived:
        """Hash what is on disk while the rest arrives, in order; the first worker that fails ends them all."""
        digest, position, reported = hashlib.sha256(), 0, time.monotonic()
        block = memoryview(bytearray(HASH_BLOCK))  # one for all: a fresh one a time costs as much as the hashing
        try:
            for segment in self.segments:
                while segment.end is None or position < segment.end:
                    self.stop.check()
                    failed = next((worker for worker in workers if worker.done() and worker.exception()), None)
                    if failed is not None:
                        failed.result()
                    ready = segment.at - position
                    if ready == 0:
                        time.sleep(0.001)
                    else:
                        read = os.preadv(self.file, [block[: min(ready, HASH_BLOCK)]], position)
                        digest.update(block[:read])
                        position += read
                    if time.monotonic() - reported > self.pace.report:
                        reported = time.monotonic()
                        self._report()
            for worker in workers:
                worker.result()
        finally:
            self.over.set()
        return Arrived(digest.hexdigest(), self.headers.get("ETag"), self.headers.get("Last-Modified"))

    def _report(self) -> None:
        here = sum(segment.at - segment.start for segment in self.segments)
        of = f" of {self.total / MB:.0f}" if self.total else ""
        log.info("%s: %.0f%s MB", self.remote.label, here / MB, of)


def _content_range(response: requests.Response) -> tuple[int, int, int]:
    """Start, end (behind the last byte) and the file's size (RFC 9110, 14.4)."""
    match = re.fullmatch(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})", response.headers.get("Content-Range", "").strip())
    if not match:
        raise _UnrangedError
    start, last, total = map(int, match.groups())
    return start, last + 1, total


def _length(response: requests.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() and "Transfer-Encoding" not in response.headers else None


@contextmanager
def _open_file(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
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
        raise LoraError(f"The file cannot be written into LORA_CACHE_DIR: {error.strerror}.") from None
