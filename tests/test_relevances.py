"""Relevance at inner layers is what explaining the rest of the network alone gives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from loops import stacked

import relprop as rp

KEYS = jax.random.split(jax.random.key(9), 8)
QUICK = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
PARAMS = {
    "first": {"w": jax.random.normal(KEYS[0], (4, 5)), "b": jax.random.normal(KEYS[1], (5,))},
    "second": {"w": jax.random.normal(KEYS[2], (5, 5)), "b": jax.random.normal(KEYS[3], (5,))},
    "third": {"w": jax.random.normal(KEYS[4], (5, 3)), "b": jax.random.normal(KEYS[5], (3,))},
}
X = jax.random.normal(KEYS[6], (2, 4))
EPSILON = [("dense", rp.Epsilon(0.1))]
RULES = {
    "coefficients": EPSILON,
    "relative": [(rp.optional(rp.path("third/*")), rp.Flat()), *EPSILON],
    "both": [(rp.optional(rp.path("third/*")), rp.Epsilon(0.1, bias="distribute")), *EPSILON],
}
of_rules = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)


def compiled(fn):
    return jax.jit(fn, compiler_options=QUICK)


def assert_equal(found, expected, rtol=1e-10):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max(initial=0))


def dense(params, x):
    return x @ params["w"] + params["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def from_first(params, h):
    return from_second(params, dense(params["second"], jax.nn.silu(h)))


def from_second(params, h):
    return dense(params["third"], jax.nn.silu(h))


def network(params, x):
    return from_first(params, dense(params["first"], x))


@of_rules
def test_relevance_at_a_layer_explains_what_is_above_it(rules):
    @compiled
    def found(params, x):
        first = dense(params["first"], x)
        second = dense(params["second"], jax.nn.silu(first))
        halves = [(first, from_first), (second, from_second)]
        expected = [(h, rp.explain(half, rules, target=1)(params, h)) for h, half in halves]
        return rp.relevances(network, rules, at="dense", target=1)(params, x), expected

    at, expected = found(PARAMS, X)
    assert list(at) == ["first/w", "second/w", "third/w"]
    for name, (value, relevance) in zip(("first/w", "second/w"), expected, strict=True):
        assert_equal(at[name].value, value)
        assert_equal(at[name].relevance, relevance)
    logits = network(PARAMS, X)
    assert_equal(at["third/w"].relevance, logits * jnp.eye(3)[1].reshape(1, 3))
    assert_equal(at["third/w"].coefficient, jnp.broadcast_to(jnp.eye(3)[1].reshape(1, 3), logits.shape))
    for layer in at.values():  # rules of coefficients hand out nothing regardless of the value
        if rules is EPSILON:
            assert_equal(layer.relevance, layer.value * layer.coefficient)


def test_a_value_that_is_zero_has_relevance_above_a_flat_rule():
    """Half of the output 7 to either input, whatever their values."""
    params = {"lower": jnp.array([[1.0, 0.0], [1.0, 0.0]]), "upper": jnp.array([7.0, 1.0])}
    fn = lambda params, x: x @ params["lower"] @ params["upper"]  # noqa: E731
    rules = [(rp.path("upper"), rp.Flat()), ("dense", rp.Zero())]
    at = rp.relevances(fn, rules, at=rp.path("lower"))(params, jnp.array([0.5, 0.5]))["lower"]
    np.testing.assert_allclose(at.value, [1.0, 0.0])
    np.testing.assert_allclose(at.coefficient, [0.0, 0.0])
    np.testing.assert_allclose(at.relevance, [3.5, 3.5])


def test_what_reaches_the_lines_of_an_audit():
    at = rp.relevances(network, EPSILON, at=rp.where(lambda layer: True), target=1)(PARAMS, X)
    audit = rp.audit(network, EPSILON, target=1)(PARAMS, X)
    np.testing.assert_allclose(
        [layer.relevance.sum() for layer in at.values()], [line.relevance_out for line in audit], rtol=1e-10
    )


def test_names():
    """The path of the parameter where that is unique, else with the number in the plan."""

    def fn(params, x):
        return jax.nn.relu(x @ params["w"] @ params["w"]) @ params["v"]

    params = {"w": jnp.eye(2), "v": jnp.ones(2)}
    every = rp.relevances(fn, None, at=rp.where(lambda layer: True))(params, jnp.ones(2))
    assert list(every) == ["w#0", "w#1", "relu#2", "v"]
    unnamed = rp.relevances(lambda x: jnp.tanh(x @ params["w"]), None, at="dense")
    assert list(unnamed(jnp.ones(2))) == ["dense#0"]
    assert list(rp.relevances(fn, None, at=rp.kind("dense") & ~rp.path("v"))(params, jnp.ones(2))) == ["w#0", "w#1"]


# Loops and calls.

LOOP = (jax.random.normal(KEYS[0], (3, 4, 4)) / 2, jax.random.normal(KEYS[1], (3, 4)))
LOOP_RULES = {"coefficients": rp.Epsilon(0.1), "relative": rp.Flat()}
of_loops = pytest.mark.parametrize("rule", LOOP_RULES.values(), ids=LOOP_RULES)


def block(w, b, x):
    return jax.nn.silu(x @ w + b.reshape(1, 4))


unrolled, scanned, nested = stacked(block)


def at_dense(fn, rule, **options):
    return rp.relevances(fn, rule, at="dense", target=1, **options)(LOOP, X)


def in_order(found):
    """Of execution: jit sorts dictionaries by name, where 10 comes before 2."""
    return [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("#")[2]))]


@of_loops
def test_loops_have_an_axis_for_their_steps(rule):
    def written_out(params, x):
        return unrolled(params, unrolled(params, x))

    fns = (scanned, unrolled, nested, written_out)
    in_scan, steps, in_both, all_steps = compiled(lambda: [at_dense(fn, rule) for fn in fns])()
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *in_order(steps))
    jax.tree.map(assert_equal, in_scan["0"], stacked)
    twice = jax.tree.map(lambda *v: jnp.stack(v).reshape(2, 3, *v[0].shape), *in_order(all_steps))
    jax.tree.map(assert_equal, in_both["0"], twice)


@of_loops
def test_checkpoints_change_nothing(rule):
    found, expected = compiled(lambda: (at_dense(jax.checkpoint(unrolled), rule), at_dense(unrolled, rule)))()
    assert found.keys() == expected.keys()
    jax.tree.map(assert_equal, found, expected)


@of_loops
def test_a_branch_that_is_not_taken_has_zeros(rule):
    def branch(params, x):
        return lax.cond(x.sum() < 1e9, unrolled, lambda params, x: x @ params[0][0], params, x)

    found, expected = compiled(lambda: (at_dense(branch, rule), at_dense(unrolled, rule)))()
    (idle,) = (layer for layer in found.values() if not np.any(layer.value))
    assert not any(np.any(v) for v in idle)
    taken = [layer for layer in found.values() if np.any(layer.value)]
    jax.tree.map(assert_equal, taken, list(expected.values()))


def test_a_condition_has_been_applied_at_its_layer():
    mask = jnp.array([1.0, 0.0, 2.0, 0.0, 1.0])
    condition = rp.condition(rp.path("second/*"), mask)
    options = {"at": rp.path("second/*") | rp.path("first/*"), "target": 1}

    @compiled
    def found(x):
        given = rp.relevances(network, EPSILON, **options)(PARAMS, x)
        conditional = rp.relevances(network, EPSILON, **options, conditions=condition)(PARAMS, x)
        start = rp.start(rp.path("second/*"), mask.reshape(1, 5) * given["second/w"].coefficient)
        return given, conditional, rp.relevances(network, EPSILON, at=options["at"], conditions=start)(PARAMS, x)

    given, conditional, begun = found(X)
    assert_equal(conditional["second/w"].relevance, given["second/w"].relevance * mask.reshape(1, 5))
    assert_equal(conditional["second/w"].value, given["second/w"].value)
    jax.tree.map(assert_equal, begun, conditional)


# Weights.


def test_the_relevance_of_weights_is_their_part_of_the_flow():
    """`w * coefficient`: what comes through each input of a layer, and what reaches its outputs less bias and epsilon."""

    def both(params, x):
        relevances = rp.relevances(network, EPSILON, at=rp.kind("dense") | rp.kind("activation"), target=1)(params, x)
        explain = rp.explain(network, EPSILON, argnums=(0, 1), target=1)
        return relevances, explain(params, x), rp.audit(network, EPSILON, target=1)(params, x)

    at, (for_params, for_x), audit = compiled(both)(PARAMS, X)
    lines = {line.address: line for line in audit}
    activations = [layer.relevance for name, layer in at.items() if name.endswith(("#1", "#3"))]
    for name, below in zip(("first", "second", "third"), (for_x, *activations), strict=True):
        # By input, summed over the batch: the relevance of the layer's input. By output: what the layer hands on.
        assert_equal(for_params[name]["w"].sum(1), below.sum(0))
        line = lines[f"{name}/w"]
        np.testing.assert_allclose(
            for_params[name]["w"].sum(), line.relevance_out - line.absorbed["bias"] - line.absorbed["epsilon"], rtol=1e-9
        )
        z = at[f"{name}/w"].value
        arriving = at[f"{name}/w"].relevance * (1 - (0.1 * jnp.sign(z) + PARAMS[name]["b"][None]) / (z + 0.1 * jnp.sign(z)))
        assert_equal(for_params[name]["w"].sum(0), arriving.sum(0), rtol=1e-8)


# Transformations and edges.


def test_jit_changes_nothing():
    relevances = rp.relevances(network, EPSILON, at="dense", target=1)
    jax.tree.map(assert_equal, jax.jit(relevances)(PARAMS, X), relevances(PARAMS, X))


def test_every_target_shares_the_pass_forward():
    def of_target(target, x):
        return rp.relevances(network, EPSILON, at=rp.path("second/*"), target=target)(PARAMS, x)["second/w"].relevance

    targets = jax.jit(jax.vmap(of_target, (0, None)))
    looped = jnp.stack([of_target(i, X) for i in range(3)])
    assert_equal(targets(jnp.arange(3), X), looped)
    products = re.findall(r"stablehlo\.dot_general .*-> tensor<([\dx]*)xf64>", targets.lower(jnp.arange(3), X).as_text())
    # Three forward; backward only what is above the layer.
    forward = ["2x5", "2x5", "2x3"]
    assert sorted(p for p in products if p in forward) == sorted(forward)
    assert len(products) <= 5
    # vmap over the mapped examples is the batch
    mapped = jax.vmap(lambda x: of_target(1, x[None])[0])(X)
    assert_equal(mapped, looped[1])


def test_derivatives_of_relevance_inside():
    def loss(w):
        params = PARAMS | {"first": PARAMS["first"] | {"w": w}}
        return (
            rp.relevances(network, EPSILON, at=rp.path("second/*"), target=1)(params, X)["second/w"].relevance ** 2
        ).sum()

    w, direction = PARAMS["first"]["w"], jax.random.normal(KEYS[7], (4, 5))
    slope = (loss(w + 1e-6 * direction) - loss(w - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(w), direction), slope, rtol=1e-6)


def test_an_infinite_mask_has_no_relevance():
    def attention(x):
        past = jnp.tril(jnp.ones((4, 4), bool))
        return jax.nn.softmax(x @ x.T + jnp.where(past, 0.0, -jnp.inf)) @ x

    at = rp.relevances(attention, None, at=rp.where(lambda layer: True))(jax.random.normal(KEYS[7], (4, 3)))
    for layer in at.values():
        assert np.isfinite(layer.relevance).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_those_of_the_layer(dtype):
    params, x = jax.tree.map(lambda a: a.astype(dtype), (PARAMS, X))
    at = rp.relevances(network, RULES["relative"], at="dense")(params, x)
    assert {v.dtype for layer in at.values() for v in layer} == {jnp.dtype(dtype)}


def test_shapes_without_examples_and_without_axes():
    at = rp.relevances(network, EPSILON, at=rp.path("second/*"), target=1)(PARAMS, X[:0])
    assert [v.shape for v in at["second/w"]] == [(0, 5)] * 3
    (at,) = rp.relevances(jnp.tanh, None, at="activation")(2.0).values()
    np.testing.assert_allclose(at.relevance, np.tanh(2.0))


def test_relevance_of_tokens_passes_the_layers_above():
    params = {"rows": jax.random.normal(KEYS[0], (6, 4)), "w": jax.random.normal(KEYS[1], (4, 2))}
    tokens = jnp.array([3, 1, 3])
    at = rp.relevances(lambda params, tokens: (params["rows"][tokens] @ params["w"]).sum(), None, at="dense")(params, tokens)
    np.testing.assert_allclose(at["w"].relevance.sum(), (params["rows"][tokens] @ params["w"]).sum())


def test_errors():
    with pytest.raises(rp.ArgumentError, match=r"^The selector kind\('conv'\) matches no layer.*first/w, activation"):
        rp.relevances(network, EPSILON, at="conv")(PARAMS, X)
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    mapped = jax.shard_map(unrolled, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    with pytest.raises(rp.ArgumentError, match=r"layer 0 at .*test_relevances\.py:\d+ .*inside of a `shard_map`.*Let the"):
        rp.relevances(mapped, None, at="dense")(LOOP, X)
    with pytest.raises(rp.ArgumentError, match="neither a kind of layer"):
        rp.relevances(network, EPSILON, at="first")(PARAMS, X)
