import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gendiff.metrics import diversity, rates
from gendiff.metrics.diversity import by_splits, precision_recall

SEEDS = st.integers(0, 2**31 - 1)


def naive(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
    """Definition 1 of the paper, point by point in float64."""

    def share(points: np.ndarray, manifold: np.ndarray) -> float:
        hits = 0
        radius = [sorted(np.linalg.norm(manifold - centre, axis=1))[k] for centre in manifold]
        for point in points:
            hits += any(np.linalg.norm(point - c) <= r for c, r in zip(manifold, radius, strict=True))
        return hits / len(points)

    return share(generated, real), share(real, generated)


@given(SEEDS, st.integers(1, 5), st.integers(1, 6), st.integers(8, 40), st.integers(8, 40))
def test_it_is_the_definition(seed, k, d, n, m):
    rng = np.random.default_rng(seed)
    real, generated = rng.normal(size=(n, d)), rng.normal(0.7, 1.3, size=(m, d))
    measured = precision_recall(real, generated, k)
    # The two arithmetics may differ on a point that lies on a border to seven digits: none does in these examples.
    assert (measured.precision.value, measured.recall.value) == naive(real, generated, k)
    assert (measured.precision.n, measured.recall.n) == (m, n)


def test_chunks_make_no_difference(monkeypatch):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(53, 4)), rng.normal(0.5, 1, size=(41, 4))
    whole = precision_recall(real, generated)
    monkeypatch.setattr(diversity, "CHUNK", 7)
    assert precision_recall(real, generated) == whole


@pytest.mark.parametrize("k", [3, 5])
def test_identical_sets_are_on_each_other(k):
    points = np.random.default_rng(1).normal(size=(300, 8))
    measured = precision_recall(points, points[::-1], k)
    assert measured.precision.value == measured.recall.value == 1
    # Also where points repeat, so that balls have no width.
    repeated = np.repeat(points[:20], 10, 0)
    assert precision_recall(repeated, repeated, k).recall.value == 1


def test_disjoint_sets_are_off_each_other():
    rng = np.random.default_rng(2)
    measured = precision_recall(rng.normal(size=(200, 3)), rng.normal(50, 1, size=(200, 3)))
    assert measured.precision.value == measured.recall.value == 0


def test_half_of_the_modes_halves_the_recall_and_keeps_the_precision():
    rng = np.random.default_rng(3)
    modes = 100.0 * np.arange(4)
    real = modes[np.arange(1200) % 4, None] * [1, 0] + rng.normal(size=(1200, 2))
    generated = modes[np.arange(1200) % 2, None] * [1, 0] + rng.normal(size=(1200, 2))
    measured = precision_recall(real, generated)
    assert measured.precision.value > 0.9
    assert 0.4 < measured.recall.value <= 0.5
    # And the other way round: a model with modes that the data have not.
    swapped = precision_recall(generated, real)
    assert swapped.recall.value == measured.precision.value
    assert swapped.precision.value == measured.recall.value


@given(SEEDS, st.floats(1e-4, 1e4), st.floats(-1e3, 1e3))
def test_rotation_scale_and_shift_change_nothing(seed, scale, shift):
    rng = np.random.default_rng(seed)
    real, generated = rng.normal(size=(60, 5)), rng.normal(0.5, 1, size=(60, 5))
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    moved = [scale * (a @ rotation) + scale * shift for a in (real, generated)]
    assert precision_recall(*moved) == precision_recall(real, generated)


def test_a_wider_manifold_holds_more():
    rng = np.random.default_rng(4)
    real, generated = rng.normal(size=(300, 4)), rng.normal(0.5, 1, size=(300, 4))
    values = np.array([[e.value for e in precision_recall(real, generated, k)] for k in (1, 2, 3, 5, 8)])
    assert (np.diff(values, axis=0) >= 0).all()


