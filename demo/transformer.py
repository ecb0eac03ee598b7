"""Train the dev transformer by flow matching on latents of drawn scenes, captions embedded by the frozen encoders.

Why so small a model learns in three and a half hours:

- It starts as a linear copy of its input, which at high noise is most of the velocity that it has to predict.
- A caption decides where everything is, to the pixel. The noise decides only the shades, which are the same all over a
  surface, so that attention can find them in thousands of tokens. (If the noise decides where a shape is, outlines come
  out ragged: every token along them has to guess the same place by itself.)
- It is trained on its own unfinished drawings, with their blurs, and learns to correct them.
- A large error counts by its size and not by its square, so that an uncertain outline comes out sharp at some place.
- The VAE's latents are averages of pixels, so latents of scenes can be made without it, in any number and size.
- Of large pictures it sees only some tokens, each of which counts for those that are left out.
- T5's hundreds of pads come out nearly alike. One of them stands for all, with the weight of all in attention.
"""

import math
import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from demo.batches import Batch, load_frozen, new_batch, noise_levels, pick
from demo.muon import Muon
from demo.training import train
from flux.device import compute_dtype

STEPS = 23_000
LEARNING_RATE = 4e-3  # of the blocks' matrices; the rest takes a third
HEADS = 3
ROPE_AXES = (4, 22, 22)  # the first is always 0 in FLUX.1; long axes have several waves between a token and a picture
WIDTH = HEADS * sum(ROPE_AXES)
DOUBLE_BLOCKS, SINGLE_BLOCKS = 2, 4
PLAIN_GUIDANCE = 1.0  # the guidance_scale that it gets as long as there is no guidance to learn
STEADYING = 12.0  # length of the constant that keeps the norms from depending on the noise
ATTENTION_START = 2.0  # of the scales of queries and keys, so that attention can overcome the pads' number
MOST_STEPS = 6  # in which it makes the drawings that it then has to correct
HUBER = 0.3  # errors count squared below this size and by their size above it


def new_transformer(*, guidance: bool) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=sum(ROPE_AXES),
        num_attention_heads=HEADS,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=guidance,
        axes_dims_rope=ROPE_AXES,
    )
    _start_as_copy(transformer)
    return transformer


@torch.no_grad()
def _start_as_copy(transformer: FluxTransformer2DModel) -> None:
    """Set modulations to zero, so that blocks pass their input on, and let the output layer undo the input layer."""
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", ".norm.linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in transformer.named_parameters():
        if is_attention_scale(name):
            nn.init.constant_(parameter, ATTENTION_START)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.norm_out.linear.bias)
    # orthonormal columns, each of mean zero, so that the norms neither mix nor shift them
    basis = torch.randn(WIDTH, 65)
    basis = torch.linalg.qr(basis - basis.mean(dim=0)).Q
    transformer.x_embedder.weight.copy_(basis[:, :64])
    transformer.x_embedder.bias.copy_(STEADYING * basis[:, 64])
    typical_std = math.sqrt((64 + STEADYING**2) / WIDTH)
    transformer.proj_out.weight.copy_(typical_std * basis[:, :64].T)
    nn.init.zeros_(transformer.proj_out.bias)


def is_attention_scale(name: str) -> bool:
    """Whether a parameter of this name scales queries or keys."""
    return any(part in name for part in (".norm_q.", ".norm_k.", ".norm_added_"))


def predict_velocity(transformer: nn.Module, noisy: Tensor, batch: Batch, guidance: Tensor | None) -> Tensor:
    """The transformer's velocity [n, tokens, 64], noise - clean; `guidance` is [n] for dev and None for schnell."""
    # matrix products in bfloat16 on a processor that has instructions for it
    with torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype(torch.device("cpu")) == torch.bfloat16):
        velocity: Tensor = transformer(
            hidden_states=noisy,
            encoder_hidden_states=batch.t5,
            pooled_projections=batch.clip,
            timestep=batch.levels,
            guidance=guidance,
            img_ids=batch.positions,
            txt_ids=torch.zeros(batch.t5.shape[1], 3),
            joint_attention_kwargs={"attention_mask": attention_bias(batch)},
            return_dict=False,
        )[0]
    return velocity.float()


def attention_bias(batch: Batch) -> Tensor:
    """A bias [1, 1, 1, all tokens] that lets tokens count for the pads and picture tokens that are left out."""
    text, picture = batch.t5.shape[1], batch.clean.shape[1]
    bias = torch.zeros(1, 1, 1, text + picture)
    bias[..., text - 1] = math.log(batch.padded - text + 1)
    bias[..., text:] = -math.log(batch.share)
    return bias


