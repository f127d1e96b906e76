"""Recurrent networks: the published rule of LSTMs, however a network is written, padded or stacked."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recurrent import (
    LINEN,
    StackedLinen,
    bidirectional_relevance,
    blend,
    classify,
    conv_lstm_as_cell,
    gru_cell,
    gru_reference,
    last_state_relevance,
    linen_gru_params,
    linen_lstm_params,
    linen_model,
    linen_simple_params,
    lstm_cell,
    lstm_cell_concatenated,
    lstm_reference,
    nnx_gru,
    nnx_lstm,
    nnx_model,
    nnx_simple,
    random_cell,
    random_head,
    scanned,
    scanned_with_mask,
    simple_cell,
    simple_reference,
    unrolled,
)

import relprop as rp

BATCH, STEPS, FEATURES, UNITS, CLASSES = 3, 4, 4, 5, 3
X = np.random.default_rng(0).standard_normal((BATCH, STEPS, FEATURES))
TARGETS = np.array([0, 2, 1])
HEAD, HEAD_OF_TWO = random_head(1, UNITS, CLASSES), random_head(2, 2 * UNITS, CLASSES)
LSTM, BACKWARD, UPPER = random_cell(3, FEATURES, UNITS), random_cell(4, FEATURES, UNITS), random_cell(5, UNITS, UNITS)
GRU, SIMPLE = random_cell(6, FEATURES, UNITS, gates=3), random_cell(7, FEATURES, UNITS, gates=1)
GRU_ONE_BIAS = GRU | {"u": np.zeros(UNITS)}
EPSILONS = (1e-9, 1e-3)


def written(step, run=scanned):
    """The classifier on the last state of a hand-written network."""
    return lambda params, x: classify(params["head"], run(step, params["cell"], x)[:, -1])


def assert_relevance(found, expected, tolerance=1e-10):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def published(reference, step, cell, epsilon, x=X, targets=TARGETS, head=HEAD, **options):
    """The reference, example by example."""
    states = np.asarray(scanned(step, cell, x))
    return np.stack(
        [
            last_state_relevance(reference, cell, head, *one, epsilon, **options)
            for one in zip(states, x, targets, strict=True)
        ]
    )


def explained(fn, rules=rp.presets.lstm):
    """`(params, x, epsilon) -> relevance`, compiled once for every epsilon."""
    return jax.jit(lambda params, x, epsilon: rp.explain(fn, rules(epsilon), target=TARGETS)(params, x))


def shared_out(epsilon):
    """Arras' rule with the bias, and the stabiliser, spread over the inputs of each unit."""
    return [("affine", rp.Epsilon(epsilon, bias="distribute")), ("gate", rp.SignalTakeAll())]


# The published rule.


@pytest.mark.parametrize("distribute", [False, True])
def test_the_reference_keeps_relevance_apart_from_the_bias(distribute):
    """A reference has to obey the theorem: with the bias shared out nothing is lost, without it something is."""
    relevance = np.random.default_rng(0).standard_normal((STEPS, UNITS))
    for reference, cell in ((lstm_reference, LSTM), (simple_reference, SIMPLE)):
        of_x, of_first = reference(cell, X[0], relevance, 1e-3, distribute=distribute)
        kept = of_x.sum() + of_first.sum()
        assert (abs(kept - relevance.sum()) < 1e-10) == distribute


@pytest.mark.parametrize("run", [scanned, unrolled])
@pytest.mark.parametrize("step", [lstm_cell, lstm_cell_concatenated])
def test_an_lstm_has_the_published_relevance(step, run):
    explain = explained(written(step, run))
    for epsilon in EPSILONS:
        found = explain({"cell": LSTM, "head": HEAD}, X, epsilon)
        assert_relevance(found, published(lstm_reference, lstm_cell, LSTM, epsilon))


