"""The traffic experiment: its parts, and its command line at the smallest size that has every row."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.genneg import traffic
from experiments.lab.config import ConfigError, parse
from gendiff.data import traffic as data
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided
from gendiff.oracles import traffic as oracle

ROOT = Path(__file__).parents[2]
SMOKE = traffic.PRESETS["smoke"]
NAMES = (
    "data", "baseline", "by-scene-unweighted", "by-scene", "by-agent-unweighted", "by-agent", "by-agent-stacked",
    "distilled-1", "distilled-2", "time-independent", "by-pair", "by-pair-stronger",
    "rejection", "refit", "smc",
)  # fmt: skip
"""The paper's table and ours, as the issue names them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One run of the smoke preset, stopped by kill -9 in the middle and started again."""
    place = tmp_path_factory.mktemp("traffic") / "run"
    command = [sys.executable, "-m", "experiments.genneg.traffic", "--preset", "smoke", "--output", str(place)]
    surroundings = {name: value for name, value in os.environ.items() if name != "GENDIFF_DATA"}
    first = subprocess.Popen(command, cwd=ROOT, env=surroundings, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (place / "checkpoints" / "by-scene" / "result").exists():
        try:
            first.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    first.kill()
    first.wait()
    assert not (place / "results.json").exists()
    subprocess.run(command, cwd=ROOT, env=surroundings, check=True, timeout=900)
    return place


@pytest.mark.slow
def test_every_row_and_file(folder):
    document = json.loads((folder / "results.json").read_text())
    rows = {row["name"]: row["metrics"] for row in document["rows"]}
    assert tuple(rows) == NAMES
    for name, metrics in rows.items():
        for metric in ("collision_rate", "offroad_rate", "infraction_rate"):
            assert 0 <= metrics[metric]["low"] <= metrics[metric]["value"] <= metrics[metric]["high"] <= 1
        assert metrics["infraction_rate"]["value"] >= metrics["collision_rate"]["value"]
        if name == "data":
            assert metrics["infraction_rate"]["value"] == 0
            continue
        assert metrics["evaluations_per_valid"]["value"] > 0
        assert metrics["seconds_per_valid"]["value"] > 0
        assert ("r_elbo" in metrics) == (name not in ("rejection", "smc"))
    assert rows["baseline"]["r_elbo_gain"]["value"] == 0
    assert rows["rejection"]["infraction_rate"]["value"] == rows["smc"]["infraction_rate"]["value"] == 0
    for figure in ("scenes", "infractions"):
        assert (folder / f"{figure}.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def scenes() -> data.Scenes:
    return data.take(data.embedded("test"), slice(8))


def test_scenes_go_through_the_model_s_units(scenes):
    """Scenes of the data are valid after the way to the network's units and back."""
    u = traffic.UNITS.normalised(jnp.asarray(scenes.vehicles), jnp.asarray(scenes.present))
    assert traffic.judged(u, traffic.places(scenes)).all()
    assert 0.2 < float(jnp.std(u)) < 2


@pytest.mark.parametrize("chain", ["ddpm", "edm"])
def test_the_absent_cost_nothing(scenes, chain):
    """Denoisers give 0 for what is not present, so that its r-ELBO is 0; and EDM is an option."""
    config = dataclasses.replace(SMOKE, chain=chain)
    setup = traffic.problem(config)
    place = traffic.rows_of(traffic.places(scenes), np.asarray(0))
    place = place._replace(present=jnp.arange(12) < 5)
    theta = jax.jit(traffic.denoiser_network(config).init)(jax.random.key(0), place)
    t = setup.process.grid(config.sampler_steps)[2]
    x0 = jax.jit(lambda theta, place: setup.model(setup.bind(theta, place), jnp.ones((12, 7)), t))(theta, place)
    assert (np.asarray(x0)[5:] == 0).all()
    assert np.isfinite(np.asarray(x0)).all()


def test_heads_are_taught_their_labels(scenes):
    holds = np.ones((2, 78), bool)
    holds[0, 0] = False  # vehicles 0 and 1 overlap
    assert traffic.LABELS["scene"](holds).tolist() == [False, True]
    assert traffic.LABELS["agent"](holds)[0].tolist() == [False, False] + [True] * 10
    assert traffic.LABELS["pair"](holds) is holds
    for head, count in (("scene", ()), ("agent", (12,)), ("pair", (78,))):
        setup = traffic.problem(SMOKE, head)
        place = traffic.rows_of(traffic.places(scenes), np.asarray(0))
        phi = jax.eval_shape(traffic.classifier_network(SMOKE, head).init, jax.random.key(0), place)
        bound = jax.eval_shape(setup.bind_network, phi, place)
        logits = jax.eval_shape(setup.network, bound, jnp.ones((12, 7)), jnp.asarray(3))
        assert logits.shape == count


def classifier_of_agents(place):
    """Parameters of which none is 0, so that the classifier depends on all that it is given."""
    phi = jax.jit(traffic.classifier_network(SMOKE, "agent").init)(jax.random.key(0), place)
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), phi)


