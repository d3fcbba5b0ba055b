import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gendiff.geometry import outline
from gendiff.oracles import boxes

PAIRS = 100_000


def drawn(rng, n, spread):
    """Boxes around the origin in float64."""
    yaw = rng.uniform(-np.pi, np.pi, n)
    return np.stack([*rng.normal(0, spread, (2, n)), *rng.uniform(0.2, 12, (2, n)), np.cos(yaw), np.sin(yaw)], -1)


def polygons(each):
    shapely = pytest.importorskip("shapely")
    ahead, aside = each[:, 4:6], np.stack([-each[:, 5], each[:, 4]], -1)
    corner = lambda a, b: each[:, :2] + a * each[:, 2:3] * ahead + b * each[:, 3:4] * aside
    ring = [corner(a, b) for a, b in ((0.5, 0.5), (0.5, -0.5), (-0.5, -0.5), (-0.5, 0.5))]
    return shapely.polygons(np.stack(ring, 1))


def test_random_pairs_are_as_an_independent_library_says():
    shapely = pytest.importorskip("shapely")
    rng = np.random.default_rng(0)
    a, b = drawn(rng, PAIRS, 5), drawn(rng, PAIRS, 5)
    nested = rng.random(PAIRS) < 0.1  # a tenth within the other
    b[nested, :2], b[nested, 2:4] = a[nested, :2], a[nested, 2:4] * 0.5
    expected = shapely.intersects(polygons(a), polygons(b))
    assert 0.2 < expected.mean() < 0.8
    with jax.enable_x64(True):
        np.testing.assert_array_equal(boxes.overlap(jnp.asarray(a), jnp.asarray(b)), expected)
    # In float32, where rounding cannot decide: neither almost touching nor almost apart.
    gap = shapely.distance(polygons(a), polygons(b))
    depth = ~boxes.overlap(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), -1e-4)
    clear = ~expected & (gap > 1e-4) | expected & ~np.asarray(depth)
    given = boxes.overlap(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_array_equal(np.asarray(given)[clear], expected[clear])
    assert clear.mean() > 0.999


def test_touching_boxes_overlap_and_a_hair_apart_they_do_not():
    box = jnp.array([0.0, 0, 4, 2, 1, 0])
    other = lambda x, y, cos=1.0, sin=0.0: jnp.array([x, y, 4, 2, cos, sin])
    for touching, away in (
        (other(4, 0), other(4.001, 0)),
        (other(0, 2), other(0, 2.001)),
        (other(4, 2), other(4, 2.001)),  # corner to corner
        (other(3, 0, 0.0, 1.0), other(3.001, 0, 0.0, 1.0)),  # across
    ):
        assert bool(boxes.overlap(box, touching))
        assert not bool(boxes.overlap(box, away))
        assert bool(boxes.overlap(box, away, margin=0.01))
        assert not bool(boxes.overlap(box, touching, margin=-0.01))


finite = st.floats(-20, 20, width=32)
size = st.floats(0.25, 12, width=32)
angle = st.floats(-3.125, 3.125, width=32)
box = st.tuples(finite, finite, size, size, angle)


def made(each):
    return np.array([*each[:4], np.cos(each[4]), np.sin(each[4])])


def moved(each, x, y, turn):
    """A box turned around the origin, then shifted."""
    rotate = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return np.concatenate([each[:2] @ rotate + [x, y], each[2:4], each[4:6] @ rotate])


overlap = jax.jit(boxes.overlap)


@settings(max_examples=300, deadline=None)
@given(box, box, finite, finite, angle)
def test_symmetry_and_rigid_motion(a, b, x, y, turn):
    a, b = made(a), made(b)
    turned = np.concatenate([a[:4], -a[4:6]])  # the same rectangle
    first = np.float32([a, b, turned, moved(a, x, y, turn), a])
    second = np.float32([b, a, b, moved(b, x, y, turn), b])
    given, swapped, same, elsewhere, _ = np.asarray(overlap(first, second))
    assert given == swapped == same
    near = np.asarray(overlap(first, second, 1e-3))[0] != np.asarray(overlap(first, second, -1e-3))[0]
    assert near or elsewhere == given  # where rounding does not decide


def test_collisions_of_a_scene():
    scene = jnp.array([[0.0, 0, 4, 2, 1, 0], [3, 0, 4, 2, 1, 0], [10, 0, 4, 2, 1, 0], [10, 0, 1, 1, 0, 1]])
    expected = np.zeros((4, 4), bool)
    expected[[0, 1, 2, 3], [1, 0, 3, 2]] = True
    np.testing.assert_array_equal(boxes.collisions(scene), expected)
    present = jnp.array([True, True, True, False])
    expected[[2, 3], [3, 2]] = False
    np.testing.assert_array_equal(boxes.collisions(scene, present), expected)
    many = boxes.collisions(jnp.stack([scene, scene[::-1]]))
    np.testing.assert_array_equal(many[1], np.asarray(many[0])[::-1, ::-1])


def test_outline():
    (turned,) = outline(jnp.array([[1.0, 2, 4, 2, 0, 1]]))
    expected = [(0, 4), (1, 4), (2, 4), (2, 2), (2, 0), (1, 0), (0, 0), (0, 2)]
    np.testing.assert_allclose(turned, expected, atol=1e-6)
    np.testing.assert_allclose(outline(jnp.array([1.0, 2, 4, 2, 0, 1]), corners_only=True), turned[::2])


def test_degenerate_boxes_are_counted_and_mended():
    given = jnp.array(
        [[0.0, 0, 4, 2, 1, 0], [0, 0, -1, 2, 1, 0], [0, 0, 4, 0, 1, 0], [0, 0, 4, 2, 0, 0], [0, 0, 4, 2, 3, 4]]
    )
    np.testing.assert_array_equal(boxes.degenerate(given), [False, True, True, True, True])
    mended = boxes.mended(given)
    np.testing.assert_allclose(mended[:, 2:4].min(1), [2, 0.1, 0.1, 2, 2])
    np.testing.assert_allclose(mended[3:, 4:6], [(1, 0), (0.6, 0.8)], rtol=1e-6)
    assert bool(boxes.degenerate(given[0].at[2].set(jnp.nan)))


def test_narrow_boxes_are_judged_as_their_values():
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(drawn(rng, 4000, 5), jnp.bfloat16) for _ in range(2))
    a, b = a.at[:, :2].add(jnp.bfloat16(40)), b.at[:, :2].add(jnp.bfloat16(40))
    wide = a.astype(jnp.float32), b.astype(jnp.float32)
    np.testing.assert_array_equal(boxes.overlap(a, b), boxes.overlap(*wide))
    np.testing.assert_array_equal(boxes.degenerate(a), boxes.degenerate(wide[0]))
    np.testing.assert_array_equal(outline(a), outline(wide[0]))
    assert boxes.mended(a).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda box: boxes.overlap(box, box, jnp.nan), "margin must be a finite number, got nan"),
        (lambda box: boxes.overlap(box, box[..., :5]), r"boxes must have shape \(3, 6\), got \(3, 5\)"),
        (lambda box: boxes.mended(box[..., :4]), r"boxes must have shape \(3, 6\), got \(3, 4\)"),
        (lambda box: boxes.degenerate(box[..., :5]), r"boxes must have shape \(3, 6\)"),
        (lambda box: outline(jnp.ones((3, 7))), r"boxes must have shape \(3, 6\), got \(3, 7\)"),
        (lambda box: boxes.collisions(box, jnp.ones(1, bool)), r"present must have shape \(3,\), got \(1,\)"),
    ],
)
def test_bad_boxes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((3, 6)))
