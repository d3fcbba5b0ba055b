"""The traffic experiment's networks, its oracle, training and sampling, in PyTorch.

Written as a good PyTorch user would: batched tensors, one time and one embedding for a whole step of a sampler, keys
and values of a map made once, `scaled_dot_product_attention` where attention is plain, relative encodings that are
never made for all pairs, `grid_sample`, no graph where no gradient is asked for, no gradients of parameters while
guiding, fused AdamW.  Only a worker process of the speed table imports this file, and PyTorch with it.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.speed import rival

CHUNK = 256
"""Scenes at a time that the oracle checks, which fit the cache."""
Memory = tuple[Tensor, Tensor]
"""Keys and values of a map, the same for all layers, (n, heads, tokens, width / heads)."""


class Units(NamedTuple):
    """Metres of the networks' coordinates, x = scale u + shift."""

    shift: Tensor
    scale: Tensor
    half: float


class Places(NamedTuple):
    """What scenes are conditioned on."""

    distance: Tensor
    """(n, c, c), metres to the edge of the drivable area; in 32 bits, with which PyTorch is faster on a CPU."""
    present: Tensor
    """(n, k)."""


def waves(at: Tensor, octaves: int = 6) -> Tensor:
    """Sines and cosines of each coordinate, (..., i) -> (..., 2 octaves i)."""
    phase = at.clamp(-1.5, 1.5)[..., None] * (math.pi * 2.0 ** torch.arange(octaves))
    return torch.cat([phase.sin(), phase.cos()], -1).flatten(-2)


