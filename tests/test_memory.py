"""Memory that the compiled explanation needs beside its arguments, and that it falls with the gradient's."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import relprop as rp

CHANNELS, BLOCKS, SHAPE = 16, 8, (16, 16, 16, 16)
RULES = {
    "Epsilon": rp.Epsilon(),
    "ZPlus": rp.ZPlus(),
    "Gamma": rp.Gamma(),
    "AlphaBeta": rp.AlphaBeta(),
    "epsilon_gamma_box": rp.presets.epsilon_gamma_box(-1.0, 1.0),
}


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv_norm(x, p):
    dims = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dims)
    return (x - p["mean"]) * p["scale"] + p["bias"]


def block(x, ps):
    return jax.nn.relu(x + conv_norm(jax.nn.relu(conv_norm(x, ps[0])), ps[1]))


def residual(params, x):
    for ps in params:
        x = block(x, ps)
    return x.mean((1, 2))


def scanned(params, x, wrap=jax.checkpoint):
    return lax.scan(lambda x, ps: (wrap(block)(x, ps), None), x, params)[0].mean((1, 2))


kept = functools.partial(scanned, wrap=lambda block: block)


def parameters(*leading):
    vectors = {name: array(*leading, 1, 1, 1, CHANNELS) for name in ("mean", "scale", "bias")}
    return [{"kernel": array(*leading, 3, 3, CHANNELS, CHANNELS), **vectors} for _ in range(2)]


def bytes_of(fn, params):
    return jax.jit(fn).lower(params, array(*SHAPE)).compile().memory_analysis().temp_size_in_bytes


def gradient(fn):
    return jax.grad(lambda params, x: fn(params, x).sum(), argnums=1)


@functools.cache
def base():
    return bytes_of(gradient(residual), [parameters() for _ in range(BLOCKS)])


@pytest.mark.parametrize("rules", RULES)
def test_an_explanation_needs_at_most_twice_what_the_gradient_needs(rules):
    params = [parameters() for _ in range(BLOCKS)]
    assert bytes_of(rp.explain(residual, RULES[rules]), params) <= 2 * base()


def activations_of_a_layer(fn):
    """By how many arrays of the shape of the input the memory grows with each layer of a loop."""
    few, many = (bytes_of(fn, parameters(blocks)) for blocks in (4, 12))
    return (many - few) / 8 / (4 * math.prod(SHAPE))


@pytest.mark.parametrize("rules", ["Epsilon", "AlphaBeta"])
def test_a_checkpointed_scan_over_layers_keeps_what_it_carries_as_the_gradient_does(rules):
    assert activations_of_a_layer(gradient(scanned)) == pytest.approx(1, abs=0.05)
    assert activations_of_a_layer(rp.explain(scanned, RULES[rules])) == pytest.approx(1, abs=0.05)


def test_a_layer_keeps_a_ratio_where_the_gradient_keeps_nothing_and_a_choice_where_it_keeps_one():
    """Two convolutions and two relus in a block: a float for each of the ones, a byte for each of the others."""
    assert activations_of_a_layer(gradient(kept)) == pytest.approx(2 / 4, abs=0.05)
    assert activations_of_a_layer(rp.explain(kept, rp.Epsilon())) == pytest.approx(2 + 2 / 4, abs=0.05)
