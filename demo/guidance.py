"""Teach dev's guidance embedding by distillation, as in FLUX.1 dev: one forward learns what two forwards would give.

The teacher is the transformer trained without guidance. Classifier-free guidance with weight w gives
captioned + (w - 1) * (captioned - uncaptioned). The student gets the guidance_scale g and learns this sum for w(g), in
which the first term is not the teacher's prediction but the true velocity.
"""

import random
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from demo.batches import load_frozen, new_batch, noise_levels, pick
from demo.training import train
from demo.transformer import (
    PLAIN_GUIDANCE,
    noised,
    optimizers,
    predict_velocity,
    weighted_error,
)

STEPS = 1300
LEARNING_RATE = 2.5e-3
HUBER = 1.0  # above every difference that low scales make, so that half of such a difference is not good enough
HIGHEST = 10.0  # of guidance_scale
DEFAULT = 3.0
NEUTRAL = 2.0  # the guidance_scale of weight 1, which is no guidance
SIZES = {"small": 0.1, "medium": 0.4, "large": 0.3, "medium, whole": 0.2}


def guidance_weight(guidance: Tensor) -> Tensor:
    """The weight w of a guidance_scale: 0.1 at 0, 1 at `NEUTRAL` and 1.45 at the default, where outlines come out
    straight. It grows slowly above 3.5, because a larger weight makes colours glaring."""
    return torch.minimum(0.1 + 0.9 * guidance / NEUTRAL, 1.7 + 0.1 * (guidance - 3.5))


def draw_guidance(count: int) -> Tensor:
    """Scales [count] in 0..10, some near the default and many near 0, where there is most to learn."""
    return torch.where(torch.rand(count) < 0.4, 2.5 + 1.5 * torch.rand(count), HIGHEST * torch.rand(count) ** 3)


def distil_guidance(source: Path, folder: Path, steps: int = STEPS) -> None:
    """Read the teacher from `source`/transformer and write the student to `folder`/transformer."""
    teacher = FluxTransformer2DModel.from_pretrained(source / "transformer").eval().requires_grad_(False)
    student = FluxTransformer2DModel.from_pretrained(source / "transformer")
    frozen = load_frozen(folder)
    no_t5, no_clip = frozen.embed([""])

    def loss(rng: random.Random, _progress: float) -> Tensor:
        kind = pick(SIZES, rng)
        batch = new_batch(frozen, kind, rng, noise_levels(kind.count))
        noise = torch.randn_like(batch.clean)
        guidance = draw_guidance(kind.count)
        plain = torch.full_like(guidance, PLAIN_GUIDANCE)
        noisy, target = noised(batch, noise, student, guidance)
        with torch.no_grad():
            captioned = predict_velocity(teacher, noisy, batch, plain)
            uncaptioned = predict_velocity(teacher, noisy, batch.without_captions(no_t5, no_clip), plain)
            target += (guidance_weight(guidance)[:, None, None] - 1) * (captioned - uncaptioned)
        return weighted_error(predict_velocity(student, noisy, batch, guidance), target, batch, HUBER)

    train("guidance", student, optimizers(student, LEARNING_RATE), steps, loss, average=0.99)
    student.save_pretrained(folder / "transformer")
