"""Calibration of a time-dependent classifier, by noise level."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gendiff import check
from gendiff.process import Process
from gendiff.training import capacity, padded
from gendiff.types import Params, PRNGKey, Sample, Samples, Scalar, Time


class Calibration(NamedTuple):
    """Calibration of C at L noise levels; sample weights make the share of positives alpha."""

    times: Float[Array, " L"]
    mean: Float[Array, " L"]
    """Mean C; equals alpha at every level for a calibrated C."""
    error: Float[Array, " L"]
    """Expected calibration error: mean over samples of | observed - predicted | of the sample's bin."""
    predicted: Float[Array, "L bins"]
    """Mean C of a bin; NaN for an empty bin."""
    observed: Float[Array, "L bins"]
    """Share of positives of a bin; NaN for an empty bin."""
    share: Float[Array, "L bins"]
    """Share of samples in a bin."""


def calibrate(
    process: Process,
    probability: Callable[[Params, Sample, Time], Scalar],
    params: Params,
    positives: Samples,
    negatives: Samples,
    alpha: float,
    key: PRNGKey,
    times: Float[Array, " L"],
    bins: int = 10,
) -> Calibration:
    """Noise held-out samples to the times, and compare C = probability(params, x_t, t) with their labels.

    Args:
      positives, negatives: held-out samples (n, *shape); their total weights are alpha and 1 - alpha.
      alpha: share of positives among the model's samples, in (0, 1).
      times: one or more times, in the units of the process.
      bins: number of bins of C, >= 1.

    Raises:
      ValueError: a class has no samples, shapes or numbers are out of range, or C is not one number in [0, 1] a sample.
    """
    check.number("calibrate: positives", len(positives), at_least=1)
    check.number("calibrate: negatives", len(negatives), at_least=1)
    check.shape("calibrate: negatives", negatives, (None, *np.shape(positives)[1:]))
    check.number("calibrate: alpha", alpha, above=0, below=1)
    check.number("calibrate: bins", bins, at_least=1, whole=True)
    check.number("calibrate: times", len(times), at_least=1)
    check.number("calibrate: times", times)
    n = len(positives) + len(negatives)
    # Pad, so that other numbers of samples share the compiled program.
    samples = jnp.asarray(padded(np.concatenate([positives, negatives]), capacity(n)))
    labels = np.repeat([1.0, 0.0], [len(positives), len(negatives)])
    weights = np.repeat([alpha / len(positives), (1 - alpha) / len(negatives)], [len(positives), len(negatives)])

    rows = []
    for i, t in enumerate(times):
        c = np.asarray(_predict(process, probability, params, samples, t, jax.random.fold_in(key, i))[:n], np.float64)
        check.shape("calibrate: probability of the samples", c, (n,))
        # Round, because C may leave [0, 1] by a rounding error.
        check.number("calibrate: probability", c.round(3), at_least=0, at_most=1)
        index = np.minimum((c * bins).astype(int), bins - 1)
        share, predicted, positive = (np.bincount(index, weights * v, bins) for v in (np.ones_like(c), c, labels))
        with np.errstate(invalid="ignore"):
            rows.append((weights @ c, np.abs(predicted - positive).sum(), predicted / share, positive / share, share))
    return Calibration(jnp.asarray(times), *(jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True)))


@partial(jax.jit, static_argnums=(0, 1))
def _predict(
    process: Process, probability: Callable, params: Params, samples: Samples, t: Time, key: PRNGKey
) -> Float[Array, " n"]:
    # Name the type, at least float32, because JAX's default in float64 mode is float64.
    noise = jax.random.normal(key, samples.shape, jnp.promote_types(samples.dtype, jnp.float32))
    noisy = lambda x, e: (process.alpha(t) * x + process.sigma(t) * e).astype(e.dtype)
    return jax.vmap(lambda x, e: probability(params, noisy(x, e), t))(samples, noise)
