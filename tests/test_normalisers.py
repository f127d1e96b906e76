"""Softmax and norms are found by dataflow: one relevance for every spelling, equal to the formula."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import relprop as rp

KEYS = jax.random.split(jax.random.key(7), 6)
X = jax.random.normal(KEYS[0], (3, 5)) * 2
MASK = jnp.array([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 0]], bool)


def kinds(fn, *args):
    return [entry.layer.kind for entry in rp.plan(fn, None)(*args)]


def minus_maximum(u, axis, stop):
    top = u.max(axis, keepdims=True)
    return u - (lax.stop_gradient(top) if stop else top)


SOFTMAX = {
    "jax.nn": lambda u, axis: jax.nn.softmax(u, axis),
    "bare": lambda u, axis: jnp.exp(u) / jnp.exp(u).sum(axis, keepdims=True),
    "shifted": lambda u, axis: (lambda e: e / e.sum(axis, keepdims=True))(jnp.exp(minus_maximum(u, axis, False))),
    "shift stopped": lambda u, axis: (lambda e: e / e.sum(axis, keepdims=True))(jnp.exp(minus_maximum(u, axis, True))),
    "reciprocal": lambda u, axis: (lambda e: e * (1 / e.sum(axis, keepdims=True)))(jnp.exp(u)),
    "power -1": lambda u, axis: (lambda e: e * e.sum(axis, keepdims=True) ** -1)(jnp.exp(u)),
    "exp of log_softmax": lambda u, axis: jnp.exp(jax.nn.log_softmax(u, axis)),
    "exp minus logsumexp": lambda u, axis: jnp.exp(u - jax.nn.logsumexp(u, axis, keepdims=True)),
    "product with ones": lambda u, axis: (lambda e: e / jnp.einsum("ij->" + "ji"[axis % 2], e).reshape(_kept(u, axis)))(
        jnp.exp(u)
    ),
    "all true mask": lambda u, axis: jax.nn.softmax(u, axis, where=jnp.ones(u.shape, bool)),
    "checkpointed": lambda u, axis: jax.checkpoint(lambda v: jax.nn.softmax(v, axis))(u),
}


def _kept(u, axis):
    return tuple(1 if d == axis % u.ndim else n for d, n in enumerate(u.shape))


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("spelling", SOFTMAX)
def test_a_softmax_is_its_vjp_in_every_spelling(spelling, axis):
    c = jax.random.normal(KEYS[1], X.shape)
    s = jax.nn.softmax(X, axis)
    expected = X * s * (c - (s * c).sum(axis, keepdims=True))
    found = rp.explain(
        lambda u: c * SOFTMAX[spelling](u, axis), {"add": rp.ResidualGamma()} if spelling == "shifted" else None
    )
    if spelling == "shifted":  # its subtraction is no sum of two signals
        with pytest.warns(rp.UnusedSelectorWarning):
            relevance = found(X)
    else:
        relevance = found(X)
    np.testing.assert_allclose(relevance, expected, atol=1e-12)


@pytest.mark.parametrize("spelling", SOFTMAX)
def test_rules_for_softmax_find_every_spelling(spelling):
    fn = lambda u: SOFTMAX[spelling](u, -1)  # noqa: E731
    assert "softmax" in kinds(fn, X)
    c = jax.random.normal(KEYS[1], X.shape)
    weighted = lambda u: c * fn(u)  # noqa: E731
    np.testing.assert_array_equal(rp.explain(weighted, {"softmax": rp.Stop()})(X), 0)
    t = jax.nn.softmax(X / 3.0, -1)
    expected = X * t * (c - (t * c).sum(-1, keepdims=True))
    np.testing.assert_allclose(rp.explain(weighted, {"softmax": rp.Temperature(3.0)})(X), expected, atol=1e-12)


def test_log_softmax_is_its_derivative():
    c = jax.random.normal(KEYS[1], X.shape)
    s = jax.nn.softmax(X)
    expected = X * (c - s * c.sum(-1, keepdims=True))
    np.testing.assert_allclose(rp.explain(lambda u: c * jax.nn.log_softmax(u), None)(X), expected, atol=1e-12)
    by_hand = lambda u: c * (u - jnp.log(jnp.exp(u).sum(-1, keepdims=True)))  # noqa: E731
    np.testing.assert_allclose(rp.explain(by_hand, None)(X), expected, atol=1e-12)


@pytest.mark.parametrize("fill", [-jnp.inf, -1e30])
def test_masks_take_and_give_nothing(fill):
    c = jax.random.normal(KEYS[1], X.shape)
    forms = (
        lambda u: jax.nn.softmax(jnp.where(MASK, u, fill)),
        lambda u: jax.nn.softmax(u, where=MASK),
        lambda u: jax.nn.softmax(u + jnp.where(MASK, 0.0, fill)),
        lambda u: (lambda e: e / e.sum(-1, keepdims=True))(jnp.where(MASK, jnp.exp(u), 0.0)),
    )
    s = jax.nn.softmax(X, where=MASK)
    expected = X * s * (c - (s * c).sum(-1, keepdims=True))
    for fn in forms:
        found = rp.explain(lambda u, fn=fn: c * fn(u), None)(X)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert (found[~MASK] == 0).all()


def test_a_row_that_is_masked_altogether_takes_nothing():
    c, rows = jax.random.normal(KEYS[1], X.shape), jnp.array([[True], [True], [False]])

    def fn(u):
        weights = jax.nn.softmax(jnp.where(MASK & rows, u, -jnp.inf))
        return c * jnp.where(rows, weights, 0.0)

    found = rp.explain(fn, None)(X)
    assert (found[2] == 0).all()
    alone = lambda u: c[:2] * jax.nn.softmax(jnp.where(MASK[:2], u, -jnp.inf))  # noqa: E731
    np.testing.assert_allclose(found[:2], rp.explain(alone, None)(X[:2]), atol=1e-12)


def test_softmax_of_the_same_half_only():
    """Two halves of one array: the sum of the second is no normaliser of the first."""

    def fn(x):
        first, second = jnp.split(x, 2)
        return jnp.exp(first) / jnp.exp(second).sum()

    assert "softmax" not in kinds(fn, X[0][:4])


def test_softmax_over_segments():
    """Attention over the edges of a graph: maxima and sums by scatter, gathered back."""
    segments, c = jnp.array([0, 0, 1, 2, 1]), jax.random.normal(KEYS[1], (5,))
    u = X[0]

    def by_segment(u):
        top = jax.ops.segment_max(u, segments, 3)[segments]
        e = jnp.exp(u - top)
        return c * e / jax.ops.segment_sum(e, segments, 3)[segments]

    same = segments[:, None] == segments[None]
    expected = rp.explain(lambda u: c * jnp.diag(jax.nn.softmax(jnp.where(same, u[None], -jnp.inf))), None)(u)
    np.testing.assert_allclose(rp.explain(by_segment, None)(u), expected, atol=1e-12)


def test_what_else_reads_the_exponential_keeps_its_own_layers():
    def fn(u):
        e = jnp.exp(u)
        return (e / e.sum(-1, keepdims=True)).sum(), e.mean()

    first, second = (rp.explain(lambda u, i=i: fn(u)[i], None)(X) for i in (0, 1))
    np.testing.assert_allclose(first, 0, atol=1e-12)
    np.testing.assert_allclose(second, (jnp.exp(X) - 1) / X.size, rtol=1e-9)
    np.testing.assert_allclose(rp.explain(lambda u: sum(fn(u)), None)(X), second, atol=1e-12)


def attention(divide):
    def fn(q, k, v):
        scores = jnp.einsum("qd,kd->qk", q, k) / 2
        e = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = e.sum(-1, keepdims=True)
        if divide == "before":
            return (e / total) @ v
        if divide == "after":
            return (e @ v) / total
        return jnp.einsum("qk,kd->qd", e, v) * (1 / total)

    return fn


@pytest.mark.parametrize("rules", [None, {"gate": rp.SignalTakeAll()}], ids=["uniform", "signal take all"])
def test_attention_may_divide_before_or_after_the_values(rules):
    q, k, v = (jax.random.normal(key, (4, 3)) for key in KEYS[:3])
    expected = rp.explain(attention("before"), rules, argnums=(0, 1, 2))(q, k, v)
    assert rules is not None or all(jnp.abs(r).max() > 1e-3 for r in expected)
    for divide in ("after", "reciprocal"):
        found = rp.explain(attention(divide), rules, argnums=(0, 1, 2))(q, k, v)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)
    s = jax.nn.softmax(q @ k.T / 2)
    if rules is not None:
        np.testing.assert_allclose(expected[2], v * s.sum(0)[:, None], rtol=1e-9)


def test_in_bfloat16_the_softmax_is_right_within_its_rounding():
    c = jax.random.normal(KEYS[1], X.shape)
    fn = lambda u: c.astype(u.dtype) * jax.nn.softmax(u)  # noqa: E731
    exact = rp.explain(fn, None)(X)
    assert "softmax" in kinds(fn, X.astype(jnp.bfloat16))
    rough = rp.explain(fn, None)(X.astype(jnp.bfloat16)).astype(jnp.float64)
    assert jnp.abs(rough - exact).max() < 0.03 * jnp.abs(exact).max()


# Norms.


def standard(x, s):
    return (x - x.mean(-1, keepdims=True)) * s


def _rms(x):
    return jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


NORMS = {
    "rms": (lambda x: x / _rms(x), lambda x: x / _rms(x)),
    "rms by rsqrt": (lambda x: x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5), lambda x: x / _rms(x)),
    "rms by einsum": (lambda x: x / jnp.sqrt(jnp.einsum("ij,ij->i", x, x)[:, None] / 5 + 1e-5), lambda x: x / _rms(x)),
    "rms by power": (lambda x: x * ((x * x).mean(-1, keepdims=True) + 1e-5) ** -0.5, lambda x: x / _rms(x)),
    "rms, statistic checkpointed": (lambda x: x / jax.checkpoint(_rms)(x), lambda x: x / _rms(x)),
    "l2": (lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True))),
    "l1": (lambda x: x * (1 / jnp.abs(x).sum(-1, keepdims=True)), lambda x: x / jnp.abs(x).sum(-1, keepdims=True)),
    "share": (lambda x: x**2 / (x**2).sum(-1, keepdims=True), lambda x: x**2 / (x**2).sum(-1, keepdims=True)),
    "clipped": (
        lambda x: x / jnp.maximum(jnp.sqrt((x * x).sum(-1, keepdims=True)), 1e-6),
        lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True)),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_hand_relevance_on_unchanged(name):
    """With the statistic constant y = x s, so R = y c whatever the weight that reads y."""
    fn, value = NORMS[name]
    c = jax.random.normal(KEYS[1], X.shape)
    assert "norm" in kinds(fn, X)
    np.testing.assert_allclose(rp.explain(lambda x: c * fn(x), None)(X), c * value(X), rtol=1e-9)


LAYER_NORMS = {
    "standardize": lambda x: jax.nn.standardize(x, epsilon=1e-5),
    "two passes": lambda x: standard(x, lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)),
    "one pass": lambda x: standard(
        x, lax.rsqrt(jnp.maximum((x**2).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2, 0.0) + 1e-5)
    ),
    "divided": lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5),
    "linen": lambda x: nn.LayerNorm(epsilon=1e-5, use_bias=False, use_scale=False, param_dtype=x.dtype).apply({}, x),
    "linen, groups": lambda x: nn.GroupNorm(1, epsilon=1e-5, use_bias=False, use_scale=False, param_dtype=x.dtype).apply(
        {}, x
    ),
}


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norm_is_linear_with_its_deviation_held(name, default_promotion):
    c = jax.random.normal(KEYS[1], X.shape)
    expected = X * (c - c.mean(-1, keepdims=True)) / jnp.sqrt(X.var(-1, keepdims=True) + 1e-5)
    found = rp.explain(lambda x: c * LAYER_NORMS[name](x), None)(X)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_the_way_to_a_statistic_is_no_layer():
    found = kinds(lambda x: jax.nn.standardize(x), X)
    assert found == ["sum_pool", "add", "norm"]  # the mean and its subtraction; nothing of the variance


def test_a_quotient_of_two_functions_of_one_element_is_an_activation():
    assert kinds(jax.nn.soft_sign, X) == ["activation"]
    assert kinds(lambda x: (jnp.exp(x) - jnp.exp(-x)) / (jnp.exp(x) + jnp.exp(-x)), X) == ["activation"]


# Local response normalisation.

K, ALPHA, BETA, SIZE = 2.0, 0.3, 0.75, 3


def _window(x):
    return lax.reduce_window(x * x, 0.0, lax.add, (1, SIZE), (1, 1), "SAME")


def _slices(x):
    padded = jnp.pad(x * x, ((0, 0), (1, 1)))
    return sum(padded[:, i : i + x.shape[1]] for i in range(SIZE))


def _band(x):
    near = jnp.abs(jnp.arange(5)[:, None] - jnp.arange(5)[None]) <= SIZE // 2
    return (x * x) @ near.astype(x.dtype)


LRN = {
    "window, divided": lambda x: x / (K + ALPHA * _window(x)) ** BETA,
    "slices": lambda x: x * (K + ALPHA * _slices(x)) ** -BETA,
    "band matrix": lambda x: x * jnp.power(K + ALPHA * _band(x), -BETA),
}


@pytest.mark.parametrize("name", LRN)
def test_local_response_normalisation_holds_its_statistic(name):
    c = jax.random.normal(KEYS[1], X.shape)
    expected = c * X / (K + ALPHA * _window(X)) ** BETA
    np.testing.assert_allclose(rp.explain(lambda x: c * LRN[name](x), None)(X), expected, rtol=1e-10)


@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize("name", LRN)
def test_local_response_normalisation_by_the_formula_of_binder(name, size):
    c = np.asarray(jax.random.normal(KEYS[1], X.shape))
    x = np.asarray(X)
    expected = np.zeros_like(x)
    for b, j in np.ndindex(x.shape):
        window = [i for i in range(j - 1, j + 2) if 0 <= i < x.shape[1]]
        total = K + ALPHA * sum(x[b, i] ** 2 for i in window)
        shares = {i: -2 * ALPHA * BETA * x[b, j] * x[b, i] ** 2 * total ** (-BETA - 1) for i in window if i != j}
        shares[j] = x[b, j] * (K + ALPHA * x[b, j] ** 2) ** -BETA
        relevance = c[b, j] * x[b, j] * total**-BETA
        for i, share in shares.items():
            expected[b, i] += share / sum(shares.values()) * relevance
    found = rp.explain(lambda x: c * LRN[name](x), {"norm": rp.LocalResponse(size=size)})(X)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.sum(), (c * LRN[name](X)).sum(), rtol=1e-10)


def test_local_response_is_refused_at_a_norm_of_something_else():
    with pytest.raises(rp.RuleError, match=r"not one of its own input alone.*Frozen"):
        rp.explain(jax.nn.standardize, {"norm": rp.LocalResponse()})(X)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(rp.RuleError, match="temperature > 0"):
        rp.Temperature(0.0)


def test_the_gradient_of_an_explanation_sees_statistics_and_softmax_move():
    w = jax.random.normal(KEYS[2], (5, 5))

    def score(w):
        def fn(x):
            y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
            return jax.nn.softmax(y @ w) @ jnp.tanh(w)

        return (rp.explain(fn, {"softmax": rp.Temperature(2.0)})(X) ** 2).sum()

    slope, h = jax.grad(score)(w), 1e-5
    for i, j in ((0, 0), (3, 1)):
        step = jnp.zeros_like(w).at[i, j].set(h)
        np.testing.assert_allclose(slope[i, j], (score(w + step) - score(w - step)) / (2 * h), rtol=1e-5)


@pytest.mark.parametrize("mask", ["where", "added"])
def test_masks_of_infinity_have_no_part_in_relative_space(mask):
    """Under Flat, relevance passes a softmax below it as perturbations `x * r`: what is masked cannot move."""
    on = jnp.array([True, True, False])

    def masked(w, x, low):
        logits = jnp.where(on, x, low) if mask == "where" else x + jnp.where(on, 0.0, low)
        return jax.nn.softmax(logits) @ w

    args = jnp.arange(3.0)[:, None], jnp.array([1.0, 2.0, 3.0])
    explain = rp.explain(masked, rp.Flat(), argnums=1, parameters=())
    found, finite = explain(*args, -jnp.inf), explain(*args, -1e9)
    np.testing.assert_allclose(found, finite, rtol=1e-9)
    assert found[1] != 0
    assert found[2] == 0
