"""Networks over time: recurrent cells of every library, and state space models by both kinds of scan."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from .base import conv, dense, from_equinox, from_nnx, linen, model, rms_norm, row, sample, weights

OPTIONS = {"param_dtype": jnp.float64}


class LastStep(nn.Module):
    """A stack of recurrent layers, and a dense layer on the last step (or on the mean over all)."""

    layers: tuple[nn.Module, ...]
    mean: bool = False

    @nn.compact
    def __call__(self, x, **options):
        for layer in self.layers:
            x = layer(x, **options)
        x = x.mean(tuple(range(1, x.ndim - 1))) if self.mean else x[:, -1]
        return nn.Dense(3, **OPTIONS)(x)


@model("recurrent", library="linen")
def simple_rnn_linen():
    return linen(LastStep((nn.RNN(nn.SimpleCell(5, **OPTIONS)),)), sample(2, 4, 3))


@model("recurrent", library="linen")
def lstm_linen():
    return linen(LastStep((nn.RNN(nn.LSTMCell(5, **OPTIONS)),)), sample(2, 4, 3))


@model("recurrent", library="linen")
def stacked_lstm_linen():
    cells = (nn.RNN(nn.OptimizedLSTMCell(5, **OPTIONS)), nn.RNN(nn.OptimizedLSTMCell(4, **OPTIONS)))
    return linen(LastStep(cells), sample(2, 4, 3))


@model("recurrent", library="linen")
def bidirectional_linen():
    both = nn.Bidirectional(nn.RNN(nn.LSTMCell(4, **OPTIONS)), nn.RNN(nn.LSTMCell(4, **OPTIONS)))
    return linen(LastStep((both,), mean=True), sample(2, 4, 3))


@model("recurrent", library="linen")
def gru_of_variable_length_linen():
    """Steps after the end of a sequence are masked by the library: the state of the last real one is kept."""
    cell = LastStep((nn.RNN(nn.GRUCell(5, **OPTIONS)),), mean=True)
    return linen(cell, sample(2, 5, 3), seq_lengths=jnp.array([5, 3]))


@model("recurrent", library="linen")
def conv_lstm_linen():
    layer = nn.RNN(nn.ConvLSTMCell(3, (3, 3), **OPTIONS))
    return linen(LastStep((layer,), mean=True), sample(1, 3, 4, 4, 2))


@model("recurrent", library="nnx")
def lstm_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            # The carry is drawn (as zeros) when the layer runs, in the parameters' dtype.
            cell = nnx.LSTMCell(3, 5, rngs=rngs, keep_rngs=False, **OPTIONS)
            self.rnn, self.out = nnx.RNN(cell), nnx.Linear(5, 3, rngs=rngs, **OPTIONS)

        def __call__(self, x):
            carry = (jnp.zeros((2, 5)), jnp.zeros((2, 5)))
            return self.out(self.rnn(x, initial_carry=carry)[:, -1])

    return from_nnx(Net, sample(2, 4, 3))


def equinox_rnn(cell, start):
    """An equinox cell scanned over one sequence, under vmap over the batch."""

    def make(key):
        return cell(3, 5, key=key), eqx.nn.Linear(5, 3, key=key)

    def call(layers, x):
        cell, out = layers

        def single(x):
            state, _ = lax.scan(lambda state, x: (cell(x, state), None), start, x)
            return out(state[0] if isinstance(state, tuple) else state)

        return jax.vmap(single)(x)

    return from_equinox(make, sample(2, 4, 3), call=call)


@model("recurrent", library="equinox")
def lstm_equinox():
    return equinox_rnn(eqx.nn.LSTMCell, (jnp.zeros(5), jnp.zeros(5)))


@model("recurrent", library="equinox")
def gru_equinox():
    return equinox_rnn(eqx.nn.GRUCell, jnp.zeros(5))


@model("recurrent")
def lstm_by_hand():
    params = weights(x=(3, 20), h=(5, 20), h_b=(20,), out=(5, 3), out_b=(3,))

    def fn(params, x):
        def step(state, x):
            h, c = state
            i, f, g, o = jnp.split(dense(params, x, "x") + dense(params, h, "h"), 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        (h, _), _ = lax.scan(step, (jnp.zeros((2, 5)), jnp.zeros((2, 5))), jnp.swapaxes(x, 0, 1))
        return dense(params, h, "out")

    return fn, params, sample(2, 4, 3)


@model("recurrent")
def lstm_with_masked_steps():
    params = weights(x=(3, 20), h=(5, 20), h_b=(20,), out=(5, 3))
    lengths = jnp.array([4, 2])

    def fn(params, x):
        def step(state, inputs):
            t, x = inputs
            h, c = state
            i, f, g, o = jnp.split(dense(params, x, "x") + dense(params, h, "h"), 4, -1)
            new = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            alive = (t < lengths)[:, None]
            state = jnp.where(alive, jax.nn.sigmoid(o) * jnp.tanh(new), h), jnp.where(alive, new, c)
            return state, state[0]

        start = (jnp.zeros((2, 5)), jnp.zeros((2, 5)))
        _, hs = lax.scan(step, start, (jnp.arange(4), jnp.swapaxes(x, 0, 1)))
        return dense(params, hs.sum(0) / lengths[:, None].astype(x.dtype), "out")

    return fn, params, sample(2, 4, 3)


@model("recurrent")
def reversed_fori_loop():
    """A loop with an index into the sequence, as `fori_loop` gives it, from its end to its start."""
    params = weights(x=(3, 5), x_b=(5,), h=(5, 5), out=(5, 3))

    def fn(params, x):
        def step(t, h):
            return jnp.tanh(
                dense(params, lax.dynamic_index_in_dim(x, 3 - t, 1, keepdims=False), "x") + dense(params, h, "h")
            )

        return dense(params, lax.fori_loop(0, 4, step, jnp.zeros((2, 5))), "out")

    return fn, params, sample(2, 4, 3)


def selective_state_space(scan):
    """Mamba's block: input-dependent step sizes, B and C; `scan(decay, drive)` runs h = decay h + drive. Gu, Dao 2023."""
    params = weights(
        up=(4, 12), conv=(2, 1, 6), conv_b=(6,), step=(6, 6), step_b=(6,), b=(6, 3), c=(6, 3), skip=(6,), rate=(6, 3),
        down=(6, 4), out=(4, 3),
    )  # fmt: skip

    def fn(params, x):
        u, z = jnp.split(dense(params, rms_norm(x), "up"), 2, -1)
        u = jax.nn.silu(conv(params, u, "conv", padding=((1, 0),), groups=6))
        dt = jax.nn.softplus(dense(params, u, "step"))[..., None]
        decay = jnp.exp(-dt * jnp.exp(params["rate"]).reshape(1, 1, 6, 3))
        drive = dt * dense(params, u, "b")[:, :, None] * u[..., None]
        states = scan(decay, drive)
        y = (states * dense(params, u, "c")[:, :, None]).sum(-1) + u * row(params["skip"], u)
        x = x + dense(params, y * jax.nn.silu(z), "down")
        return dense(params, x[:, -1], "out")

    return fn, params, sample(2, 5, 4)


