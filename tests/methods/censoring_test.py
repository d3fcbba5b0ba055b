"""The identities of censored sampling, on problems whose denoiser and reward have closed forms."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gendiff import guidance, losses, process, sampling, steps, training, types
from gendiff.checkpoint import Archive
from gendiff.methods import censoring
from gendiff.methods.censoring import Censoring, Imitation, Labelled, LabelProblem, Request, RewardTraining, Sets
from gendiff.nets import resnet
from gendiff.nets.conv import Linear
from gendiff.training import Settings

DDPM = process.ddpm(process.linear_betas(200))
FALSE_ALARM = 1e-4
NONE = {"shift": jnp.zeros(1)}
UNBOUNDED = {"low": -jnp.inf, "high": jnp.inf}


def bump(phi, x, t):
    return jnp.sum(jnp.sin(3 * x)) + phi["shift"] + 0 * t


def plain(theta, x, t):
    return jnp.tanh(x) + 0.1 + 0 * t


def problem(steps=200, **changes):
    return LabelProblem(DDPM, plain, bump, (3,), steps, **changes)


def drawn(settings, rewards=NONE, steps=20, n=64, **changes):
    return censoring.draw(problem(steps, **changes), None, rewards, settings, jax.random.key(0), n)


# Guidance


@pytest.mark.parametrize("mode", ["ddpm", "ddim"])
def test_no_guidance_is_the_plain_sampler(mode):
    # omega = 0, R = 1, B = 0: bit for bit the model's own samples, and those of the plain kernel with clipping.
    # Optimised as in experiments, because unoptimised programs contract other products.
    optimised = {"compiler_options": {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}}
    program = partial(censoring.drawn, problem(20), Censoring(scale=0.0, mode=mode), 64, None, None)
    key = lambda: jax.random.key(0)
    off, _ = jax.jit(lambda: program(NONE, key(), 0.0, jnp.int32(1)), **optimised)()
    np.testing.assert_array_equal(off, jax.jit(lambda: program(None, key(), 0.0, jnp.int32(1)), **optimised)()[0])
    np.testing.assert_allclose(off, drawn(Censoring(scale=0.0, mode=mode)), atol=1e-6)
    clipped = guidance.clip(-1.0, 1.0)(lambda x, t: plain(None, x, t))
    kernel = sampling.ddim(DDPM, clipped) if mode == "ddim" else sampling.ancestral(DDPM, clipped, "beta")
    sample = lambda key: sampling.sample(DDPM, kernel, DDPM.grid(20), key, (3,))
    np.testing.assert_allclose(off, jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), 64)), atol=1e-6)


@pytest.mark.parametrize("steps", [200, 40, 7])
@pytest.mark.parametrize("omega", [0.5, 3.0])
def test_mean_is_shifted_by_beta_omega_gradient(steps, omega):
    # On respaced grids too, with the beta of the respaced chain: 1 - (alpha_t / alpha_s)^2 where s > 0.
    grid = np.asarray(DDPM.grid(steps))
    x = jnp.array([0.3, -0.2, 0.7])
    own = problem(steps, **UNBOUNDED)
    gradient = jax.grad(lambda x: censoring.log_reward(own)({"shift": jnp.zeros(())}, x, jnp.int32(5)))(x)
    kernels = [censoring.kernel(own, None, NONE, Censoring(scale=scale)) for scale in (omega, 0.0)]
    for t, s in list(itertools.pairwise(grid))[:: max(1, steps // 5)]:
        guided, not_guided = (np.float64(kernel(jax.random.key(1), x, t, s)) for kernel in kernels)
        ratio = np.float64(DDPM.alpha(t)) / np.float64(DDPM.alpha(s))
        expected = (1 - ratio**2) * omega * np.float64(gradient)
        np.testing.assert_allclose(guided - not_guided, expected, rtol=2e-2, atol=2e-6)


def test_ddim_shifts_the_score():
    # eps' = eps - sigma omega g, so the implied score is the model's plus omega g.
    x, t = jnp.array([0.3, -0.2, 0.7]), jnp.int32(60)
    own = problem(**UNBOUNDED)
    shifted = guidance.steer(
        lambda x, t: 2.0 * censoring.log_reward(own)({"shift": jnp.zeros(())}, x, t), guidance.score_strength(DDPM)
    )(lambda x, t: plain(None, x, t))
    eps = lambda x0: (x - DDPM.alpha(t) * x0) / DDPM.sigma(t)
    gradient = jax.grad(lambda x: censoring.log_reward(own)({"shift": jnp.zeros(())}, x, t))(x)
    expected = eps(plain(None, x, t)) - DDPM.sigma(t) * 2.0 * gradient
    np.testing.assert_allclose(eps(shifted(x, t)), expected, rtol=1e-5, atol=1e-6)
    step = censoring.kernel(own, None, NONE, Censoring(scale=2.0, mode="ddim"))(jax.random.key(0), x, t, jnp.int32(59))
    x0 = shifted(x, t)
    np.testing.assert_allclose(step, DDPM.alpha(59) * x0 + DDPM.sigma(59) * eps(x0), rtol=1e-5)


@pytest.mark.parametrize("universal", [False, True])
def test_copies_are_scale(universal):
    many = drawn(Censoring(scale=0.7, universal=universal), {"shift": jnp.zeros(3)})
    np.testing.assert_allclose(many, drawn(Censoring(scale=2.1, universal=universal)), rtol=1e-4, atol=1e-5)


def test_runs_that_draw_together_draw_as_alone():
    own = problem(20)
    of_run = lambda k: Request(
        None, {"shift": jnp.full(2, 0.1 * k)}, Censoring(scale=1.0 + k, recurrence=1 + k), jax.random.key(k)
    )
    together = censoring.draw_all(own, [of_run(k) for k in range(3)], 8)
    for k, samples in enumerate(together):
        alone = censoring.draw(own, *of_run(k), 8)
        np.testing.assert_allclose(samples, alone, rtol=1e-4, atol=1e-5)
    other = of_run(0)._replace(settings=Censoring(mode="ddim"))
    with pytest.raises(ValueError, match="settings of runs must agree but for scale and recurrence"):
        censoring.draw_all(own, [of_run(0), other], 8)


def test_universal_gradient_goes_through_the_model():
    # With a linear model x_0_hat = A x the gradient is A^T grad log r(A x).
    matrix = jnp.array([[0.5, 0.2], [-0.3, 0.8]])
    reward = lambda x0: jnp.sum(jnp.sin(x0) * jnp.array([1.0, 2.0]))
    x = jnp.array([0.4, -0.9])
    guided = guidance.universal(reward, lambda t: 0.3)(lambda x, t: matrix @ x)(x, jnp.int32(4))
    expected = matrix @ x + 0.3 * matrix.T @ jax.grad(reward)(matrix @ x)
    np.testing.assert_allclose(guided, expected, rtol=1e-5)


@given(steps=st.integers(0, 12), rate=st.sampled_from([1e-3, 0.02, 0.3]))
def test_backward_moves_at_most_steps_times_rate(steps, rate):
    x = jnp.array([-1.4, -0.2, 0.1, 0.95])
    reward = lambda x0: jnp.sum(5 * x0 + jnp.sin(4 * x0))
    up = guidance.backward(reward, steps, rate)(lambda x, t: x)(x, jnp.int32(3))
    clipped = np.clip(x, -1, 1)
    assert (np.abs(up - clipped) <= steps * rate * 1.01 + 1e-6).all()
    assert (np.abs(up) <= 1).all()
    if steps:
        assert float(reward(up)) > float(reward(jnp.asarray(clipped)))
    else:
        np.testing.assert_array_equal(up, clipped)


def test_backward_is_adam():
    optax = pytest.importorskip("optax")
    reward = lambda x0: jnp.sum(jnp.sin(4 * x0))
    optimiser, x = optax.adam(0.05), jnp.array([0.2, -0.4])
    moments, expected = optimiser.init(x), x
    for _ in range(4):
        change, moments = optimiser.update(-jax.grad(reward)(expected), moments)
        expected = jnp.clip(expected + change, -1, 1)
    up = guidance.backward(reward, 4, 0.05)(lambda x, t: x)(x, jnp.int32(3))
    np.testing.assert_allclose(up, expected, rtol=1e-5)


def test_successor_is_the_next_time_of_the_grid():
    for grid in (DDPM.grid(7), DDPM.grid(200), process.edm().grid(5)):
        after = jax.jit(jax.vmap(guidance.successor(grid)))(grid[:-1])
        np.testing.assert_array_equal(after, grid[1:])


# Distributions


@pytest.mark.parametrize("times", [1, 4])
def test_recurrence_keeps_the_marginal(times):
    # x_0 ~ N(0, 0.5^2) with its exact denoiser: x_t stays N(0, alpha^2 0.5^2 + sigma^2).  Kolmogorov-Smirnov.
    exact = lambda x, t: DDPM.alpha(t) * 0.25 / (DDPM.alpha(t) ** 2 * 0.25 + DDPM.sigma(t) ** 2) * x

    # The posterior of a Gaussian adds the variance of x_0 given x_t, so one step is exact in distribution.
    def kernel(key, x, t, s):
        mean, variance = process.posterior(DDPM, x, exact(x, t), t, s)
        left = 0.25 * DDPM.sigma(t) ** 2 / (DDPM.alpha(t) ** 2 * 0.25 + DDPM.sigma(t) ** 2)
        _, step = process.transition(DDPM, t, s)
        spread = variance + (DDPM.alpha(s) * step / DDPM.sigma(t) ** 2) ** 2 * left
        return mean + jnp.sqrt(spread) * jax.random.normal(key, x.shape)

    t, s, n = 120, 60, 20_000
    std = lambda t: np.sqrt(np.float64(DDPM.alpha(t)) ** 2 * 0.25 + np.float64(DDPM.sigma(t)) ** 2)
    x = std(t) * jax.random.normal(jax.random.key(1), (n,))
    keys = jax.random.split(jax.random.key(2), n)
    moved = jax.jit(jax.vmap(sampling.recurrent(DDPM, kernel, times), (0, 0, None, None)))(keys, x, t, s)
    assert stats.kstest(np.asarray(moved), stats.norm(scale=std(s)).cdf).pvalue > FALSE_ALARM


def test_recurrence_is_that_many_passes():
    # A kernel that adds 1: the last pass counts, and each pass but the last is noised back.
    kernel = lambda key, x, t, s: x + 1
    once = sampling.recurrent(DDPM, kernel, 1)(jax.random.key(0), jnp.zeros(4), 50, 49)
    np.testing.assert_array_equal(once, 1.0)
    ratio, variance = process.transition(DDPM, 50, 49)
    back = jax.jit(jax.vmap(lambda key: sampling.recurrent(DDPM, kernel, 3)(key, jnp.zeros(()), 50, 49)))
    values = np.asarray(back(jax.random.split(jax.random.key(1), 20_000)), np.float64)
    # (((0 + 1) a + z) + 1) a + z' + 1: mean 1 + a + a^2, variance v (1 + a^2).
    a, v = float(ratio), float(variance)
    assert abs(values.mean() - (1 + a + a**2)) < stats.norm.isf(FALSE_ALARM / 2) * np.sqrt(v * (1 + a**2) / 20_000)
    np.testing.assert_allclose(values.var(), v * (1 + a**2), rtol=0.05)
    with pytest.raises(ValueError, match="recurrent: times must be >= 1 and whole, got 0"):
        sampling.recurrent(DDPM, kernel, 0)


def exact_problem(mixture, steps):
    def logit(phi, x, t):
        log_good = mixture.log_good(DDPM)(x, t)
        return log_good - jnp.log(-jnp.expm1(jnp.minimum(log_good, -1e-6))) + phi["shift"]

    model = lambda theta, x, t: mixture.denoiser(DDPM)(x, t)
    return LabelProblem(DDPM, model, logit, (2,), steps, low=-jnp.inf, high=jnp.inf, chunk=4096)


@pytest.mark.parametrize(
    "settings", [Censoring(), Censoring(mode="ddim"), Censoring(recurrence=2)], ids=["ddpm", "ddim", "recurrence"]
)
def test_exact_reward_samples_what_is_benign(mixture, settings):
    # omega = 1 and the exact r_t: samples follow p(x) r(x) / Z.  Distance of the distribution functions of both axes:
    # the sampler's own bias at 200 steps is below 0.015, the rest is Kolmogorov's bound for 20,000 samples.
    n = 20_000
    samples = censoring.draw(exact_problem(mixture, 200), None, NONE, settings, jax.random.key(3), n)
    good = mixture.part(True)
    for axis in (0, 1):
        order = np.sort(samples[:, axis])
        distance = np.abs(good.cdf(axis, order) - (np.arange(n) + 0.5) / n).max()
        assert distance < 0.015 + stats.kstwobign.isf(FALSE_ALARM / 2) / np.sqrt(n)


def test_rejection_samples_what_is_benign(mixture):
    x, _ = mixture.draw(5, 40_000)
    own = exact_problem(mixture, 200)
    kept = x[censoring.reject(own, NONE, x, jax.random.key(1))]
    assert abs(len(kept) / len(x) - mixture.alpha) < 0.02  # r at the least noise is not quite the label
    good = mixture.part(True)
    for axis in (0, 1):
        order = np.sort(kept[:, axis])
        distance = np.abs(good.cdf(axis, order) - (np.arange(len(kept)) + 0.5) / len(kept)).max()
        assert distance < 0.01 + stats.kstwobign.isf(FALSE_ALARM / 2) / np.sqrt(len(kept))


# Labels and rewards


def test_marking_stops_at_the_first_moment_with_enough():
    stream = np.arange(100, dtype=np.float32)[:, None]
    rater = lambda x: x[:, 0] % 5 != 4  # 4, 9, 14 .. are malign
    batches = iter(np.split(stream, 10))
    marked = censoring.mark(lambda key: next(batches), rater, 3, 2, 100, jax.random.key(0))
    np.testing.assert_array_equal(marked.malign[:, 0], [4, 9, 14])
    assert (marked.seen, len(marked.benign)) == (15, 12)


def test_runs_that_mark_together_mark_as_alone():
    # Run 0 has enough after one batch, run 1 after three; the keys and samples are those of each alone.
    batches = lambda key: jax.random.uniform(key, (8, 1))
    raters = [lambda x: x[:, 0] > 0.5, lambda x: x[:, 0] > 0.05]
    calls = []

    def batches_of_runs(runs, keys):
        calls.append(runs)
        return [batches(key) for key in keys]

    keys = list(jax.random.split(jax.random.key(0), 2))
    together = censoring.mark_all(batches_of_runs, raters, 1, 2, 200, keys)
    assert calls[0] == [0, 1]
    assert calls[-1] == [1]
    for k, labelled in enumerate(together):
        alone = censoring.mark(batches, raters[k], 1, 2, 200, keys[k])
        jax.tree.map(np.testing.assert_array_equal, labelled, alone)


@pytest.mark.parametrize(
    ("malign", "benign", "message"),
    [(0, 1, "malign must be >= 1"), (1, -2, "benign must be >= 1"), (30, 1, "within 50, got ")],
)
def test_marking_with_too_little(malign, benign, message):
    with pytest.raises(ValueError, match=message):
        censoring.mark(lambda key: np.ones((20, 1)), lambda x: x[:, 0] > 0, malign, benign, 50, jax.random.key(0))


def test_bootstrap_shares_the_malign():
    labelled = Labelled(np.arange(3.0)[:, None], 10 + np.arange(40.0)[:, None], 43)
    pairs = censoring.bootstrap(labelled, 5, 10, jax.random.key(0))
    for malign, benign in pairs:
        np.testing.assert_array_equal(malign, labelled.malign)
        assert len(np.unique(benign)) == 10  # without replacement within a member
        assert set(benign[:, 0]) <= set(labelled.benign[:, 0])
    assert len({tuple(benign[:, 0]) for _, benign in pairs}) == 5
    malign, benign = censoring.union(pairs)
    assert len(malign) == 3
    assert 10 < len(benign) <= 40
    with pytest.raises(ValueError, match="number of benign labels must be >= 41 and whole, got 40"):
        censoring.bootstrap(labelled, 2, 41, jax.random.key(0))
    with pytest.raises(ValueError, match="number of malign labels must be >= 1 and whole, got 0"):
        censoring.bootstrap(labelled._replace(malign=labelled.malign[:0]), 2, 5, jax.random.key(0))


def test_augmentation_keeps_originals_and_labels():
    pairs = [(np.zeros((2, 8, 8, 1)), np.ones((3, 8, 8, 1)))] * 2
    sets = censoring.augmented(pairs, 4, jax.random.key(0), lambda key, image: image + jax.random.uniform(key))
    assert sets.images.shape == (2, 25, 8, 8, 1)
    np.testing.assert_array_equal(sets.images[:, :5], np.stack([np.concatenate(pair) for pair in pairs]))
    for images, labels in zip(sets.images, sets.labels, strict=True):
        np.testing.assert_array_equal(labels == 1, images[:, 0, 0, 0] >= 1)
    assert len(np.unique(sets.images[:, 5:, 0, 0, 0])) == 40  # each copy its own
    fewer = [*pairs, (pairs[0][0], pairs[0][1][:1])]
    with pytest.raises(ValueError, match=r"equally many labels, got \(malign, benign\) \[\(2, 1\), \(2, 3\)\]"):
        censoring.augmented(fewer, 4, jax.random.key(0), lambda key, image: image)


def test_rotation_turns_by_at_most_the_angle():
    # A bar through the centre of a large image: its angle, by the principal axis, stays within the range.
    y, x = np.mgrid[-20:21, -20:21]
    bar = np.where((np.abs(x) < 1.5) & (np.abs(y) < 15), 1.0, -1.0)[..., None].astype(np.float32)
    turned = jax.vmap(censoring.rotation(20.0), (0, None))(jax.random.split(jax.random.key(0), 200), bar)
    angles = []
    for image in np.asarray(turned)[..., 0] + 1:
        xx, xy, yy = ((image * a).sum() for a in (x * x, x * y, y * y))
        angles.append(np.degrees(0.5 * np.arctan2(2 * xy, yy - xx)))
    assert np.abs(angles).max() < 20.5
    assert stats.kstest(angles, stats.uniform(-20, 40).cdf).pvalue > FALSE_ALARM
    np.testing.assert_allclose(censoring.rotation(0.0)(jax.random.key(0), bar), bar, atol=1e-5)


def line(phi, x, t):
    return phi["a"] * x[0] + phi["b"] + 0 * t


@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_benign_weight_shifts_the_logit(weight):
    # Labels that x tells nothing about: the optimum is logit(p) + ln(alpha).
    labels = np.repeat([0.0, 1.0], [100, 300])
    sets = Sets(np.zeros((2, 400, 1), np.float32), np.stack([labels, labels]))
    own = LabelProblem(DDPM, plain, lambda phi, x, t: phi["b"] + 0 * x[0], (1,), 10)
    settings = RewardTraining(Settings(1500, 0.05, decay=0.99, every=500, clip=None), 512, weight)
    start = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    state = censoring.fit(own, sets, start, settings, jax.random.key(0))
    np.testing.assert_allclose(state.averaged["b"], np.log(3) + np.log(weight), atol=0.06)


def test_members_train_as_they_would_alone():
    # One program for K members: each moves by its own gradient only.  Full batches of one example make it exact.
    images = np.float32([[[0.5]], [[-1.0]]])
    sets = Sets(images, np.float32([[1.0], [0.0]]))
    own = LabelProblem(DDPM, plain, line, (1,), 10)
    both = np.float32([[[0.5], [-1.0]]] * 2), np.float32([[1.0, 0.0]] * 2)
    settings = RewardTraining(Settings(40, 0.05, decay=0.0, every=20, schedule="linear", clip=None), 8, 0.3)
    with pytest.raises(ValueError, match="number of malign labels of a reward must be >= 1 and whole, got 0"):
        censoring.fit(own, sets, {"a": jnp.zeros(2), "b": jnp.zeros(2)}, settings, jax.random.key(0))
    sets = Sets(*both)
    start = {"a": jnp.array([0.0, 0.5]), "b": jnp.array([0.0, -0.5])}
    state = censoring.fit(own, sets, start, settings, jax.random.key(0))
    other = {"a": jnp.array([0.0, 9.0]), "b": jnp.array([0.0, 3.0])}
    changed = censoring.fit(own, sets, other, settings, jax.random.key(0))
    np.testing.assert_array_equal(state.last["a"][0], changed.last["a"][0])
    assert state.last["a"][1] != changed.last["a"][1]


# Rewards of clean samples, whose layers normalise by the batch


class Normed(nn.Module):
    """A norm as a ResNet has them, without what is slow to compile."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(resnet.BatchNorm()(nn.Dense(4, use_bias=False)(x), train))
        return Linear(1)(jnp.mean(x, (0, 1)))[0]


