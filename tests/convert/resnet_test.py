"""ResNet-18 against a statement of it in PyTorch, in evaluation and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from gendiff.convert import resnet as convert  # noqa: E402
from gendiff.nets import resnet  # noqa: E402


class BasicBlock(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    def __init__(self, widths, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inside = (widths[0], *widths)
        for i, width in enumerate(widths):
            blocks = BasicBlock(inside[i], width, 2 if i else 1), BasicBlock(width, width, 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[-1], outputs)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


NET = resnet.ResNet(outputs=2, widths=(8, 8, 16, 32))
IMAGES = np.random.default_rng(0).normal(size=(4, 33, 40, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    module = ResNet18(NET.widths, 2)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):  # away from the initial zeros and ones
            for values in (layer.bias.data, layer.running_mean):
                values.normal_()
            for values in (layer.weight.data, layer.running_var):
                values.uniform_(0.5, 1.5)
    return module


def arrays(module):
    return {key: value.numpy().copy() for key, value in module.state_dict().items()}


def converted(module):
    return convert.resnet(arrays(module), jax.eval_shape(NET.init, jax.random.key(0), jnp.zeros((32, 32, 3))))


def tensor(images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


def assert_close(given, expected):
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_evaluation(theirs):
    theirs.eval()
    variables, image = converted(theirs), tensor(IMAGES).requires_grad_(True)
    expected = theirs(image)
    expected.sum().backward()
    both = lambda x: (NET.apply(variables, x), jax.grad(lambda x: jnp.sum(NET.apply(variables, x)))(x))
    given, gradient = jax.jit(jax.vmap(both))(IMAGES)
    assert_close(given, expected.detach().numpy())
    assert_close(gradient, image.grad.numpy().transpose(0, 2, 3, 1))


def test_training(theirs):
    variables = converted(theirs)
    theirs.train()
    expected = theirs(tensor(IMAGES))
    theirs.zero_grad()
    (expected**2).mean().backward()

    def loss(params):
        logits, statistics = resnet.train_logits(NET, variables | {"params": params}, IMAGES)
        return jnp.mean(logits**2), (logits, statistics)

    (_, (logits, statistics)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert_close(logits, expected.detach().numpy())
    after = converted(theirs)
    jax.tree.map(assert_close, statistics, after["batch_stats"])  # momentum 0.1, unbiased variance
    assert_close(gradient["conv1"]["kernel"], theirs.conv1.weight.grad.numpy().transpose(2, 3, 1, 0))
    assert_close(gradient["layer3_0"]["bn1"]["scale"], theirs.layer3[0].bn1.weight.grad.numpy())


def test_head_is_exchanged(theirs):
    variables = converted(theirs)
    single = NET.clone(outputs=None)
    shapes = jax.eval_shape(single.init, jax.random.key(1), IMAGES[0])
    start = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    mixed = convert.with_head_of(variables, start)
    assert jax.eval_shape(single.apply, mixed, IMAGES[0]).shape == ()
    np.testing.assert_array_equal(mixed["params"]["conv1"]["kernel"], variables["params"]["conv1"]["kernel"])
    np.testing.assert_array_equal(mixed["params"]["fc"]["kernel"], start["params"]["fc"]["kernel"])


def test_errors_name_the_keys(theirs):
    like = jax.eval_shape(NET.init, jax.random.key(0), jnp.zeros((32, 32, 3)))
    state = arrays(theirs)
    del state["layer2.0.downsample.1.running_var"]
    with pytest.raises(ValueError, match=r"layer2\.0\.downsample\.1\.running_var: missing"):
        convert.resnet(state, like)
