"""MNIST's digits (LeCun, Cortes and Burges 1998), and sevens with a stroke drawn across their stem.

Sevens with a stroke are the malign images of arXiv 2307.02770, section 5.1.  `mix` makes a data set with any share of
them, and labels them.
"""

import gzip
import hashlib
import math
import os
import zlib
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from gendiff import check
from gendiff.data import DataError, regular
from gendiff.types import PRNGKey, Scalar

Split: TypeAlias = Literal["train", "test"]
Pixels: TypeAlias = UInt8[np.ndarray, "n 28 28"]
Ink: TypeAlias = Float[Array, "28 28"]
"""An image in [0, 1], 1 is ink."""

FOLDER = "GENDIFF_DATA"
"""Environment variable with the folder of the data sets; it, or its folder `mnist`, holds MNIST's files."""
SIDE = 28
CHUNK = 512
"""Images per call of the program that draws strokes."""
FILES: dict[str, str] = {"train": "train", "test": "t10k"}


# Reading.


def load(
    digit: int = 7, split: Split = "train", size: int = 32, place: Path | None = None
) -> Float[np.ndarray, "n s s 1"]:
    """Read the images of a digit, resized, in [-1, 1]: `scaled(read(...), size)`."""
    return scaled(read(digit, split, place), size)


def read(digit: int = 7, split: Split = "train", place: Path | None = None) -> Pixels:
    """Read the images of a digit, 0..255 with 255 ink: 6,265 sevens in `train`, 1,028 in `test`.

    The order is that of the source; it differs between MNIST's files and TFDS.

    Args:
      digit: 0..9.
      split: train or test.
      place: folder with the four IDX files, plain or as .gz, or with an `mnist.npz` (x_train, y_train, x_test, y_test).
        The labels of `mnist.npz` are 0..9, also as floats, or one-hot.  Default: the folder in the variable
        GENDIFF_DATA; TFDS if the variable is not set.

    Raises:
      DataError: the files are missing or damaged, hold other images or labels, or lack the digit; or TFDS cannot
        provide MNIST.
    """
    if digit not in range(10) or split not in FILES:
        raise DataError(f"mnist: digit and split must be 0..9 and train or test, got {digit!r} and {split!r}")
    folder = place or os.environ.get(FOLDER)
    images, labels = _from_folder(Path(folder), split) if folder else _from_tfds(split)
    images = images[..., 0] if images.shape[1:] == (SIDE, SIDE, 1) else images
    if images.shape[1:] != (SIDE, SIDE) or images.dtype != np.uint8:
        raise DataError(f"mnist: images must be (n, 28, 28) in uint8, got {images.dtype} {images.shape}")
    found = images[_digits(labels, len(images)) == digit]
    if not len(found):
        raise DataError(f"mnist: {split} must hold images of the digit {digit}, got none among {len(images)}")
    return found


def _digits(labels: np.ndarray, n: int) -> Int[np.ndarray, " n"]:
    """Return labels 0..9 of n images; they may be stored as floats, as a column or one-hot."""
    known = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if known.dtype.kind in "biuf" and known.shape == (n, 10) and np.isin(known, (0, 1)).all():
        known = np.where(known.sum(1) == 1, known.argmax(1), -1)
    if known.dtype.kind not in "iuf" or known.shape != (n,) or not np.isin(known, range(10)).all():
        others = known[~np.isin(known, range(10))] if known.shape == (n,) else np.zeros(0)
        example = f", such as {others[0]}" if others.size else ""
        raise DataError(
            f"mnist: labels of {n} images must be 0..9 or one-hot, got {labels.dtype} {labels.shape}{example}"
        )
    return known.astype(int)


