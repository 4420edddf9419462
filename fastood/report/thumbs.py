"""Small previews of images as data URIs, from bytes that may be anything."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable

import numpy as np

__all__ = ["OpenImage", "data_uri", "preview"]

OpenImage = Callable[[str, str], "bytes | None"]
"""(set name, path) to the file's bytes, or None when it is gone."""

SIZE = 128
"""Longest side of a preview, pixels."""


def preview(open_image: OpenImage | None, set_name: str, path: str) -> str | None:
    """A data URI of one image, or None if it cannot be read for whatever reason.

    A report is about scores that are already computed; a picture that has moved, was deleted or
    does not decode leaves an empty frame and never costs the report.
    """
    if open_image is None:
        return None
    try:
        content = open_image(set_name, path)
        return None if content is None else data_uri(content)
    except Exception:
        return None


def data_uri(content: bytes) -> str:
    """A JPEG of at most 128 × 128 pixels as ``data:image/jpeg;base64,...``.

    Raises:
        OSError, ValueError: the bytes are not an image that Pillow can open.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a preview is no place to report odd metadata
        with Image.open(io.BytesIO(content)) as opened:
            opened.draft("RGB", (2 * SIZE, 2 * SIZE))  # decodes large JPEGs at a fraction
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                values = np.asarray(image, dtype=np.float64)
                low, high = float(np.nanmin(values)), float(np.nanmax(values))
                grey = np.nan_to_num((values - low) * (255 / max(high - low, 1e-12)))
                image = Image.fromarray(grey.astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.new("RGB", rgba.size, "white")
                image.paste(rgba, mask=rgba.getchannel("A"))
            image = image.convert("RGB")
            image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)  # never enlarges
            out = io.BytesIO()
            image.save(out, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