@pytest.mark.parametrize("step", [lstm_cell, lstm_cell_concatenated])
@pytest.mark.parametrize("run", [scanned, unrolled])
def test_the_accumulator_can_have_the_stabiliser_of_the_published_code(step, run):
    explain = explained(written(step, run), lambda e: rp.presets.lstm(e, accumulator=e))
    for epsilon in EPSILONS:
        found = explain({"cell": LSTM, "head": HEAD}, X, epsilon)
        assert_relevance(found, published(lstm_reference, lstm_cell, LSTM, epsilon, accumulator=epsilon))


@pytest.mark.parametrize("run", [scanned, unrolled])
def test_an_lstm_has_the_published_relevance_with_the_bias_shared_out(run):
    explain = explained(written(lstm_cell_concatenated, run), shared_out)
    for epsilon in EPSILONS:
        found = explain({"cell": LSTM, "head": HEAD}, X, epsilon)
        assert_relevance(found, published(lstm_reference, lstm_cell, LSTM, epsilon, distribute=True))


def both_ways(step, run=scanned):
    def fn(params, x):
        forward = run(step, params["forward"], x)[:, -1]
        backward = run(step, params["backward"], x, reverse=True)[:, 0]
        return classify(params["head"], jnp.concatenate([forward, backward], -1))

    return fn


BOTH_WAYS = {"forward": LSTM, "backward": BACKWARD, "head": HEAD_OF_TWO}


def published_both_ways(epsilon, x=X, targets=TARGETS, **options):
    cells = (LSTM, BACKWARD)
    ordered = [scanned(lstm_cell, cell, x[:, ::d]) for cell, d in zip(cells, (1, -1), strict=True)]
    states = zip(*(np.asarray(s) for s in ordered), strict=True)
    return np.stack(
        [
            bidirectional_relevance(cells, HEAD_OF_TWO, s, one, target, epsilon, **options)
            for s, one, target in zip(states, x, targets, strict=True)
        ]
    )


def linen_both_ways(params, x, **options):
    cells = [nn.RNN(nn.LSTMCell(UNITS, **LINEN)) for _ in range(2)]
    variables = {f"{k}_rnn": {"cell": linen_lstm_params(params[k])} for k in ("forward", "backward")}
    carries, _ = nn.Bidirectional(*cells, return_carry=True).apply({"params": variables}, x, **options)
    return classify(params["head"], jnp.concatenate([h for _, h in carries], -1))


@pytest.mark.parametrize(
    "fn", [both_ways(lstm_cell), both_ways(lstm_cell, unrolled), linen_both_ways], ids=["scan", "unrolled", "linen"]
)
def test_a_bidirectional_lstm_has_the_published_relevance(fn, default_promotion):
    explain = explained(fn)
    for epsilon in EPSILONS:
        assert_relevance(explain(BOTH_WAYS, X, epsilon), published_both_ways(epsilon))


def test_a_bidirectional_lstm_has_the_published_relevance_with_the_bias_shared_out():
    explain = explained(both_ways(lstm_cell_concatenated), shared_out)
    for epsilon in EPSILONS:
        assert_relevance(explain(BOTH_WAYS, X, epsilon), published_both_ways(epsilon, distribute=True))


# The same network in other writings, and other networks.


def in_linen(module, params):
    return linen_model(nn.RNN(module), {"cell": params}, HEAD)


@pytest.mark.parametrize(
    "build",
    [
        lambda: in_linen(nn.LSTMCell(UNITS, **LINEN), linen_lstm_params(LSTM)),
        lambda: in_linen(nn.OptimizedLSTMCell(UNITS, **LINEN), linen_lstm_params(LSTM)),
        lambda: nnx_model(nnx_lstm(LSTM), HEAD),
        lambda: nnx_model(nnx_lstm(LSTM, nnx.OptimizedLSTMCell), HEAD),
    ],
    ids=["linen", "linen optimized", "nnx", "nnx optimized"],
)
def test_an_lstm_of_flax_has_the_published_relevance(build, default_promotion):
    fn, params = build()
    assert_relevance(explained(fn)(params, X, 1e-3), published(lstm_reference, lstm_cell, LSTM, 1e-3))


