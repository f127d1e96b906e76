"""Laws that relevance obeys whatever the network: values worked out by hand, identities, invariances."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax, nn

import relprop as rp


def assert_close(relevance, expected, tolerance=1e-10):
    """Trees equal to within `tolerance` of the largest element of each array."""
    assert jax.tree.structure(relevance) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(relevance), jax.tree.leaves(expected), strict=True):
        assert jnp.shape(got) == jnp.shape(want)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def without_biases(params):
    return jax.tree.map_with_path(lambda path, p: p * 0 if path[-1].key == "bias" else p, params)


def of_target(target):
    """The relevance of a single class, as it is given to the pullback of `rp.vjp`."""
    return lambda y: y * nn.one_hot(jnp.array([target]), y.shape[-1], dtype=y.dtype)


# Worked out by hand: a network of two layers with small integers.
#
#     x = (1, 2)    z1 = (1 + 2*2, -1 + 2 + 1) = (5, 2)    y = 2*5 - 2 = 8
#
# The contributions to the output are (10, -2); to the hidden units (1, 4) and (-1, 2) with a bias of 1.

TWO_LAYERS = {
    "hidden": {"kernel": np.array([[1.0, -1.0], [2.0, 1.0]]), "bias": np.array([[0.0, 1.0]])},
    "output": {"kernel": np.array([[2.0], [-1.0]])},
}
TINY = 1e-15  # a stabiliser that is not there


def two_layers(params, x):
    x = nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return x @ params["output"]["kernel"]


def below(rule):
    """The rule in the hidden layer, LRP-0 in the output layer."""
    return [(rp.first("dense"), rule), ("dense", rp.Zero())]


# (rules of relprop, rule of the reference in the hidden layer, in the output layer, relevance)
BY_HAND = {
    # 10 (1, 4)/5 - 2 (-1, 2)/2
    "zero": (rp.Zero(), reference.zero, reference.zero, ("3", "6")),
    # Output: (10, -2) 8/9. Hidden: 80/9 (1, 4)/6 - 16/9 (-1, 2)/3
    "epsilon 1": (
        rp.Epsilon(1.0),
        functools.partial(reference.epsilon, epsilon=1.0),
        functools.partial(reference.epsilon, epsilon=1.0),
        ("56/27", "128/27"),
    ),
    # Output: (20, -2) 8/18. Hidden: 80/9 (2, 8)/10 - 8/9 (-1, 4)/(-1 + 4 + 2)
    "gamma 1": (
        rp.Gamma(1.0, epsilon=TINY),
        functools.partial(reference.gamma, gamma=1.0, epsilon=TINY),
        functools.partial(reference.gamma, gamma=1.0, epsilon=TINY),
        ("88/45", "32/5"),
    ),
    # Output: (8, 0). Hidden: 8 (1, 4)/5
    "zplus": (
        rp.ZPlus(epsilon=TINY),
        functools.partial(reference.zplus, epsilon=TINY),
        functools.partial(reference.zplus, epsilon=TINY),
        ("8/5", "32/5"),
    ),
    # Output: (16, -8). Hidden: 2 * 16 (1, 4)/5 - 2 * 8 (0, 2)/(2 + 1) + 8 (1, 0)/1
    "alpha 2, beta 1": (
        rp.AlphaBeta(2.0, 1.0, epsilon=TINY),
        functools.partial(reference.alphabeta, epsilon=TINY),
        functools.partial(reference.alphabeta, epsilon=TINY),
        ("72/5", "224/15"),
    ),
    # 10 (1, 1)/2 - 2 (1, 1)/2
    "flat": (below(rp.Flat()), reference.flat, reference.zero, ("4", "4")),
    # 10 (1, 4)/5 - 2 (1, 1)/2
    "w squared": (below(rp.WSquare()), reference.wsquare, reference.zero, ("1", "7")),
    # 10 (1, 4)/5 - 2 (4 - 1, 2)/5
    "z box 0..4": (
        below(rp.ZBox(0.0, 4.0, epsilon=TINY)),
        functools.partial(reference.zbox, low=0.0, high=4.0, epsilon=0.0),
        reference.zero,
        ("4/5", "36/5"),
    ),
    # 10 (1, 4)/5 - 2 (-1, 2)/1
    "bias ignored": (
        rp.Zero(bias="ignore"),
        functools.partial(reference.zero, bias="ignore"),
        reference.zero,
        ("4", "4"),
    ),
    # 10 (1, 4)/5 - 2 (-1 + 1/2, 2 + 1/2)/2
    "bias distributed": (
        rp.Zero(bias="distribute"),
        functools.partial(reference.zero, bias="distribute"),
        reference.zero,
        ("5/2", "11/2"),
    ),
}


def fractions(*values):
    return np.array([[float(Fraction(value)) for value in values]])


@pytest.mark.parametrize("case", BY_HAND)
def test_two_layers_by_hand(case):
    rules, hidden_rule, output_rule, expected = BY_HAND[case]
    x = np.array([[1.0, 2.0]])
    assert_close(rp.explain(two_layers, rules)(TWO_LAYERS, x), fractions(*expected), 1e-13)
    layers = [
        ("affine", lambda x: x @ TWO_LAYERS["hidden"]["kernel"] + TWO_LAYERS["hidden"]["bias"], hidden_rule),
        ("activation", nn.relu, reference.identity),
        ("affine", lambda x: x @ TWO_LAYERS["output"]["kernel"], output_rule),
    ]
    assert_close(reference.propagate(layers, x), fractions(*expected), 1e-13)


# Worked out by hand in the tests of RelevancePropagation.jl.

JULIA = {"kernel": np.array([[3.0, 5.0], [4.0, 6.0]]), "bias": np.array([[7.0, 8.0]])}


def julia_dense(params, x):
    return nn.relu(x @ params["kernel"] + params["bias"])


def test_dense_layer_by_hand():
    # z = (3 + 8 + 7, 5 + 12 + 8) = (18, 25); R1 = 3/18/3 + 5/25*2/3, R2 = 8/18/3 + 12/25*2/3
    _, pullback = rp.vjp(julia_dense, rp.Zero(), JULIA, np.array([[1.0, 2.0]]))
    assert_close(pullback(fractions("1/3", "2/3")), fractions("17/90", "316/675"), 1e-13)


@pytest.mark.parametrize(
    ("relevance", "expected"),
    [
        # 1/19 (1, 0) for the skip, 18/19 (3, 8)/18 for the layer
        (("1", "0"), ("4/19", "8/19")),
        # 2/27 (0, 1) for the skip, 25/27 (5, 12)/25 for the layer
        (("0", "1"), ("5/27", "14/27")),
    ],
)
def test_skip_connection_by_hand(relevance, expected):
    def skip(params, x):
        return x + julia_dense(params, x)

    _, pullback = rp.vjp(skip, rp.Zero(), JULIA, np.array([[1.0, 2.0]]))
    assert_close(pullback(fractions(*relevance)), fractions(*expected), 1e-13)


def test_max_pooling_by_hand():
    def pool(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID")

    x = np.array([[1.0, 2, 3], [10, 5, 6], [7, 8, 9]])
    _, pullback = rp.vjp(pool, [], x)
    relevance = pullback(np.array([[1.0, 2], [3, 4]]) / 30)
    # 10 wins the two windows on the left
    assert_close(relevance, np.array([[0.0, 0, 0], [1 + 3, 0, 2], [0, 0, 4]]) / 30, 1e-13)


@pytest.mark.parametrize(("alpha", "beta", "expected"), [(1.0, 0.0, ("-1", "0")), (2.0, 1.0, ("-2", "1/2"))])
def test_alpha_beta_by_hand(alpha, beta, expected):
    def layer(x):
        return x @ np.array([[1.0], [-1.0]]) - 1

    # z = 1 - 1 - 1 = -1: all that is positive is from the first input, half of the negative from the bias
    relevance = rp.explain(layer, rp.AlphaBeta(alpha, beta, epsilon=TINY))(np.ones((1, 2)))
    assert_close(relevance, fractions(*expected), 1e-13)


# Identities between rules.

RELU_NETWORKS = ("conv_mixed_2d", "conv_1d", "vgg_max")


@pytest.mark.parametrize("name", RELU_NETWORKS)
def test_epsilon_0_and_zero_are_input_times_gradient(name):
    network = networks.NETWORKS[name]
    params, x = without_biases(networks.init(name)), networks.sample(name)

    def compare(params, x):
        relevance = {rule: rp.explain(network, rule)(params, x) for rule in (rp.Zero(), rp.Epsilon(0.0))}
        gradient = jax.grad(lambda x: network(params, x).sum())(x)
        return relevance[rp.Zero()], relevance[rp.Epsilon(0.0)], x * gradient, network(params, x).sum()

    zero, epsilon, input_times_gradient, output = jax.jit(compare)(params, x)
    assert_close(zero, input_times_gradient)
    assert_close(epsilon, input_times_gradient)
    np.testing.assert_allclose(zero.sum(), output, rtol=1e-10)


def explain_by(name, *rules):
    """The relevances of a synthetic network by several rules, compiled together."""
    network = networks.NETWORKS[name]
    explain = jax.jit(lambda params, x: [rp.explain(network, rule)(params, x) for rule in rules])
    return explain(networks.init(name), networks.sample(name))


@pytest.mark.parametrize("name", ["conv_mixed_2d", "dense_tanh"])
def test_gamma_0_is_epsilon(name):
    gamma, epsilon = explain_by(name, rp.Gamma(0.0, epsilon=1e-3), rp.Epsilon(1e-3))
    assert_close(gamma, epsilon)


@pytest.mark.parametrize("name", ["conv_mixed_2d", "dense_tanh"])
def test_zplus_is_alpha_1_beta_0(name):
    zplus, alphabeta = explain_by(name, rp.ZPlus(epsilon=1e-3), rp.AlphaBeta(1.0, 0.0, epsilon=1e-3))
    assert_close(zplus, alphabeta)


def test_large_gamma_approaches_zplus():
    """Where outputs are rectified: of a negative output, gamma raises the negative part instead."""

    def under(rule):
        return [(rp.last("dense"), rp.Epsilon(1e-6)), ("affine", rule)]

    expected, *relevances = explain_by(
        "conv_1d", under(rp.ZPlus(epsilon=0.0)), *(under(rp.Gamma(g, epsilon=0.0)) for g in (1e3, 1e6, 1e9))
    )
    errors = [np.abs(r - expected).max() / np.abs(expected).max() for r in relevances]
    assert errors[0] < 0.1
    assert errors[1] < 1.5e-3 * errors[0]
    assert errors[2] < 1.5e-3 * errors[1]


# Invariances: things that may be done to a network, or to its explanation, and change nothing.

RULES = {
    "epsilon": rp.Epsilon(1e-3),
    "gamma": rp.Gamma(0.5),
    "alphabeta": rp.AlphaBeta(2.0, 1.0),
    "zplus": rp.ZPlus(bias="ignore"),
    "flat": [(rp.first("affine"), rp.Flat()), ("affine", rp.Epsilon(1e-3))],
    "zbox": [(rp.first("affine"), rp.ZBox(-1.0, 1.0)), ("affine", rp.Gamma(0.25))],
}
every_rule = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)

KERNELS = np.random.default_rng(0).normal(size=(4, 6, 6)) / 2
BIASES = np.random.default_rng(1).normal(size=(4, 1, 6)) / 4
VECTORS = np.random.default_rng(2).uniform(-1, 1, size=(5, 6))


def chain(params, x):
    """Three hidden layers and an output layer, all of the same shape."""
    kernels, biases = params
    for i in range(3):
        x = nn.relu(x @ kernels[i] + biases[i])
    return x @ kernels[3] + biases[3]


@functools.cache
def chain_relevance(name):
    return rp.explain(chain, RULES[name])((KERNELS, BIASES), VECTORS)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        jax.checkpoint,
        # one example at a time
        lambda explain: jax.vmap(lambda params, x: explain(params, x[None])[0], (None, 0)),
        # the examples in two parts
        lambda explain: lambda params, x: jnp.concatenate([explain(params, x[:2]), explain(params, x[2:])]),
    ],
    ids=["jit", "checkpoint", "vmap", "split"],
)
def test_explanation_commutes_with(transform, name):
    explain = transform(rp.explain(chain, RULES[name]))
    assert_close(explain((KERNELS, BIASES), VECTORS), chain_relevance(name))


def checkpointed(params, x):
    kernels, biases = params
    for i in range(3):
        x = jax.checkpoint(lambda kernel, bias, x: nn.relu(x @ kernel + bias))(kernels[i], biases[i], x)
    return x @ kernels[3] + biases[3]


def scanned(params, x):
    kernels, biases = params

    def layer(x, params):
        kernel, bias = params
        return nn.relu(x @ kernel + bias), None

    x, _ = lax.scan(layer, x, (kernels[:3], biases[:3]))
    return x @ kernels[3] + biases[3]


def jitted(params, x):
    return jax.jit(chain)(params, x)


def vmapped(params, x):
    return jax.vmap(lambda x: chain(params, x[None])[0])(x)


def split(params, x):
    return jnp.concatenate([chain(params, x[:2]), chain(params, x[2:])])


def with_reshapes(params, x):
    kernels, biases = params
    x = x.reshape(5, 2, 3).reshape(5, 6)
    for i in range(3):
        x = (x @ kernels[i])[:, None].squeeze(1) + biases[i]
        x = nn.relu(x.reshape(5, 3, 2).transpose(1, 0, 2)).transpose(1, 0, 2).reshape(5, 6)
    return (x @ kernels[3] + biases[3])[:, None, :].reshape(5, 6)


def with_identities(params, x):
    kernels, biases = params
    for i in range(3):
        x = nn.relu(0.0 + 1.0 * (x @ kernels[i] + biases[i])) * 1.0
        x = jnp.where(True, x, 0.0)
    return 0.0 - (0.0 - (x @ kernels[3] + biases[3]))


def with_rescaled_weights(params, x):
    kernels, biases = params
    for i in range(3):
        x = nn.relu((x @ (4 * kernels[i])) / 4 + biases[i])
    return x @ kernels[3] + biases[3]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "variant",
    [
        checkpointed,
        jitted,
        vmapped,
        split,
        with_reshapes,
        with_identities,
        with_rescaled_weights,
        scanned,
    ],
)
def test_network_may_be_written_as(variant, name):
    if variant is split and name in ("flat", "zbox"):
        pytest.skip("the first affine layer is then that of the first part alone")
    if variant is scanned and name in ("flat", "zbox"):
        pytest.skip("the first affine layer is then every layer of the loop")
    assert_close(variant((KERNELS, BIASES), VECTORS), chain((KERNELS, BIASES), VECTORS), 1e-13)
    assert_close(rp.explain(variant, RULES[name])((KERNELS, BIASES), VECTORS), chain_relevance(name))


# Batch norm, written out in the network or folded into the weights by hand.


def _norm_params(features):
    rng = np.random.default_rng(3)
    scale, mean, shift = rng.normal(size=(3, 1, 1, 1, features))
    return {"scale": scale, "mean": mean, "shift": shift, "var": 0.5 + rng.random((1, 1, 1, features))}


def _conv(kernel, x):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _head(params, x):
    return nn.relu(x).mean((1, 2)) @ params["head"]


def batch_norm_written_out(params, x):
    bn = params["bn"]
    y = _conv(params["kernel"], x)
    y = bn["scale"] * (y - bn["mean"]) / jnp.sqrt(bn["var"] + 1e-5) + bn["shift"]
    return _head(params, y)


def batch_norm_folded(params, x):
    bn = params["bn"]
    factor = bn["scale"] / jnp.sqrt(bn["var"] + 1e-5)
    return _head(params, _conv(params["kernel"] * factor, x) + (bn["shift"] - factor * bn["mean"]))


@every_rule
def test_batch_norm_may_be_folded(rules):
    rng = np.random.default_rng(4)
    params = {"kernel": rng.normal(size=(3, 3, 2, 4)), "bn": _norm_params(4), "head": rng.normal(size=(4, 3))}
    x = rng.uniform(-1, 1, size=(2, 5, 4, 2))
    written_out, folded = (rp.explain(f, rules)(params, x) for f in (batch_norm_written_out, batch_norm_folded))
    assert_close(written_out, folded)


# Activations, called from jax.nn or written out.

ACTIVATIONS = {
    "relu": (
        nn.relu,
        lambda x: jnp.maximum(x, 0.0),
        lambda x: jnp.where(x > 0, x, 0.0),
        lambda x: (x + abs(x)) / 2,
    ),
    "leaky_relu": (
        nn.leaky_relu,
        lambda x: jnp.where(x >= 0, x, 0.01 * x),
        lambda x: jnp.maximum(x, 0.01 * x),
    ),
    "silu": (nn.silu, lambda x: x * nn.sigmoid(x), lambda x: x / (1 + jnp.exp(-x))),
    "gelu": (
        lambda x: nn.gelu(x, approximate=False),
        lambda x: 0.5 * x * (1 + lax.erf(x / np.sqrt(2))),
        lambda x: x * jax.scipy.stats.norm.cdf(x),
    ),
    "gelu_tanh": (
        nn.gelu,
        lambda x: x * 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x))),
        lambda x: x * nn.sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)),
    ),
    "softplus": (nn.softplus, lambda x: jnp.log1p(jnp.exp(x)), lambda x: jnp.logaddexp(x, 0.0)),
    "tanh": (jnp.tanh, lambda x: (jnp.exp(x) - jnp.exp(-x)) / (jnp.exp(x) + jnp.exp(-x))),
    "mish": (nn.mish, lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x)))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_may_be_written_out(name):
    def network(activation):
        return lambda params, x: activation(x @ params[0]) @ params[1]

    by_name, *by_hand = (
        rp.explain(network(activation), rp.Epsilon(1e-3))(KERNELS[:2], VECTORS) for activation in ACTIVATIONS[name]
    )
    for relevance in by_hand:
        assert_close(relevance, by_name)


def normalised(e):
    return e / e.sum(-1, keepdims=True)


SOFTMAXES = {
    "jax.nn": nn.softmax,
    "shifted": lambda x: normalised(jnp.exp(x - x.max(-1, keepdims=True))),
    "stopped": lambda x: normalised(jnp.exp(x - lax.stop_gradient(x.max(-1, keepdims=True)))),
    "unshifted": lambda x: normalised(jnp.exp(x)),
    "exp written twice": lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True),
}


@pytest.mark.parametrize("name", list(SOFTMAXES)[1:])
def test_softmax_may_be_written_out(name):
    def attention(softmax):
        def network(params, x):
            query, key, value = (x @ kernel for kernel in params[:3])
            return softmax(query @ key.T / 2) @ value @ params[3]

        return network

    by_name, by_hand = (
        rp.explain(attention(SOFTMAXES[which]), rp.Epsilon(1e-3))(KERNELS, VECTORS) for which in ("jax.nn", name)
    )
    assert_close(by_hand, by_name)


@pytest.mark.parametrize("product", [lambda a, b, c: (a * b) * c, lambda a, b, c: a * (b * c), lambda a, b, c: c * (b * a)])
def test_products_may_be_reordered(product):
    """Three factors receive a third each, whatever is multiplied first."""

    def network(params, x):
        return product(*(x @ kernel for kernel in params[:3]))

    relevance = rp.explain(network, rp.Zero())(KERNELS, VECTORS)
    gradient = jax.grad(lambda x: network(KERNELS, x).sum())(VECTORS)
    assert_close(relevance, VECTORS * gradient / 3)


# Relevance is linear in the relevance of the output.


@every_rule
def test_linear_in_the_output_relevance(rules):
    value, pullback = rp.vjp(chain, rules, (KERNELS, BIASES), VECTORS)
    first, second = np.random.default_rng(5).normal(size=(2, *value.shape))
    assert_close(value, chain((KERNELS, BIASES), VECTORS), 1e-13)
    assert_close(pullback(2 * first - 3 * second), 2 * pullback(first) - 3 * pullback(second))


@every_rule
def test_pullback_of_the_output_is_the_explanation(rules):
    value, pullback = rp.vjp(chain, rules, (KERNELS, BIASES), VECTORS)
    assert_close(pullback(value), rp.explain(chain, rules)((KERNELS, BIASES), VECTORS))


# Precision.


@pytest.mark.parametrize("name", ["conv_1d", "dense_tanh"])
@pytest.mark.parametrize("rules", [rp.Epsilon(1e-2), rp.ZPlus(), rp.Gamma(0.25)], ids=["epsilon", "zplus", "gamma"])
def test_single_precision(name, rules):
    explain = jax.jit(rp.explain(networks.NETWORKS[name], rules, target=0))
    double = networks.init(name), networks.sample(name)
    single = jax.tree.map(lambda a: a.astype(np.float32), double)
    relevance = explain(*single)
    assert relevance.dtype == np.float32
    assert_close(np.float64(relevance), explain(*double), 1e-5)


# Many explanations at once.


@every_rule
def test_targets_by_vmap_are_a_loop(rules):
    params = (KERNELS, BIASES)

    def explain(target):
        return rp.explain(chain, rules, target=target)(params, VECTORS)

    assert_close(jax.vmap(explain)(jnp.arange(6)), jnp.stack([explain(target) for target in range(6)]))


@every_rule
def test_targets_by_vmap_of_the_pullback(rules):
    value, pullback = rp.vjp(chain, rules, (KERNELS, BIASES), VECTORS)
    relevances = jnp.stack([of_target(target)(value) for target in range(6)])
    assert_close(jax.vmap(pullback)(relevances), jnp.stack([pullback(r) for r in relevances]))
    # The classes' relevances sum to that of the whole output.
    assert_close(jax.vmap(pullback)(relevances).sum(0), pullback(value))


@pytest.mark.parametrize(
    "rule",
    [rp.Gamma, rp.Epsilon, lambda beta: rp.AlphaBeta(1 + beta, beta), lambda high: rp.ZBox(-1.0, high)],
    ids=["gamma", "epsilon", "alphabeta", "zbox"],
)
def test_hyperparameters_may_be_swept_by_vmap(rule):
    values = jnp.array([0.1, 0.5, 2.0])

    def explain(value):
        return rp.explain(chain, [(rp.first("dense"), rule(value)), ("dense", rp.Zero())])((KERNELS, BIASES), VECTORS)

    assert_close(jax.jit(jax.vmap(explain))(values), jnp.stack([explain(float(v)) for v in values]))


# Derivatives of explanations.

DIFFERENTIATED = {
    "epsilon": rp.Epsilon(0.1),
    "gamma": rp.Gamma(0.5, epsilon=1e-3),
    "alphabeta": rp.AlphaBeta(2.0, 1.0, epsilon=1e-2),
    "zplus": rp.ZPlus(epsilon=1e-2, bias="ignore"),
    "distribute": rp.Epsilon(0.1, bias="distribute"),
    "wsquare": below(rp.WSquare()),
    "zbox": below(rp.ZBox(-1.5, 1.5)),
}


def smooth_chain(params, x):
    """Curved activations, so that every second derivative takes part, and a product."""
    kernels, biases = params
    x = nn.silu(x @ kernels[0] + biases[0])
    x = nn.gelu(x @ kernels[1] + biases[1]) * nn.sigmoid(x @ kernels[2])
    return x @ kernels[3] + biases[3]


def difference_quotient(function, point, direction, step=1e-5):
    """The directional derivative of a function to a number, by central differences of fourth order."""

    def at(factor):
        return function(jax.tree.map(lambda p, d: p + factor * step * d, point, direction))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def random_like(seed, tree):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=np.shape(leaf)), tree)


@pytest.mark.parametrize(
    ("network", "name"),
    [*((smooth_chain, name) for name in DIFFERENTIATED), (chain, "gamma"), (chain, "alphabeta")],
)
def test_gradient_of_the_explanation(network, name):
    point = (KERNELS, BIASES), VECTORS
    weight = random_like(6, VECTORS)
    explain = rp.explain(network, DIFFERENTIATED[name], target=1)

    @jax.jit
    def objective(point):
        return (weight * explain(*point)).sum()

    gradient = jax.jit(jax.grad(objective))(point)
    for seed in range(2):
        direction = random_like(seed, point)
        for part in range(2):  # by the parameters alone, by the input alone
            only = tuple(d if i == part else jax.tree.map(np.zeros_like, d) for i, d in enumerate(direction))
            slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, only)))
            np.testing.assert_allclose(slope, difference_quotient(objective, point, only), rtol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [rp.Gamma, rp.Epsilon, lambda beta: rp.AlphaBeta(1 + beta, beta)],
    ids=["gamma", "epsilon", "alphabeta"],
)
def test_gradient_by_a_hyperparameter(rule):
    weight = random_like(6, VECTORS)

    @jax.jit
    def objective(value):
        return (weight * rp.explain(chain, rule(value))((KERNELS, BIASES), VECTORS)).sum()

    np.testing.assert_allclose(jax.grad(objective)(0.5), difference_quotient(objective, 0.5, 1.0, step=1e-4), rtol=1e-5)


def test_gradient_of_the_explanation_of_a_convolutional_network():
    name = "conv_1d"
    params, x = networks.init(name), networks.sample(name)
    weight, direction = random_like(6, x), random_like(7, x)
    explain = rp.explain(networks.NETWORKS[name], rp.presets.epsilon_gamma_box(-1.5, 1.5), target=1)

    @jax.jit
    def objective(x):
        return (weight * explain(params, x)).sum()

    slope = (jax.jit(jax.grad(objective))(x) * direction).sum()
    np.testing.assert_allclose(slope, difference_quotient(objective, x, direction, 1e-6), rtol=1e-5)


@pytest.mark.parametrize("name", ["epsilon", "gamma", "zbox"])
def test_forward_and_reverse_derivatives_agree(name):
    explain = functools.partial(rp.explain(smooth_chain, DIFFERENTIATED[name]), (KERNELS, BIASES))
    x = VECTORS[:1]
    direction = random_like(8, x)
    relevance, tangent = jax.jvp(explain, (x,), (direction,))
    jacobian = jax.jit(jax.jacrev(explain))(x)
    assert_close(relevance, explain(x), 1e-13)
    assert_close(jnp.tensordot(jacobian, direction, 2), tangent)
    assert_close(jax.jit(jax.jacfwd(explain))(x), jacobian)


# Inputs at which a quotient could go wrong.

EXTREME = {
    "zero": 0 * VECTORS,
    "1e-10": 1e-10 * np.sign(VECTORS),
    "1e-12": 1e-12 * np.sign(VECTORS),
    "subnormal": 1e-310 * np.sign(VECTORS),
    "huge": 1e30 * VECTORS,
    "mixed": np.resize([0.0, 1e-12, -1e-10, 1.0, -1e30, 1e30], VECTORS.shape),
    "negative zero": -0.0 * np.ones_like(VECTORS),
}
FRAGILE = {
    "chain": chain,
    "without biases": lambda params, x: chain((params[0], 0 * params[1]), x),
    "smooth": smooth_chain,
    # every difference is 0
    "cancelling": lambda params, x: chain(params, (x @ params[0][0] - x @ params[0][0])) + x @ np.ones((6, 6)),
    "residual": lambda params, x: (x - nn.relu(x @ params[0][0])) @ params[0][1],
    "softmax": lambda params, x: nn.softmax(x @ params[0][0]) @ params[0][1],
    "l2 norm": lambda params, x: (x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)) @ params[0][0],
}


@pytest.mark.parametrize("network", FRAGILE)
@every_rule
def test_finite_at_extreme_inputs(network, rules):
    explain = jax.jit(rp.explain(FRAGILE[network], rules))
    for name, x in EXTREME.items():
        assert np.isfinite(explain((KERNELS, BIASES), x)).all(), name


@every_rule
def test_gradient_of_the_explanation_is_finite_at_zero(rules):
    gradient = jax.jit(jax.grad(lambda x: rp.explain(smooth_chain, rules)((KERNELS, BIASES), x).sum()))
    for name in ("zero", "1e-12"):
        assert np.isfinite(gradient(EXTREME[name])).all(), name


@every_rule
def test_denominators_that_cancel(rules):
    """x w = 1 - 1 = 0, with and without a bias."""
    kernel = np.array([[1.0, 1.0], [-1.0, -1.0]])
    relevance = rp.explain(lambda x: x @ kernel + np.array([[0.0, 1.0]]), rules)(np.ones((1, 2)))
    assert np.isfinite(relevance).all()


# Networks drawn at random.

generated = settings(max_examples=3, deadline=None, derandomize=True, database=None)


@st.composite
def drawn_networks(draw, biases=True):
    """A network of random depth, width and order of layers, its parameters and a batch of two inputs."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    steps = [draw(st.sampled_from(["plain", "residual", "reshape", "double", "concatenate"])) for _ in widths[1:]]
    params = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        inputs = inputs * (2 if i and steps[i - 1] == "concatenate" else 1)
        params.append({"kernel": rng.normal(size=(inputs, outputs)), "bias": biases * rng.normal(size=(1, outputs))})

    def network(params, x):
        for step, layer in zip(steps, params, strict=True):
            x = nn.relu(x @ layer["kernel"] + layer["bias"])
            if step == "residual":
                x = x + 0.5 * x
            elif step == "reshape":
                x = x[:, None].reshape(x.shape)
            elif step == "double":
                x = 2 * x
            elif step == "concatenate":
                x = jnp.concatenate([x, -x], axis=-1)
        return x

    return network, params, rng.normal(size=(2, widths[0]))


