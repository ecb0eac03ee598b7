"""Train the VAE: 16 latent channels at an eighth of the picture's size, as FLUX.1's.

It starts close to the identity: the picture's colours go through the first channels of every layer, averaged on the way
down and repeated on the way up, and the residual branches start near zero. Only detail is left to learn.

Then the decoder alone learns to draw outlines sharply: from the average colours of 8 x 8 pixels and of their neighbours
it can find out where the outline goes through them.
"""

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from demo.scenes import COLOURS, POSITIONS, SIZES, Scene, all_scenes, blend, coverage, draw, moved, shaded
from demo.training import train

STEPS = 1000
SHARPENING_STEPS = 4000  # of the decoder alone
BATCH = 8
SIDES = (64, 96, 128)  # pixels
SHARPENING_BATCHES = {128: 8, 256: 3, 512: 1}  # by side; large ones too, since norms are over the whole picture
ZOOMS = (2, 3, 4, 6, 8)
KL_WEIGHT = 1e-3
LATENT_NOISE = 0.15  # the most that is added before decoding, since the transformer's latents are never perfect
SHARPENING_NOISE = 0.3  # the same while the decoder learns to ignore it
RESIDUAL_START = 0.05
LATENT_SCALE = 0.5  # of the largest channel: then noise hides a picture at the same level as it hides a photograph


def new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=1024,
    )
    _start_near_identity(vae)
    return vae


@torch.no_grad()
def _start_near_identity(vae: AutoencoderKL) -> None:
    """Channels 0-2 carry RGB, 3-5 its negative (silu(x) - silu(-x) = x), 6 and 7 a constant that steadies the norms."""
    for module in vae.modules():
        if hasattr(module, "conv_shortcut"):  # a residual block
            module.conv2.weight.mul_(RESIDUAL_START)
            if module.conv_shortcut is not None:
                _pass_through(module.conv_shortcut)
        elif type(module).__name__ == "Downsample2D":
            _pass_through(module.conv, taps=((0, 0), (0, 1), (1, 0), (1, 1)))
        elif type(module).__name__ == "Upsample2D":
            _pass_through(module.conv)
    for entry in (vae.encoder.conv_in, vae.decoder.conv_in):
        entry.weight.mul_(0.1)
        entry.bias.zero_()
        for channel in range(3):
            entry.weight[[channel, channel + 3]] = 0
            entry.weight[channel, channel, 1, 1] = 1
            entry.weight[channel + 3, channel, 1, 1] = -1
        entry.weight[[6, 7]] = 0
        entry.bias[6:8] = torch.tensor([3.0, -3.0])
    for leave, gain in ((vae.encoder.conv_out, 0.8), (vae.decoder.conv_out, 1.6)):
        leave.weight.mul_(0.1)
        leave.bias.zero_()
        leave.weight[:3] = 0
        for channel in range(3):
            leave.weight[channel, channel, 1, 1] = gain
            leave.weight[channel, channel + 3, 1, 1] = -gain
    vae.encoder.conv_out.weight[16:] = 0
    vae.encoder.conv_out.bias[16:] = -5  # log-variance


def _pass_through(conv: nn.Conv2d, taps: tuple[tuple[int, int], ...] | None = None) -> None:
    """Let channel i pass to channel i, averaged over `taps` of the kernel (None: only its middle)."""
    conv.weight.zero_()
    if conv.bias is not None:
        conv.bias.zero_()
    middle = conv.kernel_size[0] // 2
    for row, column in taps or ((middle, middle),):
        for channel in range(min(conv.in_channels, conv.out_channels)):
            conv.weight[channel, channel, row, column] = 1 / len(taps or (1,))


def pictures(count: int, width: int, height: int, rng: random.Random) -> Tensor:
    """[count, 3, height, width] in -1..1: scenes, parts of scenes, and textures, for the sake of photographs."""
    return torch.stack([_picture(width, height, rng) for _ in range(count)])


def _picture(width: int, height: int, rng: random.Random) -> Tensor:
    scene = moved(shaded(rng.choice(SCENES), rng), rng, 0.03)
    kind = rng.random()
    if kind < 0.45:
        return draw(scene, width, height)
    if kind < 0.7:
        return _part(scene, width, height, rng)
    if kind < 0.9:
        return blend(coverage(scene, width, height), _texture(width, height, rng), _texture(width, height, rng))
    return _texture(width, height, rng)


