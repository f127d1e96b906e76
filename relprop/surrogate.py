"""The change of linearisation: functions with the value of one thing and the tangent of another.

Nothing here uses `stop_gradient` or `custom_vjp`: a ratio is constant only in the linearisation that carries
relevance, and derivatives *of* an explanation see its true dependence on inputs and parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_jvp
def with_tangent(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """Return `value`, and let tangents through as if it were `surrogate` (same shape and dtype)."""
    return value


@with_tangent.defjvp
def _with_tangent_jvp(primals, tangents):
    return primals[0], tangents[1]


@jax.custom_jvp
def scale_tangent(z: jax.Array, ratio: jax.Array) -> jax.Array:
    """Return `z`, whose tangent is `ratio * dz`.

    `ratio` has the shape of `z` and may be of a wider dtype (float32 for a bfloat16 `z`): the product is taken in
    the wider dtype and cast back.
    """
    return z


@scale_tangent.defjvp
def _scale_tangent_jvp(primals, tangents):
    z, ratio = primals
    return z, (ratio * tangents[0].astype(ratio.dtype)).astype(z.dtype)


@jax.custom_jvp
def from_relative(value: jax.Array, relative: jax.Array) -> jax.Array:
    """Return `value`, whose tangent is `value * d(relative)`.

    The bridge from relative space to coefficients: `relative` is the `r` of `value * (1 + r)`, 0 everywhere, and its
    cotangent is the relevance of `value`.
    """
    return value


@from_relative.defjvp
def _from_relative_jvp(primals, tangents):
    value = primals[0]
    return value, (widen(value) * tangents[1].astype(wide_dtype(value))).astype(value.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def held(f: Callable[[Any, Any], jax.Array], constant: Any, x: Any) -> jax.Array:
    """Return `f(constant, x)`, whose tangent is that in `x` alone.

    `f` must be a function of its two arguments only. What is held constant costs nothing in the pass backwards.
    """
    return f(constant, x)


@held.defjvp
def _held_jvp(f, primals, tangents):
    constant, x = primals
    return jax.jvp(lambda moving: f(constant, moving), (x,), (tangents[1],))


def wide_dtype(z: Any) -> Any:
    """The dtype in which ratios of `z` are kept: float32 for half precision, else that of `z`."""
    return jnp.float32 if jnp.finfo(z.dtype).bits < 32 else z.dtype


def widen(z: jax.Array) -> jax.Array:
    """Cast half precision to float32, leave everything else."""
    return z.astype(wide_dtype(z))


def stabilize(z: jax.Array, epsilon=1e-6) -> jax.Array:
    """`z + epsilon * sign(z)` with `sign(0) = +1`, so that the result is at least `epsilon` away from 0."""
    return z + stabilizer(z, epsilon)


def stabilizer(z: jax.Array, epsilon: Any) -> jax.Array:
    """`epsilon * sign(z)` with `sign(0) = +1`."""
    epsilon = jnp.asarray(epsilon, z.dtype)
    return jnp.where(z < 0, -epsilon, epsilon)


def in_proportion(total: jax.Array, z: jax.Array, epsilon: Any, share: Any = 1.0, empty: float = 0.0) -> jax.Array:
    """A surrogate that shares relevance in proportion to the summands of `total`: `c_in = share c z / s(total)`.

    The stabiliser is a summand too: its relevance is what it absorbs. Where the denominator is exactly 0 the ratio is
    `empty`; where only the total is, nothing contributes, and `z / epsilon` would overflow in narrow dtypes: it is 0.
    """
    stable = stabilize(widen(total), epsilon)
    z = widen(z)
    overflows = (total == 0) & (jnp.abs(z) > jnp.abs(stable)) & (stable != 0)
    ratio = quotient(jnp.where(overflows, jnp.zeros_like(z), z), stable, empty=empty)
    return scale_tangent(stable.astype(total.dtype), jnp.asarray(share, ratio.dtype) * ratio)


def quotient(a: jax.Array, b: jax.Array, empty=0.0) -> jax.Array:
    """`a / b` in at least float32, and `empty` wherever `b` is exactly 0; safe to differentiate there."""
    a, b = widen(a), widen(b)
    zero = b == 0
    # The division comes last: a compiler that keeps its result for later then needs nothing else.
    return jnp.where(zero, jnp.asarray(empty, a.dtype), a) / jnp.where(zero, jnp.ones_like(b), b)


def reciprocal(denominator: jax.Array) -> jax.Array:
    """`1 / denominator`, and 0 where it is 0: there is nothing to share among."""
    return quotient(jnp.ones_like(denominator), denominator)


def secant(f, x: jax.Array, y: jax.Array) -> jax.Array:
    """The slope `(f(x) - f(0)) / x` of an elementwise `f` with `y = f(x)`, in at least float32.

    Close to 0 the quotient would cancel; the derivative halfway to 0, which agrees with it to second order, stands in
    for it. At exactly 0 it is the derivative from the left, as `jax.nn` has it for relu. Where `f(0)` is not finite
    (log, 1/x) it counts as 0: the slope is then `y / x`. Where x or y is infinite (a mask) it is the derivative, and a
    derivative that is not finite counts as 0 there and at 0, where nothing is handed on anyway.
    """
    eps = float(jnp.finfo(x.dtype).eps)
    at_zero = f(jnp.zeros_like(x))
    at_zero = jnp.where(jnp.isfinite(at_zero), at_zero, jnp.zeros_like(at_zero))
    rise = y - at_zero
    near, size = jnp.abs(x) < eps ** (1 / 3), jnp.abs(x)
    outside = jnp.isinf(x) | jnp.isinf(y)
    derived = outside | (size < eps**0.5) | (near & (jnp.abs(rise) < eps ** (1 / 3) * jnp.abs(at_zero)))
    point = jnp.where(outside, x, jnp.where(x == 0, jnp.full_like(x, -float(jnp.finfo(x.dtype).tiny)), x / 2))
    _, derivative = jax.jvp(f, (point,), (jnp.ones_like(x),))
    void = ((x == 0) | outside) & ~jnp.isfinite(derivative)
    derivative = jnp.where(void, jnp.zeros_like(derivative), derivative)
    # The division comes last, as in `quotient`.
    rise = jnp.where(derived, widen(derivative), widen(rise))
    return rise / jnp.where(derived, jnp.ones_like(x), x).astype(rise.dtype)


def along_rays(f, x: jax.Array, one: jax.Array) -> jax.Array:
    """The surrogate of an elementwise `f` that is linear along rays from 0: its slope, from the left at 0.

    `f` is asked at `one` and `-one` alone, arrays of ones with the shape of `x` or, for an `f` without arrays of its own,
    scalars. What is kept for the way back is then a choice, not a number, for each element.
    """
    up, down = f(one), -f(-one)
    moved = x.astype(up.dtype)
    return jnp.where(x > 0, up * moved, down * moved)
