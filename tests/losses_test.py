import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gendiff import losses, potential, process

EDM, DDPM = process.edm(), process.ddpm(process.linear_betas())
FALSE_ALARM = 1e-4
"""Of a statistical test."""


def at(p, t):
    """The process with all training at one time."""
    return p._replace(sample_time=lambda key: jnp.asarray(t))


@pytest.mark.parametrize("p", [EDM, DDPM])
def test_noised_draws_time_and_noise_independently(p):
    x0 = np.float32([0.7])
    x, t = jax.jit(jax.vmap(lambda key: losses.noised(p, key, x0)))(jax.random.split(jax.random.key(0), 4000))
    eps = np.asarray((x[:, 0] - p.alpha(t) * x0[0]) / p.sigma(t))
    # Kolmogorov-Smirnov for the noise, and Spearman's rank correlation with the time.
    assert stats.kstest(eps, "norm").pvalue > FALSE_ALARM
    assert stats.spearmanr(eps, t).pvalue > FALSE_ALARM
    expected = jax.vmap(p.sample_time)(jax.random.split(jax.random.key(1), 4000))
    assert stats.ks_2samp(np.asarray(t), np.asarray(expected)).pvalue > FALSE_ALARM


@given(t=st.floats(0.002, 80), std=st.floats(0.1, 2))
def test_edm_weight_is_unit_weight_on_the_network(t, std):
    out = t * std / np.sqrt(t**2 + std**2)  # c_out: an error of 1 in F is one of c_out in x_0
    np.testing.assert_allclose(losses.edm_weight(std)(jnp.float32(t)) * out**2, 1.0, rtol=1e-5)


@pytest.mark.parametrize(("p", "t"), [(EDM, 0.3), (DDPM, 3), (DDPM, 500)])
def test_epsilon_weight_turns_errors_of_x0_into_errors_of_eps(p, t):
    x, x0, wrong = 0.3, 0.1, -0.2
    alpha, sigma = float(p.alpha(t)), float(p.sigma(t))
    eps = lambda x0: (x - alpha * x0) / sigma
    weight = losses.epsilon_weight(p)(jnp.asarray(t))
    np.testing.assert_allclose(weight * (x0 - wrong) ** 2, (eps(x0) - eps(wrong)) ** 2, rtol=1e-4)


@pytest.mark.parametrize(("p", "t"), [(EDM, 0.5), (DDPM, 300)])
def test_denoising_loss_is_least_at_the_posterior_mean(p, t, gaussian):
    # At the exact denoiser the loss is weight times the posterior's variance, and its gradient is 0.
    n, weight = 20_000, 3.0
    exact = gaussian.denoiser(p)
    loss = losses.denoising(at(p, t), lambda params, x, t: params[0] * exact(x, t) + params[1], lambda t: weight)
    x0 = gaussian.draw(0, n)[0]
    keys = jax.random.split(jax.random.key(2), n)
    per_example = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0, 0)))
    values, gradients = map(np.asarray, per_example(jnp.array([1.0, 0.0]), keys, x0))
    alpha, sigma, (std,) = float(p.alpha(t)), float(p.sigma(t)), gaussian.stds
    expected = weight * std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)
    # Normal tests of three means, with the empirical standard errors.
    limit = stats.norm.isf(FALSE_ALARM / 6)
    assert abs(values.mean() - expected) < limit * values.std() / np.sqrt(n)
    assert (np.abs(gradients.mean(0)) < limit * gradients.std(0) / np.sqrt(n)).all()
    _, elsewhere = map(np.asarray, per_example(jnp.array([0.9, 0.1]), jax.random.split(jax.random.key(3), n), x0))
    assert (np.abs(elsewhere.mean(0)) > limit * elsewhere.std(0) / np.sqrt(n)).any()


