"""Products, gates and attention: what each factor is, and what it receives under each rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import relprop as rp

KEYS = jax.random.split(jax.random.key(11), 8)
A, B, C = (jax.random.normal(key, (4, 3)) for key in KEYS[:3])
W = jax.random.normal(KEYS[3], (3, 3))
TAKE_ALL = {"gate": rp.SignalTakeAll()}


def products(fn, *args, **options):
    return [e.layer for e in rp.plan(fn, None, **options)(*args) if "product" in e.layer.kinds]


GATES = {
    "logistic": jax.nn.sigmoid,
    "one minus logistic": lambda g: 1 - jax.nn.sigmoid(g),
    "sigmoid by hand": lambda g: 1 / (1 + jnp.exp(-g)),
    "sigmoid by tanh": lambda g: 0.5 * (jnp.tanh(g / 2) + 1),
    "hard sigmoid": jax.nn.hard_sigmoid,
    "clipped": lambda g: jnp.clip(g, 0.0, 1.0),
    "decay": lambda g: jnp.exp(-jax.nn.softplus(g)),
    "decay of a state space": lambda g: jnp.exp(jax.nn.softplus(g) * -jnp.exp(W[0]).reshape(1, 3)),
    "two gates": lambda g: jax.nn.sigmoid(g) * jax.nn.sigmoid(g @ W),
    "softmax": jax.nn.softmax,
    "renormalised": lambda g: (lambda p: p / p.sum(-1, keepdims=True))(jax.nn.sigmoid(g)),
}


@pytest.mark.parametrize("name", GATES)
def test_a_factor_between_0_and_1_makes_a_gate(name):
    gate = GATES[name]
    (layer,) = products(lambda g, x: gate(g @ W) * x, A, B, argnums=(0, 1))
    assert layer.kind == "gate"
    assert set(layer.roles) == {"gate", "signal"}
    for_gate, for_signal = rp.explain(lambda g, x: gate(g @ W) * x, TAKE_ALL, argnums=(0, 1))(A, B)
    np.testing.assert_array_equal(for_gate, 0)
    np.testing.assert_allclose(for_signal, gate(A @ W) * B, rtol=1e-10)


@pytest.mark.parametrize("factor", [jnp.tanh, jax.nn.relu, jax.nn.softplus, jax.nn.silu, lambda g: 2 * jax.nn.sigmoid(g)])
def test_what_may_leave_0_to_1_does_not(factor):
    (layer,) = products(lambda g, x: factor(g) * x, A, B, argnums=(0, 1))
    assert layer.kind == "product"
    assert layer.roles == ("activated", "signal")


def test_two_gates_alone_are_two_signals():
    fn = lambda a, b: jax.nn.sigmoid(a) * jax.nn.sigmoid(b)  # noqa: E731
    (layer,) = products(fn, A, B, argnums=(0, 1))
    assert (layer.kind, layer.roles) == ("product", ("signal", "signal"))


def test_gates_share_evenly_unless_a_rule_says_otherwise():
    fn = lambda g, x: jax.nn.sigmoid(g) * x  # noqa: E731
    for relevance in rp.explain(fn, [("activation", rp.Pass())], argnums=(0, 1))(A, B):
        np.testing.assert_allclose(relevance, fn(A, B) / 2, rtol=1e-10)


@pytest.mark.parametrize("rules", [None, TAKE_ALL], ids=["uniform", "signal take all"])
def test_the_order_of_a_product_does_not_matter(rules):
    s = jax.nn.sigmoid
    forms = (
        lambda a, b, c: s(a) * b * c,
        lambda a, b, c: c * (s(a) * b),
        lambda a, b, c: (b * c) * s(a),
        lambda a, b, c: (2.0 * b).reshape(2, 2, 3) * (0.5 * (c * s(a))).reshape(2, 2, 3),
    )
    expected = rp.explain(forms[0], rules, argnums=(0, 1, 2))(A, B, C)
    for fn in forms[1:]:
        found = rp.explain(fn, rules, argnums=(0, 1, 2))(A, B, C)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)
    if rules is not None:
        for signal in expected[1:]:
            np.testing.assert_allclose(signal, s(A) * B * C / 2, rtol=1e-10)


def test_the_association_of_matrix_products_does_not_matter():
    """Linear attention: (q k') v and q (k' v)."""
    first, second = (lambda q, k, v: (q @ k.T) @ v), (lambda q, k, v: q @ (k.T @ v))
    expected = rp.explain(first, None, argnums=(0, 1, 2))(A, B, C)
    for a, b in zip(rp.explain(second, None, argnums=(0, 1, 2))(A, B, C), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
        np.testing.assert_allclose(a.sum(), first(A, B, C).sum() / 3, rtol=1e-9)


@pytest.mark.parametrize("hold", [0, (0,), lambda layer, i: i == 0])
def test_a_chosen_operand_is_held(hold):
    for_a, for_b = rp.explain(lambda a, b: a * b, {"product": rp.SignalTakeAll(hold)}, argnums=(0, 1))(A, B)
    np.testing.assert_array_equal(for_a, 0)
    np.testing.assert_allclose(for_b, A * B, rtol=1e-12)


def test_squeeze_and_excitation_takes_nothing_through_its_gate():
    def fn(w, x):  # (batch, positions, channels)
        squeezed = x.mean(1, keepdims=True)
        return (x * jax.nn.sigmoid(jax.nn.relu(squeezed @ w) @ w)).sum(1)

    x = jax.random.normal(KEYS[4], (2, 4, 3))
    gate = jax.nn.sigmoid(jax.nn.relu(x.mean(1, keepdims=True) @ W) @ W)
    np.testing.assert_allclose(rp.explain(fn, TAKE_ALL)(W, x), x * gate, rtol=1e-9)


def test_gated_feed_forward_under_cp_lrp_holds_the_activated_operand():
    def fn(x):
        return jax.nn.silu(x @ W) * (x @ W.T)

    found = rp.explain(fn, rp.presets.cp_lrp(epsilon=0.0))(A)
    np.testing.assert_allclose(found, A * (jax.nn.silu(A @ W) @ W), rtol=1e-8)


def test_what_is_held_costs_no_product_in_the_pass_backwards():
    """Weights of attention held: one product forwards and one backwards for the values, none for the weights."""

    def fn(q, v):
        return jax.nn.softmax(q) @ v

    q = jax.random.normal(KEYS[4], (4, 4))

    def dots(rules):
        compiled = jax.jit(rp.explain(fn, rules, argnums=(0, 1))).lower(q, A).compile().as_text()
        return compiled.count(" dot(") + compiled.count("__onednn$matmul")

    assert (dots(None), dots(TAKE_ALL)) == (2, 1)


def test_the_gradient_of_an_explanation_sees_held_factors_move():
    def score(w):
        return (rp.explain(lambda x: jnp.tanh(jax.nn.sigmoid(x @ w) * x) @ w, TAKE_ALL)(A) ** 2).sum()

    slope, h = jax.grad(score)(W), 1e-5
    for i, j in ((0, 0), (2, 1)):
        step = jnp.zeros_like(W).at[i, j].set(h)
        np.testing.assert_allclose(slope[i, j], (score(W + step) - score(W - step)) / (2 * h), rtol=1e-5)


def test_a_quotient_is_a_product_with_the_reciprocal():
    forms = (lambda a, b: a / b, lambda a, b: a * (1 / b), lambda a, b: a * b**-1.0)
    for fn in forms:
        for relevance in rp.explain(fn, None, argnums=(0, 1))(A, B):
            np.testing.assert_allclose(relevance, A / B / 2, rtol=1e-9)
    by_division = rp.explain(lambda g, x: x / (1 + jnp.exp(-g)), TAKE_ALL, argnums=(0, 1))(A, B)
    by_logistic = rp.explain(lambda g, x: x * jax.nn.sigmoid(g), TAKE_ALL, argnums=(0, 1))(A, B)
    for a, b in zip(by_division, by_logistic, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_one_value_as_two_factors_is_counted_once():
    x = A[0]
    for rules in (None, {"product": rp.SignalTakeAll(0)}):
        np.testing.assert_allclose(rp.explain(lambda x: jnp.dot(x, x), rules)(x), x * x, rtol=1e-10)


@pytest.mark.parametrize(
    "weigh",
    [
        lambda e: (e * W[:1]) / e.sum(-1, keepdims=True),
        lambda e: e / e.mean(-1, keepdims=True),
        lambda e: e / (e.sum(-1, keepdims=True) - e),
        lambda e: e / (e @ W[:, :1]),
        lambda e: e[:3] / e[:3].sum(0)[:, None],
    ],
    ids=["weighed", "times n", "odds", "weighed sum", "another axis"],
)
def test_what_is_divided_by_more_or_less_than_its_own_sum_is_no_gate(weigh):
    fn = lambda u, x: weigh(jnp.exp(u)) * x  # noqa: E731
    u, x = A[:3], B[:3]
    (layer,) = products(fn, u, x, argnums=(0, 1))
    assert layer.kind == "product"
    signed = rp.plan(lambda u: weigh(jnp.exp(u)) @ W, rp.ZPlus())(u)
    layer = next(e.layer for e in signed if e.layer.kind == "dense" and e.layer.output_shape[-1] == 3)
    assert not layer.nonnegative or bool((weigh(jnp.exp(u)) >= 0).all())


def test_three_arrays_make_no_attention_of_a_kernel():
    @jax.custom_vjp
    def affine(x, w, r):
        def kernel(x, w, r, out):
            out[...] = x[...] @ w[...] + r[...]

        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(r.shape, r.dtype), interpret=True)(x, w, r)

    affine.defvjp(lambda *args: (affine(*args), args[1]), lambda w, c: (c @ w.T, None, c))
    with pytest.raises(rp.UnknownPrimitiveError, match="not one of attention"):
        rp.explain(lambda x: affine(x, jnp.ones((3, 5)), jnp.ones((4, 5))), None)(A)


def test_attention_of_one_array_with_itself():
    np.testing.assert_allclose(
        rp.explain(lambda x: fused(x, x, x), None)(A), rp.explain(lambda x: _reference(x, x, x), None)(A), atol=1e-12
    )


@pytest.mark.parametrize("hold", ["gates", {"gate", "gatte"}, 2, (0, -1)])
def test_what_cannot_be_held_is_refused(hold):
    with pytest.raises(rp.RuleError, match=r"no role|none at"):
        rp.explain(lambda a, b: a * b, {"product": rp.SignalTakeAll(hold)}, argnums=(0, 1))(A, B)


# Attention.


def softmax_attention(q, k, v, bias=None, mask=None):
    """(positions, heads, width), the keys and values of one head for several of the queries."""
    k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], 1) for a in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)


CAUSAL = jnp.tril(jnp.ones((5, 5), bool))
VARIANTS = {
    "plain": (4, {}, {}),
    "causal": (4, {"is_causal": True}, {"mask": CAUSAL[None]}),
    "grouped queries": (2, {}, {}),
    "one head of keys": (1, {}, {}),
    "boolean mask": (4, {"mask": CAUSAL[None, None, ::-1, ::-1]}, {"mask": CAUSAL[None, ::-1, ::-1]}),
}


@pytest.mark.parametrize("rules", [None, TAKE_ALL], ids=["uniform", "signal take all"])
@pytest.mark.parametrize("variant", [*VARIANTS, "bias"])
def test_jax_attention_is_attention_by_hand(variant, rules, default_promotion):
    """JAX takes the logits in float32 whatever the inputs are."""
    bias = jax.random.normal(KEYS[5], (4, 5, 5))
    heads, options, by_hand = VARIANTS.get(variant, (4, {"bias": bias[None]}, {"bias": bias}))
    q, k, v = (jax.random.normal(key, (5, n, 3)) for key, n in zip(KEYS[:3], (4, heads, heads), strict=True))
    found = rp.explain(
        lambda q, k, v: jax.nn.dot_product_attention(q[None], k[None], v[None], **options)[0], rules, argnums=(0, 1, 2)
    )(q, k, v)
    expected = rp.explain(lambda q, k, v: softmax_attention(q, k, v, **by_hand), rules, argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if rules is not None:
        np.testing.assert_array_equal(found[0], 0)
        np.testing.assert_allclose(found[2].sum(), softmax_attention(q, k, v, **by_hand).sum(), rtol=1e-5)


def test_attlrp_of_attention_is_a_quarter_a_quarter_and_a_half_of_its_derivative():
    q, k, v = (jax.random.normal(key, (5, 2, 3)) for key in KEYS[:3])
    _, transpose = jax.vjp(softmax_attention, q, k, v)
    slopes = transpose(jnp.ones((5, 2, 3)))
    found = rp.explain(softmax_attention, None, argnums=(0, 1, 2))(q, k, v)
    for relevance, x, slope, share in zip(found, (q, k, v), slopes, (4, 4, 2), strict=True):
        np.testing.assert_allclose(relevance, x * slope / share, atol=1e-12)


def _reference(q, k, v):
    return jax.nn.softmax(q @ k.T) @ v


def _kernel(q, k, v, out):
    out[...] = _reference(q[...], k[...], v[...])


@jax.custom_vjp
def fused(q, k, v):
    """Attention in a kernel that cannot be read, with a backward pass of its own."""
    shape = jax.ShapeDtypeStruct((q.shape[0], v.shape[1]), q.dtype)
    return pl.pallas_call(_kernel, out_shape=shape, interpret=True)(q, k, v)


fused.defvjp(lambda q, k, v: (fused(q, k, v), (q, k, v)), lambda kept, c: jax.vjp(_reference, *kept)[1](c))


@pytest.mark.parametrize("argnums", [0, 1, 2, (0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_a_fused_kernel_is_explained_as_what_it_computes(argnums):
    for rules, for_kernel in ((None, None), (TAKE_ALL, {"attention": rp.SignalTakeAll()})):
        if rules is not None and argnums != (0, 1, 2):
            continue
        expected = rp.explain(_reference, rules, argnums=argnums)(A, B, C)
        found = jax.jit(rp.explain(fused, for_kernel, argnums=argnums))(A, B, C)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_fused_kernel_between_layers_under_jit_and_vmap():
    fn = lambda x: jnp.tanh(fused(x @ W, x @ W.T, x) @ W)  # noqa: E731
    plain = lambda x: jnp.tanh(_reference(x @ W, x @ W.T, x) @ W)  # noqa: E731
    batch = jnp.stack([A, B])
    found, expected = (jax.jit(jax.vmap(rp.explain(f, rp.presets.attn_lrp()))) for f in (fn, plain))
    np.testing.assert_allclose(found(batch), expected(batch), atol=1e-10)
    assert "attention" in [e.layer.kind for e in rp.plan(fn, None)(A)]


def test_a_kernel_that_is_no_attention_is_an_unknown_primitive():
    @jax.custom_vjp
    def doubled(x):
        def kernel(x, out):
            out[...] = 2 * x[...]

        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)

    doubled.defvjp(lambda x: (doubled(x), None), lambda _, c: (2 * c,))
    with pytest.raises(rp.UnknownPrimitiveError, match=r"test_products.py.*a kernel with a backward pass of its own"):
        rp.explain(lambda x: doubled(x), None)(A)
    np.testing.assert_allclose(rp.explain(doubled, None, fallback="gradient")(A), 2 * A)


# State spaces.

WIDTH, STATE = 3, 4
STATE_KEYS = jax.random.split(KEYS[6], 6)
SSM = {
    "in": jax.random.normal(STATE_KEYS[0], (WIDTH, 2 * WIDTH)),
    "b": jax.random.normal(STATE_KEYS[1], (WIDTH, STATE)),
    "c": jax.random.normal(STATE_KEYS[2], (WIDTH, STATE)),
    "step": jax.random.normal(STATE_KEYS[3], (WIDTH, WIDTH)),
    "log_a": jax.random.normal(STATE_KEYS[4], (WIDTH, STATE)),
    "out": jax.random.normal(STATE_KEYS[5], (WIDTH, WIDTH)),
}


def mamba(how):
    """A selective state space over (time, features); `how` says how its recurrence is written."""

    def fn(p, x):
        u, z = jnp.split(x @ p["in"], 2, -1)
        u = jax.nn.silu(u)
        dt, b, c, a = jax.nn.softplus(u @ p["step"]), u @ p["b"], u @ p["c"], -jnp.exp(p["log_a"])[None]
        decay = jnp.exp(dt[:, :, None] * a)
        added = dt[:, :, None] * b[:, None] * u[:, :, None]
        start = jnp.zeros(added.shape[1:], x.dtype)
        if how == "associative scan":
            h = lax.associative_scan(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (decay, added))[1]
            y = jnp.einsum("tdn,tn->td", h, c)
        elif how == "states from a scan":
            h = lax.scan(lambda h, t: (t[0] * h + t[1],) * 2, start, (decay, added))[1]
            y = jnp.einsum("tdn,tn->td", h, c)
        elif how == "all in a scan":

            def step(h, t):
                dt, b, c, u = t
                h = jnp.exp(dt[:, None] * a[0]) * h + dt[:, None] * b[None] * u[:, None]
                return h, h @ c

            y = lax.scan(step, start, (dt, b, c, u))[1]
        else:
            h, ys = start, []
            for t in range(len(x)):
                h = decay[t] * h + added[t]
                ys.append((h * c[t][None]).sum(-1))
            y = jnp.stack(ys)
        return (y * jax.nn.silu(z)) @ p["out"]

    return fn


def _mamba_by_gradient(p, x):
    """MambaLRP as input times gradient of a network with A, B, C and the steps taken as constants. Jafari et al. 2024."""

    def fn(x):
        hold = lax.stop_gradient
        u, z = jnp.split(x @ p["in"], 2, -1)
        u = u * hold(jax.nn.sigmoid(u))
        dt, b, c, a = hold(jax.nn.softplus(u @ p["step"])), hold(u @ p["b"]), hold(u @ p["c"]), -jnp.exp(p["log_a"])[None]
        decay, added = jnp.exp(dt[:, :, None] * a), dt[:, :, None] * b[:, None] * u[:, :, None]
        h, ys = jnp.zeros(added.shape[1:], x.dtype), []
        for t in range(len(x)):
            h = decay[t] * h + added[t]
            ys.append((h * c[t][None]).sum(-1))
        gated = jnp.stack(ys) * (z * hold(jax.nn.sigmoid(z)))
        gated = gated / 2 + hold(gated / 2)
        return (gated @ p["out"]).sum()

    return x * jax.grad(fn)(x)


@pytest.mark.parametrize("how", ["associative scan", "states from a scan", "all in a scan", "unrolled"])
def test_mamba_holds_what_selects_however_its_recurrence_is_written(how):
    x = jax.random.normal(KEYS[7], (5, WIDTH))
    found = jax.jit(rp.explain(mamba(how), rp.presets.mamba(epsilon=0.0)))(SSM, x)
    np.testing.assert_allclose(found, _mamba_by_gradient(SSM, x), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(found.sum(), mamba(how)(SSM, x).sum(), rtol=1e-9)  # nothing is absorbed


def test_residual_sums_are_told_from_others():
    def fn(x):
        y = x / jnp.sqrt((x * x).mean(-1, keepdims=True))
        x = x + jax.nn.relu(y @ W) @ W
        return x[:, 1:] * jnp.ones((1, 2)) - x.mean(-1, keepdims=True)

    sums = [e.layer.roles for e in rp.plan(fn, None)(A) if e.layer.kind == "add"]
    assert sums == [("skip", "branch"), ()]
    rules = [type(e.rule).__name__ for e in rp.plan(fn, rp.presets.res_lrp())(A) if e.layer.kind == "add"]
    assert rules == ["ResidualGamma", "Zero"]
