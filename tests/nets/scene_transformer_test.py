import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gendiff.geometry import outline
from gendiff.nets.mlp import sinusoidal
from gendiff.nets.scene_network import SceneNetwork
from gendiff.nets.scene_transformer import (
    ABSENT,
    Place,
    RelativeAttention,
    SceneTransformer,
    Units,
    relations,
    roadside,
    squares,
    waves,
)
from gendiff.oracles import boxes
from gendiff.oracles.drivable import distance_at

UNITS = Units((0.0, 0.0, 4.8, 1.9, 0.0, 0.0, 5.0), (25.0, 25.0, 1.2, 0.25, 1.0, 1.0, 5.0), 50.0)
HEADS = ("denoise", "scene", "agent", "pair")
K = 5


def network(head: str) -> SceneNetwork:
    return SceneNetwork(SceneTransformer(UNITS, head, width=16, layers=2, heads=2, hidden=4))


def scene(seed: int = 0) -> tuple[jax.Array, Place]:
    rng = np.random.default_rng(seed)
    cells = (np.arange(32) + 0.5) / 32 * 100 - 50
    distance = np.abs(cells[:, None] + 5 * np.sin(cells[None] / 20)) - 8
    return jnp.asarray(rng.normal(size=(K, 7)), jnp.float32), Place(jnp.asarray(distance), jnp.ones(K, bool))


@pytest.fixture(scope="module")
def params() -> dict:
    """Of each head, all of them random: fresh networks give zeros."""

    def random(head: str) -> dict:
        fresh = jax.eval_shape(network(head).init, jax.random.key(0), scene()[1])
        leaves, tree = jax.tree.flatten(fresh)
        rng = np.random.default_rng(1)
        return tree.unflatten([jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])

    return {head: random(head) for head in HEADS}


def evaluate(params: dict, head: str, u: jax.Array, place: Place, c_noise: float = -0.3) -> np.ndarray:
    net = network(head)
    return np.asarray(jax.jit(lambda p, u: net.apply(net.bind(p, place), u, jnp.float32(c_noise)))(params[head], u))


@pytest.mark.parametrize("head", HEADS)
def test_vehicles_are_a_set(params, head):
    u, place = scene()
    order = np.random.default_rng(2).permutation(K)
    plain, moved = evaluate(params, head, u, place), evaluate(params, head, u[order], place)
    if head == "scene":
        expected = plain
    elif head == "pair":
        table = np.zeros((K, K))
        rows, columns = np.triu_indices(K, 1)
        table[rows, columns] = table[columns, rows] = plain[: len(rows)]
        expected = np.concatenate([table[np.ix_(order, order)][rows, columns], plain[len(rows) :][order]])
    else:
        expected = plain[order]
    assert np.ptp(plain) > 1e-2 or head == "scene"
    np.testing.assert_allclose(moved, expected, atol=2e-5)


@pytest.mark.parametrize("head", HEADS)
def test_what_is_not_present_changes_nothing(params, head):
    u, place = scene()
    there = jnp.array([True, True, False, True, False])
    place = place._replace(present=there)
    other = jnp.where(there[:, None], u, 3 * jax.random.normal(jax.random.key(3), u.shape))
    one, two = evaluate(params, head, u, place), evaluate(params, head, other, place)
    if head == "denoise":
        one, two = one[np.asarray(there)], two[np.asarray(there)]
    np.testing.assert_allclose(one, two, atol=1e-5)
    if head == "agent":
        assert (one[~np.asarray(there)] == ABSENT).all()
    if head == "pair":
        rows, columns = np.triu_indices(K, 1)
        both = np.asarray(there)[rows] & np.asarray(there)[columns]
        np.testing.assert_array_equal(one[: len(rows)] == ABSENT, ~both)


def test_a_logit_of_what_is_not_present_costs_and_pulls_nothing():
    loss = lambda logit: jax.nn.softplus(logit) - logit
    assert jax.nn.log_sigmoid(ABSENT) == 0
    assert jax.grad(jax.nn.log_sigmoid)(ABSENT) == 0
    assert loss(ABSENT) == 0


