"""Gen-neG on a Gaussian on the line with a linear oracle, x < EDGE is good, where all is known in closed form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import expit

from gendiff import distributed, losses, process, sampling
from gendiff.checkpoint import Archive, CheckpointError
from gendiff.methods import genneg
from gendiff.methods.genneg import ClassifierTraining, Fit, Guided, OracleProblem, Rounds, Synthetic
from gendiff.training import Settings

EDGE = 1.0
EDM = process.edm(sigma_min=0.02, sigma_max=20.0, mean=-0.5, std=1.2)
FALSE_ALARM = 1e-4
"""Of each statistical test."""
THETA = {
    "w": np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32),
    "v": np.zeros((16, 1), np.float32),
}
"""The correction that a student learns; zero at first."""
PHI = {"a": np.float32(1.0), "b": np.float32(0.0)}


def alpha_of(gaussian) -> float:
    return float(stats.norm.cdf(EDGE, gaussian.means[0, 0], gaussian.stds[0]))


@pytest.fixture(scope="module")
def problem(gaussian) -> OracleProblem:
    exact, (mean,), (std,) = gaussian.denoiser(EDM), gaussian.means[0], gaussian.stds

    def model(theta, x, t):
        """The exact denoiser, and a small network in EDM's preconditioning."""
        scale = jnp.sqrt(t**2 + std**2)
        hidden = jnp.tanh(jnp.stack([(x[0] - mean) / scale, jnp.log(t), jnp.ones(())]) @ theta["w"])
        return exact(x, t) + t * std / scale * (hidden @ theta["v"])

    def network(phi, x, t):
        """Linear in the distance of E[x_0 | x_t] to the edge, in standard deviations of x_0 given x_t."""
        return phi["a"] * (EDGE - exact(x, t)[0]) / (std * t / jnp.sqrt(std**2 + t**2)) + phi["b"]

    return OracleProblem(
        process=EDM,
        model=model,
        network=network,
        oracle=lambda samples: samples[:, 0] < EDGE,
        shape=(1,),
        kernel=sampling.heun,
        steps=12,
        weight=losses.edm_weight(std),
        classifier_time=lambda key: jnp.exp(jax.random.uniform(key, (), minval=jnp.log(0.02), maxval=jnp.log(20.0))),
        chunk=512,
    )


@pytest.fixture(scope="module")
def exact_problem(problem, gaussian) -> OracleProblem:
    """With the Bayes classifier, P(x_0 < EDGE | x_t) = Phi(z), in place of a network; phi is added to its logit."""

    def network(phi, x, t):
        z = problem.network(PHI, x, t)
        return jax.scipy.stats.norm.logcdf(z) - jax.scipy.stats.norm.logcdf(-z) + phi

    return problem._replace(network=network)


CLASSIFIER = ClassifierTraining(Settings(150, 0.05, decay=0.9, every=75), half=128)
STUDENT = genneg.StudentTraining(Settings(2), 2)
ROUNDS = Rounds(rounds=2, per_class=400, budget=6000, classifier=CLASSIFIER, batch=2000)


def count(guided: Guided) -> int:
    return 0 if guided.classifiers is None else len(jax.tree.leaves(guided.classifiers)[0])


def synthetic(n: int, gaussian, seed: int = 0) -> Synthetic:
    samples, _ = gaussian.draw(seed, n)
    good = samples[:, 0] < EDGE
    return Synthetic(samples[good], samples[~good], int(good.sum()), int((~good).sum()))


# Drawing and labelling


def test_collect_counts_all_draws(problem, gaussian):
    collect = lambda budget: genneg.collect(problem, Guided(THETA), jax.random.key(0), 400, budget, 2000)
    drawn = collect(20_000)
    n = drawn.good + drawn.bad
    assert n % 2000 == 0
    assert len(drawn.positives) == drawn.good
    assert len(drawn.negatives) == drawn.bad
    assert (drawn.positives < EDGE).all()
    assert (drawn.negatives >= EDGE).all()
    assert drawn.alpha == drawn.good / n
    # It stops with the first batch that fills both classes.
    assert drawn.bad >= 400
    assert collect(n - 2000).bad < 400
    # Binomial test of alpha against the Gaussian's own.
    assert stats.binomtest(drawn.good, n, alpha_of(gaussian)).pvalue > FALSE_ALARM


def test_batches_of_a_collection_differ(problem):
    drawn = genneg.collect(problem, Guided(THETA), jax.random.key(0), 10**6, 6000, 2000)
    samples = np.concatenate([drawn.positives, drawn.negatives])
    assert len(samples) == 6000
    assert len(np.unique(samples)) > 5900


def test_collect_keeps_to_its_budget(problem):
    drawn = genneg.collect(problem, Guided(THETA), jax.random.key(0), 10**6, 3000, 2000)
    assert drawn.good + drawn.bad <= 3000


