"""Every kind of image file becomes the right 8-bit RGB picture, or a reason."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from fastood.data import decode
from fastood.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats(kind: str) -> None:
    np.testing.assert_array_equal(pixels(saved(PICTURE, kind)), NOISE)


MODES = {"JPEG": ["RGB", "L", "CMYK"], "PNG": ["1", "L", "LA", "P"], "GIF": ["P"], "TIFF": ["CMYK"]}


@pytest.mark.parametrize(("kind", "mode"), [(k, m) for k, modes in MODES.items() for m in modes])
def test_other_modes_as_pillow_converts_them(kind: str, mode: str) -> None:
    data = saved(PICTURE.convert(mode), kind)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(pixels(data), wanted)


def test_transparency_is_dropped_not_composited() -> None:
    alpha = np.dstack([NOISE, np.zeros((20, 30, 1), np.uint8)])  # fully transparent
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(alpha), "PNG")), NOISE)


def test_palette_with_transparent_entries_gives_no_warning() -> None:
    palette = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE)
    data = saved(palette, "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = pixels(data)
    np.testing.assert_array_equal(got, np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    grey = NOISE[:, :, 0]
    got = pixels(saved_deep(grey.astype(np.uint16) * 257, kind))
    np.testing.assert_array_equal(got, np.dstack([grey] * 3))
    dark = np.full((4, 4), 700, np.uint16)  # clipped it would be white
    assert pixels(saved_deep(dark, kind)).max() == 3


def saved_deep(grey: np.ndarray, kind: str) -> bytes:
    if kind == "PPM":  # Pillow 10 reads 16-bit PGM but does not write it
        height, width = grey.shape
        return f"P5 {width} {height} 65535\n".encode() + grey.astype(">u2").tobytes()
    return saved(Image.fromarray(grey), kind)


def test_thirty_two_bits_have_no_white() -> None:
    for values in (NOISE[:, :, 0].astype(np.int32), NOISE[:, :, 0].astype(np.float32)):
        with pytest.raises(DataError, match="32-bit"):
            decode(saved(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [PICTURE.convert("P").convert("RGB"), Image.new("RGB", PICTURE.size, "red")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    difference = np.abs(pixels(data).astype(int) - np.asarray(frames[0]).astype(int))
    assert difference.mean() < 2


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(saved(PICTURE, "JPEG", exif=exif)).size == PICTURE.size


def png_claiming(width: int, height: int) -> bytes:
    """A tiny PNG whose header promises a huge picture."""

    def part(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"hello there", "it holds text"),
        (b"  <html><body>404", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (bytes(range(128, 256)), "no image format"),
        (saved(PICTURE, "JPEG")[:-400], "truncated"),
        (saved(PICTURE, "PNG")[:-900], "cannot be decoded"),
        (saved(PICTURE, "JPEG")[:3], "not an image"),
        (png_claiming(40_000, 40_000), "exceeds limit"),
    ],
    ids=["empty", "text", "html", "lfs", "noise", "cut jpeg", "cut png", "stub", "bomb"],
)
def test_reasons(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_the_function_is_not_hidden_by_its_module():
    code = "import fastood.data.decode; from fastood.data import decode; print(callable(decode))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
