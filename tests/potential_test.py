import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gendiff import potential, process

X, T = np.float32([0.5, -1.5]), np.float32(0.3)
VECTOR = st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=2).map(np.float32)


def logit(params, x, t):
    return params["w"] @ x + params["b"] * t


def member(i: float) -> dict:
    return {"w": jnp.array([0.3 * i, 1.0 - i]), "b": jnp.float32(2.0 * i)}


@pytest.mark.parametrize("value", [-200.0, -30.0, -1.0, 0.0, 1.0, 30.0, 200.0])
def test_log_probability_is_finite_and_exact(value):
    log_c = potential.log_probability(lambda params, x, t: params * x)
    c = 1 / (1 + np.exp(-np.float64(value)))
    # log C = -softplus(-l), and its gradient is (1 - C) grad l: here grad_x l = 200.
    value_and_gradient = jax.value_and_grad(lambda x: log_c(200.0, x, T))(jnp.float32(value / 200))
    assert np.isfinite(value_and_gradient).all()
    np.testing.assert_allclose(value_and_gradient[0], -np.logaddexp(0, -np.float64(value)), rtol=1e-5, atol=1e-30)
    complement = 1 / (1 + np.exp(np.float64(value)))
    np.testing.assert_allclose(value_and_gradient[1], complement * 200.0, rtol=1e-4, atol=1e-30)
    assert value_and_gradient[0] <= 0, "log C, not the log-odds log C / (1 - C)"
    np.testing.assert_allclose(np.exp(np.float64(value_and_gradient[0])), c, rtol=1e-4)


@given(w=VECTOR, x=VECTOR)
def test_gradient_of_log_probability(w, x):
    log_c = potential.log_probability(lambda params, x, t: params @ x)
    c = 1 / (1 + np.exp(-np.float64(w @ x)))
    np.testing.assert_allclose(jax.grad(log_c, argnums=1)(w, x, T), (1 - c) * w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_stack_is_the_sum_of_its_members(count):
    members = [member(i) for i in range(count)]
    log_c = potential.log_probability(logit)
    stack = potential.stack(log_c, potential.stacked(*members))
    np.testing.assert_allclose(
        stack(X, T), sum(float(log_c(member_params, X, T)) for member_params in members), rtol=1e-5
    )
    gradients = [np.asarray(jax.grad(log_c, argnums=1)(member_params, X, T)) for member_params in members]
    np.testing.assert_allclose(jax.grad(stack)(X, T), sum(gradients), rtol=1e-5, atol=1e-6)


def test_stack_has_second_derivatives():
    members = [member(i) for i in range(3)]
    log_c = potential.log_probability(lambda params, x, t: logit(params, jnp.sin(x), t))
    stack = potential.stack(log_c, potential.stacked(*members))
    hessian = jax.jit(jax.hessian(log_c, argnums=1))
    expected = sum(np.asarray(hessian(member_params, X, T)) for member_params in members)
    for hessian in (jax.hessian(stack), jax.jacfwd(jax.jacfwd(stack))):
        np.testing.assert_allclose(jax.jit(hessian)(X, T), expected, rtol=1e-4, atol=1e-6)


def test_stack_under_vmap():
    stack = potential.stack(potential.log_probability(logit), potential.stacked(member(0), member(1)))
    points = np.float32([[0.1, 0.2], [-1.0, 3.0], [2.0, 2.0]])
    together = jax.jit(jax.vmap(jax.value_and_grad(stack), (0, None)))(points, T)
    both = jax.jit(jax.value_and_grad(stack))
    for i, x in enumerate(points):
        value, gradient = both(x, T)
        np.testing.assert_allclose(together[0][i], value, rtol=1e-5)
        np.testing.assert_allclose(together[1][i], gradient, rtol=1e-5)


def test_stack_is_not_silently_constant_in_its_parameters():
    # It has no derivative in the parameters.  An error is better than a gradient of 0, which would train nothing.
    params = potential.stacked(member(0), member(1))
    with pytest.raises(TypeError):
        jax.grad(lambda params: potential.stack(potential.log_probability(logit), params)(X, T))(params)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_stack_of_copies_is_scaled(count):
    log_c = potential.log_probability(logit)
    copies = potential.stack(log_c, potential.stacked(*[member(0.7)] * count))
    single = potential.scaled(lambda x, t: log_c(member(0.7), x, t), count)
    np.testing.assert_allclose(copies(X, T), single(X, T), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(copies)(X, T), jax.grad(single)(X, T), rtol=1e-5)


def test_empty_stack_is_zero():
    empty = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape)), member(1.0))
    stack = potential.stack(potential.log_probability(logit), empty)
    assert float(stack(X, T)) == 0.0
    np.testing.assert_array_equal(jax.grad(stack)(X, T), np.zeros(2))


def test_stacked_keeps_the_members():
    trees = potential.stacked(member(1.0), member(2.0), member(3.0))
    assert potential.leading_size(trees) == 3
    for i in range(3):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda leaf, i=i: leaf[i], trees), member(i + 1.0))


