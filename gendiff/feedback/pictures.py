"""Pixels of image files; the first read imports Pillow."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gendiff.data import files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
NAMES = "PNG, JPEG, WebP or BMP"


def pillow() -> Any:
    """Return Pillow's package, with its modules Image and ImageOps.

    Raises:
      ModuleNotFoundError: Pillow is not installed.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ModuleNotFoundError:
        raise ModuleNotFoundError("images need Pillow: pip install 'gendiff[feedback]'") from None
    return PIL


def read(file: Path) -> np.ndarray:
    """Read pixels (H, W), (H, W, 3) or (H, W, 4) in uint8, or (H, W) in uint16; apply the file's orientation.

    Raises:
      ModuleNotFoundError: Pillow is not installed.
      Exception: the picture is damaged; Pillow raises many types.
    """
    library = pillow()
    with os.fdopen(files.descriptor(file, links=True), "rb") as opened:
        return _pixels(library, opened)


def _pixels(library: Any, opened: BinaryIO) -> np.ndarray:
    try:
        picture = library.Image.open(opened, formats=FORMATS)
    except library.UnidentifiedImageError:
        raise ValueError(f"its content must be {NAMES}, got another") from None
    with picture:
        if picture.format in ("PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1:
            raise ValueError(f"it must be a still picture, got {picture.n_frames} frames")
        upright = library.ImageOps.exif_transpose(picture)
        if picture.format == "PNG" and upright.mode[0] == "I":  # greys of 16 bits, which `convert` would clip at 255
            return np.asarray(upright).astype("<u2")
        if upright.mode in ("I", "F") or ";" in upright.mode:
            raise ValueError(f"its pixels must have 8 or 16 bits, got Pillow's mode {upright.mode}")
        if upright.mode not in ("L", "RGB", "RGBA"):
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        return np.asarray(upright)


def rounded(file: Path) -> bool:
    """Return True if `read` drops bits of a file, because Pillow reads PNG colours of 16 bits as 8 bits.

    Byte 24 of the header has the bits, and byte 25 the colour type, 0 for greys.
    """
    with file.open("rb") as opened:
        head = opened.read(26)
    return head.startswith(b"\x89PNG") and head[24:25] == b"\x10" and head[25:] != b"\x00"
