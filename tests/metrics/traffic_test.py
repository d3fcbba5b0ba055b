import numpy as np
import pytest

from gendiff.metrics import traffic

HALF, CELLS = 20.0, 80


def road() -> np.ndarray:
    """A road along x of 8 m: |y| <= 4."""
    y = (np.arange(CELLS) + 0.5) * (2 * HALF / CELLS) - HALF
    return np.broadcast_to((np.abs(y) - 4)[:, None], (CELLS, CELLS)).astype(np.float32)


def scene(*vehicles: tuple[float, ...]) -> np.ndarray:
    return np.asarray([[[x, y, length, 2.0, np.cos(yaw), np.sin(yaw), speed] for x, y, length, yaw, speed in vehicles]])


def test_marginals_of_a_scene_that_can_be_read_off():
    given = scene((0, 2, 4, 0, 3), (10, 2.5, 6, 0, 5), (-3, -2, 4, np.pi, 7), (6, -2.2, 4, np.pi + np.radians(20), 9))
    present = np.ones((1, 4), bool)
    found = traffic.marginals(given, present, road()[None], HALF)
    np.testing.assert_allclose(found["speed"], [3, 5, 7, 9])
    # 0 -> 1: 10 - (4 + 6) / 2.  3 -> 2 is turned: along its heading, 9 cos 20 - 0.2 sin 20, aside by more than a lane.
    np.testing.assert_allclose(found["gap"], [5.0], atol=1e-5)
    np.testing.assert_allclose(found["heading"], [0, 0, 0, 20], atol=0.05)


def test_the_absent_do_not_count():
    given = scene((0, 2, 4, 0, 3), (10, 2, 6, 0, 5))
    found = traffic.marginals(given, np.array([[True, False]]), road()[None], HALF)
    assert found["speed"].tolist() == [3]
    assert len(found["gap"]) == 0


def test_distances_between_marginals():
    rng = np.random.default_rng(0)
    real = {"speed": rng.normal(size=500), "gap": rng.normal(size=300)}
    same = traffic.differences(real, real)
    assert same == {"speed": 0.0, "gap": 0.0}
    moved = traffic.differences({name: values + 2.5 for name, values in real.items()}, real)
    assert moved["speed"] == pytest.approx(2.5)
    assert traffic.differences({"speed": real["speed"], "gap": np.zeros(0)}, real)["gap"] == np.inf


def test_distances_leave_out_scenes_that_are_not_finite():
    given = scene((0, 2, 4, 0, 3), (10, 2, 6, 0, 5))
    present, real = np.ones((2, 2), bool), traffic.marginals(given, np.ones((1, 2), bool), road()[None], HALF)
    both = np.concatenate([given, np.full_like(given, np.nan)])
    found = traffic.distances(both, present, np.stack([road()] * 2), HALF, real)
    assert {name: estimate.value for name, estimate in found.items()} == dict.fromkeys(found, 0.0)
    assert found["speed_distance"].n == 2


def test_rates_of_infractions_are_of_scenes():
    holds = np.ones((4, 6), bool)  # three vehicles: three pairs and three places
    holds[0, 1] = holds[1, 4] = holds[2, 0] = holds[2, 5] = False
    found = traffic.infraction_rates(holds, np.arange(4))
    assert {name: estimate.value for name, estimate in found.items()} == {
        "collision_rate": 0.5, "offroad_rate": 0.5, "infraction_rate": 0.75
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"half": 0.0}, "half must be > 0, got 0.0"),
        ({"half": np.nan}, "half must be > 0, got nan"),
        ({"present": np.ones((1, 1), bool)}, r"present must have shape \(1, 2\), got \(1, 1\)"),
        ({"distance": road()}, r"distance must have shape \(1, n, n\), got \(80, 80\)"),
        ({"vehicles": np.full((1, 2, 7), np.nan)}, "vehicles must be a finite number, got nan"),
        ({"vehicles": np.zeros((1, 2, 6))}, r"vehicles must have shape \(n, n, 7\), got \(1, 2, 6\)"),
    ],
)
def test_bad_scenes_are_named(change, message):
    right = {"vehicles": scene((0, 2, 4, 0, 3), (10, 2, 6, 0, 5)), "present": np.ones((1, 2), bool)}
    with pytest.raises(ValueError, match=message):
        traffic.marginals(**right | {"distance": road()[None], "half": HALF} | change)


def test_bad_marginals_are_named():
    with pytest.raises(ValueError, match="speed must be a finite number, got nan among 4 values"):
        traffic.differences({"speed": np.array([1.0, np.nan])}, {"speed": np.ones(2)})
    with pytest.raises(ValueError, match="marginals must hold speed, gap, got none of gap"):
        traffic.differences({"speed": np.ones(2)}, {"speed": np.ones(2), "gap": np.ones(2)})
