"""Windows of episodes for training: `horizon` rows of one episode, as normalised (action, observation).

Diffuser (Janner et al. 2022) and the paper of relative rewards (NeurIPS 2023) train on such windows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gendiff import check, losses, training
from gendiff.data.episodes import Episodes
from gendiff.denoiser import Model
from gendiff.process import Process
from gendiff.static import by_value
from gendiff.types import PRNGKey

LIMIT = 1000
"""Rows of an episode that windows use, from its start."""
Rows = TypeVar("Rows", np.ndarray, jax.Array)


class Normaliser(NamedTuple):
    """Least and largest values of (action, observation), per coordinate."""

    low: Float[np.ndarray, " d"]
    high: Float[np.ndarray, " d"]


def fit(episodes: Episodes, limit: int = LIMIT) -> Normaliser:
    """Fit the normaliser to the rows that windows use (`trimmed`), in float32 or wider.

    A constant coordinate gets low, high = value -+ max(1, |value| / 8192), because 1e8 + 1 rounds to 1e8 in float32.

    Raises:
      ValueError: no episode is long enough, a row is not finite, or high - low overflows.
    """
    rows = _rows(trimmed(episodes, limit))
    rows = rows.astype(np.promote_types(rows.dtype, np.float32))  # in 16 bits the difference may overflow
    check.number("episodes: rows", rows)
    low, high = rows.min(0), rows.max(0)
    width = np.where(low == high, np.maximum(1, np.abs(low) / 8192), 0).astype(rows.dtype)
    with np.errstate(over="ignore"):
        found = Normaliser(low - width, high + width)
        check.number("episodes: high - low", found.high - found.low, above=0)
    return found


def normalise(normaliser: Normaliser, rows: Rows) -> Rows:
    """Return 2 (x - low) / (high - low) - 1 of rows (.., d); in [-1, 1] for the rows of the fit."""
    low, high = _edges(normaliser, rows)
    return 2 * (rows - low) / (high - low) - 1


def unnormalise(normaliser: Normaliser, rows: Rows) -> Rows:
    """Invert `normalise` for rows (.., d), clipped to [-1, 1]."""
    low, high = _edges(normaliser, rows)
    return (rows.clip(-1, 1) + 1) / 2 * (high - low) + low


def _edges(normaliser: Normaliser, rows: Rows) -> Normaliser:
    """Return the normaliser with the rank of the rows, because JAX can be set to refuse rank promotion."""
    return Normaliser(*(edge.reshape((1,) * (rows.ndim - 1) + edge.shape) for edge in normaliser))


def trimmed(episodes: Episodes, limit: int = LIMIT) -> Episodes:
    """Drop the last row of all episodes, and cut them to `limit` rows; leave out episodes of fewer than two rows.

    Raises:
      ValueError: no episode is left, or `limit` is below 2.
    """
    check.number("episodes: limit", limit, at_least=2, whole=True)
    lengths = np.minimum(episodes.lengths - 1, limit)
    lengths = np.where(lengths > 1, lengths, 0)
    if not lengths.any():
        longest = max(episodes.lengths, default=0)
        raise ValueError(
            f"episodes: one must have 3 rows or more, got {len(lengths)} episodes, the longest of {longest} rows"
        )
    keep = _place(episodes.lengths) < np.repeat(lengths, episodes.lengths)
    return Episodes(episodes.observations[keep], episodes.actions[keep], lengths[lengths > 0])


def thinned(episodes: Episodes, stride: int) -> Episodes:
    """Keep every `stride`-th row of an episode, counted back from the last but one, because windows drop the last."""
    check.number("episodes: stride", stride, at_least=1, whole=True)
    from_end = np.repeat(episodes.lengths, episodes.lengths) - 1 - _place(episodes.lengths)
    keep = ((from_end - 1) % stride == 0) | (from_end == 0) if stride > 1 else np.ones(len(from_end), bool)
    owner = np.repeat(np.arange(len(episodes.lengths)), episodes.lengths)[keep]
    lengths = np.bincount(owner, minlength=len(episodes.lengths))
    return Episodes(episodes.observations[keep], episodes.actions[keep], lengths)


def divide(episodes: Episodes, share: float) -> tuple[Episodes, Episodes]:
    """Divide episodes into the first ones, to train on, and a share in (0, 0.5] of the last ones, to hold out.

    Raises:
      ValueError: the share is out of range, or there is only one episode.
    """
    check.number("divide: share", share, above=0, at_most=0.5)
    n = check.number("divide: complete episodes", len(episodes.lengths), at_least=2, whole=True)
    middle = n - max(1, round(share * n))
    row = int(episodes.lengths[:middle].sum())
    observations, actions, lengths = episodes
    first = Episodes(observations[:row], actions[:row], lengths[:middle])
    return first, Episodes(observations[row:], actions[row:], lengths[middle:])


class Windows(NamedTuple):
    """The rows of a data set and the begins of its windows, as arguments of a compiled program."""

    rows: Float[np.ndarray, "n d"]
    """(action, observation), normalised."""
    begin: Int[np.ndarray, " w"]
    """First rows of the windows."""
    last: Int[np.ndarray, " w"]
    """Last rows of the windows' episodes."""
    still: Float[np.ndarray, " a"]
    """The action 0, normalised."""


