"""Every rule for affine layers, in every form that an affine layer can take, against reference.py."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax, nn

import relprop as rp

# Layers. Parameters have the rank of the layer's output, so that they need no reshape to broadcast.


class Layer(NamedTuple):
    apply: callable
    shape: tuple[int, ...]
    params: dict[str, tuple[int, ...]]


def _conv(kernel, x, window_strides=None, padding="VALID", **options):
    spatial = "DHW"[5 - x.ndim :]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    strides = window_strides or (1,) * len(spatial)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout, **options)


def _batch_norm(params, x):
    return params["scale"] * (x - params["mean"]) / jnp.sqrt(params["var"] + 1e-5) + params["shift"]


def _channels(rank, features, names=("scale", "mean", "var", "shift")):
    return dict.fromkeys(names, (1,) * (rank - 1) + (features,))


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def matrix_times_vector(params, x):
    return params["kernel"] @ x + params["bias"]


def subtracted(params, x):
    return (params["bias"] - (1 - x) @ params["kernel"]) / params["scale"]


def weights_first(params, x):
    return lax.dot_general(params["kernel"], x, (((1,), (1,)), ((), ()))) + params["bias"]


def heads(params, x):
    return jnp.einsum("bhi,hio->bho", x, params["kernel"]) + params["bias"]


def two_axes(params, x):
    return jnp.einsum("bij,ijo->bo", x, params["kernel"]) + params["bias"]


def inner_axis(params, x):
    return jnp.einsum("oi,bit->bto", params["kernel"], x) + params["bias"]


def conv_1d_strided_dilated(params, x):
    return _conv(params["kernel"], x, (2,), "SAME", rhs_dilation=(2,)) + params["bias"]


def conv_2d_strided(params, x):
    return _conv(params["kernel"], x, (2, 1), ((1, 2), (0, 1))) + params["bias"]


def conv_2d_dilated_grouped(params, x):
    y = _conv(params["kernel"], x, (1, 1), "SAME", rhs_dilation=(2, 1), feature_group_count=2)
    return y + params["bias"]


def conv_2d_depthwise(params, x):
    return _conv(params["kernel"], x, feature_group_count=3) + params["bias"]


def conv_2d_channels_first(params, x):
    return lax.conv(x, params["kernel"], (1, 1), "SAME") + params["bias"]


def conv_3d(params, x):
    return _conv(params["kernel"], x, (1, 2, 1), "SAME") + params["bias"]


def conv_transposed(params, x):
    return lax.conv_transpose(x, params["kernel"], (2, 2), "SAME") + params["bias"]


def batch_norm_after(params, x):
    return _batch_norm(params, _conv(params["kernel"], x, (1, 1), "SAME") + params["bias"])


def batch_norm_before(params, x):
    return _batch_norm(params, x) @ params["kernel"] + params["bias"]


def batch_norm_before_padding(params, x):
    return _conv(params["kernel"], _batch_norm(params, x), (1, 1), "SAME")


def input_normalisation(params, x):
    return _conv(params["kernel"], (x / 2 - params["mean"]) / params["var"], (2, 2), "SAME") + params["bias"]


def factor_per_position_before(params, x):
    """This factor cannot be folded into the kernel."""
    return _conv(params["kernel"], params["mask"] * x, (1, 1), "SAME") + params["bias"]


def factor_per_position_after(params, x):
    """Nor can this one."""
    return params["mask"] * _conv(params["kernel"], x, (1, 1), "SAME") + params["bias"]


LAYERS = {
    layer.apply.__name__: layer
    for layer in (
        Layer(dense, (3, 5), {"kernel": (5, 4), "bias": (1, 4)}),
        Layer(matrix_times_vector, (5,), {"kernel": (4, 5), "bias": (4,)}),
        Layer(subtracted, (3, 5), {"kernel": (5, 4), "bias": (1, 4), "scale": (1, 4)}),
        Layer(weights_first, (3, 5), {"kernel": (4, 5), "bias": (4, 1)}),
        Layer(heads, (2, 3, 4), {"kernel": (3, 4, 2), "bias": (1, 3, 2)}),
        Layer(two_axes, (2, 3, 4), {"kernel": (3, 4, 5), "bias": (1, 5)}),
        Layer(inner_axis, (2, 3, 4), {"kernel": (5, 3), "bias": (1, 1, 5)}),
        Layer(conv_1d_strided_dilated, (2, 9, 3), {"kernel": (3, 3, 4), "bias": (1, 1, 4)}),
        Layer(conv_2d_strided, (2, 5, 4, 3), {"kernel": (3, 2, 3, 4), "bias": (1, 1, 1, 4)}),
        Layer(conv_2d_dilated_grouped, (2, 5, 4, 4), {"kernel": (3, 3, 2, 6), "bias": (1, 1, 1, 6)}),
        Layer(conv_2d_depthwise, (2, 4, 4, 3), {"kernel": (3, 3, 1, 6), "bias": (1, 1, 1, 6)}),
        Layer(conv_2d_channels_first, (2, 3, 4, 4), {"kernel": (4, 3, 3, 3), "bias": (1, 4, 1, 1)}),
        Layer(conv_3d, (1, 3, 4, 3, 2), {"kernel": (2, 3, 2, 2, 3), "bias": (1, 1, 1, 1, 3)}),
        Layer(conv_transposed, (2, 3, 3, 2), {"kernel": (3, 3, 2, 3), "bias": (1, 1, 1, 3)}),
        Layer(batch_norm_after, (2, 4, 3, 2), {"kernel": (3, 3, 2, 3), "bias": (1, 1, 1, 3), **_channels(4, 3)}),
        Layer(batch_norm_before, (3, 5), {"kernel": (5, 4), "bias": (1, 4), **_channels(2, 5)}),
        Layer(batch_norm_before_padding, (2, 4, 3, 2), {"kernel": (3, 3, 2, 3), **_channels(4, 2)}),
        Layer(
            input_normalisation,
            (2, 5, 4, 3),
            {"kernel": (3, 3, 3, 4), "bias": (1, 1, 1, 4), **_channels(4, 3, ("mean", "var"))},
        ),
        Layer(
            factor_per_position_before,
            (2, 4, 3, 2),
            {"kernel": (3, 3, 2, 3), "bias": (1, 1, 1, 3), "mask": (1, 4, 3, 1)},
        ),
        Layer(
            factor_per_position_after,
            (2, 4, 3, 2),
            {"kernel": (3, 3, 2, 3), "bias": (1, 1, 1, 3), "mask": (1, 4, 3, 1)},
        ),
    )
}


def draw(layer, seed=0):
    """Parameters of both signs (variances positive), and two inputs: a signed and a non-negative one."""
    rng = np.random.default_rng([list(LAYERS).index(layer.apply.__name__), seed])
    params = {name: rng.normal(size=shape) for name, shape in layer.params.items()}
    if "var" in params:
        params["var"] = 0.5 + params["var"] ** 2
    x = rng.normal(size=layer.shape)
    return params, {"signed": x, "non-negative": np.maximum(x, 0)}


def materialise(layer, params):
    """The layer for the reference; its connections from itself with every weight 1 and no shift."""
    ones = {k: np.full(v.shape, 0.0 if k in ("bias", "mean", "shift") else 1.0) for k, v in params.items()}
    apply = layer.apply
    if apply is subtracted:  # it has a shift that is no parameter
        return reference.materialise(functools.partial(apply, params), layer.shape, functools.partial(dense, ones))
    return reference.materialise(functools.partial(apply, params), layer.shape, functools.partial(apply, ones))


# Rules: each with what the reference has to say.

LOW, HIGH = -3.5, 4.0


def proportional_rules(bias):
    """The rules that hand relevance on in proportion to the input."""
    options = {
        "zero": (rp.Zero, {}),
        "epsilon": (rp.Epsilon, {"epsilon": 0.1}),
        "gamma": (rp.Gamma, {"gamma": 0.7, "epsilon": 1e-3}),
        "alphabeta": (rp.AlphaBeta, {"alpha": 1.5, "beta": 0.5, "epsilon": 1e-3}),
        "zplus": (rp.ZPlus, {"epsilon": 1e-3}),
    }
    return {
        f"{name} {bias}": (rule(**o, bias=bias), functools.partial(getattr(reference, name), **o, bias=bias))
        for name, (rule, o) in options.items()
    }


RULES = proportional_rules("absorb") | {
    "wsquare": (rp.WSquare(), reference.wsquare),
    "flat": (rp.Flat(), reference.flat),
    "zbox": (rp.ZBox(LOW, HIGH), functools.partial(reference.zbox, low=LOW, high=HIGH)),
}
BIAS_RULES = proportional_rules("ignore") | proportional_rules("distribute")


def explain_by(rules, function, params, inputs):
    """For each input its name, the output and the relevance by each rule, compiled together."""

    @jax.jit
    def explain(params, x):
        return function(params, x), {n: rp.explain(function, rule)(params, x) for n, (rule, _) in rules.items()}

    return [(name, x, *explain(params, x)) for name, x in inputs.items()]


def difference(relevance, expected):
    """The largest difference, relative to the largest relevance."""
    assert relevance.shape == expected.shape
    return float(np.abs(relevance - expected).max() / np.abs(expected).max())


def differences(rules, matrix, explained):
    """Where relprop is further than 1e-10 from the reference: {(rule, input): how far}."""
    found = {}
    for name, x, output, relevances in explained:
        for rule, (_, reference_rule) in rules.items():
            found[rule, name] = difference(relevances[rule], reference_rule(matrix, x, output))
    return {case: far for case, far in found.items() if not far < 1e-10}


@pytest.mark.parametrize("layer", LAYERS)
def test_rules(layer):
    layer = LAYERS[layer]
    params, inputs = draw(layer)
    matrix = materialise(layer, params)
    explained = explain_by(RULES, layer.apply, params, inputs)
    for _, x, output, _ in explained:
        assert difference(matrix(x), np.ravel(output)) < 1e-12
    assert differences(RULES, matrix, explained) == {}


@pytest.mark.parametrize(
    "layer",
    ["dense", "inner_axis", "conv_1d_strided_dilated", "batch_norm_before"],
)
def test_treatments_of_the_bias(layer):
    layer = LAYERS[layer]
    params, inputs = draw(layer)
    explained = explain_by(BIAS_RULES, layer.apply, params, inputs)
    assert differences(BIAS_RULES, materialise(layer, params), explained) == {}
    for _, _, output, relevances in explained:
        for rule, relevance in relevances.items():
            if "distribute" in rule:  # nothing is absorbed
                np.testing.assert_allclose(relevance.sum(), output.sum(), rtol=1e-10, err_msg=rule)


# What relprop knows of signs must not change a relevance.

SURROUNDINGS = {
    "after relu": lambda apply: lambda params, x: apply(params, nn.relu(x)),
    "before relu": lambda apply: lambda params, x: nn.relu(apply(params, x)),
    "between relus": lambda apply: lambda params, x: nn.relu(apply(params, nn.relu(x))),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("layer", ["dense", "conv_1d_strided_dilated", "batch_norm_before", "factor_per_position_before"])
def test_known_signs_do_not_matter(layer, surroundings):
    layer = LAYERS[layer]
    params, inputs = draw(layer)
    inputs = {"non-negative": inputs["non-negative"]}
    rules = RULES | {"alphabeta ignore": BIAS_RULES["alphabeta ignore"]}
    explained = explain_by(rules, SURROUNDINGS[surroundings](layer.apply), params, inputs)
    assert differences(rules, materialise(layer, params), explained) == {}


# Bounds of z^B, one by one.


@pytest.mark.parametrize("shape", [(), (3,), (1, 5, 4, 3)], ids=["scalar", "per_channel", "per_element"])
def test_bounds_broadcast_to_the_input(shape):
    layer = LAYERS["input_normalisation"]
    params, inputs = draw(layer)
    x = inputs["signed"]
    rng = np.random.default_rng(1)
    low, high = -3.5 - rng.random(shape), 3.5 + rng.random(shape)
    relevance = rp.explain(layer.apply, rp.ZBox(low, high))(params, x)
    expected = reference.zbox(materialise(layer, params), x, layer.apply(params, x), low, high)
    assert difference(relevance, expected) < 1e-10


# Whole networks: what relprop propagates as coefficients is what the reference propagates as relevance.


def _network(rng, rule):
    """A small network with layers of every kind that the reference knows; affine ones take `rule`."""

    def conv(inputs, outputs, bias, **options):
        kernel = rng.normal(size=(3, 3, inputs, outputs)) / 3
        bias = bias * rng.normal(size=(1, 1, 1, outputs))
        return "affine", lambda x: _conv(kernel, x, padding="SAME", **options) + bias, rule

    def max_pool(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def average_pool(x):
        return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4

    kernel = rng.normal(size=(12, 4))
    relu = ("activation", nn.relu, reference.identity)
    return [
        conv(2, 3, 0.3),
        ("activation", nn.gelu, reference.identity),
        ("max_pool", max_pool, reference.winner),
        ("residual", [conv(3, 3, 0.0), relu, conv(3, 3, 0.3)], reference.add_zero),
        relu,
        ("affine", average_pool, reference.zero),
        ("affine", lambda x: x.reshape(x.shape[0], -1) @ kernel, rule),
    ]


def _apply(layers, x):
    for kind, function, _ in layers:
        x = x + _apply(function, x) if kind == "residual" else function(x)
    return x


@pytest.mark.parametrize("name", proportional_rules("absorb"))
def test_network_is_the_chain_of_its_layers(name):
    rule, reference_rule = RULES[name]
    layers = _network(np.random.default_rng(0), reference_rule)
    x = np.random.default_rng(1).normal(size=(1, 8, 8, 2))
    relevance = jax.jit(rp.explain(lambda x: _apply(layers, x), rule))(x)
    assert difference(relevance, reference.propagate(layers, x)) < 1e-10


@pytest.mark.parametrize(
    ("kind", "place", "rule", "reference_rule"),
    [
        ("add", 3, rp.Norm(epsilon=0.1), functools.partial(reference.add_norm, epsilon=0.1)),
        ("add", 3, rp.ResidualGamma(0.5), functools.partial(reference.add_gamma, gamma=0.5)),
        ("sum_pool", 5, rp.Norm(epsilon=0.1), functools.partial(reference.epsilon, epsilon=0.1)),
    ],
    ids=["residual norm", "residual gamma", "average pooling norm"],
)
def test_rule_of_a_place_without_weights(kind, place, rule, reference_rule):
    layers = _network(np.random.default_rng(0), reference.epsilon)
    layers[place] = (*layers[place][:2], reference_rule)
    x = np.random.default_rng(1).normal(size=(1, 8, 8, 2))
    rules = [(kind, rule), ("affine", rp.Epsilon(1e-6))]
    relevance = jax.jit(rp.explain(lambda x: _apply(layers, x), rules))(x)
    assert difference(relevance, reference.propagate(layers, x)) < 1e-10


def test_proportional_max_pooling():
    def pool(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    x = np.random.default_rng(0).random((2, 4, 6, 3))
    relevance = rp.explain(pool, [("max_pool", rp.ProportionalPool(epsilon=0.0))])(x)
    layers = [("max_pool", pool, reference.proportional)]
    assert difference(relevance, reference.propagate(layers, x)) < 1e-10


@pytest.mark.parametrize("activation", [jnp.tanh, nn.silu, nn.softplus, nn.sigmoid, jnp.cos, nn.leaky_relu])
def test_activations_pass_relevance_but_for_the_share_of_their_value_at_0(activation):
    x = np.random.default_rng(0).normal(size=(3, 7))
    relevance = rp.explain(activation, [])(x)
    assert difference(relevance, reference.identity(activation, x, activation(x))) < 1e-10


@pytest.mark.parametrize("size", [4, 1])
def test_pass(size):
    kernel = np.random.default_rng(0).normal(size=(4, 4))
    x = np.random.default_rng(1).normal(size=(size, 4))
    relevance = rp.explain(lambda x: x @ kernel + 1.0, rp.Pass())(x)
    assert difference(relevance, reference.pass_on(None, x, x @ kernel + 1)) < 1e-10
