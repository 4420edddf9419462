"""Encoded bytes to an RGB picture, or the reason why not."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from fastood.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DECODE_VERSION", "decode"]

DECODE_VERSION = 1
"""Raised whenever ``decode`` gives other pixels for the same bytes; part of every cache key."""

_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")


def decode(data: bytes) -> Image.Image:
    """Decode an image file of any common format to 8-bit RGB.

    Follows what the loaders of the field do, so that features agree with theirs, except where
    they destroy the picture:

    - greyscale, palette, 1-bit and CMYK: Pillow's ``convert("RGB")``;
    - transparency is dropped, not composited (``convert("RGB")`` as well);
    - EXIF orientation is ignored (torchvision and OpenAI CLIP ignore it);
    - animations: the first frame;
    - 16-bit greyscale is scaled by 1/257 to 8 bits; Pillow's own conversion clips everything
      above 255 to white, which is an error rather than a convention;
    - 32-bit integer and float pixels have no defined white and are refused.

    Args:
        data: the bytes of the file.

    Returns:
        A loaded ``PIL.Image`` in mode RGB.

    Raises:
        DataError: with the reason only (the caller knows the name): empty, not an image,
            truncated, more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, unsupported mode.
        MemoryError: if there is not enough memory for the picture.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DataError("empty file (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _rgb(image)
    except UnidentifiedImageError:
        raise DataError(f"not an image ({_looks_like(data)})") from None
    except (MemoryError, DataError):
        raise
    except Exception as error:  # codecs raise almost anything on broken data
        detail = " ".join(str(error).split())[:200]
        raise DataError(f"cannot be decoded: {detail or type(error).__name__}") from error


def _rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "RGB":
        return image.copy()
    if mode in _SIXTEEN_BIT or (mode == "I" and image.format in ("PNG", "PPM")):
        return _scale_16_bit(image)
    if mode == "I" or mode == "F":
        kind = "integer" if mode == "I" else "float"
        raise DataError(
            f"32-bit {kind} pixels have no defined white; save the picture with 8 or 16 bits"
        )
    if mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours; spares Pillow's warning about the alpha
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    wide = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")


def _looks_like(data: bytes) -> str:
    head = data[:64].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html")):
        return "it holds an HTML page, as after a failed download"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself"
    if all(32 <= b < 127 or b in (9, 10, 13) for b in data[:64]):
        return "it holds text"
    return "no image format is recognised"