def test_the_plan_of_an_lstm_names_its_products(default_promotion):
    """Four groups of weights, one layer each although they are products with the input and with the state."""
    fn, params = in_linen(nn.LSTMCell(UNITS, **LINEN), linen_lstm_params(LSTM))
    kinds = [entry.layer.kind for entry in rp.plan(fn, rp.presets.lstm())(params, X)]
    assert kinds.count("gate") == 3
    assert "product" not in kinds


def stacked(params, x):
    states = scanned(lstm_cell, params["lower"], x)
    return classify(params["head"], scanned(lstm_cell, params["upper"], states)[:, -1])


def stacked_linen(params, x):
    variables = {"LSTMCell_0": linen_lstm_params(params["lower"]), "LSTMCell_1": linen_lstm_params(params["upper"])}
    return classify(params["head"], StackedLinen(UNITS).apply({"params": variables}, x)[:, -1])


@pytest.mark.parametrize("fn", [stacked, stacked_linen])
def test_stacked_lstms_pass_relevance_down(fn, default_promotion):
    lower = np.asarray(scanned(lstm_cell, LSTM, X))
    at_lower = published(lstm_reference, lstm_cell, UPPER, 1e-3, x=lower)
    expected = np.stack([lstm_reference(LSTM, x, r, 1e-3)[0] for x, r in zip(X, at_lower, strict=True)])
    assert_relevance(explained(fn)({"lower": LSTM, "upper": UPPER, "head": HEAD}, X, 1e-3), expected)


@pytest.mark.parametrize(
    "build",
    [
        lambda: (written(gru_cell), {"cell": GRU_ONE_BIAS, "head": HEAD}),
        lambda: (written(gru_cell, unrolled), {"cell": GRU_ONE_BIAS, "head": HEAD}),
        lambda: in_linen(nn.GRUCell(UNITS, **LINEN), linen_gru_params(GRU_ONE_BIAS)),
        lambda: nnx_model(nnx_gru(GRU_ONE_BIAS), HEAD),
    ],
    ids=["scan", "unrolled", "linen", "nnx"],
)
def test_a_gru_hands_all_to_its_signals(build, default_promotion):
    fn, params = build()
    explain = explained(fn)
    for epsilon in EPSILONS:
        expected = published(gru_reference, gru_cell, GRU_ONE_BIAS, epsilon)
        assert_relevance(explain(params, X, epsilon), expected)


@pytest.mark.parametrize(
    "build",
    [
        lambda: (written(gru_cell), {"cell": GRU, "head": HEAD}),
        lambda: in_linen(nn.GRUCell(UNITS, **LINEN), linen_gru_params(GRU)),
    ],
    ids=["scan", "linen"],
)
def test_a_gru_with_a_bias_at_the_recurrent_candidate(build, default_promotion):
    fn, params = build()
    assert_relevance(explained(fn)(params, X, 1e-3), published(gru_reference, gru_cell, GRU, 1e-3))


@pytest.mark.parametrize(
    "build",
    [
        lambda: (written(simple_cell), {"cell": SIMPLE, "head": HEAD}),
        lambda: (written(simple_cell, unrolled), {"cell": SIMPLE, "head": HEAD}),
        lambda: in_linen(nn.SimpleCell(UNITS, **LINEN), linen_simple_params(SIMPLE)),
        lambda: nnx_model(nnx_simple(SIMPLE), HEAD),
    ],
    ids=["scan", "unrolled", "linen", "nnx"],
)
def test_a_simple_cell_is_a_chain_of_dense_layers(build, default_promotion):
    fn, params = build()
    assert_relevance(explained(fn)(params, X, 1e-3), published(simple_reference, simple_cell, SIMPLE, 1e-3))