@given(logit=st.floats(-200, 200, width=32), label=st.sampled_from([0.0, 1.0]), weight=st.floats(0.125, 2, width=32))
def test_cross_entropy_of_one_example(logit, label, weight):
    loss = losses.cross_entropy(EDM, lambda params, x, t: params)
    value = loss(jnp.float32(logit), jax.random.key(0), (jnp.zeros(1), jnp.float32(label), jnp.float32(weight)))
    expected = weight * np.logaddexp(0, -np.float64(logit) if label else np.float64(logit))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-7 * weight * max(1, abs(logit)))


def constant_optimum(positive: float, negative: float) -> float:
    """C of the best constant classifier on half positives, half negatives with these weights (Newton)."""
    loss = losses.mean(losses.cross_entropy(EDM, lambda params, x, t: params))
    batch = (jnp.zeros((20, 1)), jnp.repeat(jnp.array([1.0, 0.0]), 10), jnp.repeat(jnp.array([positive, negative]), 10))
    slope = lambda logit: jax.grad(loss)(logit, jax.random.key(0), batch)
    move = jax.jit(lambda logit: logit - slope(logit) / jax.grad(slope)(logit))
    logit = jnp.float32(0.0)
    for _ in range(8):
        logit = move(logit)
    return float(jax.nn.sigmoid(logit))


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_importance_weights_make_a_constant_classifier_the_prior(alpha):
    np.testing.assert_allclose(constant_optimum(2 * alpha, 2 * (1 - alpha)), alpha, rtol=1e-4)
    # Swapped weights run without a word and learn the share of negatives; none learn 1/2.
    np.testing.assert_allclose(constant_optimum(2 * (1 - alpha), 2 * alpha), 1 - alpha, rtol=1e-4)
    np.testing.assert_allclose(constant_optimum(1.0, 1.0), 0.5, rtol=1e-4)


def test_classifiers_have_their_optimum_at_the_bayes_logit():
    # Positives N(m, std^2), negatives N(-m, std^2): the Bayes logit at time t is linear in x,
    # log(alpha / (1 - alpha)) + 2 alpha_t m x / (alpha_t^2 std^2 + sigma_t^2).
    p, t, share, m, std, half = DDPM, 400, 0.85, 0.5, 0.6, 20_000
    rng = np.random.default_rng(4)
    x0 = np.concatenate([rng.normal(m, std, half), rng.normal(-m, std, half)]).astype(np.float32)[:, None]
    labels = np.repeat(np.float32([1, 0]), half)
    prior = np.log(share / (1 - share))
    alpha, sigma = float(p.alpha(t)), float(p.sigma(t))
    bayes = np.array([2 * alpha * m / (alpha**2 * std**2 + sigma**2), prior])
    loss = losses.cross_entropy(at(p, t), lambda params, x, t: params[0] * x[0] + params[1])

    @jax.jit
    def newton(params, batch):
        per_example = jax.vmap(jax.grad(loss), (None, 0, 0))
        key = jax.random.key(5)
        gradients = per_example(params, jax.random.split(key, 2 * half), batch)
        curvature = jax.hessian(losses.mean(loss))(params, jax.random.key(5), batch)
        return params - jnp.linalg.solve(curvature, gradients.mean(0)), gradients, curvature

    def fit(positive: float, negative: float) -> tuple[np.ndarray, np.ndarray]:
        batch = (x0, labels, np.where(labels == 1, positive, negative).astype(np.float32))
        params = jnp.zeros(2)
        for _ in range(8):
            params, gradients, curvature = newton(params, batch)
        g, h = np.asarray(gradients, np.float64), np.linalg.inv(np.asarray(curvature, np.float64))
        error = np.sqrt(np.diag(h @ (g.T @ g) @ h)) / (2 * half)  # the sandwich estimate
        return np.asarray(params, np.float64), error

    weighted, error = fit(2 * share, 2 * (1 - share))
    plain, plain_error = fit(1.0, 1.0)
    swapped, swapped_error = fit(2 * (1 - share), 2 * share)
    shifted = plain + np.array([0.0, prior])
    # Normal tests of two parameters.  The samples are stratified by class, so the sandwich bounds the error from above
    # and the false-alarm rate is at most the stated one.
    limit = stats.norm.isf(FALSE_ALARM / 4)
    assert (np.abs(weighted - bayes) < limit * error).all()
    assert (np.abs(shifted - bayes) < limit * plain_error).all(), "one optimum for importance weights and prior shift"
    assert abs(plain - bayes)[1] > 10 * limit * plain_error[1], "without either the prior is 1/2"
    assert abs(swapped - bayes)[1] > 10 * limit * swapped_error[1], "swapped weights are no prior at all"
    np.testing.assert_allclose(weighted, shifted, atol=3 * error.max())