@pytest.mark.parametrize(("verdict", "missing"), [(True, "invalid"), (False, "valid")])
def test_collect_needs_both_classes(problem, verdict, missing):
    one_sided = problem._replace(oracle=lambda samples: np.full(len(samples), verdict))
    with pytest.raises(ValueError, match=rf"draws must hold an {missing} sample, got 0 of 2000: raise the budget"):
        genneg.collect(one_sided, Guided(THETA), jax.random.key(0), 10, 2000, 2000)


def test_collect_stops_at_nan(problem):
    broken = {**THETA, "v": np.full((16, 1), np.nan, np.float32)}
    with pytest.raises(FloatingPointError, match="in 2000 of 2000 samples"):
        genneg.collect(problem, Guided(broken), jax.random.key(0), 10, 2000, 2000)


def test_samples_do_not_depend_on_devices(problem):
    classifier = {"net": jax.tree.map(jnp.asarray, PHI), "shift": jnp.float32(0.3)}
    guided = genneg.append(Guided(THETA), classifier)
    alone = np.asarray(genneg.draw(problem, guided, jax.random.key(1), 2000))
    split = genneg.draw(problem, guided, jax.random.key(1), 2000, distributed.make_mesh())
    np.testing.assert_allclose(split, alone, rtol=1e-4, atol=1e-5)


def test_sweep_of_the_guidance_scale_traces_once(problem):
    counted = problem._replace(kernel=chex.assert_max_traces(sampling.heun, n=1))
    guided = genneg.append(Guided(THETA), {"net": jax.tree.map(jnp.asarray, PHI), "shift": jnp.float32(0.0)})
    shares = [
        (np.asarray(genneg.draw(counted, guided, jax.random.key(2), 2000, scale=scale)) >= EDGE).mean()
        for scale in (0.0, 0.5, 1.0, 2.0)
    ]
    assert shares == sorted(shares, reverse=True), "stronger guidance, fewer infractions"
    assert shares[-1] < shares[0]


# Splitting


@pytest.mark.parametrize("select", ["all", "balanced"])
def test_split_keeps_every_sample_once(select, gaussian):
    whole = synthetic(3000, gaussian)
    train, held_out = genneg.split(whole, CLASSIFIER._replace(select=select, held_out=0.2), jax.random.key(0))
    for name in ("positives", "negatives"):
        before = getattr(whole, name)
        parts = np.concatenate([getattr(train, name), getattr(held_out, name)])
        np.testing.assert_array_equal(np.sort(parts[:, 0]), np.sort(before[:, 0]))
        assert not np.array_equal(parts, before), "shuffled"
    # alpha is that of all draws, whatever was selected.
    for part in (train, held_out):
        assert (part.good, part.bad) == (whole.good, whole.bad)
        assert part.alpha == whole.alpha
    smaller = len(whole.negatives)
    if select == "balanced":
        assert len(train.positives) == len(train.negatives) == smaller - int(0.2 * smaller)
    else:
        for name in ("positives", "negatives"):
            assert len(getattr(held_out, name)) == int(0.2 * len(getattr(whole, name)))


def test_split_selects_uniformly(gaussian):
    # Kolmogorov-Smirnov between the selected and the left over.
    train, held_out = genneg.split(synthetic(5000, gaussian), CLASSIFIER._replace(select="balanced"), jax.random.key(1))
    assert stats.ks_2samp(train.positives[:, 0], held_out.positives[:, 0]).pvalue > FALSE_ALARM


def test_split_needs_two_of_each(gaussian):
    whole = synthetic(50, gaussian)
    with pytest.raises(ValueError, match="a class must have at least 2 samples, got 1"):
        genneg.split(whole._replace(negatives=whole.negatives[:1]), CLASSIFIER, jax.random.key(0))


# Models with classifiers