class MapEncoder(nn.Module):
    """Distances (n, c, c) -> keys and values of squares of 16 cells, of which one in 4 is looked at."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.squares, self.mix = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, width, 1)
        self.where = nn.Linear(24, width, bias=False)
        self.norm = nn.LayerNorm(width, 1e-6)
        self.keys, self.values = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, distance: Tensor) -> Memory:
        near = distance[:, None, 2::4, 2::4]
        h = functional.silu(self.squares(torch.cat([near / 20, near.tanh(), (near / 4).tanh()], 1)))
        h = h + functional.silu(self.mix(h))
        side = h.shape[-1]
        centre = (torch.arange(side) + 0.5) / side * 2 - 1
        at = waves(torch.stack(torch.meshgrid(centre, centre, indexing="xy"), -1).flatten(0, 1))
        tokens = self.norm(h.flatten(2).transpose(1, 2) + self.where(at))
        keys, values = (net(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for net in (self.keys, self.values))
        return keys, values


def heading(vehicles: Tensor) -> Tensor:
    """The direction of (cos, sin), shorter where noise leaves hardly any."""
    given = vehicles[..., 4:6]
    return given * (given.square().sum(-1, keepdim=True) + 0.01).rsqrt()


def relations(vehicles: Tensor, ahead: Tensor, noise: Tensor) -> Tensor:
    """What vehicle j is to vehicle i, (n, k, k, 34), at noise (n,) or (1,) in metres."""
    x, y, length, width = vehicles[..., :4].unbind(-1)
    cos, sin = ahead.unbind(-1)
    mine, other = lambda a: a[:, :, None], lambda a: a[:, None, :]
    way_x, way_y = other(x) - mine(x), other(y) - mine(y)
    front, side = way_x * mine(cos) + way_y * mine(sin), way_y * mine(cos) - way_x * mine(sin)
    turn_cos = other(cos) * mine(cos) + other(sin) * mine(sin)
    turn_sin = other(sin) * mine(cos) - other(cos) * mine(sin)
    far = (way_x.square() + way_y.square() + 1e-2).sqrt()
    c, s = turn_cos.abs(), turn_sin.abs()
    along = front.abs() - 0.5 * (mine(length) + other(length) * c + other(width) * s)
    across = side.abs() - 0.5 * (mine(width) + other(length) * s + other(width) * c)
    apart = torch.maximum(along, across)
    gaps = torch.stack([along, across, torch.maximum(apart, apart.transpose(1, 2))], -1)
    way = torch.stack([way_x, way_y, front, side], -1) / 25
    fine = waves(way[..., 2:], 4)
    same = torch.eye(x.shape[1]).expand(len(x), -1, -1)
    more = torch.stack([turn_cos, turn_sin, far / 25, far.log1p() / 3, same], -1)
    sharp = (gaps / (noise[:, None, None, None] + 0.3)).tanh()
    return torch.cat([way, more, gaps / 25, (gaps / 3).tanh(), sharp, fine], -1)


def turned(way: Tensor, ahead: Tensor) -> Tensor:
    """What is `way` (..., 2) for one that looks along x, for one that looks along `ahead`; times its length."""
    (x, y), (cos, sin) = way.unbind(-1), ahead.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1)


def outline(vehicles: Tensor, ahead: Tensor) -> Tensor:
    """Corners and middles of the edges, (n, k, 8, 2)."""
    around = torch.tensor([(1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1)]) / 2
    return vehicles[..., None, :2] + turned(around * vehicles[..., None, 2:4], ahead[..., None, :])


def distance_at(distance: Tensor, points: Tensor, half: float) -> Tensor:
    """Bilinear between the centres of cells, (n, k, p), at points (n, k, p, 2); beyond the map that of its edge."""
    how = {"padding_mode": "border", "align_corners": False}
    return functional.grid_sample(distance[:, None], points / half, **how)[:, 0]  # type: ignore[arg-type]


def roadside(vehicles: Tensor, ahead: Tensor, distance: Tensor, half: float, around: Tensor) -> Tensor:
    """The signed distance at the outline of each vehicle, and around it (p, 2): (n, k, 8 + p)."""
    near = vehicles[..., None, :2] + turned(around, ahead[..., None, :])
    points = torch.cat([outline(vehicles, ahead), near], -2)
    return distance_at(distance, points, half) + (points.abs() - half).clamp(min=0).sum(-1)


def rings() -> Tensor:
    """The centre, and eight places on each of four rings, (33, 2) in metres."""
    angles = torch.arange(8) * math.pi / 4
    ring = torch.stack([angles.cos(), angles.sin()], -1)
    return torch.cat([torch.zeros(1, 2), *(radius * ring for radius in (2.0, 5.0, 10.0, 20.0))])


class RelativeAttention(nn.Module):
    """Self-attention with encodings R_ij = W r_ij in queries, keys and values; W is moved to the vehicles' side."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        shape = heads, width // heads, hidden
        self.read_q, self.read_k, self.read_v = (nn.Parameter(torch.zeros(shape)) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, r: Tensor, absent: Tensor) -> Tensor:
        n, k, d = h.shape
        q, key, v = (net(h).view(n, k, self.heads, -1).transpose(1, 2) for net in (self.q, self.k, self.v))
        asked = torch.einsum("nhie,hef->nihf", q, self.read_q)
        offered = torch.einsum("nhje,hef->njhf", key, self.read_k)
        turned = r.transpose(-1, -2)
        logits = q @ key.transpose(-1, -2)
        logits = logits + (asked @ turned).transpose(1, 2) + (offered @ turned).permute(0, 2, 3, 1)
        logits = (logits * (d // self.heads) ** -0.5).masked_fill(absent, -1e9)
        share = logits.softmax(-1)
        mean = share.transpose(1, 2) @ r
        mixed = (share @ v).transpose(1, 2) + torch.einsum("nihf,hef->nihe", mean, self.read_v)
        return self.out(mixed.reshape(n, k, d))


class CrossAttention(nn.Module):
    """Attention from vehicles to keys and values of a map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, h: Tensor, memory: Memory) -> Tensor:
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out(functional.scaled_dot_product_attention(q, *memory).transpose(1, 2).flatten(2))


def feed_forward(width: int, expansion: int) -> nn.Sequential:
    """W2 gelu(W1 h)."""
    inner = expansion * width
    return nn.Sequential(nn.Linear(width, inner), nn.GELU("tanh"), nn.Linear(inner, width))


class Layer(nn.Module):
    """Both attentions, each with a feed-forward layer, modulated by the time."""

    def __init__(self, width: int, heads: int, expansion: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.film = nn.Linear(64, 12 * width)
        self.self = RelativeAttention(width, heads, hidden)
        self.after_self = feed_forward(width, expansion)
        self.map = CrossAttention(width, heads)
        self.after_map = feed_forward(width, expansion)

    def forward(self, h: Tensor, r: Tensor, time: Tensor, absent: Tensor, memory: Memory) -> Tensor:
        parts: tuple[Callable[[Tensor], Tensor], ...] = (
            lambda x: self.self(x, r, absent),
            self.after_self,
            lambda x: self.map(x, memory),
            self.after_map,
        )
        film = self.film(time).view(-1, 4, 3, 1, self.width)
        for i, part in enumerate(parts):
            gain, offset, gate = film[:, i].unbind(1)
            inner = functional.layer_norm(h, (self.width,), eps=1e-6) * (1 + gain) + offset
            h = h + (1 + gate) * part(inner)
        return h


class SceneTransformer(nn.Module):
    """(u (n, k, 7), c_noise (n,) or (1,), places, memory) -> (n, k, 7), or a logit of each vehicle (n, k)."""

    frequencies: Tensor
    around: Tensor

    def __init__(
        self, units: Units, head: str, width: int, layers: int, heads: int, expansion: int, hidden: int
    ) -> None:
        super().__init__()
        self.units, self.head = units, head
        self.register_buffer("frequencies", torch.from_numpy(np.geomspace(1.0, 200.0, 16)).float(), persistent=False)
        self.register_buffer("around", rings(), persistent=False)
        places = 8 + len(self.around)
        self.time = nn.Linear(32, 64)
        self.input = nn.Linear(7 + 84 + 8 + 4 + 3 * places, width)
        self.when = nn.Linear(64, width, bias=False)
        self.relation = nn.Linear(34, layers * hidden)
        self.related_when = nn.Linear(64, layers * hidden, bias=False)
        self.layers = nn.ModuleList(Layer(width, heads, expansion, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.output = nn.Linear(width, 7 if head == "denoise" else 1)
        if head == "denoise":
            self.own = nn.Linear(width, 4)

    def forward(self, u: Tensor, c_noise: Tensor, places: Places, memory: Memory) -> Tensor:
        shift, scale, half = self.units
        vehicles = u * scale + shift
        noise = scale[0] * (8 * c_noise).sigmoid().sqrt()
        ahead = heading(vehicles)
        related = relations(vehicles, ahead, noise)
        beside = roadside(vehicles, ahead, places.distance, half, self.around)
        angles = c_noise[:, None] * self.frequencies
        time = functional.silu(self.time(torch.cat([angles.sin(), angles.cos()], -1)))
        slopes = (beside[..., [1, 7]] - beside[..., [5, 3]]) / vehicles[..., 2:4].clamp(min=1)
        at = noise[:, None, None]
        plain = [u, waves(u / 2), waves(beside[..., 8:9] / 10, 4), slopes]
        bounded = [slopes / (at / scale[0] + 0.02), beside / 20, beside / 3, beside / (at + 0.3)]
        h = self.input(torch.cat([*plain, torch.cat(bounded, -1).tanh()], -1)) + self.when(time)[:, None]
        encoded = functional.silu(self.relation(related) + self.related_when(time)[:, None, None])
        absent = ~places.present[:, None, None]
        for layer, r in zip(self.layers, encoded.chunk(len(self.layers), -1), strict=True):
            h = layer(h, r, time, absent, memory)
        h = self.norm(h)
        out = self.output(h)
        if self.head != "denoise":
            return out[..., 0].masked_fill(~places.present, 1e4)
        # Place and heading, said in the vehicle's own frame.
        own = turned(self.own(h).unflatten(-1, (2, 2)), ahead[..., None, :])
        return out + torch.cat([functional.pad(own[..., 0, :], (0, 2)), functional.pad(own[..., 1, :], (0, 1))], -1)


class SceneNetwork(nn.Module):
    """Both parts; called without the map's keys and values it makes them."""

    def __init__(self, units: Units, head: str, **sizes: int) -> None:
        super().__init__()
        self.map = MapEncoder(sizes["width"], sizes["heads"])
        self.scene = SceneTransformer(units, head, **sizes)

    def forward(self, u: Tensor, c_noise: Tensor, places: Places, memory: Memory | None = None) -> Tensor:
        return self.scene(u, c_noise, places, self.map(places.distance) if memory is None else memory)


Net = Callable[..., Tensor]
"""A `SceneNetwork`, compiled or not."""


class Chain:
    """The diffusion process; the denoiser predicts v."""

    def __init__(self, alpha: np.ndarray, sigma: np.ndarray) -> None:
        self.steps = len(alpha) - 1
        self.alpha, self.sigma = torch.tensor(alpha), torch.tensor(sigma)

    def level(self, t: Tensor) -> Tensor:
        """ln(sigma / alpha) / 4."""
        return 0.25 * (self.sigma[t] / self.alpha[t]).log()

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t (n,) or (1,), for scenes."""
        return self.alpha[t][:, None, None], self.sigma[t][:, None, None]

    def noised(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and t."""
        t = torch.randint(1, self.steps + 1, (len(x0),))
        alpha, sigma = self.scales(t)
        return alpha * x0 + sigma * torch.randn_like(x0), t

    def denoised(self, net: Net, x: Tensor, t: Tensor, places: Places, memory: Memory | None = None) -> Tensor:
        """x_0."""
        alpha, sigma = self.scales(t)
        x0 = alpha * x - sigma * net(x, self.level(t), places, memory)
        return x0.masked_fill(~places.present[..., None], 0.0)

    def loss(self, net: Net, x0: Tensor, x: Tensor, t: Tensor, places: Places) -> Tensor:
        """Ho et al.'s simple loss."""
        alpha, sigma = self.scales(t)
        error = alpha / sigma * (self.denoised(net, x, t, places) - x0)
        return error.square().flatten(1).sum(1).mean()

    def log_good(self, net: Net, x: Tensor, t: Tensor, places: Places, memory: Memory) -> Tensor:
        """log C of each vehicle, (n, k)."""
        return functional.logsigmoid(net(x, self.level(t), places, memory))

    def guidance(self, net: Net, x: Tensor, t: Tensor, places: Places, memory: Memory) -> Tensor:
        """The gradient of their sum in x."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_good(net, x, t, places, memory).sum(), x)[0]


class Guided:
    """The denoiser, steered by a classifier on places whose keys and values are made here."""

    def __init__(self, chain: Chain, denoiser: Net, classifier: Net, memories: Sequence[Memory], places: Places):
        self.chain, self.denoiser, self.classifier, self.places = chain, denoiser, classifier, places
        self.memories = memories

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x_0."""
        alpha, sigma = self.chain.scales(t)
        memory, other = self.memories
        shift = self.chain.guidance(self.classifier, x, t, self.places, other)
        return self.chain.denoised(self.denoiser, x, t, self.places, memory) + sigma**2 / alpha * shift

    @torch.no_grad()
    def sample(self, x: Tensor, times: Sequence[int]) -> Tensor:
        """DDIM's steps down `times`."""
        for at, following in itertools.pairwise(times):
            t, s = torch.tensor([at]), torch.tensor([following])
            x0 = self(x, t)
            (alpha, sigma), (alpha_s, sigma_s) = self.chain.scales(t), self.chain.scales(s)
            x = alpha_s * x0 + sigma_s / sigma * (x - alpha * x0)
        return x


# The oracle.


def infractions(vehicles: Tensor, places: Places, half: float, tolerance: float = 0.3) -> dict[str, Tensor]:
    """What is wrong with scenes: vehicles (n, k, 7) in metres."""
    given, size = vehicles[..., 4:6], vehicles[..., 4:6].norm(dim=-1)
    degenerate = ~((vehicles[..., 2:4] > 0).all(-1) & ((size - 1).abs() < 0.5)) & places.present
    ahead = torch.where(size[..., None] > 0, given / size[..., None], torch.tensor([1.0, 0.0]))
    x, y = vehicles[..., :2].unbind(-1)
    extents = vehicles[..., 2:4].clamp(min=0.1)
    pairs = collisions(x, y, extents, ahead) & places.present[:, :, None] & places.present[:, None, :]
    shapes = torch.cat([vehicles[..., :2], extents], -1)
    points = outline(shapes, ahead)
    distance = distance_at(places.distance, points, half).masked_fill((points.abs() > half).any(-1), math.inf)
    off = ~(distance.amax(-1) <= tolerance)
    return {"pairs": pairs, "collides": pairs.any(-1), "off_road": off & places.present, "degenerate": degenerate}


def collisions(x: Tensor, y: Tensor, extents: Tensor, ahead: Tensor) -> Tensor:
    """Which pairs overlap, (n, k, k): apart along no edge of either box."""
    (length, width), (cos, sin) = extents.unbind(-1), ahead.unbind(-1)
    mine, other = lambda a: a[:, :, None], lambda a: a[:, None, :]
    way_x, way_y = other(x) - mine(x), other(y) - mine(y)
    front, side = way_x * mine(cos) + way_y * mine(sin), way_y * mine(cos) - way_x * mine(sin)
    c = (other(cos) * mine(cos) + other(sin) * mine(sin)).abs()
    s = (other(sin) * mine(cos) - other(cos) * mine(sin)).abs()
    along, across = (
        mine(length) + other(length) * c + other(width) * s,
        mine(width) + other(length) * s + other(width) * c,
    )
    apart = (2 * front.abs() > along) | (2 * side.abs() > across)
    return ~(apart | apart.transpose(1, 2)) & ~torch.eye(x.shape[1], dtype=torch.bool)


# The programs.


def prepare(setup: Mapping[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The programs and the answers to gendiff's questions.

    Args:
      setup: as for `ours_traffic.prepare`, with all that it returned beside its programs, and "compile", whether to
        make the programs "compiled".
    """
    torch.manual_seed(setup["seed"])
    chain = Chain(setup["alpha"], setup["sigma"])
    answers = {name: answer.detach().float().numpy() for name, answer in reply(setup, chain).items()}
    programs: dict[str, Callable[[], Any]] = {"matmul/eager": rival.matmul(setup["matmul"], setup["matmul"], 1)}
    variants: dict[str, Callable[[Any], Any]] = {"eager": lambda net: net}
    if setup["compile"]:
        variants["compiled"] = partial(torch.compile, dynamic=False)
    for name, how in variants.items():
        programs[f"oracle/{name}"] = judge(setup, how(infractions))
        programs[f"train-step/{name}"] = train(setup, chain, how)
        programs[f"sample-step/{name}"] = sample(setup, chain, how)
    return programs, answers


def load(setup: Mapping[str, Any], name: str) -> SceneNetwork:
    """A network with gendiff's parameters; fails where one is missing, left over or of another size."""
    shift, scale, half = setup["units"]
    net = SceneNetwork(Units(torch.tensor(shift), torch.tensor(scale), half), **setup["fields"][name])
    net.load_state_dict({key: torch.tensor(value) for key, value in setup[name].items()})
    return net


def random_scenes(setup: Mapping[str, Any], count: int) -> tuple[Tensor, Places]:
    """Vehicles in the networks' units and places, of the shapes of gendiff's."""
    distance = 10 * torch.randn(count, setup["cells"], setup["cells"])
    return torch.randn(count, 12, 7), Places(distance, torch.ones(count, 12, dtype=torch.bool))


def judge(setup: Mapping[str, Any], check: Callable[..., Any]) -> Callable[[], Any]:
    """Asks the oracle about all scenes, "oracle_steps" times."""
    x, places = random_scenes(setup, setup["oracle_scenes"])
    shift, scale, half = setup["units"]
    vehicles = x * torch.tensor(scale) + torch.tensor(shift)
    parts = [
        (first, Places(*rest)) for first, *rest in zip(*(a.split(CHUNK) for a in (vehicles, *places)), strict=True)
    ]
    return lambda: [check(*part, half) for _ in range(setup["oracle_steps"]) for part in parts]


def train(setup: Mapping[str, Any], chain: Chain, how: Callable[[nn.Module], Net]) -> Callable[[], Any]:
    """Goes on training the denoiser: AdamW, clipped gradients, an average of weights."""
    module = load(setup, "denoiser")
    net, (x0, (distance, present)) = how(module), random_scenes(setup, 1000)

    def loss() -> Tensor:
        rows = torch.randint(len(x0), (setup["batch"],))
        x, t = chain.noised(x0[rows])
        return chain.loss(net, x0[rows], x, t, Places(distance[rows], present[rows]))

    optimiser = torch.optim.AdamW(module.parameters(), setup["rate"], weight_decay=0.0, fused=True)
    return rival.train(loss, optimiser, setup["train_steps"], clip=1.0, decay=0.999)


def sample(setup: Mapping[str, Any], chain: Chain, how: Callable[[nn.Module], Net]) -> Callable[[], Any]:
    """Draws scenes, guided, with the maps' keys and values made once."""
    x, places = random_scenes(setup, setup["samples"])
    guided = bind(setup, chain, how, places)
    times = setup["times"].tolist()
    return lambda: guided.sample(x, times)


@torch.no_grad()
def bind(setup: Mapping[str, Any], chain: Chain, how: Callable[[nn.Module], Net], places: Places) -> Guided:
    """The guided denoiser on places."""
    denoiser, classifier = (load(setup, name).requires_grad_(False) for name in ("denoiser", "classifier"))
    memories = []
    for net in (denoiser, classifier):
        keys, values = net.map(places.distance)
        memories.append((keys.contiguous(), values.contiguous()))
    return Guided(chain, how(denoiser), how(classifier), memories, places)


def reply(setup: Mapping[str, Any], chain: Chain) -> dict[str, Tensor]:
    """The answers to the questions of `ours_traffic`."""
    inputs = {name: torch.tensor(value) for name, value in setup["inputs"].items()}
    every = Places(inputs["distance"].float(), inputs["present"])
    x0, x, t = (inputs[name] for name in ("x0", "x", "t"))
    places = Places(*(each[: len(x)] for each in every))
    denoiser = load(setup, "denoiser")
    loss = chain.loss(denoiser, x0, x, t, places)
    named = dict(denoiser.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    guided = bind(setup, chain, lambda net: net, places)
    alpha, sigma = chain.scales(t)
    classifier = guided.classifier, x, t, guided.places, guided.memories[1]
    with torch.no_grad():
        denoised = chain.denoised(guided.denoiser, x, t, guided.places, guided.memories[0])
        answers = {"velocity": (alpha * x - denoised) / sigma, "log_good": chain.log_good(*classifier)}
    return answers | {
        "guidance": chain.guidance(*classifier),
        "guided": guided(x, t),
        "samples": guided.sample(inputs["start"], inputs["times"].tolist()),
        "loss": loss,
        "gradient": torch.cat([gradients[name].flatten() for name in sorted(gradients)]),
        **infractions(inputs["vehicles"], every, setup["units"][2]),
    }
