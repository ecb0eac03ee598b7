"""The fleet's decisions on a clock of their own: no process, no network, any number of workers."""

import heapq
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fleet.dispatch import Dispatcher, Weights


@dataclass(frozen=True)
class Run:
    """What came of a sequence of predictions."""

    swaps: int
    throughput: float  # of what workers without a swap would reach
    decision_seconds: float  # of this processor, for each prediction


def drawn(loras: int, count: int, *, zipf: bool, seed: int = 1) -> list[str]:
    """The LoRA of each prediction: evenly, or the k-th most popular 1/k as often as the first."""
    weights = [1 / rank if zipf else 1 for rank in range(1, loras + 1)]
    return random.Random(seed).choices([f"lora/{number}" for number in range(loras)], weights, k=count)


def simulate(sequence: Sequence[str], workers: int, seconds: float, swap_seconds: float, clients: int) -> Run:
    """So many clients each send the next prediction of the sequence when their last one is answered."""
    dispatcher = Dispatcher(swap_seconds)
    dispatcher.set_workers(map(str, range(workers)), 0.0)
    ends: list[tuple[float, str, str]] = []  # when, worker, prediction
    sent, now, swaps, spent = 0, 0.0, 0, 0.0
    idle_clients, done = min(clients, len(sequence)), 0
    while done < len(sequence):
        started = time.perf_counter()
        while idle_clients and sent < len(sequence):
            dispatcher.add(str(sent), Weights("dev", False, ((sequence[sent], 1.0),)))
            sent, idle_clients = sent + 1, idle_clients - 1
        for prediction, worker, moves in dispatcher.assign(now):
            swaps += moves >= 2
            heapq.heappush(ends, (now + seconds + swap_seconds * (moves >= 2), worker, prediction))
        look = dispatcher.next_look(now)
        if look is not None and (not ends or now + look < ends[0][0]):
            now += look + 1e-9
        else:
            now, worker, prediction = heapq.heappop(ends)
            dispatcher.finished(worker, prediction, now)
            idle_clients, done = idle_clients + 1, done + 1
        spent += time.perf_counter() - started
    return Run(swaps, len(sequence) * seconds / workers / now, spent / len(sequence))


def fewest_swaps(sequence: Sequence[str], workers: int) -> int:
    """Of any assignment that takes the predictions in their order: each worker holds one LoRA, and the one that is
    wanted again last is given up (L. A. Belady, 1966)."""
    next_use: dict[int, float] = {}
    last_seen: dict[str, int] = {}
    for index in range(len(sequence) - 1, -1, -1):
        next_use[index] = last_seen.get(sequence[index], float("inf"))
        last_seen[sequence[index]] = index
    held: dict[str, float] = {}  # its next use
    swaps = 0
    for index, lora in enumerate(sequence):
        if lora not in held:
            swaps += 1
            if len(held) == workers:
                del held[max(held, key=lambda name: held[name])]
        held[lora] = next_use[index]
    return swaps
