"""One prediction on its way through the front: what the queue, the front and whoever cancels it know of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fleet.dispatch import Weights


def _nothing() -> None: ...


@dataclass(eq=False)
class Ticket:
    """Made by the front, read by the router in the same process and on the same event loop."""

    id: str  # of the prediction
    weights: Weights | None
    input: Any = None  # as the client sent it
    worker: str | None = None  # that runs it; None while it waits
    began: float = 0.0  # on the clock of time.monotonic
    canceled: bool = False
    overdue: bool = False  # it has waited for too long
    leave_queue: Callable[[], Any] = _nothing  # ends the call that waits for a worker
    release: Callable[[], None] = _nothing  # frees the worker, or the place in the queue

    def begin(self, worker: str) -> None:
        """It is that worker's now."""
        self.worker, self.began = worker, time.monotonic()

    def wait_again(self) -> None:
        """For a second try: it is in the queue once more."""
        self.worker = None

    def cancel(self) -> None:
        """Leave the queue, if it is there, and do not come back."""
        self.canceled = True
        if self.worker is None:
            self.leave_queue()

    def give_up(self) -> None:
        """Leave the queue, if it is there, because that took too long."""
        if self.worker is None:
            self.overdue = True
            self.leave_queue()


TICKETS: dict[str, Ticket] = {}  # of the predictions that are under way, by id; the router looks them up by theirs
WORKERS: set[str] = set()  # that run, as the router knows them