@model("recurrent", "state space")
def mamba_by_scan():
    def scan(decay, drive):
        def step(h, inputs):
            h = inputs[0] * h + inputs[1]
            return h, h

        inputs = jnp.swapaxes(decay, 0, 1), jnp.swapaxes(drive, 0, 1)
        return jnp.swapaxes(lax.scan(step, jnp.zeros((2, 6, 3)), inputs)[1], 0, 1)

    return selective_state_space(scan)


@model("recurrent", "state space")
def mamba_by_associative_scan():
    def scan(decay, drive):
        def combine(a, b):
            return a[0] * b[0], b[0] * a[1] + b[1]

        return lax.associative_scan(combine, (decay, drive), axis=1)[1]

    return selective_state_space(scan)


@model("recurrent", "state space")
def gated_linear_attention():
    """S = gate_t S + k_t v_t^T, y = q_t S. Yang et al. 2024."""
    params = weights(q=(4, 3), k=(4, 3), v=(4, 4), gate=(4, 3), gate_b=(3,), out=(4, 3))

    def fn(params, x):
        q, k, v = (jnp.swapaxes(dense(params, x, name), 0, 1) for name in "qkv")
        gate = jnp.swapaxes(jax.nn.sigmoid(dense(params, x, "gate")), 0, 1)

        def step(state, inputs):
            q, k, v, gate = inputs
            state = gate[..., None] * state + k[..., None] * v[:, None]
            return state, jnp.einsum("bk,bkv->bv", q, state)

        _, ys = lax.scan(step, jnp.zeros((2, 3, 4)), (q, k, v, gate))
        return dense(params, ys.mean(0), "out")

    return fn, params, sample(2, 5, 4)


@model("recurrent")
def minimal_gru_by_associative_scan():
    """h = (1 - z_t) h + z_t candidate_t, with z and the candidate of the input alone. Feng et al. 2024."""
    params = weights(z=(3, 5), z_b=(5,), h=(3, 5), h_b=(5,), out=(5, 3))

    def fn(params, x):
        z = jax.nn.sigmoid(dense(params, x, "z"))

        def combine(a, b):
            return a[0] * b[0], b[0] * a[1] + b[1]

        _, h = lax.associative_scan(combine, (1 - z, z * jnp.tanh(dense(params, x, "h"))), axis=1)
        return dense(params, h[:, -1], "out")

    return fn, params, sample(2, 5, 3)
