"""Which waiting prediction goes to which idle worker, so that few weights move and nobody waits long for that.

Pure decisions: the clock is the caller's, so the same code decides in a fleet and in a simulation of many workers.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

MOST_OVERTAKEN = 4  # times the number of workers: how often later predictions may go before an earlier one
SMOOTHING = 0.1  # share of the newest duration in the mean duration


class Weights(NamedTuple):
    """What a prediction runs on. Two that are equal need no weights moved between them."""

    model: str
    fast: bool
    loras: tuple[tuple[str, float], ...]  # reference and strength: of the main LoRA, then of the extra one


@dataclass
class Worker:
    """What the dispatcher knows of one worker."""

    held: dict[tuple[str, bool], tuple[tuple[str, float], ...]] = field(default_factory=dict)  # LoRAs by model, fast
    last: Weights | None = None
    prediction: str | None = None  # that it is at, by id
    since: float = -math.inf  # it has been at that, or idle

    def moves(self, weights: Weights | None) -> int:
        """How much would be moved to run on them: 0 nothing, 1 another model or precision, 2 LoRAs, 3 both."""
        if weights is None:
            return 0
        key = weights.model, weights.fast
        same_model = self.last is not None and key == (self.last.model, self.last.fast)
        return (not same_model) + 2 * (self.held.get(key, ()) != weights.loras)

    def begin(self, prediction: str, weights: Weights | None, now: float) -> None:
        self.prediction, self.since = prediction, now
        if weights is not None:
            self.held[weights.model, weights.fast] = weights.loras
            self.last = weights


class Given(NamedTuple):
    """A worker's next prediction, and what it moves for it: see `Worker.moves`."""

    prediction: str
    worker: str
    moves: int


@dataclass
class Waiting:
    """A prediction in the queue."""

    weights: Weights | None  # None for a request whose body says nothing of them: any worker will do
    overtaken: int = 0
    passed_by: float | None = None  # since when a worker has been idle that it did not take


class Dispatcher:
    """The queue and the workers. Every method is told the time, in seconds on any clock that does not go back."""

    def __init__(self, swap_seconds: float) -> None:
        """`swap_seconds`: what merging other LoRAs costs, and so the longest wait for a worker that has the wanted."""
        self.workers: dict[str, Worker] = {}
        self.waiting: dict[str, Waiting] = {}
        self.mean_seconds = 0.0  # of a prediction, lately
        self._swap_seconds = swap_seconds

    def set_workers(self, ids: Iterable[str], now: float) -> None:
        """These exist now. A new one is idle; what one that is gone was doing is forgotten."""
        self.workers = {worker: self.workers.get(worker) or Worker(since=now) for worker in ids}

    def add(self, prediction: str, weights: Weights | None) -> None:
        """Put it at the end of the queue."""
        self.waiting[prediction] = Waiting(weights)

    def remove(self, prediction: str) -> None:
        """Take it out of the queue, if it is there."""
        self.waiting.pop(prediction, None)

    def finished(self, worker: str, prediction: str, now: float) -> None:
        """The worker is idle again, if it is there and that is what it was at."""
        known = self.workers.get(worker)
        if known is not None and known.prediction == prediction:
            seconds = now - known.since
            self.mean_seconds += (seconds - self.mean_seconds) * (SMOOTHING if self.mean_seconds else 1.0)
            known.prediction, known.since = None, now

    def assign(self, now: float) -> list[Given]:
        """Give idle workers their next predictions, which count as begun."""
        given = []
        while self.waiting and (idle := self._idle()):
            choice = self._same_weights(idle) or self._oldest_that_may(idle, now)
            if choice is None:
                break
            prediction, id_ = choice
            for other, entry in self.waiting.items():
                if other == prediction:
                    break
                entry.overtaken += 1
            worker, weights = self.workers[id_], self.waiting.pop(prediction).weights
            given.append(Given(prediction, id_, worker.moves(weights)))
            worker.begin(prediction, weights, now)
        return given

    def next_look(self, now: float) -> float | None:
        """In how many seconds `assign` may have something to give although nothing else has happened."""
        since = [entry.passed_by for entry in self.waiting.values() if entry.passed_by is not None]
        return max(0.0, min(since) + self._swap_seconds - now) if since and self._idle() else None

    def _idle(self) -> list[str]:
        return [id_ for id_, worker in self.workers.items() if worker.prediction is None]

    def _same_weights(self, idle: list[str]) -> tuple[str, str] | None:
        """The oldest prediction that one of the idle workers can run as it is, unless the oldest of all has waited."""
        oldest = next(iter(self.waiting.values()))
        if oldest.overtaken >= MOST_OVERTAKEN * len(self.workers):
            return None
        ready = {worker.last: id_ for id_ in idle if (worker := self.workers[id_]).last is not None}
        for prediction, entry in self.waiting.items():
            if entry.weights in ready:
                return prediction, ready[entry.weights]
        return None

    def _oldest_that_may(self, idle: list[str], now: float) -> tuple[str, str] | None:
        """The oldest prediction that is not better off waiting, and the idle worker that it costs least."""
        wanted = {entry.weights for entry in self.waiting.values()}
        ahead: Counter[Weights | None] = Counter()  # how many wait for the same weights
        for prediction, entry in self.waiting.items():
            best = min(idle, key=lambda id_: self._cost(self.workers[id_], entry.weights, wanted))
            free = self.workers[best].moves(entry.weights) == 0
            if free or not self._waits(entry, ahead[entry.weights], now):
                return prediction, best
            ahead[entry.weights] += 1
        return None

    @staticmethod
    def _cost(worker: Worker, weights: Weights | None, wanted: set[Weights | None]) -> tuple[int, bool, float]:
        """Fewest moves, then weights that nobody waits for, then those unused for longest."""
        return worker.moves(weights), worker.last in wanted, worker.since

    def _waits(self, entry: Waiting, ahead: int, now: float) -> bool:
        """Whether a busy worker with nothing to move is likely to come to it before a swap would be over.

        `ahead` others wait for the same.
        """
        if entry.passed_by is None:
            entry.passed_by = now
        ends = sorted(
            worker.since + self.mean_seconds
            for worker in self.workers.values()
            if worker.prediction is not None and worker.moves(entry.weights) == 0
        )
        if not ends:
            return False
        rounds, place = divmod(ahead, len(ends))
        begins = max(ends[place], now) + rounds * self.mean_seconds
        return begins < entry.passed_by + self._swap_seconds