def test_guidance_without_importance_is_too_strong():
    # What a wrong prior of 1/2 does to grad log C: a factor alpha / (1 - alpha) deep among positives, and 1 among
    # negatives.
    share = 0.95
    prior = np.log(share / (1 - share))
    log_c = potential.log_probability(lambda shift, x, t: x[0] + shift)
    slope = lambda shift, x: float(jax.grad(log_c, argnums=1)(shift, jnp.float32([x]), 0.0)[0])
    np.testing.assert_allclose(slope(0.0, 12.0) / slope(prior, 12.0), share / (1 - share), rtol=1e-3)
    np.testing.assert_allclose(slope(0.0, -12.0) / slope(prior, -12.0), 1.0, rtol=1e-3)


def test_distillation_does_not_train_the_teacher():
    model = lambda params, x, t: params * jnp.sin(x) + t

    def loss(student, teacher):
        loss = losses.distillation(EDM, model, lambda x, t: model(teacher, x, t), losses.edm_weight())
        return loss(student, jax.random.key(0), jnp.float32([0.3, -0.9]))

    student, teacher = jax.grad(loss, argnums=(0, 1))(jnp.float32(1.0), jnp.float32(2.0))
    assert float(teacher) == 0.0
    assert float(student) < 0.0  # up, towards the teacher
    assert float(loss(jnp.float32(2.0), jnp.float32(2.0))) == 0.0


@pytest.mark.parametrize(("p", "t"), [(EDM, 0.5), (DDPM, 300)])
def test_distillation_and_regression_are_weighted_squares(p, t):
    weight = lambda t: 1.0 + 2.0 * t
    model, teacher = (lambda params, x, t: x + params), (lambda x, t: x)
    expected = (1.0 + 2.0 * t) * 3 * 0.5**2
    x0 = jnp.zeros(3)
    distilled = losses.distillation(at(p, t), model, teacher, weight)(0.5, jax.random.key(0), x0)
    np.testing.assert_allclose(distilled, expected, rtol=1e-5)
    regressed = losses.regression(model, weight)(0.5, jax.random.key(0), (x0, jnp.asarray(t), x0))
    np.testing.assert_allclose(regressed, expected, rtol=1e-5)


def test_mean_is_over_the_batch_with_a_key_each():
    n = 3000
    batch = (jnp.arange(n, dtype=jnp.float32), jnp.ones((n, 2)))
    average = losses.mean(lambda params, key, example: params * example[0] + example[1][1])
    np.testing.assert_allclose(average(2.0, jax.random.key(0), batch), 2.0 * (n - 1) / 2 + 1, rtol=1e-5)
    draw = losses.mean(lambda params, key, example: jax.random.uniform(key))
    # The mean of n uniforms; with one key for all it would be one uniform.
    assert abs(float(draw(0.0, jax.random.key(1), batch)) - 0.5) < stats.norm.isf(FALSE_ALARM / 2) / np.sqrt(12 * n)


