"""FLUX.1 dev and schnell: load them, share what they share, and turn a prompt into a picture.

The data's way is the file's order: load, encode the prompt, encode the input picture, denoise, decode. The denoising
itself is diffusers' own; the pictures are bit for bit those of its pipelines (`FluxPipeline`, `FluxImg2ImgPipeline`,
`FluxInpaintPipeline`) on the same checkpoint in the same dtype with a CPU generator of the same seed.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from cachetools import LRUCache
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from checkpoints import open_weights
from device import has_fp8_units
from fp8 import load_twin, new_twin
from images import Size
from residency import FP8_SUFFIX, VAE, Memory, Residency, plan_layout, release, transplant

log = logging.getLogger("flux-lora")

PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
MAX_SEQUENCE_LENGTH = {"dev": 512, "schnell": 256}  # T5 tokens
EMBEDDING_CACHE_BYTES = 64 * 2**20  # a dev prompt takes 4 MiB at FLUX.1's width
# activations at the peak, of a transformer forward and of a VAE decoding in bf16 (`script/bench memory`)
DENOISING_BYTES_PER_PIXEL = 800
DECODING_BYTES_PER_PIXEL = 2100
TYPICAL_SIZE = (1024, 1024)
WEIGHT_SAMPLES = 64  # places at which two copies of a part are compared

PART_CLASSES: dict[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": T5TokenizerFast,
    "transformer": FluxTransformer2DModel,
}
SHARED_PARTS = [part for part in PART_CLASSES if part != "transformer"]
PART_NAMES = {"vae": VAE, "text_encoder": "CLIP", "text_encoder_2": "T5"}  # in the log
ENCODERS = ("CLIP", "T5")


@dataclass(frozen=True)
class PromptEmbeds:
    """What the transformer sees of a prompt."""

    t5: torch.Tensor  # [1, tokens, t5 width]
    clip: torch.Tensor  # [1, clip width], CLIP's pooled output

    @property
    def nbytes(self) -> int:
        return self.t5.nbytes + self.clip.nbytes


def _embedding_cache() -> LRUCache[str, PromptEmbeds]:
    return LRUCache(EMBEDDING_CACHE_BYTES, getsizeof=lambda embeds: embeds.nbytes)


@dataclass(frozen=True)
class Flux:
    """One of the two models. Its three pipelines share every component; dev and schnell share all but `OWN_PARTS`."""

    name: str
    precision: str  # as the metrics and the log call it: "bf16", "fp32" or "fp8"
    txt2img: FluxPipeline
    img2img: FluxImg2ImgPipeline
    inpaint: FluxInpaintPipeline
    residency: Residency
    embeddings: LRUCache[str, PromptEmbeds] = field(default_factory=_embedding_cache)
    fast: "Flux | None" = None  # the same model in fp8; it has none itself

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in; under fp8, what is computed in outside the fp8 products."""
        dtype: torch.dtype = self.txt2img.transformer.dtype
        return dtype


@dataclass(frozen=True)
class Job:
    """One request as the model sees it; the seed alone tells its pictures apart."""

    size: Size  # both sides multiples of 16
    steps: int
    guidance: float  # schnell has none and ignores it
    embeds: PromptEmbeds
    strength: float = 1.0  # with an input picture: how much of the schedule is run
    posterior: DiagonalGaussianDistribution | None = None  # of the input picture; None is text-to-image
    mask: Image.Image | None = None  # "L" in the job's size, white is repainted; None is image-to-image

    @property
    def steps_to_run(self) -> int:
        return self.steps if self.posterior is None else steps_to_run(self.steps, self.strength)


