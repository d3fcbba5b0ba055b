from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gendiff.data import windows
from gendiff.data.episodes import Episodes
from gendiff.data.windows import Windows


def numbered(lengths: list[int]) -> Episodes:
    """Episodes whose row i has the observation (i, -i) and the action (100 + i, 3)."""
    i = np.arange(sum(lengths), dtype=np.float32)
    return Episodes(np.stack([i, -i], 1), np.stack([100 + i, 0 * i + 3], 1), np.array(lengths))


NUMBERS = st.floats(-50, 50, width=32).map(lambda x: np.float32(round(x, 3)))


@given(rows=hnp.arrays(np.float32, (5, 6), elements=NUMBERS))
def test_the_normaliser_maps_the_data_onto_the_cube_and_back(rows):
    normaliser = windows.fit(Episodes(np.r_[rows, rows[:1]][:, 2:], np.r_[rows, rows[:1]][:, :2], np.array([6])))
    mapped = windows.normalise(normaliser, rows)
    varies = np.ptp(rows, 0) > 0
    assert mapped.dtype == np.float32
    np.testing.assert_allclose(mapped.min(0), np.where(varies, -1, 0), atol=1e-6)
    np.testing.assert_allclose(mapped.max(0), np.where(varies, 1, 0), atol=1e-6)
    np.testing.assert_allclose(windows.unnormalise(normaliser, mapped), rows, atol=1e-5)
    np.testing.assert_allclose(windows.unnormalise(normaliser, 0 * mapped + 9)[0], normaliser.high, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("value", [0.0, 5.0, -7000.0, 6e4, 1e8, -3e30])
def test_a_constant_coordinate_has_a_width_of_its_size(value, dtype):
    value = float(np.clip(value, -65504, 65504)) if dtype == np.float16 else value
    rows = np.concatenate([np.full((9, 1), value), np.arange(9.0)[:, None]], 1).astype(dtype)
    given = Episodes(rows, rows, np.array([9]))
    normaliser = windows.fit(given)
    both = np.concatenate([rows, rows], 1).astype(np.promote_types(dtype, np.float32))
    mapped = windows.normalise(normaliser, both)
    np.testing.assert_allclose(mapped[:, [0, 2]], 0, atol=2e-3)
    np.testing.assert_allclose(windows.unnormalise(normaliser, mapped)[:-1], both[:-1], rtol=1e-6, atol=1e-6)
    if abs(value) <= 8192:
        np.testing.assert_array_equal(normaliser.low[0], np.float64(value) - 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((5, 4), np.nan, np.float32), "rows must be a finite number, got nan"),
        (np.float32([[-3e38], [3e38], [0], [0], [0]]), "high - low must be > 0, got inf"),
    ],
)
def test_rows_without_a_normaliser_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        windows.fit(Episodes(rows, rows, np.array([5])))
    for limit in (1, 0, -1):
        with pytest.raises(ValueError, match="limit must be >= 2 and whole"):
            windows.fit(numbered([5]), limit)


def test_dropped_rows_do_not_count_for_the_normaliser():
    given = numbered([4, 2, 5])  # rows 0 1 2, none, 6 7 8 9
    low, high = windows.fit(given)
    np.testing.assert_array_equal(low, [100, 2, 0, -9])
    np.testing.assert_array_equal(high, [109, 4, 9, 0])
    np.testing.assert_array_equal(windows.fit(given, limit=2).high, [107, 4, 7, 0])


def test_windows_of_handmade_episodes():
    given = numbered([6, 3, 2, 12])  # of which 5, 2, none and 11 rows are used
    found = windows.windows(given, windows.fit(given), 4)
    # M = 1, 1, 7 starts; the first two are repeated 7 times.
    np.testing.assert_array_equal(found.begin, [0] * 7 + [5] * 7 + list(range(7, 14)))
    np.testing.assert_array_equal(found.last, [4] * 7 + [6] * 7 + [17] * 7)
    assert found.begin.dtype == found.last.dtype == np.int32
    rows = windows.unnormalise(windows.fit(given), windows.window(found, 7, 4))
    # The action 0 is far outside the data's: clipped here, but not in the window.
    np.testing.assert_allclose(rows[:, 2], [6, 7, 7, 7], atol=1e-4)
    np.testing.assert_allclose(rows[:2, :2], [[106, 3], [107, 3]], atol=1e-4)
    np.testing.assert_allclose(windows.window(found, 7, 4)[2:, 0], 2 * (0 - 100) / 21 - 1, rtol=1e-6)