def test_ensemble_trains_each_member_by_its_own_loss():
    loss = lambda params, key, x: (params["a"] * x - 1) ** 2 + 0 * jax.random.normal(key)
    members = {"a": jnp.array([0.5, -1.0, 2.0])}
    examples = jnp.array([1.0, 3.0, -2.0])
    value, gradient = jax.value_and_grad(losses.Ensemble(loss))(members, jax.random.key(0), examples)
    members = [
        jax.value_and_grad(loss)({"a": a}, jax.random.key(0), x) for a, x in zip(members["a"], examples, strict=True)
    ]
    np.testing.assert_allclose(value, sum(v for v, _ in members), rtol=1e-6)
    np.testing.assert_allclose(gradient["a"], [g["a"] for _, g in members], rtol=1e-6)


def test_the_mean_of_an_ensemble_is_that_of_its_examples():
    loss = lambda params, key, x: jnp.tanh(params["a"] * x + jax.random.normal(key)) ** 2
    members, batch = {"a": jnp.array([0.5, -1.0, 2.0])}, jax.random.normal(jax.random.key(1), (7, 3))
    ensemble = losses.Ensemble(loss)
    plain = losses.mean(lambda params, key, x: ensemble(params, key, x))  # example by example
    assert_same = lambda found, expected: jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected
    )
    of_all = lambda f: jax.jit(jax.value_and_grad(f))(members, jax.random.key(0), batch)
    assert_same(of_all(losses.mean(ensemble)), of_all(plain))
    slope = lambda f: jax.jvp(lambda members: f(members, jax.random.key(0), batch), (members,), ({"a": jnp.ones(3)},))
    assert_same(slope(losses.mean(ensemble)), slope(plain))


def test_given_coordinates_are_seen_clean_and_do_not_count():
    known = jnp.array([True, False, True])
    x0 = jnp.float32([0.3, -0.9, 0.5])
    model = lambda theta, x, t: theta * jnp.ones(3)
    value, slope = jax.value_and_grad(losses.denoising(DDPM, model, lambda t: 2.0, known))(1.5, jax.random.key(0), x0)
    np.testing.assert_allclose(value, 2.0 * (1.5 + 0.9) ** 2, rtol=1e-6)
    np.testing.assert_allclose(slope, 4.0 * (1.5 + 0.9), rtol=1e-6)
    inputs = losses.denoising(DDPM, lambda theta, x, t: x, lambda t: 1.0, known)  # a model that returns its input
    key = jax.random.key(2)
    noisy = losses.noised(DDPM, jax.random.clone(key), x0)[0]
    np.testing.assert_allclose(inputs(0.0, key, x0), (noisy[1] - x0[1]) ** 2, rtol=1e-5)


def test_cross_entropy_wants_a_label_for_each_logit():
    edm = process.edm()
    loss = losses.cross_entropy(edm, lambda params, x, t: x)
    for label in (jnp.zeros(()), jnp.zeros(3)):
        with pytest.raises(ValueError, match="cross_entropy: labels, one a logit, must have shape"):
            loss(None, jax.random.key(0), (jnp.zeros(2), label, 1.0))


def test_a_conditional_loss_is_the_loss_of_the_bound_parameters():
    plain = lambda params, key, example: params * jnp.sum(example)
    loss = losses.conditional(plain, lambda params, condition: params * condition)
    example = (jnp.float32(3), jnp.array([1.0, 4.0]))
    assert loss(jnp.float32(2), jax.random.key(0), example) == 2 * 3 * 5
    gradient = jax.grad(losses.mean(loss))(
        jnp.float32(2), jax.random.key(1), jax.tree.map(lambda a: jnp.stack([a, a]), example)
    )
    assert gradient == 15


X, KEY = jnp.float32([0.3, -0.2]), jax.random.key(0)
WRONG = {"(1,) for (2,)": lambda params, x, t: x[:1], "(2, 1) for (2,)": lambda params, x, t: x[:, None]}