def load_flux(
    folders: Mapping[str, Path], device: torch.device, dtype: torch.dtype, memory: Memory | None = None
) -> dict[str, Flux]:
    """Load every model of `folders` (name -> folder in diffusers layout) in `dtype` onto `device`, and prepare fp8.

    Weights go from the memory-mapped file to their device, tensor by tensor; on the CPU a file of that dtype is never
    copied at all. A part that a folder lacks, or that is the same as the first model's, is loaded once for both. Where
    there is a `memory` to keep within, and for fp8 always, a part comes to the device when it is first used.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    residency = Residency(memory)
    models: dict[str, Flux] = {}
    first_folder = next(iter(folders.values()))
    first_parts: dict[str, Any] = {}
    for name, folder in folders.items():
        parts = {}
        for part in SHARED_PARTS:
            if part in first_parts and _same_part(folder / part, first_folder / part):
                parts[part] = first_parts[part]
            else:
                called = PART_NAMES.get(part, part)
                called = f"{name} {called}" if first_parts else called
                parts[part] = _add_part(residency, called, folder / part, device, dtype)
        first_parts = first_parts or parts
        transformer = _add_part(residency, name, folder / "transformer", device, dtype)
        twin = _add_twin(residency, name + FP8_SUFFIX, transformer, folder / "transformer", device)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        flux = _flux(name, PRECISIONS[dtype], {**parts, "scheduler": scheduler, "transformer": transformer}, residency)
        fast = _flux(name, "fp8", {**parts, "scheduler": scheduler, "transformer": twin}, residency)
        models[name] = replace(flux, fast=replace(fast, embeddings=flux.embeddings))
    return models


def _flux(name: str, precision: str, parts: Mapping[str, Any], residency: Residency) -> Flux:
    kinds = (FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline)
    txt2img, img2img, inpaint = pipelines = [kind(**parts) for kind in kinds]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)  # the request has one bar for all its pictures
    return Flux(name, precision, txt2img, img2img, inpaint, residency)


def _add_part(residency: Residency, name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    if folder.name.startswith("tokenizer"):
        return PART_CLASSES[folder.name].from_pretrained(folder)
    limited = residency.memory is not None
    module = _load_part(folder, torch.device("cpu") if limited else device, dtype)
    size = sum(parameter.nbytes for parameter in module.parameters())
    if limited:
        release(module, device)
    load = partial(_load_again, module, folder, device, dtype)
    residency.add(name, module, size, load, loaded=not limited)
    return module


def _load_again(module: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    transplant(_load_part(folder, device, dtype), module)


def _load_part(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    part_class = PART_CLASSES[folder.name]
    return part_class.from_pretrained(folder, device_map=str(device), use_safetensors=True, dtype=dtype).eval()


def _add_twin(
    residency: Residency, name: str, transformer: FluxTransformer2DModel, folder: Path, device: torch.device
) -> FluxTransformer2DModel:
    twin = new_twin(transformer, weight_only=not has_fp8_units(device))
    size = sum(parameter.nbytes for parameter in twin.parameters())
    release(twin, device)
    load = partial(load_twin, twin, open_weights(folder), device)
    residency.add(name, twin, size, load, loaded=False)
    return twin


def settle(models: Mapping[str, Flux]) -> None:
    """Bring what fits onto a device of limited memory: text encoders, VAE, then dev and schnell in both precisions.

    Raises `TooSmallError` when it cannot run any of them.
    """
    residency = next(iter(models.values())).residency
    if residency.memory is not None:
        transformers = [name + suffix for name in models for suffix in ("", FP8_SUFFIX)]
        work = denoising_bytes(TYPICAL_SIZE)
        residency.bring(plan_layout(residency.sizes, residency.memory, transformers, ENCODERS, work))


def _same_part(a: Path, b: Path) -> bool:
    """Whether folder `a` is missing or holds the same thing as folder `b`.

    Small files are compared whole, weights by their length and at `WEIGHT_SAMPLES` places: reading 10 GB twice at every
    start would cost more than loading a copy, and weights trained apart differ everywhere.
    """
    if not a.is_dir():
        return True
    names = {file.name for file in a.iterdir()}
    return names == {file.name for file in b.iterdir()} and all(_same_file(a / name, b / name) for name in names)


def _same_file(a: Path, b: Path) -> bool:
    if a.name == "config.json":
        return _meaning(a) == _meaning(b)
    size = a.stat().st_size
    if size != b.stat().st_size:
        return False
    chunk = 2**16
    stride = max(chunk, size // WEIGHT_SAMPLES)
    with a.open("rb") as file_a, b.open("rb") as file_b:
        for offset in range(0, size, stride):
            file_a.seek(offset)
            file_b.seek(offset)
            if file_a.read(chunk) != file_b.read(chunk):
                return False
    return True


def _meaning(config: Path) -> dict[str, Any]:
    """A config without the notes on who wrote it, with which version, from where."""
    values = json.loads(config.read_text())
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}


@torch.no_grad()
def encode_prompt(flux: Flux, prompt: str) -> PromptEmbeds:
    """Embed a prompt as `FluxPipeline.encode_prompt` does, or take it from the cache.

    T5 reads the first 512 tokens (schnell: 256), CLIP the first 77; what is beyond T5's is said in the log.
    """
    if prompt in flux.embeddings:
        return flux.embeddings[prompt]
    pipeline, length = flux.txt2img, MAX_SEQUENCE_LENGTH[flux.name]
    clip_ids = _token_ids(pipeline.tokenizer, prompt, pipeline.tokenizer_max_length)
    t5_ids = _token_ids(pipeline.tokenizer_2, prompt, length)
    flux.residency.use(pipeline.text_encoder, pipeline.text_encoder_2)
    embeds = PromptEmbeds(
        t5=pipeline.text_encoder_2(t5_ids.to(pipeline.device))[0],
        clip=pipeline.text_encoder(clip_ids.to(pipeline.device)).pooler_output,
    )
    if t5_ids[0, -1] != pipeline.tokenizer_2.pad_token_id:
        tokens = len(pipeline.tokenizer_2(prompt).input_ids)
        if tokens > length:
            log.warning("the prompt has %d tokens, of which %s reads the first %d", tokens, flux.name, length)
    if embeds.nbytes <= flux.embeddings.maxsize:
        flux.embeddings[prompt] = embeds
    return embeds


def _token_ids(tokenizer: Any, prompt: str, length: int) -> torch.Tensor:
    """[1, length], padded or cut."""
    tokens = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: torch.Tensor = tokens.input_ids
    return ids


@torch.no_grad()
def encode_picture(flux: Flux, picture: Image.Image) -> DiagonalGaussianDistribution:
    """The VAE's posterior of an RGB picture whose sides are multiples of 16; each seed draws its own sample of it."""
    flux.residency.use(flux.img2img.vae, work=decoding_bytes(picture.size))
    pixels = flux.img2img.image_processor.preprocess(picture)  # [1, 3, height, width] in -1..1
    return flux.img2img.vae.encode(pixels.to(flux.img2img.device, flux.dtype)).latent_dist