def test_a_timeless_classifier_is_told_no_time(scenes):
    setup = traffic.problem(SMOKE, "agent", True)
    place = traffic.rows_of(traffic.places(scenes), np.asarray(0))
    phi = classifier_of_agents(place)
    bound, u = jax.jit(setup.bind_network)(phi, place), jax.random.normal(jax.random.key(1), (12, 7))
    one, two = (jax.jit(setup.network)(bound, u, jnp.asarray(t)) for t in (5, 900))
    np.testing.assert_allclose(one, two, atol=1e-6)
    times = {int(setup.classifier_time(jax.random.key(i))) for i in range(5)}
    assert times == {int(setup.process.grid(SMOKE.sampler_steps)[-2])}


def test_classifiers_do_not_guide_in_noise(scenes):
    setup = traffic.problem(SMOKE, "agent")
    place = traffic.rows_of(traffic.places(scenes), np.asarray(0))
    phi = classifier_of_agents(place)
    theta = jax.jit(traffic.denoiser_network(SMOKE).init)(jax.random.key(1), place)
    guided = genneg.append(Guided(theta), {"net": phi, "shift": jnp.zeros(())})
    plain, steered = (
        jax.jit(lambda u, t, each=each: genneg.denoiser(setup, genneg.bound(setup, each, place))(u, t))
        for each in (Guided(theta), guided)
    )
    u, seen = jax.random.normal(jax.random.key(2), (12, 7)), set()
    for t in map(jnp.asarray, (1, 50, 200, 400, 1000)):
        alpha, sigma = setup.process.alpha(t), setup.process.sigma(t)
        guides = float(alpha / jnp.sqrt(alpha**2 + sigma**2)) >= SMOKE.least_signal
        assert bool((plain(u, t) != steered(u, t)).any()) == guides
        seen.add(guides)
    assert seen == {True, False}


@pytest.mark.parametrize("signal", [0.0, 0.95])
def test_times_of_classifiers_are_those_of_the_sampler_where_they_guide(signal):
    """L u^2: half of them up to L / 4; a false alarm has a probability below 1e-6 (2,000 draws, five deviations)."""
    config = dataclasses.replace(SMOKE, least_signal=signal)
    setup, last = traffic.problem(config), traffic.last_guided(config)
    if signal:
        within = [bool(setup.within(t)) for t in (last, last + 1)]
        assert within == [True, False]
    else:
        assert last == SMOKE.steps
        assert setup.within is None
    keys = jax.random.split(jax.random.key(0), 2000)
    times = np.asarray(jax.vmap(setup.classifier_time)(keys))
    assert times.min() >= 1
    assert times.max() <= last
    assert abs((times <= last / 4).mean() - 0.5) < 5 * 0.5 / 2000**0.5
    taught = np.asarray(jax.vmap(traffic.teaching(config).classifier_time)(jax.random.split(jax.random.key(1), 2000)))
    beyond = 0.25 * (1 - (last / SMOKE.steps) ** 0.5)
    assert abs((taught > last).mean() - beyond) < 5 * 0.5 / 2000**0.5


def test_classifiers_cost_nothing_where_they_do_not_guide():
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, SMOKE.steps)) ** 0.5
    times = np.round(SMOKE.steps * (np.arange(1, SMOKE.sampler_steps + 1) / SMOKE.sampler_steps) ** 2).astype(int)
    share = (alphas[times - 1] >= SMOKE.least_signal).mean()
    assert 0 < share < 1
    assert traffic.steered(SMOKE) == pytest.approx(share)
    assert traffic.steered(dataclasses.replace(SMOKE, least_signal=0.0)) == 1
    with pytest.raises(ConfigError, match=r"--sampler-steps: expected some .*--least-signal 0\.95, given none of 2"):
        traffic.run(dataclasses.replace(SMOKE, sampler_steps=2))


