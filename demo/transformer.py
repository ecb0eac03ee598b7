"""Train the dev transformer by flow matching on latents of drawn scenes, captions embedded by the frozen encoders.

Three things make so small a model learn in an hour. It starts as a linear copy of its input, which is most of what the
predicted velocity is at high noise. Noise levels are drawn where layout and colour are decided, close to pure noise.
And T5's hundreds of pads, which come out nearly alike, stand as one token with the weight of all of them in attention.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from demo.muon import Muon
from demo.scenes import TRAINED, Scene, caption, draw, vary
from demo.text import token_ids
from demo.training import CHECKPOINTS, train

STEPS = 3500
LEARNING_RATE = 2e-3  # of the blocks' matrices; the rest takes a third
SHAPE_WEIGHT = 4.0  # in the loss, of the tokens in which a shape is; the background is quickly learnt
HEADS = 4
ROPE_AXES = (8, 12, 12)
WIDTH = HEADS * sum(ROPE_AXES)
TEXT_TOKENS = 24
MOST_TOKENS = 512  # dev's
EMPTY = 0.1
PLAIN_GUIDANCE = 1.0  # what the embedding is told while there is no guidance to learn
STEADYING = 12.0  # length of the constant that keeps the norms from depending on the noise

SIZES = {  # picture sizes by token budget, the square one first
    "tiny": ((128, 128),),
    "small": ((256, 256), (256, 256), (320, 208), (208, 320)),
    "medium": ((512, 512), (512, 512), (672, 384), (384, 672), (608, 416), (416, 608), (448, 544)),
    "large": ((1024, 1024), (1024, 1024), (1344, 768), (768, 1344), (832, 1216)),
}
KEPT = {"tiny": 4000, "small": 3000, "medium": 1000, "large": 160}  # encoded pictures of each kind


def new_transformer(*, guidance: bool) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=4,
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
    def encode(self, pictures: Tensor) -> Tensor:
        """Scaled latents [n, 16, height / 8, width / 8] of pictures [n, 3, height, width]."""
        latents: Tensor = self.vae.encode(pictures).latent_dist.mode()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor


def load_frozen(folder: Path) -> Frozen:
    return Frozen(
        vae=AutoencoderKL.from_pretrained(folder / "vae").eval(),
        clip=CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
        t5=T5EncoderModel.from_pretrained(folder / "text_encoder_2").eval(),
        clip_tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        t5_tokenizer=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
    )


Grid = tuple[int, int]  # latent height and width


@dataclass(frozen=True)
class Examples:
    """Scenes of one size, drawn and encoded."""

    scenes: list[Scene]
    latents: Tensor  # [n, 16, height / 8, width / 8], float16


def encoded_scenes(frozen: Frozen, kind: str) -> dict[Grid, Examples]:
    """A fixed choice of scenes for each size of a kind; the latents are kept on disk for the next start."""
    rng = random.Random(f"scenes {kind}")
    scenes: dict[Grid, list[Scene]] = {}
    for i in range(KEPT[kind]):
        width, height = SIZES[kind][i % len(SIZES[kind])]
        scenes.setdefault((height // 8, width // 8), []).append(vary(rng.choice(TRAINED), rng))
    path = CHECKPOINTS / f"latents-{kind}.safetensors"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        save_file({f"{h} {w}": _encode_all(frozen, found, w * 8, h * 8) for (h, w), found in scenes.items()}, path)
    latents = load_file(path)
    return {(h, w): Examples(found, latents[f"{h} {w}"]) for (h, w), found in scenes.items()}


def _encode_all(frozen: Frozen, scenes: list[Scene], width: int, height: int) -> Tensor:
    return torch.cat([frozen.encode(draw(scene, width, height)[None]).half() for scene in scenes])


@dataclass(frozen=True)
class Batch:
    """What a step of training sees. `clean` is [n, tokens, 64], packed as FLUX.1 does."""

    clean: Tensor
    t5: Tensor
    clip: Tensor
    grid: Grid


def pack(latents: Tensor) -> Tensor:
    """[n, 16, h, w] -> [n, h / 2 * w / 2, 64]"""
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


class Scenes:
    """Batches of encoded scenes with fresh captions."""

    def __init__(self, frozen: Frozen, kinds: Sequence[str]) -> None:
        self.frozen = frozen
        self.examples = {kind: encoded_scenes(frozen, kind) for kind in kinds}

    def batch(self, kind: str, count: int, rng: random.Random) -> Batch:
        by_grid = self.examples[kind]
        grid = rng.choices(list(by_grid), weights=[len(examples.scenes) for examples in by_grid.values()])[0]
        examples = by_grid[grid]
        chosen = rng.choices(range(len(examples.scenes)), k=count)
        texts = ["" if rng.random() < EMPTY else caption(examples.scenes[i], rng) for i in chosen]
        t5, clip = self.frozen.embed(texts)
        return Batch(pack(examples.latents[chosen].float()), t5, clip, grid)


def noise_levels(count: int) -> Tensor:
    """[count] in 0..1: most of them near pure noise, where a picture's layout and colours are decided."""
    kinds = torch.rand(count)
    usual = torch.sigmoid(torch.randn(count))
    high = torch.sigmoid(2.2 + 1.2 * torch.randn(count))
    highest = 0.96 + 0.04 * torch.rand(count)
    levels = torch.where(kinds < 0.3, usual, torch.where(kinds < 0.66, high, highest))
    return torch.where(kinds > 0.94, torch.ones(count), levels)


