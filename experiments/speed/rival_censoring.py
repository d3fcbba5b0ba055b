"""ADM's U-Net and half U-Net, the censored sampler and both training steps of the sevens experiment, in PyTorch.

Written as a good PyTorch user would, after the code of the public checkpoints and with its names: images are (n, c, h,
w), attention is `scaled_dot_product_attention`, one time and one embedding serve a whole step of a sampler, no graph
where no gradient is asked for, no gradients of parameters while guiding, one reward after the other, fused Adam.  Only
a worker process of the speed table imports this file, and PyTorch with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.speed import rival

Net = Callable[[Tensor, Tensor], Tensor]
"""(x (n, c, h, w), t (n,) or (1,)) -> eps (n, c, h, w), or logits (n,)."""


def norm(channels: int, least: int) -> nn.GroupNorm:
    """At most 32 groups of at least `least` channels."""
    count = max(n for n in range(1, 33) if channels % n == 0 and (n == 1 or channels // n >= least))
    return nn.GroupNorm(count, channels)


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(h) (1 + scale) + shift)), h = conv(silu(norm(x)))."""

    def __init__(self, inside: int, outside: int, embedding: int, least: int, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(norm(inside, least), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outside))
        last = nn.Conv2d(outside, outside, 3, padding=1)
        self.out_layers = nn.Sequential(norm(outside, least), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return functional.avg_pool2d(x, 2)
        return functional.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.in_layers[2](self._resampled(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(e)[:, :, None, None].chunk(2, 1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.out_layers[1:](h) + self.skip_connection(self._resampled(x))


class AttentionBlock(nn.Module):
    """x + self-attention between the pixels of norm(x)."""

    def __init__(self, channels: int, heads: int, least: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = norm(channels, least)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        n, c, h, w = x.shape
        flat = x.reshape(n, c, h * w)
        qkv = self.qkv(self.norm(flat)).reshape(n, self.heads, 3, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(2)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, c, h * w)
        return (flat + self.proj_out(y)).reshape(n, c, h, w)


class AttentionPool2d(nn.Module):
    """The mean pixel asks, the mean and all pixels answer."""

    def __init__(self, size: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(channels, size**2 + 1))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        x = x.reshape(n, c, -1)
        x = torch.cat([x.mean(-1, keepdim=True), x], -1) + self.positional_embedding
        qkv = self.qkv_proj(x).reshape(n, 3, self.heads, c // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        y = functional.scaled_dot_product_attention(q[:, :, :1], k, v)
        return self.c_proj(y.reshape(n, c, 1))[:, 0, 0]


class Downsample(nn.Module):
    """Half the extents."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the extents."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Sequential):
    """Blocks of x and the embedding, one after the other."""

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # type: ignore[override]
        for block in self:
            x = block(x) if isinstance(block, nn.Conv2d) else block(x, e)
        return x


class Trunk(nn.Module):
    """The embedding of time and the way down.

    Args:
      size: pixels along a side.
      net: the fields of gendiff's network.
    """

    def __init__(self, size: int, net: Mapping[str, Any]) -> None:
        super().__init__()
        width = net["width"]
        self.net, self.width, self.embedding = net, width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        c = width * net["multipliers"][0]
        stages, self.widths = [Stage(nn.Conv2d(1, c, 3, padding=1))], [c]
        for level, multiplier in enumerate(net["multipliers"]):
            for _ in range(net["blocks"]):
                stages.append(self._stage(c, multiplier * width, size))
                c = multiplier * width
                self.widths.append(c)
            if level < len(net["multipliers"]) - 1:
                stages.append(Stage(self._block(c, c, "down") if net["resample_blocks"] else Downsample(c)))
                self.widths.append(c)
                size //= 2
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = Stage(self._block(c, c), self._attention(c), self._block(c, c))
        self.size = size

    def _heads(self, channels: int) -> int:
        per_head = self.net["head_channels"]
        return self.net["heads"] if per_head is None else max(1, channels // per_head)

    def _block(self, inside: int, outside: int, resample: str = "") -> ResBlock:
        return ResBlock(inside, outside, self.embedding, self.net["least"], resample)

    def _attention(self, channels: int) -> AttentionBlock:
        return AttentionBlock(channels, self._heads(channels), self.net["least"])

    def _stage(self, inside: int, outside: int, size: int, *more: nn.Module) -> Stage:
        attention = [self._attention(outside)] if size in self.net["attention"] else []
        return Stage(self._block(inside, outside), *attention, *more)

    def embed(self, t: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        angles = t[:, None].float() * frequencies
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], -1))

    def descend(self, x: Tensor, e: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.input_blocks:
            x = stage(x, e)
            maps.append(x)
        return [*maps, self.middle_block(x, e)]


class UNet(Trunk):
    """(x, t) -> eps, with t in steps from 0."""

    def __init__(self, size: int, net: Mapping[str, Any]) -> None:
        super().__init__(size, net)
        c, size, widths, stages = self.widths[-1], self.size, list(self.widths), []
        for level, multiplier in reversed(list(enumerate(net["multipliers"]))):
            new = multiplier * self.width
            for i in range(net["blocks"] + 1):
                larger: list[nn.Module] = []
                if level and i == net["blocks"]:
                    larger.append(self._block(new, new, "up") if net["resample_blocks"] else Upsample(new))
                stages.append(self._stage(c + widths.pop(), new, size, *larger))
                c = new
            size *= 2
        self.output_blocks = nn.ModuleList(stages)
        self.out = nn.Sequential(norm(c, net["least"]), nn.SiLU(), nn.Conv2d(c, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = self.embed(t)
        *maps, h = self.descend(x, e)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, maps.pop()], 1), e)
        return self.out(h)


class HalfUNet(Trunk):
    """(x, t) -> logits (n,)."""

    def __init__(self, size: int, net: Mapping[str, Any]) -> None:
        super().__init__(size, net)
        c = self.widths[-1]
        pool = AttentionPool2d(self.size, c, self._heads(c))
        self.out = nn.Sequential(norm(c, net["least"]), nn.SiLU(), pool)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.descend(x, self.embed(t))[-1])


def log_reward(reward: Net, x: Tensor, t: Tensor) -> Tensor:
    """log r at x, in steps t from 1, (n,)."""
    return functional.logsigmoid(reward(x, t - 1))


def guidance(rewards: Sequence[Net], x: Tensor, t: Tensor) -> Tensor:
    """sum_k grad log r_k at x."""
    total = torch.zeros_like(x)
    for reward in rewards:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            total += torch.autograd.grad(log_reward(reward, at, t).sum(), at)[0]
    return total


class Sampler:
    """Ancestral steps of variance beta down `times` (steps + 1,), with the mean shifted by beta omega grad log r."""

    def __init__(self, unet: Net, rewards: Sequence[Net], told: Mapping[str, Any], times: np.ndarray) -> None:
        self.unet, self.rewards, self.scale = unet, rewards, told["scale"]
        self.times = times.tolist()
        self.alpha, self.sigma = told["alpha"].tolist(), told["sigma"].tolist()

    @torch.no_grad()
    def __call__(self, x: Tensor, noise: Callable[[int], Tensor]) -> Tensor:
        """Samples from x (n, c, h, w) at the first time; noise(i) is that of step i."""
        for i, (t, s) in enumerate(zip(self.times[:-1], self.times[1:], strict=True)):
            x = self._step(x, t, s, noise(i))
        return x

    def _step(self, x: Tensor, t: int, s: int, noise: Tensor) -> Tensor:
        alpha_t, alpha_s, var_t, var_s = self.alpha[t], self.alpha[s], self.sigma[t] ** 2, self.sigma[s] ** 2
        at = torch.tensor([t])
        x0 = ((x - self.sigma[t] * self.unet(x, at - 1)) / alpha_t).clamp(-1, 1)
        if self.rewards:
            x0 = (x0 + self.scale * var_t / alpha_s * guidance(self.rewards, x, at)).clamp(-1, 1)
        ratio = alpha_t / alpha_s
        beta = var_t - ratio**2 * var_s
        mean = ratio * var_s / var_t * x + alpha_s * beta / var_t * x0
        return mean + math.sqrt(beta) * noise if s else mean


def noise_loss(unet: Net, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Ho et al.'s simple loss."""
    return (unet(x, t - 1) - noise).square().flatten(1).sum(1).mean()


def reward_loss(reward: Net, x: Tensor, t: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The weighted cross-entropy."""
    each = functional.binary_cross_entropy_with_logits(reward(x, t - 1), labels, reduction="none")
    return (weights * each).mean()


class Batches:
    """Random images, noised at random times as a training step sees them."""

    def __init__(self, told: Mapping[str, Any], images: Tensor, batch: int) -> None:
        self.alpha, self.sigma = (torch.tensor(told[name])[:, None, None, None] for name in ("alpha", "sigma"))
        self.images, self.batch = images, batch

    def rows(self) -> Tensor:
        return torch.randint(len(self.images), (self.batch,))

    def noised(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t and the noise."""
        x0, t = self.images[rows], torch.randint(1, len(self.alpha), (self.batch,))
        noise = torch.randn_like(x0)
        return self.alpha[t] * x0 + self.sigma[t] * noise, t, noise


def prepare(setup: Mapping[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The programs and the answers to gendiff's questions.

    Args:
      setup: as for `ours_censoring.prepare`, with all that it returned beside its programs, and "compile", whether to
        make the programs "compiled".
    """
    torch.manual_seed(setup["seed"])
    programs: dict[str, Callable[[], Any]] = {"matmul/eager": rival.matmul(setup["matmul"], setup["matmul"], 1)}
    answers: dict[str, Tensor] = {}
    for name, given in setup["networks"].items():
        told = setup["nets"][name]
        answers |= {f"{name}/{question}": answer for question, answer in reply(setup, told).items()}
        for variant, how in ways(setup).items():
            unet = how(load(UNet, told, "unet", told["unet"]).requires_grad_(False))
            loaded = [load(HalfUNet, told, "reward", state).requires_grad_(False) for state in told["rewards"]]
            rewards = [how(reward) for reward in loaded]
            for members in given["members"]:
                sampler = Sampler(unet, rewards[:members], setup, told["times"])
                shape = (given["samples"], 1, told["size"], told["size"])
                programs[f"step-{name}-k{members}/{variant}"] = sample(sampler, shape)
            if name == "small":
                programs[f"train-small/{variant}"] = train(setup, told, how)
                programs[f"reward-small-k{setup['ensemble']}/{variant}"] = train_rewards(setup, told, how)
    return programs, {name: answer.detach().numpy() for name, answer in answers.items()}


def ways(setup: Mapping[str, Any]) -> dict[str, Callable[[nn.Module], Any]]:
    """The variants: what is done to a network."""
    made = {"eager": lambda net: net, "channels_last": lambda net: net.to(memory_format=torch.channels_last)}
    return made | ({"compiled": partial(torch.compile, dynamic=False)} if setup["compile"] else {})


def load(kind: type[Trunk], told: Mapping[str, Any], name: str, state: Mapping[str, np.ndarray]) -> Any:
    """The network with gendiff's parameters; fails where one is missing, left over or of another size."""
    net = kind(told["size"], told["fields"][name])
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    # Windows of 1 are left out there.
    sized = lambda key, value: value.reshape(shapes[key]) if key in shapes else value
    net.load_state_dict({key: torch.tensor(sized(key, value)) for key, value in state.items()})
    return net


def channels_first(x: np.ndarray) -> Tensor:
    """(..., h, w, c) -> (..., c, h, w)."""
    return torch.tensor(x).movedim(-1, -3).contiguous()


def channels_last(x: Tensor) -> Tensor:
    """(..., c, h, w) -> (..., h, w, c)."""
    return x.movedim(-3, -1)


def reply(setup: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Tensor]:
    """The answers to the questions of `ours_censoring`."""
    unet = load(UNet, told, "unet", told["unet"])
    rewards = [load(HalfUNet, told, "reward", state) for state in told["rewards"]]
    inputs = told["inputs"]
    x, t = channels_first(inputs["x"]), torch.tensor(inputs["t"])
    with torch.no_grad():
        answers = {"epsilon": channels_last(unet(x, t - 1))}
        if rewards:
            answers["log_reward"] = torch.stack([log_reward(reward, x, t) for reward in rewards]).sum(0)
            answers["guidance"] = channels_last(guidance(rewards, x, t))
    if "noise" in inputs:
        noise = channels_first(inputs["noise"])
        sampler = Sampler(unet, rewards, setup, told["times"])
        answers["samples"] = channels_last(sampler(setup["sigma"][-1].item() * noise[0], lambda i: noise[1 + i]))
    if "x0" in inputs:
        answers |= reply_losses(setup, unet, rewards, inputs)
    return answers


def reply_losses(
    setup: Mapping[str, Any], unet: UNet, rewards: Sequence[HalfUNet], inputs: Mapping[str, np.ndarray]
) -> dict[str, Tensor]:
    """The losses and the norms of their gradients."""
    x0, x, t = channels_first(inputs["x0"]), channels_first(inputs["noisy"]), torch.tensor(inputs["noisy_t"])
    alpha, sigma = (torch.tensor(setup[name])[t][:, None, None, None] for name in ("alpha", "sigma"))
    loss = noise_loss(unet, x, t, (x - alpha * x0) / sigma)
    noisy, times = channels_first(inputs["reward_noisy"]), torch.tensor(inputs["reward_t"])
    labels, weights = torch.tensor(inputs["labels"]), torch.tensor(inputs["weights"])
    losses = [
        reward_loss(reward, noisy[:, k], times[:, k], labels[:, k], weights[:, k]) for k, reward in enumerate(rewards)
    ]
    total = torch.stack(losses).sum()
    return {
        "loss": loss,
        "gradient_norm": gradient_norm(loss, [unet]),
        "reward_loss": total,
        "reward_gradient_norm": gradient_norm(total, rewards),
    }


def gradient_norm(loss: Tensor, nets: Sequence[nn.Module]) -> Tensor:
    """Of the gradient in all parameters of the networks."""
    gradients = torch.autograd.grad(loss, [parameter for net in nets for parameter in net.parameters()])
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()


def sample(sampler: Sampler, shape: tuple[int, ...]) -> Callable[[], Any]:
    """Draws a batch."""
    return lambda: sampler(torch.randn(shape), lambda i: torch.randn(shape))


def train(setup: Mapping[str, Any], told: Mapping[str, Any], how: Callable[[nn.Module], Net]) -> Callable[[], Any]:
    """Goes on training the base model: Adam, clipped gradients, an average of weights."""
    module = load(UNet, told, "unet", told["unet"])
    net, images = how(module), 2 * torch.rand(1000, 1, told["size"], told["size"]) - 1
    batches = Batches(setup, images, setup["batch"])
    loss = lambda: noise_loss(net, *batches.noised(batches.rows()))
    optimiser = torch.optim.Adam(module.parameters(), setup["training"]["base_rate"], fused=True)
    return rival.train(loss, optimiser, setup["train_steps"], clip=1.0, decay=setup["training"]["base_decay"])


def train_rewards(
    setup: Mapping[str, Any], told: Mapping[str, Any], how: Callable[[nn.Module], Net]
) -> Callable[[], Any]:
    """Goes on training the rewards, one after the other: AdamW on sets of their own."""
    runs, given = [], setup["training"]
    labels = torch.tensor([0.0, 1.0]).repeat(setup["labelled"] // 2)
    for state in told["rewards"][: setup["ensemble"]]:
        module = load(HalfUNet, told, "reward", state)
        images = 2 * torch.rand(len(labels), 1, told["size"], told["size"]) - 1
        batches = Batches(setup, images, setup["reward_batch"])

        def loss(net: Net, batches: Batches) -> Tensor:
            rows = batches.rows()
            x, t, _ = batches.noised(rows)
            return reward_loss(net, x, t, labels[rows], torch.where(labels[rows] == 1, given["benign_weight"], 1.0))

        optimiser = torch.optim.AdamW(module.parameters(), given["reward_rate"], weight_decay=0.05, fused=True)
        runs.append(rival.train(partial(loss, how(module), batches), optimiser, setup["reward_steps"]))
    return lambda: [run() for run in runs]
