"""How many products with weights a rule costs, counted in the compiled program; and that sparing some changes nothing.

A layer costs the gradient one product forwards and one backwards. The inputs of layers are known to be non-negative here,
and their outputs go to a relu, as in most convolutional networks.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import relprop as rp

RANDOM = np.random.default_rng(0)
X = jnp.asarray(np.abs(RANDOM.normal(size=(2, 12, 3))))


def parameters(depth, channels=3):
    shapes = [((3, channels, channels), (1, 1, channels)) for _ in range(depth)]
    return [tuple(jnp.asarray(RANDOM.normal(size=shape)) for shape in pair) for pair in shapes]


def conv(x, w, b):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")) + b


def network(params, x, rectify=jax.nn.relu):
    x = jnp.abs(x)
    for w, b in params:
        x = rectify(conv(x, w, b))
    return x.sum((1, 2))


def signed(params, x):
    """Inputs of layers may be negative."""
    for w, b in params:
        x = jnp.tanh(conv(x, w, b))
    return x.sum((1, 2))


def pooled(params, x):
    """No relu right after a layer: what a pooling selects may be negative."""
    x = jnp.abs(x)
    for w, b in params:
        pool = lax.reduce_window(conv(x, w, b), -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "SAME")
        x = jax.nn.relu(pool)
    return x.sum((1, 2))


def convolutions(fn, *args):
    """The sizes of the batches of all convolutions of a compiled function."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    return len(re.findall(r" = \S+ convolution\(", text))


@functools.cache
def total(fn, rules, depth):
    return convolutions(rp.explain(fn, rules), parameters(depth), X)


def test_the_gradient_costs_two_products_a_layer():
    costs = [convolutions(jax.grad(lambda p, x: network(p, x).sum(), argnums=1), parameters(d), X) for d in (2, 3)]
    assert costs == [4, 6]


@pytest.mark.parametrize(
    ("rule", "fn", "count"),
    [
        (rp.Zero(), network, 2),
        (rp.Epsilon(), network, 2),
        (rp.ZPlus(), network, 3),  # 2 forwards, 1 backwards
        (rp.AlphaBeta(2.0, 1.0), network, 4),  # 2 and 2: the two products forwards add up to the layer's own
        (rp.AlphaBeta(1.0, 0.0), network, 3),
        (rp.Gamma(0.25), network, 3),  # 2 and 1: nothing negative is explained below a relu
        (rp.Gamma(0.25), pooled, 4),  # 2 and 2
        # Positive and negative inputs side by side are one product, of twice the size.
        (rp.ZPlus(), signed, 3),
        (rp.AlphaBeta(2.0, 1.0), signed, 4),
        (rp.Gamma(0.25), signed, 4),
    ],
)
def test_what_a_layer_costs(rule, fn, count):
    assert total(fn, rule, 3) - total(fn, rule, 2) == count


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (rp.Flat(), 4),  # 1 forwards; 3 of a single example, input-independent, at most
        (rp.ZBox(0.0, 1.0), 5),  # 1 and 2, and 2 of a single example for the bounds
    ],
)
def test_what_the_first_layer_costs(rule, count):
    rules = ((rp.first("conv"), rule), ("affine", rp.Epsilon()))
    rest = total(network, rp.Epsilon(), 2) - 2
    assert convolutions(rp.explain(network, list(rules)), parameters(2), X) - rest <= count


def test_bounds_are_mixed_once_for_all_examples():
    many = jnp.concatenate([X] * 8)
    compiled = jax.jit(rp.explain(network, rp.ZBox(0.0, jnp.ones(3)))).lower(parameters(1), many).compile()
    shapes = re.findall(r" = f64\[([\d,]*)\]\S* convolution\(", compiled.as_text())
    batches = sorted(16 if "16" in shape.split(",") else 1 for shape in shapes)
    assert batches == [1, 1, 16, 16, 16]


def dense(params, x):
    for w, b in params:
        x = jnp.tanh(x @ w[0] + b[0])
    return x.sum(1)


@pytest.mark.parametrize("fn", [signed, dense])
def test_positive_and_negative_inputs_in_one_product_change_nothing(fn, monkeypatch):
    params, x = parameters(2), jnp.asarray(RANDOM.normal(size=X.shape if fn is signed else (4, 3)))
    rules = [rp.AlphaBeta(), rp.Gamma(), rp.ZPlus()]
    found = [rp.explain(fn, rule)(params, x) for rule in rules]
    monkeypatch.setattr("relprop.layers.summing", lambda core, weight: None)
    for rule, relevance in zip(rules, found, strict=True):
        expected = rp.explain(fn, rule)(params, x)
        np.testing.assert_allclose(relevance, expected, rtol=1e-9, atol=1e-12 * float(jnp.abs(expected).max()))


def opaque(z):
    """A relu whose sign interval analysis does not see."""
    return (z + jnp.abs(z)) / 2


@pytest.mark.parametrize("bias", ["absorb", "ignore", "distribute"])
@pytest.mark.parametrize("rule", [rp.Gamma, rp.AlphaBeta, rp.ZPlus])
def test_what_a_rectifier_spares_changes_nothing(rule, bias):
    params = parameters(3)
    rules = rule(bias=bias)
    found, general = (
        jax.jit(rp.explain(functools.partial(network, rectify=f), rules))(params, X) for f in (jax.nn.relu, opaque)
    )
    np.testing.assert_allclose(found, general, rtol=1e-9, atol=1e-12 * float(jnp.abs(general).max()))


def test_relevance_that_starts_below_a_rectifier_is_that_of_negative_outputs_too():
    params = parameters(2)
    last = rp.last("conv")
    found = rp.explain(network, rp.Gamma(), conditions=rp.start(last))(params, X)

    def lower(params, x):
        (first, second) = params
        return conv(jax.nn.relu(conv(jnp.abs(x), *first)), *second)

    assert (lower(params, X) < 0).any()
    np.testing.assert_allclose(found, rp.explain(lower, rp.Gamma())(params, X), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_value_is_that_of_the_function(dtype):
    params, x = jax.tree.map(lambda a: a.astype(dtype), (parameters(3), X))
    value, _ = rp.value_and_explain(network, rp.AlphaBeta())(params, x)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.0
    np.testing.assert_allclose(
        value.astype(jnp.float32), network(params, x).astype(jnp.float32), rtol=tolerance, atol=tolerance
    )
