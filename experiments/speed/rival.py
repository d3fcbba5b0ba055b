"""The networks, the guided sampler and the training step of the checkerboard experiment, in PyTorch.

Written as a good PyTorch user would: batched modules, one noise level and one time embedding for a sampler's step, no
graph where no gradient is asked for, no gradients of parameters while guiding, fused Adam.  Only a worker process of
the speed table imports this file, and PyTorch with it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (n, d), sigma ()) -> x_0 (n, d)."""


class BlurredFourier(nn.Module):
    """Fourier features of u (n, d) that blur as the noise grows: (n, 2 count)."""

    frequencies: Tensor

    def __init__(self, inputs: int, count: int, data_std: float) -> None:
        super().__init__()
        self.data_std = data_std
        self.register_buffer("frequencies", torch.empty(inputs, count))

    def forward(self, u: Tensor, c_noise: Tensor) -> Tensor:
        variance = torch.exp(8 * c_noise)
        level = variance / (variance + self.data_std**2)
        blur = torch.exp(-0.5 * level * self.frequencies.square().sum(0))
        phase = u @ self.frequencies
        return torch.cat([blur * phase.sin(), blur * phase.cos()], -1)


class ResidualMLP(nn.Module):
    """(u (n, d), c_noise () or (n, 1)) -> (n, outputs): blocks h + W2 silu(W1 silu(h) + Wt silu(e))."""

    angles: Tensor

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, fourier: int, data_std: float) -> None:
        super().__init__()
        self.register_buffer("angles", torch.from_numpy(np.geomspace(1.0, 200.0, 16)).float(), persistent=False)
        self.time = nn.Linear(32, width // 2)
        self.fourier = BlurredFourier(inputs, fourier, data_std)
        self.input = nn.Linear(inputs + 2 * fourier, width)
        self.block_in = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.block_time = nn.ModuleList(nn.Linear(width // 2, width, bias=False) for _ in range(depth))
        self.block_out = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.output = nn.Linear(width, outputs)

    def forward(self, u: Tensor, c_noise: Tensor) -> Tensor:
        angles = c_noise * self.angles
        embedding = functional.silu(self.time(torch.cat([angles.sin(), angles.cos()], -1)))
        h = self.input(torch.cat([u, self.fourier(u, c_noise)], -1))
        for block_in, block_time, block_out in zip(self.block_in, self.block_time, self.block_out, strict=True):
            h = h + block_out(functional.silu(block_in(functional.silu(h)) + block_time(embedding)))
        return self.output(h)


class Denoiser(nn.Module):
    """(x (n, d), sigma () or (n, 1)) -> x_0 (n, d): EDM's preconditioning of a `ResidualMLP`."""

    def __init__(self, net: ResidualMLP, data_std: float) -> None:
        super().__init__()
        self.net, self.data_std = net, data_std

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        variance = sigma**2 + self.data_std**2
        prediction = self.net(x * variance.rsqrt(), 0.25 * sigma.log())
        return self.data_std**2 / variance * x + sigma * self.data_std * variance.rsqrt() * prediction


class Classifier(nn.Module):
    """(x (n, d), sigma () or (n, 1)) -> logits (n, 1)."""

    def __init__(self, net: ResidualMLP, shift: float, sharpness: float, data_std: float) -> None:
        super().__init__()
        self.net, self.shift, self.sharpness, self.data_std = net, shift, sharpness, data_std

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        logit = self.net(x * (sigma**2 + self.data_std**2).rsqrt(), 0.25 * sigma.log())
        return logit * torch.sqrt(1 + (self.sharpness * self.data_std / sigma) ** 2) + self.shift


def log_good(classifiers: Sequence[Classifier], x: Tensor, sigma: Tensor) -> Tensor:
    """sum_k log C_k, summed over the batch."""
    return sum((functional.logsigmoid(each(x, sigma)).sum() for each in classifiers), torch.zeros(()))


def guidance(classifiers: Sequence[Classifier], x: Tensor, sigma: Tensor) -> Tensor:
    """sum_k grad log C_k at x (n, d)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_good(classifiers, x, sigma), x)[0]


def eager(denoiser: Denoiser, classifiers: Sequence[Classifier]) -> Denoise:
    """The guided denoiser, x_0 + sigma^2 sum_k grad log C_k."""

    @torch.no_grad()
    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = denoiser(x, sigma)
        return x0 + sigma**2 * guidance(classifiers, x, sigma) if classifiers else x0

    return guided


def compiled(denoiser: Denoiser, classifiers: Sequence[Classifier]) -> Denoise:
    """The same as one graph, with `torch.func.grad`: faster compiled than two graphs and autograd between them."""

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = denoiser(x, sigma)
        if not classifiers:
            return x0
        return x0 + sigma**2 * torch.func.grad(lambda x: log_good(classifiers, x, sigma))(x)

    return torch.no_grad()(torch.compile(guided, dynamic=False))


def heun(denoise: Denoise, times: Tensor, x: Tensor) -> Tensor:
    """The deterministic sampler of Karras et al. (2022), Algorithm 1, from x (n, d) down `times` (steps + 1,)."""
    for sigma, following in itertools.pairwise(times):
        slope = (x - denoise(x, sigma)) / sigma
        moved = x + (following - sigma) * slope
        if following > 0:
            slope = 0.5 * (slope + (moved - denoise(moved, following)) / following)
            moved = x + (following - sigma) * slope
        x = moved
    return x


def denoising_loss(denoiser: Denoiser, x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Denoising score matching with EDM's weight; x0, x (n, d), sigma (n, 1)."""
    weight = 1 / sigma**2 + 1 / denoiser.data_std**2
    return (weight * (denoiser(x, sigma) - x0) ** 2).sum(-1).mean()


def prepare(setup: Mapping[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The programs and the answers to gendiff's questions.

    Args:
      setup: as for `ours.prepare`, with all that it returned beside its programs, and "chunk", the samples at a time of
        the programs "chunked".
    """
    torch.manual_seed(setup["seed"])
    denoiser, classifiers = load_denoiser(setup).requires_grad_(False), load_classifiers(setup)
    inputs = {name: torch.tensor(value) for name, value in setup["inputs"].items()}
    answers = reply(load_denoiser(setup), classifiers, inputs)
    times, n, size = inputs["times"], setup["samples"], setup["matmul"]
    programs: dict[str, Callable[[], Any]] = {
        "matmul/eager": matmul(size, size, 1),
        "skinny/eager": matmul(n, setup["shapes"]["denoiser"]["width"], setup["products"]),
    }
    for name, loss in (("eager", denoising_loss), ("compiled", torch.compile(denoising_loss, dynamic=False))):
        trained = load_denoiser(setup)
        batch_loss = partial(noisy_loss, partial(loss, trained), torch.tensor(setup["points"]))
        optimiser = torch.optim.Adam(trained.parameters(), 1e-3, fused=True)
        programs[f"train-step/{name}"] = train(batch_loss, optimiser, setup["train_steps"], clip=1.0, decay=0.998)
    for members in setup["members"]:
        row, chosen = f"sample-k{members}", classifiers[:members]
        programs[f"{row}/eager"] = sample(eager(denoiser, chosen), times, n, n)
        programs[f"{row}/chunked"] = sample(eager(denoiser, chosen), times, n, setup["chunk"])
        programs[f"{row}/compiled"] = sample(compiled(denoiser, chosen), times, n, n)
    return programs, {name: value.numpy() for name, value in answers.items()}


def load_denoiser(setup: Mapping[str, Any]) -> Denoiser:
    """The denoiser with gendiff's parameters."""
    shape = setup["shapes"]["denoiser"]
    denoiser = Denoiser(ResidualMLP(2, 2, **shape), shape["data_std"])
    load(denoiser.net, setup["theta"]["params"])
    return denoiser


def load_classifiers(setup: Mapping[str, Any]) -> list[Classifier]:
    """The classifiers with gendiff's parameters, which need no gradients."""
    shape = dict(setup["shapes"]["classifier"])
    sharpness, classifiers = shape.pop("sharpness"), []
    for parameters in setup["classifiers"]:
        net = ResidualMLP(2, 1, **shape)
        load(net, parameters["net"]["params"]["trunk"])
        classifier = Classifier(net, float(parameters["shift"]), sharpness, shape["data_std"])
        classifiers.append(classifier.requires_grad_(False))
    return classifiers


def load(net: ResidualMLP, parameters: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Copies the parameters of gendiff's `ResidualMLP`; fails where one is missing, left over or of another shape."""
    state = {"fourier.frequencies": torch.tensor(parameters["fourier"]["frequencies"])}
    for name, dense in parameters.items():
        if name == "fourier":
            continue
        # block0_in -> block_in.0
        block, _, part = name.partition("_")
        place = f"block_{part}.{block.removeprefix('block')}" if part else name
        state[f"{place}.weight"] = torch.tensor(dense["kernel"].T)
        if "bias" in dense:
            state[f"{place}.bias"] = torch.tensor(dense["bias"])
    net.load_state_dict(state)


def reply(denoiser: Denoiser, classifiers: Sequence[Classifier], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The answers to the questions of `ours.questions`."""
    guided = eager(denoiser, classifiers)
    at_levels = lambda function: torch.stack(
        [function(x, level) for x, level in zip(inputs["x"], inputs["levels"], strict=True)]
    )
    answers = {"denoised": at_levels(torch.no_grad()(denoiser)), "guided": at_levels(guided)}
    answers["samples"] = heun(guided, inputs["times"], inputs["times"][0] * inputs["noise"])
    if classifiers:
        answers["guidance"] = at_levels(lambda x, level: guidance(classifiers, x, level))
    loss = denoising_loss(denoiser, inputs["x0"], inputs["noisy"], inputs["sigma"][:, None])
    gradients = torch.autograd.grad(loss, list(denoiser.parameters()))
    answers["loss"] = loss.detach()
    answers["gradient_norm"] = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    return answers


def sample(denoise: Denoise, times: Tensor, n: int, chunk: int) -> Callable[[], Any]:
    """Draws n samples, `chunk` at a time."""

    def draw() -> Tensor:
        noise = times[0] * torch.randn(n, 2)
        return torch.cat([heun(denoise, times, x) for x in noise.split(chunk)])

    return draw


def noisy_loss(loss: Callable[[Tensor, Tensor, Tensor], Tensor], points: Tensor) -> Tensor:
    """The loss of all points at noise levels drawn anew."""
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(len(points), 1))
    return loss(points, points + sigma * torch.randn_like(points), sigma)


def train(
    loss: Callable[[], Tensor],
    optimiser: torch.optim.Optimizer,
    steps: int,
    clip: float | None = None,
    decay: float | None = None,
) -> Callable[[], Any]:
    """Goes on training for `steps` steps; gradients are clipped and weights averaged where a number says so."""
    parameters: list[Tensor] = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    average = [] if decay is None else [parameter.detach().clone() for parameter in parameters]

    def go_on() -> None:
        for _ in range(steps):
            optimiser.zero_grad()
            loss().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimiser.step()
            if decay is not None:
                with torch.no_grad():
                    torch._foreach_lerp_(average, parameters, 1 - decay)

    return go_on


def matmul(rows: int, width: int, repetitions: int) -> Callable[[], Any]:
    """`repetitions` products of (rows, width) and (width, width)."""
    left, right = torch.ones(rows, width), torch.ones(width, width) / width

    def multiply() -> None:
        for _ in range(repetitions):
            left @ right

    return multiply
