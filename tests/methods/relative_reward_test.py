import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gendiff import denoiser, losses, process, sampling, training
from gendiff.methods import relative_reward
from gendiff.methods.relative_reward import PRINCIPLED, PUBLISHED, Diffusion, Models, PoolRequest, Switches

FALSE_ALARM = 1e-4
CHAIN = process.ddpm(process.cosine_betas(100))
EDM = process.edm()


def gaussian(p, mean, std):
    """The denoiser of N(mean, std^2 I), and log p_t up to its constant."""

    def variance(t):
        return p.alpha(t) ** 2 * std**2 + p.sigma(t) ** 2

    def model(x, t):
        return mean + p.alpha(t) * std**2 / variance(t) * (x - p.alpha(t) * mean)

    return model, lambda x, t: -0.5 * jnp.sum((x - p.alpha(t) * mean) ** 2) / variance(t)


BASE, LOG_BASE = gaussian(CHAIN, jnp.float32([0.5, -0.2]), 0.5)
EXPERT, LOG_EXPERT = gaussian(CHAIN, jnp.float32([-0.4, 0.3]), 0.3)


def log_ratio(x, t):
    return LOG_EXPERT(x, t) - LOG_BASE(x, t)


@pytest.mark.parametrize(
    ("target", "of"),
    [
        ("score", lambda d: denoiser.to_score(CHAIN, d)),
        ("noise", lambda d: lambda x, t: -denoiser.to_epsilon(CHAIN, d)(x, t)),
        ("x0", lambda d: d),
        ("mean", lambda d: lambda x, t: process.posterior(CHAIN, x, d(x, t), t, t - 1)[0]),
    ],
)
@pytest.mark.parametrize("t", [1, 30, 99])
def test_targets_are_the_differences_that_they_are_named_after(target, of, t):
    x = jnp.float32([0.3, 0.7])
    expected = of(EXPERT)(x, t) - of(BASE)(x, t)
    field = relative_reward.difference(CHAIN, BASE, EXPERT, target)(x, t)
    np.testing.assert_allclose(field, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("target", ["mean", "score", "x0", "noise"])
def test_steering_with_the_true_ratio_gives_the_expert(target):
    scale = lambda t: relative_reward.factor(CHAIN, target)(t) / relative_reward.factor(CHAIN, "score")(t)
    rho = lambda x, t: scale(t) * log_ratio(x, t)
    switches = Switches(target=target)
    steered = relative_reward.steer(CHAIN, rho, switches)(BASE)
    x = jnp.float32([0.3, 0.7])
    for t in (1, 20, 80):
        np.testing.assert_allclose(steered(x, t), EXPERT(x, t), rtol=1e-3, atol=1e-4)
        half = relative_reward.steer(CHAIN, rho, switches, 0.5)(BASE)
        np.testing.assert_allclose(half(x, t), 0.5 * (BASE(x, t) + EXPERT(x, t)), rtol=1e-3, atol=1e-4)


def test_the_published_gradient_is_taken_at_the_base_mean():
    rho = lambda x, t: jnp.sum(x**3)
    x, t = jnp.float32([0.3, 0.7]), 30
    mean = process.posterior(CHAIN, x, BASE(x, t), t, t - 1)[0]
    expected = BASE(x, t) + 3 * mean**2 / relative_reward.factor(CHAIN, "mean")(t)
    steered = relative_reward.steer(CHAIN, rho, PUBLISHED)(BASE)
    np.testing.assert_allclose(steered(x, t), expected, rtol=1e-5)
    experts = lambda x, t: jnp.stack([EXPERT(x, t), BASE(x, t)])
    example = relative_reward.examples(CHAIN, BASE, experts, PUBLISHED)(jax.random.key(0), x)
    assert example.target.shape == (2, 2)
    np.testing.assert_array_equal(example.target[1], 0)


def network(phi, x, t):
    """A quadratic in x whose coefficients are learned functions of time: the family that holds the true ratio."""
    u = t / 100.0
    hidden = jnp.tanh(phi["w"] * u + phi["b"])
    coefficients = hidden @ phi["out"] + phi["last"]
    return coefficients[0] * jnp.sum(x**2) + coefficients[1:] @ x


def fresh(key):
    w_key, out_key = jax.random.split(key)
    w, out = 4 * jax.random.normal(w_key, (32,)), 0.1 * jax.random.normal(out_key, (32, 3))
    return {"w": w, "b": jnp.linspace(-3, 3, 32), "out": out, "last": jnp.zeros(3)}


@pytest.fixture(scope="module")
def fitted():
    """Two seeds against two experts: the true one, and the base model itself."""
    experts = lambda x, t: jnp.stack([BASE(x, t), EXPERT(x, t)])
    example = jax.jit(jax.vmap(relative_reward.examples(CHAIN, BASE, experts, PRINCIPLED)))
    n = 20_000
    keys = jax.random.split(jax.random.key(1), n)
    x0 = 0.6 * jax.random.normal(jax.random.key(2), (n, 2))
    pool = example(keys, x0)
    problem = relative_reward.PairProblem(CHAIN, network, 256)
    start = jax.vmap(fresh)(jax.random.split(jax.random.key(3), 4))
    settings = training.Settings(3000, 2e-2, every=1000, clip=None)
    goals = jnp.array([1, 1, 0, 0])
    job = relative_reward.reward_training(problem, pool, goals, start, settings, jax.random.key(4))
    return training.train(*job).last, goals, pool


def test_the_potential_is_the_log_ratio(fitted):
    phi = jax.tree.map(lambda a: a[0], fitted[0])
    x = jnp.float32([[-0.9, 0.4], [0.2, 0.1], [0.8, -0.9], [0.0, 0.0]])
    for t in (2, 20, 50, 80):
        rho = jax.vmap(lambda x, t=t: network(phi, x, t) / CHAIN.sigma(t))(x)  # the target is sigma times the score's
        exact = jax.vmap(lambda x, t=t: log_ratio(x, t))(x)
        # up to a constant for each t; near the data, where sigma is small, the division enlarges the error of the fit
        tolerance = 0.02 * float(jnp.ptp(exact)) + 0.01 / float(CHAIN.sigma(t))
        np.testing.assert_allclose(rho - rho[-1], exact - exact[-1], atol=tolerance)


def test_steering_turns_one_gaussian_into_the_other(fitted):
    phi = jax.tree.map(lambda a: a[0], fitted[0])
    steered = relative_reward.steer(CHAIN, lambda x, t: network(phi, x, t), PRINCIPLED)(BASE)
    grid, n = CHAIN.grid(100), 3000

    def drawn(model, seed):
        draw = lambda key: sampling.sample(CHAIN, sampling.ancestral(CHAIN, model), grid, key, (2,))
        return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(seed), n)))

    ours, theirs, before = drawn(steered, 1), drawn(EXPERT, 2), drawn(BASE, 3)
    for axis in (0, 1):  # four comparisons in all
        assert stats.ks_2samp(ours[:, axis], theirs[:, axis]).pvalue > FALSE_ALARM / 2
        assert stats.ks_2samp(before[:, axis], theirs[:, axis]).pvalue < FALSE_ALARM