def windows(episodes: Episodes, normaliser: Normaliser, horizon: int, limit: int = LIMIT) -> Windows:
    """Return all windows, repeated so that episodes of any length have about the same weight.

    Windows of an episode of L rows (`trimmed`) begin at its rows 0 .. M - 1, with M = max(L - horizon, 1).  They are
    repeated floor(max M / M) times, as in the paper's code.
    """
    check.number("windows: horizon", horizon, at_least=1, whole=True)
    used = trimmed(episodes, limit)
    starts = np.maximum(used.lengths - horizon, 1)
    repeated = starts.max() // starts * starts
    episode = np.repeat(np.arange(len(starts)), repeated)
    ends = np.cumsum(used.lengths)
    begin = (ends - used.lengths)[episode] + _place(repeated) % starts[episode]
    still = normalise(normaliser, np.zeros_like(normaliser.low))[: used.actions.shape[1]]
    rows = normalise(normaliser, _rows(used))
    return Windows(rows, begin.astype(np.int32), (ends - 1)[episode].astype(np.int32), still)


def window(source: Windows, i: int | Int[Array, ""], horizon: int) -> Float[Array, "horizon d"]:
    """Return window i.  After the end of its episode, the last observation is repeated and the action is 0."""
    check.number("window: horizon", horizon, at_least=1, whole=True)
    row = jnp.take(source.begin, i) + jnp.arange(horizon)
    last = jnp.take(source.last, i)
    rows = jnp.take(source.rows, jnp.minimum(row, last), 0)
    actions = len(source.still)
    done = jnp.where((row <= last)[:, None], rows[:, :actions], source.still)
    return jnp.concatenate([done, rows[:, actions:]], 1)


def minibatch(key: PRNGKey, source: Windows, count: Int[Array, ""] | int, batch: int, horizon: int) -> Array:
    """Draw windows (batch, horizon, d) at random from the first `count`; the others may be padding (`stack`)."""
    chosen = jax.random.randint(key, (batch,), 0, count)
    return jax.vmap(lambda i: window(source, i, horizon))(chosen)


@partial(jax.jit, static_argnums=(2, 3))
def draw(key: PRNGKey, source: Windows, n: int, horizon: int) -> Array:
    """Draw n windows (n, horizon, d) at random, compiled."""
    return minibatch(key, source, len(source.begin), n, horizon)


def draw_by_halves(key: PRNGKey, source: Windows, n: int, horizon: int) -> Array:
    """Draw n windows: those at even places are of every other episode, those at odd places of the rest.

    Raises:
      ValueError: there is only one episode.
    """
    ends, episode = np.unique(source.last, return_inverse=True)
    check.number("draw_by_halves: episodes", len(ends), at_least=2, whole=True)
    pair = []
    for k in (0, 1):
        half = source._replace(begin=source.begin[episode % 2 == k], last=source.last[episode % 2 == k])
        pair.append(draw(jax.random.fold_in(key, k), half, -(-n // 2), horizon))
    return jnp.stack(pair, 1).reshape(-1, *pair[0].shape[1:])[:n]


def stack(sets: Sequence[Windows]) -> Windows:
    """Stack sets of windows on axis 0, padded to the largest."""
    longest = lambda name: max(len(getattr(part, name)) for part in sets)
    pad = lambda name: np.stack([training.padded(np.asarray(getattr(part, name)), longest(name)) for part in sets])
    return Windows(pad("rows"), pad("begin"), pad("last"), np.stack([part.still for part in sets]))


@by_value
def denoising(process: Process, model: Model, batch: int, horizon: int) -> Callable[[dict[str, Any]], training.Task]:
    """The task of a model of windows: the mean over the coordinates; for `training.train`.

    The context has `windows` of a model's own data, their `count`, and the coordinates `known` (horizon, d) that it
    gets as conditions.
    """

    def task(own: dict[str, Any]) -> training.Task:
        weight = lambda t: jnp.float32(1 / own["known"].size)
        loss = losses.denoising(process, model, weight, own["known"])
        return training.Task(loss, lambda key: minibatch(key, own["windows"], own["count"], batch, horizon))

    return task


def _rows(episodes: Episodes) -> np.ndarray:
    return np.concatenate([episodes.actions, episodes.observations], 1)


def _place(counts: np.ndarray) -> np.ndarray:
    """Return 0 .. counts[0] - 1, 0 .. counts[1] - 1, .."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
