import gzip
import hashlib
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gendiff.data import drawn_sevens, mnist

needs_data = pytest.mark.skipif(
    not os.environ.get(mnist.FOLDER), reason=f"{mnist.FOLDER} names no folder with MNIST's files"
)


def seven(slant: float = 0.25, thickness: float = 2.0) -> np.ndarray:
    """A seven in 0..255 out of two soft lines: from (5, 8) to (5, 19), and from there 19 rows down."""
    y, x = np.mgrid[:28, :28].astype(float)
    bar = np.hypot(y - 5, x - np.clip(x, 8, 19))
    across = (x - 19 + slant * np.clip(y - 5, 0, 18)) / np.sqrt(1 + slant**2)
    stem = np.hypot(across, y - np.clip(y, 5, 23))
    ink = np.clip(thickness / 2 + 0.5 - np.minimum(bar, stem), 0, 1)
    return np.rint(255 * ink).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def digits() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, 28, 28)).astype(np.uint8), np.array([7, 1, 7, 0, 9, 7], np.uint8)


# Reading.


@pytest.mark.parametrize("inner", ["", "mnist"])
@pytest.mark.parametrize("form", ["idx", "gz", "npz"])
def test_every_form_of_the_files_gives_the_digits(form, inner, digits, tmp_path):
    images, labels = digits
    place = tmp_path / inner
    place.mkdir(exist_ok=True)
    if form == "npz":
        np.savez(place / "mnist.npz", x_test=images, y_test=labels)
    else:
        for kind, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            body = gzip.compress(idx(array)) if form == "gz" else idx(array)
            (place / f"t10k-{kind}{'.gz' if form == 'gz' else ''}").write_bytes(body)
    np.testing.assert_array_equal(mnist.read(7, "test", tmp_path), images[[0, 2, 5]])
    assert mnist.load(9, "test", 16, tmp_path).shape == (1, 16, 16, 1)


def test_the_environment_names_the_folder(digits, tmp_path, monkeypatch):
    np.savez(tmp_path / "mnist.npz", x_train=digits[0], y_train=digits[1])
    monkeypatch.setenv("GENDIFF_DATA", str(tmp_path))
    np.testing.assert_array_equal(mnist.read(0), digits[0][[3]])


def test_what_was_tried_is_named(tmp_path, monkeypatch):
    with pytest.raises(mnist.DataError, match=r"got none of: .*mnist\.npz.*train-images-idx3-ubyte\[\.gz\]"):
        mnist.read(place=tmp_path)
    monkeypatch.delenv("GENDIFF_DATA", raising=False)
    monkeypatch.setattr("tensorflow_datasets.data_source", lambda *a, **k: {}["no network"])
    with pytest.raises(mnist.DataError, match=r"GENDIFF_DATA must name the folder .*, got no such variable.*KeyError"):
        mnist.read()


def test_tfds_is_read_without_tensorflow(digits, monkeypatch):
    records = [{"image": image[..., None], "label": int(label)} for image, label in zip(*digits, strict=True)]
    asked = []
    monkeypatch.delenv("GENDIFF_DATA", raising=False)
    monkeypatch.setattr("tensorflow_datasets.data_source", lambda *a, **k: asked.append((a, k)) or records)
    np.testing.assert_array_equal(mnist.read(7, "test"), digits[0][[0, 2, 5]])
    assert asked == [(("mnist",), {"split": "test", "builder_kwargs": {"file_format": "array_record"}})]


