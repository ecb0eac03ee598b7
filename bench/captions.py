"""Does the demo model draw what it is told? Held-out combinations of attributes, checked picture by picture."""

import argparse
import random
import statistics
import time
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image

from bench._common import table
from demo.check import Verdict, check
from demo.scenes import HELD_OUT, caption
from flux.checkpoints import WEIGHTS
from flux.device import compute_dtype
from flux.models import Flux, load_flux
from flux.pipelines import Job, decode, denoise, encode_prompt

CPU = torch.device("cpu")
STEPS = {"dev": 28, "schnell": 4}
CASES = (  # model, side, pictures; go_fast draws the scenes that bf16 draws
    ("dev", 512, 96),
    ("dev, go_fast", 512, 96),
    ("schnell", 512, 96),
    ("dev", 1024, 24),
    ("schnell", 1024, 48),
)
GUIDANCE = 3.0
ATTRIBUTES = [field.name for field in fields(Verdict)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where demo-dev and demo-schnell are")
    parser.add_argument("--share", type=float, default=1.0, help="how many of the usual pictures to draw, from 0 to 1")
    options = parser.parse_args()
    folders = {model: options.weights / f"demo-{model}" for model in STEPS}
    models = load_flux({name: folder for name, folder in folders.items() if folder.exists()}, CPU, compute_dtype(CPU))
    rows = []
    for case, side, pictures in CASES:
        exact = models[case.partition(",")[0]]
        flux = exact.fast if "go_fast" in case else exact
        assert flux is not None
        rows.append([case, *measure(flux, side, max(1, round(options.share * pictures)))])
        print(*rows[-1], flush=True)
    columns = ["size, pictures", *ATTRIBUTES, "everything", "seconds of denoising and decoding, median"]
    table(["model", *columns], rows)


def measure(flux: Flux, side: int, pictures: int) -> list[str]:
    scenes = random.Random("held out").sample(HELD_OUT, pictures)
    verdicts, times = [], []
    for seed, scene in enumerate(scenes):
        job = Job((side, side), STEPS[flux.name], GUIDANCE, encode_prompt(flux, caption(scene)))
        started = time.perf_counter()
        picture = draw(flux, job, seed)
        times.append(time.perf_counter() - started)
        verdicts.append(check(picture, scene))
    shares = [share(verdicts, name) for name in [*ATTRIBUTES, "everything"]]
    return [f"{side} x {side}, {pictures}", *(f"{100 * s:.0f}%" for s in shares), f"{statistics.median(times):.1f}"]


def share(verdicts: list[Verdict], attribute: str) -> float:
    return statistics.mean(bool(getattr(verdict, attribute)) for verdict in verdicts)


def draw(flux: Flux, job: Job, seed: int) -> Image.Image:
    return decode(flux, denoise(flux, job, seed, lambda: None), job.size)


if __name__ == "__main__":
    main()
