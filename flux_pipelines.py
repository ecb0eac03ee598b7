"""From a prompt to a picture, in the file's order: encode the prompt, encode the input picture, denoise, decode.

The denoising itself is diffusers' own; the pictures are bit for bit those of its pipelines (`FluxPipeline`,
`FluxImg2ImgPipeline`, `FluxInpaintPipeline`) on the same checkpoint in the same dtype with a CPU generator of the same
seed.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from flux_models import Flux, PromptEmbeds, decoding_bytes, denoising_bytes
from images import Size

log = logging.getLogger("flux-lora")

MAX_SEQUENCE_LENGTH = {"dev": 512, "schnell": 256}  # T5 tokens


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
    """
    if (prompt, weights) in flux.embeddings:
        return flux.embeddings[prompt, weights]
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
