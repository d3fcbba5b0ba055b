"""Diffuser's U-Net, the rewards' window MLP and the training and sampling of both, in PyTorch.

Written as a good PyTorch user would, with the names of the public code: sequences are (n, c, length), one time and one
embedding serve a whole step of a sampler, the embedding of a path is multiplied once for all of its windows, no graph
where no gradient is asked for, no anomaly detection, fused Adam.  Only a worker process of the speed table imports this
file, and PyTorch with it.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.speed import memory, rival

Net = Callable[[Tensor, Tensor], Tensor]
"""(x (n, horizon, d), t (n,) or (1,)) -> x_0 (n, horizon, d), or rewards (n,); t in steps from 0."""


class SinusoidalPosEmb(nn.Module):
    """t (n,) -> (n, features)."""

    frequencies: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        n = features // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(n) / (n - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)


def time_mlp(width: int, activation: nn.Module) -> nn.Sequential:
    """t (n,) -> (n, width)."""
    return nn.Sequential(SinusoidalPosEmb(width), nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))


class Conv1dBlock(nn.Module):
    """mish(norm(conv(x)))."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        conv, norm = nn.Conv1d(inside, outside, 5, padding=2), nn.GroupNorm(8, outside)
        self.block = nn.Sequential(conv, nn.Identity(), norm, nn.Identity(), nn.Mish())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ResidualTemporalBlock(nn.Module):
    """Two blocks, the embedding between them, and the way around."""

    def __init__(self, inside: int, outside: int, embedding: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Conv1dBlock(inside, outside), Conv1dBlock(outside, outside)])
        self.time_mlp = nn.Sequential(nn.Mish(), nn.Linear(embedding, outside))
        self.residual_conv = nn.Identity() if inside == outside else nn.Conv1d(inside, outside, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x) + self.time_mlp(e)[:, :, None]) + self.residual_conv(x)


