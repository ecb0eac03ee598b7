"""A FLUX.1 checkpoint of any size with random weights, in diffusers' folder layout.

It has every part that the real checkpoint has, so the same code loads and runs it; what it draws is noise. The tests
and benchmarks build theirs with it.
"""

import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

LATENT_CHANNELS = 16
SHARD_BYTES = 10 * 10**9


@dataclass(frozen=True)
class FluxSize:
    """The numbers in which one FLUX.1 differs from another. The defaults are the smallest that draws anything."""

    heads: int = 2
    rope_axes: tuple[int, int, int] = (4, 6, 6)  # their sum is the width of one attention head
    double_blocks: int = 1
    single_blocks: int = 1
    t5_width: int = 32
    t5_layers: int = 1
    clip_width: int = 32
    clip_layers: int = 1
    vae_channels: tuple[int, int, int, int] = (8, 8, 16, 16)
    vae_layers: int = 1
    clip_tokens: int | None = None  # in the vocabulary; None: the tokenizer's own few
    t5_tokens: int | None = None


# FLUX.1's own width everywhere, at a depth that two cores can run; the whole model has 19 + 38 blocks, 24 T5 layers.
FULL_WIDTH = FluxSize(
    heads=24,
    rope_axes=(16, 56, 56),
    double_blocks=2,
    single_blocks=4,
    t5_width=4096,
    t5_layers=1,
    clip_width=768,
    clip_layers=2,
    vae_channels=(128, 256, 512, 512),
    vae_layers=2,
)


FLUX_1 = replace(
    FULL_WIDTH, double_blocks=19, single_blocks=38, t5_layers=24, clip_layers=12, clip_tokens=49408, t5_tokens=32128
)


def new_networks(size: FluxSize, *, model: str) -> dict[str, torch.nn.Module]:
    """The networks of `model` by their names in a pipeline, with whatever weights the default device and dtype give."""
    return {
        "vae": _vae(size),
        "text_encoder": _clip(size, _clip_tokenizer()),
        "text_encoder_2": _t5(size, _t5_tokenizer()),
        "transformer": _transformer(size, guidance=model == "dev"),
    }


def write_random_flux(
    folder: Path, size: FluxSize, *, model: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> None:
    """Write a whole checkpoint of `model` ("dev" has a guidance embedding and a shifted schedule, "schnell" neither).

    The VAE, text encoders and tokenizers depend on `size` and `seed` alone, so that dev's and schnell's are the same.
    """
    transformers.utils.logging.disable_progress_bar()
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a full-width model must never exist in float32
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            FluxPipeline(
                scheduler=new_scheduler(model),
                tokenizer=_clip_tokenizer(),
                tokenizer_2=_t5_tokenizer(),
                **new_networks(size, model=model),
            ).save_pretrained(folder, max_shard_size="2GB")
    finally:
        torch.set_default_dtype(default_dtype)


def new_scheduler(model: str) -> FlowMatchEulerDiscreteScheduler:
    """dev's moves towards the noise as the picture grows, schnell's is even; the numbers are FLUX.1's."""
    shifted = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    unshifted = {"shift": 1.0, "use_dynamic_shifting": False}
    return FlowMatchEulerDiscreteScheduler(
        **(shifted if model == "dev" else unshifted), base_image_seq_len=256, max_image_seq_len=4096
    )


def _transformer(size: FluxSize, *, guidance: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=LATENT_CHANNELS * 4,
        num_layers=size.double_blocks,
        num_single_layers=size.single_blocks,
        attention_head_dim=sum(size.rope_axes),
        num_attention_heads=size.heads,
        joint_attention_dim=size.t5_width,
        pooled_projection_dim=size.clip_width,
        guidance_embeds=guidance,
        axes_dims_rope=size.rope_axes,
    ).eval()


def _vae(size: FluxSize) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=size.vae_channels,
        layers_per_block=size.vae_layers,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=min(32, size.vae_channels[0]),
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _clip(size: FluxSize, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size.clip_tokens or len(tokenizer),
            hidden_size=size.clip_width,
            intermediate_size=4 * size.clip_width,
            projection_dim=size.clip_width,
            num_hidden_layers=size.clip_layers,
            num_attention_heads=max(1, size.clip_width // 64),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def _t5(size: FluxSize, tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=size.t5_tokens or len(tokenizer),
            d_model=size.t5_width,
            d_ff=size.t5_width * 5 // 2,
            d_kv=min(64, size.t5_width),
            num_heads=max(1, size.t5_width // 64),
            num_layers=size.t5_layers,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """One token a byte: a vocabulary without merges needs no corpus."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    """One token a printable ASCII character."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -4.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=512)


def write_repeating_flux(folder: Path, size: FluxSize, *, model: str) -> None:
    """Write the files of a checkpoint of `model` in bfloat16, in shards as FLUX.1's are, for whoever loads and reads
    it: its numbers repeat. No more than 64 MiB of them are in memory, so that a model of any size can be made."""
    with torch.device("meta"):
        networks = new_networks(size, model=model)
    numbers = torch.randn(2**25, dtype=torch.bfloat16).mul_(0.02).view(torch.uint8).numpy().tobytes()
    for part, network in networks.items():
        shapes = {name: list(value.shape) for name, value in network.named_parameters()}
        if isinstance(network, transformers.PreTrainedModel):
            network.config.save_pretrained(folder / part)
            _write_shards(folder / part, "model", shapes, numbers)
        else:
            network.save_config(folder / part)  # type: ignore[operator]  # diffusers': torch's stubs hide it
            _write_shards(folder / part, "diffusion_pytorch_model", shapes, numbers)
    new_scheduler(model).save_pretrained(folder / "scheduler")
    _clip_tokenizer().save_pretrained(folder / "tokenizer")
    _t5_tokenizer().save_pretrained(folder / "tokenizer_2")


def _write_shards(folder: Path, stem: str, shapes: Mapping[str, list[int]], numbers: bytes) -> None:
    """safetensors files: the length of the header, the header in JSON, the tensors one after another
    (https://huggingface.co/docs/safetensors), and the index that says which file has what."""
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if end + nbytes > SHARD_BYTES:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        header = json.dumps(shard).encode()
        header += b" " * (-len(header) % 8)  # so that the tensors are aligned
        left = max(tensor["data_offsets"][1] for tensor in shard.values())
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            while left:
                left -= file.write(numbers[:left])
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(2 * math.prod(shape) for shape in shapes.values())}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
