"""Train the dev transformer by flow matching on latents of drawn scenes, captions embedded by the frozen encoders.

What makes so small a model learn in two hours:

- It starts as a linear copy of its input, which is most of what the predicted velocity is at high noise.
- A caption decides where everything is, to the pixel. What the noise decides, the shades, is the same all over a
  surface, where attention can tell it from thousands of tokens. (A shape that the noise may move gets ragged outlines:
  every token along them has to guess the same place by itself.)
- The VAE's latents are averages of pixels, so that latents of scenes are made without it, any number, any size.
- Of large pictures it sees one token of every few, which count for those left out.
- T5's hundreds of pads, which come out nearly alike, stand as one token with the weight of all of them in attention.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from demo.muon import Muon
from demo.scenes import SHAPES, TRAINED, Scene, caption, colours, coverage, moved, shaded
from demo.text import token_ids
from demo.training import train
from device import compute_dtype

STEPS = 10_000
LEARNING_RATE = 4e-3  # of the blocks' matrices; the rest takes a third
EDGE_WEIGHT, SHAPE_WEIGHT = 5.0, 2.0  # in the loss, of the tokens along an outline and inside it; background counts 1
HEADS = 3
ROPE_AXES = (4, 22, 22)  # the first is always 0 in FLUX.1; long axes have several waves between a token and a picture
WIDTH = HEADS * sum(ROPE_AXES)
DOUBLE_BLOCKS, SINGLE_BLOCKS = 2, 4
TEXT_TOKENS = 24
DEV_TOKENS, SCHNELL_TOKENS = 512, 256  # that the predictor pads captions to
EMPTY = 0.05
PLAIN_GUIDANCE = 1.0  # what the embedding is told while there is no guidance to learn
STEADYING = 12.0  # length of the constant that keeps the norms from depending on the noise
ATTENTION_START = 2.0  # of the scales of queries and keys, so that attention can overcome the pads' number
PICTURE_LEVEL = 0.5  # with more noise than that the caption is right about what is there, with less the picture
DOUBT = 0.35  # how often they say different things
LEAST_LEVEL = 0.02  # what velocities are divided by at the least
CELL = 8  # pixels to a latent

Size = tuple[int, int]  # width, height in pixels
Stride = tuple[int, int]  # of how many rows and columns of tokens one is seen


@dataclass(frozen=True)
class Kind:
    """Pictures that a step may be about."""

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
    """Modulations zero, so that every block passes its input through; the output layer undoes the input layer."""
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


@dataclass(frozen=True)
class Frozen:
    """The trained parts that the transformer learns with."""

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

    The VAE learnt to average 8 x 8 pixels into three of its channels, so where a shape covers half of them the latent
    is half way between those of its colour and the background's: 1 dB from what the VAE itself makes of the picture.
    """

    front: Tensor
    back: Tensor
    cover: Tensor

    def mixed(self) -> Tensor:
        """[n, 16, height / 8, width / 8]"""
        return torch.lerp(self.back, self.front, self.cover)


