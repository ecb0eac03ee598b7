"""What diffusers itself draws: its own pipelines, loaded and called in the ten lines that a user of it would write."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image

from flux.device import compute_dtype
from tests.conftest import SHARED_PARTS


def load_oracle(checkpoints: dict[str, Path]) -> dict[str, FluxPipeline]:
    dtype = compute_dtype(torch.device("cpu"))
    dev = FluxPipeline.from_pretrained(checkpoints["dev"], dtype=dtype)
    shared = {part: getattr(dev, part) for part in SHARED_PARTS}
    schnell = FluxPipeline.from_pretrained(checkpoints["schnell"], dtype=dtype, **shared)
    return {"dev": dev, "schnell": schnell}


def diffusers_picture(
    pipeline: FluxPipeline,
    *,
    model: str,
    seed: int,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    strength: float | None = None,
    **options: Any,
) -> Image.Image:
    """One picture of `FluxPipeline`, `FluxImg2ImgPipeline` or `FluxInpaintPipeline`, kept pixels not pasted back."""
    options["max_sequence_length"] = 512 if model == "dev" else 256
    options["generator"] = torch.Generator("cpu").manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    if image is None:
        return pipeline(**options).images[0]
    options |= {"image": image, "strength": strength}
    if mask is None:
        return FluxImg2ImgPipeline(**pipeline.components)(**options).images[0]
    return FluxInpaintPipeline(**pipeline.components)(mask_image=mask, **options).images[0]


def small_picture(pipeline: FluxPipeline, model: str, small: dict[str, Any]) -> Image.Image:
    """The picture of the `small` request."""
    return diffusers_picture(
        pipeline,
        model=model,
        guidance_scale=3.0,
        **{name: small[name] for name in ("seed", "prompt", "width", "height", "num_inference_steps")},
    )