def test_append_adds_to_the_stack(problem, gaussian):
    members = [
        {"net": {"a": jnp.float32(0.5 + i), "b": jnp.float32(-i)}, "shift": jnp.float32(0.1 * i)} for i in range(3)
    ]
    x, t = 0.8, 0.5
    evaluate = jax.jit(lambda guided, scale: genneg.denoiser(problem, guided, scale)(jnp.array([x]), jnp.float32(t))[0])
    # By hand: D, its slope std^2 / (std^2 + t^2), and the logit a (EDGE - D) / v + b + shift.
    (mean,), (std,) = gaussian.means[0], gaussian.stds
    slope, v = std**2 / (std**2 + t**2), std * t / np.sqrt(std**2 + t**2)
    plain = mean + slope * (x - mean)
    guided, shift = Guided(THETA), 0.0
    np.testing.assert_allclose(evaluate(guided, 1.0), plain, rtol=1e-5)
    for i, member in enumerate(members):
        guided = genneg.append(guided, member)
        assert count(guided) == i + 1
        a, b = float(member["net"]["a"]), float(member["net"]["b"] + member["shift"])
        shift += t**2 * expit(-(a * (EDGE - plain) / v + b)) * -a * slope / v
        np.testing.assert_allclose(evaluate(guided, 1.0), plain + shift, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(evaluate(guided, 2.0), plain + 2 * shift, rtol=1e-5, atol=1e-6)


def test_bayes_classifier_removes_what_is_bad_and_nothing_else(exact_problem, gaussian):
    # The guided model is N truncated to x < EDGE: Kolmogorov-Smirnov, and next to nothing beyond the edge.
    sharp = exact_problem._replace(process=process.edm(), steps=40)
    guided = genneg.append(Guided(THETA), {"net": jnp.float32(0.0), "shift": jnp.float32(0.0)})
    samples = np.asarray(genneg.draw(sharp, guided, jax.random.key(3), 4000))[:, 0]
    assert (samples >= EDGE).mean() < 0.005
    (mean,), (std,) = gaussian.means[0], gaussian.stds
    truncated = stats.truncnorm(-np.inf, (EDGE - mean) / std, mean, std)
    assert stats.kstest(samples, truncated.cdf).pvalue > FALSE_ALARM
    # Without the classifier the test says no.
    assert stats.kstest(gaussian.draw(4, 4000)[0][:, 0], truncated.cdf).pvalue < FALSE_ALARM


def test_calibration_of_the_bayes_classifier(exact_problem, gaussian):
    held_out = synthetic(8000, gaussian, seed=5)
    times = jnp.array([0.02, 0.5, 20.0])
    exact = genneg.calibration(
        exact_problem, {"net": jnp.float32(0.0), "shift": jnp.float32(0.0)}, held_out, jax.random.key(0), times
    )
    # The labels' share is alpha by the weights; C's mean differs by noise of standard error below 0.5 / sqrt(n).
    limit = (
        stats.norm.isf(FALSE_ALARM / 6)
        * 0.5
        * np.sqrt(held_out.alpha**2 / len(held_out.positives) + (1 - held_out.alpha) ** 2 / len(held_out.negatives))
    )
    assert (np.abs(np.asarray(exact.mean) - held_out.alpha) < limit).all()
    wrong = genneg.calibration(
        exact_problem, {"net": jnp.float32(0.0), "shift": jnp.float32(1.0)}, held_out, jax.random.key(0), times
    )
    assert (np.asarray(wrong.mean)[1:] > held_out.alpha + limit).all(), "the shift is part of the classifier"


# Training


@pytest.fixture(scope="module")
def parts(gaussian) -> tuple[Synthetic, Synthetic]:
    return genneg.split(synthetic(8000, gaussian, seed=6), CLASSIFIER, jax.random.key(1))


def test_weighting_sets_the_prior(problem, parts):
    fits = {
        weighting: genneg.fit_classifier(
            problem, Fit(*parts, PHI, jax.random.key(2)), CLASSIFIER._replace(weighting=weighting)
        )
        for weighting in ("importance", "shift", "none")
    }
    odds = jax.jit(lambda fit, x, t: genneg.logit(problem)(fit, x[None], t))
    c = {name: expit(float(odds(fit, 0.0, 20.0))) for name, fit in fits.items()}  # noise alone: C is the prior
    alpha, prior = parts[0].alpha, np.log(parts[0].alpha / (1 - parts[0].alpha))
    # Trained by stochastic steps: no interval in closed form.  alpha is 0.84, and the wrong prior is 0.34 away.
    assert abs(c["importance"] - alpha) < 0.06
    assert abs(c["shift"] - alpha) < 0.06
    assert abs(c["none"] - 0.5) < 0.1
    for name, shift in (("importance", prior), ("shift", prior), ("none", 0.0)):
        np.testing.assert_allclose(fits[name]["shift"], shift, rtol=1e-5)
    # One optimum: near the edge, where guidance acts, the two agree.
    for point in (0.7, 1.0, 1.3):
        assert abs(odds(fits["importance"], point, 0.3) - odds(fits["shift"], point, 0.3)) < 0.6


def test_density_decides_what_is_drawn(problem, parts):
    # Rows of density 0 are never drawn: here they are NaN, of which one would end the run.
    train, held_out = parts
    poisoned, density = [], []
    for pool in (train.positives, train.negatives):
        bad = np.arange(len(pool)) % 3 == 0
        bad[-1] = True
        poisoned.append(np.where(bad[:, None], np.nan, pool).astype(np.float32))
        density.append(np.where(bad, 0.0, 1.0))
    train = train._replace(positives=poisoned[0], negatives=poisoned[1])
    fit = lambda density: genneg.fit_classifier(
        problem, Fit(train, held_out, PHI, jax.random.key(3), density), CLASSIFIER
    )
    assert np.isfinite(fit(tuple(density))["net"]["a"])
    with pytest.raises(FloatingPointError):
        fit(None)


def test_teacher_answers_with_the_guided_denoiser(exact_problem, gaussian):
    guided = genneg.append(Guided(THETA), {"net": jnp.float32(0.0), "shift": jnp.float32(0.0)})
    x0 = jnp.asarray(synthetic(500, gaussian).positives[:256])
    x, t, target = genneg.teach(exact_problem, None, guided, x0, jax.random.key(4))
    expected = jax.jit(jax.vmap(genneg.denoiser(exact_problem, guided)))(x, t)
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-6)
    # At the classifiers' times, which are log-uniform: Kolmogorov-Smirnov.
    times = stats.uniform(np.log(0.02), np.log(20.0) - np.log(0.02))
    assert stats.kstest(np.log(np.asarray(t)), times.cdf).pvalue > FALSE_ALARM
    assert len(np.unique(np.asarray(x))) == 256


