"""Reference examples of channels over a stream, and what a unit sees of the input."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from jax import lax

import relprop as rp

receptive_field, references = rp.concepts.receptive_field, rp.concepts.references
W = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 1, 4)))
V = jnp.asarray(np.random.default_rng(1).normal(size=(4,)))
IMAGES = jnp.asarray(np.random.default_rng(2).normal(size=(23, 6, 6, 1)))


def conv(x, w, stride=1, padding="VALID", dilation=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, rhs_dilation=(dilation, dilation), dimension_numbers=dims
    )


def fn(w, x):
    return jax.nn.relu(conv(x, w)).sum((1, 2)) @ V


def stream(update, sizes, *args):
    found, first = None, 0
    for size in sizes:
        found = update(found, *args, IMAGES[first : first + size])
        first += size
    return found


@pytest.mark.parametrize("score", ["sum", "max"])
def test_references_are_those_of_a_sort_of_everything(score):
    found = stream(references(fn, rp.Epsilon(), at="conv", count=5, score=score, target=None), (10, 10, 3), W)
    layer = rp.relevances(fn, rp.Epsilon(), at="conv")(W, IMAGES)["w"]
    assert int(found.seen) == 23
    for ranking, array in ((found.activation, layer.value), (found.relevance, layer.relevance)):
        flat = np.asarray(array).reshape(23, 16, 4)
        scores = getattr(flat, score)(1)
        order = np.argsort(-scores, axis=0, kind="stable")[:5].T
        np.testing.assert_array_equal(ranking.example, order)
        np.testing.assert_allclose(ranking.score, np.take_along_axis(scores.T, order, 1), rtol=1e-12)
        at = flat.argmax(1)[order, np.arange(4)[:, None]]
        np.testing.assert_array_equal(ranking.position, np.stack(np.unravel_index(at, (4, 4)), -1))


def test_a_stream_is_as_good_as_one_batch_and_keeps_as_little():
    update = references(fn, rp.Epsilon(), at="conv", count=4, target=None)
    whole, parts = stream(update, (23,), W), stream(update, (7, 7, 7, 2), W)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), whole, parts)
    assert parts.activation.score.shape == (4, 4)


def test_of_equals_the_first_are_kept_and_missing_ones_are_marked():
    update = references(lambda w, x: x @ w, None, at="dense", count=3, target=0)
    found = None
    for _ in range(2):
        found = update(found, jnp.ones((1, 1)), jnp.ones((1, 1)))
    np.testing.assert_array_equal(found.activation.example, [[0, 1, -1]])
    assert found.activation.score[0, 2] == -jnp.inf
    assert found.activation.position.shape == (1, 3, 0)


def test_relevance_of_the_predicted_class_by_default():
    w = jnp.array([[1.0, -1.0], [0.0, 2.0]])
    found = references(lambda w, x: x @ w, None, at="dense", count=1)(None, w, jnp.array([[3.0, 1.0], [0.0, 1.0]]))
    np.testing.assert_array_equal(found.relevance.score, [[3.0], [2.0]])
    np.testing.assert_array_equal(found.relevance.example, [[0], [1]])


@pytest.mark.parametrize(
    ("at", "model", "message"),
    [
        ("activation", lambda w, x: jnp.tanh(jnp.tanh(x) @ w), "matches 2"),
        ("conv", lambda w, x: x @ w, "matches no layer"),
        ("dense", lambda w, x: lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=2)[0], "inside of a loop"),
    ],
)
def test_references_need_one_layer_outside_of_loops(at, model, message):
    with pytest.raises(rp.ArgumentError, match=message):
        references(model, None, at=at)(None, jnp.eye(2), jnp.ones((3, 2)))


def test_options_of_references_are_checked():
    with pytest.raises(rp.ArgumentError, match="'sum' or the 'max'"):
        references(fn, None, at="conv", score="mean")
    with pytest.raises(rp.ArgumentError, match="at least one"):
        references(fn, None, at="conv", count=0)


# Receptive fields.


def pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def averaged(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


V2 = jnp.ones((3, 3, 4, 2))


@pytest.mark.parametrize(
    ("model", "position", "box"),
    [
        (lambda x: conv(x, W), (0, 0), [[0, 3], [0, 3], [0, 1]]),
        (lambda x: conv(x, W, padding="SAME"), (0, 5), [[0, 2], [4, 6], [0, 1]]),  # cut by the border
        (lambda x: conv(x, W, stride=2), (1, 0), [[2, 5], [0, 3], [0, 1]]),
        (lambda x: conv(x, W, dilation=2), (1, 1), [[1, 6], [1, 6], [0, 1]]),
        (lambda x: conv(jax.nn.relu(conv(x, W)), V2), (1, 0), [[1, 6], [0, 5], [0, 1]]),
        (lambda x: conv(pooled(jax.nn.relu(conv(x, W, padding="SAME"))), V2), (0, 0), [[0, 6], [0, 6], [0, 1]]),
        (lambda x: conv(averaged(x), W), (0, 0), [[0, 6], [0, 6], [0, 1]]),
        (lambda x: conv(x + jnp.tanh(conv(x, W, padding="SAME"))[..., :1], W), (0, 0), [[0, 4], [0, 4], [0, 1]]),
    ],
)
def test_receptive_field_is_what_paths_reach(model, position, box):
    found = jax.jit(receptive_field(model, at=rp.last("conv")))(jnp.array(position), IMAGES)
    np.testing.assert_array_equal(found, box)


def test_receptive_field_of_a_unit_behind_a_pool_in_a_network():
    """Two units of conv3 of `vgg_max`, whose boxes are also those of a gradient that is nowhere 0 by chance."""
    params, x = networks.init("vgg_max"), networks.sample("vgg_max")
    planned = rp.plan(networks.vgg_max, None)(params, x)
    layer = next(entry.layer for entry in reversed(list(planned)) if entry.layer.kind == "conv")
    inner = layer.output_shape[1:-1]
    positions = jnp.array([[0, 0], [n - 1 for n in inner]])
    boxes = jax.jit(receptive_field(networks.vgg_max, at=layer.path))(positions, params, x)
    assert boxes.shape == (2, 3, 2)
    for position, box in zip(positions, np.asarray(boxes), strict=True):
        seed = jnp.zeros(layer.output_shape).at[(slice(None), *position)].set(1.0)
        explain = rp.explain(networks.vgg_max, None, conditions=rp.start(layer.path, seed), coefficients=True)
        touched = np.argwhere(np.asarray(explain(params, x)).any((0, 3)))
        for axis in (0, 1):  # a maximum passes one element of a window on, so the gradient reaches no further
            assert box[axis, 0] <= touched[:, axis].min()
            assert touched[:, axis].max() < box[axis, 1]


def test_receptive_field_does_not_depend_on_values():
    """Dead units, weights of 0 by structure, activations that are 0: what is connected is seen, what is not is not."""
    positions = jnp.arange(4)[:, None]

    def signal(w, x):
        dims = ("NWC", "WIO", "NWC")
        return jax.nn.relu(lax.conv_general_dilated(x, w, (1,), "VALID", dimension_numbers=dims) - 100.0)

    x = jnp.ones((1, 6, 1))
    whole = receptive_field(signal, at="activation")(positions, jnp.ones((3, 1, 1)), x)
    np.testing.assert_array_equal(whole[:, 0], [[0, 3], [1, 4], [2, 5], [3, 6]])
    causal = jnp.array([1.0, 1.0, 0.0]).reshape(3, 1, 1)
    np.testing.assert_array_equal(receptive_field(signal, at="conv")(positions, causal, x)[:, 0, 1], [2, 3, 4, 5])


def test_a_dense_layer_sees_everything():
    boxes = receptive_field(lambda w, x: x.mean((1, 2)) @ w, at="dense")
    found = boxes(jnp.zeros((2, 0), int), jnp.ones((1, 3)), IMAGES)
    np.testing.assert_array_equal(found, [[[0, 6], [0, 6], [0, 1]]] * 2)


def test_channels_may_come_first():
    def first(w, x):
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW"))

    x = IMAGES.transpose(0, 3, 1, 2)
    last = references(conv_only, rp.Epsilon(), at="conv", count=3, target=None)(None, W, IMAGES)
    found = references(first, rp.Epsilon(), at="conv", channels=1, count=3, target=None)(None, W, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, last)
    box = receptive_field(first, at="conv", channels=1)(jnp.array([1, 2]), W, x)
    np.testing.assert_array_equal(box, [[0, 1], [1, 4], [2, 5]])


def conv_only(w, x):
    return conv(x, w)


def test_flags_are_static_and_nan_is_no_reference():
    def model(w, train, x):
        return x @ w if train is False else x

    x = jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [0.5, 9.0]])
    found = references(model, None, at="dense", count=2, target=0)(None, jnp.eye(2), False, x)
    np.testing.assert_array_equal(found.activation.example, [[0, 2], [2, 0]])


def test_the_batch_must_be_where_it_is_looked_for():
    with pytest.raises(rp.ArgumentError, match="the batch of the explained input"):
        references(lambda w, x: x.reshape(-1, 1) @ w, None, at="dense", target=None)(
            None, jnp.ones((1, 2)), jnp.ones((3, 4))
        )
    update = references(fn, None, at="conv", count=2, target=None)
    with pytest.raises(rp.ArgumentError, match="Start with None"):
        update(references(fn, None, at="conv", count=3, target=None)(None, W, IMAGES), W, IMAGES)
    with pytest.raises(rp.ArgumentError, match="one array of floats"):
        receptive_field(lambda e, t: e[t].sum(-1), at="activation")(jnp.array([0]), jnp.ones((3, 2)), jnp.ones((1, 2), int))
    with pytest.raises(rp.ArgumentError, match="out of range"):
        receptive_field(fn, at="conv")(jnp.array([0, 9]), W, IMAGES)


def test_positions_must_fit_the_layer():
    with pytest.raises(rp.ArgumentError, match="2 indices of a unit"):
        receptive_field(fn, at="conv")(jnp.array([1]), W, IMAGES)


def test_crops_are_what_the_best_units_see():
    update = references(fn, rp.Epsilon(), at="conv", count=2, target=None)
    found = stream(update, (23,), W)
    boxes = jax.jit(receptive_field(fn, at="conv"))(found.activation.position, W, IMAGES)
    cut = rp.concepts.crops(IMAGES, found.activation, boxes)
    best = jnp.einsum("hwc,hwcf->f", cut[2][0], W)[2]  # the unit's own value, from its crop alone
    layer = rp.relevances(fn, rp.Epsilon(), at="conv")(W, IMAGES)["w"]
    np.testing.assert_allclose(best, layer.value[found.activation.example[2, 0], ..., 2].max(), rtol=1e-12)
    missing = found.activation._replace(example=found.activation.example.at[0, 1].set(-1))
    assert [len(row) for row in rp.concepts.crops(IMAGES, missing, boxes)] == [1, 2, 2, 2]
    with pytest.raises(rp.ArgumentError, match=r"ranking\.position"):
        rp.concepts.crops(IMAGES, found.activation, boxes[0])


# The depth of the decomposition.


def test_relevance_below_a_chosen_depth_is_spread_evenly():
    params, x = networks.init("vgg_max"), networks.sample("vgg_max")
    paths = [e.layer.path for e in rp.plan(networks.vgg_max, None)(params, x) if e.layer.kind == "conv"]
    rules = rp.presets.flat_until(paths[1], rp.presets.epsilon_plus())
    found = {e.layer.path: type(e.rule).__name__ for e in rp.plan(networks.vgg_max, rules)(params, x) if e.layer.path}
    assert [found[path] for path in paths] == ["Flat", "Flat", *["ZPlus"] * (len(paths) - 2)]
    below = {"conv": rp.Flat(), "dense": rp.Epsilon()}
    by_hand = [(rp.path(paths[0]) | rp.path(paths[1]), rp.Flat()), *rp.presets.epsilon_plus()]
    coarse, same, flat = (rp.explain(networks.vgg_max, r, target=0)(params, x) for r in (rules, by_hand, below))
    np.testing.assert_array_equal(coarse, same)
    assert not np.allclose(coarse, flat)
