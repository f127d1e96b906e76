"""Integer inputs: the relevance of a token is that of the embedding that it selects, summed over the features."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import relprop as rp

KEYS = jax.random.split(jax.random.key(3), 6)
TABLE = jax.random.normal(KEYS[0], (7, 4))
POSITIONS = jax.random.normal(KEYS[1], (6, 4))
W = jax.random.normal(KEYS[2], (4, 5))
PARAMS = {"table": TABLE, "positions": POSITIONS, "w": W}
TOKENS = jnp.array([[1, 2, 3, 0], [6, 5, 5, 1]])


def above(p, h):
    """What every network here does with the rows that it has selected."""
    y = jnp.tanh((h + p["positions"][None, :4]) @ p["w"])
    return (y * jax.nn.sigmoid(y @ p["w"].T @ p["w"])).sum(1)


def expected(rules=None, rows=TABLE[TOKENS]):
    return rp.explain(above, rules)(PARAMS, rows).sum(-1)


def in_a_scan(p, t):
    return above(p, lax.scan(lambda _, row: (None, p["table"][row]), None, t.T)[1].transpose(1, 0, 2))


def by_branches(p, t):
    return above(p, lax.cond(t[0, 0] > 0, lambda i: p["table"][i], lambda i: p["table"][i] * 2, t))


WRITINGS = {
    "indexing": lambda p, t: above(p, p["table"][t]),
    "take": lambda p, t: above(p, jnp.take(p["table"], t, axis=0)),
    "take, clipped": lambda p, t: above(p, jnp.take(p["table"], t, axis=0, mode="clip")),
    "one-hot": lambda p, t: above(p, jax.nn.one_hot(t, 7, dtype=jnp.float64) @ p["table"]),
    "comparison": lambda p, t: above(p, (t[..., None] == jnp.arange(7)[None, None]).astype(jnp.float64) @ p["table"]),
    "vmapped": lambda p, t: above(p, jax.vmap(jax.vmap(lambda i: p["table"][i]))(t)),
    "flattened": lambda p, t: above(p, p["table"][t.reshape(-1)].reshape(2, 4, 4)),
    "checkpointed": lambda p, t: above(p, jax.checkpoint(lambda e, i: e[i])(p["table"], t)),
    "scanned": in_a_scan,
    "in a branch": by_branches,
    "two axes": lambda p, t: above(p, jnp.stack([p["table"], 2 * p["table"]])[jnp.zeros_like(t), t]),
    "remapped": lambda p, t: above(p, p["table"][(jnp.arange(7) + 1)[t] - 1]),
    "with a token in front": lambda p, t: above(p, p["table"][jnp.concatenate([jnp.full((2, 1), 3), t], 1)][:, 1:]),
    "padded": lambda p, t: above(p, p["table"][jnp.pad(t, ((0, 0), (1, 1)), constant_values=2)][:, 1:-1]),
    "stacked": lambda p, t: above(p, p["table"][jnp.stack([t[:, i] for i in range(4)], 1)]),
    "tiled": lambda p, t: above(p, p["table"][jnp.tile(t, (1, 2))][:, :4]),
    "gathered with a fill": lambda p, t: above(
        p, p["table"][t.at[:, jnp.array([0, 1, 2, 3, 9])].get(mode="fill", fill_value=2)][:, :4]
    ),
    "masked afterwards": lambda p, t: above(p, jnp.where((t >= 0)[..., None], p["table"][t], 0.0)),
    "linen": lambda p, t: above(p, nn.Embed(7, 4, dtype=jnp.float64).apply({"params": {"embedding": p["table"]}}, t)),
}


@pytest.mark.parametrize("writing", WRITINGS)
def test_tokens_get_what_their_rows_get(writing, default_promotion):
    fn = WRITINGS[writing]
    np.testing.assert_allclose(fn(PARAMS, TOKENS), above(PARAMS, TABLE[TOKENS]), rtol=1e-9)
    # A product with one-hot rows is a layer; where its weights are treated as weights the rows are none.
    one_hot = writing in ("one-hot", "comparison")
    for rules in (None, rp.presets.attn_lrp(epsilon=0.0), *([] if one_hot else [{"affine": rp.Gamma(0.5)}])):
        found = rp.explain(fn, rules)(PARAMS, TOKENS)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected(rules), atol=1e-10)


def test_transformations_apply_as_to_floats():
    explain = rp.explain(WRITINGS["indexing"], rp.Epsilon(), target=2)
    reference = explain(PARAMS, TOKENS)
    np.testing.assert_allclose(jax.jit(explain)(PARAMS, TOKENS), reference, rtol=1e-10)
    one = rp.explain(lambda p, t: above(p, p["table"][t[None]])[0], rp.Epsilon(), target=2)
    np.testing.assert_allclose(jax.vmap(one, (None, 0))(PARAMS, TOKENS), reference, rtol=1e-9)
    value, pullback = rp.vjp(WRITINGS["indexing"], rp.Epsilon(), PARAMS, TOKENS)
    np.testing.assert_allclose(pullback(value * jax.nn.one_hot(2, 5)[None]), reference, rtol=1e-9)
    every = jax.vmap(lambda t: rp.explain(WRITINGS["indexing"], rp.Epsilon(), target=t)(PARAMS, TOKENS))(jnp.arange(5))
    np.testing.assert_allclose(every[2], reference, rtol=1e-9)
    slope = jax.grad(lambda w: (explain({**PARAMS, "w": w}, TOKENS) ** 2).sum())(W)
    assert jnp.isfinite(slope).all()
    assert jnp.abs(slope).max() > 0


def test_the_plan_needs_shapes_alone():
    shape = jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32)
    plan = rp.plan(WRITINGS["indexing"], None)(PARAMS, shape)
    assert [entry.layer.kind for entry in plan][:2] == ["dense", "activation"]


def test_learned_positions_can_be_asked_for_their_share():
    fn = lambda p, t: jnp.tanh(p["table"][t] + p["positions"][None, :4]) @ p["w"]  # noqa: E731
    rules = [("activation", rp.Pass())]
    for_params, for_tokens = rp.explain(fn, rules, argnums=(0, 1))(PARAMS, TOKENS)
    np.testing.assert_allclose(for_tokens, rp.explain(fn, rules)(PARAMS, TOKENS), rtol=1e-10)
    np.testing.assert_allclose(for_tokens.sum() + for_params["positions"].sum(), fn(PARAMS, TOKENS).sum(), rtol=1e-9)
    np.testing.assert_allclose(for_params["table"].sum(), for_tokens.sum(), rtol=1e-9)  # a weight gets what it hands on
    assert for_params["positions"][4:].sum() == 0


def test_sinusoidal_positions_are_an_argument_away():
    angles = jnp.arange(4.0)[:, None] / 10.0 ** jnp.arange(4.0)[None]
    fn = lambda waves, t: (TABLE[t] + waves[None]) @ W  # noqa: E731
    for_waves, for_tokens = rp.explain(fn, None, argnums=(0, 1))(jnp.sin(angles), TOKENS)
    np.testing.assert_allclose(for_waves.sum() + for_tokens.sum(), fn(jnp.sin(angles), TOKENS).sum(), rtol=1e-9)


def test_segments_and_words_are_told_apart():
    """Two integer arguments in one pytree, each with a table of its own."""

    def fn(p, inputs):
        return above(p, p["table"][inputs["words"]] + p["positions"][inputs["segments"]])

    inputs = {"words": TOKENS, "segments": jnp.array([[0, 0, 1, 1], [0, 1, 1, 1]])}
    found = rp.explain(fn, None)(PARAMS, inputs)
    words, segments = TABLE[TOKENS], POSITIONS[inputs["segments"]]
    coefficients = rp.explain(above, None, coefficients=True)(PARAMS, words + segments)
    np.testing.assert_allclose(found["words"], (words * coefficients).sum(-1), atol=1e-10)
    np.testing.assert_allclose(found["segments"], (segments * coefficients).sum(-1), atol=1e-10)


def test_tokens_that_choose_together_share():
    fn = lambda p, t: above(p, p["table"][(t[:, :-1] + t[:, 1:]) % 7] @ jnp.eye(4)[:, :4])  # noqa: E731
    padded = jnp.pad(TOKENS, ((0, 0), (0, 1)))
    pairs = rp.explain(above, None)(PARAMS, TABLE[(padded[:, :-1] + padded[:, 1:]) % 7]).sum(-1) / 2
    shared = jnp.pad(pairs, ((0, 0), (0, 1))) + jnp.pad(pairs, ((0, 0), (1, 0)))
    np.testing.assert_allclose(rp.explain(fn, None)(PARAMS, padded), shared, atol=1e-10)


def test_in_bfloat16_tokens_get_float32():
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), PARAMS)
    fn = lambda p, t: (p["table"][t] @ p["w"]).sum(1)  # noqa: E731
    found = rp.explain(fn, None)(params, TOKENS)
    assert found.dtype == jnp.float32
    exact = rp.explain(fn, None)(PARAMS, TOKENS)
    assert jnp.abs(found.astype(jnp.float64) - exact).max() < 0.03 * jnp.abs(exact).max()


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, t: above(p, t[..., None].astype(jnp.float64) * jnp.ones((1, 1, 4))),
        lambda p, t: above(p, p["table"][jnp.cumsum(t > 0, 1) % 7]),
        lambda p, t: above(p, TABLE[None, :4] * (t > 2).astype(jnp.float64)[..., None]),
    ],
    ids=["values", "counts", "mask"],
)
def test_integers_that_select_nothing_are_refused(fn):
    with pytest.raises(rp.NotDifferentiableError, match=r"'t' is int.*selects no rows.*argnums"):
        rp.explain(fn, None)(PARAMS, TOKENS)


def previous_token(p, t):
    """The row of the token before each, which the loop carries."""
    return above(p, lax.scan(lambda last, i: (i, p["table"][last]), t.T[0], t.T)[1].transpose(1, 0, 2))


def bag(t):
    return jax.nn.one_hot(t, 7, dtype=jnp.float64).sum(1)


ENDED = {
    "sort": lambda p, t: above(p, p["table"][t] + p["table"][jnp.sort(t, 1)]),
    "cumsum": lambda p, t: above(p, p["table"][t] + p["table"][jnp.cumsum(t, 1) % 7]),
    "scan": previous_token,
    "cond": lambda p, t: above(p, p["table"][t] + p["table"][lax.cond(t[0, 0] > 0, lambda i: i, lambda i: i + 1, t)]),
    "reduce_sum": lambda p, t: above(
        p, p["table"][t] + (jax.nn.one_hot(t, 7, dtype=jnp.float64).sum(1) @ p["table"])[:, None]
    ),
}


@pytest.mark.parametrize("primitive", ENDED)
def test_tokens_that_cannot_be_followed_to_a_row_are_not_left_out_silently(primitive):
    with pytest.raises(rp.NotDifferentiableError, match=rf"not followed: by way of '{primitive}' at .*test_tokens.py"):
        rp.explain(ENDED[primitive], None)(PARAMS, TOKENS)


def test_positions_counted_from_a_mask_are_positions():
    def fn(p, t):
        present = (t != 0).astype(jnp.int32)
        return above(p, p["table"][t] + p["positions"][jnp.cumsum(present, 1) * present])

    present = (TOKENS != 0).astype(jnp.int32)
    shift = POSITIONS[jnp.cumsum(present, 1) * present]
    reference = rp.explain(lambda p, h: above(p, h + shift), None)(PARAMS, TABLE[TOKENS]).sum(-1)
    np.testing.assert_allclose(rp.explain(fn, None)(PARAMS, TOKENS), reference, atol=1e-10)


def _loss(pick):
    def fn(p, t, labels=None):
        logits = jax.nn.log_softmax(jnp.tanh(p["table"][t[:, :-1]] @ p["w"]) @ p["w"].T)
        return pick(logits, (t[:, 1:] if labels is None else labels) % 4)

    return fn


@pytest.mark.parametrize(
    "pick",
    [
        lambda y, labels: jnp.take_along_axis(y, labels[..., None], -1)[..., 0].sum(-1),
        lambda y, labels: (y * jax.nn.one_hot(labels, 4, dtype=jnp.float64)).sum((1, 2)),
        lambda y, labels: jnp.einsum("btv,btv->b", y, jax.nn.one_hot(labels, 4, dtype=jnp.float64)),
    ],
    ids=["gathered", "multiplied", "einsum"],
)
def test_a_label_that_picks_an_output_gets_nothing(pick):
    fn = _loss(pick)
    expected = rp.explain(lambda p, t: fn(p, t, TOKENS[:, 1:]), None)(PARAMS, TOKENS)
    found = rp.explain(fn, None)(PARAMS, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found[:, -1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_tokens_have_no_relevance(shape):
    fn = lambda p, t: p["table"][t].sum((0, 1))  # noqa: E731
    assert rp.explain(fn, None)(PARAMS, jnp.ones(shape, jnp.int32)).shape == shape


def test_booleans_are_refused():
    with pytest.raises(rp.NotDifferentiableError, match="bool"):
        rp.explain(lambda p, m: jnp.where(m, 1.0, 2.0), None)(PARAMS, TOKENS > 2)
