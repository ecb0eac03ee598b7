"""Pictures in and out: which size, reading files that strangers send, writing webp, jpg and png."""

import io
import logging
import math
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from colours import to_srgb
from file_kinds import kind_of
from masks import mask_levels, report_mask
from service.errors import InputError

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
SAME_SHAPE = 0.03  # by which the ratios of two pictures' sides may differ
ORIENTATION = 0x0112  # EXIF's tag of how the picture is turned; 1 is upright
SIDE_MULTIPLE = 16  # 8 pixels a latent, 2 x 2 latents a token
LONGEST_INPUT_SIDE = 1440
MOST_INPUT_PIXELS = 89_000_000  # decoded, 270 MB; just under where Pillow itself begins to warn
MOST_INPUT_SIDE = 65_535  # JPEG's own limit; what is longer and thinner is no picture
ORDINARY_PIXELS = 25_000_000  # up to here every pixel of a JPEG counts
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # EPS, PSD and the like run code of their own
FORMATS_IN_WORDS = "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF"
RESAMPLING = Image.Resampling.LANCZOS  # what diffusers' image processor uses
KEPT_OUTPUT_FOLDERS = 2  # the last request's and this one's
SAVED_AS = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}


class ImageError(InputError):
    """An input picture that cannot be used."""


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
    image: bytes | None,
    mask: bytes | None,
    aspect_ratio: str,
    megapixels: str,
    width: int | None,
    height: int | None,
) -> Inputs:
    """Read the files that a request sent and decide its size: the input picture's shape, else what was asked for.

    Raises `ImageError` for pictures that cannot be used, `InputError` for sizes that make no sense.
    """
    if image is None and mask is not None:
        raise InputError("mask needs image, the picture that it masks.")
    if (width or height) and (image is not None or aspect_ratio != "custom"):
        log.warning('width and height are ignored: they are for aspect_ratio "custom" without an image')
    if image is None:
        return Inputs(output_size(aspect_ratio, megapixels, width, height))
    picture, turned = _read(image, "image", _srgb)
    size = input_size(picture)
    resized = picture.resize(size, RESAMPLING)
    if mask is None:
        return Inputs(size, resized)
    levels, mask_turned = _read(mask, "mask", mask_levels)
    _compare(picture, turned, levels, mask_turned)
    return Inputs(size, resized, _cut(levels, size))


def _compare(picture: Image.Image, turned: int, mask: Image.Image, mask_turned: int) -> None:
    """Say in the log in what a mask does not fit its picture; both are upright already."""
    if turned != mask_turned:
        turned_one, other = ("image", "mask") if mask_turned == 1 else ("mask", "image")
        log.warning("%s is turned upright by its EXIF data, %s is not turned that way", turned_one, other)
    ratio = (mask.width * picture.height) / (mask.height * picture.width)
    if abs(math.log(ratio)) > SAME_SHAPE:
        log.warning("mask: it is %d x %d and stretched to the shape of the image, %d x %d", *mask.size, *picture.size)


def output_size(aspect_ratio: str, megapixels: str, width: int | None, height: int | None) -> Size:
    """The size to draw at where no input picture decides it.

    Raises `InputError` for `custom` without both `width` and `height`.
    """
    if aspect_ratio == "custom":
        if width is None or height is None:
            raise InputError('aspect_ratio "custom" needs both width and height.')
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


def read_picture(file: bytes, name: str) -> Image.Image:
    """Read the file that came for the input `name` as an upright, opaque 8-bit picture in sRGB.

    Raises `ImageError` for anything but a whole picture of a sane size.
    """
    return _read(file, name, _srgb)[0]


def _read(file: bytes, name: str, convert: Callable[[Image.Image], Image.Image]) -> tuple[Image.Image, int]:
    """What `convert` makes of the upright picture in 8 bits, transparency included, and the orientation of its EXIF
    data (1: it was upright). Raises `ImageError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked just below
            with Image.open(io.BytesIO(file), formats=FORMATS) as picture:
                _check_pixels(picture, name)
                if picture.width * picture.height > ORDINARY_PIXELS:  # a JPEG is decoded at a half to an eighth then
                    picture.draft(None, (2 * LONGEST_INPUT_SIDE, 2 * LONGEST_INPUT_SIDE))
                picture.load()  # the first frame, where there are several
                _check_kind(picture, name)
                return convert(_eight_bits(_upright(picture))), _orientation(picture)
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except Exception as error:  # noqa: BLE001 - decoders meet hostile bytes with every kind of exception
        log.info("reading %s: %s: %s", name, type(error).__name__, error)
        instead = f", not {kind}" if (kind := kind_of(file)) else ""
        raise ImageError(
            f"{name} is not a picture that can be read: send a whole {FORMATS_IN_WORDS} file{instead}."
        ) from None


def read_mask(file: bytes, size: Size) -> Image.Image:
    """Read a mask as 8-bit grey ("L") of the given size: 255 where it is repainted (128 and up), else 0."""
    return _cut(_read(file, "mask", mask_levels)[0], size)


def _cut(levels: Image.Image, size: Size) -> Image.Image:
    grey = levels.resize(size, RESAMPLING)
    cut = grey.point([0] * 128 + [255] * 128)
    report_mask(cut)
    return cut


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


def _check_pixels(picture: Image.Image, name: str) -> None:
    if picture.width * picture.height > MOST_INPUT_PIXELS:
        raise _too_large(name)
    if max(picture.size) > MOST_INPUT_SIDE:
        raise ImageError(f"{name} is {max(picture.size)} pixels long: send at most {MOST_INPUT_SIDE}.")
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


def _orientation(picture: Image.Image) -> int:
    try:
        orientation = int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - hostile bytes, as above
        return 1
    return orientation if orientation in range(1, 9) else 1


def _check_kind(picture: Image.Image, name: str) -> None:
    if picture.mode == "F":
        raise ImageError(f"{name} has floating-point pixels: send 8 or 16 bits a channel.")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow would clip at 255; any other picture as it is."""
    if not picture.mode.startswith("I"):
        return picture
    grey = np.asarray(picture.convert("I")).clip(0, 65535)
    eight = Image.fromarray((grey / 257).round().astype(np.uint8))
    eight.info = {name: value for name, value in picture.info.items() if name == "icc_profile"}
    return eight


def _srgb(picture: Image.Image) -> Image.Image:
    """In sRGB, and laid on white where it is transparent.

    Nothing else that the file held (a profile, EXIF data, a comment) goes with the pixels: Pillow would write it into
    the output.
    """
    picture = to_srgb(picture)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    rgb = picture.convert("RGB")
    rgb.info = {}
    return rgb