def test_a_convolutional_lstm_is_an_lstm_with_structured_weights(default_promotion):
    shape, frames = (3, 3, 1), np.random.default_rng(1).standard_normal((BATCH, STEPS, 3, 3, 1))
    module = nn.RNN(nn.ConvLSTMCell(2, (3, 3), **LINEN))
    template = jax.eval_shape(module.init, jax.random.key(0), frames)["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: rng.standard_normal(p.shape), template)
    head = random_head(3, 3 * 3 * 2, CLASSES)
    cell = conv_lstm_as_cell(params["cell"], shape)
    flat = frames.reshape(BATCH, STEPS, -1)

    def fn(params, x):
        last = module.apply({"params": params["rnn"]}, x)[:, -1]
        return classify(params["head"], last.reshape(last.shape[0], -1))

    found = explained(fn)({"rnn": params, "head": head}, frames, 1e-3).reshape(flat.shape)
    assert_relevance(found, published(lstm_reference, lstm_cell, cell, 1e-3, x=flat, head=head))


# Sequences of several lengths in one batch.

LENGTHS = np.array([4, 2, 1])
VALID = np.arange(STEPS)[None] < LENGTHS[:, None]


def masked(pick):
    def fn(params, x):
        states = scanned_with_mask(lstm_cell, params["cell"], x, jnp.asarray(VALID), pick)
        return classify(params["head"], states[:, -1])

    return lambda: (fn, {"cell": LSTM, "head": HEAD})


def last_carry(rnn, lengths):
    """The state after the last valid step, as flax returns it."""

    def fn(params, x):
        (_, h), _ = rnn(params["rnn"], x, seq_lengths=lengths)
        return classify(params["head"], h)

    return fn


def padded_linen():
    module = nn.RNN(nn.LSTMCell(UNITS, **LINEN), return_carry=True)
    fn = last_carry(lambda p, x, **k: module.apply({"params": p}, x, **k), jnp.asarray(LENGTHS))
    return fn, {"rnn": {"cell": linen_lstm_params(LSTM)}, "head": HEAD}


def padded_nnx():
    graph, state = nnx.split(nnx.RNN(nnx_lstm(LSTM), return_carry=True, rngs=nnx.Rngs(0)))
    fn = last_carry(lambda p, x, **k: nnx.merge(graph, p)(x, **k), jnp.asarray(LENGTHS))
    return fn, {"rnn": state, "head": HEAD}


def padded_both_ways():
    return functools.partial(linen_both_ways, seq_lengths=jnp.asarray(LENGTHS)), BOTH_WAYS


@pytest.mark.parametrize(
    "build",
    [masked(jnp.where), masked(blend), padded_linen, padded_nnx, padded_both_ways],
    ids=["where", "blend", "linen", "nnx", "linen bidirectional"],
)
def test_padding_takes_nothing_and_changes_nothing(build, default_promotion):
    fn, params = build()
    explain = explained(fn)
    found = np.asarray(explain(params, X, 1e-3))
    assert (found[~VALID] == 0).all()
    for i, length in enumerate(LENGTHS):
        one, target = X[i : i + 1, :length], TARGETS[i : i + 1]
        if build is padded_both_ways:
            expected = published_both_ways(1e-3, x=one, targets=target)
        else:
            expected = published(lstm_reference, lstm_cell, LSTM, 1e-3, x=one, targets=target)
        assert_relevance(found[i : i + 1, :length], expected)
    other_padding = explain(params, np.where(VALID[..., None], X, 7.0), 1e-3)
    np.testing.assert_array_equal(np.asarray(other_padding)[VALID], found[VALID])


# Transformations.


def test_an_explained_scan_is_a_jax_function():
    fn, params, rules = written(lstm_cell), {"cell": LSTM, "head": HEAD}, rp.presets.lstm()
    every = jax.jit(rp.explain(fn, rules, target=TARGETS))

    def one(x, target):
        return rp.explain(fn, rules, target=target)(params, x[None])[0]

    assert_relevance(jax.jit(jax.vmap(one))(X, TARGETS), every(params, X))

    def objective(scale):
        return (every(params, scale * X) ** 2).sum()

    step = 1e-5
    difference = (objective(1.0 + step) - objective(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(objective))(1.0), difference, rtol=1e-7)