NET = Normed()
CLEAN = LabelProblem(
    DDPM, plain, line, (3, 2, 1), 10, clean=NET.apply, in_batch=lambda phi, x: resnet.in_batch(NET, phi, x), chunk=6
)
CLEAN_TRAINING = RewardTraining(
    Settings(4, 0.01, decay=0.0, every=2, schedule="linear", clip=None, weight_decay=0.05), 8, 0.3
)
IMAGES = np.random.default_rng(0).normal(size=(2, 6, 3, 2, 1)).astype(np.float32)
# Fewer than a batch; the second member has fewer malign ones.
LABELS = np.float32([[0, 1, 0, 1, 0, 1], [1, 1, 1, 0, 1, 1]])


@pytest.fixture(scope="module")
def fresh():
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.jit(jax.vmap(NET.init, (0, None)))(keys, IMAGES[0, 0])


@jax.jit
def logits_in_batch(phi, images):
    """h (K, n), each member's by the moments of all its images."""
    of_member = jax.vmap(lambda phi, x: CLEAN.in_batch(phi, x)[0], (None, 0), axis_name=types.BATCH)
    return jax.vmap(of_member)(phi, images)


def test_clean_rewards_are_evaluated_with_the_moments_of_their_training_set(fresh):
    # Not of the padding, of another member or of the last batch: evaluation is training with the whole set as batch.
    trained = censoring.fit(CLEAN, Sets(IMAGES, LABELS), fresh, CLEAN_TRAINING, jax.random.key(0)).last
    expected = jax.nn.log_sigmoid(logits_in_batch(trained, IMAGES))
    for k in range(2):
        values = censoring.scores(CLEAN, trained, IMAGES[k])[:, k]
        np.testing.assert_allclose(values, expected[k], rtol=1e-3, atol=1e-5)
    before = jax.tree.map(lambda a, b: np.abs(a - b).reshape(2, -1).max(1), trained["params"], fresh["params"])
    assert min(map(np.min, jax.tree.leaves(before))) > 0, "all layers of both are trained"


