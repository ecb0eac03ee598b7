"""Fetching a LoRA of 1 GB, or of as many as the argument says, against curl, in parallel, and again from the cache."""

import logging
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from bench._common import Goal, announce, benchmark_parser, judge, spread, table
from fetch.limits import FetchLimits
from fetch.sources import fetch_lora
from settings import MB, Settings, read_settings

ROUNDS = 5
LIMIT = 20 * MB  # bytes a second of each connection
CACHE_ROUNDS = 300
GOAL_CURL, GOAL_PARALLEL, GOAL_CACHED = 0.8, 5.0, 2.0
COMMIT = "5f0c7a6e" * 5


def main() -> None:
    parser = benchmark_parser(__doc__, goals=True)
    parser.add_argument("gigabytes", nargs="?", type=float, default=1.0, help="of the LoRA (default: %(default)g)")
    options = parser.parse_args()
    announce(20 + 30 * options.gigabytes)
    logging.getLogger("flux-lora").setLevel(logging.WARNING)
    size = int(options.gigabytes * 10**9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "lora.safetensors"
        rows = math.ceil(size / 4 / 4096)
        weights = np.random.default_rng(0).standard_normal((rows, 4096), dtype=np.float32)
        save_file({"transformer.proj_out.lora_A.weight": weights}, file)
        del weights
        rates = against_curl(file, folder)
        parallel = against_one_stream(file, folder)
        cached = from_the_cache(folder)
    table(
        [f"{size / 10**9:g} GB", "median (range)", "goal"],
        [
            ["curl, MB/s", spread(rates["curl"], 0), ""],
            ["fetch_lora, hashed and checked, MB/s", spread(rates["fetch"], 0), ""],
            ["fetch_lora / curl, rounds in turn", spread(rates["ratio"]), f"at least {GOAL_CURL}"],
            [f"{LIMIT // MB} MB/s a connection: one stream, MB/s", f"{parallel[0]:.1f}", ""],
            ["the same in parallel, MB/s", f"{parallel[1]:.1f}", ""],
            ["parallel / one stream", f"{parallel[1] / parallel[0]:.2f}", f"at least {GOAL_PARALLEL:g}"],
            ["a cached immutable reference, ms", spread(cached, 3), f"below {GOAL_CACHED:g}"],
        ],
    )
    goals = [
        Goal("fetch_lora / curl", statistics.median(rates["ratio"]), GOAL_CURL, at_least=True),
        Goal("parallel / one stream", parallel[1] / parallel[0], GOAL_PARALLEL, at_least=True),
        Goal("a cached immutable reference, ms", statistics.median(cached), GOAL_CACHED),
    ]
    judge(goals, check=options.check)


def against_curl(file: Path, folder: Path) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {"curl": [], "fetch": [], "ratio": []}
    with file_server(file) as url:
        for _ in tqdm(range(ROUNDS), unit="round"):
            started = time.perf_counter()
            subprocess.run(["curl", "-s", "-o", folder / "curl", url], check=True)
            rates["curl"].append(rate(file, started))
            (folder / "curl").unlink()
            rates["fetch"].append(fetch_rate(file, url, folder, FetchLimits()))
            rates["ratio"].append(rates["fetch"][-1] / rates["curl"][-1])
    return rates


def against_one_stream(file: Path, folder: Path) -> tuple[float, float]:
    """MB/s of one connection and of as many as there are, on at most 200 MB."""
    part = folder / "part.safetensors"
    rows = max(1, min(file.stat().st_size, 200 * MB) // 16384)
    save_file({"transformer.proj_out.lora_A.weight": np.zeros((rows, 4096), np.float32)}, part)
    with file_server(part, LIMIT) as url:
        return (
            fetch_rate(part, url, folder, replace(FetchLimits(), connections=1)),
            fetch_rate(part, url, folder, FetchLimits()),
        )


def from_the_cache(folder: Path) -> list[float]:
    """Milliseconds for one version of a Replicate model, when nothing listens any more where its hub was."""
    reference = f"acme/lora/{'ab' * 32}"
    with file_server(folder / "part.safetensors") as url:
        settings = cache_settings(folder / "cache", REPLICATE_ENDPOINT=url)
        fetch_lora(reference, settings)
    times = []
    for _ in range(CACHE_ROUNDS):
        started = time.perf_counter()
        fetched = fetch_lora(reference, settings)
        times.append(1000 * (time.perf_counter() - started))
        assert fetched.origin == "disk"
    return times


@contextmanager
def file_server(file: Path, limit: int | None = None) -> Iterator[str]:
    """The address of `file`, on a server that is a process of its own and leaves the copying to the kernel."""
    command = [sys.executable, "-m", "bench._file_server", str(file), *([str(limit)] if limit else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}/lora.safetensors"
        finally:
            server.terminate()


def fetch_rate(file: Path, url: str, folder: Path, limits: FetchLimits) -> float:
    cache = folder / "fetched"
    started = time.perf_counter()
    fetch_lora(url, cache_settings(cache), limits)
    measured = rate(file, started)
    shutil.rmtree(cache)
    return measured


def cache_settings(cache: Path, **environment: str) -> Settings:
    return read_settings({"LORA_CACHE_DIR": str(cache), "LORA_ALLOW_PRIVATE_HOSTS": "1", **environment})


def rate(file: Path, started: float) -> float:
    return file.stat().st_size / MB / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
