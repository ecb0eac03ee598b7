"""Work on threads that no request owns. The request only waits for it, in short steps.

Cog cancels a request by raising an exception in its thread, at any line. So whatever holds a lock, a file or a
connection runs on another thread. The two threads share only `SimpleQueue`s, which hold no lock between two lines of
Python: a request that is cancelled leaves nothing behind but a result that nobody reads.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NoReturn, TypeVar

POLL_SECONDS = 0.05  # Cog's cancelling is noticed only between two waits
T = TypeVar("T")


class TimeLimitError(Exception):
    """The work has not begun, or not finished, in time. What has begun goes on."""


class Worker:
    """One thread that lives as long as the process and does one job after another."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._busy_since = math.inf  # on the clock of time.monotonic
        Thread(target=self._work, name=name, daemon=True).start()

    @property
    def busy_seconds(self) -> float:
        """How long it has been at its present job, 0 when it has none."""
        return max(0.0, time.monotonic() - self._busy_since)

    def submit(self, job: Callable[[], None]) -> None:
        """Do `job`, which raises nothing, after those that were submitted before."""
        self._jobs.put(job)

    def call(self, work: Callable[[], T], seconds: float) -> T:
        """What `work` returns, or raise what it raises.

        It has `seconds` to begin, after which it never does, and as many again to finish. Raises `TimeLimitError`.
        """
        begun: SimpleQueue[None] = SimpleQueue()
        done: SimpleQueue[Callable[[], T]] = SimpleQueue()
        begin_by = time.monotonic() + seconds

        def job() -> None:
            if time.monotonic() > begin_by:
                return
            self._busy_since = time.monotonic()
            begun.put(None)
            result = _run(work)
            self._busy_since = math.inf
            done.put(result)

        self.submit(job)
        _wait(begun, seconds)
        return _wait(done, seconds)()

    def _work(self) -> None:
        while True:
            self._jobs.get()()


# It starts all other threads, since nobody cancels it. CPython 3.11 knows a new thread by its starter's number until it
# runs: Cog's cancelling, aimed at the request's thread, could end a thread that the request is just starting, and the
# request would wait for that thread for ever.
_STARTER = Worker("starter")


def call_on_new_thread(work: Callable[[], T], seconds: float, name: str) -> T:
    """What `work` returns, or raise what it raises, on a thread of its own.

    Raises `TimeLimitError` after `seconds`. The thread ends only when `work` does.
    """
    done: SimpleQueue[Callable[[], T]] = SimpleQueue()

    def start() -> None:
        try:
            Thread(target=lambda: done.put(_run(work)), name=name, daemon=True).start()
        except RuntimeError as error:  # the system allows no more threads
            done.put(_raising(error))

    _STARTER.submit(start)
    return _wait(done, seconds)()


def _run(work: Callable[[], T]) -> Callable[[], T]:
    """Do it now; what that returns gives or raises the result."""
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
        return _raising(error)
    return lambda: result


def _raising(error: BaseException) -> Callable[[], NoReturn]:
    def raise_it() -> NoReturn:
        raise error

    return raise_it


def _wait(queue: "SimpleQueue[T]", seconds: float) -> T:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        with suppress(Empty):
            return queue.get(timeout=min(POLL_SECONDS, left))
    raise TimeLimitError