def steps_to_run(steps: int, strength: float) -> int:
    """How many of `steps` image-to-image runs at this strength: the count of diffusers' `get_timesteps`."""
    return steps - int(max(steps - min(steps * strength, steps), 0))


def denoise(flux: Flux, job: Job, seed: int, on_step: Callable[[], object]) -> torch.Tensor:
    """Denoise one picture. Returns packed latents [1, height/16 * width/16, 64]; calls `on_step` after every step."""
    flux.residency.use(flux.txt2img.transformer, flux.txt2img.vae, work=denoising_bytes(job.size))
    generator = torch.Generator("cpu").manual_seed(seed)

    def step_end(_pipeline: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return {}

    width, height = job.size
    arguments: dict[str, Any] = {
        "prompt_embeds": job.embeds.t5,
        "pooled_prompt_embeds": job.embeds.clip,
        "width": width,
        "height": height,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance,
        "generator": generator,
        "output_type": "latent",
        "return_dict": False,
        "callback_on_step_end": step_end,
        "callback_on_step_end_tensor_inputs": [],
    }
    latents: torch.Tensor
    if job.posterior is None:
        latents = flux.txt2img(**arguments)[0]
    else:
        # drawn before the pipeline draws its noise, as the pipeline itself would
        image_latents = _scaled_sample(flux, job.posterior, generator)
        arguments |= {"image": image_latents, "strength": job.strength}
        if job.mask is None:
            latents = flux.img2img(**arguments)[0]
        else:
            # FLUX.1 takes no masked image as an input: any latents will do, and save an encoding that nothing reads
            latents = flux.inpaint(mask_image=job.mask, masked_image_latents=image_latents, **arguments)[0]
    return latents


def fits(flux: Flux, size: Size) -> bool:
    """Whether the device has the memory to denoise a picture of this size with this transformer."""
    return flux.residency.fits(flux.txt2img.transformer, flux.txt2img.vae, work=denoising_bytes(size))


def denoising_bytes(size: Size) -> int:
    """What a transformer forward needs beside the weights."""
    return DENOISING_BYTES_PER_PIXEL * size[0] * size[1]


def decoding_bytes(size: Size) -> int:
    """What the VAE needs beside its weights, encoding or decoding."""
    return DECODING_BYTES_PER_PIXEL * size[0] * size[1]


def _scaled_sample(flux: Flux, posterior: DiagonalGaussianDistribution, generator: torch.Generator) -> torch.Tensor:
    config = flux.img2img.vae.config
    scaled: torch.Tensor = (posterior.sample(generator) - config.shift_factor) * config.scaling_factor
    return scaled


@torch.no_grad()
def decode(flux: Flux, latents: torch.Tensor, size: Size) -> Image.Image:
    """Turn packed latents [1, tokens, 64] into an RGB picture of `size`."""
    pipeline, (width, height) = flux.txt2img, size
    flux.residency.use(pipeline.vae, work=decoding_bytes(size))
    unpacked = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)  # [1, 16, h/8, w/8]
    unpacked = unpacked / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    pixels = pipeline.vae.decode(unpacked, return_dict=False)[0]  # [1, 3, height, width]
    picture: Image.Image = pipeline.image_processor.postprocess(pixels, output_type="pil")[0]
    return picture
