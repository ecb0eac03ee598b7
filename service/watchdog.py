"""A small process beside the worker that ends the server when nothing else can help, so that whoever watches it starts
a new one.

Cog's server stays up for ever with a worker that is dead, and waits for ever for one whose thread stands still. This
process sees the first by a pipe that only the worker holds, and the second by what the predictor says on that pipe and
what the server answers to /health-check. It is run as a script, by `python
-I -S`, so that it is small: it imports the standard library alone.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BEGUN, ENDED = b"b", b"e"  # on the pipe
GRACE_SECONDS = 3.0  # in which the server answers the last request, or ends by itself
HEALTH_SECONDS = 10.0  # between two looks at the server


class Watchdog:
    """The worker's end of the pipe. Outside of Cog's server it does nothing."""

    def __init__(self, request_seconds: float, input_seconds: float) -> None:
        """How long one request may run, and how long the server may be busy without one; 0 is for ever."""
        from coglet import server  # noqa: PLC0415 - the script must do without

        self._pipe: int | None = None
        if not server.active:
            return
        read, self._pipe = os.pipe()
        arguments = (os.getppid(), os.getpid(), os.environ.get("PORT", "5000"), request_seconds, input_seconds)
        subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-I", "-S", __file__, *map(str, arguments)],
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that no signal for the worker's group ends it too
        )
        os.close(read)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Within, a request runs."""
        self._say(BEGUN)
        try:
            yield
        finally:
            self._say(ENDED)

    def _say(self, what: bytes) -> None:
        if self._pipe is not None:
            with suppress(OSError):  # somebody ended it
                os.write(self._pipe, what)


class Guard:
    """What the script knows of the worker. Times are on the clock of time.monotonic."""

    def __init__(self, request_seconds: float, input_seconds: float) -> None:
        self.request_seconds, self.input_seconds = request_seconds, input_seconds
        self.running_since: float | None = None
        self.quiet_since: float | None = None  # when the server was last seen without a request; None: never yet

    def hear(self, said: bytes, now: float) -> None:
        """Take in what the predictor says."""
        for what in said:
            self.running_since = now if what == BEGUN[0] else None
            if self.quiet_since is not None:
                self.quiet_since = now

    def see(self, status: str | None, now: float) -> None:
        """Take in what /health-check says; None where it does not answer."""
        if status == "READY":
            self.running_since, self.quiet_since = None, now

    def complaint(self, now: float) -> str | None:
        """Why the worker has to be ended, if it has."""
        if self.running_since is not None:
            if 0 < self.request_seconds < now - self.running_since:
                return f"a request has run for more than REQUEST_TIMEOUT, {self.request_seconds:g} s"
        elif self.quiet_since is not None and 0 < self.input_seconds < now - self.quiet_since:
            return (
                f"the server has not been ready for more than INPUT_TIMEOUT, {self.input_seconds:g} s, though no "
                "prediction runs"
            )
        return None


def main(server: int, worker: int, port: int, request_seconds: float, input_seconds: float) -> None:
    """Watch until the worker is gone, then see to it that the server is gone too."""
    guard = Guard(request_seconds, input_seconds)
    shortest = min((limit for limit in (request_seconds, input_seconds) if limit > 0), default=HEALTH_SECONDS)
    pause, next_look = min(HEALTH_SECONDS, shortest / 4), 0.0
    while True:
        if select.select([sys.stdin], [], [], pause / 4)[0]:
            said = os.read(sys.stdin.fileno(), 4096)
            if not said:
                break
            guard.hear(said, time.monotonic())
        if time.monotonic() >= next_look:
            guard.see(_status(port), time.monotonic())
            next_look = time.monotonic() + pause
        complaint = guard.complaint(time.monotonic())
        if complaint:
            _log(server, f"{complaint}: the worker is ended")
        if complaint or _gone(server, 0):
            time.sleep(GRACE_SECONDS if not complaint else 0)  # a worker that is well ends with its server
            with suppress(OSError):
                os.kill(worker, signal.SIGKILL)
    _end(server)


def _end(server: int) -> None:
    if not _gone(server, GRACE_SECONDS):
        _log(server, "the worker is dead: the server is ended")
        for end in (signal.SIGKILL, signal.SIGTERM):  # as a container's first process it hears only the second
            with suppress(OSError):
                os.kill(server, end)
            if _gone(server, GRACE_SECONDS):
                return


def _gone(process: int, seconds: float) -> bool:
    """Whether the process ends within that time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            os.kill(process, 0)
        except OSError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def _status(port: int) -> str | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health-check", timeout=HEALTH_SECONDS) as answer:
            return str(json.load(answer)["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _log(server: int, message: str) -> None:
    """A line in the server's own log, since the worker's may be stuck."""
    with suppress(OSError), open(f"/proc/{server}/fd/2", "w") as log:  # noqa: PTH123 - pathlib would be half of what is loaded
        print(f"watchdog: {message}", file=log)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
