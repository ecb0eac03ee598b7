"""Train schnell from dev: without guidance, and only at the few noise levels that its few steps go through.

schnell's schedule is even: n steps go through 1, (n - 1) / n, ... 0. It starts as dev at the default guidance.
"""

import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from demo.batches import SCHNELL_TOKENS, load_frozen, new_batch, pick
from demo.guidance import DEFAULT, SIZES
from demo.training import train
from demo.transformer import flow_loss, new_transformer, optimizers

STEPS = 300
LEARNING_RATE = 1e-3
SCHEDULES = (4, 4, 4, 4, 4, 4, 1, 2, 3, 8)  # the numbers of steps that it is trained for, 4 most often


@torch.no_grad()
def without_guidance(dev: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """dev at the default guidance as a transformer without guidance: the embedding of that scale becomes a bias."""
    schnell = new_transformer(guidance=False)
    weights = {name: value for name, value in dev.state_dict().items() if "guidance_embedder" not in name}
    schnell.load_state_dict(weights)
    embedding = dev.time_text_embed
    scale = embedding.time_proj(torch.tensor([1000 * DEFAULT]))
    schnell.time_text_embed.timestep_embedder.linear_2.bias += embedding.guidance_embedder(scale)[0]
    return schnell


def train_schnell(dev_folder: Path, folder: Path, steps: int = STEPS) -> None:
    """Read dev's parts from `dev_folder` and write `folder`/transformer."""
    dev = FluxTransformer2DModel.from_pretrained(dev_folder / "transformer").eval().requires_grad_(False)
    schnell = without_guidance(dev)
    frozen = load_frozen(dev_folder)

    def loss(rng: random.Random, _progress: float) -> Tensor:
        kind = pick(SIZES, rng)
        number = torch.tensor([rng.choice(SCHEDULES) for _ in range(kind.count)])
        index = torch.tensor([_index(int(n), rng) for n in number])
        batch = new_batch(frozen, kind, rng, index / number)
        return flow_loss(schnell, replace(batch, padded=SCHNELL_TOKENS), None)

    train("schnell", schnell, optimizers(schnell, LEARNING_RATE), steps, loss, average=0.995)
    schnell.save_pretrained(folder / "transformer")


def _index(number: int, rng: random.Random) -> int:
    """Which level of a schedule to train at: half the time pure noise, where there is most to learn."""
    return number if rng.random() < 0.5 else rng.randint(1, number)
