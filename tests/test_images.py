"""Pictures in and out: each hostile file gives the right picture or one clear sentence."""

import io
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import images
from images import ImageError, input_size, keep_unmasked, output_size, read_inputs, read_mask, read_picture

FetchedFile = Callable[[bytes | Image.Image], Path]


@pytest.fixture
def fetched() -> Iterator[FetchedFile]:
    """Put bytes, or a picture as PNG, where Cog puts what it fetches."""
    paths = []

    def put(content: bytes | Image.Image) -> Path:
        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.write(content if isinstance(content, bytes) else encoded(content, "PNG"))
        paths.append(Path(file.name))
        return paths[-1]

    yield put
    for path in paths:
        path.unlink()


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


@pytest.mark.parametrize("side", [9_500, 30_000, 2**31 - 1])
def test_a_pixel_bomb_is_refused_before_it_is_decoded(fetched: FetchedFile, side: int) -> None:
    with pytest.raises(ImageError, match="too many pixels: send at most 89 megapixels"):
        read_picture(fetched(png(side, side, 1, 0)), "image")


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", Path("/etc/passwd"), Path("/usr/share/x.png")])
def test_paths_on_the_server_are_not_read(path: str | Path) -> None:
    with pytest.raises(ImageError, match=r"http\(s\) address or a data: URI"):
        read_picture(path, "image")


def test_a_way_out_of_the_temporary_folder_is_not_followed(tmp_path: Path, fetched: FetchedFile) -> None:
    outside = tmp_path / "outside.png"
    RED_BLUE.save(outside)
    link = fetched(b"")
    link.unlink()
    link.symlink_to(outside)
    for path in (link, Path(tempfile.gettempdir()) / ".." / "etc" / "passwd"):
        with pytest.raises(ImageError, match="paths on the server"):
            read_picture(path, "image")


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
