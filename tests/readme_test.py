"""The README's own example, as it stands there, with networks of several types."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff import potential

README = (Path(__file__).parents[1] / "README.md").read_text()
(EXAMPLE,) = re.findall(r"## Six lines of it.*?```python\n(.*?)```", README, re.DOTALL)
MEMBERS = [{"w": np.float32([1.0, -2.0]), "b": np.float32(0.3)}, {"w": np.float32([0.5, 0.5]), "b": np.float32(-1.0)}]


def drawn(classifier, model=jnp.float32, n=8):
    """Samples of the example, whose classifier and model compute in these types."""

    def logit(phi, x, t):
        return phi["w"] @ x.astype(classifier) + phi["b"]

    def denoiser(theta, x, t):
        return theta * jnp.tanh(x.astype(model))

    space = {"logit": logit, "model": denoiser}
    exec(EXAMPLE, space)
    members = potential.stacked(*jax.tree.map(lambda a: jnp.asarray(a, classifier), MEMBERS))
    return space["draw"](jax.random.split(jax.random.key(0), n), jnp.asarray(0.5, model), members)


@pytest.fixture(scope="module")
def expected():
    return np.asarray(drawn(jnp.float32))


@pytest.mark.parametrize(("classifier", "model"), [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.bfloat16)])
def test_the_example_takes_narrower_types(classifier, model, expected):
    samples = drawn(classifier, model)
    assert samples.dtype == jnp.float32
    np.testing.assert_allclose(samples, expected, atol=0.05)


@pytest.mark.parametrize("classifier", [jnp.float32, jnp.bfloat16])
def test_the_example_runs_in_float64(classifier):
    with jax.enable_x64(True):
        samples = drawn(classifier)
    assert samples.dtype == jnp.float64
    assert np.isfinite(samples).all()