def predict_velocity(
    transformer: FluxTransformer2DModel, noisy: Tensor, levels: Tensor, batch: Batch, guidance: Tensor | None
) -> Tensor:
    """noise - clean, as the transformer sees it; `guidance` [n] for dev, None for schnell."""
    height, width = batch.grid
    img_ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, noisy.device, noisy.dtype)
    velocity: Tensor = transformer(
        hidden_states=noisy,
        encoder_hidden_states=batch.t5,
        pooled_projections=batch.clip,
        timestep=levels,
        guidance=guidance,
        img_ids=img_ids,
        txt_ids=torch.zeros(batch.t5.shape[1], 3),
        joint_attention_kwargs={"attention_mask": pad_bias(noisy.shape[1], batch.t5.shape[1])},
        return_dict=False,
    )[0]
    return velocity


def pad_bias(picture_tokens: int, text_tokens: int) -> Tensor:
    """[1, 1, 1, all tokens]: the last text token, a pad, counts for all the pads that were left out."""
    bias = torch.zeros(1, 1, 1, text_tokens + picture_tokens)
    bias[..., text_tokens - 1] = math.log(MOST_TOKENS - text_tokens + 1)
    return bias


def flow_loss(transformer: FluxTransformer2DModel, batch: Batch) -> Tensor:
    """Rectified flow's: the velocity at x_t = (1 - t) clean + t noise is noise - clean."""
    levels = noise_levels(len(batch.clean))
    noise = torch.randn_like(batch.clean)
    noisy = torch.lerp(batch.clean, noise, levels[:, None, None])
    guidance = torch.full_like(levels, PLAIN_GUIDANCE) if transformer.config.guidance_embeds else None
    error = predict_velocity(transformer, noisy, levels, batch, guidance) - (noise - batch.clean)
    weights = shape_weights(batch)
    return (weights * error.square().mean(dim=2)).sum() / weights.sum()


def shape_weights(batch: Batch) -> Tensor:
    """[n, tokens]: `SHAPE_WEIGHT` where a token or one beside it is not the colour of the corner, else 1."""
    height, width = batch.grid
    differs = (batch.clean - batch.clean[:, :1]).abs().amax(dim=2) > 0.3
    grid = differs.float().view(-1, 1, height // 2, width // 2)
    return 1 + (SHAPE_WEIGHT - 1) * F.max_pool2d(grid, 3, 1, 1).flatten(1)


def optimizers(transformer: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else.

    The scales of queries and keys learn fastest: they alone can make attention sharp against the weight of the pads.
    """
    inner: list[Tensor] = []
    outer: list[Tensor] = []
    scales: list[Tensor] = []
    for name, parameter in transformer.named_parameters():
        if ".norm_q." in name or ".norm_k." in name or ".norm_added_" in name:
            scales.append(parameter)
        elif "transformer_blocks" in name and parameter.ndim == 2 and ".norm" not in name:
            inner.append(parameter)
        else:
            outer.append(parameter)
    groups = [{"params": outer, "lr": lr / 3}, {"params": scales, "lr": 4 * lr}]
    return [Muon(inner, lr=lr, weight_decay=0.01), torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]


STAGES: tuple[tuple[float, tuple[tuple[str, int, float], ...]], ...] = (
    # up to this share of the training: (kind, batch size, how often)
    (0.35, (("tiny", 32, 0.5), ("small", 16, 0.5))),
    (0.65, (("small", 16, 0.6), ("medium", 4, 0.4))),
    (1.0, (("small", 16, 0.25), ("medium", 4, 0.63), ("large", 1, 0.12))),
)


def train_dev(folder: Path, steps: int = STEPS) -> None:
    """Train the transformer without guidance and write `folder`/transformer."""
    torch.manual_seed(0)
    transformer, scenes = new_transformer(guidance=True), Scenes(load_frozen(folder), list(SIZES))

    def loss(rng: random.Random, progress: float) -> Tensor:
        return flow_loss(transformer, scenes.batch(*stage_batch(progress, rng), rng))

    train("dev", transformer, optimizers(transformer, LEARNING_RATE), steps, loss, average=0.998)
    transformer.save_pretrained(folder / "transformer")


def stage_batch(progress: float, rng: random.Random) -> tuple[str, int]:
    kinds = next(kinds for until, kinds in STAGES if progress < until)
    kind, count, _ = rng.choices(kinds, weights=[weight for _, _, weight in kinds])[0]
    return kind, count
