"""From a prompt to a picture, in the file's order: encode the prompt, encode the input picture, denoise, decode.

The networks and the schedule are diffusers', the loop over the steps is ours; the pictures are bit for bit those of
diffusers' pipelines (`FluxPipeline`, `FluxImg2ImgPipeline`, `FluxInpaintPipeline`) on the same checkpoint in the same
dtype with a CPU generator of the same seed.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from flux.device import attention_backend
from flux.models import Flux, Models, PromptEmbeds
from flux.plan import decoding_bytes, denoising_bytes, picture_bytes
from images import SIZES, Size, output_size
from service.errors import InputError

log = logging.getLogger("flux-lora")

MAX_SEQUENCE_LENGTH = {"dev": 512, "schnell": 256}  # T5 tokens
MOST_PROMPT = 50_000  # characters; the tokenizers read all of a prompt before they cut it, at 0.2 KB each
LATENT_CHANNELS, PIXELS_PER_LATENT = 16, 8
WARM_UP_SIZE = (528, 304)  # 627 tokens: a count that equals the text's would be compiled for equal counts
SCHEDULES = 32  # that are kept: picture sizes, counts of steps, models
PICTURE_PROCESSOR = VaeImageProcessor(vae_scale_factor=16)  # pictures' sides are multiples of it
MASK_PROCESSOR = VaeImageProcessor(vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True)


class NotFiniteError(RuntimeError):
    """Numbers of a picture are infinite or NaN; the message is one sentence for the person who sent the request."""


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


@torch.no_grad()
def encode_prompt(flux: Flux, prompt: str, weights: Hashable = ()) -> PromptEmbeds:
    """Embed a prompt as `FluxPipeline.encode_prompt` does, or take it from the cache, where it belongs to the `weights`
    of the text encoders that made it (any value that tells them apart).

    T5 reads the first 512 tokens (schnell: 256), CLIP the first 77; what is beyond T5's is said in the log.
    Raises `InputError`.
    """
    if (prompt, weights) in flux.embeddings:
        return flux.embeddings[prompt, weights]
    if len(prompt) > MOST_PROMPT:
        raise InputError(f"prompt has {len(prompt)} characters: send at most {MOST_PROMPT}.")
    length = MAX_SEQUENCE_LENGTH[flux.name]
    clip_ids = _token_ids(flux.tokenizer, prompt, flux.tokenizer.model_max_length)
    t5_ids = _token_ids(flux.tokenizer_2, prompt, length)
    flux.residency.use(flux.text_encoder, flux.text_encoder_2)
    embeds = PromptEmbeds(
        t5=flux.text_encoder_2(t5_ids.to(flux.residency.device))[0],
        clip=flux.text_encoder(clip_ids.to(flux.residency.device)).pooler_output,
    )
    if t5_ids[0, -1] != flux.tokenizer_2.pad_token_id:
        tokens = len(flux.tokenizer_2(prompt).input_ids)
        if tokens > length:
            log.warning("the prompt has %d tokens, of which %s reads the first %d", tokens, flux.name, length)
    if embeds.nbytes <= flux.embeddings.maxsize:
        flux.embeddings[prompt, weights] = embeds
    return embeds


def _token_ids(tokenizer: Any, prompt: str, length: int) -> torch.Tensor:
    """[1, length], padded or cut."""
    tokens = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: torch.Tensor = tokens.input_ids
    return ids


@torch.no_grad()
def encode_picture(flux: Flux, picture: Image.Image) -> DiagonalGaussianDistribution:
    """The VAE's posterior of an RGB picture whose sides are multiples of 16; each seed draws its own sample of it."""
    flux.residency.use(flux.vae, work=decoding_bytes(picture.size))
    pixels = PICTURE_PROCESSOR.preprocess(picture)  # [1, 3, height, width] in -1..1
    return flux.vae.encode(pixels.to(flux.residency.device, flux.dtype)).latent_dist


def steps_to_run(steps: int, strength: float) -> int:
    """How many of `steps` image-to-image runs at this strength: the count of diffusers' `get_timesteps`."""
    return steps - int(max(steps - min(steps * strength, steps), 0))


