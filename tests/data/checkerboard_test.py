from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gendiff.data import checkerboard
from gendiff.oracles.checkerboard import on_board

draw = partial(jax.jit, static_argnums=(1, 2, 3))(checkerboard.draw)


@pytest.mark.parametrize(("cells", "half_width"), [(4, 1.0), (8, 1.0), (3, 2.0)])
def test_points_are_uniform_on_the_filled_cells(cells, half_width):
    n = 40_000
    points = draw(jax.random.key(0), n, cells, half_width)
    assert points.shape == (n, 2)
    assert bool(jnp.all(partial(jax.jit, static_argnums=(1, 2))(on_board)(points, cells, half_width)))
    # Chi-square over quarters of the filled cells; false-alarm rate 1e-4.
    place = np.floor((np.asarray(points, np.float64) / half_width + 1) * cells).astype(int)
    counts = np.bincount(place[:, 0] * 2 * cells + place[:, 1], minlength=4 * cells**2).reshape(2 * cells, 2 * cells)
    quarter = np.arange(2 * cells) // 2
    filled = (quarter[:, None] + quarter[None]) % 2 == 0
    assert counts[~filled].sum() == 0
    assert stats.chisquare(counts[filled]).pvalue > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "n must be >= 0 and whole, got -1"),
        ((1.5,), "n must be >= 0 and whole, got 1.5"),
        ((9, 0), "cells must be >= 1 and whole, got 0"),
        ((9, 4, 0.0), "half_width must be > 0, got 0.0"),
        ((9, 4, float("nan")), "half_width must be > 0, got nan"),
    ],
)
def test_impossible_boards_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        checkerboard.draw(jax.random.key(0), *arguments)


def test_no_point_is_no_error():
    assert checkerboard.draw(jax.random.key(0), 0).shape == (0, 2)


def test_keys_make_the_points():
    points = lambda seed: np.asarray(draw(jax.random.key(seed), 100, 4, 1.0))
    np.testing.assert_array_equal(points(1), points(1))
    assert not np.isin(points(1), points(2)).any()