def test_clean_loss_is_the_weighted_cross_entropy_and_its_gradient_reaches_all_layers(fresh):
    # Stated for a whole batch at once; a batch has examples first and members second.
    weights = np.where(LABELS == 1, np.float32(0.3), np.float32(1.0))

    def expected(phi):
        h = logits_in_batch(phi, IMAGES)
        log_r, log_not = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
        return -jnp.sum(jnp.mean(0.3 * LABELS * log_r + (1 - LABELS) * log_not, 1))

    context = (IMAGES, LABELS, jnp.int32(6), jnp.float32(0.3))
    loss = losses.mean(censoring.reward_task(CLEAN, 8)(context).loss)
    batch = jax.tree.map(lambda a: a.swapaxes(0, 1), (IMAGES, LABELS, weights))
    result = jax.jit(jax.value_and_grad(loss))(fresh, jax.random.key(0), batch)
    value, gradient = jax.jit(jax.value_and_grad(expected))(fresh)
    np.testing.assert_allclose(result[0], value, rtol=1e-5)
    largest = lambda tree: [float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-5), result[1], gradient)
    assert min(largest(gradient["params"])) > 1e-4
    assert max(largest(result[1]["batch_stats"])) == 0  # they are no part of the training


def test_clean_rewards_train_together_as_alone(fresh):
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 6, (4, 8, 2))
    member = np.arange(2)
    weights = np.where(LABELS == 1, np.float32(0.3), np.float32(1.0))
    batches = [tuple(a[member, chosen] for a in (IMAGES, LABELS, weights)) for chosen in rows]
    context = (IMAGES, LABELS, jnp.int32(6), jnp.float32(0.3))
    fit = lambda start, data: training.train(
        jax.random.key(0), start, censoring.reward_task(CLEAN, 8), context, CLEAN_TRAINING.training, data=data
    ).last["params"]
    together = fit(fresh, batches)
    for k in member:
        only = lambda tree, axis, k=k: jax.tree.map(lambda a: np.take(a, [k], axis), tree)
        alone = fit(only(fresh, 0), only(batches, 1))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), only(together, 0), alone)


