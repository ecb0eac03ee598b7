"""What the transformer learns from: batches of captioned scenes as latents, made as they are needed, at any size."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from demo.scenes import SHAPES, TRAINED, Scene, caption, colours, coverage, moved, shaded
from demo.text import token_ids

EDGE_WEIGHT, SHAPE_WEIGHT = 5.0, 2.0  # in the loss, of tokens along an outline and inside a shape; the background has 1
TEXT_TOKENS = 24
DEV_TOKENS, SCHNELL_TOKENS = 512, 256  # the length to which the predictor pads captions
EMPTY = 0.05  # share of empty captions
# Sometimes the caption and the picture under the noise disagree. Then the caption is right where the noise level is
# above `PICTURE_LEVEL`, and the picture below it, except that a shape a little out of place is always put right.
DOUBT = 0.3  # how often they disagree
PICTURE_LEVEL = 0.5
SLIGHTLY, CLEARLY = 0.03, 0.12  # how far a shape is moved at most, below and above that level, in picture sides
REDRAWN = 0.7  # of the pictures that agree with their caption, the share that the transformer itself has drawn
LEAST_LEVEL = 0.02  # of noise, since velocities are divided by it
CELL = 8  # pixels to a side of a latent

Size = tuple[int, int]  # width, height in pixels
Stride = tuple[int, int]  # rows and columns of a block of tokens, of which one token is seen


@dataclass(frozen=True)
class Kind:
    """What the pictures of one batch have in common: their size is one of `sizes`."""

    sizes: tuple[Size, ...]
    count: int  # pictures in a batch
    stride: Stride = (1, 1)


KINDS = {
    "tiny": Kind(((128, 128), (128, 128), (192, 112), (112, 192)), 32),
    "small": Kind(((256, 256), (256, 256), (320, 208), (208, 320), (352, 160)), 16),
    "medium": Kind(((512, 512), (512, 512), (512, 512), (672, 384), (384, 672), (608, 416), (448, 544)), 8, (1, 2)),
    "large": Kind(((1024, 1024), (1024, 1024), (1344, 768), (768, 1344), (832, 1216), (1088, 896)), 4, (2, 2)),
    "medium, whole": Kind(((512, 512), (512, 512), (384, 672), (608, 416), (768, 320)), 4),
    "large, whole": Kind(((1024, 1024), (1024, 1024), (1152, 896), (768, 1344)), 1),
}


@dataclass(frozen=True)
class Frozen:
    """The parts that are trained before the transformer, and do not change while it learns."""

    vae: AutoencoderKL
    clip: CLIPTextModel
    t5: T5EncoderModel
    clip_tokenizer: CLIPTokenizer
    t5_tokenizer: T5TokenizerFast

    @torch.no_grad()
    def embed(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """T5's first tokens [n, TEXT_TOKENS, 64] and CLIP's pooled output [n, 64]."""
        t5_ids = token_ids(self.t5_tokenizer, texts, 4 * TEXT_TOKENS)
        clip_ids = token_ids(self.clip_tokenizer, texts, 77)
        return self.t5(t5_ids)[0][:, :TEXT_TOKENS], self.clip(clip_ids).pooler_output

    @torch.no_grad()
    def flat_latents(self, paint: Tensor) -> Tensor:
        """Scaled latents [n, 16, 1, 1] of pictures of one colour, [n, 3] in -1..1."""
        latents = self.vae.encode(paint[:, :, None, None].expand(-1, -1, 64, 64)).latent_dist.mode()
        middle = latents[:, :, 2:6, 2:6].mean(dim=(2, 3), keepdim=True)
        scaled: Tensor = (middle - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        return scaled


@dataclass(frozen=True)
class Layers:
    """Drawn scenes as latents: `back` and `front` [n, 16, 1, 1] and how much the front covers [n, 1, height, width].

    The VAE has learnt to average 8 x 8 pixels into three of its channels. So where a shape covers half of them, the
    latent is half way between those of its colour and the background's; what the VAE itself makes differs by 1 dB.
    """

    front: Tensor
    back: Tensor
    cover: Tensor

    def mixed(self) -> Tensor:
        """The latents [n, 16, height / 8, width / 8]."""
        return torch.lerp(self.back, self.front, self.cover)


def layers_of(frozen: Frozen, scenes: list[Scene], size: Size) -> Layers:
    front, back = (torch.stack(several) for several in zip(*map(colours, scenes), strict=True))
    width, height = (side // 2 for side in size)  # drawn at half the size, which is fine enough
    cover = torch.stack([F.avg_pool2d(coverage(scene, width, height)[None], CELL // 2) for scene in scenes])
    return Layers(frozen.flat_latents(front), frozen.flat_latents(back), cover)


@dataclass(frozen=True)
class Task:
    """What is to be learnt: the caption of a scene, and the latents of scenes with their captions."""

    caption: Callable[[Scene, random.Random], str]
    latents: Callable[[Layers, list[str]], Tensor]


PLAIN = Task(caption, lambda layers, _texts: layers.mixed())


def load_frozen(folder: Path) -> Frozen:
    return Frozen(
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval(),
        clip=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
        t5=T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval(),
        clip_tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        t5_tokenizer=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
    )


@dataclass(frozen=True)
class Batch:
    """What a step of training sees, of n pictures of one size."""

    levels: Tensor  # [n] in 0..1: the share of noise in each picture
    clean: Tensor  # [n, tokens, 64], packed as in FLUX.1: the right picture
    shown: Tensor  # [n, tokens, 64]: the picture that is under the noise
    weights: Tensor  # [n, tokens]: of each token in the loss
    t5: Tensor
    clip: Tensor
    positions: Tensor  # [tokens, 3]
    redrawn: Tensor  # [n] of bool: where the transformer's own drawing, made down to this level, is to be shown
    share: float  # of the picture's tokens that are seen
    padded: int = DEV_TOKENS  # how many tokens of text the predictor would give

    def only(self, chosen: Tensor) -> "Batch":
        """The pictures for which `chosen` [n] is true."""
        per_picture = ("levels", "clean", "shown", "weights", "t5", "clip", "redrawn")
        return replace(self, **{name: getattr(self, name)[chosen] for name in per_picture})

    def without_captions(self, t5: Tensor, clip: Tensor) -> "Batch":
        """The same batch with the embeddings [1, ...] of an empty caption."""
        return replace(self, t5=t5.expand_as(self.t5), clip=clip.expand_as(self.clip))


def pack(latents: Tensor) -> Tensor:
    """Latents [n, c, h, w] -> tokens [n, h / 2 * w / 2, 4 * c]."""
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def pick(kinds: Mapping[str, float], rng: random.Random) -> Kind:
    """One of `KINDS`, drawn with the probabilities that `kinds` gives for the names."""
    return KINDS[rng.choices(list(kinds), weights=list(kinds.values()))[0]]


def new_batch(frozen: Frozen, kind: Kind, rng: random.Random, levels: Tensor, task: Task = PLAIN) -> Batch:
    """Scenes with fresh captions, at noise `levels` [kind.count]."""
    size = rng.choice(kind.sizes)
    scenes = [shaded(rng.choice(TRAINED), rng) for _ in levels]
    texts = ["" if rng.random() < EMPTY else task.caption(scene, rng) for scene in scenes]
    shown, redrawn = list(scenes), torch.zeros(len(scenes), dtype=torch.bool)
    for i, (level, text) in enumerate(zip(levels.tolist(), texts, strict=True)):
        low = level < PICTURE_LEVEL
        if not text or rng.random() >= DOUBT:
            redrawn[i] = bool(text) and level < 1 and rng.random() < REDRAWN
        elif rng.random() < 0.5:
            shown[i] = moved(scenes[i], rng, SLIGHTLY if low else CLEARLY)
        else:
            shown[i] = other_scene(scenes[i], rng)
            if low:
                scenes[i] = shown[i]
    latents, shown_latents = (task.latents(layers_of(frozen, each, size), texts) for each in (scenes, shown))
    weights = loss_weights(latents)
    seen, positions = seen_tokens(size, kind.stride, rng)
    clean, under_noise = (pack(each)[:, seen] for each in (latents, shown_latents))
    share = len(seen) / weights.shape[1]
    return Batch(levels, clean, under_noise, weights[:, seen], *frozen.embed(texts), positions, redrawn, share)


def other_scene(scene: Scene, rng: random.Random) -> Scene:
    """Another scene: the same with a random shape, or any scene."""
    return replace(scene, shape=rng.choice(SHAPES)) if rng.random() < 0.6 else shaded(rng.choice(TRAINED), rng)


def seen_tokens(size: Size, stride: Stride, rng: random.Random) -> tuple[Tensor, Tensor]:
    """A random token of each block of `stride` tokens: their indices, and their positions as FLUX.1 numbers them."""
    width, height = size[0] // 16, size[1] // 16
    positions = FluxPipeline._prepare_latent_image_ids(1, height, width, torch.device("cpu"), torch.float32)
    grid = torch.arange(width * height).view(height, width)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    tall, wide = stride
    cells = grid[: height // tall * tall, : width // wide * wide].unfold(0, tall, tall).unfold(1, wide, wide)
    cells = cells.flatten(2).flatten(0, 1)  # [cells, tokens in each]
    seen = cells.gather(1, torch.randint(cells.shape[1], (len(cells), 1), generator=generator))[:, 0]
    return seen, positions[seen]


def noise_levels(count: int, pure: float = 0.2) -> Tensor:
    """Noise levels [count] in 0..1. The share `pure` is 1, where only the caption says what to draw, and many others
    are close to 1, where a picture's layout and colours are decided."""
    usual = torch.sigmoid(1.2 * torch.randn(count))
    high = 0.9 + 0.1 * torch.rand(count)
    levels = torch.where(torch.rand(count) < 0.75, usual, high).clamp(min=LEAST_LEVEL)
    return torch.where(torch.rand(count) < pure, torch.ones(count), levels)


def loss_weights(latents: Tensor) -> Tensor:
    """Weights in the loss, [n, tokens]: higher for tokens inside a shape, highest along its outline."""
    differs = (latents - latents[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.05
    inside = F.max_pool2d(differs.float(), 2)  # a token is 2 x 2 latents
    edge = F.max_pool2d(inside, 3, 1, 1) + F.max_pool2d(-inside, 3, 1, 1)
    # a ring is so thin that all of it counts as outline, which is right
    return torch.where(edge > 0, EDGE_WEIGHT, torch.where(inside > 0, SHAPE_WEIGHT, 1.0)).flatten(1)
