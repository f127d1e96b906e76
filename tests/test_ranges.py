"""Interval analysis: whatever the arrays are, every value of a program lies within its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from relprop.jaxprs import open_program, read
from relprop.ranges import Ranges

rng = np.random.default_rng(0)
# Signed values with zeros, ties and large ones; a square array, so that axes can be mistaken for one another.
X = jnp.asarray(np.where(rng.random((5, 5)) < 0.2, 0.0, rng.normal(size=(5, 5)) * 3))
Y = jnp.asarray(rng.normal(size=(5, 5)))
SMALL, BYTES = jnp.asarray(rng.integers(-128, 127, (5,)), jnp.int8), jnp.asarray(rng.integers(0, 255, (5,)), jnp.uint8)
s = jax.nn.sigmoid

PROGRAMS = {
    "activations": lambda x, y: [
        f(x) for f in (jnp.tanh, s, jax.nn.relu6, jax.nn.softplus, jnp.abs, jnp.sin, jnp.sign, jnp.exp2)
    ],
    "sigmoids by hand": lambda x, y: (1 / (1 + jnp.exp(-x)), 0.5 * (jnp.tanh(x) + 1), jnp.clip(x / 6 + 0.5, 0.0, 1.0)),
    "powers": lambda x, y: (x**2, x**3, x**-2, jnp.abs(x) ** 0.5, s(x) ** 1.7, jnp.square(x) - 1, lax.rsqrt(s(x))),
    "logarithms": lambda x, y: (jnp.log(s(x)), jnp.log1p(x**2), jnp.expm1(-(x**2)), jnp.sqrt(x**2)),
    "products": lambda x, y: (
        x * x,
        s(x) * s(y),
        -s(x) * y**2,
        s(x) * (y + 3),
        x**2 * -s(y),
        jnp.prod(s(x)),
        jnp.cumprod(s(x)),
    ),
    "sums": lambda x, y: (
        (x**2).sum(0),
        (-s(x)).sum(),
        (x**2) @ s(y),
        -(x**2) @ s(y),
        jnp.cumsum(s(x)),
        x.max() + s(y).min(),
    ),
    "quotients": lambda x, y: (s(x) / (1 + y**2), x / (2 + s(y)), -s(x) / (1 + s(y)), x**2 / (y**2), 1 / (x - 0.5)),
    "shares": lambda x, y: (
        x**2 / (x**2).sum(-1, keepdims=True),
        s(x) / (s(x).sum() + 1),
        jnp.abs(x) / jnp.abs(x).sum(0)[:, None],
    ),
    "clamps": lambda x, y: (
        lax.clamp(-1.0, 2 + s(x), 0.5),
        lax.clamp(0.5, -s(x), 2.0),
        jnp.clip(x, -1.0, s(y)),
        jnp.maximum(x, 1.0),
    ),
    "rounding": lambda x, y: (jnp.round(jnp.clip(x, 0.0, 0.5)), jnp.floor(x), jnp.ceil(-s(x)), lax.round(s(x))),
    "casts": lambda x, y: ((s(x) * 0.3 + 0.2).astype(jnp.int32), (-1 - s(x)).astype(bool), (x > 0).astype(jnp.float64)),
    "integers": lambda x, y: (
        (1 - BYTES).astype(jnp.float64),
        SMALL + SMALL,
        SMALL**2,
        jnp.abs(SMALL),
        BYTES.astype(jnp.float64),
    ),
    "moving": lambda x, y: (
        jnp.pad(s(x), 1, constant_values=-2.0),
        jnp.concatenate([s(x), y]),
        jnp.stack([s(x), s(y)]),
        s(x)[1:, ::-1],
    ),
    "looking up": lambda x, y: (
        s(x).at[:, jnp.array([0, 9])].get(mode="fill", fill_value=-1.0),
        s(x)[jnp.array([0, 3])],
        lax.dynamic_update_slice(s(x), 5 * y, (0, 0)),
        s(x).at[0].apply(lambda v: v - 3),
        s(x).at[0].add(y[0]),
    ),
    "choosing": lambda x, y: (jnp.where(x > 0, s(x), -s(y)), jnp.sort(s(x)), *lax.top_k(s(x), 2), *lax.top_k(SMALL, 2)),
    "nothing": lambda x, y: (jnp.max(s(x)[:0], 0, initial=-jnp.inf), s(x)[:0].sum(0)),
    "softmax": lambda x, y: (
        jax.nn.softmax(x),
        jax.nn.log_softmax(x),
        jax.nn.logsumexp(x, 0),
        jax.nn.softmax(x, where=x > 0),
    ),
    "a decay": lambda x, y: jnp.exp(jax.nn.softplus(x) * -jnp.exp(y)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_value_lies_within_its_bounds(name):
    program = open_program(jax.make_jaxpr(PROGRAMS[name])(X, Y))
    ranges, env = Ranges(program.equations, {}), dict(zip(program.inputs, (X, Y), strict=True))
    for eqn in program.equations:
        env.update(zip(eqn.outputs, eqn.evaluate(*(read(env, v) for v in eqn.inputs)), strict=True))
        for value in eqn.outputs:
            low, high = ranges.of(value)
            array = np.asarray(env[value], np.float64)
            array = array[np.isfinite(array)]
            slack = 1e-12 * max(1.0, abs(array).max(initial=0.0))
            assert (array >= low - slack).all() and (array <= high + slack).all(), (eqn.name, low, high)  # noqa: PT018


def test_bounds_are_as_tight_as_gates_need():
    split = lambda x, y: jnp.split(s(x), 5)  # noqa: E731
    for fn in (PROGRAMS["sigmoids by hand"], PROGRAMS["a decay"], split):
        program = open_program(jax.make_jaxpr(fn)(X, Y))
        ranges = Ranges(program.equations, {})
        for value in program.outputs:
            low, high = ranges.of(value)
            assert low >= 0
            assert high <= 1
