"""Wrong input gets an error that says what was given, what was expected, where, and what to do."""

import jax
import jax.numpy as jnp
import pytest

import relprop as rp

W = jnp.arange(6.0).reshape(3, 2)
X = jnp.ones((4, 3))


def dense(w, x):
    return x @ w


CASES = {
    "an argnums that is not there": (
        lambda: rp.explain(dense, None, argnums=2)(W, X),
        rp.ArgumentError,
        r"argnums=2 is out of range.*2 positional arguments",
    ),
    "an argument twice": (
        lambda: rp.explain(dense, None, argnums=(1, -1))(W, X),
        rp.ArgumentError,
        r"names an argument twice",
    ),
    "no arguments": (lambda: rp.explain(dense, None)(), rp.ArgumentError, r"without positional arguments"),
    "parameters that are not explained": (
        lambda: rp.explain(dense, None, argnums=1, parameters=0)(W, X),
        rp.ArgumentError,
        r"parameters=0 must be among the explained arguments",
    ),
    "an integer input": (
        lambda: rp.explain(lambda w, x: dense(w, x.astype(jnp.float64)), None)(W, X.astype(int)),
        rp.NotDifferentiableError,
        r"'x' is int64\[4, 3\], and selects no rows of an embedding.*Cast it to a float.*argnums",
    ),
    "a Python number that is no float": (
        lambda: rp.explain(lambda x: 2.0 * x, None)(3),
        rp.NotDifferentiableError,
        r"'x' is int.*floating-point",
    ),
    "a string": (lambda: rp.explain(lambda x: 1.0, None)("a"), rp.NotDifferentiableError, r"'x' is str"),
    "an integer output": (
        lambda: rp.explain(lambda x: x.argmax(-1), None)(X),
        rp.TargetError,
        r"returns int64\[4\].*no floating-point output",
    ),
    "a class that is not there": (
        lambda: rp.explain(dense, None, target=2)(W, X),
        rp.TargetError,
        r"target=2 is out of range.*2 classes",
    ),
    "a class that is not there, under jit": (
        lambda: jax.jit(rp.explain(dense, None, target=2))(W, X),
        rp.TargetError,
        r"target=2 is out of range",
    ),
    "targets of a wrong shape": (
        lambda: rp.explain(dense, None, target=jnp.zeros(3, int))(W, X),
        rp.TargetError,
        r"shape \(3,\).*output \(4, 2\).*vmap",
    ),
    "targets that are floats": (
        lambda: rp.explain(dense, None, target=jnp.zeros(4))(W, X),
        rp.TargetError,
        r"None, an int, an array of ints, 'top' or a function",
    ),
    "an unknown word as target": (
        lambda: rp.explain(dense, None, target="best")(W, X),
        rp.TargetError,
        r"'best'.*'top'",
    ),
    "a class of a scalar": (
        lambda: rp.explain(lambda x: x.sum(), None, target=0)(X),
        rp.TargetError,
        r"output is a scalar",
    ),
    "a class of several outputs": (
        lambda: rp.explain(lambda x: (x, x), None, target=0)(X),
        rp.TargetError,
        r"returns 2 arrays.*lambda out",
    ),
    "has_aux without a pair": (
        lambda: rp.explain(dense, None, has_aux=True)(W, X),
        rp.ArgumentError,
        r"must return a pair \(output, aux\)",
    ),
    "no rule at all": (
        lambda: rp.explain(dense, 3.0)(W, X),
        rp.RuleError,
        r"Expected a rule.*got 3.0",
    ),
    "a rule's class": (lambda: rp.explain(dense, rp.Epsilon)(W, X), rp.RuleError, r"Did you mean `Epsilon\(\)`"),
    "a rule at the wrong kind": (
        lambda: rp.explain(lambda x: jnp.tanh(x), [("activation", rp.ZPlus())])(X),
        rp.RuleError,
        r"ZPlus.*is for layers of kind affine.*activation layer.*test_errors.py",
    ),
    "a bias mode at a scale": (
        lambda: rp.explain(lambda w, x: jnp.tanh(x.sum(0)) * w, [("scale", rp.Epsilon(bias="ignore"))])(X[0], X),
        rp.RuleError,
        r"only bias='absorb' has a meaning",
    ),
    "pairs that are no pairs": (
        lambda: rp.Composite([("conv", rp.Epsilon(), 3)]),
        rp.ArgumentError,
        r"pairs of a selector and a rule",
    ),
    "an unknown kind": (lambda: rp.kind("convolution"), rp.ArgumentError, r"'convolution'.*Kinds are: activation"),
    "an unknown word as selector": (
        lambda: rp.Composite([("Conv_0", rp.Epsilon())]),
        rp.ArgumentError,
        r"'Conv_0' is neither a kind.*relprop.path\('Conv_0'\).*relprop.scope",
    ),
    "a selector that is none": (lambda: rp.Composite([(3, rp.Epsilon())]), rp.ArgumentError, r"Expected a selector"),
    "a bias mode": (lambda: rp.Epsilon(bias="drop"), rp.RuleError, r"'absorb', 'ignore' or 'distribute', got 'drop'"),
    "a negative epsilon": (lambda: rp.Epsilon(-1.0), rp.RuleError, r"Epsilon needs epsilon >= 0, got epsilon=-1.0"),
    "a negative gamma": (lambda: rp.Gamma(-1.0), rp.RuleError, r"gamma >= 0"),
    "alpha and beta": (lambda: rp.AlphaBeta(2.0, 2.0), rp.RuleError, r"alpha - beta = 1, got alpha=2.0 and beta=2.0"),
    "bounds in the wrong order": (lambda: rp.ZBox(1.0, 0.0), rp.RuleError, r"low < high"),
    "bounds of a wrong shape": (
        lambda: rp.explain(dense, rp.ZBox(jnp.zeros(2), 1.0))(W, X),
        rp.RuleError,
        r"low has the shape \(2,\).*input \(4, 3\).*test_errors.py",
    ),
    "pass where shapes differ": (
        lambda: rp.explain(dense, rp.Pass())(W, X),
        rp.RuleError,
        r"takes \(4, 3\) to \(4, 2\)",
    ),
    "relevance of a wrong shape from a function": (
        lambda: rp.explain(dense, lambda layer, x, z, R: R)(W, X),
        rp.RuleError,
        r"returned relevance of shape \(4, 2\).*test_errors.py.*input has the shape \(4, 3\)",
    ),
    "output relevance of a wrong shape": (
        lambda: rp.vjp(dense, None, W, X)[1](jnp.ones((4, 3))),
        rp.ArgumentError,
        r"shape \(4, 3\), but the output has \(4, 2\)",
    ),
    "output relevance of a wrong form": (
        lambda: rp.vjp(dense, None, W, X)[1]({"a": 1.0}),
        rp.ArgumentError,
        r"form PyTreeDef",
    ),
    "coefficients of a rule that has none": (
        lambda: rp.explain(dense, rp.Flat(), coefficients=True)(W, X),
        rp.ArgumentError,
        r"coefficients=True.*Flat",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_arguments(name):
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_a_surrogate_of_a_wrong_shape_is_refused():
    class Wrong(rp.Rule):
        def __call__(self, layer, x, z):
            return x

    with pytest.raises(rp.RuleError, match=r"surrogate of float64\[4, 3\].*float64\[4, 2\]"):
        rp.explain(dense, Wrong())(W, X)


def test_a_rule_that_says_nothing_is_refused():
    class Empty(rp.Rule):
        pass

    with pytest.raises(rp.RuleError, match="Empty defines neither `__call__` nor `relative`"):
        rp.explain(dense, Empty())(W, X)


def test_nan_in_relevance_is_reported():
    with pytest.warns(rp.NonFiniteRelevanceWarning, match="own output is not finite"):
        rp.explain(dense, rp.Epsilon())(W, X.at[0, 0].set(jnp.nan))


def test_all_errors_have_one_base():
    for error in (rp.ArgumentError, rp.NotDifferentiableError, rp.RuleError, rp.TargetError, rp.UnknownPrimitiveError):
        assert issubclass(error, rp.RelpropError)