def test_mixture_of_good_and_bad():
    good, bad = np.arange(5.0)[:, None], -np.arange(1.0, 4.0)[:, None]
    points = genneg.mixture(good, bad, 4000, jax.random.key(0), share=0.3)
    assert points.shape == (4000, 1)
    assert (points < 0).sum() == 1200
    # Each of the points of a class is as likely as the others: chi-squared.
    for pool in (good, bad):
        counts = [(points == value).sum() for value in pool[:, 0]]
        assert stats.chisquare(counts).pvalue > FALSE_ALARM
    assert (genneg.mixture(good, bad[:0], 8, jax.random.key(0), share=0.0) >= 0).all()
    with pytest.raises(ValueError, match="mixture: number of bad samples must be >= 1 and whole, got 0"):
        genneg.mixture(good, bad[:0], 8, jax.random.key(0))
    with pytest.raises(ValueError, match="mixture: share must be >= 0 and < 1, got 1"):
        genneg.mixture(good, bad, 8, jax.random.key(0), share=1.0)


def test_refit_learns_what_was_accepted(problem):
    # One point again and again: E[x_0 | x_t] is that point.
    accepted = np.full((64, 1), -0.5, np.float32)
    settings = genneg.StudentTraining(Settings(1000, 0.03, decay=0.9, every=1000), 64)
    psi = genneg.refit(problem, genneg.Points(accepted), THETA, settings, jax.random.key(5))
    x = -0.5 + stats.norm.ppf((np.arange(50) + 0.5) / 50).astype(np.float32)
    error = jax.jit(jax.vmap(lambda theta, x: problem.model(theta, x[None], jnp.float32(1.0))[0] + 0.5, (None, 0)))
    before, after = (float(jnp.mean(error(theta, x) ** 2)) for theta in (THETA, psi))
    assert after < 0.2 * before


@pytest.mark.parametrize("method", ["distill", "refit"])
def test_nothing_to_learn_from(method, problem):
    points, key = genneg.Points(np.zeros((0, 1), np.float32)), jax.random.key(0)
    lesson = genneg.Lesson(Guided(THETA), points, THETA, key)
    arguments = (lesson, STUDENT) if method == "distill" else (points, THETA, STUDENT, key)
    with pytest.raises(ValueError, match="number of samples must be >= 1 and whole, got 0"):
        getattr(genneg, method)(problem, *arguments)


def test_accepted_are_good(problem):
    samples = genneg.accepted(problem, Guided(THETA), jax.random.key(6), 2500, ROUNDS.budget, ROUNDS.batch)
    assert len(samples) >= 2500
    assert (samples < EDGE).all()
    with pytest.raises(ValueError, match="6000 draws must hold 6000 valid samples, got "):
        genneg.accepted(problem, Guided(THETA), jax.random.key(6), 6000, ROUNDS.budget, ROUNDS.batch)


# Rounds


def fewer(better: tuple[int, int], worse: tuple[int, int]) -> bool:
    """Has the first model fewer infractions, given (bad, good) of each?  Fisher's test, at the rate FALSE_ALARM."""
    return bool(stats.fisher_exact([better, worse], alternative="less").pvalue < FALSE_ALARM)


def judged(problem, guided) -> tuple[int, int]:
    draws = [genneg.draw(problem, guided, jax.random.key(seed), 2000) for seed in (98, 99)]
    bad = int((np.concatenate(draws) >= EDGE).sum())
    return bad, 4000 - bad


def labels(synthetic: Synthetic) -> tuple[int, int]:
    return int(synthetic.bad), int(synthetic.good)