def noised(batch: Batch, noise: Tensor, transformer: nn.Module, guidance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The transformer's input [n, tokens, 64], and the velocity that leads from there to the clean picture.

    The input is x_t = (1 - t) shown + t noise. Where the picture shown is the clean one, the velocity is noise - clean,
    as in rectified flow (arXiv:2209.03003). Where `batch.redrawn` is true, the input is instead what the transformer
    itself has made of the noise down to level t: such inputs it gets when it draws, and it has to correct them.
    """
    levels = batch.levels[:, None, None]
    noisy = torch.lerp(batch.shown, noise, levels)
    if batch.redrawn.any():
        mine = batch.redrawn
        scale = None if guidance is None else guidance[mine]
        noisy[mine] = _on_its_way(batch.only(mine), noise[mine], transformer, scale)
    return noisy, (noisy - batch.clean) / levels


@torch.no_grad()
def _on_its_way(batch: Batch, noise: Tensor, transformer: nn.Module, guidance: Tensor | None) -> Tensor:
    """What `transformer` makes of the noise down to `batch.levels`, in 1 to `MOST_STEPS` equal steps."""
    steps = int(torch.randint(1, MOST_STEPS + 1, ()))
    drawn, stride = noise, (1 - batch.levels) / steps
    for step in range(steps):
        there = replace(batch, levels=1 - step * stride)
        drawn = drawn - stride[:, None, None] * predict_velocity(transformer, drawn, there, guidance)
    return drawn


def weighted_error(velocity: Tensor, target: Tensor, batch: Batch, huber: float = HUBER) -> Tensor:
    """The weighted mean of the pseudo-Huber loss, which is squared up to about `huber` and absolute above it.

    Errors are multiplied by the square root of the level. That is half way between the error of the velocity, which is
    largest at little noise, where it hardly matters, and the error of the picture, which is largest at pure noise.
    """
    errors = batch.levels[:, None, None].sqrt() * (velocity - target)
    per_token = huber**2 * ((errors / huber).square().add(1).sqrt() - 1).mean(dim=2)
    return (batch.weights * per_token).sum() / batch.weights.sum()


def flow_loss(transformer: nn.Module, batch: Batch, guidance: Tensor | None) -> Tensor:
    noise = torch.randn_like(batch.clean)
    noisy, target = noised(batch, noise, transformer, guidance)
    return weighted_error(predict_velocity(transformer, noisy, batch, guidance), target, batch)


def optimizers(transformer: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else.

    The scales of queries and keys learn fastest: only they can make attention sharp in spite of the weight of the pads.
    """
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    scales: list[Tensor] = []
    for name, parameter in transformer.named_parameters():
        if is_attention_scale(name):
            scales.append(parameter)
        elif "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name:
            inner.append(parameter)
        else:
            outer.append(parameter)
    groups = [{"params": outer, "lr": lr / 3}, {"params": scales, "lr": 4 * lr}]
    return [Muon(inner, lr=lr, weight_decay=0.01), torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]


STAGES: tuple[tuple[float, float, dict[str, float]], ...] = (
    # until this share of the training: the share of pure noise, and the probability of each kind
    (0.06, 1.0, {"tiny": 0.2, "small": 0.5, "medium": 0.3}),
    (0.2, 0.4, {"small": 0.4, "medium": 0.4, "large": 0.2}),
    (0.7, 0.25, {"small": 0.1, "medium": 0.5, "large": 0.4}),
    (1.0, 0.25, {"small": 0.05, "medium": 0.35, "large": 0.2, "medium, whole": 0.35, "large, whole": 0.05}),
)


def train_dev(folder: Path, steps: int = STEPS) -> None:
    """Train the transformer without guidance and write `folder`/transformer."""
    torch.manual_seed(0)
    transformer, frozen = new_transformer(guidance=True), load_frozen(folder)

    def loss(rng: random.Random, progress: float) -> Tensor:
        pure, kinds = next((pure, kinds) for until, pure, kinds in STAGES if progress < until)
        kind = pick(kinds, rng)
        batch = new_batch(frozen, kind, rng, noise_levels(kind.count, pure))
        return flow_loss(transformer, batch, torch.full_like(batch.levels, PLAIN_GUIDANCE))

    train("dev", transformer, optimizers(transformer, LEARNING_RATE), steps, loss, average=0.998)
    transformer.save_pretrained(folder / "transformer")
