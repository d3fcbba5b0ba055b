from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gendiff.oracles import checkerboard
from gendiff.oracles.oracle import label

BOARDS = pytest.mark.parametrize(("cells", "half_width"), [(4, 1.0), (8, 2.0), (5, 0.5)])


@partial(jax.jit, static_argnums=(1, 2))
def on_board(x, cells=4, half_width=1.0):
    return checkerboard.on_board(x, cells, half_width)


@BOARDS
def test_cells_alternate(cells, half_width):
    index = np.arange(cells)
    centre = (2 * (index + 0.5) / cells - 1) * half_width
    x, y = np.meshgrid(centre, centre, indexing="ij")
    points = np.stack([x, y], -1).astype(np.float32)
    expected = (index[:, None] + index[None]) % 2 == 0
    # The centres, and places a little inside the four corners.
    inside = np.float32([[0, 0], [1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.float32(0.98 * half_width / cells)
    given = on_board(jnp.asarray(points + inside[:, None, None]), cells, half_width)
    np.testing.assert_array_equal(given, np.broadcast_to(expected, given.shape))


def test_cells_are_half_open():
    # On the 4 x 4 board on [-1, 1)^2 the cells' edges are exact in float32.
    low, high = -1.0, 1.0
    points = np.float32(
        [[low, low], [high, high], [high, 0.75], [low, high], [-0.5, -0.5], [-0.5, low], [0.0, 0.0], [0.0, -0.5]]
    )
    expected = [True, False, False, False, True, False, True, False]
    np.testing.assert_array_equal(on_board(jnp.asarray(points)), expected)
    below = points - np.float32(1e-6)
    expected = [False, True, True, False, True, False, True, False]
    np.testing.assert_array_equal(on_board(jnp.asarray(below)), expected)


@pytest.mark.parametrize(
    "point", [[1.2, 0.1], [-1.2, -0.1], [0.1, 5.0], [np.nan, 0.1], [0.1, np.nan], [np.inf, 0.1], [-np.inf, -0.1]]
)
def test_outside_is_bad(point):
    assert not bool(on_board(jnp.array(point, jnp.float32)))


@given(st.floats(-0.95, 0.45), st.floats(-0.95, 0.95))
def test_one_cell_on_is_the_other_colour(x, y):
    edges = np.array([-1, -0.5, 0, 0.5, 1])
    if min(np.abs(x - edges).min(), np.abs(y - edges).min()) < 1e-5:
        return  # rounding may put a point of an edge on either side
    here, right = (bool(on_board(jnp.array([x + step, y], jnp.float32))) for step in (0.0, 0.5))
    assert here != right


@BOARDS
def test_outer_band(cells, half_width):
    # On a fine grid of midpoints the share of the frame is its area, 1 - (1 - BAND)^2.
    n = 40 * cells
    middle = ((2 * (np.arange(n) + 0.5) / n - 1) * half_width).astype(np.float32)
    points = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1)
    band = np.asarray(checkerboard.in_outer_band(jnp.asarray(points), cells, half_width))
    np.testing.assert_allclose(band.mean(), 1 - (1 - checkerboard.BAND) ** 2, rtol=1e-6)
    assert not bool(
        checkerboard.in_outer_band(jnp.array([1.0, 1.0]) * half_width / cells * (cells % 2 + 1), cells, half_width)
    )


def test_oracle_of_a_board():
    samples = np.float32([[-0.9, -0.9], [-0.4, -0.9], [0.6, 0.6], [3.0, 3.0]])
    np.testing.assert_array_equal(label(checkerboard.checkerboard(), samples), [True, False, True, False])
    np.testing.assert_array_equal(label(checkerboard.checkerboard(2, 4.0), samples), [True, True, True, True])


@pytest.mark.parametrize(
    ("cells", "half_width", "message"),
    [
        (0, 1.0, "cells must be >= 1 and whole, got 0"),
        (-4, 1.0, "cells must be >= 1 and whole, got -4"),
        (2.5, 1.0, "cells must be >= 1 and whole, got 2.5"),
        (4, 0.0, "half_width must be > 0, got 0.0"),
        (4, float("nan"), "half_width must be > 0, got nan"),
    ],
)
def test_boards_out_of_range_are_named(cells, half_width, message):
    for call in (
        lambda: checkerboard.on_board(jnp.zeros((3, 2)), cells, half_width),
        lambda: checkerboard.in_outer_band(jnp.zeros((3, 2)), cells, half_width),
        lambda: checkerboard.checkerboard(cells, half_width),
    ):
        with pytest.raises(ValueError, match=f"checkerboard: {message}"):
            call()


def test_points_are_of_the_plane():
    with pytest.raises(ValueError, match=r"checkerboard: points must have shape \(5, 2\), got \(5, 1\)"):
        checkerboard.on_board(jnp.zeros((5, 1)))