def test_the_oracle_of_samples_is_that_of_scenes(scenes):
    rng = np.random.default_rng(0)
    u = rng.normal(size=(8, 12, 7)).astype(np.float32)
    holds = traffic.judged(u, traffic.places(scenes))
    for i in range(8):
        metres = traffic.UNITS.metres(jnp.asarray(u[i]))
        found = oracle.infractions(metres, scenes.present[i], jnp.asarray(scenes.distance[i], jnp.float32), data.HALF)
        np.testing.assert_array_equal(holds[i], oracle.constraints(found))


def test_sizes_of_the_presets():
    """The issue's: 1 to 2 M parameters by default, 8 to 10 M for `paper`."""

    def count(config: traffic.TrafficConfig) -> int:
        place = traffic.Place(jnp.zeros((128, 128)), jnp.ones(12, bool))
        shapes = jax.eval_shape(traffic.denoiser_network(config).init, jax.random.key(0), place)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert 1e6 < count(traffic.PRESETS["default"]) < 2e6
    assert 8e6 < count(traffic.PRESETS["paper"]) < 10e6


def test_bad_options_are_one_error(tmp_path):
    with pytest.raises(ConfigError, match="--heads: expected a divisor of the width 128, given 7"):
        parse(traffic.TrafficConfig, traffic.PRESETS, ["--heads", "7"])
    with pytest.raises(ConfigError, match="--samples must be 16 to 1000000000, got 3"):
        parse(traffic.TrafficConfig, traffic.PRESETS, ["--samples", "3"])
    for options, message in (
        (["--classifier-heads", "7"], "--classifier-heads: expected a divisor of the width 128, given 7"),
        (["--sampler-steps", "2000"], "--sampler-steps: expected at most --steps 1000, given 2000"),
        (["--elbo-levels", "900", "--steps", "100"], "--elbo-levels: expected at most --steps 100, given 900"),
        (["--chain", "edm", "--eta", "0.5"], "--eta: expected none with --chain edm, given 0.5"),
        (["--source", "embedded", "--data", "x"], "--data: expected none with --source embedded, given x"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(traffic.TrafficConfig, traffic.PRESETS, options)
    (tmp_path / "empty").mkdir()
    config = dataclasses.replace(SMOKE, recorded=tmp_path / "empty", output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--recorded: commonroad: .*must hold files"):
        traffic.run(config)
    assert not (tmp_path / "run").exists(), "another option may be tried with the same folder"


def test_rows_are_spread_over_all_maps():
    for n, of in ((7, 100), (100, 7), (24, 24), (50, 24), (1, 5)):
        rows = traffic.spread(n, of)
        counts = np.bincount(rows, minlength=of)
        assert len(rows) == n
        assert counts.max() - counts.min() <= 1
        # What some have more than others lies evenly: no two gaps differ by more than one.
        gaps = np.diff(np.flatnonzero(counts == counts.max()))
        assert not len(gaps) or np.ptp(gaps) <= 1


def test_other_scenes_are_refused(tmp_path, scenes):
    archive = traffic.Archive(tmp_path)
    every = dict.fromkeys(("train", "validation", "test"), scenes)
    traffic.Run(SMOKE, archive, lambda *_: None, every)
    changed = scenes._replace(vehicles=scenes.vehicles + 1)
    with pytest.raises(ConfigError, match="expected the test scenes that it was begun with, given others"):
        traffic.Run(SMOKE, archive, lambda *_: None, every | {"test": changed})


def test_a_streamed_baseline_learns_and_goes_on_with_the_next_batch(tmp_path):
    pytest.importorskip("grain")
    every = {name: data.embedded(name) for name in ("train", "validation", "test")}
    config = dataclasses.replace(SMOKE, stream=True, quarters=True, base_steps=260, base_batch=8)  # blocks of 250
    seen: list[float] = []

    class Stopped(Exception):
        pass

    def note(phase, done, of, metrics, last=None):
        seen.extend([metrics["validation_loss"]] if metrics else [])
        if done == last:
            raise Stopped

    def trained(folder, report=note):
        return traffic.Run(config, traffic.Archive(folder), report, every).train_baseline()

    whole = trained(tmp_path / "whole")
    assert seen[1] < seen[0] < np.inf
    with pytest.raises(Stopped):
        trained(tmp_path / "parts", lambda *given: note(*given, last=250))
    np.testing.assert_array_equal(trained(tmp_path / "parts")["loss"], whole["loss"])


def test_thinned_scenes_keep_vehicles_that_are_there():
    """Each vehicle as often as the others; 4,000 scenes, five standard deviations."""
    present = jnp.arange(12) < 8
    keys = jax.random.split(jax.random.key(0), 4000)
    kept = np.asarray(jax.vmap(lambda key: traffic.thinned(key, present, 1.0))(keys))
    assert not kept[:, 8:].any()
    sizes = np.bincount(kept.sum(1), minlength=9)
    assert sizes[0] == 0
    assert (np.abs(sizes[1:] - 500) < 5 * np.sqrt(500)).all()
    assert (np.abs(kept[:, :8].mean(0) - 4.5 / 8) < 5 * 0.5 / 4000**0.5).all()
    np.testing.assert_array_equal(traffic.thinned(jax.random.key(1), present, 0.0), present)


def test_the_nearest_vehicles_stay():
    scenes = data.take(data.embedded("test"), slice(3))
    few = traffic.nearest(scenes, 5)
    assert few.present.sum(1).tolist() == [5, 5, 5]
    far = np.linalg.norm(scenes.vehicles[..., :2], axis=-1)
    assert (far[:, :5].max(1) <= far[:, 5:].min(1) + 1e-5).all()
    assert (few.vehicles[:, 5:] == 0).all()


def test_what_a_valid_scene_costs():
    found = traffic.per_valid(traffic.rates.rate(60, 100), 30.0, 0.5)
    assert found["evaluations_per_valid"].value == pytest.approx(75)
    assert found["seconds_per_valid"].value == pytest.approx(1.25)
    assert found["evaluations_per_valid"].low < 75 < found["evaluations_per_valid"].high
    assert traffic.per_valid(traffic.rates.rate(10, 10), 30.0, 0.5) == {}


def test_the_same_noise_for_every_model(scenes):
    """Two models that are the same function have the same r-ELBO, scene by scene."""
    config = SMOKE
    setup = traffic.problem(config)
    place = traffic.rows_of(traffic.places(scenes), np.asarray(0))
    theta = jax.jit(traffic.denoiser_network(config).init)(jax.random.key(0), place)
    x = traffic.UNITS.normalised(jnp.asarray(scenes.vehicles), jnp.asarray(scenes.present))
    bounds = [
        np.asarray(traffic.elbos(setup, 4, None, guided, x, traffic.places(scenes), jax.random.key(3)))
        for guided in (genneg.Guided(theta), genneg.Guided(jax.tree.map(jnp.array, theta)))
    ]
    np.testing.assert_array_equal(*bounds)
    assert (bounds[0] < 0).all()


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_turned_scene_is_as_good_on_its_turned_map(scenes, quarters):
    every = data.take(scenes, np.arange(8))
    x = traffic.UNITS.normalised(jnp.asarray(every.vehicles), jnp.asarray(every.present))
    x = x.at[:, 1, :2].add(0.7)  # off the road, or into another, here and there
    turn = jax.vmap(lambda x, distance: traffic.turned(jnp.int32(quarters), x, distance))
    moved, maps = turn(x, jnp.asarray(every.distance))
    before, after = (
        traffic.found(each, traffic.Place(np.asarray(distance), every.present))
        for each, distance in ((x, every.distance), (moved, maps))
    )
    np.testing.assert_array_equal(before.pairs, after.pairs)
    np.testing.assert_array_equal(before.off_road, after.off_road)
    assert np.asarray(before.off_road).any() or np.asarray(before.pairs).any()
    angle = quarters * np.pi / 2
    expected = np.asarray(x[..., 0]) * np.cos(angle) - np.asarray(x[..., 1]) * np.sin(angle)
    np.testing.assert_allclose(moved[..., 0], expected, atol=1e-5)
