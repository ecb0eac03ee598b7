"""Pictures in and out: which size, reading files that strangers send, writing webp, jpg and png."""

import logging
import math
import tempfile
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

log = logging.getLogger("flux-lora")

Size = tuple[int, int]  # width, height in pixels

SIZES: dict[str, Size] = {  # at 1 megapixel; at 0.25 each side is half of that
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "21:9": (1536, 640),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "4:5": (896, 1088),
    "5:4": (1088, 896),
    "3:4": (896, 1152),
    "4:3": (1152, 896),
    "9:16": (768, 1344),
    "9:21": (640, 1536),
}
SIDE_MULTIPLE = 16  # 8 pixels a latent, 2 x 2 latents a token
LONGEST_INPUT_SIDE = 1440
MOST_INPUT_PIXELS = 89_000_000  # decoded, 270 MB; just under where Pillow itself begins to warn
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # EPS, PSD and the like run code of their own
FORMATS_IN_WORDS = "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
RESAMPLING = Image.Resampling.LANCZOS  # what diffusers' image processor uses
KEPT_OUTPUT_FOLDERS = 2  # the last request's and this one's
SAVED_AS = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}


class ImageError(ValueError):
    """An input picture that cannot be used; the message is one sentence for the person who sent it."""


@dataclass(frozen=True)
class Inputs:
    """The pictures of a request, if any, and the size to draw at. Picture and mask have that size."""

    size: Size
    picture: Image.Image | None = None  # RGB
    mask: Image.Image | None = None  # "L", 255 is repainted and 0 is kept

    @property
    def mode(self) -> str:
        if self.picture is None:
            return "txt2img"
        return "img2img" if self.mask is None else "inpaint"


def read_inputs(
    image: Path | str | None,
    mask: Path | str | None,
    aspect_ratio: str,
    megapixels: str,
    width: int | None,
    height: int | None,
) -> Inputs:
    """Read the pictures of a request and decide its size: the input picture's shape, else what was asked for.

    Raises `ImageError` for pictures that cannot be used, `ValueError` for sizes that make no sense.
    """
    if image is None and mask is not None:
        raise ValueError("mask needs image, the picture that it masks.")
    if (width or height) and (image is not None or aspect_ratio != "custom"):
        log.warning('width and height are ignored: they are for aspect_ratio "custom" without an image')
    if image is None:
        return Inputs(output_size(aspect_ratio, megapixels, width, height))
    picture = read_picture(image, "image")
    size = input_size(picture)
    resized = picture.resize(size, RESAMPLING)
    return Inputs(size, resized, read_mask(mask, size) if mask is not None else None)


def output_size(aspect_ratio: str, megapixels: str, width: int | None, height: int | None) -> Size:
    """The size to draw at where no input picture decides it.

    Raises `ValueError` for `custom` without both `width` and `height`.
    """
    if aspect_ratio == "custom":
        if width is None or height is None:
            raise ValueError('aspect_ratio "custom" needs both width and height.')
        return _to_multiple(width), _to_multiple(height)
    full = SIZES[aspect_ratio]
    return full if megapixels == "1" else (full[0] // 2, full[1] // 2)


def input_size(picture: Image.Image) -> Size:
    """The size to draw at for an input picture: its own shape, within 1440 x 1440, sides multiples of 16."""
    shrink = min(Fraction(1), Fraction(LONGEST_INPUT_SIDE, max(picture.size)))
    return _to_multiple(picture.width * shrink), _to_multiple(picture.height * shrink)


def _to_multiple(side: int | Fraction) -> int:
    """The nearest multiple of 16, halves up, at least 16."""
    return max(1, math.floor(Fraction(side) / SIDE_MULTIPLE + Fraction(1, 2))) * SIDE_MULTIPLE


def read_picture(file: Path | str, name: str) -> Image.Image:
    """Read the file that Cog fetched for the input `name` as an upright, opaque 8-bit RGB picture.

    Raises `ImageError` for anything but a whole picture of a sane size that Cog itself fetched.
    """
    path = _fetched_by_cog(file, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked just below
            with Image.open(path, formats=FORMATS) as picture:
                _check_pixels(picture, name)
                picture.load()  # the first frame, where there are several
                return _opaque_rgb(_upright(picture), name)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except Exception as error:  # noqa: BLE001 - decoders meet hostile bytes with every kind of exception
        log.info("reading %s: %s: %s", name, type(error).__name__, error)
        raise ImageError(f"{name} is not a picture that can be read: send a whole {FORMATS_IN_WORDS} file.") from None


def read_mask(file: Path | str, size: Size) -> Image.Image:
    """Read a mask as 8-bit grey ("L") of the given size: 255 where it is repainted (128 and up), else 0."""
    grey = read_picture(file, "mask").convert("L").resize(size, RESAMPLING)
    return grey.point([0] * 128 + [255] * 128)


def keep_unmasked(painted: Image.Image, original: Image.Image, mask: Image.Image) -> Image.Image:
    """The painted picture where `mask` is white, the original's own pixels where it is black."""
    return Image.composite(painted, original, mask)


def save_pictures(pictures: Sequence[Image.Image], folder: Path, output_format: str, quality: int) -> list[Path]:
    """Write the pictures into `folder` as webp, jpg or png. `quality` is 0..100; png has none."""
    paths = [folder / f"out-{i}.{output_format}" for i in range(len(pictures))]
    options = {} if output_format == "png" else {"quality": quality}
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path, SAVED_AS[output_format], **options)
    return paths


class OutputFolders:
    """A temporary folder for each request. Cog's server reads the pictures after the request, so they stay a while."""

    def __init__(self) -> None:
        self._folders: deque[tempfile.TemporaryDirectory[str]] = deque()

    def fresh(self) -> Path:
        self._folders.append(tempfile.TemporaryDirectory(prefix="flux-lora-"))
        while len(self._folders) > KEPT_OUTPUT_FOLDERS:
            self._folders.popleft().cleanup()
        return Path(self._folders[-1].name)

    def cleanup(self) -> None:
        while self._folders:
            self._folders.popleft().cleanup()


def _fetched_by_cog(file: Path | str, name: str) -> Path:
    """Cog downloads addresses and data URIs into its temporary folder, but hands any other text through as it is,
    and a path on the server is not the sender's to read."""
    if isinstance(file, Path) and file.resolve().parent == Path(tempfile.gettempdir()).resolve():
        return file
    raise ImageError(f"{name} must be an http(s) address or a data: URI; paths on the server are not read.")


def _check_pixels(picture: Image.Image, name: str) -> None:
    if picture.width * picture.height > MOST_INPUT_PIXELS:
        raise _too_large(name)
    if min(picture.size) < 1:
        raise ImageError(f"{name} has no pixels.")


def _too_large(name: str) -> ImageError:
    return ImageError(f"{name} has too many pixels: send at most {MOST_INPUT_PIXELS // 10**6} megapixels.")


def _upright(picture: Image.Image) -> Image.Image:
    """Apply the EXIF rotation; a damaged EXIF block is no reason to refuse the pixels."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # noqa: BLE001 - the block is hostile bytes too
        log.info("EXIF ignored: %s: %s", type(error).__name__, error)
        return picture


def _opaque_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode == "F":
        raise ImageError(f"{name} has floating-point pixels: send 8 or 16 bits a channel.")
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 rather than scale
        grey = np.asarray(picture.convert("I")).clip(0, 65535)
        return Image.fromarray((grey / 257).round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")
