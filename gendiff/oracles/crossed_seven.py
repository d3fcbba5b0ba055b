"""Crossed sevens: a seven is good if no stroke crosses its stem.

The oracle is a small convolutional network.  Its training data are hundreds of thousands of drawn strokes, and the
strokes of MNIST's writers.  Files beside this one hold its parameters for images of 16 x 16 and of 32 x 32 pixels.
`python -m experiments.censoring.oracle --size 16` trains them and measures their errors.  The last hidden layer gives
the features for precision and recall (`gendiff.metrics.diversity`).
"""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gendiff import check
from gendiff.nets.conv import correlate
from gendiff.oracles.oracle import Oracle
from gendiff.types import Params, PRNGKey, Samples, Scalar

Image = Float[Array, "s s 1"]
"""Pixels in [-1, 1], 1 is ink."""

SIZES = (16, 32)
WIDTHS = (16, 24, 32, 48, 64)
FEATURES = 64
CHUNK = 512
"""Images per call of the program."""


class Answer(NamedTuple):
    """Output of the network, for one image or for n."""

    logit: Float[Array | np.ndarray, "*n"]
    """Log-odds that the seven is crossed."""
    features: Float[Array | np.ndarray, "*n 64"]
    """The last hidden layer."""


def initial(key: PRNGKey) -> Params:
    """Draw parameters for either size: kernels with variance 2 / fan-in, biases 0."""
    convolutions = [(w, w, i, o) for w, i, o in zip((5, 3, 3, 3, 3), (1, *WIDTHS), WIDTHS, strict=False)]
    shapes = [*convolutions, (4 * 4 * WIDTHS[-1], FEATURES), (FEATURES, 1)]
    kernels = []
    for i, shape in enumerate(shapes):
        fan_in = math.prod(shape[:-1])
        kernels.append((2 / fan_in) ** 0.5 * jax.random.normal(jax.random.fold_in(key, i), shape))
    layers = [{"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])} for kernel in kernels]
    return {f"layer_{i}": layer for i, layer in enumerate(layers)}


def network(params: Params, image: Image) -> Answer:
    """Apply the network: five convolutions down to 4 x 4 pixels, a hidden layer, the logit.

    Args:
      params: parameters of `initial` or `load`, trained for the image's size.
      image: (16, 16, 1) or (32, 32, 1).

    Raises:
      ValueError: the image has another shape.
    """
    check.choice("crossed seven: shape of the image", image.shape, [(size, size, 1) for size in SIZES])
    strides = (1 if image.shape[0] == 16 else 2, 1, 2, 1, 2)
    layers = [params[f"layer_{i}"] for i in range(len(params))]
    h = image
    for layer, stride in zip(layers, strides, strict=False):
        pad = layer["kernel"].shape[0] // 2
        h = correlate(h[None, None], layer["kernel"][None], (stride,) * 2, ((pad, pad),) * 2)[0, 0]
        h = jax.nn.silu(h + layer["bias"][None, None])
    hidden = jax.nn.silu(h.reshape(-1) @ layers[-2]["kernel"] + layers[-2]["bias"])
    return Answer((hidden @ layers[-1]["kernel"] + layers[-1]["bias"])[0], hidden)


# Stored parameters.


def path(size: int) -> Path:
    """Return the file of the parameters for size x size pixels."""
    return Path(__file__).with_name(f"crossed_seven_{size}.npz")


@cache
def load(size: int) -> Params:
    """Load the stored parameters for size x size pixels.

    Raises:
      ValueError: no parameters are stored for this size.
    """
    check.choice("crossed seven: pixels along a side of the images", size, SIZES)
    return read(path(size))


def read(file: Path) -> Params:
    """Read parameters that `save` wrote.

    Raises:
      ValueError: the file is missing or damaged, or holds no parameters.
    """
    params: Params = {}
    try:
        with np.load(file, allow_pickle=False) as stored:
            for name in stored.files:
                layer, part = name.split(".")
                params.setdefault(layer, {})[part] = stored[name].astype(np.float32)
    except Exception as error:  # damaged archives raise many types
        raise ValueError(f"crossed seven: {file} must hold parameters, got a damaged file ({error!r})") from None
    return params


def save(file: Path, params: Params) -> None:
    """Store parameters in float16.

    Raises:
      ValueError: a parameter is not finite, or too large for float16.
    """
    largest, flat = float(np.finfo(np.float16).max), {}
    for layer, parts in params.items():
        for part, a in parts.items():
            check.number(f"crossed seven: {layer}.{part}", np.asarray(a), at_least=-largest, at_most=largest)
            flat[f"{layer}.{part}"] = np.asarray(a, np.float16)
    np.savez_compressed(file, **flat)  # type: ignore[arg-type]


# Batches.


def judge(samples: Samples, params: Params | None = None) -> Answer:
    """Return logits (n,) and features (n, 64) of images (n, s, s, 1), as NumPy arrays.

    Args:
      samples: images in [-1, 1]; other values are clipped, because displays clip them too.
      params: default: the stored parameters for this size.

    Raises:
      ValueError: the shape is wrong, a pixel is NaN, or the range seems to be 0..255.
    """
    samples = np.asarray(samples)
    if samples.ndim != 4 or samples.shape[1] != samples.shape[2] or samples.shape[3] != 1:
        raise ValueError(f"crossed seven: images must have shape (n, s, s, 1), got {samples.shape}")
    params = load(samples.shape[1]) if params is None else params
    if np.isnan(samples).any():
        wrong = np.isnan(samples).any((1, 2, 3)).sum()
        raise ValueError(f"crossed seven: pixels must be numbers, got NaN in {wrong} of {len(samples)} images")
    if samples.dtype.kind in "bu" or _bytes(samples):
        raise ValueError(
            f"crossed seven: pixels must be in [-1, 1], got {samples.dtype} up to {samples.max(initial=0)}; "
            "scale 0..255 with x / 127.5 - 1"
        )
    answers = []
    for first in range(0, len(samples), CHUNK):
        part = samples[first : first + CHUNK]
        filled = np.concatenate([part, np.zeros((CHUNK - len(part), *part.shape[1:]), part.dtype)])
        answers.append(jax.tree.map(np.asarray, _judge(params, filled)))
    if not answers:
        return Answer(np.zeros(0, np.float32), np.zeros((0, FEATURES), np.float32))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(samples)], *answers)


