"""Pictures in and out: each hostile file gives the right picture or one clear sentence."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

import images
from images import ImageError, input_size, keep_unmasked, output_size, read_inputs, read_mask, read_picture

FetchedFile = Callable[[bytes | Image.Image], bytes]


@pytest.fixture
def fetched() -> FetchedFile:
    """The bytes of a file, or of a picture as PNG."""
    return lambda content: content if isinstance(content, bytes) else encoded(content, "PNG")


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes = b"") -> bytes:
    """A PNG written by hand, for what Pillow would not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RED_BLUE = Image.new("RGB", (40, 20), "red")
RED_BLUE.paste("blue", (20, 0, 40, 20))
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'

UNREADABLE = {
    "nothing": b"",
    "text": b"this is no picture",
    "svg": SVG,
    "html": b"<!doctype html><title>404</title>",
    "eps, which would run a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "truncated png": encoded(RED_BLUE.resize((400, 400)), "PNG")[:-60],
    "truncated jpeg": encoded(RED_BLUE.resize((400, 400)), "JPEG")[:-400],
    "truncated webp": encoded(RED_BLUE.resize((400, 400)), "WEBP", lossless=True)[:-20],
    "png header alone": png(40, 20, 8, 2)[:33],
    "png without pixels": png(40, 20, 8, 2),
    "png of no width": png(0, 20, 8, 2),
    "png with a bad checksum": encoded(RED_BLUE, "PNG").replace(b"IDAT", b"IDAT\x00", 1),
    "random bytes behind a jpeg's first ones": b"\xff\xd8\xff\xe0" + bytes(range(256)) * 8,
    "gif of nothing": b"GIF89a" + bytes(20),
    "tiff of nothing": b"II*\x00" + bytes(20),
    "a zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_is_no_whole_picture_is_one_sentence(fetched: FetchedFile, content: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        read_picture(fetched(content), "image")
    assert str(caught.value).startswith("image is not a picture that can be read: send a whole PNG, ")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty one"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "a HEIC photo"),
        (b"\0\0\0\x18ftypisom" + bytes(50), "a video"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n' + SVG, "an SVG drawing"),
        (b"<!doctype html><title>404</title>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a server's answer in text"),
        (b'{"error": "not found"}', "a server's answer in text"),
        (b"%PDF-1.7", "a PDF"),
    ],
)
def test_what_people_send_for_a_picture_is_named(fetched: FetchedFile, content: bytes, kind: str) -> None:
    with pytest.raises(ImageError, match=f" file, not {kind}\\.$"):
        read_picture(fetched(content), "image")


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_mask_that_is_no_whole_picture_is_one_sentence(fetched: FetchedFile, name: str) -> None:
    with pytest.raises(ImageError, match=r"^mask is not a picture that can be read"):
        read_mask(fetched(UNREADABLE[name]), (16, 16))


@pytest.mark.parametrize("side", [9_500, 30_000, 2**31 - 1])
def test_a_pixel_bomb_is_refused_before_it_is_decoded(fetched: FetchedFile, side: int) -> None:
    with pytest.raises(ImageError, match="too many pixels: send at most 89 megapixels"):
        read_picture(fetched(png(side, side, 1, 0)), "image")


@pytest.mark.parametrize(("width", "height"), [(1, 70_000), (70_000, 1), (1, 88_000_000)])
def test_what_is_longer_than_any_picture_is_refused(fetched: FetchedFile, width: int, height: int) -> None:
    with pytest.raises(ImageError, match=r"^image is \d+ pixels long: send at most 65535\.$"):
        read_picture(fetched(png(width, height, 1, 0)), "image")


def test_a_huge_jpeg_is_decoded_no_larger_than_needed_and_an_ordinary_one_whole(fetched: FetchedFile) -> None:
    huge = Image.new("RGB", (8000, 6000), "navy")
    huge.paste("gold", (0, 0, 4000, 3000))
    read = read_picture(fetched(encoded(huge, "JPEG")), "image")
    assert read.size == (4000, 3000)
    assert input_size(read) == input_size(huge)
    assert read.getpixel((1990, 1490))[0] > 200
    assert read.getpixel((2010, 1510))[0] < 50
    assert read_picture(fetched(encoded(huge.resize((5000, 4000)), "JPEG")), "image").size == (5000, 4000)


def gif_of_two() -> bytes:
    return encoded(RED_BLUE.quantize(), "GIF", save_all=True, append_images=[Image.new("P", (40, 20))])


