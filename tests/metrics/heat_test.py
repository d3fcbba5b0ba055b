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


def test_bad_input():
    with pytest.raises(ValueError, match="expected n points"):
        heat.heat(np.zeros((3, 2)), np.array([0.0, np.nan, 1.0]), (5, 5))
    with pytest.raises(ValueError, match="expected a bin with enough values"):
        heat.highest(heat.heat(np.zeros((3, 2)), np.arange(3.0), (5, 5)))
