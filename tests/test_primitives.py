"""Every differentiable primitive of JAX has a decision; the unknown is refused with its line and two ways out."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import relprop as rp
from relprop import jaxprs, primitives

X = jnp.array([[4.0, 1.0], [1.0, 3.0]])
V = jnp.array([0.5, -1.0, 2.0, 3.0])


def test_every_differentiable_primitive_is_decided():
    # In a process of its own: other packages add primitives when they are imported.
    script = "from jax.interpreters import ad; import jax; print(*(p.name for p in ad.primitive_jvps))"
    listed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert len(listed) > 150
    assert set(listed) - primitives.KNOWN - set(jaxprs._OPENED) == set()


def test_the_decisions_do_not_contradict_one_another():
    for refused in primitives.REFUSED:
        assert refused not in primitives.ELEMENTWISE | primitives.STRUCTURAL | set(primitives.MIXING)
    assert not primitives.DISCRETE & (primitives.STRUCTURAL | primitives.NONLINEAR)


REFUSED = {
    "cholesky": lambda x: jnp.linalg.cholesky(x),
    "eigh": lambda x: jnp.linalg.eigh(x)[0],
    "lu": lambda x: jax.scipy.linalg.lu(x)[1],
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x),
    "scatter-mul": lambda x: x.at[0].multiply(x[1]),
    "pure_callback": lambda x: jax.pure_callback(lambda v: np.asarray(v), jax.ShapeDtypeStruct(x.shape, x.dtype), x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_primitive_is_named_with_file_line_reason_and_ways_out(name):
    with pytest.raises(rp.UnknownPrimitiveError) as error:
        rp.plan(REFUSED[name], None)(X)
    message = str(error.value)
    for part in (f"'{name}'", "test_primitives.py:", f"register('{name}')", "fallback='gradient'"):
        assert part in message
    assert isinstance(error.value, NotImplementedError)
    assert isinstance(error.value, rp.RelpropError)


def test_fallback_uses_the_derivative():
    def fn(x):
        return jnp.linalg.cholesky(x).sum()

    expected = X * jax.grad(fn)(X)
    np.testing.assert_allclose(rp.explain(fn, None, fallback="gradient")(X), expected, rtol=1e-9)
    with pytest.raises(rp.ArgumentError, match="fallback must be None or 'gradient', got 'zero'"):
        rp.explain(fn, None, fallback="zero")(X)


@pytest.fixture
def registry():
    from relprop.registry import REGISTERED

    yield REGISTERED
    REGISTERED.clear()


def test_a_registered_linearisation_is_used_everywhere(registry):
    @rp.register("cumlogsumexp")
    def passing(bind, x):
        y = bind(x)
        return rp.with_tangent(y, rp.scale_tangent(x, y / x))

    def fn(x):
        return 2.0 * lax.cumlogsumexp(x, axis=0)

    np.testing.assert_allclose(rp.explain(fn, None)(V), fn(V), rtol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.vmap(rp.explain(fn, None)))(V[None])[0], fn(V), rtol=1e-9)


def test_a_primitive_may_be_registered_by_its_handle_and_takes_precedence(registry):
    rp.register(lax.tanh_p)(lambda bind, x: rp.with_tangent(bind(x), 0.5 * x))
    np.testing.assert_allclose(rp.explain(jnp.tanh, None)(V), 0.5 * V)
    with pytest.raises(rp.ArgumentError, match="name of a primitive"):
        rp.register(3)


CONSERVING = {
    "reshape, transpose": lambda x: x.reshape(1, 4).T,
    "slice": lambda x: lax.slice(x, (0, 0), (1, 2)),
    "dynamic slice": lambda x: lax.dynamic_slice(x, (jnp.array(1), jnp.array(0)), (1, 2)),
    "dynamic update": lambda x: lax.dynamic_update_slice(x, 2.0 * x[:1], (1, 0)),
    "gather": lambda x: x[jnp.array([0, 0, 1]), jnp.array([1, 1, 0])],
    "scatter": lambda x: jnp.zeros((3, 2)).at[jnp.array([0, 2])].set(x),
    "scatter add": lambda x: jnp.zeros((3, 2)).at[jnp.array([1, 1])].add(x),
    "segment sum": lambda x: jax.ops.segment_sum(x, jnp.array([0, 0]), 1),
    "sort": lambda x: jnp.sort(x, 0),
    "sort with values": lambda x: lax.sort((x[0], x[1]), num_keys=1)[1],
    "top k": lambda x: lax.top_k(x, 1)[0],
    "cumulative sum": lambda x: jnp.cumsum(x, 1),
    "cumulative max": lambda x: lax.cummax(x, 1),
    "cumulative product": lambda x: jnp.cumprod(x, 1),
    "product": lambda x: x.prod(),
    "min": lambda x: x.min(0),
    "maximum of two": lambda x: jnp.maximum(x[0], x[1]),
    "select": lambda x: jnp.where(x[:1] > 2.0, x[1:], x[:1]),
    "stack": lambda x: jnp.stack([x, 2.0 * x]),
    "split": lambda x: jnp.split(x, 2, 1)[1],
    "flip, roll": lambda x: jnp.roll(x[:, ::-1], 1, 0),
    "pad": lambda x: jnp.pad(x, 1, mode="reflect"),
    "tile, repeat": lambda x: jnp.repeat(jnp.tile(x, (2, 1)), 2, 1),
    "clip to a constant": lambda x: jnp.clip(x, 0.0, 2.0),
    "subtraction": lambda x: x[0] - x[1],
    "division by a constant": lambda x: x / 3.0,
    "triangular solve": lambda x: jax.scipy.linalg.solve_triangular(jnp.array([[2.0, 0.0], [1.0, 3.0]]), x, lower=True),
    "fourier transform and back": lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * 2.0, 2),
    "magnitude of a spectrum": lambda x: jnp.abs(jnp.fft.fft(x)),
    "resize": lambda x: jax.image.resize(x, (4, 4), "linear"),
    "convolution by a filter": lambda x: jnp.convolve(x[0], jnp.array([1.0, -2.0])),
    "norm": lambda x: jnp.linalg.norm(x, axis=1),
    "complex parts": lambda x: jnp.real(lax.complex(x, x) * jnp.asarray(2.0 - 1.0j)),
    "reduce precision": lambda x: lax.reduce_precision(x, 8, 7),
    "optimization barrier": lambda x: lax.optimization_barrier(x),
    "square of a sum": lambda x: jnp.square(x.sum()),
}


@pytest.mark.parametrize("name", CONSERVING)
def test_structural_primitives_conserve(name):
    fn = CONSERVING[name]
    relevance = rp.explain(fn, None)(X)
    np.testing.assert_allclose(relevance.sum(), fn(X).sum(), rtol=1e-9)
    np.testing.assert_allclose(jax.jit(rp.explain(fn, None))(X), relevance, rtol=1e-9, atol=1e-12)


def test_relative_tangents_go_through_structure_too():
    """Flat above a structural part: relevance is spread over the features, then moved; nothing is lost."""
    w = jnp.ones((4, 1))
    moves = {k: CONSERVING[k] for k in ("reshape, transpose", "gather", "sort", "pad", "tile, repeat", "min", "resize")}
    for name, move in moves.items():

        def fn(x, move=move):
            features = move(x).reshape(1, -1)
            return features @ jnp.resize(w, (features.shape[1], 1))

        relevance = rp.explain(fn, rp.Flat())(X)
        np.testing.assert_allclose(relevance.sum(), fn(X).sum(), rtol=1e-9, err_msg=name)


def test_stop_gradient_and_discrete_values_carry_no_relevance():
    def fn(x):
        mask = (x > 2.0).astype(x.dtype)
        return x * mask + lax.stop_gradient(100.0 * x) + jnp.floor(x) + jnp.argmax(x).astype(x.dtype)

    expected = X * (X > 2.0).astype(X.dtype) + jnp.floor(X)  # a step function has a secant, if no derivative
    np.testing.assert_allclose(rp.explain(fn, None)(X), expected, rtol=1e-9)


def test_masks_of_minus_infinity_hand_on_nothing_and_break_nothing():
    mask = jnp.array([[True, False], [True, True]])
    finite, infinite = (lambda x, v=v: jax.nn.softmax(jnp.where(mask, x, v)) @ V[:2] for v in (-1e30, -jnp.inf))
    added = lambda x: jax.nn.softmax(x + jnp.where(mask, 0.0, -jnp.inf)) @ V[:2]  # noqa: E731
    expected = rp.explain(finite, rp.Epsilon())(X)
    for fn in (infinite, added):
        np.testing.assert_allclose(rp.explain(fn, rp.Epsilon())(X), expected, rtol=1e-9, atol=1e-12)