def test_stack_of_rounds(problem, tmp_path):
    start = lambda key: jax.tree.map(jnp.asarray, PHI)
    archive = Archive(tmp_path)
    rounds = list(genneg.run(problem, THETA, start, ROUNDS, jax.random.key(7), archive))
    assert [each.number for each in rounds] == [1, 2]
    assert [count(each.guided) for each in rounds] == [1, 2]
    # alpha of each round is that of its own model, so it rises; so does that of the last model.
    base, second = labels(rounds[0].train), labels(rounds[1].train)
    assert fewer(second, base)
    assert fewer(judged(problem, rounds[1].guided), base)
    # Everything is in the archive: a second run asks no oracle, trains nothing, and is the same bit for bit.
    silent = problem._replace(oracle=None, network=None, kernel=None)
    again = list(genneg.run(silent, THETA, start, ROUNDS, jax.random.key(7), Archive(tmp_path)))
    for first, repeated in zip(rounds, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, first, repeated)


def test_round_that_is_distilled(problem):
    start = lambda key: jax.tree.map(jnp.asarray, PHI)
    student = genneg.StudentTraining(Settings(600, 0.02, decay=0.99, every=300), 128)
    settings = ROUNDS._replace(rounds=1, mode="distill", student=student, stored=8192)
    (only,) = genneg.run(problem, THETA, start, settings, jax.random.key(8))
    assert count(only.guided) == 0, "one network again"
    assert fewer(judged(problem, only.guided), labels(only.train))


def test_distilling_needs_settings_of_a_student(problem):
    settings = ROUNDS._replace(mode="distill")
    with pytest.raises(ValueError, match="student"):
        next(genneg.run(problem, THETA, lambda key: jax.tree.map(jnp.asarray, PHI), settings, jax.random.key(9)))


# Replay


@pytest.mark.parametrize("select", ["all", "balanced"])
def test_replay_weighs_all_rounds_back_to_the_first_model(select, problem, gaussian):
    # Classifiers that depend on x alone, so that round k's samples can be drawn exactly: p_0 thinned by C_1 .. C_{k-1}.
    # They are soft, and many samples are bad, so that the rounds' models and alphas differ well.
    soft = problem._replace(network=lambda phi, x, t: phi[0] * x[0] + phi[1])
    edge, (mean,), (std,) = 0.5, gaussian.means[0], gaussian.stds
    grid, rng, kept, rounds = np.linspace(mean - 6, mean + 6, 20_001), np.random.default_rng(0), [], []
    density = stats.norm.pdf(grid, mean, std)
    for k, slope in enumerate((-4.0, -4.0, -4.0)):
        # A classifier calibrated in the large: its mean is the share of good samples of its round's model.
        alpha = np.average(grid < edge, weights=density)
        share = density / density.sum()
        bias = lambda offset, slope=slope, share=share, alpha=alpha: expit(slope * grid + offset) @ share - alpha
        offset = optimize.brentq(bias, -20, 20)
        pool = gaussian.draw(10 + k, 60_000)[0]
        for thin in kept:
            pool = pool[rng.random(len(pool)) < thin(pool[:, 0])]
        good = pool[:, 0] < edge
        made = Synthetic(pool[good], pool[~good], alpha * len(pool), (1 - alpha) * len(pool))
        train, held_out = genneg.split(made, CLASSIFIER._replace(select=select), jax.random.key(k))
        classifier = {"net": jnp.array([slope, offset - 0.2], jnp.float32), "shift": jnp.float32(0.2)}
        rounds.append(genneg.Round(k + 1, Guided(THETA), classifier, train, held_out))
        kept.append(lambda x, slope=slope, offset=offset: expit(slope * x + offset))
        density = density * kept[-1](grid)
    train, held_out, weights = genneg.replay(rounds, soft)
    assert train.alpha == rounds[0].train.alpha
    assert held_out is rounds[0].held_out
    cut = (edge - mean) / std
    for samples, weight, ends in zip(
        (train.positives, train.negatives), weights, ((-np.inf, cut), (cut, np.inf)), strict=True
    ):
        expected = stats.truncnorm(*ends, mean, std).mean()
        values, share = samples[:, 0].astype(np.float64), weight / weight.sum()
        estimate = share @ values
        error = np.sqrt(np.sum(share**2 * (values - estimate) ** 2))
        # Normal test of a self-normalised mean (delta method).
        limit = stats.norm.isf(FALSE_ALARM / 2) * error
        assert abs(estimate - expected) < limit
    # Without the weights it is the mean of another model.
    assert abs(train.positives.mean() - stats.truncnorm(-np.inf, cut, mean, std).mean()) > 0.012


# Samples with conditions: the mean of the Gaussian, whose sample is good where it is below EDGE and above -EDGE.