def padded(given: Episodes, horizon: int, limit: int) -> list[np.ndarray]:
    """The spec's sentences, one after the other, before normalisation."""
    ends = np.cumsum(given.lengths)
    whole, counts = [], []
    for begin, end in zip(ends - given.lengths, ends, strict=True):
        seen, done = given.observations[begin : end - 1][:limit], given.actions[begin : end - 1][:limit]
        if (length := len(seen)) <= 1:
            continue
        more = limit + horizon - length
        seen = np.concatenate([seen, np.repeat(seen[-1:], more, 0)])
        whole.append(np.concatenate([np.concatenate([done, np.zeros((more, 2))]), seen], 1))
        counts.append(max(min(min(length, limit - horizon), length - horizon), 1))
    repeated = [(e, s) for e, m in enumerate(counts) for _ in range(max(counts) // m) for s in range(m)]
    return [whole[e][s : s + horizon] for e, s in repeated]


@partial(jax.jit, static_argnums=1)
def batch(source: windows.Windows, horizon: int) -> jax.Array:
    return jax.vmap(lambda i: windows.window(source, i, horizon))(jnp.arange(len(source.begin)))


@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6).filter(lambda each: max(each) > 2),
    horizon=st.sampled_from([1, 4, 16]),
    limit=st.integers(2, 12),
)
def test_windows_are_slices_of_padded_episodes(lengths, horizon, limit):
    given = numbered(lengths)
    normaliser = windows.fit(given, limit)
    found = windows.windows(given, normaliser, horizon, limit)
    expected = [windows.normalise(normaliser, each) for each in padded(given, horizon, limit)]
    assert len(found.begin) == len(expected)
    # Arrays of one size are one program.
    fixed = windows.Windows(*(np.resize(array, (100, *array.shape[1:])) for array in found[:3]), found.still)
    np.testing.assert_allclose(batch(fixed, horizon)[: len(expected)], expected, rtol=2e-5, atol=2e-5)


def test_windows_are_arguments_of_a_compiled_program():
    found = windows.windows(numbered([6, 12]), windows.fit(numbered([6, 12])), 4)
    compiled = batch(found, 4)
    for i in (0, 9):
        np.testing.assert_array_equal(compiled[i], windows.window(found, i, 4))
    assert np.isnan(windows.window(found, len(found.begin), 4)[:, 2:]).all()


@pytest.mark.parametrize("lengths", [[], [1, 2, 2]])
def test_without_a_usable_episode_there_are_no_windows(lengths):
    given = numbered(lengths)
    with pytest.raises(ValueError, match=f"one must have 3 rows or more, got {len(lengths)} episodes, the longest of "):
        windows.fit(given)
    with pytest.raises(ValueError, match="horizon must be >= 1 and whole, got 0"):
        windows.windows(numbered([9]), windows.fit(numbered([9])), 0)


def test_thinning_keeps_the_rows_before_the_last_and_the_last():
    lengths = np.array([7, 1, 2, 6])
    rows = np.arange(16.0)[:, None]
    thin = windows.thinned(Episodes(rows, -rows, lengths), 3)
    np.testing.assert_array_equal(thin.observations[:, 0], [2, 5, 6, 7, 8, 9, 11, 14, 15])
    np.testing.assert_array_equal(thin.actions, -thin.observations)
    np.testing.assert_array_equal(thin.lengths, [3, 1, 2, 3])
    same = windows.thinned(Episodes(rows, rows, lengths), 1)
    np.testing.assert_array_equal(same.observations, rows)
    with pytest.raises(ValueError, match="stride must be >= 1 and whole, got 0"):
        windows.thinned(same, 0)


def test_last_episodes_are_held_out():
    lengths = np.array([3, 2, 4, 1])
    rows = np.arange(10.0)[:, None]
    train, rest = windows.divide(Episodes(rows.repeat(4, 1), rows.repeat(2, 1), lengths), 0.3)
    np.testing.assert_array_equal(train.lengths, [3, 2, 4])
    np.testing.assert_array_equal(rest.lengths, [1])
    np.testing.assert_array_equal(train.observations[:, 0], np.arange(9))
    np.testing.assert_array_equal(rest.actions[:, 0], [9])
    with pytest.raises(ValueError, match="divide: complete episodes must be >= 2 and whole, got 1"):
        windows.divide(Episodes(rows.repeat(4, 1), rows.repeat(2, 1), np.array([10])), 0.3)
    with pytest.raises(ValueError, match=r"divide: share must be > 0 and <= 0\.5, got 0\.6"):
        windows.divide(Episodes(rows.repeat(4, 1), rows.repeat(2, 1), lengths), 0.6)


def test_sets_of_windows_are_padded_not_mixed():
    make = lambda n, value: Windows(
        np.full((n, 6), value, np.float32),
        np.arange(n - 1, dtype=np.int32),
        np.full(n - 1, n - 1, np.int32),
        np.zeros(2),
    )
    stacked = windows.stack([make(5, 1.0), make(9, 2.0)])
    assert stacked.rows.shape == (2, 9, 6)
    first = jax.tree.map(lambda a: jnp.asarray(a[0]), stacked)
    batch = windows.minibatch(jax.random.key(0), first, jnp.int32(4), 200, 3)
    assert set(np.unique(batch)) <= {0.0, 1.0}  # its own rows, and still actions; nothing of the padding's rows
    np.testing.assert_array_equal(batch[:, :, 2:], 1.0)


def test_halves_are_of_different_episodes():
    episodes = numbered([6, 5, 7, 6])
    source = windows.windows(episodes, windows.fit(episodes), 2)
    rows = windows.unnormalise(
        windows.fit(episodes), np.asarray(windows.draw_by_halves(jax.random.key(0), source, 101, 2))
    )
    assert rows.shape == (101, 2, 4)
    owner = np.searchsorted([6, 11, 18], np.rint(rows[:, 0, 2]), "right")
    assert set(owner[::2]) == {0, 2}
    assert set(owner[1::2]) == {1, 3}
    lone = numbered([9])
    with pytest.raises(ValueError, match="draw_by_halves: episodes must be >= 2 and whole, got 1"):
        windows.draw_by_halves(jax.random.key(1), windows.windows(lone, windows.fit(lone), 2), 4, 2)
