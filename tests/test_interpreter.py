"""Calls and loops: relevance passes them as if they were written out, and liveness goes in operand by operand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec

import relprop as rp

KEYS = jax.random.split(jax.random.key(1), 8)
W = jax.random.normal(KEYS[0], (3, 4, 4)) / 2
B = jax.random.normal(KEYS[1], (3, 4)) / 2
X = jax.random.normal(KEYS[2], (2, 4))
STEPS = jax.random.normal(KEYS[3], (5, 4))
RULES = [("affine", rp.Gamma(0.5)), (rp.optional("add"), rp.ResidualGamma())]


def layer(w, b, x):
    return jax.nn.silu(x @ w + b.reshape((1,) * (x.ndim - 1) + (-1,)))


def unrolled(params, x):
    for w, b in zip(*params, strict=True):
        x = layer(w, b, x)
    return x


def same(fn, reference, *args, rules=RULES, rtol=1e-10, **options):
    """Relevance and value of `fn` are those of `reference`."""
    found = rp.value_and_explain(fn, rules, **options)(*args)
    expected = rp.value_and_explain(reference, rules, **options)(*args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13)


def under_custom_jvp(params, x):
    @jax.custom_jvp
    def block(params, x):
        return unrolled(params, x)

    block.defjvp(lambda primals, tangents: (block(*primals), jnp.full_like(primals[1], jnp.nan)))
    return block(params, x)


def under_custom_vjp(params, x):
    @jax.custom_vjp
    def block(params, x):
        return unrolled(params, x)

    block.defvjp(lambda params, x: (block(params, x), None), lambda _, c: (None, jnp.full_like(c, jnp.nan)))
    return block(params, x)


def under_custom_vmap(params, x):
    @custom_vmap
    def block(x):
        return unrolled(params, x)

    block.def_vmap(lambda size, batched, x: (jax.vmap(lambda x: unrolled(params, x))(x), True))
    return block(x)


def under_nested_calls(params, x):
    return jax.jit(lambda p, x: jax.checkpoint(jax.jit(unrolled))(p, x))(params, x)


def under_remat_with_policy(params, x):
    return jax.checkpoint(unrolled, policy=jax.checkpoint_policies.dots_saveable)(params, x)


def as_scan_over_layers(params, x):
    return lax.scan(lambda x, wb: (layer(*wb, x), None), x, params)[0]


def as_reverse_scan(params, x):
    flipped = jax.tree.map(lambda a: a[::-1], params)
    return lax.scan(lambda x, wb: (layer(*wb, x), None), x, flipped, reverse=True)[0]


def as_scan_of_remat(params, x):
    body = jax.checkpoint(lambda x, wb: (layer(*wb, x), None))
    return lax.scan(body, x, params, unroll=2)[0]


def as_fori_loop(params, x):
    return lax.fori_loop(0, 3, lambda i, x: layer(params[0][i], params[1][i], x), x)


def as_switch(params, x):
    def block(i, x):
        branches = [lambda x, k=k: layer(params[0][k], params[1][k], x) for k in range(3)]
        return lax.switch(i, branches, x)

    for i in range(3):
        x = block(jnp.asarray(i), x)
    return x


def as_cond_on_the_input(params, x):
    return lax.cond(x.sum() > 1e9, lambda p, x: jnp.zeros_like(x), unrolled, params, x)


@pytest.mark.parametrize(
    "fn",
    [
        under_custom_jvp,
        under_custom_vjp,
        under_custom_vmap,
        under_nested_calls,
        under_remat_with_policy,
        as_scan_over_layers,
        as_reverse_scan,
        as_scan_of_remat,
        as_fori_loop,
        as_switch,
        as_cond_on_the_input,
    ],
    ids=lambda f: f.__name__,
)
def test_calls_and_loops_change_nothing(fn):
    same(fn, unrolled, (W, B), X)
    same(jax.jit(fn), unrolled, (W, B), X, target=1)


def recurrent(params, inputs):
    """Returns the last state and the outputs of all steps; `params` are loop constants."""
    w, u, b = params
    first, steps = inputs

    def body(carry, step):
        state, count = carry
        state = jnp.tanh(state @ w + step @ u + b)
        return (state, count + 1), 2.0 * state

    (state, _count), outputs = lax.scan(body, (first, 0), steps)
    return state, outputs


def recurrent_unrolled(params, inputs):
    w, u, b = params
    state, steps = inputs
    outputs = []
    for i in range(steps.shape[0]):
        state = jnp.tanh(state @ w + steps[i] @ u + b)
        outputs.append(2.0 * state)
    return state, jnp.stack(outputs)


INPUTS = (STEPS[0], STEPS[1:])


def test_a_scan_with_constants_carries_and_stacked_outputs_equals_its_unrolled_loop():
    params = (W[0], W[1], B[0])
    same(recurrent, recurrent_unrolled, params, INPUTS)
    same(recurrent, recurrent_unrolled, params, INPUTS, target=lambda out: out[0][2])
    same(recurrent, recurrent_unrolled, params, INPUTS, target=lambda out: out[1][1])


def test_the_relevance_of_a_scan_sums_to_its_output_without_biases():
    params = (W[0], W[1], jnp.zeros(4))
    relevance = rp.explain(recurrent, rp.Zero(), target=lambda out: out[0].sum())(params, INPUTS)
    total = sum(r.sum() for r in relevance)
    np.testing.assert_allclose(total, recurrent(params, INPUTS)[0].sum(), rtol=1e-10)


def test_weights_stay_free_in_the_bodies_of_loops():
    plan = rp.plan(recurrent, rp.Epsilon())((W[0], W[1], B[0]), INPUTS)
    kinds = [entry.layer.kind for entry in plan]
    assert kinds.count("dense") == 2
    assert "product" not in kinds
    assert {entry.layer.path for entry in plan if entry.layer.kind == "dense"} == {"0", "1"}


def test_a_carry_becomes_live_by_a_fixpoint():
    def fn(x):  # b becomes live in the second step, c in the third
        def body(carry, _):
            a, b, _c = carry
            return (a, 2.0 * a, 3.0 * b), None

        return lax.scan(body, (x, jnp.ones(2), jnp.ones(2)), None, length=3)[0][2]

    x = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(rp.explain(fn, None)(x), 6 * x)


def test_nested_scans():
    def fn(params, x):
        def outer(x, i):
            return lax.scan(lambda x, wb: (layer(*wb, x), None), x, params)[0], None

        return lax.scan(outer, x, jnp.arange(2))[0]

    same(fn, lambda params, x: unrolled(params, unrolled(params, x)), (W, B), X)


def test_shard_map_changes_nothing():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def fn(params, x):
        specs = (jax.tree.map(lambda _: PartitionSpec(), params), PartitionSpec("data"))
        mapped = jax.shard_map(unrolled, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"))
        return mapped(params, x)

    lowest = [(rp.first("dense"), rp.Flat()), ("dense", rp.Epsilon())]
    for rules in (RULES, lowest):
        found = jax.jit(rp.explain(fn, rules))((W, B), X)  # outside of jit every operation would be mapped by itself
        np.testing.assert_allclose(found, rp.explain(unrolled, rules)((W, B), X), rtol=1e-10, atol=1e-13)


def test_shard_map_with_a_sum_over_devices():
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))

    def fn(w, x):
        def partial(w, x):
            return lax.psum(x @ w, "model")

        specs = (PartitionSpec("model", None), PartitionSpec(None, "model"))
        return jax.shard_map(partial, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(w, x)

    same(fn, lambda w, x: x @ w, W[0], X, rules=rp.Zero())


def test_a_live_while_loop_is_refused_with_its_line_and_what_to_do():
    def fn(x):
        return lax.while_loop(lambda v: v.sum() < 100.0, lambda v: 2.0 * v, x)

    with pytest.raises(rp.NotDifferentiableError, match=r"while.*test_interpreter.py:\d+.*lax.scan.*fori_loop"):
        rp.explain(fn, None)(X)


def test_a_while_loop_that_is_not_live_is_no_matter():
    def fn(w, x):
        factor = lax.while_loop(lambda v: v < 100.0, lambda v: 2.0 * v, w[0, 0] * 0.0 + 1.0)
        return factor * (x @ w)

    same(fn, lambda w, x: 128.0 * (x @ w), W[0], X)


def test_a_data_dependent_while_loop_without_relevance_is_no_matter():
    def fn(x):
        steps = lax.while_loop(lambda n: n < (x > 0).sum(), lambda n: n + 1, 0)
        return x * 2.0 + 0.0 * steps.astype(x.dtype)

    same(fn, lambda x: 2.0 * x, X, rules=None)


def test_relative_rules_work_inside_of_remat_and_cond():
    lowest = [(rp.first("dense"), rp.Flat()), ("dense", rp.Epsilon())]
    same(jax.checkpoint(unrolled), unrolled, (W, B), X, rules=lowest)
    same(as_cond_on_the_input, unrolled, (W, B), X, rules=lowest)
    two = [(rp.first("dense") | rp.path("0"), rp.WSquare()), ("dense", rp.Epsilon())]
    same(under_nested_calls, unrolled, (W, B), X, rules=two)


@pytest.mark.parametrize("rule", [rp.Flat(), rp.WSquare(), rp.Epsilon(1e-3, bias="distribute")], ids=str)
def test_relative_rules_pass_through_loops(rule):
    same(as_scan_over_layers, unrolled, (W, B), X, rules=rule)
    params = (W[0], W[1], B[0])
    same(recurrent, recurrent_unrolled, params, INPUTS, rules=rule)
    same(recurrent, recurrent_unrolled, params, INPUTS, rules=rule, target=lambda out: out[1][1])


def test_a_relative_rule_above_a_loop_needs_the_loop_to_carry_it():
    def above(run):
        return lambda params, inputs: run(params, inputs)[1].sum(0) @ W[2]

    rules = [(rp.last("dense"), rp.Flat()), ("dense", rp.Epsilon())]
    same(above(recurrent), above(recurrent_unrolled), (W[0], W[1], B[0]), INPUTS, rules=rules)


def test_effects_are_kept():
    seen = []

    def fn(x):
        jax.debug.callback(lambda v: seen.append(float(v)), x.sum())
        return 2.0 * x

    rp.explain(fn, None)(X)
    jax.effects_barrier()
    assert seen
    np.testing.assert_allclose(seen[0], X.sum())


def test_outputs_may_be_inputs_constants_and_repeats():
    def fn(x, y):
        return x, x, jnp.ones(2), y

    rx, ry = rp.explain(fn, None, argnums=(0, 1))(jnp.array([1.0, 2.0]), jnp.array([3.0]))
    np.testing.assert_allclose(rx, [2.0, 4.0])
    np.testing.assert_allclose(ry, [3.0])


def test_a_value_used_twice_gets_both_shares():
    np.testing.assert_allclose(rp.explain(lambda x: x * x + x, None)(jnp.array([3.0])), [12.0])