READABLE = {
    "png": encoded(RED_BLUE, "PNG"),
    "bmp": encoded(RED_BLUE, "BMP"),
    "lossless webp": encoded(RED_BLUE, "WEBP", lossless=True),
    "palette": encoded(RED_BLUE.quantize(4), "PNG"),
    "opaque rgba": encoded(RED_BLUE.convert("RGBA"), "PNG"),
    "cmyk tiff": encoded(RED_BLUE.convert("CMYK"), "TIFF"),
    "animated gif": gif_of_two(),
    "animated webp": encoded(RED_BLUE, "WEBP", lossless=True, save_all=True, append_images=[RED_BLUE.rotate(180)]),
    "two-page tiff": encoded(RED_BLUE, "TIFF", save_all=True, append_images=[RED_BLUE.rotate(180)]),
    "apng": encoded(RED_BLUE, "PNG", save_all=True, append_images=[RED_BLUE.rotate(180)]),
    "16-bit rgb": png(40, 20, 16, 2, (b"\0" + b"\xff\xff\0\0\0\0" * 20 + b"\0\0\0\0\xff\xff" * 20) * 20),
}


@pytest.mark.parametrize("content", READABLE.values(), ids=READABLE.keys())
def test_every_kind_of_file_gives_its_first_frame_in_rgb(fetched: FetchedFile, content: bytes) -> None:
    picture = read_picture(fetched(content), "image")
    assert (picture.mode, picture.size) == ("RGB", RED_BLUE.size)
    assert np.array_equal(np.asarray(picture), np.asarray(RED_BLUE))


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "AVIF"])
def test_lossy_kinds_are_read(fetched: FetchedFile, kind: str) -> None:
    picture = read_picture(fetched(encoded(RED_BLUE, kind, quality=95)), "image")
    assert np.abs(np.asarray(picture, float) - np.asarray(RED_BLUE, float)).mean() < 8


def test_a_cmyk_jpeg_keeps_its_colours(fetched: FetchedFile) -> None:
    picture = read_picture(fetched(encoded(RED_BLUE.convert("CMYK"), "JPEG", quality=95)), "image")
    assert np.abs(np.asarray(picture, float) - np.asarray(RED_BLUE, float)).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(fetched: FetchedFile, kind: str) -> None:
    grey = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    picture = read_picture(fetched(encoded(Image.fromarray(grey), kind)), "image")
    expected = (grey / 257).round().astype(np.uint8)
    assert np.array_equal(np.asarray(picture), np.repeat(expected[..., None], 3, axis=2))


def test_floating_point_pixels_are_refused(fetched: FetchedFile) -> None:
    with pytest.raises(ImageError, match="floating-point"):
        read_picture(fetched(encoded(Image.new("F", (9, 9)), "TIFF")), "image")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_is_laid_on_white(fetched: FetchedFile, mode: str) -> None:
    options: dict[str, object] = {}
    if mode in ("P", "L"):
        picture = Image.new(mode, (10, 10), 0)
        options["transparency"] = 0
    else:
        picture = Image.new("RGBA", (10, 10), (0, 0, 0, 0)).convert(mode)
    read = read_picture(fetched(encoded(picture, "PNG", **options)), "image")
    assert read.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_rotation_is_applied(fetched: FetchedFile, orientation: int) -> None:
    turn_back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the PIL transpose that undoes it
    stored = RED_BLUE if orientation == 1 else RED_BLUE.transpose(Image.Transpose(turn_back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read_picture(fetched(encoded(stored, "PNG", exif=exif)), "image")
    assert np.array_equal(np.asarray(picture), np.asarray(RED_BLUE))


def test_a_damaged_exif_block_does_not_cost_the_picture(fetched: FetchedFile) -> None:
    broken = encoded(RED_BLUE, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x12\x01")
    assert read_picture(fetched(broken), "image").size == RED_BLUE.size


# Colour profiles, written by hand after the ICC's specification (ICC.1:2010): big-endian, one tag after another


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    header_and_table, data = 128 + 4 + 12 * len(tags), b""
    table = struct.pack(">I", len(tags))
    for name, content in tags.items():
        table += struct.pack(">4sII", name, header_and_table + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    size = header_and_table + len(data)
    start = struct.pack(">I4sI4s4s4s12s4s", size, b"lcms", 0x02100000, kind, space, connection, bytes(12), b"acsp")
    white = b"".join(map(fixed, D50))
    return (start + bytes(28) + white).ljust(128, b"\0") + table + data


def fixed(number: float) -> bytes:
    return struct.pack(">i", round(number * 65536))


def xyz(*numbers: float) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(fixed, numbers))


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def rgb_profile(columns: np.ndarray, exponent: float) -> bytes:
    """A display whose red, green and blue are the columns, in XYZ."""
    colours = {name: xyz(*column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns.T, strict=True)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(exponent))
    return profile(b"RGB ", b"XYZ ", {b"wtpt": xyz(*D50), **colours, **curves})


def cmyk_profile(lightness: float) -> bytes:
    """Paper is white, cyan alone a grey of this lightness (CIE L*), and all other full inks are black."""
    ramp = bytes(range(256))
    levels = [255, *[0] * 7, round(lightness * 2.55), *[0] * 7]
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(map(fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table += ramp * 4 + b"".join(bytes([level, 128, 128]) for level in levels) + ramp * 3
    return profile(b"CMYK", b"Lab ", {b"wtpt": xyz(*D50), b"A2B0": table})


D50 = (0.9642, 1.0, 0.8249)
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7142]])
DISPLAY_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])


