"""Colour profiles (ICC): the pixels of an input picture in sRGB, the colours in which the model and the outputs are."""

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

log = logging.getLogger("flux-lora")

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
GRID = 9  # levels of each channel at which a profile is compared with sRGB
SAME = 1  # level of 256 by which a profile may differ and still be sRGB, which is written in several ways
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colour space -> Pillow's mode
TRANSPARENT = {"LA": "L", "PA": "RGB", "La": "L", "RGBA": "RGB", "RGBa": "RGB"}  # -> the mode without transparency


def to_srgb(picture: Image.Image) -> Image.Image:
    """The picture with the colours that its profile describes, in sRGB, 8 bits a channel; transparency is kept.

    A picture without a profile, or whose profile is sRGB's, is returned as it is. A damaged profile, or one for another
    kind of pixels, is ignored with a line in the log.
    """
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    try:
        mode = SPACES[ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()]
        if mode == "RGB" and _is_srgb(profile):
            return picture
        colours, alpha = _without_transparency(picture)
        if (mode, colours.mode) == ("RGB", "L"):  # grey that kept the profile of the colours it came from
            colours = colours.convert("RGB")
        if colours.mode != mode:
            raise ValueError(f"it is for {mode} and the picture is {colours.mode}")
        converted = _transform(profile, mode).apply(colours)
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("image: its colour profile cannot be used and is ignored (%s)", error)
        return picture
    log.info("image: its colours are converted from its colour profile to sRGB")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, SRGB, mode, "RGB", ImageCms.Intent.PERCEPTUAL)


@lru_cache(32)
def _is_srgb(profile: bytes) -> bool:
    """By what it does to colours, since its name may be any."""
    levels = np.linspace(0, 255, GRID).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    converted = np.asarray(_transform(profile, "RGB").apply(Image.fromarray(grid)))
    return int(np.abs(converted.astype(int) - grid).max()) <= SAME


def _without_transparency(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours in a mode that a profile can describe, and the alpha channel, "L", if there is one."""
    if picture.has_transparency_data:
        opaque = "L" if picture.mode == "L" else TRANSPARENT.get(picture.mode, "RGB")
        with_alpha = picture.convert("LA" if opaque == "L" else "RGBA")
        return with_alpha.convert(opaque), with_alpha.getchannel("A")
    return (picture if picture.mode in SPACES.values() else picture.convert("RGB")), None
