"""Static values: equal and unequal ones, and the programs that they share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gendiff import denoiser, guidance, losses, process, sampling, static
from gendiff.nets.mlp import ResidualMLP
from gendiff.static import by_value


@by_value
def shifted(function, by=1.0, *more, **named):
    return lambda x: function(x) + by


def net(width=8):
    return ResidualMLP(2, width, 1)


ALIKE = {
    "numbers": lambda: shifted(jnp.sin, 2.0),
    "a default": lambda: shifted(jnp.sin),
    "arrays of NumPy": lambda: shifted(jnp.sin, np.arange(3.0)),
    "modules": lambda: shifted(net(), 1.0),
    "methods of modules": lambda: shifted(net().apply),
    "partials": lambda: shifted(partial(jnp.add, 1.0, y=2)),
    "containers": lambda: shifted(jnp.sin, more=[1, (2, {"a": 3})]),
    "values": lambda: shifted(shifted(jnp.sin, 2.0)),
    "edm": process.edm,
    "ddpm": lambda: process.ddpm(process.cosine_betas(20), 2.0),
    "classifier_time": process.classifier_time,
    "from_edm": lambda: denoiser.from_edm(net().apply, 0.5),
    "from_epsilon": lambda: denoiser.from_epsilon(process.edm(), net().apply),
    "from_v": lambda: denoiser.from_v(process.edm(), net().apply),
    "from_score": lambda: denoiser.from_score(process.edm(), net().apply),
    "denoising": lambda: losses.denoising(process.edm(), net().apply, losses.edm_weight(), np.eye(2) > 0),
    "cross_entropy": lambda: losses.cross_entropy(process.edm(), net().apply),
    "conditional": lambda: losses.conditional(losses.cross_entropy(process.edm(), jnp.dot), jnp.add),
    "regression": lambda: losses.regression(net().apply, losses.epsilon_weight(process.edm())),
    "gradient_alignment": lambda: losses.gradient_alignment(net().apply, "directional"),
    "Ensemble": lambda: losses.Ensemble(losses.cross_entropy(process.edm(), net().apply)),
    "a method": lambda: static.partial(net().apply),
    "a kernel": lambda: static.partial(sampling.ddim, eta=0.5),
    "strength": lambda: guidance.score_strength(process.edm()),
}


@pytest.mark.parametrize("name", ALIKE)
def test_made_twice_from_equal_arguments_is_equal(name):
    value, other = ALIKE[name](), ALIKE[name]()
    assert value is not other
    assert value == other
    assert hash(value) == hash(other)


def test_what_differs_is_unequal():
    values = [
        shifted(jnp.sin), shifted(jnp.cos), shifted(jnp.sin, 1), shifted(jnp.sin, True), shifted(jnp.sin, 1.0, 2),
        shifted(jnp.sin, np.float32([1, 2])), shifted(jnp.sin, np.float64([1, 2])),
        shifted(jnp.sin, np.float32([[1, 2]])),
        shifted(net().apply), shifted(net(9).apply), shifted(net().init), shifted(partial(jnp.add, 1)),
        shifted(partial(jnp.add, y=1)), shifted(jnp.sin, named={"a": 1}), shifted(jnp.sin, other={"a": 1}),
        *process.edm(), *process.edm(sigma_min=0.01)[2:], *process.edm(mean=0.0)[2:3],
        *process.ddpm(process.cosine_betas(9))[:4], *process.ddpm(process.cosine_betas(10))[:4],
    ]  # fmt: skip
    values = [value for value in values if value is not None]
    same = {(i, k) for i, value in enumerate(values) for k, other in enumerate(values) if i < k and value == other}
    # edm's training times do not depend on its least noise.
    edm, times = values.index(process.edm().alpha), process.edm().sample_time
    assert same == {(edm + 2, i) for i, value in enumerate(values) if value == times and i > edm + 2}


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_two_weights_are_equal_where_their_numbers_are(a, b):
    assert (losses.edm_weight(a) == losses.edm_weight(b)) == (a == b)


def test_the_function_is_the_one_that_was_made():
    x = jnp.arange(3.0)
    assert shifted(jnp.sin, 2.0)(x).tolist() == (jnp.sin(x) + 2).tolist()
    assert repr(losses.edm_weight(0.25)) == "edm_weight(data_std=0.25)"
    assert losses.edm_weight.__doc__ == losses.edm_weight.__wrapped__.__doc__


def test_equal_values_share_a_program_and_others_do_not():
    traced = []

    @partial(jax.jit, static_argnums=0)
    def program(function, x):
        traced.append(function)
        return function(x)

    for by in (1.0, 1.0, 2.0, 1.0, 2.0):
        program(shifted(jnp.sin, by), jnp.ones(2))
    assert [value._arguments["by"] for value in traced] == [1.0, 2.0]


def test_an_array_of_jax_in_a_value_is_refused_where_a_program_would_be_made_of_it():
    closed = shifted(jnp.sin, jnp.ones(2))
    assert closed(0.0).tolist() == [1, 1]  # used as a function it is none of our business
    with pytest.raises((TypeError, ValueError), match="hash"):
        jax.jit(lambda function: function(1.0), static_argnums=0)(closed)
