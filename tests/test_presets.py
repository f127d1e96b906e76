"""Presets put the right rule at the right place of sequence models; the numbers are compared elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import relprop as rp

KEYS = jax.random.split(jax.random.key(5), 8)
X = jax.random.normal(KEYS[0], (5, 4))
W, U, V = (jax.random.normal(key, (4, 4)) for key in KEYS[1:4])
B = jnp.linspace(-0.2, 0.3, 4)[None]


def placed(fn, rules, *args):
    return [(e.layer.kind, type(e.rule).__name__, e.layer.preactivation) for e in rp.plan(fn, rules)(*args)]


def cell(h, x):
    h = jnp.tanh(x[None] @ W + h @ U + B)
    return h, h


def test_a_preactivation_is_one_layer_to_the_lstm_preset():
    fn = lambda x: lax.scan(cell, jnp.zeros((1, 4)), x)[0] @ V  # noqa: E731
    assert placed(fn, rp.presets.lstm(), X) == [
        ("dense", "Zero", "part"),
        ("dense", "Zero", "part"),
        ("add", "Zero", "part"),
        ("scale", "Epsilon", "total"),
        ("activation", "Identity", ""),
        ("dense", "Epsilon", ""),
    ]
    together = jnp.concatenate([W, U])

    def joined(h, x):
        h = jnp.tanh(jnp.concatenate([x[None], h], 1) @ together + B)
        return h, h

    expected = rp.explain(lambda x: lax.scan(joined, jnp.zeros((1, 4)), x)[0] @ V, rp.presets.lstm())(X)
    np.testing.assert_allclose(rp.explain(fn, rp.presets.lstm())(X), expected, rtol=1e-10)


def test_a_difference_of_two_classes_is_no_preactivation():
    found = rp.plan(lambda x: x @ W + B, rp.presets.lstm(), target=lambda y: y[:, 0] - y[:, 1])(X)
    assert [type(e.rule).__name__ for e in found] == ["Epsilon", "Zero"]


def test_a_layer_that_something_else_reads_too_is_no_part_of_a_preactivation():
    def fn(x):
        h = x @ W
        return h + jnp.tanh(h) @ U

    assert placed(fn, rp.presets.lstm(), X)[0] == ("dense", "Epsilon", "")


def test_the_accumulator_is_stabilised_on_request():
    fn = lambda f, c, x: jax.nn.sigmoid(f) * c + jax.nn.sigmoid(f) * jnp.tanh(x)  # noqa: E731
    rules = [
        [
            type(e.rule).__name__
            for e in rp.plan(fn, rp.presets.lstm(1e-3, a), argnums=(1, 2))(X, X, X)
            if e.layer.kind == "add"
        ]
        for a in (0.0, 1e-3)
    ]
    assert rules == [["Zero"], ["Norm"]]


def block(x):
    y = jax.nn.standardize(x)
    x = x + jax.nn.softmax((y @ W) @ (y @ U).T) @ (y @ V)
    return x + jax.nn.gelu(jax.nn.standardize(x) @ W) @ U


def test_attention_and_feed_forward_of_a_vision_transformer():
    def fn(image):
        patches = lax.conv_general_dilated(image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return block(patches.reshape(-1, 4)).mean(0, keepdims=True) @ V

    kernel, image = jax.random.normal(KEYS[4], (2, 2, 3, 4)), jax.random.normal(KEYS[5], (1, 4, 4, 3))
    rules = [e.rule for e in rp.plan(fn, rp.presets.attn_lrp_vit())(image) if "affine" in e.layer.kinds]
    gammas = [getattr(rule, "gamma", None) for rule in rules]
    assert gammas == [0.25, None, None, None, 0.05, 0.05, None]


def test_attn_cp_and_res_lrp_differ_at_the_products_and_sums_they_are_about():
    def at(rules, kind):
        return [n for k, n, _ in placed(block, rules, X) if k == kind]

    attn, cp, res = rp.presets.attn_lrp(), rp.presets.cp_lrp(), rp.presets.res_lrp()
    assert (at(attn, "gate"), at(cp, "gate"), at(res, "gate")) == (["Uniform"], ["SignalTakeAll"], ["Uniform"])
    assert [n for n in at(res, "add") if n == "ResidualGamma"] == ["ResidualGamma"] * 2
    assert set(at(attn, "add")) == {"Zero"}
    assert at(attn, "norm") == ["Frozen", "Frozen"]


def test_cp_lrp_conserves_where_nothing_has_a_bias():
    found = rp.explain(block, rp.presets.cp_lrp(epsilon=0.0))(X)
    np.testing.assert_allclose(found.sum(), block(X).sum(), rtol=1e-9)


def test_gamma_decreases_over_the_depth_of_a_graph_network():
    def fn(a, h):
        for w in (W, U, V):
            h = jax.nn.relu(a @ (h @ w))
        return h.sum(0)

    adjacency = jnp.abs(jax.random.normal(KEYS[6], (5, 5)))
    found = [getattr(e.rule, "gamma", None) for e in rp.plan(fn, rp.presets.gnn())(adjacency, X) if e.layer.kind == "dense"]
    assert found == [3.0, None, 1.5, None, 0.0, None]
    chosen = rp.plan(fn, rp.presets.gnn(gamma=1.0, layers=rp.first("affine")))(adjacency, X)
    assert [getattr(e.rule, "gamma", None) for e in chosen if e.layer.kind == "dense"] == [1.0] + [None] * 5


def test_a_graded_rule_needs_a_rule_for_every_depth():
    with pytest.raises(rp.RuleError, match="Expected a rule"):
        rp.plan(lambda x: x @ W, {"affine": rp.Graded(lambda depth: depth)})(X)
