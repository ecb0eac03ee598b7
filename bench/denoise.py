"""Denoising against the bare transformer: what everything around the forward pass costs, at full width."""

import statistics
import time
from typing import Any

import torch

from bench._common import full_width_checkpoints, seconds, spread, table
from flux.device import compute_dtype
from flux.models import load_flux
from flux.pipelines import Job, denoise, encode_prompt

CPU = torch.device("cpu")
STEPS = 2
ROUNDS = 4
GOAL = 1.03


def main() -> None:
    flux = load_flux({"dev": full_width_checkpoints()["dev"]}, CPU, compute_dtype(CPU))["dev"]
    embeds = encode_prompt(flux, "a red circle on a white background")
    rows = []
    for side in (512, 1024):
        job = Job(size=(side, side), steps=STEPS, guidance=3.0, embeds=embeds)
        inputs = forward_inputs(flux.transformer, lambda job=job: denoise(flux, job, 0, lambda: None))
        denoising, inside, bare = [], [], []
        for _ in range(ROUNDS):  # in turn, so that the machine's moods meet both
            timer = ForwardTimer(flux.transformer)
            denoising.append(seconds(lambda job=job: denoise(flux, job, 0, lambda: None)))
            inside.append(timer.stop())
            bare.append(seconds(lambda inputs=inputs: forwards(flux.transformer, inputs)))
        of_inside = [a / b for a, b in zip(denoising, inside, strict=True)]
        of_bare = statistics.median(denoising) / statistics.median(bare)
        rows.append([f"{side} x {side}", spread(denoising), spread(bare), f"{of_bare:.3f}", spread(of_inside, 4)])
    print(f"{ROUNDS} rounds of denoising in {STEPS} steps and of {STEPS} bare forwards in turn. Goal: at most {GOAL}.")
    header = ["size", "denoise (s)", "bare forwards (s)", "ratio of medians", "denoise / the forwards inside it"]
    table(header, rows)


class ForwardTimer:
    """Adds up the time inside a module's forward, so that a ratio to it is free of the machine's moods."""

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


def forward_inputs(transformer: torch.nn.Module, run: Any) -> dict[str, Any]:
    """The arguments of the transformer's last call while `run` runs."""
    seen: dict[str, Any] = {}
    hook = transformer.register_forward_pre_hook(lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True)
    run()
    hook.remove()
    return seen


@torch.no_grad()
def forwards(transformer: torch.nn.Module, inputs: dict[str, Any]) -> None:
    for _ in range(STEPS):
        transformer(**inputs)


if __name__ == "__main__":
    main()
