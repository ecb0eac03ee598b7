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
from checkpoints import WEIGHTS
from demo.check import Verdict, check
from demo.scenes import HELD_OUT, Scene, caption
from device import compute_dtype
from flux_models import Flux, load_flux
from flux_pipelines import Job, decode, denoise, encode_prompt

CPU = torch.device("cpu")
STEPS = {"dev": 28, "schnell": 4}
CASES = (("dev", 512, 96), ("schnell", 512, 96), ("dev", 1024, 24), ("schnell", 1024, 48))  # model, side, pictures
GUIDANCE = 3.0
ATTRIBUTES = [field.name for field in fields(Verdict)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where demo-dev and demo-schnell are")
    parser.add_argument("--share", type=float, default=1.0, help="how many of the usual pictures to draw, from 0 to 1")
    options = parser.parse_args()
    folders = {model: options.weights / f"demo-{model}" for model in STEPS}
    models = load_flux({name: folder for name, folder in folders.items() if folder.exists()}, CPU, compute_dtype(CPU))
    rows = [
        measure(models[model], side, max(1, round(options.share * pictures)))
        for model, side, pictures in CASES
        if model in models
    ]
    table(["model, size, pictures", *ATTRIBUTES, "everything", "seconds a picture"], rows)


def measure(flux: Flux, side: int, pictures: int) -> list[str]:
    scenes = random.Random("held out").sample(HELD_OUT, pictures)
    started = time.perf_counter()
    verdicts = [check(draw(flux, scene, side, seed), scene) for seed, scene in enumerate(scenes)]
    seconds = (time.perf_counter() - started) / pictures
    shares = [share(verdicts, name) for name in [*ATTRIBUTES, "everything"]]
    return [f"{flux.name}, {side} x {side}, {pictures}", *(f"{100 * s:.0f}%" for s in shares), f"{seconds:.1f}"]


def share(verdicts: list[Verdict], attribute: str) -> float:
    return statistics.mean(bool(getattr(verdict, attribute)) for verdict in verdicts)


def draw(flux: Flux, scene: Scene, side: int, seed: int) -> Image.Image:
    embeds = encode_prompt(flux, caption(scene))
    job = Job(size=(side, side), steps=STEPS[flux.name], guidance=GUIDANCE, embeds=embeds)
    return decode(flux, denoise(flux, job, seed, lambda: None), job.size)


if __name__ == "__main__":
    main()