@dataclass(frozen=True)
class Start:
    """All that the steps of one picture need, on the device, made before the first of them."""

    noise: torch.Tensor  # packed latents [1, height/16 * width/16, 64], as are the next two
    image: torch.Tensor | None  # the input picture's latents
    mask: torch.Tensor | None  # 1 where it is repainted
    schedule: "Schedule"
    first_step: int  # of the schedule: image-to-image leaves out those before it
    inputs: dict[str, Any]  # of the transformer, the same in every step


def prepare(flux: Flux, job: Job, seed: int) -> Start:
    """Draw the noise of `seed` and make what the steps need."""
    transformer, (width, height) = flux.transformer, job.size
    device, dtype = flux.residency.device, flux.dtype
    generator = torch.Generator("cpu").manual_seed(seed)
    # the picture's sample is drawn before the noise, as diffusers does
    image = None if job.posterior is None else _pack(_scaled_sample(flux, job.posterior, generator))
    shape = (1, LATENT_CHANNELS, height // 8, width // 8)
    return Start(
        noise=_pack(randn_tensor(shape, generator=generator, device=device, dtype=dtype)),
        image=image,
        mask=None if job.mask is None else _packed_mask(job.mask, job.size).to(device, dtype),
        schedule=make_schedule(flux, job.size, job.steps),
        first_step=job.steps - job.steps_to_run,
        inputs={
            "encoder_hidden_states": job.embeds.t5,
            "pooled_projections": job.embeds.clip,
            "txt_ids": torch.zeros(job.embeds.t5.shape[1], 3, device=device, dtype=dtype),
            "img_ids": FluxPipeline._prepare_latent_image_ids(1, height // 16, width // 16, device, dtype),
            "guidance": torch.full([1], job.guidance, device=device) if transformer.config.guidance_embeds else None,
            "return_dict": False,
        },
    )


@torch.no_grad()
def denoise(flux: Flux, job: Job, seed: int, on_step: Callable[[], object]) -> torch.Tensor:
    """Denoise one picture. Returns packed latents [1, height/16 * width/16, 64]; calls `on_step` after every step.

    The loop queues kernels and nothing else: no value comes back from the device and none goes there.
    """
    transformer, dtype = flux.transformer, flux.dtype
    flux.residency.use(transformer, flux.vae, work=denoising_bytes(job.size), room=picture_bytes(job.size))
    start = prepare(flux, job, seed)
    schedule = start.schedule
    latents = start.noise if start.image is None else _noised(start, start.image, start.first_step)
    if transformer.is_cache_enabled:
        transformer._reset_stateful_cache()  # the last picture's
    with _rotations_made_once(transformer.pos_embed), transformer.cache_context("picture"):
        for i in range(start.first_step, job.steps):
            velocity = transformer(hidden_states=latents, timestep=schedule.timesteps[i : i + 1], **start.inputs)[0]
            latents = (latents.float() + schedule.sigma_changes[i] * velocity).to(dtype)
            if start.mask is not None and start.image is not None:
                kept = _noised(start, start.image, i + 1) if i + 1 < job.steps else start.image
                latents = (1 - start.mask) * kept + start.mask * latents
            on_step()
    return latents


def _noised(start: Start, image: torch.Tensor, step: int) -> torch.Tensor:
    """The input picture's latents with as much noise as there is before `step`."""
    sigma = start.schedule.sigmas[step]
    return sigma * start.noise + (1.0 - sigma) * image


def warm_up(models: Models) -> None:
    """Run every transformer that is on the device for one step, on a CPU all of them: what is to be compiled is, then.
    A model that comes later has the same blocks and compiles nothing.

    cuDNN's attention makes a plan for every new shape, which takes up to half a second: where it is used, each model
    also runs a step of every named size.
    """
    for name, both in models.items():
        here = [flux for flux in both if flux.residency.memory is None or flux.residency.has(flux.transformer)]
        for flux in here:
            _step(flux, WARM_UP_SIZE)
        if here and attention_backend(here[0].residency.device):
            sizes = [output_size(ratio, megapixels, None, None) for ratio in SIZES for megapixels in ("1", "0.25")]
            log.info("%s: attention is planned for %d sizes", name, len(sizes))
            for size in sizes:
                _step(here[0], size)


def _step(flux: Flux, size: Size) -> None:
    """One step of a picture of nothing."""
    device, dtype, config = flux.residency.device, flux.dtype, flux.transformer.config
    t5 = torch.zeros(1, MAX_SEQUENCE_LENGTH[flux.name], config.joint_attention_dim, dtype=dtype, device=device)
    clip = torch.zeros(1, config.pooled_projection_dim, dtype=dtype, device=device)
    denoise(flux, Job(size, 1, 1.0, PromptEmbeds(t5, clip)), 0, lambda: None)


@dataclass(frozen=True)
class Schedule:
    """What the steps of one picture size differ in, on the device. A sigma is how much of the latents is noise."""

    timesteps: torch.Tensor  # [steps], as the transformer takes them: from 1 down
    sigma_changes: torch.Tensor  # [steps] float32: by how much each step changes sigma; negative
    sigmas: torch.Tensor  # [steps + 1]: before each step, and after the last


@lru_cache(SCHEDULES)
def make_schedule(flux: Flux, size: Size, steps: int) -> Schedule:
    """FLUX.1's schedule, which moves towards the noise as the picture grows, by diffusers' scheduler."""
    scheduler, dtype = copy(flux.scheduler), flux.dtype
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    shift = calculate_shift((size[0] // 16) * (size[1] // 16), *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift, device=flux.residency.device)
    return Schedule(scheduler.timesteps.to(dtype) / 1000, scheduler.sigmas.diff(), scheduler.sigmas.to(dtype))


def _pack(latents: torch.Tensor) -> torch.Tensor:
    """[1, 16, height/8, width/8] -> [1, height/16 * width/16, 64]."""
    packed: torch.Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def _packed_mask(mask: Image.Image, size: Size) -> torch.Tensor:
    """[1, height/16 * width/16, 64], 1 where it is repainted."""
    width, height = size
    pixels = MASK_PROCESSOR.preprocess(mask, height=height, width=width)  # [1, 1, height, width]
    latents = torch.nn.functional.interpolate(pixels, size=(height // 8, width // 8))
    return _pack(latents.repeat(1, LATENT_CHANNELS, 1, 1))


@contextmanager
def _rotations_made_once(pos_embed: torch.nn.Module) -> Iterator[None]:
    """Within, the rotations that a transformer makes of its position ids in every forward are those of the first.

    A cancel can leave this installed: the next picture's takes its place, and never calls it.
    """
    make = partial(type(pos_embed).forward, pos_embed)
    made: list[Any] = []

    def once(ids: torch.Tensor) -> Any:
        if not made:
            made.append(make(ids))
        return made[0]

    pos_embed.forward = once
    try:
        yield
    finally:
        del pos_embed.forward


def _scaled_sample(flux: Flux, posterior: DiagonalGaussianDistribution, generator: torch.Generator) -> torch.Tensor:
    config = flux.vae.config
    scaled: torch.Tensor = (posterior.sample(generator) - config.shift_factor) * config.scaling_factor
    return scaled


@torch.no_grad()
def decode(flux: Flux, latents: torch.Tensor, size: Size) -> Image.Image:
    """Turn packed latents [1, tokens, 64] into an RGB picture of `size`. Raises `NotFiniteError`, since such a picture
    would be black."""
    width, height = size
    _check_finite(latents)
    flux.residency.use(flux.vae, work=decoding_bytes(size))
    unpacked = FluxPipeline._unpack_latents(latents, height, width, PIXELS_PER_LATENT)  # [1, 16, height/8, width/8]
    unpacked = unpacked / flux.vae.config.scaling_factor + flux.vae.config.shift_factor
    pixels = flux.vae.decode(unpacked, return_dict=False)[0]  # [1, 3, height, width]
    _check_finite(pixels)
    picture: Image.Image = PICTURE_PROCESSOR.postprocess(pixels, output_type="pil")[0]
    return picture


def _check_finite(numbers: torch.Tensor) -> None:
    """It waits for the device, which is why it is not done in every step."""
    if not numbers.isfinite().all():
        raise NotFiniteError(
            "The picture's numbers are not finite, and no LoRA is in use: the model's weights, or their precision "
            f"({str(numbers.dtype).removeprefix('torch.')}), are at fault."
        )
