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

from experiments.genneg import measures, traffic, traffic_problem
from experiments.genneg.traffic_problem import TrafficConfig
from experiments.lab.config import ConfigError, parse
from experiments.lab.phases import Lab, Run
from gendiff.checkpoint import Archive
from gendiff.data import scenes as of_model
from gendiff.data import traffic as data
from gendiff.methods import genneg
from gendiff.methods.genneg import Guided
from gendiff.nets.scene_transformer import Place

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
    while first.poll() is None and not (place / "checkpoints" / "seed-0" / "by-scene" / "result").exists():
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


@pytest.mark.parametrize("chain", ["ddpm", "edm"])
def test_the_absent_cost_nothing(scenes, chain):
    """Denoisers give 0 for what is not present, so that its r-ELBO is 0; and EDM is an option."""
    config = dataclasses.replace(SMOKE, chain=chain)
    setup = traffic_problem.problem(config)
    place = data.take(of_model.place(scenes), 0)
    place = place._replace(present=jnp.arange(12) < 5)
    theta = jax.jit(traffic_problem.denoiser_network(config).init)(jax.random.key(0), place)
    t = setup.process.grid(config.sampler_steps)[2]
    x0 = jax.jit(lambda theta, place: setup.model(setup.bind(theta, place), jnp.ones((12, 7)), t))(theta, place)
    assert (np.asarray(x0)[5:] == 0).all()
    assert np.isfinite(np.asarray(x0)).all()


def test_heads_are_taught_their_labels(scenes):
    holds = np.ones((2, 78), bool)
    holds[0, 0] = False  # vehicles 0 and 1 overlap
    assert traffic_problem.LABELS["scene"](holds).tolist() == [False, True]
    assert traffic_problem.LABELS["agent"](holds)[0].tolist() == [False, False] + [True] * 10
    assert traffic_problem.LABELS["pair"](holds) is holds
    for head, count in (("scene", ()), ("agent", (12,)), ("pair", (78,))):
        setup = traffic_problem.problem(SMOKE, head)
        place = data.take(of_model.place(scenes), 0)
        phi = jax.eval_shape(traffic_problem.classifier_network(SMOKE, head).init, jax.random.key(0), place)
        bound = jax.eval_shape(setup.bind_network, phi, place)
        logits = jax.eval_shape(setup.network, bound, jnp.ones((12, 7)), jnp.asarray(3))
        assert logits.shape == count


def classifier_of_agents(place):
    """Parameters of which none is 0, so that the classifier depends on all that it is given."""
    phi = jax.jit(traffic_problem.classifier_network(SMOKE, "agent").init)(jax.random.key(0), place)
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), phi)


def test_a_timeless_classifier_is_told_no_time(scenes):
    setup = traffic_problem.problem(SMOKE, "agent", True)
    place = data.take(of_model.place(scenes), 0)
    phi = classifier_of_agents(place)
    bound, u = jax.jit(setup.bind_network)(phi, place), jax.random.normal(jax.random.key(1), (12, 7))
    one, two = (jax.jit(setup.network)(bound, u, jnp.asarray(t)) for t in (5, 900))
    np.testing.assert_allclose(one, two, atol=1e-6)
    times = {int(setup.classifier_time(jax.random.key(i))) for i in range(5)}
    assert times == {int(setup.process.grid(SMOKE.sampler_steps)[-2])}


def test_classifiers_do_not_guide_in_noise(scenes):
    setup = traffic_problem.problem(SMOKE, "agent")
    place = data.take(of_model.place(scenes), 0)
    phi = classifier_of_agents(place)
    theta = jax.jit(traffic_problem.denoiser_network(SMOKE).init)(jax.random.key(1), place)
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
    setup, last = traffic_problem.problem(config), traffic_problem.last_guided(config)
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
    taught = np.asarray(
        jax.vmap(traffic_problem.teaching(config).classifier_time)(jax.random.split(jax.random.key(1), 2000))
    )
    beyond = 0.25 * (1 - (last / SMOKE.steps) ** 0.5)
    assert abs((taught > last).mean() - beyond) < 5 * 0.5 / 2000**0.5


def test_classifiers_cost_nothing_where_they_do_not_guide():
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, SMOKE.steps)) ** 0.5
    times = np.round(SMOKE.steps * (np.arange(1, SMOKE.sampler_steps + 1) / SMOKE.sampler_steps) ** 2).astype(int)
    share = (alphas[times - 1] >= SMOKE.least_signal).mean()
    assert 0 < share < 1
    guided = lambda config: genneg.guided_share(traffic_problem.problem(config))
    assert guided(SMOKE) == pytest.approx(share)
    assert guided(dataclasses.replace(SMOKE, least_signal=0.0)) == 1
    with pytest.raises(ConfigError, match=r"--sampler-steps must have some .*--least-signal 0\.95, got none of 2"):
        traffic.run(dataclasses.replace(SMOKE, sampler_steps=2))