def test_clean_rewards_say_that_they_diverged(fresh):
    broken = jax.tree.map(lambda a: np.nan * a, fresh)
    with pytest.raises(training.NotFinite, match="must be finite, got nan by step 2"):
        censoring.fit(CLEAN, Sets(IMAGES, LABELS), broken, CLEAN_TRAINING, jax.random.key(0))


def test_disagreement_is_the_spread_of_the_members():
    own = LabelProblem(DDPM, plain, line, (1,), 10)
    rewards = {"a": jnp.array([0.0, 4.0]), "b": jnp.zeros(2)}
    x = np.float32([[0.0], [2.0], [-2.0]])
    np.testing.assert_allclose(
        censoring.disagreement(own, rewards, x), [0, *2 * [np.abs(1 / (1 + np.exp(-8)) - 0.5) / 2]], atol=1e-6
    )


# Imitation


def imitation_rounds(tmp_path, steps=(20, 60, 100), name="imitation", **changes):
    own = LabelProblem(DDPM, lambda theta, x, t: 0.3 * x + theta, line, (1,), 10)
    settings = RewardTraining(Settings(0, 0.05, decay=0.0, every=20, schedule="linear", clip=None), 16, 0.5)
    prepare = lambda labelled, key: censoring.augmented([labelled[:2]], 1, key, lambda key, x: x)
    start = lambda key: {"a": jnp.zeros(()), "b": 0 * jax.random.normal(key)}
    imitation = Imitation(steps, 4, settings, Censoring(scale=2.0), batch=16, **changes)
    return list(
        censoring.imitate(
            own, jnp.float32(0.1), start, lambda x: x[:, 0] > 0.2, prepare, imitation, jax.random.key(0),
            Archive(tmp_path), name=name,
        )
    )  # fmt: skip


