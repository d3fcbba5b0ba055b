"""Pictures show the sample's own pixels and places."""

import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from gendiff.feedback import render, samples

RNG = np.random.default_rng(0)


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture.body)))


def tags(picture, name):
    assert picture.media == "image/svg+xml"
    return ElementTree.fromstring(picture.body).iter("{http://www.w3.org/2000/svg}" + name)


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (9, 7, 3), (9, 7, 4)])
def test_images_keep_every_pixel(shape):
    sample = RNG.integers(0, 256, shape, np.uint8)
    picture = render.image(sample)
    assert picture.media == "image/png"
    np.testing.assert_array_equal(pixels(picture), sample.reshape(shape[:2] if shape[2:] == (1,) else shape))
    back = (sample / 127.5 - 1).astype(np.float32)
    np.testing.assert_array_equal(pixels(render.image(back)), pixels(picture))


def test_floats_are_clipped():
    sample = np.array([[-1.4, -1.0, 0.0, 1.0, 1.4]])
    assert pixels(render.image(sample)).tolist() == [[0, 0, 128, 255, 255]]


def test_large_images_are_smaller_in_the_grid_only():
    sample = RNG.integers(0, 256, (300, 900, 3), np.uint8)
    small = render.image(sample)
    assert small.media == "image/jpeg"
    assert pixels(small).shape == (171, 512, 3)
    np.testing.assert_array_equal(pixels(render.image(sample, whole=True)), sample)


def test_a_point_lies_where_it_is_in_its_cloud():
    points = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    window = render.frame(points)
    np.testing.assert_allclose(window.place(window.centre), [50, 50])
    places = [next(iter(tags(render.point(each, window), "circle"))) for each in points]
    x, y = (np.array([float(circle.get(name)) for circle in places]) for name in ("cx", "cy"))
    assert x[1] > x[0] == x[2]
    assert y[2] < y[0] == y[1], "y points upwards"
    assert ((np.stack([x, y]) > 0) & (np.stack([x, y]) < 100)).all()
    (axes, dots) = tags(render.cloud(points, window), "path")
    assert dots.get("d").count("M") == 3
    assert axes.get("d").startswith("M")


def test_a_cloud_of_many_is_thinned():
    points = RNG.normal(size=(50_000, 2))
    assert len(render.cloud(points, render.frame(points)).body) < 50_000


def test_a_trajectory_goes_through_its_points():
    path = np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 0.0]])
    window = render.frame(path)
    (line,) = tags(render.trajectory(path, window), "path")
    drawn = np.array(re.findall(r"[-\d.]+", line.get("d")), float).reshape(-1, 2)
    np.testing.assert_allclose(drawn, window.place(path), atol=0.06)
    lines = list(tags(render.paths(path[None], window), "path"))[1]
    assert lines.get("d").count("M") == 1


def figure(turns, joints=((0, 0, 0), (0, 1, 0), (0, 2, 0), (0.5, 1.5, 0))):
    """Joints (T, J, 3) that turn about the vertical axis, with the same distances throughout."""
    angles = np.linspace(0, turns * 2 * np.pi, 30)
    c, s, zero, one = np.cos(angles), np.sin(angles), np.zeros(30), np.ones(30)
    turn = np.array([[c, zero, s], [zero, one, zero], [-s, zero, c]]).transpose(2, 0, 1)
    return np.asarray(joints) @ turn.transpose(0, 2, 1)


def test_a_motion_moves_and_shows_moments():
    motion = figure(0.5)
    joined = np.array([[0, 1], [1, 2], [1, 3]])
    picture = render.motion(motion, joined)
    (moves,) = tags(picture, "animate")
    frames = moves.get("values").split(";")
    assert len(frames) == 30
    assert len({re.sub(r"[-\d.]+", "", each) for each in frames}) == 1, (
        "the same shape in every frame, or nothing moves"
    )
    assert frames[0] != frames[15]
    assert moves.get("dur") == f"{30 / render.FPS:.2f}s"
    assert len(render.motion(np.repeat(motion, 100, 0), joined).body) < 20_000


def test_up_is_up():
    standing = np.array([[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]] * 2)
    for up, sample in (("y", standing), ("z", standing[..., [0, 2, 1]])):
        drawn = next(iter(tags(render.motion(sample, np.array([[0, 1]]), up), "path"))).get("d")
        x, y, u, v = (float(value) for value in re.findall(r"[-\d.]+", drawn)[:4])
        assert x == u
        assert v < y, "the head is above the feet"


def test_bones_are_the_parents_or_the_stiff_short_pairs():
    motions = np.stack([figure(0.5), figure(1.0)])
    # A hand that swings past the hip: close to it, but at a changing distance.
    hand = motions[:, :, 3:] + np.array([0.3, -1.0, 0]) * np.sin(np.linspace(0, 6, 30))[:, None, None]
    motions = np.concatenate([motions, hand], axis=2)
    pairs = {tuple(sorted(pair)) for pair in render.bones(motions).tolist()}
    assert pairs >= {(0, 1), (1, 3), (2, 3)}
    assert render.bones(motions, np.array([-1, 0, 1, 1, 3])).tolist() == [[1, 0], [2, 1], [3, 1], [4, 3]]
    assert len(render.bones(np.zeros((1, 2, 3, 3)))) == 2, "joints at one place are still joined"


@pytest.mark.parametrize(
    ("shape", "backdrop"), [((4, 8, 8), False), ((4, 2), True), ((4, 9, 2), True), ((4, 9, 5, 3), False)]
)
def test_each_kind_has_its_picture(shape, backdrop):
    scale = 3 if len(shape) == 4 else 1
    drawing = render.drawing(samples.of(scale * RNG.uniform(-1, 1, shape)))
    assert (drawing.backdrop is not None) == backdrop
    assert len({drawing.draw(i, False).body for i in range(4)}) == 4


def test_equal_points_have_a_frame():
    assert np.isfinite(render.frame(np.ones((3, 2))).place(np.ones(2))).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_motions_have_the_bones_of_wide_ones(dtype):
    motions = np.stack([figure(0.5), figure(1.0)]) * 300  # millimetres: their squares exceed float16
    wide = motions.astype(dtype).astype(np.float64)
    assert render.bones(motions.astype(dtype)).tolist() == render.bones(wide).tolist()
    drawing = render.drawing(samples.of(motions.astype(dtype)))
    assert drawing.draw(0, True).body == render.drawing(samples.of(wide)).draw(0, True).body
    assert b"nan" not in drawing.draw(0, True).body


def test_narrow_images_show_the_nearest_grey():
    exact = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert pixels(render.image((exact / 127.5 - 1).astype(np.float16)))[8:].tolist() == exact[8:].tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("span", [0.0, 1e-12, 1.0])
def test_a_constant_coordinate_of_any_size_has_a_frame(dtype, span):
    constant = np.array([[1e8, 0.0], [1e8, span], [1e8, span / 2]], dtype)
    window = render.frame(constant)
    placed = window.place(constant)
    assert window.half > 0
    assert ((placed >= 0) & (placed <= 100)).all()
    np.testing.assert_allclose(placed[:, 0], 50)
    small = render.frame(constant[:, 1:] * [1, 0])
    assert span == 0 or np.ptp(small.place(constant[:, 1:] * [1, 0])[:, 0]) > 80, "a small width is a width"


def test_rounding_of_large_coordinates_fills_no_frame():
    points = np.array([[1e8, 1e8], [np.nextafter(1e8, 2e8), 1e8]])
    assert np.ptp(render.frame(points).place(points)) < 20
