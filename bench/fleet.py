"""The fleet: throughput, added latency, swaps of LoRAs, and what kills cost, with a predictor that only sleeps."""

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import requests

from bench._common import Goal, announce, benchmark_parser, judge, table
from bench._fleet_simulation import drawn, fewest_swaps, simulate
from tools import ROOT
from tools.fleet import Fleet, started_fleet, wait_until_ready
from tools.receiver import receiver
from tools.server import Project, cog_server

SLEEPER = Project(ROOT / "bench" / "sleeper", checked=False)
WORKERS = (1, 3, 8)
SIMULATED = (*WORKERS, 100, 1000)
SECONDS = (0.15, 3.0)  # of a prediction
SWAP_SECONDS = 0.5
LORAS = (6, 50)
POPULARITY = {"evenly": False, "by Zipf": True}
CLIENTS_PER_WORKER = 2  # each with one prediction at a time
KILLED_EVERY = 10.0  # seconds
GOALS = {0.15: 0.8, 3.0: 0.95}  # throughput as a share of workers / seconds


def main() -> None:
    parser = benchmark_parser(__doc__, goals=True)
    parser.add_argument("parts", nargs="*", help=f"some of: {', '.join(PARTS)} (default: all)")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    announce(sum(PARTS[name][1] for name in parts))
    judge([goal for name in parts for goal in PARTS[name][0]()], check=arguments.check)


def throughput() -> Iterator[Goal]:
    """Clients that each send the next prediction when their last is answered, all of one LoRA."""
    rows = []
    for workers in WORKERS:
        with fleet(workers) as running:
            for seconds in SECONDS:
                number = workers * (60 if seconds < 1 else 6)
                inputs = [{"prompt": str(turn), "seconds": seconds} for turn in range(number)]
                elapsed, answers = send_all(running, inputs, workers)
                share = number * seconds / workers / elapsed
                assert sorted(int(answer["output"].split()[0]) for answer in answers) == list(range(number))
                rows.append([workers, seconds, number, f"{number / elapsed:.2f}", f"{share:.3f}"])
                yield Goal(f"throughput of {workers} at {seconds:g} s", share, GOALS[seconds], at_least=True)
    table(["workers", "a prediction, s", "predictions", "a second", "of workers / seconds"], rows)


def latency() -> Iterator[Goal]:
    """One prediction that takes no time, sent to an idle fleet and to a single server in turn."""
    with fleet(1) as running, cog_server(project=SLEEPER) as single:
        times: dict[str, list[float]] = {running.url: [], single.url: []}
        with requests.Session() as session:
            for _ in range(110):
                for url, each in times.items():
                    started = time.perf_counter()
                    answer = session.post(f"{url}/predictions", json={"input": {}})
                    each.append(1000 * (time.perf_counter() - started))
                    assert answer.json()["status"] == "succeeded"
                    time.sleep(0.05)  # the single server is busy until a moment after its answer
        many, one = (statistics.median(each[10:]) for each in times.values())
    table(["single server, ms", "fleet, ms", "added, ms"], [[f"{one:.1f}", f"{many:.1f}", f"{many - one:.1f}"]])
    yield Goal("added latency in milliseconds", many - one, 15)


def swaps() -> Iterator[Goal]:
    """Swaps of ours and of Ray's own multiplexing, for the same sequences, against the fewest that are possible."""
    rows, totals = [], Counter[str]()
    found: dict[tuple[Any, ...], dict[str, tuple[int, float]]] = {}
    sequences = {
        (workers, loras, how): drawn(loras, 40 * workers, zipf=zipf)
        for workers in WORKERS[1:]
        for loras in LORAS
        for how, zipf in POPULARITY.items()
    }
    for router, module in (("ours", "fleet"), ("Ray's", "bench._ray_multiplexing")):
        for workers in WORKERS[1:]:
            with fleet(workers, module=module) as running:
                for case, sequence in sequences.items():
                    if case[0] == workers:
                        found.setdefault(case, {})[router] = counted_swaps(running, sequence, workers)
    for (workers, loras, how), by_router in found.items():
        ours, rays = by_router["ours"], by_router["Ray's"]
        sequence = sequences[workers, loras, how]
        totals.update(ours=ours[0], rays=rays[0])
        shown = [f"{swaps} in {seconds:.0f} s" for swaps, seconds in (ours, rays)]
        rows.append([workers, f"{loras} {how}", len(sequence), *shown, fewest_swaps(sequence, workers)])
    table(["workers", "LoRAs", "predictions", "ours", "Ray's multiplexing", "fewest in this order"], rows)
    yield Goal("swaps, of those of Ray's multiplexing", totals["ours"] / totals["rays"], 0.8)


