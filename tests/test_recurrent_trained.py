"""Trained recurrent networks: relevance where the answer comes from, on real digits and where the answer is known."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recurrent import classify, linear_relevance, lstm_cell, lstm_reference, scanned, scanned_with_mask

import relprop as rp

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"

# A real network: an LSTM over the 28 rows of a digit, classified from all its states. See its README for the facts.


@functools.cache
def mnist():
    for name in ("mnist_lstm/weights.npz", "mnist/mnist_test.npz"):
        if not (DATA / name).exists():
            pytest.skip(f"no file {name} in ../shared/data")
    with np.load(DATA / "mnist_lstm" / "weights.npz") as stored:
        cell = {k: np.concatenate([stored[name + g].T for g in "ifgo"], -1) for k, name in (("wx", "W_"), ("wh", "R_"))}
        cell["b"] = np.concatenate([stored[f"b_{g}"] for g in "ifgo"])
        params = {"cell": cell, "head": {"w": stored["dense_W"].T, "b": stored["dense_b"]}}
    with np.load(DATA / "mnist" / "mnist_test.npz") as stored:
        return params, stored["x"].astype(np.float32) / np.float32(255), stored["y"]


def mnist_logits(params, x):
    states = scanned(lstm_cell, params["cell"], x)
    return classify(params["head"], states.reshape(x.shape[0], -1))


MNIST_LOGITS = jax.jit(mnist_logits)
MNIST_EXPLAINED = jax.jit(rp.explain(mnist_logits, rp.presets.lstm(), target="top"))


def shuffled(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: rng.permutation(p.ravel()).reshape(p.shape), params)


def row_correlation(a, b, ink):
    """The correlation of two values per row over the rows with ink of a digit, averaged over digits."""
    return np.mean([np.corrcoef(a[i, rows], b[i, rows])[0, 1] for i, rows in enumerate(ink)])


def test_the_trained_lstm_reaches_its_accuracy():
    params, x, y = mnist()
    assert np.mean(np.argmax(np.asarray(MNIST_LOGITS(params, x)), -1) == y) == 0.9853


def test_the_trained_lstm_has_the_published_relevance():
    params, x, _ = mnist()
    params = jax.tree.map(lambda p: p.astype(np.float64), params)
    digit = x[:1].astype(np.float64)
    found = MNIST_EXPLAINED(params, digit)
    states = np.asarray(scanned(lstm_cell, params["cell"], digit))[0]
    logits = np.asarray(mnist_logits(params, digit))[0]
    top = logits * np.eye(10)[logits.argmax()]
    at_states = linear_relevance(states.ravel(), params["head"]["w"], params["head"]["b"], top, 1e-3)
    expected, _ = lstm_reference(params["cell"], digit[0], at_states.reshape(states.shape), 1e-3)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_the_relevance_of_a_digit_lies_on_its_rows():
    """Rows without ink have none, though the classifier reads the states there; what the rows have adds up to the logit.

    The gradient times the input, which is 0 on empty rows, too, adds up to a quarter of it.
    """
    params, x, _ = mnist()
    x = x[:500]
    ink = x.sum(2) > 0
    logits = np.asarray(MNIST_LOGITS(params, x))
    found = np.asarray(MNIST_EXPLAINED(params, x))
    assert (found[~ink] == 0).all()

    def at_states(states):
        return classify(params["head"], states.reshape(states.shape[0], -1))

    states = jax.jit(functools.partial(scanned, lstm_cell))(params["cell"], x)
    of_states = np.asarray(rp.explain(at_states, rp.Epsilon(1e-3), target="top")(states)).sum(2)
    assert np.mean((of_states * ~ink).sum(1) / logits.max(1)) > 0.05
    kept = found.sum((1, 2)) / logits.max(1)
    assert 0.85 < np.median(kept) < 1.0
    gradient = jax.grad(lambda x: mnist_logits(params, x).max(1).sum())(x)
    assert np.median((x * gradient).sum((1, 2)) / logits.max(1)) < 0.4


def test_relevant_rows_are_those_that_the_network_needs():
    params, x, _ = mnist()
    x = x[:500]
    count = np.arange(len(x))
    ink = x.sum(2) > 0
    top = np.asarray(MNIST_LOGITS(params, x))
    predicted, score = top.argmax(1), top.max(1)
    without = []
    for row in range(28):
        blank = x.copy()
        blank[:, row] = 0
        without.append(score - np.asarray(MNIST_LOGITS(params, blank))[count, predicted])
    drop = np.stack(without, 1)

    def still_right(values):
        """The share of decisions that survive the removal of the four rows with the largest values."""
        order = np.argsort(-np.where(ink, values, -np.inf), 1)
        blank = x.copy()
        blank[count[:, None], order[:, :4]] = 0
        return np.mean(np.asarray(MNIST_LOGITS(params, blank)).argmax(1) == predicted)

    rows = np.asarray(MNIST_EXPLAINED(params, x)).sum(2)
    control = np.asarray(MNIST_EXPLAINED(shuffled(params), x)).sum(2)
    assert row_correlation(rows, drop, ink) > 0.5
    assert abs(row_correlation(control, drop, ink)) < 0.1
    assert still_right(rows) < 0.7 < still_right(control) < still_right(-rows)
    assert still_right(-rows) > 0.9


# A network whose answer is known, after Arras et al. 2019, "Evaluating recurrent neural network explanations": an LSTM with
# one memory cell and a readout without bias adds or subtracts two numbers of a sequence. A step is (n, 0, 0), and at two
# random positions (0, a, 0) and, later, (0, 0, b). What a and b contribute is a and +-b.


def arithmetic(seed, count, sign, longest=10):
    """Sequences of 4 to 10 steps, padded; which steps are valid; where a and b are; and their contributions."""
    rng = np.random.default_rng(seed)
    numbers = rng.uniform(0.5, 1.0, (count, longest)) * rng.choice([-1.0, 1.0], (count, longest))
    valid = np.arange(longest) < rng.integers(4, longest + 1, (count, 1))
    marked = np.sort(np.argsort(np.where(valid, rng.random(valid.shape), 2.0), 1)[:, :2], 1)
    role = np.zeros((count, longest), int)
    np.put_along_axis(role, marked, np.array([[1, 2]]), 1)
    x = np.where(role[..., None] == np.arange(3), numbers[..., None], 0.0)
    return x, valid, marked, np.take_along_axis(numbers, marked, 1) * np.array([1.0, sign])


def answer(params, x, valid):
    return (scanned_with_mask(lstm_cell, params["cell"], x, valid)[:, -1] @ params["readout"])[:, 0]


@functools.cache
def trained(sign, steps=3000, batch=256):
    x, valid, _, contributions = (jnp.asarray(v) for v in arithmetic(0, 5000, sign))
    rng = np.random.default_rng(0)
    wx, wh, readout = (jnp.asarray(rng.uniform(-1.0, 1.0, shape)) for shape in ((3, 4), (1, 4), (1, 1)))
    params = {"cell": {"wx": wx, "wh": wh, "b": jnp.zeros(4)}, "readout": readout}
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, steps))

    def loss(params, chosen):
        return ((answer(params, x[chosen], valid[chosen]) - contributions[chosen].sum(1)) ** 2).mean()

    def step(state, key):
        params, moments = state
        gradient = jax.grad(loss)(params, jax.random.randint(key, (batch,), 0, len(x)))
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), None

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.jit(lambda state: jax.lax.scan(step, state, keys)[0][0])((params, optimizer.init(params)))


@pytest.mark.parametrize("sign", [1, -1], ids=["addition", "subtraction"])
def test_relevance_is_the_contribution_of_a_number(sign, default_promotion):
    params = trained(sign)
    x, valid, marked, contributions = arithmetic(1, 1000, sign)

    def measure(rules):
        """Correlation with the contribution, for a and b, and the share of relevance on any other step."""
        explain = jax.jit(lambda params, x, valid: rp.explain(answer, rules, argnums=1)(params, x, valid))
        relevance = np.asarray(explain(params, x, valid)).sum(-1)
        found = np.take_along_axis(relevance, marked, 1)
        correlations = [np.corrcoef(found[:, k], contributions[:, k])[0, 1] for k in (0, 1)]
        return found, correlations, 1 - np.abs(found).sum() / np.abs(relevance).sum()

    predicted = np.asarray(jax.jit(answer)(params, x, valid))
    assert np.mean((predicted - contributions.sum(1)) ** 2) < 1e-3
    found, correlations, elsewhere = measure(rp.presets.lstm())
    assert min(correlations) >= 0.95
    assert np.abs(found - contributions).mean() < 0.1
    assert elsewhere < 0.01
    _, halved, _ = measure([("product", rp.Uniform()), ("affine", rp.Epsilon(1e-3))])
    assert min(halved) < 0.9
