import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gendiff.data import mnist
from gendiff.oracles import crossed_seven
from gendiff.oracles.oracle import label

SIZES = crossed_seven.SIZES


def sevens(n: int, seed: int = 0) -> np.ndarray:
    """Drawn sevens (n, 28, 28) in 0..255, of random slant, size and thickness: a stand-in for handwriting."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:28, :28].astype(float)
    images = []
    for _ in range(n):
        slant, thickness, width = rng.uniform(0.1, 0.45), rng.uniform(1.8, 3.2), rng.uniform(8, 12)
        right = 19 + rng.uniform(-1, 1)
        bar = np.hypot(y - 5, x - np.clip(x, right - width, right))
        along = np.clip((y - 5 - slant * (x - right)) / (1 + slant**2), 0, 18)
        stem = np.hypot(x - (right - slant * along), y - (5 + along))
        ink = np.clip(thickness / 2 + 0.5 - np.minimum(bar, stem), 0, 1)
        images.append(np.rint(255 * ink))
    return np.array(images).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_drawn_sevens_are_told_apart(size):
    # Sevens made of two lines are nobody's handwriting, and still at most one in 40 is mistaken.
    plain = sevens(100)
    crossed = mnist.crossed(plain, 1)
    oracle = crossed_seven.crossed_seven()
    good = label(oracle, mnist.scaled(np.concatenate([plain, crossed]), size))
    assert good[:100].mean() >= 0.975
    assert good[100:].mean() <= 0.025


@pytest.mark.parametrize("size", SIZES)
def test_imperfect_images_are_told_apart(size):
    plain = sevens(100, seed=1)
    images = mnist.scaled(np.concatenate([plain, mnist.crossed(plain, 2)]), size)
    keys = jax.random.split(jax.random.key(0), 200)
    perturbed = np.asarray(jax.jit(jax.vmap(crossed_seven.perturbed))(keys, images))
    good = label(crossed_seven.crossed_seven(), perturbed)
    assert good[:100].mean() >= 0.95
    assert good[100:].mean() <= 0.05


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_is_one_image_after_the_other(size, monkeypatch):
    images = mnist.scaled(sevens(11), size)
    whole = crossed_seven.judge(images)
    assert whole.logit.shape == (11,)
    assert whole.features.shape == (11, crossed_seven.FEATURES)
    monkeypatch.setattr(crossed_seven, "CHUNK", 4)
    chunks = crossed_seven.judge(images)
    np.testing.assert_allclose(chunks.logit, whole.logit, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(crossed_seven.features(images), whole.features, rtol=1e-4, atol=1e-4)
    one = crossed_seven.network(crossed_seven.load(size), jnp.asarray(images[3]))
    np.testing.assert_allclose(one.logit, whole.logit[3], rtol=1e-3, atol=1e-3)


def test_no_image_has_no_answer():
    empty = crossed_seven.judge(np.zeros((0, 16, 16, 1)))
    assert (empty.logit.shape, empty.features.shape) == ((0,), (0, crossed_seven.FEATURES))


def test_values_beyond_the_range_are_clipped():
    images = 1.5 * mnist.scaled(sevens(3), 16)
    clipped = crossed_seven.judge(np.clip(images, -1, 1))
    np.testing.assert_array_equal(crossed_seven.judge(images).logit, clipped.logit)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 28, 28, 1)), "must be 16 or 32, got 28"),
        (np.zeros((2, 16, 16)), r"images must have shape \(n, s, s, 1\), got \(2, 16, 16\)"),
        (np.zeros((2, 16, 32, 1)), r"images must have shape \(n, s, s, 1\)"),
        (np.zeros((2, 16, 16, 3)), r"images must have shape \(n, s, s, 1\)"),
        (np.full((2, 16, 16, 1), np.nan), "got NaN in 2 of 2 images"),
        (
            np.full((2, 16, 16, 1), 255.0),
            r"pixels must be in \[-1, 1\], got float64 up to 255\.0; scale 0\.\.255",
        ),
        (np.arange(512.0).reshape(2, 16, 16, 1) % 256, r"pixels must be in \[-1, 1\], got float64"),
        (np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 1)), r"pixels must be in \[-1, 1\], got float64"),
        (np.zeros((2, 16, 16, 1), np.uint8), r"pixels must be in \[-1, 1\], got uint8"),
        (np.ones((2, 16, 16, 1), bool), r"pixels must be in \[-1, 1\], got bool"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        crossed_seven.judge(images)


def test_samples_that_diverged_are_still_judged():
    rng = np.random.default_rng(0)
    for scale in (3.0, 50.0, 1e9):
        assert crossed_seven.judge(scale * rng.uniform(0.1, 1, (2, 16, 16, 1))).logit.shape == (2,)


def test_narrow_images_are_judged_as_their_values():
    images = mnist.scaled(sevens(3), 16)
    for narrow in (images.astype(jnp.bfloat16), jnp.asarray(images, jnp.float16)):
        wide = crossed_seven.judge(np.asarray(narrow, np.float32))
        np.testing.assert_array_equal(crossed_seven.judge(narrow).logit, wide.logit)


def test_parameters_that_cannot_be_kept_or_read_are_named(tmp_path):
    for value in (1e6, np.nan, -np.inf):
        with pytest.raises(ValueError, match=r"layer_0\.bias must be >= -65504 and <= 65504, got"):
            crossed_seven.save(tmp_path / "kept.npz", {"layer_0": {"bias": np.full(2, value)}})
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:-9])
    for name in ("other", "cut", "none"):
        with pytest.raises(ValueError, match=rf"{name}\.npz must hold parameters, got a damaged file"):
            crossed_seven.read(tmp_path / f"{name}.npz")
    with pytest.raises(
        ValueError, match=r"shape of the image must be \(16, 16, 1\) or \(32, 32, 1\), got \(28, 28, 1\)"
    ):
        crossed_seven.network(crossed_seven.load(16), np.zeros((28, 28, 1)))


def test_parameters_are_kept_in_float16(tmp_path):
    params = crossed_seven.initial(jax.random.key(0))
    crossed_seven.save(tmp_path / "kept.npz", params)
    kept = crossed_seven.read(tmp_path / "kept.npz")
    assert jax.tree.structure(kept) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), kept, params)
    for size in SIZES:
        assert crossed_seven.path(size).stat().st_size < 1_000_000
        assert jax.tree.map(np.shape, crossed_seven.load(size)) == jax.tree.map(np.shape, params)


# What training images go through.


def test_the_identity_moves_nothing():
    image = jnp.asarray(mnist.scaled(sevens(1), 16))[0, ..., 0]
    np.testing.assert_allclose(crossed_seven.affine(image, jnp.eye(2), jnp.zeros(2)), image, atol=1e-6)
    np.testing.assert_allclose(crossed_seven.blurred(image, jnp.asarray(0.0)), image, atol=1e-6)


def test_affine_shifts_and_turns():
    image = (-jnp.ones((16, 16))).at[4, 9].set(1.0)
    shifted = crossed_seven.affine(image, jnp.eye(2), jnp.array([1.0, -2.0]))
    assert np.unravel_index(np.argmax(shifted), (16, 16)) == (3, 11)
    quarter = jnp.array([[0.0, -1.0], [1.0, 0.0]])
    turned = crossed_seven.affine(image, quarter, jnp.zeros(2))
    # Where M (p - c) + c = (4, 9), c = 7.5: p = c + M^T (-3.5, 1.5).
    assert np.unravel_index(np.argmax(turned), (16, 16)) == (9, 11)
    assert float(shifted[-1, 0]) == -1


@pytest.mark.parametrize("width", [0.3, 0.8])
def test_blur_keeps_the_ink_and_spreads_it(width):
    image = (-jnp.ones((16, 16))).at[8, 8].set(3.0)
    blurred = crossed_seven.blurred(image, jnp.asarray(width))
    np.testing.assert_allclose(jnp.sum(blurred + 1), 4.0, rtol=1e-5)
    places = jnp.arange(16) - 8.0
    variance = jnp.sum(jnp.sum(blurred + 1, 0) * places**2) / 4
    # A Gaussian on whole pixels; at 0.3 its variance is that of its three taps.
    taps = np.exp(-0.5 * (np.arange(-2, 3) / width) ** 2)
    np.testing.assert_allclose(variance, taps @ np.arange(-2, 3) ** 2 / taps.sum(), rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_perturbed_images_stay_images(size):
    image = jnp.asarray(mnist.scaled(sevens(1), size)[0])
    keys = jax.random.split(jax.random.key(0), 50)
    images = jax.jit(jax.vmap(crossed_seven.perturbed, (0, None)))(keys, image)
    assert images.shape == (50, size, size, 1)
    assert float(jnp.max(jnp.abs(images))) <= 1
    ink = jnp.sum(images + 1, (1, 2, 3)) / jnp.sum(image + 1)
    assert 0.5 < float(ink.min()) < float(ink.max()) < 2
