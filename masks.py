"""Where a mask's drawing is: in its colours, or in its transparency, as many programs save it."""

import logging

import numpy as np
from PIL import Image

log = logging.getLogger("flux-lora")

SAMPLE = (1024, 1024)  # pixels are enough to tell one kind of mask from another
HALF = 128  # of 256: from here on a level counts as white, or as painted
ONE_COLOUR = 32  # levels by which the painted pixels may differ and still be one colour
GREY = 32  # levels by which the channels of a pixel may differ and still be grey
COLOURFUL = 0.05  # share of pixels that are not grey, from which the mask is a picture


def mask_levels(mask: Image.Image) -> Image.Image:
    """The mask as 8-bit grey ("L"), not yet cut: 128 and up is to be repainted.

    Without transparent pixels its colours say so. With them:

    - what is painted in one colour or in dark ones is a drawing on transparency: it is repainted, whatever its colour;
    - a picture in colour is one from which a hole was erased: the hole is repainted;
    - white and black together are the mask itself: white is repainted, transparent is kept.
    """
    if not mask.has_transparency_data:
        return mask.convert("L")
    pixels = mask.convert("RGBA")
    alpha = pixels.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return pixels.convert("L")
    sample = pixels.copy()
    sample.thumbnail(SAMPLE, Image.Resampling.NEAREST)
    opaque = np.asarray(sample.getchannel("A")) >= HALF
    painted = np.asarray(sample)[opaque][:, :3].astype(np.int16)  # [pixels, 3]
    dark = (np.asarray(sample.convert("L"))[opaque] < HALF).all()
    if dark or np.ptp(painted, axis=0).max() <= ONE_COLOUR:
        log.info("mask: it is drawn on transparency: what is painted is repainted, what is transparent is kept")
        return alpha
    if (np.ptp(painted, axis=1) > GREY).mean() > COLOURFUL:
        log.info("mask: it is a picture with transparent parts: they are repainted, all else is kept")
        return alpha.point([255 - level for level in range(256)])
    log.info("mask: white is repainted, black and what is transparent are kept")
    black = Image.new("RGBA", pixels.size, "black")
    return Image.alpha_composite(black, pixels).convert("L")


def report_mask(mask: Image.Image) -> None:
    """Say in the log what hardly anyone wants: a mask ("L", 0 and 255 only) that is the same everywhere."""
    least, most = mask.getextrema()
    if least == 255:
        log.warning("mask: all of it is white, so the whole picture is repainted")
    elif most == 0:
        log.warning("mask: all of it is black, so nothing is repainted and the picture comes back as it is")