def _part(scene: Scene, width: int, height: int, rng: random.Random) -> Tensor:
    """A window of a larger picture, near the shape's outline."""
    zoom = rng.choice(ZOOMS)
    whole = (width * zoom, height * zoom)
    angle, reach = rng.uniform(0, 2 * math.pi), SIZES[scene.size] * min(whole)
    steps = (math.cos(angle), math.sin(angle))
    starts = []
    for middle, length, side, step in zip(POSITIONS[scene.position], whole, (width, height), steps, strict=True):
        near = middle * length + reach * step
        starts.append(round(min(max(near - rng.random() * side, 0), length - side)))
    left, top = starts
    return draw(scene, *whole)[:, top : top + height, left : left + width]


def _texture(width: int, height: int, rng: random.Random) -> Tensor:
    """Stripes or checks of two colours, or a smooth random field, [3, height, width]."""
    if rng.random() < 0.5:
        x, y = torch.arange(width)[None, :], torch.arange(height)[:, None]
        period = rng.uniform(6, 64)
        angle = rng.choice((0.0, 0.25, 0.5, rng.random())) * torch.pi
        turn = torch.tensor(angle)
        wave = torch.sin((x * torch.cos(turn) + y * torch.sin(turn)) * 2 * torch.pi / period)
        if rng.random() < 0.4:
            wave = wave * torch.sin((y * torch.cos(turn) - x * torch.sin(turn)) * 2 * torch.pi / period)
        return blend((0.5 + wave * rng.choice((1, 4, period / 4))).clamp(0, 1), _paint(rng), _paint(rng))
    coarse = torch.rand(1, 3, rng.randint(2, 24), rng.randint(2, 24)) * 2 - 1
    field = F.interpolate(coarse * rng.uniform(0.5, 1.5), (height, width), mode="bicubic")[0]
    return (field + rng.choice((0.0, 0.05)) * torch.randn_like(field)).clamp(-1, 1)


def _paint(rng: random.Random) -> Tensor:
    """A colour, [3] in -1..1: half the time one of the named ones."""
    if rng.random() < 0.5:
        return torch.tensor(rng.choice(list(COLOURS.values()))) / 127.5 - 1
    return torch.rand(3) * 2 - 1


def train_vae(folder: Path, steps: int = STEPS, sharpening_steps: int = SHARPENING_STEPS) -> None:
    """Train, measure the latents and write `folder`/vae."""
    vae = new_vae()

    def loss(rng: random.Random, _progress: float) -> Tensor:
        return _loss(vae, pictures(BATCH, rng.choice(SIDES), rng.choice(SIDES), rng))

    def sharpness(rng: random.Random, _progress: float) -> Tensor:
        side = rng.choice(list(SHARPENING_BATCHES))
        batch = pictures(SHARPENING_BATCHES[side], side, side, rng)
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.mean
        return _drawing_error(vae, _disturbed(latents, SHARPENING_NOISE), batch)

    train("vae", vae, [_optimizer(vae)], steps, loss, average=0.995)
    vae.encoder.requires_grad_(False)
    train("vae-decoder", vae, [_optimizer(vae.decoder)], sharpening_steps, sharpness, average=0.99)
    with torch.no_grad():
        latents = vae.encode(torch.stack([draw(scene, 256, 256) for scene in SCENES[::26]])).latent_dist.mean
    largest = latents.std(dim=(0, 2, 3)).max()  # most channels are close to zero everywhere
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(LATENT_SCALE / largest))
    vae.save_pretrained(folder / "vae")


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=7e-4, betas=(0.9, 0.95), weight_decay=0.0)


def _loss(vae: AutoencoderKL, batch: Tensor) -> Tensor:
    """The error of the decoded picture, and a little KL divergence."""
    posterior: DiagonalGaussianDistribution = vae.encode(batch).latent_dist
    divergence: Tensor = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return _drawing_error(vae, _disturbed(posterior.sample(), LATENT_NOISE), batch) + KL_WEIGHT * divergence


def _disturbed(latents: Tensor, most: float) -> Tensor:
    """Latents with noise whose standard deviation is drawn for each picture, from 0 to `most`."""
    return latents + most * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)


def _drawing_error(vae: AutoencoderKL, latents: Tensor, batch: Tensor) -> Tensor:
    """The error of decoded pictures: L1 + L2 + L1 of the differences between neighbouring pixels."""
    error = vae.decode(latents).sample - batch
    slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    total: Tensor = error.abs().mean() + error.square().mean() + slopes
    return total


SCENES = all_scenes()
