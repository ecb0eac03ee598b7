"""What the benchmarks share: how they start and end, a FLUX of full width outside the repository, tables, errors."""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from published import SHARED_PARTS
from tools.random_flux import FULL_WIDTH, write_random_flux

FOLDER = Path(os.environ.get("BENCH_DIR", Path(tempfile.gettempdir()) / "flux-lora-bench-weights"))


def benchmark_parser(description: str | None, *, goals: bool = False) -> argparse.ArgumentParser:
    """The command line that all benchmarks have in common; `goals` says whether this one has any."""
    parser = argparse.ArgumentParser(prog=f"script/bench {Path(sys.argv[0]).stem}", description=description)
    if goals:
        parser.add_argument("--check", action="store_true", help="exit with status 1 when a goal is missed")
    return parser


def announce(seconds: float) -> None:
    """Say how long the benchmark will take, to the nearest ten seconds or the nearest minute."""
    length = f"{round(seconds, -1):.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
    print(f"This takes about {length} on 2 cores that do nothing else.", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Goal:
    """What a value in a benchmark's tables should reach."""

    name: str
    value: float
    bound: float
    at_least: bool = False  # whether the bound is the lowest good value; otherwise it is the highest

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.4g}, goal: at {'least' if self.at_least else 'most'} {self.bound:g}"


def judge(goals: Sequence[Goal], *, check: bool) -> None:
    """Name the goals that were missed. If there are any and `check` is set, end the process with status 1."""
    missed = [goal for goal in goals if not goal.met]
    for goal in missed:
        print(f"missed: {goal}", flush=True)
    if check and missed:
        sys.exit(1)


def full_width_checkpoints() -> dict[str, Path]:
    """All of dev and schnell's own parts (5.7 GB), with hidden size 3072, 2 double and 4 single blocks; made once."""
    folders = {model: FOLDER / model for model in ("dev", "schnell")}
    for model, folder in folders.items():
        if not folder.exists():
            print(f"making a random {model} of full width in {folder}, once: minutes more", file=sys.stderr, flush=True)
            unfinished = folder.with_suffix(".unfinished")
            write_random_flux(unfinished, FULL_WIDTH, model=model)
            if model == "schnell":
                for part in SHARED_PARTS:
                    shutil.rmtree(unfinished / part)
            unfinished.rename(folder)
    return folders


def weight_bytes(folders: dict[str, Path]) -> int:
    return sum(file.stat().st_size for folder in folders.values() for file in folder.rglob("*.safetensors"))


def machine() -> str:
    """The processor, its cores and torch's version, for the line above a table."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, torch {torch.__version__}"


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print(f"\n{machine()}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, the smallest and the largest value."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def psnr(a: Image.Image, b: Image.Image) -> float:
    """The peak signal-to-noise ratio of two pictures in dB; infinite where they are the same."""
    squares = float(np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2))
    return float(10 * np.log10(255**2 / squares)) if squares else np.inf


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The norm of the difference, relative to the norm of `truth`, which is float64."""
    return float((value.double() - truth).norm() / truth.norm())