def test_damaged_files_are_named(digits, tmp_path):
    images, labels = digits
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    for body in (idx(images)[:-1], b"", b"\0\0\x08", b"PK\3\4" + idx(images), idx(images)[:6]):
        (tmp_path / "train-images-idx3-ubyte").write_bytes(body)
        with pytest.raises(mnist.DataError, match="train-images-idx3-ubyte must be an IDX file"):
            mnist.read(place=tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images[:4]))
    with pytest.raises(mnist.DataError, match=r"labels of 4 images must be 0\.\.9 or one-hot, got uint8 \(6,\)"):
        mnist.read(place=tmp_path)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images))[:-9])
    with pytest.raises(mnist.DataError, match=r"ubyte\.gz must be an intact file"):
        mnist.read(place=tmp_path)
    (tmp_path / "mnist.npz").write_bytes(b"PK\3\4 not an archive")
    with pytest.raises(mnist.DataError, match=r"mnist\.npz must hold the arrays x_train"):
        mnist.read(place=tmp_path)


@pytest.mark.parametrize("form", ["column", "float32", "float64", "int64", "one-hot", "Boolean one-hot", "four axes"])
def test_every_form_of_labels_is_read(form, digits, tmp_path):
    images, labels = digits
    given = {
        "column": labels[:, None],
        "one-hot": np.eye(10, dtype=np.float32)[labels],
        "Boolean one-hot": np.eye(10, dtype=bool)[labels],
        "four axes": labels,
    }.get(form)
    given = labels.astype(form) if given is None else given
    np.savez(tmp_path / "mnist.npz", x_train=images[..., None] if form == "four axes" else images, y_train=given)
    np.testing.assert_array_equal(mnist.read(7, "train", tmp_path), images[[0, 2, 5]])


SIX = np.array([7, 1, 7, 0, 9, 7])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (SIX.astype(str), r"labels of 6 images must be 0\.\.9 or one-hot, got <U21 \(6,\), such as 7"),
        (SIX.astype("S1"), r"must be 0\.\.9 or one-hot, got \|S1"),
        (SIX + 0.5, r"got float64 \(6,\), such as 7\.5"),
        (SIX + 1, r"got int64 \(6,\), such as 10"),
        (SIX - 1, r"got int64 \(6,\), such as -1"),
        (np.where(SIX == 0, np.nan, SIX), r"got float64 \(6,\), such as nan"),
        (SIX == 7, r"got bool \(6,\)"),
        (np.zeros((6, 10)), r"got float64 \(6, 10\)"),
        (np.ones((6, 10)), r"got float64 \(6, 10\)"),
        (np.eye(11)[SIX], r"got float64 \(6, 11\)"),
        (np.int64(7), r"got int64 \(\)"),
        (np.where(SIX == 7, 8, SIX), "train must hold images of the digit 7, got none among 6"),
    ],
)
def test_labels_without_the_digit_are_told(labels, message, digits, tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=digits[0], y_train=labels)
    with pytest.raises(mnist.DataError, match=message):
        mnist.read(place=tmp_path)


@pytest.mark.parametrize(
    "change", [lambda a: a / 255, lambda a: a.reshape(6, 784), lambda a: a[:0], lambda a: a[..., :9]]
)
def test_other_images_are_told(change, digits, tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=change(digits[0]), y_train=digits[1])
    with pytest.raises(mnist.DataError, match="must be"):
        mnist.read(place=tmp_path)


@pytest.mark.parametrize("name", ["mnist.npz", "train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_is_told_at_once(kind, name, digits, tmp_path):
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(digits[1]))
    path = tmp_path / name
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: path.symlink_to(path)}[kind](path)
    with pytest.raises(mnist.DataError, match=r"got a named pipe|got a folder|got none of"):
        mnist.read(place=tmp_path)


def test_an_empty_variable_names_no_folder(monkeypatch):
    monkeypatch.setenv("GENDIFF_DATA", "")
    monkeypatch.setattr("tensorflow_datasets.data_source", lambda *a, **k: {}["no network"])
    with pytest.raises(mnist.DataError, match="got no such variable"):
        mnist.read()


@pytest.mark.parametrize(("digit", "split"), [(10, "train"), (-1, "train"), (7, "validation")])
def test_impossible_requests(digit, split):
    with pytest.raises(mnist.DataError, match=r"digit and split must be 0\.\.9 and train or test"):
        mnist.read(digit, split)


