import numpy as np
import pytest

from gendiff.metrics import heat


def cloud(n=40_000, seed=0):
    return np.random.default_rng(seed).uniform([-0.5, -0.5], [4.5, 6.5], (n, 2))


def test_the_peak_is_found():
    points, goal = cloud(), (2.3, 4.3)
    values = -np.hypot(*(points - goal).T)
    each = heat.heat(points, values, (5, 7))
    assert each.mean.shape == (50, 70)
    assert np.hypot(*np.subtract(heat.highest(each), goal)) < 0.15
    assert heat.recovered(each, goal)
    assert not heat.recovered(each, (0.0, 0.0))


def test_means_by_bin_are_the_means():
    points = np.array([[0.01, 0.02]] * 6 + [[1.01, 2.02]] * 6 + [[3.0, 3.0]] * 4)
    values = np.array([0.0, 1.0] * 3 + [1.0] * 6 + [1.0] * 4)
    each = heat.heat(points, values, (5, 7), tails=0.0)
    assert each.mean[5, 5] == 0.5
    assert each.mean[15, 25] == 1.0
    assert each.counts.sum() == 12  # four values are too few
    assert each.mean[35, 35] == 0.0


def test_affine_changes_of_the_reward_change_nothing():
    points = cloud(5000)
    values = np.sin(points[:, 0]) + 0.1 * points[:, 1]
    a, b = (heat.heat(points, v, (5, 7)) for v in (values, 3 * values - 7))
    np.testing.assert_allclose(a.mean, b.mean, atol=1e-9)


def test_empty_bins_do_not_draw_the_peak_down():
    # A constant stays constant beside a wall, where plain smoothing would lower it.
    points = cloud(30_000)
    points = points[points[:, 0] < 2]
    each = heat.heat(points, np.linspace(0, 1, len(points)), (5, 7))
    smooth = heat.smoothed(each._replace(mean=(each.counts > 0) * 1.0))
    assert np.allclose(smooth[each.counts > 0], 1.0)
    assert np.all(smooth[each.counts == 0] == -np.inf)


def test_values_that_are_all_equal_have_a_peak():
    for value in (0.0, 7.0, 1e8):
        each = heat.heat(cloud(5000), np.full(5000, value), (5, 7), bins=1)
        assert np.all(each.mean == 0)
        assert np.isfinite(heat.highest(each)).all()


def test_one_bin_is_the_whole_plane():
    each = heat.heat(np.zeros((9, 2)), np.arange(9.0), (1, 1), bins=1, tails=0.0)
    np.testing.assert_allclose(each.mean, [[0.5]])
    assert heat.highest(each) == (0.0, 0.0)
    assert heat.highest(each, width=0.0) == (0.0, 0.0)


NINE = {"points": np.zeros((9, 2)), "values": np.arange(9.0), "extent": (5, 5)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": np.full(9, np.nan)}, "values must be a finite number, got nan among 9 values"),
        ({"points": np.full((9, 2), np.nan)}, "points must be a finite number, got nan"),
        ({"points": np.zeros((3, 2))}, r"points must have shape \(9, 2\), got \(3, 2\)"),
        ({"points": np.zeros((0, 2)), "values": np.zeros(0)}, "number of points must be >= 1, got 0"),
        ({"bins": 0}, "bins must be >= 1 and whole, got 0"),
        ({"least": 0}, "least must be >= 1"),
        ({"extent": (5, 0)}, "extent must be >= 1"),
        ({"extent": (5,)}, r"extent must have shape \(2,\)"),
        ({"tails": 0.5}, "tails must be >= 0 and < 0.5, got 0.5"),
        ({"tails": -0.1}, "tails must be >= 0 and < 0.5, got -0.1"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        heat.heat(**NINE | arguments)


def test_what_has_no_peak_is_named():
    with pytest.raises(ValueError, match="a bin must have enough values, got none"):
        heat.highest(heat.heat(np.zeros((3, 2)), np.arange(3.0), (5, 5)))
    each = heat.heat(**NINE)
    for width in (-1.0, np.nan):
        with pytest.raises(ValueError, match="width must be >= 0"):
            heat.smoothed(each, width)
    with pytest.raises(ValueError, match="goal must be a finite number, got nan"):
        heat.recovered(each, (np.nan, 1.0))
    with pytest.raises(ValueError, match="within must be >= 0"):
        heat.recovered(each, (1.0, 1.0), within=-1.0)
