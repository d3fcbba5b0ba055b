"""Steering a base model with its reward."""

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Bool

from gendiff import check, distributed, guidance, potential, sampling
from gendiff.denoiser import Denoiser, denoise
from gendiff.guidance import Guidance, Strength
from gendiff.methods.relative_reward.targets import Models, Switches, base_mean, factor
from gendiff.potential import Logit, Potential
from gendiff.process import Process
from gendiff.types import Params, PRNGKey, Sample, Samples, Scalar, Time

CHUNK = 64
"""Samples that a device draws at a time."""


def strength(process: Process, switches: Switches, scale: Scalar | float = 1.0) -> Strength:
    """Return the shift of x_0 along grad rho, scale divided by `factor`; at scale 1 a perfect rho gives the expert."""
    check.number("relative reward: scale", scale)
    unit = factor(process, switches.target)
    return lambda t: scale / unit(t)


def steer(process: Process, rho: Potential, switches: Switches, scale: Scalar | float = 1.0) -> Guidance:
    """Steer the base model with its reward; `at="base_mean"` takes the gradient at the mean of the base's step."""
    check.choice("relative reward: at", switches.at, ("x", "base_mean"))
    shift, gradient = strength(process, switches, scale), jax.grad(potential.scalar("relative reward", rho))
    if switches.at == "x":
        return guidance.steer(rho, shift)

    def steering(base: Denoiser) -> Denoiser:
        def steered(x: Sample, t: Time) -> Sample:
            x0 = denoise("relative reward: base", base, x, t)
            return x0 + shift(t) * gradient(base_mean(process, x, x0, t), t)

        return steered

    return steering


def kernel(
    models: Models, network: Logit, theta: Params, phi: Params, scale: Scalar | float, known: Bool[Array, "*shape"]
) -> Callable[[Sample], sampling.Kernel]:
    """Return held -> the steered model's ancestral step, clipped to [-1, 1], which keeps the known coordinates."""
    process, model, switches = models
    towards = steer(process, partial(network, phi), switches, scale)
    denoiser = guidance.chain(towards, guidance.clip(-1.0, 1.0))(partial(model, theta))
    return lambda held: sampling.pinned(sampling.ancestral(process, denoiser), held, known)


@partial(jax.jit, static_argnums=(0, 1, 2))
def steered(
    models: Models,
    network: Logit,
    mesh: jax.sharding.Mesh | None,
    theta: Params,
    phi: Params,
    scale: Scalar | float,
    known: Bool[Array, "*shape"],
    held: Samples,
    key: PRNGKey,
) -> Samples:
    """Draw a sample of a discrete chain for every row of `held` (n, *shape), and keep its known coordinates."""
    process, step = models.process, kernel(models, network, theta, phi, scale, known)
    grid = process.grid(process.steps or 100)
    draw = lambda pair: sampling.sample(process, step(pair[1]), grid, pair[0], pair[1].shape)
    return distributed.chunked(draw, (jax.random.split(key, len(held)), held), CHUNK, mesh, cut=False)
