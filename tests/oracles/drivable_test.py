import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from gendiff.oracles import drivable, traffic

HALF, CELLS = 20.0, 80
CELL = 2 * HALF / CELLS


@settings(max_examples=50, deadline=None)
@given(arrays(bool, (7, 9)).filter(lambda mask: 0 < mask.sum() < mask.size))
def test_signed_distance_is_that_of_brute_force(mask):
    at = np.argwhere(np.ones_like(mask)) * 0.5
    far = np.linalg.norm(at[:, None] - at[None], axis=-1)
    flat = mask.ravel()
    nearest = np.where(flat, far[:, ~flat].min(1), far[:, flat].min(1)).reshape(mask.shape)
    expected = np.where(mask, 0.25 - nearest, nearest - 0.25)
    np.testing.assert_allclose(drivable.signed_distance(mask, 0.5), expected, atol=1e-12)


def test_a_map_without_drivable_area_is_an_error():
    with pytest.raises(ValueError, match="a cell of the map must be drivable, got none"):
        drivable.signed_distance(np.zeros((4, 4), bool), 1.0)
    assert (drivable.signed_distance(np.ones((4, 4), bool), 1.0) == -np.inf).all()


def band():
    """A road along x of 8 m: |y| <= 4."""
    y = (np.arange(CELLS) + 0.5) * CELL - HALF
    return jnp.asarray(drivable.signed_distance(np.broadcast_to(np.abs(y)[:, None] < 4, (CELLS, CELLS)), CELL))


def test_distances_between_cells():
    points = jnp.array([[0.0, 1], [3, 4], [-7.3, 5.25], [0, -4.1], [0, 30], [25, 0]])
    expected = [-3, 0, 1.25, 0.1, np.inf, np.inf]
    np.testing.assert_allclose(drivable.distance_at(band(), points, HALF), expected, atol=1e-5)


def test_off_road_at_corners_and_edges():
    box = lambda x, y, cos, sin: [x, y, 4, 2, cos, sin]
    vehicles = jnp.array([
        box(0, 0, 1, 0), box(0, 2.9, 1, 0), box(0, 3.4, 1, 0), box(0, 2.2, 0, 1), box(0, 2.4, 0, 1), box(18.5, 0, 1, 0)
    ])  # fmt: skip
    # From the middle: sides at 1, 3.9 and 4.4; ends at 4.2 and 4.4; and beyond the map.
    expected = [False, False, True, False, True, True]
    np.testing.assert_array_equal(drivable.off_road(band(), vehicles, HALF), expected)
    absent = jnp.array([True] * 5 + [False])
    assert not bool(drivable.off_road(band(), vehicles, HALF, absent)[5])
    assert bool(drivable.off_road(band(), vehicles.at[0, 0].set(jnp.nan), HALF)[0])


def test_the_middle_of_an_edge_may_leave_the_road():
    # An island in the road under the middle of a long side, with all corners on the road.
    mask = np.ones((CELLS, CELLS), bool)
    mask[36:44, 38:42] = False
    distance = jnp.asarray(drivable.signed_distance(mask, CELL))
    vehicle = jnp.array([[0.0, 1.0, 12, 2, 1, 0]])
    assert bool(drivable.off_road(distance, vehicle, HALF)[0])


def test_infractions_of_a_scene():
    vehicles = jnp.array(
        [[0.0, 0, 4, 2, 1, 0, 5], [3, 0, 4, 2, 1, 0, 5], [-8, 4, 4, 2, 1, 0, 0], [8, 0, -1, 2, 1, 0, 0]]
    )
    found = traffic.infractions(vehicles, jnp.ones(4, bool), band(), HALF)
    np.testing.assert_array_equal(found.collides, [True, True, False, False])
    np.testing.assert_array_equal(found.off_road, [False, False, True, False])
    np.testing.assert_array_equal(found.degenerate, [False, False, False, True])
    one = traffic.infractions(vehicles, jnp.array([True, False, False, False]), band(), HALF)
    assert not any(map(np.any, one))


