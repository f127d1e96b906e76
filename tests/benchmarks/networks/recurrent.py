"""An LSTM over a sequence, by `jax.lax.scan`, that classifies from its last state.

`x W + h U + b` is one product of the inputs and the state side by side, gates i, f, g, o.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import relprop as rp

from .base import Problem, dense, normal, targets

CLASSES = 10


def cell(p, state, x):
    h, c = state
    i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ p["kernel"] + p["bias"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None


def lstm(params, x):
    """Logits (batch, classes) of sequences (batch, time, features)."""
    zeros = jnp.zeros((x.shape[0], params["head"]["kernel"].shape[0]), x.dtype)
    (h, _), _ = lax.scan(functools.partial(cell, params["cell"]), (zeros, zeros), jnp.moveaxis(x, 1, 0))
    return h @ params["head"]["kernel"] + params["head"]["bias"]


def build(short=False, batch=None):
    """`short`: 8 units, 6 steps."""
    time, features, units = (6, 5, 8) if short else (128, 256, 512)
    batch, rng = batch or (2 if short else 32), np.random.default_rng(0)
    params = {"cell": dense(rng, features + units, 4 * units, gain=1.5), "head": dense(rng, units, CLASSES)}
    x, target = normal(rng, batch, time, features), targets(rng, batch, CLASSES)
    return Problem("lstm", "recurrent", lstm, params, x, target, {"lstm": rp.presets.lstm}, None)


NETWORKS = {"lstm": build}
