"""The examples of README.md and of the guides."""

import doctest
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff import potential

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MEMBERS = [{"w": np.float32([1.0, -2.0]), "b": np.float32(0.3)}, {"w": np.float32([0.5, 0.5]), "b": np.float32(-1.0)}]


def blocks(text):
    """The Python of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def guide(name):
    """The first block of a guide."""
    return blocks((ROOT / "docs" / "guides" / f"{name}.md").read_text())[0]


def test_the_readme_prints_what_it_says():
    (block,) = (block for block in blocks(README) if ">>>" in block)
    example = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
    assert len(example.examples) > 10
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0


def test_the_readme_is_a_page():
    assert len(README.splitlines()) <= 150


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_an_oracle_of_your_own():
    space = {}
    exec(guide("oracle"), space)
    assert 0.28 < space["before"] < 0.35
    assert space["after"] > 0.85


def test_a_reward_from_two_models():
    space = {}
    exec(guide("two-models"), space)
    np.testing.assert_allclose(space["samples"].mean(0), space["goal"], atol=0.1)


def drawn(classifier, model=jnp.float32, n=8):
    """Samples of the guide to networks, whose classifier and model compute in these types."""

    def logit(phi, x, t):
        return phi["w"] @ x.astype(classifier) + phi["b"]

    def denoiser(theta, x, t):
        return theta * jnp.tanh(x.astype(model))

    space = {"logit": logit, "model": denoiser}
    exec(guide("network"), space)
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