@pytest.mark.parametrize("case", WRONG)
def test_a_model_of_another_shape_has_no_loss(case):
    model, weight = WRONG[case], lambda t: 1.0
    right = lambda params, x, t: x
    teacher, student = (lambda x, t: model(None, x, t)), (lambda x, t: x)
    for loss, example in (
        (losses.denoising(EDM, model, weight), X),
        (losses.denoising(EDM, model, weight, jnp.array([True, False])), X),
        (losses.denoising(EDM, right, weight, jnp.ones((2, 1), bool)), X),
        (losses.distillation(EDM, model, student, weight), X),
        (losses.distillation(EDM, right, teacher, weight), X),
        (losses.regression(model, weight), (X, 1.0, X)),
        (losses.regression(right, weight), (X, 1.0, X[:1])),
        (losses.gradient_alignment(model), losses.Aligned(X, 1.0, X, 1.0)),
        (losses.gradient_alignment(lambda params, x, t: jnp.sum(x)), losses.Aligned(X, 1.0, X[:1], 1.0)),
        (losses.gradient_alignment(lambda params, x, t: jnp.sum(x)), losses.Aligned(X, 1.0, X, X[:, None])),
        (losses.cross_entropy(EDM, lambda params, x, t: x[0]), (X, jnp.float32(1), jnp.ones(1))),
    ):
        with pytest.raises(ValueError, match=r"must (have|broadcast to) shape \(.*\), got \("):
            loss(None, jax.random.clone(KEY), example)


def test_a_loss_is_a_scalar_of_arrays_with_one_number_of_rows():
    batch = (jnp.zeros((10, 2)), jnp.zeros((3, 2)))
    loss = losses.mean(lambda params, key, example: jnp.sum(example[0]))
    with pytest.raises(ValueError, match=r"one number of rows, got shapes \(10, 2\), \(3, 2\)"):
        loss(None, jax.random.clone(KEY), batch)
    with pytest.raises(ValueError, match=r"loss: the scalar value must have shape \(\), got \(2,\)"):
        losses.mean(lambda params, key, example: example)(None, jax.random.clone(KEY), jnp.zeros((10, 2)))


@pytest.mark.parametrize(("dtype", "of_a_batch"), [(jnp.bfloat16, True), (jnp.bfloat16, False), (jnp.float16, False)])
def test_an_ensemble_of_narrower_members(dtype, of_a_batch):
    # Parameters, and losses, in another type than the sum.
    member = losses.cross_entropy(EDM, lambda params, x, t: (params["w"] @ x.astype(params["w"].dtype)) / 4)
    params = {"w": jnp.asarray([[1.0, -0.5], [0.5, 0.25]])}
    examples = (jnp.stack([X, -X]), jnp.float32([1, 0]), jnp.ones(2))
    loss = losses.Ensemble(member)
    if of_a_batch:
        loss, examples = losses.mean(loss), jax.tree.map(lambda a: jnp.stack([a] * 3), examples)
    run = jax.jit(lambda params: jax.value_and_grad(loss)(params, jax.random.clone(KEY), examples))
    (value, gradient), (expected, slope) = run(jax.tree.map(lambda a: a.astype(dtype), params)), run(params)
    assert (value.dtype, gradient["w"].dtype) == (jnp.float32, dtype)
    np.testing.assert_allclose(value, expected, rtol=0.02)
    np.testing.assert_allclose(gradient["w"].astype(jnp.float32), slope["w"], rtol=0.05, atol=0.05)


def test_an_ensemble_in_float64_of_members_in_float32():
    with jax.enable_x64(True):
        member = lambda params, key, x: jnp.sum((params * x) ** 2)
        params, examples = jnp.float32([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 2), jnp.float32)
        value, gradient = jax.value_and_grad(losses.Ensemble(member))(params, jax.random.clone(KEY), examples)
        assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.float32)
        np.testing.assert_allclose(gradient, 2 * params)


def test_the_data_have_a_spread():
    with pytest.raises(ValueError, match="edm_weight: data_std must be > 0, got 0"):
        losses.edm_weight(0)
