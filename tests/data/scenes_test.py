"""Scenes as a model learns them: coordinates, verdicts, rows and augmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff.data import scenes as of_model
from gendiff.data import traffic
from gendiff.nets.scene_transformer import Place
from gendiff.oracles import traffic as oracle


@pytest.fixture(scope="module")
def scenes() -> traffic.Scenes:
    return traffic.take(traffic.embedded("test"), slice(8))


def test_scenes_go_through_the_network_s_units(scenes):
    """Scenes of the data are valid after the way to the network's units and back."""
    u = of_model.normalised(scenes)
    assert of_model.constraints(u, of_model.place(scenes)).all()
    assert 0.2 < float(np.std(u)) < 2


def test_the_oracle_of_samples_is_that_of_scenes(scenes):
    rng = np.random.default_rng(0)
    u = rng.normal(size=(8, 12, 7)).astype(np.float32)
    holds = of_model.constraints(u, of_model.place(scenes))
    for i in range(8):
        metres = of_model.UNITS.metres(jnp.asarray(u[i]))
        distance = jnp.asarray(scenes.distance[i], jnp.float32)
        found = oracle.infractions(metres, scenes.present[i], distance, traffic.HALF)
        np.testing.assert_array_equal(holds[i], oracle.constraints(found))


def test_rows_are_spread_over_all_maps():
    for n, of in ((7, 100), (100, 7), (24, 24), (50, 24), (1, 5)):
        rows = of_model.evenly(n, of)
        counts = np.bincount(rows, minlength=of)
        assert len(rows) == n
        assert counts.max() - counts.min() <= 1
        # What some have more than others lies evenly: no two gaps differ by more than one.
        gaps = np.diff(np.flatnonzero(counts == counts.max()))
        assert not len(gaps) or np.ptp(gaps) <= 1


def test_the_nearest_vehicles_stay(scenes):
    few = of_model.nearest(scenes, 5)
    assert few.present.sum(1).tolist() == [5] * 8
    far = np.linalg.norm(scenes.vehicles[..., :2], axis=-1)
    assert (far[:, :5].max(1) <= far[:, 5:].min(1) + 1e-5).all()
    assert (few.vehicles[:, 5:] == 0).all()


def test_sets_are_of_every_split_and_need_scenes(scenes):
    splits = of_model.embedded()
    sets = of_model.sets(splits | {"recorded": scenes}, 3)
    assert set(sets.scenes) == {"train", "validation", "test", "recorded"}
    assert sets.places["recorded"].present.sum(1).tolist() == [3] * 8
    assert len(sets.conditions.present) == len(sets.x["train"]) == len(splits["train"].world)
    with pytest.raises(ValueError, match="test must have 8 scenes or more, got 3: take more scenes"):
        of_model.sets(splits | {"test": traffic.take(scenes, slice(3))}, 12)


def test_other_scenes_have_another_fingerprint(scenes):
    before = of_model.fingerprint({"test": scenes})
    assert before == of_model.fingerprint({"test": scenes})
    for changed in (
        scenes._replace(vehicles=scenes.vehicles + 1),
        scenes._replace(distance=scenes.distance + np.float16(1)),
    ):
        assert before != of_model.fingerprint({"test": changed})


def test_thinned_scenes_keep_vehicles_that_are_there():
    """Each vehicle as often as the others; 4,000 scenes, five standard deviations."""
    present = jnp.arange(12) < 8
    keys = jax.random.split(jax.random.key(0), 4000)
    kept = np.asarray(jax.vmap(lambda key: of_model.thinned(key, present, 1.0))(keys))
    assert not kept[:, 8:].any()
    sizes = np.bincount(kept.sum(1), minlength=9)
    assert sizes[0] == 0
    assert (np.abs(sizes[1:] - 500) < 5 * np.sqrt(500)).all()
    assert (np.abs(kept[:, :8].mean(0) - 4.5 / 8) < 5 * 0.5 / 4000**0.5).all()
    np.testing.assert_array_equal(of_model.thinned(jax.random.key(1), present, 0.0), present)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_turned_scene_is_as_good_on_its_turned_map(scenes, quarters):
    x = jnp.asarray(of_model.normalised(scenes))
    x = x.at[:, 1, :2].add(0.7)  # off the road, or into another, here and there
    turn = jax.vmap(lambda x, distance: of_model.turned(jnp.int32(quarters), x, distance))
    moved, maps = turn(x, jnp.asarray(scenes.distance))
    before, after = (
        of_model.infractions(vehicles, Place(np.asarray(distance), scenes.present))
        for vehicles, distance in ((x, scenes.distance), (moved, maps))
    )
    np.testing.assert_array_equal(before.pairs, after.pairs)
    np.testing.assert_array_equal(before.off_road, after.off_road)
    assert np.asarray(before.off_road).any() or np.asarray(before.pairs).any()
    angle = quarters * np.pi / 2
    expected = np.asarray(x[..., 0]) * np.cos(angle) - np.asarray(x[..., 1]) * np.sin(angle)
    np.testing.assert_allclose(moved[..., 0], expected, atol=1e-5)


def test_changed_scenes_have_no_vehicle_that_is_absent(scenes):
    change = of_model.changed(1.0, quarters=True)
    assert change == of_model.changed(1.0, quarters=True)
    place, x = traffic.take((of_model.place(scenes), of_model.normalised(scenes)), 0)
    kept, moved = change(jax.random.key(0), (jax.tree.map(jnp.asarray, place), jnp.asarray(x)))
    assert (np.asarray(moved)[~np.asarray(kept.present)] == 0).all()
    with pytest.raises(ValueError, match="fewer must be >= 0 and <= 1, got 2"):
        of_model.changed(2.0)