@pytest.fixture(scope="module")
def conditional(gaussian) -> OracleProblem:
    """x_0 given m is N(m, std^2), two constraints: x_0 < EDGE and x_0 > -EDGE."""
    std = gaussian.stds[0]

    def model(theta, x, t):
        return theta["m"] + std**2 / (std**2 + t**2) * (x - theta["m"]) + 0 * theta["net"]

    def network(phi, x, t):
        expected = (phi["m"] + std**2 / (std**2 + t**2) * (x - phi["m"]))[0]
        spread = std * t / jnp.sqrt(std**2 + t**2)
        return phi["net"][0] * jnp.stack([EDGE - expected, expected + EDGE]) / spread + phi["net"][1]

    bind = lambda params, condition: {"net": params, "m": condition["mean"]}
    return OracleProblem(
        process=EDM,
        model=model,
        network=network,
        oracle=lambda samples, conditions: np.stack([samples[:, 0] < EDGE, samples[:, 0] > -EDGE], 1),
        shape=(1,),
        kernel=sampling.heun,
        steps=12,
        weight=losses.edm_weight(std),
        classifier_time=lambda key: jnp.exp(jax.random.uniform(key, (), minval=jnp.log(0.02), maxval=jnp.log(20.0))),
        chunk=128,
        bind=bind,
        bind_network=bind,
    )


MEANS = {"mean": np.array([-0.9, 0.1, 0.8], np.float32)}
THETA_0 = np.float32(0.0)


@pytest.fixture(scope="module")
def labelled(conditional) -> Synthetic:
    return genneg.collect(conditional, Guided(THETA_0), jax.random.key(5), 400, 6000, 2000, conditions=MEANS)


def test_each_sample_has_the_condition_that_it_was_drawn_for(conditional, labelled, gaussian):
    both = [np.concatenate([labelled.positives[name], labelled.negatives[name]]) for name in ("x", "row")]
    x, rows = both
    for row, mean in enumerate(MEANS["mean"]):
        of_row = x[rows == row, 0]
        assert stats.kstest(of_row, stats.norm(mean, gaussian.stds[0]).cdf).pvalue > FALSE_ALARM / 3
    assert labelled.positives["labels"].all()
    assert not labelled.negatives["labels"].all(1).any()
    np.testing.assert_array_equal(labelled.negatives["labels"][:, 0], labelled.negatives["x"][:, 0] < EDGE)
    share = np.concatenate([labelled.positives["labels"], labelled.negatives["labels"]]).mean()
    assert labelled.label_rate == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("phi", [(0.3, -0.5), (-0.8, 1.0)])
def test_scene_weights_leave_the_loss_of_each_label_unbiased(conditional, labelled, phi):
    """Batches of half good and half bad samples have, in the mean, the loss of all draws: of every label, also of those
    that are good in bad samples.  Without importance weights they have not.

    The network here knows no noise, so that the loss of a sample is a number: a mean over 400 batches of 64, five
    standard errors.
    """
    phi = np.asarray(phi, np.float32)
    network = lambda phi, x, t: jnp.stack([phi["net"][0], phi["net"][1]]) * jnp.where(phi["m"] > 0, 1.0, -0.5)
    setup = conditional._replace(network=network)
    sign = np.where(MEANS["mean"] > 0, 1.0, -0.5)

    def each(part):
        logits = phi[None] * sign[part["row"]][:, None]
        return (np.logaddexp(0, logits) - part["labels"] * logits).sum(1)

    everything = np.concatenate([each(labelled.positives), each(labelled.negatives)])
    found = {}
    for weighting in ("importance", "none"):
        how = CLASSIFIER._replace(weighting=weighting, validation=8)
        fit = Fit(labelled, labelled, phi, jax.random.key(1), conditions=jax.tree.map(jnp.asarray, MEANS))
        context = genneg.classifier_context(fit, how) | {"shift": jnp.float32(0)}
        task = genneg.classifier_task(setup, 32, 8)(context)

        def batch_loss(key, task=task):
            batch = task.draw(key)
            return jnp.mean(jax.vmap(task.loss, (None, None, 0))(phi, jax.random.key(0), batch))

        found[weighting] = np.asarray(
            jax.jit(lambda keys: jax.lax.map(batch_loss, keys))(jax.random.split(jax.random.key(7), 400))
        )
    error = lambda values: abs(values.mean() - everything.mean()) / (values.std() / 20)
    assert error(found["importance"]) < 5
    assert error(found["none"]) > 5


def test_shifted_odds_are_of_one_label(conditional, labelled):
    train, held_out = genneg.split(labelled, CLASSIFIER, jax.random.key(0))
    how = CLASSIFIER._replace(weighting="shift")
    fit = Fit(train, held_out, np.zeros(2, np.float32), jax.random.key(1), conditions=MEANS)
    with pytest.raises(ValueError, match="must be 'importance' or 'none' for samples with several labels, got 'shift'"):
        genneg.fit_classifier(conditional, fit, how)


