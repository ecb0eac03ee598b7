"""Screening 1 megapixel pictures against encoding them as webp; with a FOLDER of pictures, its false alarms too."""

import io
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bench._common import spread, table
from flux.device import choose_device
from images import FORMATS
from safety import Screener, load_screener
from settings import read_settings

ROUNDS = 30
SIDE = 1024
GOAL_OF_ONE, GOAL_OF_FOUR = 1.0, 1.0


def main() -> None:
    logging.getLogger("flux-lora").setLevel(logging.WARNING)
    settings = read_settings()
    screener = load_screener(settings, choose_device(settings.flux_device))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    smooth = Image.merge(
        "RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.new("L", (256, 256), 90)]
    )
    pictures = {"noise": noise, "a colour gradient": smooth.resize((SIDE, SIDE), Image.Resampling.BICUBIC)}
    columns = {name: measure(screener, picture) for name, picture in pictures.items()}
    rows = next(iter(columns.values()))
    table(
        [f"{screener.checker.name}, ms: median (range)", *columns],
        [[row, *(column[row] for column in columns.values())] for row in rows],
    )
    for folder in sys.argv[1:2]:
        false_alarms(screener, Path(folder))


def measure(screener: Screener, picture: Image.Image) -> dict[str, str]:
    """The three are timed in turn, so that whatever else the machine does slows each of them alike."""
    timed: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, action in (
            ("screening one", lambda: screener.allowed([picture])),
            ("screening four at once", lambda: screener.allowed([picture] * 4)),
            ("bare webp encode", lambda: picture.save(io.BytesIO(), "WEBP", quality=80)),
        ):
            timed.setdefault(name, []).append(milliseconds(action))
    one, four, encode = timed.values()
    ratios = {
        f"one / webp encode (goal: at most {GOAL_OF_ONE:g})": [a / b for a, b in zip(one, encode, strict=True)],
        f"four at once / four times one (goal: below {GOAL_OF_FOUR:g})": [
            a / (4 * b) for a, b in zip(four, one, strict=True)
        ],
    }
    return {name: spread(values, 1) for name, values in timed.items()} | {
        name: spread(values) for name, values in ratios.items()
    }


def milliseconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - started)


def false_alarms(screener: Screener, folder: Path) -> None:
    """Every picture of the folder is taken to be harmless; the highest scores are listed."""
    scores = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with suppress(UnidentifiedImageError):
                picture = Image.open(file, formats=FORMATS).convert("RGB")
                scores[str(file.relative_to(folder))] = screener.checker.score([picture])[0]
    if not scores:
        sys.exit(f"There is no picture in {folder}.")
    limits = np.array(list(screener.checker.limits.values()))
    blocked = sum(bool((score > limits).all()) for score in scores.values())
    highest = sorted(scores.items(), key=lambda entry: -min(entry[1] - limits))[:5]
    rows = [[name, screener.checker.describe(score.tolist())] for name, score in highest]
    table([f"{len(scores)} pictures, {blocked} blocked; the highest", "scores"], rows)


if __name__ == "__main__":
    main()
