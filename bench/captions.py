"""Does the demo model draw what it is told? Held-out combinations of attributes, checked picture by picture."""

import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from bench._common import Goal, announce, benchmark_parser, judge, table
from demo.check import Verdict, check
from demo.scenes import HELD_OUT, caption
from flux.device import compute_dtype
from flux.models import Flux, load_flux
from flux.pipelines import Job, decode, denoise, encode_prompt
from published import WEIGHTS

CPU = torch.device("cpu")
STEPS = {"dev": 28, "schnell": 4}


@dataclass(frozen=True)
class Case:
    """One model at one size; go_fast draws the scenes that bf16 draws."""

    name: str
    side: int
    pictures: int  # in a whole run
    seconds: float  # of a picture on 2 cores, about


CASES = (
    Case("dev", 512, 96, 2.5),
    Case("dev, go_fast", 512, 96, 3),
    Case("schnell", 512, 96, 0.5),
    Case("dev", 1024, 24, 15),
    Case("schnell", 1024, 48, 3.5),
)
SHARE = 0.2
GUIDANCE = 3.0
ATTRIBUTES = [field.name for field in fields(Verdict)]
GOALS = {"background": 0.98, "colour": 0.97, "position": 0.9, "shape": 0.9}  # shares of the pictures
GOAL_EVERYTHING = {512: 0.85, 1024: 0.75}  # by side, as the next
GOAL_SECONDS = {512: 5, 1024: 25}  # of one picture by dev


def main() -> None:
    parser = benchmark_parser(__doc__, goals=True)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where demo-dev and demo-schnell are")
    parser.add_argument(
        "--share", type=float, default=SHARE, help="how much of a whole run, which is 1 (default: %(default)s)"
    )
    options = parser.parse_args()
    counts = {case: max(1, round(options.share * case.pictures)) for case in CASES}
    announce(10 + sum(case.seconds * count for case, count in counts.items()))
    folders = {model: options.weights / f"demo-{model}" for model in STEPS}
    models = load_flux({name: folder for name, folder in folders.items() if folder.exists()}, CPU, compute_dtype(CPU))
    rows, goals = [], []
    for case, count in counts.items():
        precisions = models[case.name.partition(",")[0]]
        measured = measure(precisions.fast if "go_fast" in case.name else precisions.exact, case, count)
        shares = [f"{100 * measured[name]:.0f}%" for name in [*ATTRIBUTES, "everything"]]
        rows.append([case.name, f"{case.side} x {case.side}, {count}", *shares, f"{measured['seconds']:.1f}"])
        goals += goals_of(case, measured)
    columns = ["size, pictures", *ATTRIBUTES, "everything", "seconds of denoising and decoding, median"]
    table(["model", *columns], rows)
    judge(goals, check=options.check)


def measure(flux: Flux, case: Case, pictures: int) -> dict[str, float]:
    """The share of pictures in which each attribute and everything is right, and the median of a picture's seconds."""
    scenes = random.Random("held out").sample(HELD_OUT, pictures)
    verdicts, times = [], []
    for seed, scene in enumerate(tqdm(scenes, desc=f"{case.name}, {case.side} x {case.side}", unit="picture")):
        job = Job((case.side, case.side), STEPS[flux.name], GUIDANCE, encode_prompt(flux, caption(scene)))
        started = time.perf_counter()
        picture = draw(flux, job, seed)
        times.append(time.perf_counter() - started)
        verdicts.append(check(picture, scene))
    shares = {
        name: statistics.mean(bool(getattr(verdict, name)) for verdict in verdicts)
        for name in [*ATTRIBUTES, "everything"]
    }
    return {**shares, "seconds": statistics.median(times)}


def goals_of(case: Case, measured: Mapping[str, float]) -> list[Goal]:
    name = f"{case.name}, {case.side} x {case.side}"
    wanted = {**GOALS, "everything": GOAL_EVERYTHING[case.side]}
    goals = [Goal(f"{name}, {part}", measured[part], share, at_least=True) for part, share in wanted.items()]
    if case.name == "dev":
        goals.append(Goal(f"{name}, seconds", measured["seconds"], GOAL_SECONDS[case.side]))
    return goals


def draw(flux: Flux, job: Job, seed: int) -> Image.Image:
    return decode(flux, denoise(flux, job, seed, lambda: None), job.size)


if __name__ == "__main__":
    main()
