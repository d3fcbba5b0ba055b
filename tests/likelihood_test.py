import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gendiff import guidance, likelihood, process

EDM = process.edm()
LOW, HIGH, STD = 0.002, 80.0, 0.5
FALSE_ALARM = 1e-4
"""Of a statistical test."""

D = 1000
X0 = (STD * stats.norm.ppf((np.arange(D) + 0.5) / D)).astype(np.float32)
"""One example of D numbers spread as N(0, STD^2): its bound per dimension is a mean over data."""
SQUARE = float(np.mean(X0.astype(np.float64) ** 2))


def repeat(estimate, repeats: int) -> np.ndarray:
    """Independent estimates, per dimension."""
    return (
        np.asarray(jax.jit(lambda keys: jax.lax.map(estimate, keys))(jax.random.split(jax.random.key(0), repeats))) / D
    )


def agree(values: np.ndarray, expected: float) -> bool:
    """Student's test of the mean, at the rate FALSE_ALARM."""
    return bool(stats.ttest_1samp(values, expected).pvalue > FALSE_ALARM)


def edm_bound(diffusion: float, low: float = LOW, high: float = HIGH) -> float:
    """-L_prior - L_diff - L_rec per dimension."""
    return -diffusion - SQUARE / (2 * high**2) - 0.5 * np.log(2 * np.pi * np.e * low**2)


def exact(x, sigma):
    return STD**2 / (STD**2 + sigma**2) * x


def exact_bound(low: float = LOW, high: float = HIGH) -> float:
    """Closed form for `exact`: with u = sigma^2, E || x_0 - D ||^2 / sigma^2 = (u x_0^2 + STD^4) / (STD^2 + u)^2."""
    v = STD**2
    primitive = lambda u: -SQUARE / (2 * (v + u)) + 0.5 * (np.log(u / (v + u)) + v / (v + u))
    return edm_bound(primitive(high**2) - primitive(low**2), low, high)


EDGES = STD * np.geomspace(0.01, 10, 151)
SHARES = np.array([1.0, *1 / (1 + EDGES[1:] * EDGES[:-1] / STD**2), 0.0])


def stairs(x, sigma):
    """A coarse `exact`: its coefficient is constant over ranges of sigma."""
    return jnp.asarray(SHARES, jnp.float32)[jnp.searchsorted(jnp.asarray(EDGES, jnp.float32), sigma)] * x


def stairs_bound() -> float:
    """Closed form for `stairs`: a denoiser c x has E || x_0 - D ||^2 / sigma^2 = (1 - c)^2 x_0^2 / sigma^2 + c^2."""
    a, b = np.append(LOW, EDGES), np.append(EDGES, HIGH)
    terms = (1 - SHARES) ** 2 * SQUARE * (1 / a**2 - 1 / b**2) / 2 + SHARES**2 * np.log(b / a)
    return edm_bound(terms.sum())