def test_relabelled_changes_labels_alone(labelled):
    changed = labelled.relabelled(lambda labels: labels.all(-1))
    assert changed.negatives["labels"].shape == (len(labelled.negatives["x"]),)
    assert changed.label_rate == changed.alpha
    assert changed.positives["x"] is labelled.positives["x"]


def test_a_classifier_of_several_constraints_keeps_most_of_them(conditional, labelled):
    """A round with conditions, from a network that knows nothing: fewer bad samples, of every condition."""
    train, held_out = genneg.split(labelled, CLASSIFIER, jax.random.key(0))
    settings = CLASSIFIER._replace(validation=200)
    start = np.array([0.0, 0.0], np.float32)
    fit = Fit(train, held_out, start, jax.random.key(1), conditions=jax.tree.map(jnp.asarray, MEANS))
    classifier = genneg.fit_classifier(conditional, fit, settings)
    guided = genneg.append(Guided(THETA_0), classifier)
    rows = np.repeat(np.arange(3), 2000)
    given = {"mean": MEANS["mean"][rows]}
    bad = lambda x: ~((x[:, 0] < EDGE) & (x[:, 0] > -EDGE)).reshape(3, -1)
    before = bad(np.asarray(genneg.draw(conditional, Guided(THETA_0), jax.random.key(2), 6000, conditions=given)))
    after = bad(np.asarray(genneg.draw(conditional, guided, jax.random.key(3), 6000, conditions=given)))
    assert (after.mean(1) < 0.6 * before.mean(1)).all()
    untrained = genneg.append(Guided(THETA_0), {"net": jnp.asarray(start), "shift": jnp.zeros(())})
    same = bad(np.asarray(genneg.draw(conditional, untrained, jax.random.key(3), 6000, conditions=given)))
    assert (same.mean(1) > 0.8 * before.mean(1)).all()


def test_the_teacher_answers_for_the_sample_s_own_condition(conditional, gaussian):
    x0, rows = np.zeros((30, 1), np.float32), np.arange(30) % 3
    x, t, target = genneg.teach(conditional, None, Guided(THETA_0), x0, jax.random.key(4), MEANS, rows)
    mean, variance = MEANS["mean"][rows], gaussian.stds[0] ** 2
    expected = mean + variance / (variance + np.asarray(t) ** 2) * (np.asarray(x)[:, 0] - mean)
    np.testing.assert_allclose(np.asarray(target)[:, 0], expected, atol=1e-5)


def test_conditions_without_bind_are_an_error(problem):
    with pytest.raises(ValueError, match="problem must have bind and bind_network for conditions"):
        genneg.bound(problem, Guided(THETA), {"mean": 0.0})
    with pytest.raises(ValueError, match="verdicts must be m Booleans a sample"):
        genneg.collect(
            problem._replace(bind=lambda p, c: p, bind_network=lambda p, c: p, oracle=lambda x, c: x[:, 0] < EDGE),
            Guided(THETA), jax.random.key(0), 10, 100, 100, conditions=MEANS,
        )  # fmt: skip


def test_a_classifier_of_another_network_is_refused_and_kept(problem, tmp_path):
    start = lambda key: jax.tree.map(jnp.asarray, PHI)
    quick = ROUNDS._replace(rounds=1)
    run = lambda start: next(genneg.run(problem, THETA, start, quick, jax.random.key(7), Archive(tmp_path)))
    first = run(start)
    wide = lambda key: jax.tree.map(lambda a: jnp.zeros((*a.shape, 2)), start(key))
    with pytest.raises(CheckpointError, match=r"net\.a must be float32 \(2,\), got float32 \(\)"):
        run(wide)
    jax.tree.map(np.testing.assert_array_equal, first, run(start))


