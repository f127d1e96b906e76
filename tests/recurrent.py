"""Recurrent networks written in several ways, and slow references for their relevance, by the published formulas.

One set of weights serves all writings of a network: a dict of `wx` (inputs, gates * units), `wh` (units, gates * units) and
`b` (gates * units), gates side by side: i, f, g, o for an LSTM; r, z, n for a GRU, which has a bias `u` (units,) at its
recurrent n, too; one group for a simple cell. A classifier is a dict of `w` and `b`. Sequences are (batch, time, features).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

# The reference: Arras et al. 2017, "Explaining recurrent neural network predictions in sentiment analysis", one example at a
# time, one contribution at a time.


def sign(z):
    return 1.0 if z >= 0 else -1.0


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def linear_relevance(inputs, weights, bias, relevance, epsilon, distribute=False):
    """Section 3.1, "weighted connections": R_ij = (z_i w_ij + delta (b_j + eps sign z_j) / N) / (z_j + eps sign z_j) R_j."""
    units, outputs = weights.shape
    result = np.zeros(units)
    for j in range(outputs):
        z = sum(inputs[i] * weights[i, j] for i in range(units)) + bias[j]
        stabiliser = epsilon * sign(z)
        shared_out = (bias[j] + stabiliser) / units if distribute else 0.0
        for i in range(units):
            result[i] += (inputs[i] * weights[i, j] + shared_out) / (z + stabiliser) * relevance[j]
    return result


def sum_relevance(parts, relevance, epsilon):
    """A sum of several values, unit by unit: a linear layer with weights of 1."""
    results = [np.zeros(len(relevance)) for _ in parts]
    for j in range(len(relevance)):
        z = sum(part[j] for part in parts)
        for part, result in zip(parts, results, strict=True):
            result[j] = part[j] / (z + epsilon * sign(z)) * relevance[j]
    return results


def lstm_reference(cell, x, relevance, epsilon, distribute=False, accumulator=0.0):
    """Relevance (time, features) of the inputs, and (units,) of the first h, from `relevance` (time, units) of every h.

    Gates take nothing; tanh passes relevance on; `accumulator` is the stabiliser of `c = f c + i g`.
    """
    steps, features = x.shape
    units = cell["wh"].shape[0]
    weights = np.concatenate([cell["wx"], cell["wh"]])
    h, c = np.zeros(units), np.zeros(units)
    trace = []
    for t in range(steps):
        below = np.concatenate([x[t], h])
        i, f, g, o = np.split(below @ weights + cell["b"], 4)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        trace.append((below, f * c, i * g))
        c = f * c + i * g
        h = o * np.tanh(c)
    result = np.zeros(x.shape)
    of_h, of_c = np.zeros(units), np.zeros(units)
    candidate = slice(2 * units, 3 * units)
    for t in reversed(range(steps)):
        below, kept, added = trace[t]
        of_c = of_c + of_h + relevance[t]
        of_c, of_g = sum_relevance((kept, added), of_c, accumulator)
        of_below = linear_relevance(below, weights[:, candidate], cell["b"][candidate], of_g, epsilon, distribute)
        result[t], of_h = of_below[:features], of_below[features:]
    return result, of_h


def gru_reference(cell, x, relevance, epsilon):
    """As `lstm_reference`, for `n = tanh(x W + b + r (h U + u))`, `h = (1 - z) n + z h` with the gates r and z.

    With r held constant what the tanh is taken of is one linear layer, of weights W and U r and the bias b + r u.
    """
    units = cell["wh"].shape[0]
    h = np.zeros(units)
    candidate = slice(2 * units, 3 * units)
    trace = []
    for t in range(len(x)):
        r, z, _ = np.split(x[t] @ cell["wx"] + h @ cell["wh"] + cell["b"], 3)
        r, z = sigmoid(r), sigmoid(z)
        weights = np.concatenate([cell["wx"][:, candidate], cell["wh"][:, candidate] * r])
        bias = cell["b"][candidate] + r * cell["u"]
        below = np.concatenate([x[t], h])
        n = np.tanh(below @ weights + bias)
        trace.append((below, weights, bias, (1 - z) * n, z * h))
        h = (1 - z) * n + z * h
    result = np.zeros(x.shape)
    of_h = np.zeros(units)
    for t in reversed(range(len(x))):
        below, weights, bias, added, kept = trace[t]
        of_n, of_kept = sum_relevance((added, kept), of_h + relevance[t], 0.0)
        of_below = linear_relevance(below, weights, bias, of_n, epsilon)
        result[t], of_h = of_below[: x.shape[1]], of_kept + of_below[x.shape[1] :]
    return result, of_h


def simple_reference(cell, x, relevance, epsilon, distribute=False):
    """As `lstm_reference`, for `h = tanh(x W + h U + b)`."""
    features, units = cell["wx"].shape
    weights = np.concatenate([cell["wx"], cell["wh"]])
    h = np.zeros(units)
    trace = []
    for t in range(len(x)):
        trace.append(np.concatenate([x[t], h]))
        h = np.tanh(trace[t] @ weights + cell["b"])
    result = np.zeros(x.shape)
    of_h = np.zeros(units)
    for t in reversed(range(len(x))):
        of_below = linear_relevance(trace[t], weights, cell["b"], of_h + relevance[t], epsilon, distribute)
        result[t], of_h = of_below[:features], of_below[features:]
    return result, of_h


def last_state_relevance(reference, cell, head, states, x, target, epsilon, **options):
    """One example (time, features) classified by `head` from the last of `states` (time, units)."""
    relevance = np.zeros(states.shape)
    one_hot = np.eye(head["w"].shape[1])[target]
    output = (states[-1] @ head["w"] + head["b"]) * one_hot
    distribute = options.get("distribute", False)
    relevance[-1] = linear_relevance(states[-1], head["w"], head["b"], output, epsilon, distribute)
    return reference(cell, x, relevance, epsilon, **options)[0]


def bidirectional_relevance(cells, head, states, x, target, epsilon, **options):
    """Two LSTMs, one of them reading backwards, classified by `head` from both last states side by side."""
    last = np.concatenate([s[-1] for s in states])
    output = (last @ head["w"] + head["b"]) * np.eye(head["w"].shape[1])[target]
    of_last = linear_relevance(last, head["w"], head["b"], output, epsilon, options.get("distribute", False))
    result = np.zeros(x.shape)
    for cell, direction, share in zip(cells, (1, -1), np.split(of_last, 2), strict=True):
        relevance = np.zeros((len(x), len(share)))
        relevance[-1] = share
        result += lstm_reference(cell, x[::direction], relevance, epsilon, **options)[0][::direction]
    return result


# The models.


def random_cell(seed, features, units, gates=4, scale=1.0):
    """Weights of a cell, biases included, large enough for gates to differ."""
    rng = np.random.default_rng(seed)
    shapes = {"wx": (features, gates * units), "wh": (units, gates * units), "b": (gates * units,)}
    if gates == 3:
        shapes["u"] = (units,)
    return {k: scale * rng.standard_normal(shape) for k, shape in shapes.items()}


def random_head(seed, units, classes):
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((units, classes)), "b": rng.standard_normal(classes)}


def classify(head, h):
    return h @ head["w"] + head["b"][None]


def lstm_cell(cell, state, x):
    h, c = state
    return _lstm_update(x @ cell["wx"] + h @ cell["wh"] + cell["b"][None], c)


def lstm_cell_concatenated(cell, state, x):
    """The same in one product, so that a bias can be shared out among inputs and states."""
    h, c = state
    weights = jnp.concatenate([cell["wx"], cell["wh"]])
    return _lstm_update(jnp.concatenate([x, h], -1) @ weights + cell["b"][None], c)


def _lstm_update(z, c):
    i, f, g, o = jnp.split(z, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def gru_cell(cell, state, x):
    (h,) = state
    units = h.shape[-1]
    from_x, from_h = x @ cell["wx"] + cell["b"][None], h @ cell["wh"]
    gates = jax.nn.sigmoid(from_x[:, : 2 * units] + from_h[:, : 2 * units])
    r, z = jnp.split(gates, 2, -1)
    n = jnp.tanh(from_x[:, 2 * units :] + r * (from_h[:, 2 * units :] + cell["u"][None]))
    h = (1 - z) * n + z * h
    return (h,), h


def simple_cell(cell, state, x):
    (h,) = state
    h = jnp.tanh(x @ cell["wx"] + h @ cell["wh"] + cell["b"][None])
    return (h,), h


CARRIES = {lstm_cell: 2, lstm_cell_concatenated: 2, gru_cell: 1, simple_cell: 1}


def first_state(step, cell, x):
    return (jnp.zeros((x.shape[0], cell["wh"].shape[0]), x.dtype),) * CARRIES[step]


def scanned(step, cell, x, reverse=False):
    """All states (batch, time, units), by `lax.scan`."""
    inputs = jnp.moveaxis(x, 1, 0)
    _, states = lax.scan(lambda state, x: step(cell, state, x), first_state(step, cell, x), inputs, reverse=reverse)
    return jnp.moveaxis(states, 0, 1)


def unrolled(step, cell, x, reverse=False):
    """All states (batch, time, units), by a loop of Python."""
    state, states = first_state(step, cell, x), []
    order = range(x.shape[1])
    for t in reversed(order) if reverse else order:
        state, h = step(cell, state, x[:, t])
        states.append(h)
    return jnp.stack(states[::-1] if reverse else states, 1)


def blend(mask, a, b):
    """`jnp.where` by arithmetic."""
    mask = mask.astype(a.dtype)
    return mask * a + (1 - mask) * b


def scanned_with_mask(step, cell, x, mask, pick=jnp.where):
    """All states (batch, time, units); where `mask` (batch, time) is False, the state stays as it is."""

    def masked(state, inputs):
        x, valid = inputs
        new, _ = step(cell, state, x)
        kept = tuple(pick(valid[:, None], a, b) for a, b in zip(new, state, strict=True))
        return kept, kept[0]

    _, states = lax.scan(masked, first_state(step, cell, x), (jnp.moveaxis(x, 1, 0), mask.T))
    return jnp.moveaxis(states, 0, 1)


# The same cells in flax: modules of this shape, and these weights in their parameters.

LINEN = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def _groups(cell, gates):
    return [dict(zip(gates, np.split(cell[k], len(gates), -1), strict=True)) for k in ("wx", "wh", "b")]


def linen_lstm_params(cell):
    """Parameters of `nn.LSTMCell` and `nn.OptimizedLSTMCell`."""
    wx, wh, b = _groups(cell, "ifgo")
    inputs = {f"i{k}": {"kernel": wx[k]} for k in wx}
    return inputs | {f"h{k}": {"kernel": wh[k], "bias": b[k]} for k in wh}


def linen_gru_params(cell):
    wx, wh, b = _groups(cell, "rzn")
    params = {f"i{k}": {"kernel": wx[k], "bias": b[k]} for k in wx} | {f"h{k}": {"kernel": wh[k]} for k in wh}
    return params | {"hn": {"kernel": wh["n"], "bias": cell["u"]}}


def linen_simple_params(cell):
    return {"i": {"kernel": cell["wx"], "bias": cell["b"]}, "h": {"kernel": cell["wh"]}}


def linen_model(module, params, head):
    """`(fn, params)`: the classifier on the last output of a linen `nn.RNN`."""
    return (
        lambda p, x, **options: classify(p["head"], module.apply({"params": p["rnn"]}, x, **options)[:, -1]),
        {"rnn": params, "head": head},
    )


def nnx_lstm(cell, kind=nnx.LSTMCell):
    features, units = cell["wx"].shape[0], cell["wh"].shape[0]
    module = kind(features, units, rngs=nnx.Rngs(0), **LINEN)
    if kind is nnx.OptimizedLSTMCell:
        module.dense_i.kernel[...] = cell["wx"]
        module.dense_h.kernel[...], module.dense_h.bias[...] = cell["wh"], cell["b"]
        return module
    wx, wh, b = _groups(cell, "ifgo")
    for k in "ifgo":
        getattr(module, "if_" if k == "f" else f"i{k}").kernel[...] = wx[k]
        recurrent = getattr(module, f"h{k}")
        recurrent.kernel[...], recurrent.bias[...] = wh[k], b[k]
    return module


def nnx_gru(cell):
    """nnx has no bias at the recurrent n: for cells whose `u` is 0."""
    module = nnx.GRUCell(cell["wx"].shape[0], cell["wh"].shape[0], rngs=nnx.Rngs(0), **LINEN)
    module.dense_i.kernel[...], module.dense_i.bias[...] = cell["wx"], cell["b"]
    module.dense_h.kernel[...] = cell["wh"]
    return module


def nnx_simple(cell):
    module = nnx.SimpleCell(cell["wx"].shape[0], cell["wh"].shape[0], rngs=nnx.Rngs(0), **LINEN)
    module.dense_i.kernel[...], module.dense_i.bias[...] = cell["wx"], cell["b"]
    module.dense_h.kernel[...] = cell["wh"]
    return module


def nnx_model(module, head):
    """`(fn, params)`: the classifier on the last output of an `nnx.RNN` around a cell."""
    graph, state = nnx.split(nnx.RNN(module, rngs=nnx.Rngs(0)))
    return (
        lambda p, x, **options: classify(p["head"], nnx.merge(graph, p["rnn"])(x, **options)[:, -1]),
        {"rnn": state, "head": head},
    )


class StackedLinen(nn.Module):
    """Two LSTMs, one on top of the other."""

    units: int

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.LSTMCell(self.units, **LINEN), name="lower")(x)
        return nn.RNN(nn.LSTMCell(self.units, **LINEN), name="upper")(x)


def conv_lstm_as_cell(params, shape):
    """The `cell` of an LSTM that does what `nn.ConvLSTMCell` with these `params` does to images of `shape`, flattened.

    flax orders its gates i, g, f, o and adds 1 to the f.
    """
    height, width, features = shape
    units = params["hh"]["kernel"].shape[2]

    def matrix(kernel, channels):
        basis = jnp.eye(height * width * channels).reshape(-1, height, width, channels)
        maps = lax.conv_general_dilated(basis, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        i, g, f, o = (m.reshape(len(basis), -1) for m in jnp.split(maps, 4, -1))
        return np.concatenate([i, f, g, o], -1)

    i, g, f, o = (np.tile(b, height * width) for b in np.split(np.asarray(params["ih"]["bias"] + params["hh"]["bias"]), 4))
    return {
        "wx": matrix(params["ih"]["kernel"], features),
        "wh": matrix(params["hh"]["kernel"], units),
        "b": np.concatenate([i, f + 1, g, o]),
    }