def test_intervals():
    rng = np.random.default_rng(5)
    real, generated = rng.normal(size=(400, 3)), rng.normal(0.8, 1, size=(500, 3))
    precision = precision_recall(real, generated).precision
    assert precision == rates.rate(round(precision.value * 500), 500)
    split = by_splits(real, generated, splits=4)
    assert split == by_splits(real, generated, splits=4)
    assert (split.precision.n, split.recall.n) == (500, 400)
    assert split.precision.low < split.precision.value < split.precision.high


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (np.zeros((9, 2)), np.full((9, 2), np.nan), 3, "generated must be .*, got nan among 18 values"),
        (np.full((9, 2), np.inf), np.zeros((9, 2)), 3, "real must be .*, got inf"),
        (np.full((9, 2), 1e200), np.zeros((9, 2)), 3, r"real must be >= -1e\+150 and <= 1e\+150, got 1e\+200"),
        (np.zeros(9), np.zeros((9, 2)), 3, r"real must be features \(n, d\) with d >= 1, got shape \(9,\)"),
        (np.zeros((9, 0)), np.zeros((9, 0)), 3, r"real must be features \(n, d\) with d >= 1"),
        (np.zeros((9, 2)), np.zeros((9, 3)), 3, r"generated must have shape \(n, 2\), got \(9, 3\)"),
        (np.zeros((3, 2)), np.zeros((9, 2)), 3, "real must have more than k = 3 points, got 3"),
        (np.zeros((9, 2)), np.zeros((9, 2)), 0, "k must be >= 1 and whole, got 0"),
        (np.zeros((9, 2)), np.zeros((9, 2)), 1.5, "k must be >= 1 and whole, got 1.5"),
        (np.zeros((0, 2)), np.zeros((9, 2)), 3, "more than k = 3 points"),
    ],
)
def test_bad_features_are_named(real, generated, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated, k)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": 1}, "splits must be >= 2 and whole, got 1"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"splits": 5}, "more than k = 3 points, got 2"),
    ],
)
def test_impossible_splits_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        by_splits(np.zeros((9, 2)), np.zeros((9, 2)), **arguments)


# Where a matrix product loses the digits of a distance.


@pytest.mark.parametrize("outlier", [1e9, 1e6, -1e12])
@pytest.mark.parametrize("of", ["real", "generated"])
def test_one_outlier_leaves_the_others_as_they_are(of, outlier):
    rng = np.random.default_rng(0)
    sets = {"real": rng.normal(size=(300, 16)), "generated": rng.normal(0.2, 0.8, size=(300, 16))}
    sets[of][7] = outlier
    measured = precision_recall(**sets)
    real, generated = sets.values()
    away = lambda a, b: np.linalg.norm(a[:, None] - b, axis=-1)
    share = lambda points, of: np.mean((away(points, of) <= np.sort(away(of, of), 1)[:, 3]).any(1))
    assert (measured.precision.value, measured.recall.value) == (share(generated, real), share(real, generated))


@pytest.mark.parametrize("offset", [1e4, 1e8, -1e10])
def test_an_offset_that_all_features_share_changes_nothing(offset):
    rng = np.random.default_rng(1)
    # Multiples of 2^-10, so that the offset rounds nothing away.
    real, generated = (np.round(rng.normal(mean, 1, (200, 4)) * 1024) / 1024 for mean in (0.0, 0.3))
    assert precision_recall(real + offset, generated + offset) == precision_recall(real, generated)


def test_clusters_that_are_tight_and_far_apart_stay_clusters():
    rng = np.random.default_rng(2)
    places = np.array([0.0, 1e9])[np.arange(100) % 2, None]
    real, generated = places + rng.uniform(0, 1e-3, (100, 2)), places + 0.5 + rng.uniform(0, 1e-3, (100, 2))
    measured = precision_recall(real, generated)
    assert (measured.precision.value, measured.recall.value) == (0, 0)


def test_narrow_types_and_jax_arrays_are_their_values():
    rng = np.random.default_rng(3)
    real, generated = (rng.normal(size=(40, 3)).astype(jnp.bfloat16) for _ in range(2))
    expected = precision_recall(real.astype(np.float64), generated.astype(np.float64))
    assert precision_recall(real, jnp.asarray(generated)) == expected