def test_imitation_adds_labels_and_trains_on(tmp_path):
    rounds = imitation_rounds(tmp_path)
    assert [len(result.labelled.malign) for result in rounds] == [4, 8, 12]
    assert [len(result.labelled.benign) for result in rounds] == [4, 8, 12]
    # The first labels stay, later rounds add others.
    np.testing.assert_array_equal(rounds[2].labelled.malign[:4], rounds[0].labelled.malign)
    again = imitation_rounds(tmp_path)
    np.testing.assert_array_equal(again[-1].rewards["a"], rounds[-1].rewards["a"])
    # An earlier stop, resumed: the same numbers.
    part = imitation_rounds(tmp_path / "part", steps=(20, 60))
    np.testing.assert_array_equal(part[-1].rewards["a"], rounds[1].rewards["a"])
    resumed = imitation_rounds(tmp_path / "part")
    np.testing.assert_array_equal(resumed[-1].rewards["a"], rounds[-1].rewards["a"])


def test_without_imitation_all_labels_are_of_the_model(tmp_path):
    blind = imitation_rounds(tmp_path, rounds_see=False, name="non-imitation")
    seen = imitation_rounds(tmp_path)
    np.testing.assert_array_equal(blind[0].labelled.malign, seen[0].labelled.malign)
    assert not np.array_equal(blind[1].labelled.malign, seen[1].labelled.malign)


