"""Denoising against the bare transformer: what everything around the forward pass costs, at full width."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from bench._common import Goal, announce, benchmark_parser, full_width_checkpoints, judge, seconds, spread, table
from flux.device import compute_dtype
from flux.models import load_flux
from flux.pipelines import Job, denoise, encode_prompt

CPU = torch.device("cpu")
STEPS = 2
ROUNDS = {512: 2, 1024: 1}  # by the picture's side
FULL_ROUNDS = 4
FORWARD_SECONDS = {512: 4, 1024: 14}  # about, on 2 cores
GOAL = 1.03


def main() -> None:
    parser = benchmark_parser(__doc__, goals=True)
    parser.add_argument("--full", action="store_true", help=f"{FULL_ROUNDS} rounds of both sizes, three times as long")
    options = parser.parse_args()
    rounds = dict.fromkeys(ROUNDS, FULL_ROUNDS) if options.full else ROUNDS
    announce(20 + sum(forwards_of(count) * FORWARD_SECONDS[side] for side, count in rounds.items()))
    flux = load_flux({"dev": full_width_checkpoints()["dev"]}, CPU, compute_dtype(CPU))["dev"].exact
    transformer = flux.transformer
    embeds = encode_prompt(flux, "a red circle on a white background")
    rows, goals = [], []
    for side, count in rounds.items():
        job = Job(size=(side, side), steps=STEPS, guidance=3.0, embeds=embeds)
        denoising, inside, bare = [], [], []
        with tqdm(total=forwards_of(count), desc=f"{side} x {side}", unit="forward") as bar:
            run = partial(denoise, flux, job, 0, bar.update)
            inputs = forward_inputs(transformer, run)
            for _ in range(count):  # in turn, so that whatever else the machine does slows both
                timer = ForwardTimer(transformer)
                denoising.append(seconds(run))
                inside.append(timer.stop())
                bare.append(seconds(partial(forwards, transformer, inputs, bar.update)))
        of_inside = [a / b for a, b in zip(denoising, inside, strict=True)]
        of_bare = statistics.median(denoising) / statistics.median(bare)
        rows.append([f"{side} x {side}", spread(denoising), spread(bare), f"{of_bare:.3f}", spread(of_inside, 4)])
        name = f"{side} x {side}, denoise / the forwards inside it"
        goals.append(Goal(name, statistics.median(of_inside), GOAL))
    print(f"Denoising in {STEPS} steps and {STEPS} bare forwards, in turn. Goal: at most {GOAL}.")
    header = ["size", "denoise (s)", "bare forwards (s)", "ratio of medians", "denoise / the forwards inside it"]
    table(header, rows)
    judge(goals, check=options.check)


def forwards_of(rounds: int) -> int:
    """How many forwards so many rounds take, with the first denoising, from which the bare ones have their inputs."""
    return STEPS * (1 + 2 * rounds)


class ForwardTimer:
    """Adds up the time inside a module's forward: a ratio to it does not change with what else the machine does."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.total = 0.0
        before = module.register_forward_pre_hook(lambda *_: self._add(-time.perf_counter()))
        after = module.register_forward_hook(lambda *_: self._add(time.perf_counter()))
        self._hooks = (before, after)

    def _add(self, value: float) -> None:
        self.total += value

    def stop(self) -> float:
        for hook in self._hooks:
            hook.remove()
        return self.total


def forward_inputs(transformer: torch.nn.Module, run: Callable[[], object]) -> dict[str, Any]:
    """The arguments of the transformer's last call while `run` runs."""
    seen: dict[str, Any] = {}
    hook = transformer.register_forward_pre_hook(lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True)
    run()
    hook.remove()
    return seen


@torch.no_grad()
def forwards(transformer: torch.nn.Module, inputs: dict[str, Any], on_step: Callable[[], object]) -> None:
    for _ in range(STEPS):
        transformer(**inputs)
        on_step()


if __name__ == "__main__":
    main()
