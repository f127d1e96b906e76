"""A function is traced and read once for the shapes of its arguments, and anew where that could be wrong."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import relprop as rp

W = jnp.array([[1.0, -2.0], [3.0, 1.0]])
X = jnp.array([[1.0, 2.0], [0.5, -1.0]])


def counted():
    """A function that remembers with what it was run by Python."""

    def fn(w, x, power=1, names=()):
        fn.runs.append((x.shape, power))
        return jax.nn.relu(x @ w) ** power

    fn.runs = []
    return fn


def test_other_values_other_rules_and_other_targets_need_no_new_trace():
    fn = counted()
    for rules in (rp.Epsilon(), rp.ZPlus(), rp.presets.epsilon_plus()):
        for x, target in ((X, 0), (2 * X, 1), (np.asarray(X), "top")):
            rp.explain(fn, rules, target=target)(W, x)
            rp.plan(fn, rules)(W, x)
            rp.audit(fn, rules, target=target)(W, x)
    assert len(fn.runs) == 1
    np.testing.assert_allclose(rp.explain(fn, rp.Epsilon(0.0), target=0)(W, 3 * X).sum(1), fn(W, 3 * X)[:, 0])


def test_other_shapes_flags_and_arguments_are_traced():
    fn = counted()
    explain = rp.explain(fn, rp.Zero())
    explain(W, X)
    explain(W, X[:1])
    explain(W, X, power=2)
    explain(W, X, power=True)  # equal to 1, but not the same
    assert [run[1] for run in fn.runs] == [1, 1, 2, True]
    rp.explain(fn, rp.Zero(), argnums=0)(W, X)
    rp.explain(fn, rp.Zero(), target=lambda y: y[0])(W, X)
    assert len(fn.runs) == 6
    for _ in range(2):
        explain(W, X)
        explain(W, X.astype(jnp.float32).astype(X.dtype), power=2)
    assert len(fn.runs) == 6


def test_what_cannot_be_compared_is_traced_each_time():
    fn = counted()
    for _ in range(2):
        rp.explain(fn, rp.Zero())(W, X, names=({"a"},))
    assert len(fn.runs) == 2


def test_a_function_that_closes_over_arrays_is_traced_each_time():
    weights = [W]
    explain = rp.explain(lambda x: x @ weights[0], rp.Zero())
    first = explain(X)
    weights[0] = 2 * W
    np.testing.assert_allclose(explain(X), 2 * first)


TEMPERATURE = 1.0


class Scaled:
    factor = 1.0

    def __call__(self, x):
        return x * self.factor


def test_numbers_that_a_function_reads_are_compared(monkeypatch):
    factor, scaled = 1.0, Scaled()
    by_closure = rp.explain(lambda x: x * factor, None)
    by_global = rp.explain(lambda x: x * TEMPERATURE, None)
    by_partial = rp.explain(functools.partial(lambda y, x: y * x * TEMPERATURE, 1.0), None)
    by_attribute, by_method = rp.explain(scaled, None), rp.explain(scaled.__call__, None)
    for value in (1.0, 2.0, 3.0):
        factor = scaled.factor = value
        monkeypatch.setitem(globals(), "TEMPERATURE", value)
        for explain in (by_closure, by_global, by_partial, by_attribute, by_method):
            np.testing.assert_array_equal(explain(X), value * X)


def test_the_context_counts():
    def fn(x):
        return x * jax.lax.axis_size("examples")

    explain = jax.vmap(rp.explain(fn, None), axis_name="examples")
    assert explain(jnp.ones((2, 3))).tolist() == [[2.0] * 3] * 2
    assert explain(jnp.ones((4, 3))).tolist() == [[4.0] * 3] * 4


def test_tokens_and_auxiliary_outputs_are_remembered_too():
    def fn(table, tokens, label):
        fn.runs.append(label)
        return table[tokens].sum(), (label, tokens)

    fn.runs = []
    explain = rp.explain(fn, None, argnums=1, has_aux=True)
    table = jnp.arange(6.0).reshape(3, 2)
    for tokens in ([0, 2], [1, 1]):
        for label in "ab":
            relevance, (name, given) = explain(table, jnp.array(tokens), label)
            np.testing.assert_allclose(relevance, table[jnp.array(tokens)].sum(1))
            assert (name, given.tolist()) == (label, tokens)
    assert fn.runs == ["a", "b"]


def test_traces_are_forgotten_with_the_function():
    fn = counted()
    rp.explain(fn, rp.Zero())(W, X)
    there = weakref.ref(fn)
    del fn
    gc.collect()
    assert there() is None


def test_a_fallback_is_not_remembered_for_others():

    def fn(x):
        return jax.lax.cumlogsumexp(x)

    with pytest.raises(rp.UnknownPrimitiveError):
        rp.explain(fn, None)(X[0])
    rp.explain(fn, None, fallback="gradient")(X[0])
    with pytest.raises(rp.UnknownPrimitiveError):
        rp.explain(fn, None)(X[0])


@pytest.mark.parametrize("wrap", [jax.jit, functools.partial, lambda fn: Callable(fn)])
def test_any_callable_is_remembered(wrap):
    fn = counted()
    wrapped = wrap(fn)
    for _ in range(2):
        rp.explain(wrapped, rp.Zero())(W, X)
    assert len(fn.runs) == 1


class Callable:
    def __init__(self, fn):
        self.fn = fn

    def __call__(self, *args):
        return self.fn(*args)