def layers_of(frozen: Frozen, scenes: list[Scene], size: Size) -> Layers:
    front, back = (torch.stack(several) for several in zip(*map(colours, scenes), strict=True))
    width, height = (side // 2 for side in size)  # half as fine is fine enough
    cover = torch.stack([F.avg_pool2d(coverage(scene, width, height)[None], CELL // 2) for scene in scenes])
    return Layers(frozen.flat_latents(front), frozen.flat_latents(back), cover)


@dataclass(frozen=True)
class Task:
    """What is to be learnt: which captions scenes have, and which latents captioned scenes have."""

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

    levels: Tensor  # [n] in 0..1: how much of each is noise
    clean: Tensor  # [n, tokens, 64], packed as FLUX.1 does: what is to come out
    shown: Tensor  # the same of what is under the noise
    weights: Tensor  # [n, tokens]: what counts how much in the loss
    t5: Tensor
    clip: Tensor
    positions: Tensor  # [tokens, 3]
    share: float  # of the picture's tokens that are there
    padded: int = DEV_TOKENS  # how many tokens of text there would be

    def without_captions(self, t5: Tensor, clip: Tensor) -> "Batch":
        """The same with the embeddings [1, ...] of an empty caption."""
        return replace(self, t5=t5.expand_as(self.t5), clip=clip.expand_as(self.clip))


def pack(latents: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, h / 2 * w / 2, 4 * c]"""
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def new_batch(frozen: Frozen, kind: Kind, rng: random.Random, levels: Tensor, task: Task = PLAIN) -> Batch:
    """Scenes with fresh captions, at noise `levels` [kind.count]."""
    size = rng.choice(kind.sizes)
    scenes = [shaded(rng.choice(TRAINED), rng) for _ in range(kind.count)]
    texts = ["" if rng.random() < EMPTY else task.caption(scene, rng) for scene in scenes]
    shown = [other_scene(scene, rng) if rng.random() < DOUBT else scene for scene in scenes]
    for i, (level, text) in enumerate(zip(levels.tolist(), texts, strict=True)):
        if level < PICTURE_LEVEL or not text:
            scenes[i] = shown[i]
    latents, shown_latents = (task.latents(layers_of(frozen, each, size), texts) for each in (scenes, shown))
    weights = loss_weights(latents)
    seen, positions = seen_tokens(size, kind.stride, rng)
    clean, under_noise = (pack(each)[:, seen] for each in (latents, shown_latents))
    share = len(seen) / weights.shape[1]
    return Batch(levels, clean, under_noise, weights[:, seen], *frozen.embed(texts), positions, share)


def other_scene(scene: Scene, rng: random.Random) -> Scene:
    """One that `scene` may be mistaken for: moved, of another shape, or any."""
    kind = rng.random()
    if kind < 0.5:
        return moved(scene, rng, 0.12)
    return replace(scene, shape=rng.choice(SHAPES)) if kind < 0.8 else shaded(rng.choice(TRAINED), rng)


def seen_tokens(size: Size, stride: Stride, rng: random.Random) -> tuple[Tensor, Tensor]:
    """One token of each `stride` of the picture's tokens: their indices, and their positions as FLUX.1 numbers them."""
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
    """[count] in 0..1: a share of `pure` noise, from which a caption says all, and many levels close to it, where a
    picture's layout and colours are decided."""
    usual = torch.sigmoid(0.8 + 1.2 * torch.randn(count))
    high = 0.9 + 0.1 * torch.rand(count)
    levels = torch.where(torch.rand(count) < 0.6, usual, high).clamp(min=LEAST_LEVEL)
    return torch.where(torch.rand(count) < pure, torch.ones(count), levels)


def loss_weights(latents: Tensor) -> Tensor:
    """[n, tokens]: more for tokens inside a shape, and most for those along its outline."""
    differs = (latents - latents[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.05
    inside = F.max_pool2d(differs.float(), 2)  # a token is 2 x 2 latents
    edge = F.max_pool2d(inside, 3, 1, 1) + F.max_pool2d(-inside, 3, 1, 1)
    # rings are thin: all of them is edge, which is as it should be
    return torch.where(edge > 0, EDGE_WEIGHT, torch.where(inside > 0, SHAPE_WEIGHT, 1.0)).flatten(1)


def predict_velocity(transformer: nn.Module, noisy: Tensor, batch: Batch, guidance: Tensor | None) -> Tensor:
    """noise - clean, as the transformer sees it; `guidance` [n] for dev, None for schnell."""
    # products in bfloat16 where the processor has it
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
    """[1, 1, 1, all tokens]: what is there counts for what was left out, pads and picture tokens."""
    text, picture = batch.t5.shape[1], batch.clean.shape[1]
    bias = torch.zeros(1, 1, 1, text + picture)
    bias[..., text - 1] = math.log(batch.padded - text + 1)
    bias[..., text:] = -math.log(batch.share)
    return bias


def noised(batch: Batch) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) shown + t noise, and the velocity from there to the clean picture. Where that is what is shown, the
    velocity is noise - clean, as in rectified flow (arXiv:2209.03003)."""
    levels = batch.levels[:, None, None]
    noisy = torch.lerp(batch.shown, torch.randn_like(batch.clean), levels)
    return noisy, (noisy - batch.clean) / levels.clamp(min=LEAST_LEVEL)


def weighted_error(velocity: Tensor, target: Tensor, batch: Batch) -> Tensor:
    return (batch.weights * (velocity - target).square().mean(dim=2)).sum() / batch.weights.sum()


def flow_loss(transformer: nn.Module, batch: Batch, guidance: Tensor | None) -> Tensor:
    noisy, target = noised(batch)
    return weighted_error(predict_velocity(transformer, noisy, batch, guidance), target, batch)


def optimizers(transformer: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else.

    The scales of queries and keys learn fastest: they alone can make attention sharp against the weight of the pads.
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
    # up to this share of the training: how much of it starts from nothing but noise, and how often each kind comes
    (0.12, 1.0, {"tiny": 0.2, "small": 0.5, "medium": 0.3}),
    (0.4, 0.4, {"small": 0.4, "medium": 0.4, "large": 0.2}),
    (0.8, 0.25, {"small": 0.1, "medium": 0.55, "large": 0.35}),
    (1.0, 0.2, {"small": 0.1, "medium": 0.35, "large": 0.3, "medium, whole": 0.2, "large, whole": 0.05}),
)


def train_dev(folder: Path, steps: int = STEPS) -> None:
    """Train the transformer without guidance and write `folder`/transformer."""
    torch.manual_seed(0)
    transformer, frozen = new_transformer(guidance=True), load_frozen(folder)

    def loss(rng: random.Random, progress: float) -> Tensor:
        pure, kinds = next((pure, kinds) for until, pure, kinds in STAGES if progress < until)
        kind = KINDS[rng.choices(list(kinds), weights=list(kinds.values()))[0]]
        batch = new_batch(frozen, kind, rng, noise_levels(kind.count, pure))
        return flow_loss(transformer, batch, torch.full_like(batch.levels, PLAIN_GUIDANCE))

    train("dev", transformer, optimizers(transformer, LEARNING_RATE), steps, loss, average=0.998)
    transformer.save_pretrained(folder / "transformer")
