import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from gendiff.oracles import boxes, drivable, traffic

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
    with pytest.raises(ValueError, match="drivable: map must have drivable area"):
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


@pytest.mark.parametrize("cell", [np.nan, 0.0, -1.0, np.inf])
def test_a_cell_has_a_side(cell):
    with pytest.raises(ValueError, match="drivable: cell must be > 0, got "):
        drivable.signed_distance(np.eye(4, dtype=bool), cell)


def test_maps_boxes_and_constraints_out_of_range_are_named():
    vehicle = jnp.array([[0.0, 0, 4, 2, 1, 0]])
    for call, message in (
        (
            lambda: drivable.signed_distance(np.ones(4, bool), 1.0),
            r"drivable: map must have shape \(n, n\), got \(4,\)",
        ),
        (lambda: drivable.distance_at(band(), vehicle[:, :2], 0.0), "drivable: half must be > 0, got 0.0"),
        (lambda: drivable.off_road(band(), vehicle, HALF, None, -0.1), "drivable: tolerance must be >= 0, got -0.1"),
        (lambda: boxes.overlap(vehicle, vehicle, np.nan), "boxes: margin must be a finite number, got nan"),
        (lambda: traffic.by_agent(np.ones((2, 5), bool)), r"constraints of 3 vehicles must have shape \(2, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