def paired(bound, first, second, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimates of a bound for two models with common random numbers."""
    both = lambda key: jnp.stack([bound(first, jax.random.clone(key)), bound(second, key)])
    return tuple(repeat(both, repeats).T)


def agree_closely(values: np.ndarray, expected: float, control: np.ndarray, control_expected: float) -> bool:
    """Is the mean within 1e-3 of its closed form?

    `control` is a control variate: its expectation is known exactly, and the difference of the two has an error so
    small that 1e-3 is five standard errors (false-alarm rate below 1e-4 by Student's distribution, 23 degrees of
    freedom or more).  The control itself is tested against its expectation with its own, larger error.
    """
    difference = values - control
    assert 5 * stats.sem(difference) < 1e-3
    assert agree(control, control_expected)
    return abs(difference.mean() + control_expected - expected) < 1e-3


def test_closed_form_is_the_entropy_of_the_gaussian():
    # The bound is tight in continuous time, up to the order (low / STD)^2 + (STD / high)^2.
    log_density = -0.5 * np.log(2 * np.pi * STD**2) - SQUARE / (2 * STD**2)
    assert 0 < log_density - exact_bound() < 5e-5


@pytest.mark.parametrize("high", [1.0, HIGH])
def test_elbo_without_noise(high):
    # A denoiser that knows x_0 has no diffusion loss: prior and reconstruction without Monte Carlo error.
    known = likelihood.elbo(lambda x, sigma: jnp.asarray(X0), jax.random.key(0), jnp.asarray(X0), 4, LOW, high)
    np.testing.assert_allclose(known / D, edm_bound(0.0, LOW, high), rtol=1e-5)


def test_elbo_integrates_over_ln_sigma():
    # A denoiser that says 0 has x_0^2 / sigma^2: the integral alone, and without bias also by very few strata.
    low, high = 0.3, 3.0
    nothing = lambda key: likelihood.elbo(lambda x, sigma: 0 * x, key, jnp.asarray(X0), 4, low, high)
    values = repeat(nothing, 1000)
    expected = edm_bound(SQUARE * (1 / low**2 - 1 / high**2) / 2, low, high)
    assert agree(values, expected)
    assert stats.sem(values) < 0.02


def test_elbo_of_a_gaussian_is_its_closed_form():
    bound = lambda model, key: likelihood.elbo(model, key, jnp.asarray(X0), 500)
    values, control = paired(bound, exact, stairs, 24)
    assert agree_closely(values, exact_bound(), control, stairs_bound())


def chain_bound(betas, variances, coefficients, square: float) -> float:
    """E_q log p(x_{0:T}) - log q(x_{1:T} | x_0) for p(x_{t-1} | x_t) = N(m_t x_t, variances_t), per dimension.

    From the forward chain alone, one step after another: no posterior, no KL divergence.
    """
    log_normal = lambda expected_square, variance: -0.5 * (np.log(2 * np.pi * variance) + expected_square / variance)
    mean_square = square  # E x_{t-1}^2
    total = 0.0
    for beta, variance, m in zip(betas, variances, coefficients, strict=True):
        a = np.sqrt(1 - beta)
        # x_t = a x_{t-1} + sqrt(beta) e: x_{t-1} - m x_t = (1 - m a) x_{t-1} - m sqrt(beta) e
        total += log_normal((1 - m * a) ** 2 * mean_square + m**2 * beta, variance) - log_normal(beta, beta)
        mean_square = a**2 * mean_square + beta
    return total + log_normal(mean_square, 1.0)


class Chain:
    """A linear DDPM in float64, by its betas."""

    def __init__(self, steps: int, variance: str) -> None:
        self.betas = np.asarray(process.linear_betas(steps), np.float64)
        self.process = process.ddpm(self.betas)
        self.bar = np.append(1.0, np.cumprod(1 - self.betas))
        small = self.betas * (1 - self.bar[:-1]) / (1 - self.bar[1:])
        # The decoder has beta_1 in both cases.
        self.variances = self.betas if variance == "beta" else np.append(self.betas[0], small[1:])

    def exact(self) -> np.ndarray:
        """c_t, t = 0..T, of the denoiser c_t x of N(0, STD^2)."""
        return np.sqrt(self.bar) * STD**2 / (self.bar * STD**2 + 1 - self.bar)

    def stairs(self) -> np.ndarray:
        return SHARES[np.searchsorted(EDGES, np.sqrt(1 / self.bar - 1))] / np.sqrt(self.bar)

    def bound(self, gain: np.ndarray) -> float:
        """Closed form for the denoiser gain_t x."""
        # Ho et al., eq. 7: sqrt(bar_{t-1}) beta / (1 - bar_t) x_0 + sqrt(1 - beta) (1 - bar_{t-1}) / (1 - bar_t) x_t
        bar, betas = self.bar, self.betas
        mean = (np.sqrt(bar[:-1]) * betas * gain[1:] + np.sqrt(1 - betas) * (1 - bar[:-1])) / (1 - bar[1:])
        return chain_bound(betas, self.variances, mean, SQUARE)


def linear(gain: np.ndarray):
    table = jnp.asarray(gain, jnp.float32)
    return lambda x, t: table[t] * x


@pytest.mark.parametrize(
    ("steps", "repeats", "variance"), [(60, 96, "beta"), (60, 96, "posterior"), (1000, 24, "posterior")]
)
def test_ddpm_elbo_of_a_gaussian_is_its_closed_form(variance, steps, repeats):
    chain = Chain(steps, variance)
    bound = lambda gain, key: likelihood.ddpm_elbo(chain.process, linear(gain), key, jnp.asarray(X0), variance)
    values, control = paired(bound, chain.exact(), chain.stairs(), repeats)
    assert agree_closely(values, chain.bound(chain.exact()), control, chain.bound(chain.stairs()))


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_ddpm_elbo_without_noise(variance):
    # A denoiser that knows x_0 leaves the constants alone: prior, decoder and the mismatch of the variances.
    chain = Chain(60, variance)
    known = lambda x, t: jnp.asarray(X0)
    value = likelihood.ddpm_elbo(chain.process, known, jax.random.key(0), jnp.asarray(X0), variance) / D
    bar = chain.bar
    ratio = chain.betas[1:] * (1 - bar[1:-1]) / (1 - bar[2:]) / chain.variances[1:]
    prior = 0.5 * (bar[-1] * SQUARE - bar[-1] - np.log(1 - bar[-1]))
    expected = -prior - 0.5 * np.log(2 * np.pi * chain.betas[0]) - 0.5 * np.sum(ratio - 1 - np.log(ratio))
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_ddpm_elbo_is_tight_with_beta_only():
    log_density = -0.5 * np.log(2 * np.pi * STD**2) - SQUARE / (2 * STD**2)
    tight, loose = (Chain(1000, variance) for variance in ("beta", "posterior"))
    assert 0 <= log_density - tight.bound(tight.exact()) < 2e-3
    assert loose.bound(loose.exact()) < log_density - 0.3


@pytest.mark.parametrize(("levels", "repeats"), [(7, 500), (60, 40)])
def test_reweighted_elbo_of_a_gaussian_is_its_closed_form(levels, repeats):
    chain = Chain(60, "beta")
    bar, gain = chain.bar[1:], chain.exact()[1:]
    # eps - eps^ = alpha (D(x_t) - x_0) / sigma, with D = gain x_t.
    terms = bar / (1 - bar) * ((1 - gain * np.sqrt(bar)) ** 2 * SQUARE + gain**2 * (1 - bar))
    model = linear(chain.exact())
    values = repeat(lambda key: likelihood.reweighted_elbo(chain.process, model, key, jnp.asarray(X0), levels), repeats)
    assert agree(values, -terms.sum())
    assert stats.sem(values) < 0.01 * terms.sum()


def test_discrete_bounds_need_a_chain():
    for bound in (likelihood.ddpm_elbo, lambda *args: likelihood.reweighted_elbo(*args, 5)):
        with pytest.raises(ValueError, match="discrete chain"):
            bound(EDM, exact, jax.random.key(0), jnp.zeros(2))


@pytest.mark.parametrize("levels", [0, 61])
def test_reweighted_elbo_checks_its_levels(levels):
    chain = Chain(60, "beta").process
    with pytest.raises(ValueError, match="reweighted_elbo: levels must be >= 1 and <= 60 and whole, got"):
        likelihood.reweighted_elbo(chain, exact, jax.random.key(0), jnp.zeros(2), levels)


def test_ode_density_of_a_gaussian():
    low = 0.01
    points = np.float32([[0.0, 0.0], [0.5, -0.3], [1.5, 1.0]])
    expected = stats.multivariate_normal(cov=STD**2 + low**2).logpdf(points[..., None]).sum(-1)
    density = lambda steps: jax.jit(jax.vmap(lambda x: likelihood.ode_log_density(exact, x, steps, low, HIGH, STD)))
    coarse, fine = (np.asarray(density(steps)(points), np.float64) - expected for steps in (400, 1600))
    np.testing.assert_allclose(fine, 0.0, atol=1e-3)
    # Heun is of second order: four times the steps, a sixteenth of the error.
    np.testing.assert_allclose(coarse[1:] / fine[1:], 16, rtol=0.2)


@pytest.mark.parametrize("guided", [False, True])
def test_ode_density_of_a_mixture(guided, mixture):
    # At a very noisy end the prior N(0, high^2 + std^2) is the mixture's marginal.
    low, high = 0.02, 3000.0
    points, _ = mixture.draw(1, 40)
    target = mixture.part(True) if guided else mixture

    @jax.jit
    @jax.vmap
    def both(x):
        steer = guidance.guide(EDM, mixture.log_good(EDM)) if guided else guidance.chain()
        model = steer(mixture.denoiser(EDM))
        return likelihood.ode_log_density(model, x, 2000, low, high), target.log_density(EDM)(x, low)

    ours, expected = map(np.asarray, both(points))
    np.testing.assert_allclose(ours, expected, atol=0.01)
    assert expected.std() > 0.3, "points that differ"


def test_guidance_by_the_bayes_classifier_gains_minus_log_alpha(mixture):
    # log p(x | y = 1) - log p(x) = log C(x) - log alpha, which is -log alpha where C(x) = 1.
    n, low = 1800, 0.01

    @jax.jit
    def gain(keys, points, stds):
        narrow = mixture._replace(stds=stds)
        plain = narrow.denoiser(EDM)
        guided = guidance.guide(EDM, narrow.log_good(EDM))(plain)

        def bounds(key, x):
            before = likelihood.elbo(plain, jax.random.clone(key), x, 64, low)
            return likelihood.elbo(guided, key, x, 64, low) - before, narrow.log_good(EDM)(x, low), before

        return jax.vmap(bounds)(keys, points)

    for spread in (1.0, 0.3):  # components that overlap, and components apart
        narrow = mixture._replace(stds=spread * mixture.stds)
        points = narrow.part(True).draw(2, n)[0]
        keys = jax.random.split(jax.random.key(3), n)
        gains, log_c, before = map(np.asarray, gain(keys, points, jnp.asarray(narrow.stds, jnp.float32)))
        residual = gains - (log_c - np.log(mixture.alpha))
        # Student's test of the mean residual, whose standard error is far below -log(alpha) = 0.51.
        assert agree(residual, 0.0)
        assert stats.sem(residual) < 0.02
        assert residual.std() < before.std() / 3, "common random numbers"
    assert agree(gains, -np.log(mixture.alpha))


def test_an_unknown_variance_is_named():
    chain = process.ddpm(np.full(10, 0.1))
    with pytest.raises(ValueError, match="variance must be 'beta' or 'posterior', got 'Beta'"):
        likelihood.ddpm_elbo(chain, lambda x, t: x, jax.random.key(0), jnp.zeros(2), "Beta")


def bounds(model, x0):
    """Every bound of the file for a model."""
    chain, key = process.ddpm(np.full(10, 0.1)), lambda: jax.random.key(0)
    return [
        lambda: likelihood.elbo(model, key(), x0, 4),
        lambda: likelihood.ddpm_elbo(chain, model, key(), x0),
        lambda: likelihood.reweighted_elbo(chain, model, key(), x0, 4),
        lambda: likelihood.ode_log_density(model, x0, 4),
    ]


@pytest.mark.parametrize(("shape", "wrong"), [((2,), (1,)), ((3,), (3, 1)), ((2, 2), (2,))])
def test_a_model_of_another_shape_has_no_likelihood(shape, wrong):
    for bound in bounds(lambda x, t: jnp.zeros(wrong), jnp.zeros(shape)):
        with pytest.raises(ValueError, match=r"x_0 of the denoiser must have shape \(.*\), got \("):
            bound()


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (lambda: likelihood.elbo(exact, None, X0, 0), "elbo: levels must be >= 1 and whole, got 0"),
        (lambda: likelihood.elbo(exact, None, X0, 2.5), "elbo: levels must be >= 1 and whole, got 2.5"),
        (lambda: likelihood.elbo(exact, None, X0, 8, low=2.0, high=1.0), "elbo: high must be > 2, got 1.0"),
        (lambda: likelihood.elbo(exact, None, X0, 8, low=0.0), "elbo: low must be > 0, got 0.0"),
        (lambda: likelihood.elbo(exact, None, X0, 8, high=np.nan), "elbo: high must be > 0, got nan"),
        (lambda: likelihood.ode_log_density(exact, X0, 0), "ode_log_density: steps must be >= 1 and whole, got 0"),
        (lambda: likelihood.ode_log_density(exact, X0, -3), "ode_log_density: steps must be >= 1 and whole, got -3"),
        (lambda: likelihood.ode_log_density(exact, X0, 3, 80.0, 0.1), "ode_log_density: high must be > 80, got 0.1"),
        (lambda: likelihood.ode_log_density(exact, X0, 3, data_std=-1), "ode_log_density: data_std must be >= 0"),
    ],
)
def test_numbers_out_of_range_are_named(bound, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        bound()


def test_bounds_of_a_narrower_model():
    x0 = jnp.float32([0.3, -0.2])
    narrow = lambda x, t: (0.5 * x).astype(jnp.bfloat16)
    for found, expected in zip(bounds(narrow, x0), bounds(lambda x, t: 0.5 * x, x0), strict=True):
        value = found()
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected(), rtol=0.02)