@given(drawn_networks(biases=False))
@generated
def test_generated_networks_conserve_relevance(drawn):
    network, params, x = drawn
    value, relevance = rp.value_and_explain(network, rp.Zero())(params, x)
    gradient = jax.grad(lambda x: network(params, x).sum())(x)
    np.testing.assert_allclose(relevance, x * gradient, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(relevance.sum(), value.sum(), rtol=1e-10, atol=1e-12)


@given(drawn_networks(), st.sampled_from(list(RULES)))
@generated
def test_generated_networks_are_explained_alike_in_every_way(drawn, name):
    network, params, x = drawn
    explain = rp.explain(network, RULES[name])
    relevance = explain(params, x)
    assert np.isfinite(relevance).all()
    assert_close(jax.jit(explain)(params, x), relevance)
    assert_close(rp.explain(jax.checkpoint(network), RULES[name])(params, x), relevance)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4),
    st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4),
)
@settings(generated, max_examples=50)
def test_epsilon_on_any_numbers(x, kernel):
    """Relevance is finite, and never larger than what the contributions to the output are."""
    x, kernel = np.array(x).reshape(1, 4), np.array(kernel).reshape(4, 1)
    relevance = epsilon_on_a_unit(kernel, x)
    assert np.isfinite(relevance).all()
    assert (np.abs(relevance) <= np.abs(x * kernel.T) * (1 + 1e-12)).all()


epsilon_on_a_unit = jax.jit(rp.explain(lambda kernel, x: x @ kernel, rp.Epsilon(1e-6)))