def from_linear(light: np.ndarray) -> np.ndarray:
    """Levels of sRGB (IEC 61966-2-1)."""
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("transparent", [False, True])
def test_a_wide_gamut_is_converted_to_srgb(fetched: FetchedFile, kind: str, transparent: bool) -> None:
    levels = np.random.default_rng(0).integers(40, 200, (4, 4, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    picture = Image.fromarray(levels)
    if transparent and kind != "JPEG":
        picture.putalpha(255)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    icc = rgb_profile(DISPLAY_P3, 2.2)
    read = read_picture(fetched(encoded(picture, kind, icc_profile=icc, **options)), "image")
    expected = from_linear((levels / 255) ** 2.2 @ DISPLAY_P3.T @ np.linalg.inv(SRGB).T)
    assert np.abs(np.asarray(read) - expected).max() <= (4 if kind == "JPEG" else 1.5)
    assert np.abs(levels - expected).max() > 8


def test_grey_with_a_gamma_and_ink_with_a_profile_are_converted_to_srgb(fetched: FetchedFile) -> None:
    mac = profile(b"GRAY", b"XYZ ", {b"wtpt": xyz(*D50), b"kTRC": gamma(1.8)})
    grey = Image.linear_gradient("L")
    read = np.asarray(read_picture(fetched(encoded(grey, "PNG", icc_profile=mac)), "image"))
    assert np.abs(read - from_linear((np.asarray(grey)[..., None] / 255) ** 1.8)).max() <= 1.5
    wide = rgb_profile(DISPLAY_P3, 1.8)  # grey is the same in all of them
    assert (
        np.abs(read - np.asarray(read_picture(fetched(encoded(grey, "PNG", icc_profile=wide)), "image"), float)).max()
        <= 2
    )
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(read_picture(fetched(encoded(sixteen, "PNG", icc_profile=mac)), "image"), read)
    cyan = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    for kind in ("TIFF", "JPEG"):
        inked = read_picture(fetched(encoded(cyan, kind, icc_profile=cmyk_profile(50))), "image")
        assert np.abs(np.asarray(inked, float) - 119).max() <= 3  # L* 50


@pytest.mark.parametrize(
    "icc",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"no profile at all",
        cmyk_profile(50),
        rgb_profile(DISPLAY_P3, 2.2)[:200],
    ],
    ids=["sRGB", "junk", "of another colour space", "cut"],
)
def test_pixels_stay_as_they_are_under_srgb_and_under_a_profile_of_no_use(
    fetched: FetchedFile, photo: Image.Image, icc: bytes
) -> None:
    read = read_picture(fetched(encoded(photo, "PNG", icc_profile=icc)), "image")
    assert np.array_equal(np.asarray(read), np.asarray(photo))


def test_nothing_but_pixels_goes_into_the_output(fetched: FetchedFile, tmp_path: Path, photo: Image.Image) -> None:
    icc, exif = rgb_profile(DISPLAY_P3, 2.2), Image.Exif()
    exif[0x010E] = "where I live"
    for kind in ("PNG", "JPEG"):
        file = fetched(encoded(photo, kind, icc_profile=icc, exif=exif, comment="mine"))
        read = read_inputs(file, fetched(RED_BLUE.convert("L")), "1:1", "1", None, None).picture
        assert read is not None
        assert keep_unmasked(read, read, Image.new("L", read.size)).info == {}
        for path in images.save_pictures([read], tmp_path, "png", 80):
            with Image.open(path) as saved:
                assert saved.info == {}


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_input_sizes_keep_the_shape_within_1440(width: int, height: int) -> None:
    class Shape:
        size = (width, height)

    Shape.width, Shape.height = width, height  # type: ignore[attr-defined]
    drawn = input_size(Shape)  # type: ignore[arg-type]
    scale = min(1, 1440 / max(width, height))
    for side, original in zip(drawn, (width, height), strict=True):
        assert side % 16 == 0
        assert 16 <= side <= 1440
        assert side == 16 or abs(side - original * scale) <= 8 + 1e-9


@given(st.integers(256, 1440), st.integers(256, 1440))
def test_custom_sizes_are_rounded_to_the_nearest_multiple_of_16(width: int, height: int) -> None:
    for drawn, asked in zip(output_size("custom", "1", width, height), (width, height), strict=True):
        assert drawn % 16 == 0
        assert abs(drawn - asked) <= 8
        assert 256 <= drawn <= 1440


def test_named_sizes() -> None:
    assert output_size("21:9", "1", None, None) == (1536, 640)
    assert output_size("9:16", "0.25", None, None) == (384, 672)
    for name, (width, height) in images.SIZES.items():
        ratio_width, ratio_height = map(int, name.split(":"))
        assert width % 32 == height % 32 == 0  # so that half of it is a multiple of 16
        assert width * height == pytest.approx(2**20, rel=0.08)
        assert width / height == pytest.approx(ratio_width / ratio_height, rel=0.06)


@pytest.mark.parametrize(("width", "height"), [(None, None), (512, None), (None, 512)])
def test_custom_needs_both_sides(width: int | None, height: int | None) -> None:
    with pytest.raises(ValueError, match=r"custom.* needs both width and height"):
        output_size("custom", "1", width, height)


def test_a_mask_of_another_size_and_mode_is_cut_at_128(fetched: FetchedFile) -> None:
    for mode in ("L", "RGB", "RGBA", "P", "1", "I;16"):
        ramp = Image.linear_gradient("L").convert("L")
        mask = ramp.convert(mode) if mode != "I;16" else Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
        read = read_mask(fetched(mask), (64, 32))
        assert (read.mode, read.size) == ("L", (64, 32))
        assert sorted(colour for _, colour in read.getcolors() or []) == [0, 255]
        if mode != "1":  # dithered
            assert np.asarray(read)[:15].max() == 0
            assert np.asarray(read)[17:].min() == 255


def test_127_is_kept_and_128_is_repainted(fetched: FetchedFile) -> None:
    assert read_mask(fetched(Image.new("L", (16, 16), 127)), (16, 16)).getextrema() == (0, 0)
    assert read_mask(fetched(Image.new("L", (16, 16), 128)), (16, 16)).getextrema() == (255, 255)


DRAWN = Image.new("L", (64, 64), 0)  # what each of these masks means: the upper half is repainted
DRAWN.paste(255, (0, 0, 64, 32))


def on_transparency(colour: str, alpha: Image.Image = DRAWN) -> Image.Image:
    mask = Image.new("RGBA", alpha.size, colour)
    mask.putalpha(alpha)
    return mask


def black_and_white_on_transparency() -> Image.Image:
    alpha = DRAWN.point([128] * 256)
    alpha.paste(255, (0, 0, 64, 48))
    mask = Image.merge("RGBA", [*[DRAWN] * 3, alpha])
    mask.putpixel((0, 63), (0, 0, 0, 0))
    return mask


def photo_with_a_hole() -> Image.Image:
    gradient = Image.linear_gradient("L").resize((64, 64))
    return Image.merge("RGBA", [gradient, gradient.rotate(90), gradient.rotate(180), ImageOps.invert(DRAWN)])


DARK_COLOURS = Image.composite(on_transparency("navy"), on_transparency("maroon"), DRAWN.rotate(90))
PAINTED, HOLE = "what is painted is repainted, what is transparent is kept", "transparent parts: they are repainted"
MASKS = {
    "white strokes": (on_transparency("white"), PAINTED),
    "black strokes": (on_transparency("black"), PAINTED),
    "red strokes": (on_transparency("red"), PAINTED),
    "grey and alpha": (on_transparency("white").convert("LA"), PAINTED),
    "dark strokes of several colours": (DARK_COLOURS, PAINTED),
    "a palette with transparency": (on_transparency("red").quantize(8), PAINTED),
    "white that was cut out": (DRAWN.copy(), PAINTED),
    "black and white": (black_and_white_on_transparency(), "white is repainted, black and what is transparent"),
    "a photo with a hole": (photo_with_a_hole(), HOLE),
    "opaque": (DRAWN.convert("RGBA"), None),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_may_be_drawn_in_its_transparency(
    fetched: FetchedFile, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    mask, line = MASKS[name]
    options = {"transparency": 0} if name == "white that was cut out" else {}
    with caplog.at_level("INFO"):
        read = read_mask(fetched(encoded(mask, "PNG", **options)), (64, 64))
    assert np.array_equal(np.asarray(read), np.asarray(DRAWN))
    assert caplog.text.count("mask: ") == (line is not None)
    assert line is None or line in caplog.text


def test_a_mask_that_does_not_fit_its_picture_is_said(fetched: FetchedFile, caplog: pytest.LogCaptureFixture) -> None:
    upright, turned, mirrored = Image.Exif(), Image.Exif(), Image.Exif()
    turned[0x0112], mirrored[0x0112] = 6, 2

    def lines(mask: Image.Image, image_exif: Image.Exif = upright, mask_exif: Image.Exif = upright) -> str:
        caplog.clear()
        image = fetched(encoded(Image.new("RGB", (40, 20), "red"), "PNG", exif=image_exif))
        with caplog.at_level("INFO"):
            read_inputs(image, fetched(encoded(mask, "PNG", exif=mask_exif)), "1:1", "1", None, None)
        return caplog.text

    half = Image.new("L", (80, 40), 0)
    half.paste(255, (0, 0, 40, 40))
    assert lines(half) == ""
    assert "mask: all of it is white, so the whole picture is repainted" in lines(Image.new("L", (40, 20), 255))
    for empty in (Image.new("L", (40, 20), 0), Image.new("RGBA", (40, 20), (255, 255, 255, 0))):
        assert "mask: all of it is black, so nothing is repainted" in lines(empty)
    assert "mask: it is 40 x 40 and stretched to the shape of the image, 40 x 20" in lines(half.resize((40, 40)))
    stretched = lines(half, turned)
    assert "image is turned upright by its EXIF data, mask is not turned that way" in stretched
    assert "mask: it is 80 x 40 and stretched to the shape of the image, 20 x 40" in stretched
    assert "mask is turned upright by its EXIF data" in lines(half, mask_exif=mirrored)
    assert lines(half, turned, turned) == ""


def test_the_mode_is_what_the_pictures_make_it(fetched: FetchedFile) -> None:
    assert read_inputs(None, None, "1:1", "1", None, None).mode == "txt2img"
    assert read_inputs(fetched(RED_BLUE), None, "1:1", "1", None, None).mode == "img2img"
    assert read_inputs(fetched(RED_BLUE), fetched(RED_BLUE), "1:1", "1", None, None).mode == "inpaint"


def test_a_mask_alone_is_refused(fetched: FetchedFile) -> None:
    with pytest.raises(ValueError, match="mask needs image"):
        read_inputs(None, fetched(RED_BLUE), "1:1", "1", None, None)


def test_kept_pixels_are_the_original_bit_for_bit() -> None:
    random = np.random.default_rng(0)
    painted, original = (Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(2))
    mask = Image.fromarray(random.choice(np.array([0, 255], np.uint8), (64, 64)))
    result, white = np.asarray(keep_unmasked(painted, original, mask)), np.asarray(mask) == 255
    assert np.array_equal(result[white], np.asarray(painted)[white])
    assert np.array_equal(result[~white], np.asarray(original)[~white])


def test_quality_is_the_one_asked_for(tmp_path: Path, photo: Image.Image) -> None:
    for kind in ("webp", "jpg"):
        sizes = [
            images.save_pictures([photo], tmp_path, kind, quality)[0].stat().st_size for quality in (0, 40, 80, 100)
        ]
        assert sizes == sorted(set(sizes))
    lossless = images.save_pictures([photo], tmp_path, "png", 0)[0]
    assert np.array_equal(np.asarray(Image.open(lossless)), np.asarray(photo))
