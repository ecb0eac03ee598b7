"""Peak memory and start-up at full width: against the bytes of the weights, and against reading the files once."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench._common import (
    Goal,
    announce,
    benchmark_parser,
    full_width_checkpoints,
    judge,
    spread,
    table,
    weight_bytes,
)

SIDE = 1024
SETUP_ROUNDS = 5
MEMORY_GOAL, SETUP_GOAL = 1.15, 1.5
MB = 2**20
PARTS = ("forward", "request", "libraries", "decode", "setup")


def main() -> None:
    parser = benchmark_parser(__doc__, goals=True)
    parser.add_argument(
        "part", nargs="?", choices=PARTS, help="one measurement; the benchmark starts a process for each"
    )
    options = parser.parse_args()
    if options.part:
        print(json.dumps(measure(options.part)))
        return
    announce(180)
    folders = full_width_checkpoints()
    dev = {"dev": folders["dev"]}
    weights = weight_bytes(dev) / MB
    parts = tqdm(("forward", "request", "libraries", "decode"), desc="memory", unit="process")
    forward, request, libraries, decode = (json.loads(in_child(part)) for part in parts)
    model = request - libraries
    rows = [
        ["libraries and interpreter", f"{libraries:.0f}"],
        ["weights: one transformer, VAE, text encoders", f"{weights:.0f}"],
        [f"activations of one transformer forward at {SIDE} x {SIDE}", f"{forward:.0f}"],
        [f"activations of one VAE decoding at {SIDE} x {SIDE}", f"{decode:.0f}"],
        ["peak of loading and one whole request, libraries included", f"{request:.0f}"],
        ["peak without the libraries / (weights + transformer forward)", f"{model / (weights + forward):.3f}"],
        ["peak without the libraries / (weights + VAE decoding)", f"{model / (weights + decode):.3f}"],
    ]
    print(f"Goal: at most {MEMORY_GOAL} of the weights and the activations of one forward.")
    table(["resident memory (MB)", ""], rows)

    reading, setup = [], []
    for _ in tqdm(range(SETUP_ROUNDS), desc="start-up", unit="round"):
        reading.append(read_files(folders))
        setup.append(json.loads(in_child("setup")))
    rows = [
        ["files of both models", f"{weight_bytes(folders) / MB:.0f} MB"],
        ["reading them once, from the page cache (s)", spread(reading)],
        ["Predictor.setup() on them (s)", spread(setup)],
        [f"ratio (goal: at most {SETUP_GOAL})", f"{statistics.median(setup) / statistics.median(reading):.2f}"],
    ]
    table(["start-up", ""], rows)
    goals = [
        Goal("peak without the libraries / (weights + transformer forward)", model / (weights + forward), MEMORY_GOAL),
        Goal("setup() / reading the files", statistics.median(setup) / statistics.median(reading), SETUP_GOAL),
    ]
    judge(goals, check=options.check)


def in_child(part: str) -> str:
    """Run one measurement in a process of its own; its last line is the result."""
    done = subprocess.run([sys.executable, "-m", "bench.memory", part], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def read_files(folders: dict[str, Path]) -> float:
    started = time.perf_counter()
    for folder in folders.values():
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.read(16 * MB):
                        pass
    return time.perf_counter() - started


def resident(field: str = "VmRSS") -> float:
    """MB of this process; "VmHWM" is the peak since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(part: str) -> Any:
    from flux.device import compute_dtype  # noqa: PLC0415 - weighed by "libraries"
    from flux.models import load_flux  # noqa: PLC0415
    from flux.pipelines import Job, decode, denoise, encode_prompt  # noqa: PLC0415

    if part == "libraries":
        return resident()
    folders = full_width_checkpoints()
    if part == "setup":
        import os  # noqa: PLC0415

        import predict  # noqa: PLC0415

        os.environ |= {f"FLUX_{model.upper()}": str(folder) for model, folder in folders.items()}
        started = time.perf_counter()
        predict.Predictor().setup()
        return time.perf_counter() - started
    cpu = torch.device("cpu")
    flux = load_flux({"dev": folders["dev"]}, cpu, compute_dtype(cpu))["dev"].exact
    job = Job(size=(SIDE, SIDE), steps=1, guidance=3.0, embeds=encode_prompt(flux, "a red circle"))
    if part == "request":
        decode(flux, denoise(flux, job, 0, lambda: None), job.size)
        return resident("VmHWM")
    latents = torch.zeros(1, (SIDE // 16) ** 2, 64, dtype=flux.dtype)
    with torch.no_grad():
        used = flux.transformer if part == "forward" else flux.vae
        sum(float(weight.sum()) for weight in used.parameters())  # page the weights in before counting
        before = resident()
        forget_peak()
        if part == "forward":
            denoise(flux, job, 0, lambda: None)
        else:
            decode(flux, latents, job.size)
    return resident("VmHWM") - before


if __name__ == "__main__":
    main()