@pytest.mark.parametrize("tree", [{"a": np.zeros((2, 3)), "b": np.zeros((3, 3))}, {"a": np.zeros(())}, {}])
def test_leading_size_needs_one_size(tree):
    with pytest.raises(ValueError, match="stacked parameters must "):
        potential.leading_size(tree)


@given(x=VECTOR, scale=st.floats(-3, 3, width=32))
def test_total_and_scaled_are_linear(x, scale):
    a, b = (lambda x, t: jnp.sum(jnp.sin(x)) * t), (lambda x, t: jnp.sum(x**2))
    np.testing.assert_allclose(potential.total(a, b)(x, T), a(x, T) + b(x, T), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(potential.scaled(a, scale)(x, T), scale * a(x, T), rtol=1e-5, atol=1e-6)


def test_total_of_none_is_zero_and_a_scalar():
    value = potential.total()(X, T)
    assert jnp.shape(value) == ()
    assert float(value) == 0.0


NARROW = [(jnp.float32, jnp.bfloat16), (jnp.float32, jnp.float16), (jnp.bfloat16, jnp.float32), (jnp.bfloat16,) * 2]


@pytest.mark.parametrize(("type_of_x", "type_of_members"), NARROW)
def test_stack_of_another_type(type_of_x, type_of_members):
    members = jax.tree.map(lambda a: a.astype(type_of_members), potential.stacked(member(0.5), member(1.0)))
    x = jnp.asarray(X, type_of_x)
    narrow = lambda params, x, t: logit(params, x.astype(type_of_members), jnp.asarray(T, type_of_members))
    stack = potential.stack(potential.log_probability(narrow), members)
    value, gradient = jax.jit(jax.value_and_grad(stack))(x, T)
    assert value.dtype == jnp.float32, "sums are in float32"
    assert gradient.dtype == type_of_x
    exact = potential.stack(potential.log_probability(logit), potential.stacked(member(0.5), member(1.0)))
    np.testing.assert_allclose(value, exact(X, T), rtol=0.02)
    np.testing.assert_allclose(gradient.astype(jnp.float32), jax.grad(exact)(X, T), rtol=0.03, atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stack_of_narrower_members_in_float64(dtype):
    with jax.enable_x64(True):
        members = jax.tree.map(lambda a: jnp.asarray(a, dtype), potential.stacked(member(0.5), member(1.0)))
        narrow = lambda params, x, t: logit(params, x.astype(dtype), jnp.asarray(T, dtype))
        stack = potential.stack(potential.log_probability(narrow), members)
        value, gradient = jax.value_and_grad(stack)(jnp.asarray(X, jnp.float64), T)
        assert (value.dtype, gradient.dtype) == (jnp.float64, jnp.float64)
        assert jax.hessian(stack)(jnp.asarray(X, jnp.float64), T).shape == (2, 2)


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1)])
def test_a_potential_is_a_scalar(shape):
    wrong = lambda x, t: jnp.zeros(shape)
    for function in (
        potential.total(wrong),
        potential.scaled(wrong, 2.0),
        potential.limited(wrong, lambda t: t < 1),
        potential.stack(lambda params, x, t: wrong(x, t), jnp.zeros(2)),
        jax.grad(potential.stack(lambda params, x, t: wrong(x, t), jnp.zeros(2))),
    ):
        with pytest.raises(ValueError, match=r"must have shape \(\), got \("):
            function(X, T)


def test_a_scale_is_finite():
    with pytest.raises(ValueError, match="scaled: scale must be a finite number, got nan"):
        potential.scaled(lambda x, t: jnp.sum(x), float("nan"))


@pytest.mark.parametrize(("chain", "t"), [(process.edm(), 0.3), (process.ddpm(process.linear_betas(100)), 40)])
def test_a_classifier_is_told_what_edm_tells(chain, t):
    alpha, sigma = float(chain.alpha(jnp.asarray(t))), float(chain.sigma(jnp.asarray(t)))
    network = lambda params, x, c_noise: params * jnp.append(x, c_noise)
    logits = potential.from_edm(chain, network, 0.5)(2.0, X, jnp.asarray(t))
    expected = 2 * np.append(X / np.hypot(0.5 * alpha, sigma), 0.25 * np.log(sigma / alpha))
    np.testing.assert_allclose(logits, expected, rtol=1e-4)
    least = np.asarray(chain.grid(4))[-2]
    timeless = potential.from_edm(chain, network, 0.5, least)(2.0, X, jnp.asarray(t))
    assert timeless[-1] == potential.from_edm(chain, network, 0.5)(2.0, X, jnp.asarray(least))[-1]


def test_the_signal_is_clear_at_low_noise():
    clear = potential.clear(process.edm(), 0.8)
    assert clear == potential.clear(process.edm(), 0.8) != potential.clear(process.edm(), 0.7)
    assert [bool(clear(jnp.float32(t))) for t in (0.0, 0.74, 0.76)] == [True, True, False]