def test_constraints_hold_each_once():
    """Against the definition, vehicle by vehicle and pair by pair."""
    rng = np.random.default_rng(3)
    k = 6
    vehicles = np.concatenate(
        [rng.uniform(-9, 9, (20, k, 2)), np.full((20, k, 2), [5.0, 2.0]), rng.normal(size=(20, k, 3))], -1
    )
    present = rng.random((20, k)) < 0.8
    found = [
        traffic.infractions(jnp.asarray(v), jnp.asarray(p), band(), HALF)
        for v, p in zip(vehicles, present, strict=True)
    ]
    for each in found:
        holds = np.asarray(traffic.constraints(each))
        pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
        assert holds.shape == (len(pairs) + k,)
        for (i, j), good in zip(pairs, holds, strict=False):
            assert good == (not each.pairs[i, j])
        bad = np.asarray(each.collides | each.off_road)
        np.testing.assert_array_equal(holds[len(pairs) :], ~np.asarray(each.off_road))
        np.testing.assert_array_equal(traffic.by_agent(holds), ~bad)
        assert holds.all() == (not bad.any())
    assert 0 < sum(bool(np.asarray(each.collides).any()) for each in found) < 20


MASK = np.array([[True, False], [True, True]])


@pytest.mark.parametrize(
    ("mask", "cell", "message"),
    [
        (MASK, np.nan, "cell must be > 0, got nan"),
        (MASK, 0.0, "cell must be > 0, got 0.0"),
        (MASK, -0.5, "cell must be > 0, got -0.5"),
        (MASK, np.inf, "cell must be > 0, got inf"),
        (MASK[0], 0.5, r"drivable must have shape \(n, n\), got \(2,\)"),
        (np.where(MASK, np.nan, 0), 0.5, "drivable must be true or false"),
        (MASK * 255, 0.5, "drivable must be true or false, got other numbers; compare with a threshold"),
        (np.zeros((0, 3), bool), 0.5, "a cell of the map must be drivable, got none among"),
    ],
)
def test_impossible_maps_are_named(mask, cell, message):
    with pytest.raises(ValueError, match=message):
        drivable.signed_distance(mask, cell)
    np.testing.assert_array_equal(drivable.signed_distance(MASK * 1.0, 0.5), drivable.signed_distance(MASK, 0.5))


VEHICLES = jnp.array([[0.0, 0, 4, 2, 1, 0]] * 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drivable.distance_at(band(), VEHICLES[:, :2], 0.0), "half must be > 0, got 0.0"),
        (lambda: drivable.distance_at(band(), VEHICLES[:, :2], np.nan), "half must be > 0, got nan"),
        (lambda: drivable.distance_at(band()[0], VEHICLES[:, :2], HALF), r"distance must have shape \(n, n\)"),
        (lambda: drivable.distance_at(band(), VEHICLES[:, :3], HALF), r"points must have shape \(3, 2\), got \(3, 3\)"),
        (lambda: drivable.off_road(band(), VEHICLES, HALF, tolerance=np.nan), "tolerance must be a finite number"),
        (lambda: drivable.off_road(band(), VEHICLES[0], HALF), r"vehicles must have shape \(n, 6\), got \(6,\)"),
        (
            lambda: drivable.off_road(band(), VEHICLES, HALF, jnp.ones(1, bool)),
            r"present must have shape \(3,\), got \(1,\)",
        ),
        (
            lambda: traffic.infractions(VEHICLES, jnp.ones(1, bool), band(), HALF),
            r"present must have shape \(3,\), got \(1,\)",
        ),
        (lambda: traffic.by_agent(np.ones((2, 5), bool)), r"holds must have shape \(2, 6\), got \(2, 5\)"),
    ],
)
def test_bad_scenes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_narrow_scenes_are_judged_as_their_values():
    vehicles = jnp.asarray(np.random.default_rng(0).uniform(-9, 9, (8, 6)), jnp.bfloat16)
    distance = band().astype(jnp.bfloat16)
    found = traffic.infractions(vehicles, jnp.ones(8, bool), distance, HALF)
    wide = traffic.infractions(vehicles.astype(jnp.float32), jnp.ones(8, bool), distance.astype(jnp.float32), HALF)
    for a, b in zip(found, wide, strict=True):
        np.testing.assert_array_equal(a, b)