class Resample(nn.Module):
    """Half the length, or twice."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class TemporalUnet(nn.Module):
    """(x, t) -> x_0, with t in steps from 0."""

    downs: Any
    ups: Any

    def __init__(self, width: int, multipliers: Sequence[int], d: int) -> None:
        super().__init__()
        self.time_mlp = time_mlp(width, nn.Mish())
        levels = list(itertools.pairwise([d, *(width * multiplier for multiplier in multipliers)]))

        def stage(inside: int, outside: int, resample: nn.Module) -> nn.ModuleList:
            blocks = [ResidualTemporalBlock(inside, outside, width), ResidualTemporalBlock(outside, outside, width)]
            return nn.ModuleList([*blocks, nn.Identity(), resample])

        down = lambda c: Resample(nn.Conv1d(c, c, 3, 2, 1))
        up = lambda c: Resample(nn.ConvTranspose1d(c, c, 4, 2, 1))
        self.downs = nn.ModuleList([*(stage(a, b, down(b)) for a, b in levels[:-1]), stage(*levels[-1], nn.Identity())])
        c = levels[-1][1]
        self.mid_block1, self.mid_block2 = (ResidualTemporalBlock(c, c, width) for _ in range(2))
        self.ups = nn.ModuleList(stage(2 * b, a, up(a)) for a, b in reversed(levels[1:]))
        self.final_conv = nn.Sequential(Conv1dBlock(width, width), nn.Conv1d(width, d, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, e, maps = x.transpose(1, 2), self.time_mlp(t), []
        for first, second, _, resample in self.downs:
            x = second(first(x, e), e)
            maps.append(x)
            x = resample(x)
        x = self.mid_block2(self.mid_block1(x, e), e)
        for first, second, _, resample in self.ups:
            x = resample(second(first(torch.cat([x, maps.pop()], 1), e), e))
        return self.final_conv(x).transpose(1, 2)


class WindowMLP(nn.Module):
    """(x, t) -> rewards (n,), with t in steps from 0."""

    layers: Any

    def __init__(self, window: int, widths: Sequence[int], strided: bool, activation: str, d: int) -> None:
        super().__init__()
        self.window, self.strided = window, strided
        self.activation = {"leaky_relu": nn.LeakyReLU, "mish": nn.Mish, "gelu": nn.GELU}[activation]()
        self.time_mlp = time_mlp(32, self.activation)
        sizes = itertools.pairwise([window * d + 32, *widths, 1])
        self.layers, self.output = nn.ModuleList(nn.Linear(a, b) for a, b in sizes), nn.Linear(1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        n, length, _ = x.shape
        count = length // self.window
        shape = (self.window, count) if self.strided else (count, self.window)
        windows = x.unflatten(1, shape)
        rows = (windows.transpose(1, 2) if self.strided else windows).reshape(n, count, -1)
        weight, bias = self.layers[0].weight, self.layers[0].bias
        shift = functional.linear(self.time_mlp(t), weight[:, rows.shape[-1] :], bias)
        h = self.activation(functional.linear(rows, weight[:, : rows.shape[-1]]) + shift[:, None])
        for layer in self.layers[1:]:
            h = self.activation(layer(h))
        return self.output(h)[..., 0].mean(1)


class Chain:
    """The diffusion process, at times from 1."""

    def __init__(self, betas: np.ndarray) -> None:
        bars = np.concatenate([np.ones(1), np.cumprod(1 - betas)])
        self.bars, self.steps = bars, len(betas)
        table = lambda a: torch.tensor(a, dtype=torch.float32)[:, None, None]
        self.alpha, self.sigma = table(np.sqrt(bars)), table(np.sqrt(1 - bars))
        self.of_x0 = table(np.append(0, np.sqrt(bars[:-1]) * betas / (1 - bars[1:])))
        self.of_x = table(np.append(1, np.sqrt(1 - betas) * (1 - bars[:-1]) / (1 - bars[1:])))

    def noised(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t."""
        t = torch.randint(1, self.steps + 1, (len(x0),))
        return self.alpha[t] * x0 + self.sigma[t] * torch.randn_like(x0), t

    @torch.no_grad()
    def targets(self, base: Net, expert: Net, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the base model's step, and the difference of both models' means."""
        first = base(x, t - 1)
        difference = self.of_x0[t] * (expert(x, t - 1) - first)
        return self.of_x0[t] * first + self.of_x[t] * x, difference

    @torch.no_grad()
    def sample(
        self, unet: Net, times: Sequence[int], given: Tensor, known: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """Ancestral steps down `times`, with the known states held."""
        x = math.sqrt(1 - self.bars[times[0]]) * noise()
        for t, s in itertools.pairwise(times):
            x = torch.where(known, given, x)
            ratio, before = self.bars[t] / self.bars[s], 1 - self.bars[s]
            step, after = 1 - ratio, 1 - self.bars[t]
            of_x0, of_x = math.sqrt(self.bars[s]) * step / after, math.sqrt(ratio) * before / after
            x = of_x0 * unet(x, torch.tensor([t - 1])) + of_x * x + math.sqrt(step * before / after) * noise()
        return torch.where(known, given, x)


def alignment(reward: Net, z: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean((grad_z rho - y)^2), with the rewards and their gradients."""
    z = z.detach().requires_grad_()
    values = reward(z, t - 1)
    slope = torch.autograd.grad(values.sum(), z, create_graph=True)[0]
    return (slope - y).square().mean(), values, slope


def denoising(unet: Net, x0: Tensor, x: Tensor, t: Tensor, known: Tensor) -> Tensor:
    """The loss of a diffusion model: the mean over the coordinates, where none is known."""
    error = unet(torch.where(known, x0, x), t - 1) - x0
    return torch.where(known, 0.0, error).square().mean()


def prepare(setup: Mapping[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The programs and the answers to gendiff's questions.

    Args:
      setup: as for `ours_relative_reward.prepare`, with all that it returned beside its programs, and "compile",
        whether to make the programs "compiled".

    Returns:
      The programs, and the answers; with "peak" no programs, and "peak" (bytes) alone.
    """
    torch.manual_seed(setup["seed"])
    chain, known = Chain(setup["betas"]), torch.tensor(setup["known"])
    if setup["peak"]:
        return {}, {"peak": memory.peak(aligned(setup, chain))}
    nets = {name: load(setup, name) for name in ("base", "expert", "reward")}
    answers = {name: answer.detach().numpy() for name, answer in reply(setup, chain, nets, known).items()}
    size, paths = setup["matmul"], 2 * torch.rand(1000, *known.shape) - 1
    programs: dict[str, Callable[[], Any]] = {
        "matmul/eager": rival.matmul(size, size, 1),
        "reward-step-cached/eager": train_cached(setup, chain, known.shape),
    }
    variants = {"eager": lambda net: net} | (
        {"compiled": partial(torch.compile, dynamic=False)} if setup["compile"] else {}
    )
    for name, how in variants.items():
        base, expert = (how(load(setup, which).requires_grad_(False)) for which in ("base", "expert"))
        programs[f"reward-step/{name}"] = train_reward(setup, chain, base, expert, paths)
        programs[f"diffuser-train/{name}"] = train(setup, chain, how, paths, known)
        given, steps = paths[: setup["samples"]], setup["sample_steps"]
        times = np.round(np.linspace(chain.steps, 0, steps + 1)).astype(int).tolist()
        noise = partial(torch.randn, given.shape)
        programs[f"diffuser-denoise/{name}"] = partial(chain.sample, base, times, given, known, noise)
    return programs, answers


def load(setup: Mapping[str, Any], name: str) -> Any:
    """A network with gendiff's parameters; fails where one is missing, left over or of another size."""
    d = setup["known"].shape[1]
    net = (
        WindowMLP(**setup["fields"]["reward"], d=d)
        if name == "reward"
        else TemporalUnet(**setup["fields"]["unet"], d=d)
    )
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    # Windows of 1 are left out there.
    sized = lambda key, value: value.reshape(shapes[key]) if key in shapes else value
    net.load_state_dict({key: torch.tensor(sized(key, value)) for key, value in setup[name].items()})
    return net


def reply(setup: Mapping[str, Any], chain: Chain, nets: Mapping[str, Any], known: Tensor) -> dict[str, Tensor]:
    """The answers to the questions of `ours_relative_reward`."""
    inputs = {name: torch.tensor(value) for name, value in setup["inputs"].items()}
    x0, x, t = (inputs[name] for name in ("x0", "x", "t"))
    z, y = chain.targets(nets["base"], nets["expert"], x, t)
    loss, values, slope = alignment(nets["reward"], z, t, y)
    train_loss = denoising(nets["base"], x0, x, t, known)
    noise = partial(next, iter(inputs["noise"]))
    samples = chain.sample(nets["base"], inputs["times"].tolist(), x0, known, noise)
    with torch.no_grad():
        denoised = nets["base"](x, t - 1)
    return {
        "denoised": denoised,
        "mean": z,
        "target": y,
        "reward": values,
        "slope": slope,
        "loss": loss,
        "gradient_norm": gradient_norm(loss, nets["reward"]),
        "train_loss": train_loss,
        "train_gradient_norm": gradient_norm(train_loss, nets["base"]),
        "samples": samples,
    }


def gradient_norm(loss: Tensor, net: nn.Module) -> Tensor:
    """Of the gradient in all parameters of a network; those that have no part in the loss have none."""
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return torch.stack([each.square().sum() for each in gradients if each is not None]).sum().sqrt()


def train_reward(setup: Mapping[str, Any], chain: Chain, base: Net, expert: Net, paths: Tensor) -> Callable[[], Any]:
    """Goes on training a reward, with targets computed in every step."""
    reward = load(setup, "reward")

    def loss() -> Tensor:
        x, t = chain.noised(paths[torch.randint(len(paths), (setup["batch"],))])
        z, y = chain.targets(base, expert, x, t)
        return alignment(reward, z, t, y)[0]

    return rival.train(loss, adam(reward, setup["training"]["reward_rate"]), setup["steps"])


def adam(net: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Adam with one kernel for all parameters."""
    return torch.optim.Adam(net.parameters(), rate, fused=True)


def train_cached(setup: Mapping[str, Any], chain: Chain, shape: Sequence[int]) -> Callable[[], Any]:
    """Goes on training the rewards of all goals on one pool of targets, one after the other."""
    n, goals = setup["pool"], setup["goals"]
    x, t, targets = torch.randn(n, *shape), 1 + torch.arange(n) % chain.steps, torch.randn(n, goals, *shape)
    runs = []
    for goal in range(goals):
        reward = load(setup, "reward")

        def loss(reward: Net, goal: int) -> Tensor:
            rows = torch.randint(n, (setup["batch"],))
            return alignment(reward, x[rows], t[rows], targets[rows, goal])[0]

        optimiser = adam(reward, setup["training"]["reward_rate"])
        runs.append(rival.train(partial(loss, reward, goal), optimiser, setup["cached_steps"]))
    return lambda: [run() for run in runs]


def train(
    setup: Mapping[str, Any], chain: Chain, how: Callable[[nn.Module], Any], paths: Tensor, known: Tensor
) -> Callable[[], Any]:
    """Goes on training a diffusion model: Adam, and an average of the weights."""
    module = load(setup, "base")
    net = how(module)

    def loss() -> Tensor:
        x0 = paths[torch.randint(len(paths), (setup["train_batch"],))]
        return denoising(net, x0, *chain.noised(x0), known)

    given = setup["training"]
    return rival.train(loss, adam(module, given["rate"]), setup["train_steps"], decay=given["decay"])


def aligned(setup: Mapping[str, Any], chain: Chain) -> Callable[[], Any]:
    """The loss of a batch with given targets, and its gradient."""
    reward, n = load(setup, "reward"), setup["batch"]
    parameters = list(reward.parameters())
    x, y = torch.randn(2, n, *setup["known"].shape)
    t = 1 + torch.arange(n) % chain.steps
    return lambda: torch.autograd.grad(alignment(reward, x, t, y)[0], parameters, allow_unused=True)
