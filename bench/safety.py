"""Screening 1 megapixel pictures against encoding them as webp; with a FOLDER of pictures, its false alarms too."""

import io
import logging
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from bench._common import Goal, announce, benchmark_parser, judge, seconds, spread, table
from flux.device import choose_device
from images import FORMATS
from safety import Screener, load_screener
from settings import read_settings

ROUNDS = 30
SIDE = 1024
GOALS = {"one / webp encode": 1.0, "four at once / four times one": 1.0}  # at most


def main() -> None:
    parser = benchmark_parser(__doc__, goals=True)
    parser.add_argument("folder", nargs="?", type=Path, help="harmless pictures, each of which takes 0.1 seconds more")
    options = parser.parse_args()
    announce(60)
    logging.getLogger("flux-lora").setLevel(logging.WARNING)
    settings = read_settings()
    screener = load_screener(settings, choose_device(settings.flux_device))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    smooth = Image.merge(
        "RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.new("L", (256, 256), 90)]
    )
    pictures = {"noise": noise, "a colour gradient": smooth.resize((SIDE, SIDE), Image.Resampling.BICUBIC)}
    times = {what: measure(screener, picture, what) for what, picture in pictures.items()}
    ratios = {what: ratios_of(*columns.values()) for what, columns in times.items()}
    rows = [
        *([name, *(spread(column[name], 1) for column in times.values())] for name in times["noise"]),
        *(
            [f"{name} (goal: at most {goal:g})", *(spread(column[name]) for column in ratios.values())]
            for name, goal in GOALS.items()
        ),
    ]
    table([f"{screener.checker.name}, ms: median (range)", *pictures], rows)
    if options.folder:
        false_alarms(screener, options.folder)
    goals = [
        Goal(f"{name}, {what}", statistics.median(column[name]), goal)
        for name, goal in GOALS.items()
        for what, column in ratios.items()
    ]
    judge(goals, check=options.check)


def measure(screener: Screener, picture: Image.Image, what: str) -> dict[str, list[float]]:
    """Milliseconds of three actions, timed in turn, so that whatever else the machine does slows each of them alike."""
    actions: dict[str, Callable[[], object]] = {
        "screening one": lambda: screener.allowed([picture]),
        "screening four at once": lambda: screener.allowed([picture] * 4),
        "bare webp encode": lambda: picture.save(io.BytesIO(), "WEBP", quality=80),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in tqdm(range(ROUNDS), desc=what, unit="round"):
        for name, action in actions.items():
            times[name].append(1000 * seconds(action))
    return times


def ratios_of(one: list[float], four: list[float], encode: list[float]) -> dict[str, list[float]]:
    """The ratios of `GOALS`, round by round."""
    to_encode = [a / b for a, b in zip(one, encode, strict=True)]
    to_four_times_one = [a / (4 * b) for a, b in zip(four, one, strict=True)]
    return dict(zip(GOALS, (to_encode, to_four_times_one), strict=True))


def false_alarms(screener: Screener, folder: Path) -> None:
    """Every picture of the folder is taken to be harmless; the highest scores are listed."""
    scores = {}
    for file in tqdm(sorted(folder.rglob("*")), desc=folder.name, unit="file"):
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