def test_sizes_of_the_presets():
    """The issue's: 1 to 2 M parameters by default, 8 to 10 M for `paper`."""

    def count(config: TrafficConfig) -> int:
        place = Place(jnp.zeros((128, 128)), jnp.ones(12, bool))
        shapes = jax.eval_shape(traffic_problem.denoiser_network(config).init, jax.random.key(0), place)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert 1e6 < count(traffic.PRESETS["default"]) < 2e6
    assert 8e6 < count(traffic.PRESETS["paper"]) < 10e6


def test_bad_options_are_one_error(tmp_path):
    with pytest.raises(ConfigError, match="--samples must be 16 to 1000000000, got 3"):
        parse(TrafficConfig, traffic.PRESETS, ["--samples", "3"])
    for options, message in (
        (["--network.heads", "7"], "--network.heads must divide the width 128, got 7"),
        (["--classifier-network.heads", "7"], "--classifier-network.heads must divide the width 128, got 7"),
        (["--sampler-steps", "2000"], "--sampler-steps must be at most --steps 1000, got 2000"),
        (["--elbo-levels", "900", "--steps", "100"], "--elbo-levels must be at most --steps 100, got 900"),
        (["--smc.steps", "1001"], "--smc.steps must be at most --steps 1000, got 1001"),
        (["--chain", "edm", "--eta", "0.5"], "--eta must be left out with --chain edm, got 0.5"),
        (["--source", "embedded", "--data", "x"], "--data must be left out with --source embedded, got x"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(TrafficConfig, traffic.PRESETS, options)
    (tmp_path / "empty").mkdir()
    config = dataclasses.replace(SMOKE, recorded=tmp_path / "empty", output=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--recorded: commonroad: .*must hold files"):
        traffic.run(config)
    assert not (tmp_path / "run").exists(), "another option may be tried with the same folder"


def opened(config, folder, sets, report=lambda *_: None) -> Run:
    run = Run(config, 0, None, Archive(folder), report)
    run.data = sets
    return run


def test_other_scenes_are_refused(tmp_path, scenes):
    splits = dict.fromkeys(("train", "validation", "test"), scenes)

    def check(splits):
        lab = Lab([opened(SMOKE, tmp_path, of_model.sets(splits, 12))])
        lab.unchanged("data", lambda run: of_model.fingerprint(run.data.scenes))

    check(splits)
    changed = scenes._replace(vehicles=scenes.vehicles + 1)
    with pytest.raises(ConfigError, match="must be of the same data, got another test set than before"):
        check(splits | {"test": changed})


def test_a_streamed_baseline_learns_and_goes_on_with_the_next_batch(tmp_path):
    pytest.importorskip("grain")
    baseline = dataclasses.replace(SMOKE.baseline, steps=260, batch=8)  # blocks of 250
    config = dataclasses.replace(SMOKE, stream=True, quarters=True, baseline=baseline)
    sets = of_model.sets(of_model.embedded(), 12)
    seen: list[float] = []

    class Stopped(Exception):
        pass

    def note(phase, done, of, metrics, last=None):
        seen.extend([metrics["validation_loss"]] if metrics else [])
        if done == last:
            raise Stopped

    def trained(folder, report=note):
        lab = Lab([opened(config, folder, sets, report)])
        lab.train("baseline", traffic.base_training, lambda run, state: {"loss": state.best_loss})
        return lab.runs[0]["baseline"]

    whole = trained(tmp_path / "whole")
    assert seen[1] < seen[0] < np.inf
    with pytest.raises(Stopped):
        trained(tmp_path / "parts", lambda *given: note(*given, last=250))
    np.testing.assert_array_equal(trained(tmp_path / "parts")["loss"], whole["loss"])


def test_the_same_noise_for_every_model(scenes):
    """Two models that are the same function have the same r-ELBO, scene by scene."""
    config = SMOKE
    setup = traffic_problem.problem(config)
    place = data.take(of_model.place(scenes), 0)
    theta = jax.jit(traffic_problem.denoiser_network(config).init)(jax.random.key(0), place)
    lab = Lab([opened(config, None, None)])
    bounds = [
        measures.bounds(
            measures.Subject(lab, lab.runs, "it", setup, lambda run, guided=guided: guided),
            traffic_problem.r_elbo(dataclasses.replace(config, elbo_levels=4)),
            jnp.asarray(of_model.normalised(scenes)), lambda run: jax.random.key(3), of_model.place(scenes),
        )[0]
        for guided in (Guided(theta), Guided(jax.tree.map(jnp.array, theta)))
    ]  # fmt: skip
    np.testing.assert_array_equal(*bounds)
    assert (bounds[0] < 0).all()