def _from_folder(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    tried = []
    for place in (folder / "mnist", folder):
        archive = place / "mnist.npz"
        if archive.exists():
            return _arrays(archive, split)
        found = [_find(place / f"{FILES[split]}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if found[0] and found[1]:
            return _idx(found[0]), _idx(found[1])
        tried += [str(archive), f"{place / FILES[split]}-images-idx3-ubyte[.gz] and -labels-idx1-ubyte[.gz]"]
    raise DataError(f"mnist: {folder} must hold MNIST's files, got none of: {'; '.join(tried)}")


def _find(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.exists()), None)


def _arrays(archive: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(regular(archive), allow_pickle=False) as stored:
            return stored[f"x_{split}"], stored[f"y_{split}"]
    except Exception as error:  # damaged archives raise many types
        raise DataError(f"mnist: {archive} must hold the arrays x_{split} and y_{split}, got {error}") from None


def _idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes: two zeros, 8, the rank, the extents as big-endian 32-bit integers, the bytes."""
    try:
        content = regular(path).read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"mnist: {path} must be an intact file, got one that cannot be read ({error})") from None
    rank = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * rank].ljust(4 * rank, b"\0"), ">u4").astype(int)
    body = content[4 + 4 * rank :]
    if not rank or len(content) < 4 + 4 * rank or len(body) != math.prod(map(int, shape)):
        raise DataError(f"mnist: {path} must be an IDX file of bytes, got a damaged one of {len(content)} bytes")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _from_tfds(split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        import tensorflow_datasets as tfds  # here, because it takes a second and a folder does not need it

        source = tfds.data_source("mnist", split=split, builder_kwargs={"file_format": "array_record"})
        records = [source[i] for i in range(len(source))]
    except Exception as error:  # TFDS raises many types
        raise DataError(
            f"mnist: {FOLDER} must name the folder with MNIST's files, got no such variable, and TFDS has no MNIST "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}): set {FOLDER}, or prepare MNIST "
            'once where TensorFlow is installed: tfds.builder("mnist", file_format="array_record")'
            ".download_and_prepare()"
        ) from error
    return np.stack([row["image"][..., 0] for row in records]), np.array([row["label"] for row in records])


# Resizing.


def scaled(images: Pixels, size: int = 32) -> Float[np.ndarray, "n s s 1"]:
    """Resize images (n, 28, 28) in 0..255 to float32 (n, size, size, 1) in [-1, 1], with Pillow's bilinear filter.

    Like Pillow, the function rounds to 0..255 after the columns and after the rows.

    Raises:
      ValueError: the images are not uint8, or `size` is below 1.
    """
    _pixels("scaled", images, None)
    check.number("scaled: size", size, at_least=1, whole=True)
    weights = triangle(images.shape[-1], size)
    columns = np.floor(images.astype(np.float32) @ weights.T + 0.5)
    rows = np.floor(weights @ columns + 0.5)
    return (rows / 127.5 - 1).astype(np.float32)[..., None]


@cache
def triangle(before: int, after: int) -> Float[np.ndarray, "after before"]:
    """Return Pillow's bilinear weights along an axis; the filter widens with the reduction, against aliases."""
    check.number("triangle: before", before, at_least=1, whole=True)
    check.number("triangle: after", after, at_least=1, whole=True)
    ratio = before / after
    reach = max(ratio, 1.0)
    centre = (np.arange(after) + 0.5) * ratio
    weights = np.maximum(0, 1 - abs(np.arange(before) + 0.5 - centre[:, None]) / reach)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


# Naturally crossed sevens.


def naturally_crossed(images: Pixels) -> Bool[np.ndarray, " n"]:
    """Mark the sevens of MNIST whose writers crossed the stem with a stroke.

    They are 825 of 6,265 in `train` (13.2 %) and 137 of 1,028 in `test` (13.3 %).  A blind labelling of 250 random
    sevens of `test` found 37 of 249 (14.9 %, 95 % interval 11.0 to 19.8; one was undecided).  The list was made by eye,
    from contact sheets sorted by two classifiers' scores.  It includes most doubtful sevens, because its purpose is to
    leave them out.

    The list holds hashes of the images, so their order does not matter.  Images of other data sets are False.
    """
    return np.isin(fingerprints(images), _known())


def fingerprints(images: Pixels) -> np.ndarray:
    """Return the images' BLAKE2b hashes of eight bytes, (n,) in uint64.

    Raises:
      ValueError: the images are not uint8, because the hash depends on the type.
    """
    _pixels("fingerprints", images)
    digest = lambda image: hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=8).digest()
    return np.frombuffer(b"".join(map(digest, images)), np.uint64)


@cache
def _known() -> np.ndarray:
    with np.load(Path(__file__).with_name("crossed_sevens.npz"), allow_pickle=False) as stored:
        return stored["crossed"]


def _pixels(name: str, images: Pixels, side: int | None = SIDE) -> None:
    """Check that images are (n, side, side) and uint8, because other types leave the range open."""
    check.shape(f"{name}: images", images, (None, side, side))
    if images.dtype != np.uint8:
        raise ValueError(f"{name}: images must be uint8 in 0..255, got {images.dtype}")


# Drawing a stroke.


class Stem(NamedTuple):
    """The line x = column + slope (y - row) along the ink near a row, in pixels; the first pixel's centre is 0."""

    row: Scalar
    column: Scalar
    slope: Scalar
    thickness: Scalar
    """Width of the ink across the stem, in pixels."""


def extent(ink: Ink) -> tuple[Scalar, Scalar]:
    """Return the first and last rows with ink."""
    present = jnp.sum(ink, 1) > 0.3
    return jnp.argmax(present) * 1.0, SIDE - 1.0 - jnp.argmax(present[::-1])


def stem(ink: Ink, row: Scalar) -> Stem:
    """Fit the stem of a seven to the centroids of its rows below 40 % of its height, weighted by nearness to `row`."""
    check.shape("stem: ink", ink, (SIDE, SIDE))
    top, bottom = extent(ink)
    y = jnp.arange(SIDE) * 1.0
    weight = jnp.sum(ink, 1)
    centroid = ink @ y / jnp.maximum(weight, 1e-6)
    near = jnp.exp(-0.5 * ((y - row) / 3.5) ** 2) * (y >= top + 0.4 * (bottom - top))
    share = weight * near / jnp.maximum(jnp.sum(weight * near), 1e-6)
    y_mean, x_mean = share @ y, share @ centroid
    slope = share @ ((y - y_mean) * (centroid - x_mean)) / jnp.maximum(share @ (y - y_mean) ** 2, 0.5)
    # The median ignores rows where the pen turned back or made a serif.
    lower = (y > top + 0.5 * (bottom - top)) & (y < bottom)
    across = jnp.nanmedian(jnp.where(lower, weight, jnp.nan)) / jnp.sqrt(1 + slope**2)
    return Stem(row, x_mean + slope * (row - y_mean), slope, jnp.nan_to_num(across))


class Stroke(NamedTuple):
    """Shape of a stroke, in pixels and radians."""

    angle: Scalar
    """Positive slopes down to the right, because rows count downwards."""
    left: Scalar
    """Reach to the left of the stem's middle."""
    right: Scalar
    """Reach to the right."""
    thickness: Scalar
    bend: Scalar
    """Deviation of both ends from the straight line, to the same side."""
    swing: Scalar
    """Deviation of the ends to opposite sides."""
    taper: Scalar
    """Relative change of the thickness from the middle to the right end."""
    blur: Scalar
    """Standard deviation of the edge."""
    jitter: Float[Array, "28 28"]
    """Noise added to the distance from the stroke, for a ragged edge."""


def cross(key: PRNGKey, ink: Ink) -> Ink:
    """Draw a random stroke across the stem of a seven, then centre its mass as in all of MNIST.

    The thickness is about the digit's own.  An image without ink also gets a stroke.
    """
    place_key, stroke_key = jax.random.split(key)
    top, bottom = extent(ink)
    height = 0.58 + 0.06 * jax.random.truncated_normal(place_key, -2.0, 2.0)
    line = stem(ink, top + height * (bottom - top))
    drawn = coverage(line, stroke(stroke_key, line)) * jnp.max(ink, initial=0.5)
    return recentred(1 - (1 - ink) * (1 - drawn), ink)


def stroke(key: PRNGKey, line: Stem) -> Stroke:
    """Draw the shape of a random stroke across a stem; its ranges imitate the strokes of MNIST's writers."""
    keys = iter(jax.random.split(key, 10))
    uniform = lambda low, high: jax.random.uniform(next(keys), (), minval=low, maxval=high)
    normal = lambda mean, std: mean + std * jax.random.truncated_normal(next(keys), -2.0, 2.0)
    # From rising a little to perpendicular to the stem.
    angle = jnp.deg2rad(normal(-8.0, 9.0)) - 0.2 * jnp.arctan(line.slope)
    thickness = jnp.clip(line.thickness * normal(0.85, 0.12), 1.1, 4.0)
    # Half of the stem's width along the stroke, plus the overhang on either side.
    half = 0.5 * line.thickness / jnp.maximum(jnp.cos(angle + jnp.arctan(line.slope)), 0.5)
    left, right = (half + 0.3 * thickness + 1.9 + 6.0 * uniform(0.0, 1.0) ** 1.5 for _ in range(2))
    bend, swing, taper, blur = normal(0.0, 0.4), normal(0.0, 0.3), normal(-0.1, 0.2), uniform(0.3, 0.45)
    jitter = 0.15 * jax.random.normal(next(keys), (SIDE, SIDE))
    return Stroke(angle, left, right, thickness, bend, swing, taper, blur, jitter)


def coverage(line: Stem, pen: Stroke) -> Ink:
    """Return the ink in [0, 1] of a stroke through the stem at (column, row)."""
    y, x = jnp.meshgrid(jnp.arange(SIDE) - line.row, jnp.arange(SIDE) - line.column, indexing="ij")
    along = x * jnp.cos(pen.angle) + y * jnp.sin(pen.angle)
    position = jnp.clip(2 * along / (pen.left + pen.right), -1.5, 1.5)
    across = y * jnp.cos(pen.angle) - x * jnp.sin(pen.angle)
    across = across - pen.bend * (position**2 - 0.3) - pen.swing * position**3
    radius = 0.5 * pen.thickness * (1 + pen.taper * jnp.clip(position, -1.0, 1.0))
    beyond = along - jnp.clip(along, -pen.left + radius, pen.right - radius)
    distance = jnp.hypot(across, beyond) + pen.jitter
    cdf = jax.scipy.stats.norm.cdf
    # The factor 1.2 makes the middle black in all but the finest strokes.
    return jnp.clip(1.2 * (cdf((radius - distance) / pen.blur) - cdf((-radius - distance) / pen.blur)), 0.0, 1.0)


def recentred(image: Ink, like: Ink) -> Ink:
    """Shift an image by whole pixels, so that its centre of mass is that of `like`."""
    places = jnp.arange(SIDE) * 1.0
    centre = lambda a: jnp.stack([jnp.sum(a, 1) @ places, jnp.sum(a, 0) @ places]) / jnp.maximum(jnp.sum(a), 1e-6)
    shift = jnp.clip(jnp.round(centre(image) - centre(like)), -4, 4).astype(int)
    return jax.lax.dynamic_slice(jnp.pad(image, 4), shift + 4, (SIDE, SIDE))


@jax.jit
def _drawn(images: UInt8[Array, "n 28 28"], keys: PRNGKey) -> UInt8[Array, "n 28 28"]:
    ink = jax.vmap(cross)(keys, images.astype(jnp.float32) / 255)
    return jnp.round(255 * ink).astype(jnp.uint8)


def crossed(images: Pixels, seed: int) -> Pixels:
    """Draw a stroke across the stem of every seven; image i has the key `fold_in(key(seed), i)`.

    Returns:
      The images (n, 28, 28), rounded to 0..255.

    Raises:
      ValueError: the images are not (n, 28, 28) in uint8, or `seed` is not in 0..2^32 - 1.
    """
    _pixels("crossed", images)
    check.number("crossed: seed", seed, at_least=0, below=2**32, whole=True)
    key = jax.random.key(seed)
    parts = []
    for first in range(0, len(images), CHUNK):  # chunks of one size share a compiled program and need little memory
        part = np.zeros((CHUNK, SIDE, SIDE), np.uint8)
        chunk = images[first : first + CHUNK]
        part[: len(chunk)] = chunk
        keys = jax.vmap(partial(jax.random.fold_in, key))(first + jnp.arange(CHUNK))
        parts.append(np.asarray(_drawn(part, keys))[: len(chunk)])
    return np.concatenate(parts) if parts else images


class Mix(NamedTuple):
    """Sevens with and without a stroke."""

    images: Pixels
    crossed: Bool[np.ndarray, " n"]
    """True where a stroke was drawn (malign)."""
    source: Int[np.ndarray, " n"]
    """Row of the source image."""


def mix(images: Pixels, share: float, seed: int) -> Mix:
    """Leave out naturally crossed sevens, and draw a stroke on a random `share` of the others.

    Writers crossed about 13 % of MNIST's sevens (`naturally_crossed`).  Without them the share of crossed sevens is
    `share` up to rounding; with them it would be `share` + 0.13 (1 - share).  The paper uses MNIST's sevens unchanged.

    Args:
      images: sevens of MNIST, or others.
      share: share of drawn strokes, in [0, 1].
      seed: seed of the choice and of the strokes, in 0..2^32 - 1.

    Raises:
      ValueError: see `crossed`; or `share` is outside of [0, 1].
    """
    check.number("mix: share", share, at_least=0, at_most=1)
    check.number("mix: seed", seed, at_least=0, below=2**32, whole=True)
    source = np.flatnonzero(~naturally_crossed(images))
    chosen = np.random.default_rng(seed).permutation(len(source)) < round(share * len(source))
    pixels = np.where(chosen[:, None, None], crossed(images[source], seed), images[source])
    return Mix(pixels, chosen, source)