def test_the_fit_is_measured_by_noise_level(fitted):
    rewards, goals, pool = fitted
    fits = relative_reward.quality(
        network, rewards, goals, jax.tree.map(lambda a: a[:2000], pool), np.array([1, 10, 101])
    )
    assert fits[0].r2.shape == (2,)
    assert min(fits[0].overall, fits[1].overall, *fits[0].r2) > 0.98
    # By hand, for one reward.
    few = jax.tree.map(lambda a: a[:50], pool)
    phi = jax.tree.map(lambda a: a[0], rewards)
    slopes = jax.vmap(jax.grad(network, 1), (None, 0, 0))(phi, few.x, few.t)
    expected = 1 - np.sum((slopes - few.target[:, 1]) ** 2) / np.sum(few.target[:, 1] ** 2)
    fit = relative_reward.quality(network, rewards, goals, few, np.array([1, 101]))[0]
    np.testing.assert_allclose([fit.overall, fit.r2[0]], expected, rtol=1e-4)


@pytest.mark.parametrize("mode", ["reverse", "directional"])
def test_second_order_gradients_against_finite_differences(mode):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 4)
        phi = {"a": jax.random.normal(keys[0], (3, 4), jnp.float64), "b": jax.random.normal(keys[1], (4,), jnp.float64)}
        rho = lambda phi, x, t: jnp.sum(jnp.tanh(x @ phi["a"] + t) * phi["b"])
        x, y = jax.random.normal(keys[2], (2, 3), jnp.float64)
        example = losses.Aligned(x, jnp.float64(0.3), y, jnp.array([1.0, 0.0, 2.0]))
        loss = lambda phi: losses.gradient_alignment(rho, mode)(phi, keys[3], example)
        value, gradient = jax.value_and_grad(loss)(phi)
        slopes = jax.grad(rho, 1)(phi, x, example.t)
        np.testing.assert_allclose(value, np.mean([1.0, 0.0, 2.0] * np.asarray(slopes - y) ** 2), rtol=1e-12)
        step = 1e-6
        for name, leaf in phi.items():
            for i in range(leaf.size):
                bump = jnp.zeros(leaf.size).at[i].set(step).reshape(leaf.shape)
                plain = lambda phi: jnp.mean(
                    example.weight * (jax.grad(rho, 1)(phi, x, example.t) - y) ** 2
                )  # the value alone: the surrogate of "directional" has none of its own
                up, down = plain(phi | {name: leaf + bump}), plain(phi | {name: leaf - bump})
                np.testing.assert_allclose(gradient[name].ravel()[i], (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


def test_asymmetry_tells_gradients_from_rotations():
    symmetric = jnp.float32([[1.0, 0.4, 0.0], [0.4, -2.0, 0.3], [0.0, 0.3, 0.5]])
    turning = jnp.float32([[0.0, 1.0, -0.5], [-1.0, 0.0, 0.2], [0.5, -0.2, 0.0]])
    share = lambda a, probes: (
        np.sqrt(np.divide(*relative_reward.asymmetry(lambda x, t: a @ x, jnp.ones(3), 0.0, jax.random.key(0), probes)))
        / 2
    )
    assert share(symmetric, 4) < 1e-6
    np.testing.assert_allclose(share(turning, 4), 1.0, rtol=1e-5)
    mixed = symmetric + turning
    exact = np.linalg.norm(mixed - mixed.T) / (2 * np.linalg.norm(mixed))
    np.testing.assert_allclose(share(mixed, 4000), exact, rtol=0.05)
    # Both of our Gaussians are conservative, and so is their difference.
    field = relative_reward.difference(CHAIN, BASE, EXPERT, "score")
    top, bottom = relative_reward.asymmetry(field, jnp.float32([0.1, 0.9]), 40, jax.random.key(1))
    assert float(top) < 1e-6 * float(bottom)


def test_the_line_integral_is_the_difference_of_log_ratios():
    field = relative_reward.difference(CHAIN, BASE, EXPERT, "score")
    a, b = jnp.float32([0.9, -0.3]), jnp.float32([-0.6, 0.5])
    for t in (5, 60):
        integral = relative_reward.line_integral(field, a, b, t)
        np.testing.assert_allclose(integral, log_ratio(b, t) - log_ratio(a, t), rtol=1e-3)
    # Without a potential it depends on the path: around a circle's quarter against its chord.
    turn = lambda x, t: jnp.stack([-x[1], x[0]])
    around = relative_reward.line_integral(turn, jnp.float32([1, 0]), jnp.float32([0, 1]), 0)
    np.testing.assert_allclose(around, 1.0, rtol=1e-5)  # the quarter gives pi / 2


def test_a_pool_is_its_examples_one_by_one():
    model = lambda shift, x, t: BASE(x + shift, t)
    thetas, key = jnp.float32([0.3, -0.2, 0.9]), jax.random.key(5)
    x0 = jax.random.normal(jax.random.key(6), (7, 2))
    known = jnp.array([True, False])
    request = PoolRequest(jnp.float32(0.0), thetas, known, key, x0)
    pool = relative_reward.pools(Models(CHAIN, model), [request], 3)[0]
    key = jax.random.key(5)  # the same again, on purpose
    assert pool.target.shape == (7, 3, 2)
    np.testing.assert_array_equal(pool.weight, np.tile([0.0, 1.0], (7, 1)))
    np.testing.assert_array_equal(pool.x[:, 0], x0[:, 0])  # given, not noised
    for i, own in enumerate(jax.random.split(key, 7)):
        x, t = losses.noised(CHAIN, own, x0[i])
        x = x.at[0].set(x0[i, 0])
        assert int(t) == int(pool.t[i])
        for g in range(3):
            expected = CHAIN.alpha(t) / CHAIN.sigma(t) * (model(thetas[g], x, t) - model(0.0, x, t))
            np.testing.assert_allclose(pool.target[i, g], expected, rtol=1e-4, atol=1e-5)


def test_pools_of_several_runs_are_those_of_one():
    model = lambda shift, x, t: BASE(x + shift, t)
    request = lambda k: PoolRequest(
        jnp.float32(0.1 * k), jnp.float32([0.3, -0.2]), None, jax.random.key(k), np.full((5, 2), 0.1 * k, np.float32)
    )
    pools = relative_reward.pools(Models(CHAIN, model), [request(k) for k in range(3)], 4)
    for k, pool in enumerate(pools):
        alone = relative_reward.pools(Models(CHAIN, model), [request(k)], 4)[0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), pool, alone)


def test_paths_need_no_data():
    experts = lambda x, t: EXPERT(x, t)[None]
    path = relative_reward.along_paths(CHAIN, BASE, BASE, experts, PRINCIPLED, CHAIN.grid(100), (2,))
    many = jax.jit(jax.vmap(path, (0, None)))(jax.random.split(jax.random.key(0), 4000), jnp.zeros(2))
    assert many.target.shape == (4000, 100, 1, 2)
    np.testing.assert_array_equal(many.t[0], CHAIN.grid(100)[:-1])
    # The states of a path are draws of the base model's marginals.
    states, t = many.x[:, 60], 40
    exact = CHAIN.alpha(t) * np.float32([0.5, -0.2])
    error = stats.norm.isf(FALSE_ALARM / 4) * states.std(0) / 4000**0.5
    assert np.all(np.abs(states.mean(0) - exact) < error + 0.01)  # a step is exact for small steps only
    field = relative_reward.difference(CHAIN, BASE, EXPERT, "noise")
    np.testing.assert_allclose(many.target[7, 60, 0], field(states[7], t), rtol=1e-3, atol=1e-5)


def test_paths_hold_what_the_models_are_given():
    known, clean = jnp.array([False, True]), jnp.float32([0.0, 0.7])
    experts = lambda x, t: EXPERT(x, t)[None]
    path = relative_reward.along_paths(CHAIN, BASE, BASE, experts, PRINCIPLED, CHAIN.grid(10), (2,), known)
    examples = path(jax.random.key(0), clean)
    np.testing.assert_array_equal(examples.x[:, 1], np.full(10, 0.7, np.float32))
    np.testing.assert_array_equal(examples.weight, np.tile([1.0, 0.0], (10, 1)))


def test_any_two_models_make_examples():
    base, expert = Diffusion("base", CHAIN, BASE, (2,)), Diffusion("expert", CHAIN, EXPERT, (2,))
    x0 = jax.random.normal(jax.random.key(1), (5, 2))
    pool = relative_reward.pool_of_models(base, [expert, base], PRINCIPLED, jax.random.key(0), x0)
    assert pool.target.shape == (5, 2, 2)
    field = relative_reward.difference(CHAIN, BASE, EXPERT, "noise")
    np.testing.assert_allclose(pool.target[:, 0], jax.vmap(field)(pool.x, pool.t), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(pool.target[:, 1], 0)
    with pytest.raises(ValueError, match=r"relative reward: x0 must have shape \(n, 2\), got \(5, 3\)"):
        relative_reward.pool_of_models(base, [expert], PRINCIPLED, jax.random.key(0), jnp.zeros((5, 3)))
    other = expert._replace(process=process.ddpm(process.linear_betas(100)))
    with pytest.raises(ValueError, match="must have one process"):
        relative_reward.pool_of_models(base, [other], PRINCIPLED, jax.random.key(0), x0)


def test_weighting_makes_the_error_that_of_another_difference():
    experts = lambda x, t: EXPERT(x, t)[None]
    x, t = jnp.float32([0.3, 0.7]), jnp.int32(30)
    of = lambda target, weighting: relative_reward.aligned(
        CHAIN, BASE, experts, Switches(target=target, weighting=weighting), x, t
    )
    mean, noise = of("mean", "noise"), of("noise", "target")
    size = lambda example: jnp.sum(example.weight * example.target[0] ** 2)  # the error of no reward at all
    np.testing.assert_allclose(size(mean), size(noise), rtol=1e-4)
    np.testing.assert_array_equal(noise.weight, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process": process.ddpm(process.linear_betas(100))}, "base and expert must have one process"),
        ({"process": process.ddpm(process.cosine_betas(50))}, "must have one process"),
        ({"shape": (3,), "denoiser": lambda x, t: x}, r"must have one shape, got \(2,\) and \(3,\)"),
        ({"denoiser": lambda x, t: x[:1]}, r"x_0 of expert must have shape \(2,\), got \(1,\)"),
        ({"normaliser": (np.zeros(2), np.ones(2))}, "base and expert must have one normaliser.*PRINCIPLED"),
    ],
)
def test_two_models_that_do_not_fit_are_named(changes, message):
    base = Diffusion("base", CHAIN, BASE, (2,), (np.zeros(2), 2 * np.ones(2)))
    expert = Diffusion("expert", CHAIN, EXPERT, (2,), base.normaliser)
    relative_reward.check_pair(base, expert)
    with pytest.raises(ValueError, match=message):
        relative_reward.check_pair(base, expert._replace(**changes))


def test_the_published_switch_allows_two_normalisers():
    base = Diffusion("base", CHAIN, BASE, (2,), (np.zeros(2), np.ones(2)))
    relative_reward.check_pair(base, base._replace(name="expert", normaliser=(np.zeros(2), 3 * np.ones(2))), PUBLISHED)


def test_targets_that_are_not_finite_are_named():
    bad = losses.Aligned(
        jnp.zeros((3, 2)), jnp.array([5, 9, 7]), jnp.zeros((3, 2, 2)).at[1, 1, 0].set(jnp.nan), jnp.ones((3, 2))
    )
    problem = relative_reward.PairProblem(CHAIN, network)
    start = jax.vmap(fresh)(jax.random.split(jax.random.key(3), 2))
    with pytest.raises(ValueError, match="got 1 examples of 6 that are not, the first at t = 9, of expert 1"):
        relative_reward.reward_training(
            problem, bad, jnp.array([0, 1]), start, training.Settings(10), jax.random.key(0)
        )


def test_goals_out_of_range_are_named():
    examples = losses.Aligned(jnp.zeros((3, 2)), jnp.array([5, 9, 7]), jnp.zeros((3, 2, 2)), jnp.ones((3, 2)))
    start = jax.vmap(fresh)(jax.random.split(jax.random.key(3), 2))
    problem = relative_reward.PairProblem(CHAIN, network)
    with pytest.raises(ValueError, match="goals must be >= 0 and <= 1 and whole, got 2 among 2 values"):
        relative_reward.reward_training(
            problem, examples, jnp.array([0, 2]), start, training.Settings(10), jax.random.key(0)
        )


def test_a_process_without_steps_has_no_mean():
    with pytest.raises(ValueError, match="at 'base_mean' needs a process with steps"):
        relative_reward.steer(EDM, lambda x, t: 0.0, Switches("x0", "base_mean"))(lambda x, t: x)(jnp.zeros(2), 1.0)
    with pytest.raises(ValueError, match="target 'mean' must have a process with steps"):
        relative_reward.factor(EDM, "mean")
    with pytest.raises(ValueError, match="target must be 'mean' or 'score' or 'x0' or 'noise', got 'v'"):
        relative_reward.factor(EDM, "v")


@pytest.mark.parametrize(
    ("x0", "message"),
    [
        (np.float32([[0.1, 0.2], [np.nan, 0.0]]), "x0 must be a finite number, got nan among 4 values"),
        (np.float32([[0.1, -np.inf]]), "x0 must be a finite number, got -inf among 2 values"),
        (np.zeros((0, 2), np.float32), "number of x0 must be >= 1 and whole, got 0"),
    ],
)
def test_data_that_make_no_examples_are_named(x0, message):
    base, expert = Diffusion("base", CHAIN, BASE, (2,)), Diffusion("expert", CHAIN, EXPERT, (2,))
    model = lambda mean, x, t: mean + x
    with pytest.raises(ValueError, match=f"relative reward: {message}"):
        relative_reward.pool_of_models(base, [expert], PRINCIPLED, jax.random.key(0), x0)
    request = PoolRequest(0.0, jnp.zeros(2), None, jax.random.key(0), x0)
    with pytest.raises(ValueError, match=f"relative reward: {message}"):
        relative_reward.pools(Models(CHAIN, model), [request])


def test_models_of_another_shape_are_named():
    x, experts = jnp.float32([0.3, 0.7]), lambda x, t: EXPERT(x, t)[None]
    narrow = lambda x, t: BASE(x, t)[:1]
    rho = lambda x, t: jnp.sum(x**3)
    for call in (
        lambda: relative_reward.aligned(CHAIN, narrow, experts, PRINCIPLED, x, 30),
        lambda: relative_reward.aligned(CHAIN, BASE, EXPERT, PRINCIPLED, x, 30),
        lambda: relative_reward.aligned(CHAIN, BASE, lambda x, t: narrow(x, t)[None], PRINCIPLED, x, 30),
        lambda: relative_reward.aligned(CHAIN, BASE, experts, PRINCIPLED, x, 30, jnp.ones(1, bool)),
        lambda: relative_reward.difference(CHAIN, BASE, narrow, "noise")(x, 30),
        lambda: relative_reward.steer(CHAIN, rho, PUBLISHED)(narrow)(x, 30),
        lambda: relative_reward.steer(CHAIN, lambda x, t: x[:1], PUBLISHED)(BASE)(x, 30),
        lambda: relative_reward.steer(CHAIN, lambda x, t: x[:1], PRINCIPLED)(BASE)(x, 30),
        lambda: relative_reward.asymmetry(narrow, x, 30, jax.random.key(0)),
        lambda: relative_reward.line_integral(narrow, x, -x, 30),
        lambda: relative_reward.line_integral(BASE, x, -x[:1], 30),
    ):
        with pytest.raises(ValueError, match=r"must have shape \(.*\), got \("):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, key: relative_reward.asymmetry(BASE, x, 30, key, 0), "asymmetry: probes must be >= 1"),
        (lambda x, key: relative_reward.line_integral(BASE, x, -x, 30, -1), "line_integral: nodes must be >= 1"),
        (lambda x, key: relative_reward.strength(CHAIN, PRINCIPLED, np.nan), "relative reward: scale must be"),
        (lambda x, key: relative_reward.steer(CHAIN, None, Switches(at="y")), "relative reward: at must be 'x' or"),
        (
            lambda x, key: relative_reward.pools(Models(CHAIN, None), [PoolRequest(0.0, None, None, key, x[None])], 0),
            "relative reward: piece must be >= 1",
        ),
        (
            lambda x, key: relative_reward.pool_of_models(
                Diffusion("b", CHAIN, BASE, (2,)), [], PRINCIPLED, key, x[None]
            ),
            "relative reward: experts must be >= 1",
        ),
        (
            lambda x, key: relative_reward.quality(network, None, [], None, np.array([5, 5, 1])),
            "quality: change from a bound to the next must be > 0, got 0 among 2 values",
        ),
    ],
)
def test_numbers_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(jnp.float32([0.3, 0.7]), jax.random.key(0))


def test_a_model_that_gives_nan_makes_no_examples():
    base = Diffusion("base", CHAIN, BASE, (2,))
    broken = Diffusion("expert", CHAIN, lambda x, t: x / 0.0, (2,))
    with pytest.raises(ValueError, match=r"relative reward: targets, .* must be a finite number, got (nan|inf|-inf)"):
        relative_reward.pool_of_models(base, [broken], PRINCIPLED, jax.random.key(0), jnp.ones((4, 2)))


def test_bounds_cover_every_time_once():
    for steps in (20, 100):
        bounds = relative_reward.tenths(process.ddpm(process.cosine_betas(steps)))
        assert bounds[0] == 1
        assert bounds[-1] == steps + 1
        assert np.all(np.diff(bounds) > 0)


def test_means_and_deviations_by_time():
    values = np.array([[1.0, 3.0, 10.0], [2.0, 2.0, -1.0]])
    mean, spread = relative_reward.by_time(values, np.array([1, 1, 3]), 3)
    np.testing.assert_array_equal(mean, [[0, 2, 0, 0], [0, 2, 0, 0]])
    np.testing.assert_allclose(spread, [[1, 1, 1, 1], [1, 1e-12, 1, 1]])