def test_rate_of_later_rounds_follows_the_global_step():
    # 3e-4 (1 - 500 / 1501) = 2.0e-4 and 3e-4 (1 - 1500 / 3001) = 1.5e-4 at the first step of rounds 2 and 3.
    for done, total, expected in ((500, 1501, 2.0e-4), (1500, 3001, 1.5e-4)):
        optimiser = steps.adam(Settings(total, 3e-4, schedule="linear", clip=None))
        state = steps.init(jax.random.key(0), jnp.float32(0.0), optimiser)
        counted = jax.tree.map(
            lambda a, done=done: jnp.full((), done, a.dtype) if a.dtype == jnp.int32 else a, state.optimiser
        )
        step = steps.make_step(lambda params, key, example: params * example, optimiser)
        moved, _ = step(state._replace(optimiser=counted), jnp.full(2, 1e6))
        # Late steps have all but no bias correction: Adam's first move is rate (1 - b1) / sqrt(1 - b2).
        np.testing.assert_allclose(-moved.last * np.sqrt(1 - 0.999) / (1 - 0.9), expected, rtol=0.6)


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Censoring(recurrence=0), "recurrence must be >= 1 and whole, got 0"),
        (Censoring(backward=-1), "backward must be >= 0 and whole, got -1"),
        (Censoring(scale=-1.0), "scale must be >= 0, got -1"),
        (Censoring(scale=float("nan")), "scale must be >= 0, got nan"),
        (Censoring(backward_rate=-0.1), "backward_rate must be >= 0, got -0.1"),
        (Censoring(mode="euler"), "mode must be 'ddpm' or 'ddim', got 'euler'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        drawn(settings)


def test_guidance_that_diverges_says_where_and_keeps_the_rest():
    # The gradient overflows for samples above 0.5 only.
    own = problem(20)._replace(network=lambda phi, x, t: jnp.where(x[0] > 0.5, jnp.nan, 0.0) * x[0] + phi["shift"])
    with pytest.raises(censoring.Diverged, match=r"first in step \d+ of 20, with scale 3: .* Lower the scale") as error:
        censoring.draw(own, None, NONE, Censoring(scale=3.0), jax.random.key(0), 64)
    assert np.isfinite(error.value.samples).all()


def test_evaluations():
    own = problem(50)
    assert censoring.evaluations(own, Censoring(), 0) == 50
    assert censoring.evaluations(own, Censoring(), 5) == 50 * (1 + 15)
    assert censoring.evaluations(own, Censoring(recurrence=4, backward=5), 5) == 200 * (1 + 15 + 75)
    assert censoring.evaluations(own, Censoring(universal=True), 1) == 50 * 6


# Samples, images and rewards that cannot be used


@pytest.mark.parametrize("rater", [lambda x: x[:, 0] > 0, lambda x: np.ones(len(x))])
@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (lambda key: np.zeros((0, 1)), "number of samples must be >= 1 and whole, got 0"),
        (lambda key: np.zeros(()), "samples must be arrays with one number of rows"),
        (lambda key: next(iter(())), "batches must give samples, got none"),
        (lambda key: np.array([[1.0], [np.nan]]), "samples must be a finite number, got nan among 2 values"),
        (lambda key: np.array([[-np.inf], [1.0]]), "samples must be a finite number, got -inf among 2 values"),
    ],
    ids=["empty", "scalar", "ended", "nan", "infinite"],
)
def test_marking_ends_where_no_sample_can_be_marked(draws, message, rater):
    with pytest.raises(ValueError, match=f"^censoring.mark: {message}"):
        censoring.mark(draws, rater, 3, 3, 50, jax.random.key(0))


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_is_a_number_of_samples(budget):
    with pytest.raises(ValueError, match=f"censoring.mark: budget must be >= 1 and whole, got {budget}"):
        censoring.mark(lambda key: np.ones((4, 1)), lambda x: np.ones(4), 1, 1, budget, jax.random.key(0))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 255.0, -6.0])
