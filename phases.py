"""How long each phase of one request takes, for the log and the metrics."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flux.device import synchronize

log = logging.getLogger("flux-lora")


class Phases:
    """The clock of one request. A phase may come in several parts, such as one a picture; they add up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reported: set[str] = set()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count the body's time as the phase `name`."""
        started = time.perf_counter()
        yield
        synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def report(self) -> None:
        """Log a line for every phase that ended since the last report."""
        for name, seconds in self.seconds.items():
            if name not in self._reported:
                log.info("%s: %.3f s", name, seconds)
                self._reported.add(name)