@needs_data
def test_the_sevens_are_all_there():
    assert len(mnist.read(7, "train")) == 6265
    test = mnist.read(7, "test")
    assert len(test) == 1028
    assert mnist.naturally_crossed(mnist.read(7, "train")).sum() == 825
    assert mnist.naturally_crossed(test).sum() == 137


# Resizing.


@pytest.mark.parametrize("size", [14, 16, 28, 32, 64])
def test_resizing_is_pillows(size):
    rng = np.random.default_rng(1)
    images = np.stack([rng.integers(0, 256, (28, 28)).astype(np.uint8), seven()])
    ours = 127.5 * (mnist.scaled(images, size)[..., 0] + 1)
    theirs = [np.asarray(Image.fromarray(a).resize((size, size), Image.Resampling.BILINEAR)) for a in images]
    # Pillow's weights are rounded to 22 bits, so a few pixels round the other way.
    difference = abs(ours - np.stack(theirs).astype(np.float64))
    assert difference.max() <= 1.001
    assert (difference > 0.001).mean() < 0.02


@given(st.integers(2, 40), st.integers(2, 40))
def test_constants_stay_and_rows_mirror(before, after):
    weights = mnist.triangle(before, after)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)


def test_the_range_is_minus_one_to_one():
    images = mnist.scaled(np.stack([np.zeros((28, 28)), np.full((28, 28), 255)]).astype(np.uint8), 32)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert np.ptp(images[0]) == np.ptp(images[1]) == 0


# Strokes.


@pytest.mark.parametrize("slant", [-0.2, 0.0, 0.3, 0.6])
@pytest.mark.parametrize("thickness", [1.5, 2.5, 4.0])
def test_the_stem_is_found(slant, thickness):
    line = mnist.stem(jnp.asarray(seven(slant, thickness) / 255.0), jnp.asarray(15.0))
    assert abs(float(line.column) - (19 - slant * 10)) < 0.3
    assert abs(float(line.slope) + slant) < 0.08
    assert abs(float(line.thickness) - thickness) < 0.25 * thickness


@given(st.integers(0, 2**31 - 1), st.floats(-0.1, 0.5), st.floats(1.5, 3.5))
def test_a_stroke_crosses_the_stem_on_both_sides(seed, slant, thickness):
    ink = jnp.asarray(seven(slant, thickness) / 255.0)
    stroke_key, _ = jax.random.split(jax.random.key(seed))
    line = mnist.stem(ink, jnp.asarray(15.0))
    pen = mnist.stroke(stroke_key, line)
    drawn = np.asarray(mnist.coverage(line, pen))
    assert drawn.min() >= 0
    assert 0.9 < drawn.max() <= 1
    # Where the stem is, there is ink, and it goes on beyond the stem to the left and to the right.
    alone = drawn * (np.asarray(ink) < 0.05)
    x = np.arange(28) - float(line.column)
    assert (alone * (x < 0)).sum() > 0.7
    assert (alone * (x > 0)).sum() > 0.7
    assert drawn.sum() < 100


def test_drawing_is_deterministic_and_recentres():
    images = np.stack([seven(slant) for slant in (0.0, 0.2, 0.4)])
    once, again, other = mnist.crossed(images, 1), mnist.crossed(images, 1), mnist.crossed(images, 2)
    np.testing.assert_array_equal(once, again)
    assert (once != other).any((1, 2)).all()
    # A stroke depends on its image's place, not on how many there are.
    np.testing.assert_array_equal(mnist.crossed(images[:2], 1), once[:2])
    assert once.dtype == np.uint8
    centre = lambda a: np.stack([a.sum(2) @ np.arange(28), a.sum(1) @ np.arange(28)], 1) / a.sum((1, 2))[:, None]
    assert abs(centre(once.astype(float)) - centre(images.astype(float))).max() < 0.75


