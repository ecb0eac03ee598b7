"""Distil schnell from dev: one of its few steps goes where several of dev's, at the default guidance, would have gone.

schnell's schedule is even: n steps go through 1, (n - 1) / n, ... 0. A training step starts from a noised scene at one
of these levels, lets dev walk to the next in small steps, and teaches schnell the mean velocity of the walk.
"""

import random
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from demo.training import train
from demo.transformer import Batch, Scenes, load_frozen, new_transformer, optimizers, predict_velocity

STEPS = 160
LEARNING_RATE = 1e-3
GUIDANCE = 3.0
SUBSTEPS = (0.0, 0.15, 0.45, 1.0)  # of the way between two levels; more of them where the noise is highest
SCHEDULES = (4, 4, 4, 4, 4, 4, 1, 2, 3, 8)  # numbers of steps trained for
SIZES = (("small", 16, 0.5), ("medium", 4, 0.4), ("large", 1, 0.1))


@torch.no_grad()
def without_guidance(dev: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """dev at the default guidance as a transformer that has none: the embedding of that scale becomes a bias."""
    schnell = new_transformer(guidance=False)
    weights = {name: value for name, value in dev.state_dict().items() if "guidance_embedder" not in name}
    schnell.load_state_dict(weights)
    embedding = dev.time_text_embed
    scale = embedding.time_proj(torch.tensor([1000 * GUIDANCE]))
    schnell.time_text_embed.timestep_embedder.linear_2.bias += embedding.guidance_embedder(scale)[0]
    return schnell


@torch.no_grad()
def walk(dev: FluxTransformer2DModel, noisy: Tensor, start: Tensor, end: Tensor, batch: Batch) -> Tensor:
    """Where dev comes from `noisy` [n, tokens, 64] at level `start` [n] in Euler steps to level `end` [n]."""
    guidance = torch.full_like(start, GUIDANCE)
    for before, after in pairwise(SUBSTEPS):
        level, following = torch.lerp(start, end, before), torch.lerp(start, end, after)
        velocity = predict_velocity(dev, noisy, level, batch, guidance)
        noisy = noisy + (following - level)[:, None, None] * velocity
    return noisy


def distil_schnell(dev_folder: Path, folder: Path, steps: int = STEPS) -> None:
    """Read dev's parts from `dev_folder` and write `folder`/transformer."""
    dev = FluxTransformer2DModel.from_pretrained(dev_folder / "transformer").eval().requires_grad_(False)
    schnell = without_guidance(dev)
    scenes = Scenes(load_frozen(dev_folder), [kind for kind, _, _ in SIZES])

    def loss(rng: random.Random, _progress: float) -> Tensor:
        kind, count, _ = rng.choices(SIZES, weights=[weight for _, _, weight in SIZES])[0]
        batch = scenes.batch(kind, count, rng)
        number = torch.tensor([rng.choice(SCHEDULES) for _ in range(count)])
        index = torch.tensor([_index(int(n), rng) for n in number])
        start, end = index / number, (index - 1) / number
        noisy = torch.lerp(batch.clean, torch.randn_like(batch.clean), start[:, None, None])
        target = (noisy - walk(dev, noisy, start, end, batch)) / (start - end)[:, None, None]
        return F.mse_loss(predict_velocity(schnell, noisy, start, batch, None), target)

    train("schnell", schnell, optimizers(schnell, LEARNING_RATE), steps, loss, average=0.995)
    schnell.save_pretrained(folder / "transformer")


def _index(number: int, rng: random.Random) -> int:
    """Which level of a schedule to start from; half the time pure noise, from which the most is to be learnt."""
    return number if rng.random() < 0.5 else rng.randint(1, number)