def _bytes(samples: np.ndarray) -> bool:
    """Return True if images seem to be 0..255: none is negative, and pixels are large or whole numbers."""
    if not samples.size or samples.min() < 0 or not 2 < samples.max() <= 255:
        return False
    return bool(samples.max() > 100 or np.mean(samples == np.round(samples)) > 0.25)


@jax.jit
def _judge(params: Params, images: Float[Array, "n s s 1"]) -> Answer:
    with jax.default_matmul_precision("highest"):
        return jax.vmap(network, (None, 0))(params, jnp.clip(images.astype(jnp.float32), -1, 1))


def crossed_seven() -> Oracle:
    """Return the oracle of images (n, 16, 16, 1) or (n, 32, 32, 1) in [-1, 1]: True if no stroke crosses the stem."""
    return lambda samples: judge(samples).logit < 0


def features(samples: Samples) -> Float[np.ndarray, "n 64"]:
    """Return the oracle's last hidden layer, for precision and recall."""
    return np.asarray(judge(samples).features)


# Augmentation of training images, towards the imperfections of generated images.


def perturbed(key: PRNGKey, image: Image) -> Image:
    """Shift, turn, stretch and blur an image (s, s, 1), change its contrast, and add noise.

    Limits: shift 1/14 of the side, turn 8 degrees, shear 0.1, stretch 8 %, blur 0.55 (s = 16) or 0.8 pixels (s = 32),
    noise 0.1.
    """
    keys = iter(jax.random.split(key, 9))
    uniform = lambda low, high: jax.random.uniform(next(keys), (), minval=low, maxval=high)
    size = image.shape[0]
    angle, shear = jnp.deg2rad(uniform(-8.0, 8.0)), uniform(-0.1, 0.1)
    matrix = jnp.array([[jnp.cos(angle), -jnp.sin(angle) + shear], [jnp.sin(angle), jnp.cos(angle)]])
    matrix = matrix * jnp.stack([uniform(0.92, 1.08), uniform(0.92, 1.08)])[:, None]
    shift = jnp.stack([uniform(-1.0, 1.0), uniform(-1.0, 1.0)]) * size / 14
    moved = affine(image[..., 0], matrix, shift)
    sharp = blurred(moved, uniform(0.0, 0.3 + size / 64))
    ink = 0.5 * (sharp + 1)
    ink = jnp.clip(ink, 0.0, 1.0) ** jnp.exp(uniform(-0.35, 0.35))
    noise_key, size_key = jax.random.split(next(keys))
    noise = 0.1 * jax.random.uniform(size_key) ** 2 * jax.random.normal(noise_key, ink.shape)
    return jnp.clip(2 * ink - 1 + noise, -1.0, 1.0)[..., None]


def affine(image: Float[Array, "s s"], matrix: Float[Array, "2 2"], shift: Float[Array, " 2"]) -> Float[Array, "s s"]:
    """Return image[M (p - c) + c + shift] at all pixels p, with c the centre, bilinearly; -1 outside."""
    check.shape("affine: image", image, (image.shape[0], image.shape[0]))
    check.shape("affine: matrix", matrix, (2, 2))
    check.shape("affine: shift", shift, (2,))
    centre = (image.shape[0] - 1) / 2
    places = jnp.stack(jnp.meshgrid(*[jnp.arange(side) - centre for side in image.shape], indexing="ij"))
    source = jnp.einsum("ij,jhw->ihw", matrix, places) + centre + shift[:, None, None]
    return jax.scipy.ndimage.map_coordinates(image, list(source), order=1, mode="constant", cval=-1.0)


def blurred(image: Float[Array, "s s"], width: Scalar) -> Float[Array, "s s"]:
    """Blur by a Gaussian; `width` is its standard deviation in pixels; pixels outside are -1."""
    taps = jnp.exp(-0.5 * (jnp.arange(-2, 3) / jnp.maximum(width, 0.05)) ** 2)
    taps = taps / jnp.sum(taps)

    def once(a: Array) -> Array:
        shifted = (jnp.pad(a, ((2, 2), (0, 0)))[i : i + a.shape[0]] for i in range(len(taps)))
        return sum((tap * rows for tap, rows in zip(taps, shifted, strict=True)), jnp.zeros_like(a))

    return once(once(image + 1).T).T - 1