def test_the_map_matters_and_one_vehicle_is_a_scene(params):
    u, place = scene()
    shifted = place._replace(distance=place.distance + 6)
    assert np.abs(evaluate(params, "denoise", u, place) - evaluate(params, "denoise", u, shifted)).max() > 1e-2
    alone = Place(place.distance, jnp.ones(1, bool))
    assert np.isfinite(evaluate(params, "denoise", u[:1], alone)).all()


def test_gradients_are_finite_where_vehicles_coincide(params):
    u, place = scene()
    net = network("pair")
    same = jnp.broadcast_to(u[:1], u.shape).at[:, 4:6].set(0.0)
    total = lambda u: jnp.sum(jax.nn.log_sigmoid(net.apply(net.bind(params["pair"], place), u, jnp.float32(-1))))
    assert np.isfinite(np.asarray(jax.jit(jax.grad(total))(same))).all()


vehicle = st.tuples(st.floats(-8, 8), st.floats(-8, 8), st.floats(1, 12), st.floats(0.5, 3), st.floats(0, 2 * np.pi))


@jax.jit
def gap_and_overlaps(both):
    """The gap that `relations` sees, and whether boxes a little larger and a little smaller overlap."""
    grown, shrunk = (both[:, :6].at[:, 2:4].multiply(factor) for factor in (1.03, 0.97))
    apart = 25 * relations(both, jnp.float32(0.1))[0, 1, 11]
    return apart, boxes.overlap(grown[0], grown[1], 0.1), boxes.overlap(shrunk[0], shrunk[1], -0.1)


@settings(max_examples=200)
@given(vehicle, vehicle)
def test_the_largest_gap_is_positive_where_boxes_are_apart(a, b):
    """`relations` sees noisy headings slightly shortened: compared with boxes a little larger and smaller."""
    both = [[x, y, length, width, np.cos(yaw), np.sin(yaw), 0] for x, y, length, width, yaw in (a, b)]
    apart, larger, smaller = gap_and_overlaps(jnp.asarray(both, jnp.float32))
    if not larger:
        assert apart > 0
    if smaller:
        assert apart < 0


def test_relations_turn_with_the_scene():
    """All but the way in the window's frame are the same after a rigid motion."""
    rng = np.random.default_rng(4)
    vehicles = np.asarray(UNITS.metres(jnp.asarray(rng.normal(size=(K, 7)), jnp.float32)))
    cos, sin = np.cos(0.7), np.sin(0.7)
    turn = np.array([[cos, sin], [-sin, cos]])
    moved = vehicles.copy()
    moved[:, :2] = vehicles[:, :2] @ turn + [3, -4]
    moved[:, 4:6] = vehicles[:, 4:6] @ turn
    one, two = (np.asarray(relations(jnp.asarray(v), jnp.float32(0.5))) for v in (vehicles, moved))
    np.testing.assert_allclose(one[..., 2:], two[..., 2:], atol=2e-4)
    np.testing.assert_allclose(two[..., :2], one[..., :2] @ turn, atol=1e-5)


def test_the_roadside_is_the_oracle_s_distance():
    u, place = scene()
    vehicles = UNITS.metres(0.5 * u)
    vehicles = vehicles.at[:, 4:6].set(jnp.array([[0.6, 0.8]]))
    found = np.asarray(roadside(vehicles, place.distance, 50.0))
    size = 1 / np.sqrt(1.01)  # the heading's norm, as noise is expected
    shapes = jnp.concatenate([vehicles[:, :4], vehicles[:, 4:6] * size], -1)
    points = jnp.concatenate([outline(shapes), vehicles[:, None, :2]], 1)
    np.testing.assert_allclose(found[:, :9], np.asarray(distance_at(place.distance, points, 50.0)), atol=1e-4)
    rings = vehicles[:, None, :2] + size * jnp.asarray([[0.6, 0.8], [-0.8, 0.6], [-0.6, -0.8]])[None] * jnp.array(
        [[[2.0], [5.0], [10.0]]]
    )
    expected = np.asarray(distance_at(place.distance, rings, 50.0))
    np.testing.assert_allclose(found[:, [9, 9 + 8 + 2, 9 + 16 + 4]], expected, atol=1e-4)
    beyond = vehicles.at[:, 0].set(60.0)
    edge = np.asarray(distance_at(place.distance, jnp.stack([jnp.full(K, 50.0), beyond[:, 1]], -1), 50.0))
    np.testing.assert_allclose(np.asarray(roadside(beyond, place.distance, 50.0))[:, 8], edge + 10, atol=1e-3)