def kills() -> Iterator[Goal]:
    """A random worker's server dies every ten seconds while 1,000 predictions are made. Each tells a webhook when it is
    done, and the front answers it: both once."""
    number, workers = 1000, 3
    answered: Counter[str] = Counter()
    servers: set[int] = set()
    with fleet(workers) as running, receiver() as (address, received), killing(servers) as deaths:

        def one(turn: int) -> None:
            body = {"id": f"p{turn}", "input": {"prompt": str(turn), "seconds": SECONDS[0]}}
            answer = running.post(body | {"webhook": address, "webhook_events_filter": ["completed"]}).json()
            if str(answer.get("output")).split(" ")[0] == str(turn):
                answered[f"p{turn}"] += 1
                servers.add(answer["metrics"]["server"])

        started = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS_PER_WORKER * workers) as clients:
            list(clients.map(one, range(number)))
        elapsed = time.perf_counter() - started
        retried = running.metrics()["fleet_retries_total"]
        time.sleep(2)  # for the last webhooks
    lost = number - len(answered)
    completed = Counter(event.json()["id"] for event in received)
    doubled = sum(times > 1 for times in (*answered.values(), *completed.values()))
    header = ["predictions", "servers killed", "tried again", "seconds", "lost", "doubled"]
    table(header, [[number, len(deaths), f"{retried:.0f}", f"{elapsed:.0f}", lost, doubled]])
    yield Goal("lost", lost, 0)
    yield Goal("doubled", doubled, 0)


def simulation() -> Iterator[Goal]:
    """The dispatcher alone, on a clock of its own."""
    rows = []
    for workers in SIMULATED:
        for loras in LORAS:
            for how, zipf in POPULARITY.items():
                sequence = drawn(loras, min(max(200, 20 * workers), 5000), zipf=zipf)
                run = simulate(sequence, workers, SECONDS[1], SWAP_SECONDS, CLIENTS_PER_WORKER * workers)
                fewest = fewest_swaps(sequence, workers)
                needed = workers / SECONDS[1]
                shown = [f"{run.throughput:.3f}", f"{1e6 * run.decision_seconds:.0f}", f"{needed:.1f}"]
                rows.append([workers, f"{loras} {how}", len(sequence), run.swaps, fewest, *shown])
    share = f"of workers / {SECONDS[1]:g} s"
    header = ["workers", "LoRAs", "predictions", "swaps", "fewest in this order", share, "decision, us", "a second"]
    table(header, rows)
    yield from ()


@contextmanager
def fleet(workers: int, module: str = "fleet") -> Iterator[Fleet]:
    """Ready, of the predictor that sleeps."""
    options = ("--project", str(SLEEPER.folder), "--workers", str(workers), "--swap-seconds", str(SWAP_SECONDS))
    with started_fleet(*options, module=module) as running:
        wait_until_ready(running)
        warm_up(running, workers)
        yield running


def warm_up(running: Fleet, workers: int) -> None:
    """Every worker has made a prediction."""
    send_all(running, [{"seconds": 0.5}] * (CLIENTS_PER_WORKER * workers), workers)


def send_all(running: Fleet, inputs: Sequence[dict[str, Any]], workers: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds until all are answered, and the answers."""
    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS_PER_WORKER * workers) as clients:
        answers = list(clients.map(lambda each: running.post({"input": each}).json(), inputs))
    return time.perf_counter() - started, answers


def counted_swaps(running: Fleet, sequence: Sequence[str], workers: int) -> tuple[int, float]:
    """How many of the predictions found another LoRA in their worker, and how long all took."""
    inputs = [{"replicate_weights": lora, "seconds": SECONDS[0], "swap_seconds": SWAP_SECONDS} for lora in sequence]
    elapsed, answers = send_all(running, inputs, workers)
    return sum(answer["metrics"]["swapped"] for answer in answers), elapsed


@contextmanager
def killing(servers: set[int]) -> Iterator[list[int]]:
    """Kill one of these processes now and then; the dead ones come out."""
    stop = threading.Event()
    dead: list[int] = []

    def kill() -> None:
        while not stop.wait(KILLED_EVERY):
            alive = sorted(servers - set(dead))
            if alive:
                dead.append(random.choice(alive))
                with suppress(ProcessLookupError):
                    os.kill(dead[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield dead
    finally:
        stop.set()
        thread.join()


PARTS: dict[str, tuple[Callable[[], Iterator[Goal]], float]] = {  # with the seconds that each takes
    "throughput": (throughput, 150),
    "latency": (latency, 50),
    "swaps": (swaps, 300),
    "kills": (kills, 120),
    "simulation": (simulation, 60),
}


if __name__ == "__main__":
    main()