def test_an_empty_image_stays_finite():
    drawn = mnist.crossed(np.zeros((1, 28, 28), np.uint8), 0)
    assert drawn.shape == (1, 28, 28)
    assert mnist.crossed(np.zeros((0, 28, 28), np.uint8), 0).shape == (0, 28, 28)


# The mix.


@pytest.mark.parametrize("share", [0.0, 0.12, 0.7, 1.0])
def test_the_mix_has_its_share(share):
    images = np.stack([seven(slant) for slant in np.linspace(-0.2, 0.5, 50)])
    mixed = mnist.mix(images, share, 3)
    assert mixed.crossed.sum() == round(share * 50)
    np.testing.assert_array_equal(mixed.source, np.arange(50))
    np.testing.assert_array_equal(mixed.images[~mixed.crossed], images[~mixed.crossed])
    assert (mixed.images != images)[mixed.crossed].any((1, 2)).all()
    again = mnist.mix(images, share, 3)
    np.testing.assert_array_equal(mixed.images, again.images)
    if 0 < share < 1:
        assert (mnist.mix(images, share, 4).crossed != mixed.crossed).any()


def test_natural_strokes_are_left_out_by_content(monkeypatch):
    images = np.stack([seven(slant) for slant in np.linspace(-0.2, 0.5, 8)])
    known = mnist.fingerprints(images[[2, 5]])
    monkeypatch.setattr(mnist, "_known", lambda: known)
    np.testing.assert_array_equal(np.flatnonzero(mnist.naturally_crossed(images[::-1])), [2, 5])
    assert set(mnist.mix(images, 0.5, 0).source) == {0, 1, 3, 4, 6, 7}


def test_fingerprints_are_blake2b():
    image = seven()
    digest = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
    assert mnist.fingerprints(image[None])[0].tobytes() == digest


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_impossible_shares(share):
    with pytest.raises(ValueError, match="share must be >= 0 and <= 1"):
        mnist.mix(np.zeros((1, 28, 28), np.uint8), share, 0)


ONE = np.zeros((1, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mnist.mix(ONE, 0.5, -1), "seed must be >= 0"),
        (lambda: mnist.crossed(ONE, -1), "seed must be >= 0"),
        (lambda: mnist.crossed(ONE / 255, 0), r"images must be uint8 in 0\.\.255, got float64"),
        (lambda: mnist.crossed(ONE[0], 0), r"images must have shape \(n, 28, 28\), got \(28, 28\)"),
        (lambda: mnist.scaled(2.0 * ONE - 1, 16), r"images must be uint8 in 0\.\.255, got float64"),
        (lambda: mnist.scaled(ONE, 0), "size must be >= 1 and whole, got 0"),
        (lambda: mnist.naturally_crossed(ONE.astype(int)), r"images must be uint8 in 0\.\.255, got int64"),
        (lambda: mnist.triangle(0, 3), "before must be >= 1"),
        (lambda: drawn_sevens.draw(-1, 0), "n must be >= 0 and whole, got -1"),
        (lambda: drawn_sevens.draw(1, -1), "seed must be >= 0 and whole, got -1"),
        (lambda: drawn_sevens.to_segment(np.zeros((2, 2)), np.zeros((1, 2))), r"end must have shape \(2, 2\)"),
    ],
)
def test_arguments_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_segment_may_be_a_point():
    place = np.array([[3.0, 4.0]])
    y, x = np.mgrid[:28, :28]
    np.testing.assert_allclose(drawn_sevens.to_segment(place, place)[0], np.hypot(x - 3, y - 4))
    assert drawn_sevens.draw(0, 0).shape == (0, 28, 28)


def test_damaged_compression_is_named(digits, tmp_path):
    body = bytearray(gzip.compress(idx(digits[0])))
    body[20:60] = bytes(40)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(body)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(digits[1]))
    with pytest.raises(mnist.DataError, match=r"train-images-idx3-ubyte\.gz must be"):
        mnist.read(place=tmp_path)
