"""How long each phase of one request takes, for the log and the metrics."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("flux-lora")


class Phases:
    """The clock of one request. A phase may come in several parts, such as one a picture; they add up. A phase within
    another stops the outer one's clock, so that every moment counts once.

    `synchronize` waits for what is queued on the device, so that its work counts where it was asked for.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize
        self._running: list[str] = []  # the innermost last
        self._since = 0.0
        self._reported: set[str] = set()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count the body's time as the phase `name`."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count that much of one phase as another's."""
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def report(self) -> None:
        """Log a line for every phase that ended since the last report."""
        for name, seconds in self.seconds.items():
            if name not in self._reported and name not in self._running:
                log.info("%s: %.3f s", name, seconds)
                self._reported.add(name)

    def _count(self) -> None:
        """Give the time since the last call to the phase that runs."""
        self._synchronize()
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