# Numbers, shapes and types that cannot be used


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, g, key: genneg.draw(p, g, key, 0), "genneg.draw: n must be >= 1 and whole, got 0"),
        (lambda p, g, key: genneg.draw(p, g, key, -5), "genneg.draw: n must be >= 1 and whole, got -5"),
        (lambda p, g, key: genneg.draw(p, g, key, 5, scale=np.nan), "genneg.draw: scale must be a finite number"),
        (lambda p, g, key: genneg.draw(p._replace(steps=0), g, key, 5), "edm: grid: n must be >= 1"),
        (lambda p, g, key: genneg.draw(p._replace(chunk=0), g, key, 5), "chunked: chunk must be >= 1"),
        (lambda p, g, key: genneg.draw(p, g, key, 5, conditions=MEANS), "rows of the conditions must be >= 5 and <= 5"),
        (lambda p, g, key: genneg.collect(p, g, key, 0, 10, 10), "genneg.collect: per_class must be >= 1"),
        (lambda p, g, key: genneg.collect(p, g, key, 1, 0, 10), "genneg.collect: budget must be >= 1"),
        (lambda p, g, key: genneg.collect(p, g, key, 1, 10, 0), "genneg.collect: batch must be >= 1"),
        (lambda p, g, key: genneg.collect(p, g, key, 1, 9, 9, conditions=np.ones((0, 2))), "rows of the conditions"),
        (lambda p, g, key: genneg.accepted(p, g, key, 0, 10), "genneg.accepted: n must be >= 1"),
        (lambda p, g, key: genneg.accepted(p, g, key, 5, 10, 0), "genneg.accepted: batch must be"),
        (lambda p, g, key: genneg.mixture(MEANS, MEANS, 0, key), "mixture: n must be >= 1 and whole, got 0"),
        (lambda p, g, key: next(genneg.run(p, THETA, None, ROUNDS._replace(rounds=0), key)), "genneg: rounds must be"),
        (lambda p, g, key: next(genneg.run(p, THETA, None, ROUNDS._replace(mode="x"), key)), "genneg: mode must be"),
        (
            lambda p, g, key: genneg.refit(p, genneg.Points(np.ones((4, 1))), THETA, STUDENT._replace(batch=0), key),
            "refit: batch must be >= 1",
        ),
        (
            lambda p, g, key: genneg.refit(p, genneg.Points(np.full((4, 1), np.nan)), THETA, STUDENT, key),
            "refit: accepted must",
        ),
        (
            lambda p, g, key: genneg.distill(
                p, genneg.Lesson(g, genneg.Points(np.array([[1.0], [np.inf]])), THETA, key), STUDENT
            ),
            "x0 must be",
        ),
    ],
)
def test_numbers_out_of_range_are_named(call, message, problem):
    with pytest.raises(ValueError, match=message):
        call(problem, Guided(THETA), jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"half": 0}, "genneg: half must be >= 1 and whole, got 0"),
        ({"validation": -1}, "genneg: validation must be >= 1 and whole, got -1"),
        ({"held_out": 1.0}, "genneg: held_out must be >= 0 and < 1, got 1.0"),
        ({"weighting": "Importance"}, "genneg: weighting must be 'importance' or 'shift' or 'none', got 'Importance'"),
        ({"select": "both"}, "genneg: select must be 'all' or 'balanced', got 'both'"),
    ],
)
def test_settings_of_a_classifier_are_checked(changes, message, problem, gaussian):
    how = CLASSIFIER._replace(**changes)
    with pytest.raises(ValueError, match=message):
        genneg.fit_classifier(
            problem, Fit(*genneg.split(synthetic(50, gaussian), how, jax.random.key(0)), PHI, jax.random.key(1)), how
        )


@pytest.mark.parametrize(("bad", "message"), [(np.nan, "got nan"), (-1.0, "got -1.0"), (np.inf, "got inf")])
def test_a_density_is_finite(bad, message, problem, parts):
    # The cumulative sum, from which rows are drawn, would carry it on to all rows after it.
    density = [np.ones(len(pool)) for pool in (parts[0].positives, parts[0].negatives)]
    density[1][3] = bad
    with pytest.raises(ValueError, match=f"genneg: density of the negatives must be >= 0, {message} among"):
        genneg.fit_classifier(problem, Fit(*parts, PHI, jax.random.key(3), tuple(density)), CLASSIFIER)
    for wrong in (density[0][:-1], 0 * density[0]):
        with pytest.raises(ValueError, match="density of the positives must "):
            genneg.fit_classifier(problem, Fit(*parts, PHI, jax.random.key(3), (wrong, density[0])), CLASSIFIER)


@pytest.mark.parametrize("wrong", [lambda x: jnp.zeros((3, 1)), lambda x: jnp.zeros(1), lambda x: x[:2]])
def test_a_model_of_another_shape_draws_nothing(wrong, problem):
    own = problem._replace(model=lambda theta, x, t: wrong(x), shape=(3,))
    classifier = {"net": jnp.float32(0.0), "shift": jnp.float32(0.0)}
    linear = own._replace(network=lambda phi, x, t: phi * jnp.sum(x))
    for setup, guided in ((own, Guided(THETA)), (linear, genneg.append(Guided(THETA), classifier))):
        with pytest.raises(ValueError, match=r"x_0 of the denoiser must have shape \(3,\), got \("):
            genneg.draw(setup, guided, jax.random.key(0), 4)
    with pytest.raises(ValueError, match=r"x_0 of the denoiser must have shape \(3,\), got \("):
        genneg.teach(own, None, Guided(THETA), jnp.zeros((4, 3)), jax.random.key(0))
