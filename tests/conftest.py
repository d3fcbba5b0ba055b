"""Settings of all tests, and a Gaussian mixture with closed forms."""

import contextlib
import importlib.util
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gendiff.denoiser import Denoiser
from gendiff.potential import Potential
from gendiff.process import Process

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # because a script's `&` switches Ctrl-C off for children
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Most programs of tests run once, so that optimising them takes longer than running them.  Child processes inherit it.
QUICK = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") not in ("", "0")
with contextlib.suppress(AttributeError):  # of a JAX without this option
    jax.config.update("jax_disable_most_optimizations", QUICK)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# Compilation is most of a cold run.  The processes that tests start inherit the folder.
CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
Path(CACHE).mkdir(mode=0o700, parents=True, exist_ok=True)  # private, because a written program runs as code
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# The slowest files come first, so that no worker waits at the end.
LONGEST = ("processes", "experiments/checkerboard", "experiments/collectives", "experiments/traffic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"tests/{name}_test.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(places)))
    if importlib.util.find_spec("torch") is None:
        skip = pytest.mark.skip(reason="PyTorch is not installed: pip install torch==2.13.0")
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(skip)


dead_workers: list[str] = []


def pytest_testnodedown(node: Any, error: object) -> None:
    """Note a worker of pytest-xdist that died."""
    if error:
        dead_workers.append(f"{node.gateway.id}: {error}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if a worker died, because pytest-xdist reports success if it skips the other tests."""
    if dead_workers and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the dead workers in the last lines."""
    for worker in dead_workers:
        terminalreporter.write_line(f"FAILED: a test process died, {worker}", red=True)


# The same examples in every run.  No deadline, because the first example of a test compiles.
hypothesis.settings.register_profile("gendiff", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("gendiff")


class Mixture(NamedTuple):
    """p(x_0) = sum_k weights_k N(means_k, stds_k^2 I), with a label: y = 1 for a sample of a component in `good`.

    A component is Gaussian given x_t, so the denoiser, score, density and Bayes classifier are exact.
    """

    weights: np.ndarray
    """(K,), sum 1."""
    means: np.ndarray
    """(K, d)."""
    stds: np.ndarray
    """(K,)."""
    good: tuple[bool, ...]

    @property
    def alpha(self) -> float:
        """P(y = 1)."""
        return float(self.weights[list(self.good)].sum())

    def part(self, good: bool) -> "Mixture":
        """p(x_0 | y)."""
        keep = np.array(self.good) == good
        weights = self.weights[keep] / self.weights[keep].sum()
        return Mixture(weights, self.means[keep], self.stds[keep], (True,) * int(keep.sum()))

    def draw(self, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """n samples (n, d) in float32 and their labels (n,)."""
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.weights), n, p=self.weights)
        noise = rng.standard_normal((n, self.means.shape[1]))
        x = self.means[k] + self.stds[k, None] * noise
        return x.astype(np.float32), np.array(self.good)[k]

    def cdf(self, axis: int, values: np.ndarray) -> np.ndarray:
        """Distribution function of one coordinate of x_0."""
        z = (np.asarray(values, np.float64)[:, None] - self.means[:, axis]) / self.stds
        return stats.norm.cdf(z) @ self.weights

    def log_joint(self, process: Process, x: jax.Array, t: jax.Array) -> jax.Array:
        """log P(component k) p_t(x | k), shape (K,): x_t given k is N(alpha mean_k, alpha^2 std_k^2 + sigma^2)."""
        alpha, variance = process.alpha(t), self.variance(process, t)
        square = jnp.sum((x[None] - alpha * self.means.astype(np.float32)) ** 2, -1)
        d = self.means.shape[1]
        return jnp.log(self.weights.astype(np.float32)) - 0.5 * (square / variance + d * jnp.log(2 * np.pi * variance))

    def variance(self, process: Process, t: jax.Array) -> jax.Array:
        """Variance of x_t given the component, (K,)."""
        return process.alpha(t) ** 2 * self.stds.astype(np.float32) ** 2 + process.sigma(t) ** 2

    def log_density(self, process: Process) -> Potential:
        """log p_t(x)."""
        return lambda x, t: jax.nn.logsumexp(self.log_joint(process, x, t))

    def score(self, process: Process) -> Denoiser:
        """grad log p_t(x): the mean of the components' scores under P(k | x_t)."""

        def score(x: jax.Array, t: jax.Array) -> jax.Array:
            share = jax.nn.softmax(self.log_joint(process, x, t))
            scores = (process.alpha(t) * self.means.astype(np.float32) - x[None]) / self.variance(process, t)[:, None]
            return share @ scores

        return score

    def denoiser(self, process: Process) -> Denoiser:
        """E[x_0 | x_t]: the mean of the components' regressions under P(k | x_t)."""

        def denoiser(x: jax.Array, t: jax.Array) -> jax.Array:
            alpha, means = process.alpha(t), self.means.astype(np.float32)
            share = jax.nn.softmax(self.log_joint(process, x, t))
            gain = alpha * self.stds.astype(np.float32) ** 2 / self.variance(process, t)
            return share @ (means + gain[:, None] * (x[None] - alpha * means))

        return denoiser

    def log_good(self, process: Process) -> Potential:
        """log P(y = 1 | x_t), the Bayes classifier."""

        def log_good(x: jax.Array, t: jax.Array) -> jax.Array:
            joint = self.log_joint(process, x, t)
            return jax.nn.logsumexp(joint[np.flatnonzero(self.good)]) - jax.nn.logsumexp(joint)

        return log_good


@pytest.fixture(scope="session")
def mixture() -> Mixture:
    """Three overlapping components in the plane; two are good, alpha = 0.6."""
    means = np.array([[0.9, 0.3], [-0.7, 0.6], [0.1, -0.8]])
    return Mixture(np.array([0.35, 0.4, 0.25]), means, np.array([0.35, 0.25, 0.3]), (True, False, True))


@pytest.fixture(scope="session")
def gaussian() -> Mixture:
    """One Gaussian on the line, mean 0.4 and standard deviation 0.6."""
    return Mixture(np.ones(1), np.array([[0.4]]), np.array([0.6]), (True,))
