import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff.nets.fusion import apart

X = jnp.arange(6.0).reshape(2, 3) - 2


def test_nothing_changes():
    np.testing.assert_array_equal(apart(X), X)
    np.testing.assert_array_equal(jax.vmap(apart)(X), X)
    np.testing.assert_array_equal(jax.vmap(apart, 1, 1)(X), X)
    cube = lambda f: jax.hessian(lambda x: jnp.sum(f(x) ** 3))(X[0])
    np.testing.assert_array_equal(cube(apart), cube(lambda x: x))


def test_a_loop_on_a_cpu_reads_what_was_computed_before():
    if jax.default_backend() != "cpu":
        pytest.skip("of the CPU's program")
    scaled = lambda f: jax.jit(lambda x, c: x * f(jnp.sin(c) * 2 + 1)[:, None, :])
    program = lambda f: scaled(f).lower(jnp.ones((4, 64, 8)), jnp.ones((4, 8))).compile().as_text()
    sines = lambda text: re.findall(r"f32\[([\d,]+)\]\S* sine\(", text)
    assert "dot" in program(apart)
    assert sines(program(apart)) == ["4,8"]
    assert "dot" not in program(lambda x: x)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_see_nothing(platform):
    text = jax.jit(apart).trace(X).lower(lowering_platforms=(platform,)).as_text()
    assert "dot" not in text
