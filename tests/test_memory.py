"""Memory that the compiled explanation needs beside its arguments, and that it falls with the gradient's."""

import functools

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


def residual(params, x, wrap=lambda f: f):
    for ps in params:
        x = wrap(block)(x, ps)
    return x.mean((1, 2))


def scanned(params, x):
    return lax.scan(lambda x, ps: (jax.checkpoint(block)(x, ps), None), x, params)[0].mean((1, 2))


def parameters(*leading):
    vectors = {name: array(*leading, 1, 1, 1, CHANNELS) for name in ("mean", "scale", "bias")}
    return [{"kernel": array(*leading, 3, 3, CHANNELS, CHANNELS), **vectors} for _ in range(2)]


def bytes_of(fn, params):
    return jax.jit(fn).lower(params, array(*SHAPE)).compile().memory_analysis().temp_size_in_bytes


@functools.cache
def gradient(fn, blocks):
    params = parameters(blocks) if fn is scanned else [parameters() for _ in range(blocks)]
    return bytes_of(jax.grad(lambda params, x: fn(params, x).sum(), argnums=1), params), params


@pytest.mark.parametrize("rules", RULES)
def test_an_explanation_needs_at_most_twice_what_the_gradient_needs(rules):
    base, params = gradient(residual, BLOCKS)
    assert bytes_of(rp.explain(residual, RULES[rules]), params) <= 2 * base


checkpointed = functools.partial(residual, wrap=jax.checkpoint)


@pytest.mark.parametrize("rules", ["Epsilon", "ZPlus", "AlphaBeta"])
def test_under_checkpoint_it_falls_like_the_gradient(rules):
    base, params = gradient(residual, BLOCKS)
    less, _ = gradient(checkpointed, BLOCKS)
    found = [bytes_of(rp.explain(fn, RULES[rules]), params) for fn in (residual, checkpointed)]
    assert less < 0.8 * base
    assert found[1] < 0.8 * found[0]
    assert found[1] <= 2 * less


@pytest.mark.parametrize("rules", ["Epsilon", "AlphaBeta"])
def test_a_scan_over_layers_keeps_the_activations_of_one_layer(rules):
    """What grows with the number of layers is what the loop carries from one to the next."""
    found = []
    for blocks in (4, 12):
        _, params = gradient(scanned, blocks)
        found.append(bytes_of(rp.explain(scanned, RULES[rules]), params))
    carried = 4 * functools.reduce(int.__mul__, SHAPE)
    assert found[1] - found[0] <= 1.1 * 8 * carried
