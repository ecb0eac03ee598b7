"""What the benchmarks share: a FLUX of full width in a folder outside the repository, tables, the machine's name."""

import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flux.checkpoints import SHARED_PARTS
from tools.random_flux import FULL_WIDTH, write_random_flux

FOLDER = Path(os.environ.get("BENCH_DIR", Path(tempfile.gettempdir()) / "flux-lora-bench-weights"))


def full_width_checkpoints() -> dict[str, Path]:
    """dev whole and schnell's own parts (5.7 GB): hidden size 3072, 2 double and 4 single blocks, made once."""
    folders = {model: FOLDER / model for model in ("dev", "schnell")}
    for model, folder in folders.items():
        if not folder.exists():
            print(f"building a random {model} of full width in {folder} ...", flush=True)
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
    """The processor, its cores and the libraries, for the line above a table."""
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
    """The median with the smallest and the largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