def test_images_of_another_range_are_refused(bad, fresh):
    # 0..255 in place of [-1, 1]: networks that have never seen such numbers answer all the same.
    images = IMAGES.copy()
    images[0, 1, 2, 1, 0] = bad
    with pytest.raises(ValueError, match=r"images, of range \[-1, 1\], must be >= -5 and <= 5, got "):
        censoring.fit(CLEAN, Sets(images, LABELS), fresh, CLEAN_TRAINING, jax.random.key(0))
    own, rewards = LabelProblem(DDPM, plain, line, (3,), 10), {"a": jnp.ones(2), "b": jnp.zeros(2)}
    samples = np.float32([[0.1, 0.2, 0.3], [0.1, bad, 0.0]])
    for use in (
        lambda: censoring.disagreement(own, rewards, samples),
        lambda: censoring.reject(own, rewards, samples, jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match=r"samples, of range \[-1, 1\], must be >= -5 and <= 5, got "):
            use()


def test_rewards_that_are_no_numbers_keep_nothing_unseen():
    own = LabelProblem(DDPM, plain, lambda phi, x, t: jnp.where(x[0] > 0.5, phi["bad"], x[0]), (1,), 10)
    x = np.float32([[0.1], [0.2], [0.9]])
    bad = lambda value: {"bad": jnp.full(2, value)}
    for use in (
        lambda: censoring.reject(own, bad(np.nan), x, jax.random.key(0)),
        lambda: censoring.disagreement(own, bad(np.nan), x),
    ):
        with pytest.raises(ValueError, match="log-rewards must be <= 0, got nan among"):
            use()
    keep = censoring.reject(own, bad(-np.inf), x, jax.random.key(0))
    assert not keep[2], "a reward of 0"
    with pytest.raises(ValueError, match="reject: largest log-reward must be a finite number, got -inf"):
        censoring.reject(own, bad(-np.inf), x[2:], jax.random.key(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drawn(Censoring(), n=0), "censoring.draw: n must be >= 1 and whole, got 0"),
        (lambda: drawn(Censoring(), chunk=0), "chunked: chunk must be >= 1 and whole, got 0"),
        (lambda: drawn(Censoring(), low=1.0, high=-1.0), "clip: high - low must be >= 0, got -2.0"),
        (lambda: censoring.rotation(-5.0), "rotation: degrees must be >= 0, got -5.0"),
        (lambda: censoring.evaluations(problem(), Censoring(), -1), "evaluations: members must be >= 0"),
        (lambda: censoring.augmented([], 1, jax.random.key(0), None), "augmented: pairs must be >= 1"),
        (lambda: censoring.reject(problem(), NONE, np.zeros((2, 3)), jax.random.key(0), -1.0), "reject: scale must be"),
    ],
)
def test_numbers_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_rewards_of_a_narrower_type_are_compared_in_float32():
    own = LabelProblem(DDPM, plain, lambda phi, x, t: (phi["b"] + x[0]).astype(jnp.bfloat16), (1,), 10)
    rewards, x = {"b": jnp.zeros(2)}, np.float32([[0.5], [-0.5]])
    assert censoring.scores(own, rewards, x).dtype == jnp.float32
    np.testing.assert_allclose(censoring.scores(own, rewards, x), np.tile(-np.logaddexp(0, -x), 2), rtol=0.01)
    wrong = own._replace(network=lambda phi, x, t: phi["b"] + x)
    with pytest.raises(ValueError, match=r"clean reward: the scalar value must have shape \(\), got \(1,\)"):
        censoring.reject(wrong, rewards, x, jax.random.key(0))


@pytest.mark.parametrize(("steps", "message"), [((), "got 0"), ((0, 5), "got 0"), ((20, 20), "got 0"), ((5, 2), "-3")])
def test_rounds_of_imitation_go_on(tmp_path, steps, message):
    with pytest.raises(ValueError, match=f"imitate: steps .* must be >= 1 and whole, .*{message}"):
        imitation_rounds(tmp_path, steps=steps)
