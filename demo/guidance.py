"""Give dev's guidance embedding its meaning, by distillation as FLUX.1 dev's: one forward learns what two would say.

The teacher is the transformer trained without guidance. With classifier-free guidance of weight w it would go
uncaptioned + w * (captioned - uncaptioned); the student is told g and learns that for w(g).
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from demo.training import train
from demo.transformer import PLAIN_GUIDANCE, Batch, Scenes, load_frozen, noise_levels, optimizers, predict_velocity

STEPS = 200
LEARNING_RATE = 6e-4
HIGHEST = 10.0  # of guidance_scale
SIZES = (("small", 16, 0.5), ("medium", 4, 0.4), ("large", 1, 0.1))


def guidance_weight(guidance: Tensor) -> Tensor:
    """w of a guidance_scale: up to 1 the caption only fades in, beyond it is exaggerated, half as fast."""
    return torch.where(guidance < 1, guidance, 1 + (guidance - 1) / 2)


def draw_guidance(count: int) -> Tensor:
    """[count] in 0..10, half of them near the default."""
    return torch.where(torch.rand(count) < 0.5, 2.5 + 1.5 * torch.rand(count), HIGHEST * torch.rand(count))


def distil_guidance(source: Path, folder: Path, steps: int = STEPS) -> None:
    """Read the teacher from `source`/transformer and write the student to `folder`/transformer."""
    teacher = FluxTransformer2DModel.from_pretrained(source / "transformer").eval().requires_grad_(False)
    student = FluxTransformer2DModel.from_pretrained(source / "transformer")
    frozen = load_frozen(folder)
    scenes = Scenes(frozen, [kind for kind, _, _ in SIZES])
    no_t5, no_clip = frozen.embed([""])

    def loss(rng: random.Random, _progress: float) -> Tensor:
        kind, count, _ = rng.choices(SIZES, weights=[weight for _, _, weight in SIZES])[0]
        batch = scenes.batch(kind, count, rng)
        levels, guidance = noise_levels(count), draw_guidance(count)
        noisy = torch.lerp(batch.clean, torch.randn_like(batch.clean), levels[:, None, None])
        plain = torch.full_like(guidance, PLAIN_GUIDANCE)
        uncaptioned = Batch(batch.clean, no_t5.expand(count, -1, -1), no_clip.expand(count, -1), batch.grid)
        with torch.no_grad():
            without = predict_velocity(teacher, noisy, levels, uncaptioned, plain)
            target = predict_velocity(teacher, noisy, levels, batch, plain)
            target = without + guidance_weight(guidance)[:, None, None] * (target - without)
        return F.mse_loss(predict_velocity(student, noisy, levels, batch, guidance), target)

    train("guidance", student, optimizers(student, LEARNING_RATE), steps, loss, average=0.99)
    student.save_pretrained(folder / "transformer")