def test_relative_attention_is_wu_s_formula():
    """With the encodings R_ij written out, k^2 of them."""
    heads, d = 2, 8
    rng = np.random.default_rng(5)
    layer = RelativeAttention(heads)
    h, r = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((K, d), (K, K, 3)))
    there = jnp.array([True, True, True, False, True])
    shapes = jax.eval_shape(layer.init, jax.random.key(0), h, r, there)
    leaves, tree = jax.tree.flatten(shapes)
    params = tree.unflatten([jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])
    given = layer.apply(params, h, r, there)

    p = jax.tree.map(np.asarray, params["params"])
    each = d // heads
    q, key, v = ((np.asarray(h) @ p[name]["kernel"]).reshape(K, heads, each) for name in "qkv")
    r_k, r_q, r_v = (np.einsum("hef,ijf->ijhe", p[f"read_{name}"], np.asarray(r)) for name in "qkv")
    logits = np.einsum("ihe,jhe->hij", q, key) + np.einsum("ihe,ijhe->hij", q, r_k)
    logits = (logits + np.einsum("jhe,jihe->hij", key, r_q)) / each**0.5
    logits = np.where(np.asarray(there), logits, -np.inf)
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    out = np.einsum("hij,jhe->ihe", share, v) + np.einsum("hij,ijhe->ihe", share, r_v)
    np.testing.assert_allclose(given, out.reshape(K, d) @ p["out"]["kernel"] + p["out"]["bias"], atol=1e-3)


def test_units_go_there_and_back():
    rng = np.random.default_rng(6)
    u, there = jnp.asarray(rng.normal(size=(3, K, 7)), jnp.float32), jnp.asarray(rng.random((3, K)) < 0.6)
    back = UNITS.normalised(UNITS.metres(u), there)
    np.testing.assert_allclose(back, np.where(np.asarray(there)[..., None], u, 0), atol=1e-5)


def test_squares_are_a_convolution_whose_window_is_its_stride():
    rng = np.random.default_rng(8)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 12), (4, 4, 1, 5)))
    names = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x[None, ..., None], w, (4, 4), "VALID", dimension_numbers=names)[0]
    np.testing.assert_allclose(squares(x, 4) @ w.reshape(16, 5), expected, atol=1e-4)


def test_waves_tell_places_apart():
    at = jnp.asarray(np.random.default_rng(7).uniform(-1, 1, (40, 2)), jnp.float32)
    features = np.asarray(waves(at))
    np.testing.assert_allclose(features[:, 0], np.sin(np.pi * np.asarray(at[:, 0])), atol=1e-6)
    far = np.linalg.norm(features[:, None] - features[None], axis=-1) + 10 * np.eye(40)
    assert far.min() > 0.05


def test_maps_that_do_not_fit_are_an_error():
    net = network("denoise")
    for shape in ((40, 40), (32, 16)):
        with pytest.raises(ValueError, match="must be a square map of a multiple of 16 cells"):
            net.init(jax.random.key(0), Place(jnp.zeros(shape), jnp.ones(K, bool)))


def test_time_is_told_smoothly():
    levels = jnp.linspace(-1.2, 1.1, 7)
    told = np.asarray(jax.vmap(lambda c: sinusoidal(c, 32))(levels))
    assert np.linalg.norm(np.diff(told, axis=0), axis=1).min() > 0.1
