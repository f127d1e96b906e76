"""Relevant subspaces of a layer: principal relevant components (PRCA) and disentangled subspaces (DRSA).

What a layer hands on is its activation `a`; how much each of its features counts is the coefficient `c`, and the
relevance that goes through the layer is `a . c`. An orthonormal basis U of some directions carries

    (U^T a) . (U^T c)  =  a . P c,    P = U U^T

of it, and subspaces that complete one another share it without a rest. PCA asks which directions vary; PRCA and DRSA
(Chormai, Herrmann, Müller, Montavon: Disentangled Explanations of Neural Network Predictions by Finding Relevant
Subspaces, TPAMI 2024, arXiv:2212.14855) ask which ones the decision uses.

Samples are pairs (a, c), of one class or of all. `relprop.relevances` collects them, and every axis but the last counts
samples: in a convolutional layer each position of each image is one, as in the paper. Neighbouring positions tell much
the same, so the paper draws a few per image at random (20 in its demonstration code).

A heatmap for each subspace conditions the explanation on its projector, in one `vmap`. The heatmaps of a complete set sum
to the heatmap of all; where it is not complete, `jnp.eye(d) - projectors.sum(0)` projects on the rest:

    a, c, _ = rp.relevances(fn, rules, at=layer, target=3)(params, images)[name]
    found = rp.concepts.drsa(a, c, 4, key=jax.random.key(0))
    heatmap = lambda P: rp.explain(fn, rules, target=3, conditions=[rp.condition(layer, lambda a: a @ P)])(params, image)
    heatmaps = jax.vmap(heatmap)(found.projectors)
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

from ..errors import ArgumentError


class Components(NamedTuple):
    """Directions that carry relevance, the most positive first; see `prca`.

    Attributes:
        basis: (features, components), orthonormal columns. Their signs are arbitrary; here the entry of largest
            magnitude is positive.
        relevance: (components,), the mean over samples of the relevance that each direction carries, in the units of
            `a * c`. Below zero where a direction speaks against on the whole.
    """

    basis: jax.Array
    relevance: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """What PRCA has to know of samples: the sum of a c^T and their number, in the memory of one matrix.

    A pytree, so that it is carried through `jax.lax.scan` and summed over devices (`jax.lax.psum`) like any other.

    Attributes:
        cross: (features, features), the sum of a c^T over the samples.
        count: how many there were; an integer.

    Example:
        >>> import jax
        >>> from relprop.concepts import Moments
        >>> a = jax.random.normal(jax.random.key(0), (3, 8, 5))  # three batches
        >>> moments, _ = jax.lax.scan(lambda m, batch: (m.update(batch, batch), None), Moments.zeros(5), a)
        >>> moments.components(2).basis.shape
        (5, 2)
    """

    cross: jax.Array
    count: jax.Array

    @classmethod
    def zeros(cls, features: int, dtype: Any = jnp.float32) -> "Moments":
        """Of no samples yet. `dtype` is that of the sums: float32 or float64."""
        return cls(jnp.zeros((features, features), dtype), jnp.zeros((), int))

    def update(self, activations: jax.Array, coefficients: jax.Array) -> "Moments":
        """With further samples, as `prca` takes them. None at all change nothing."""
        a, c = _samples(activations, coefficients)
        if a.shape[1] != len(self.cross):
            raise ArgumentError(
                f"The samples have {a.shape[1]} features, but these moments are of {len(self.cross)}: "
                "one Moments is for one layer."
            )
        dtype = self.cross.dtype
        cross = jnp.matmul(a.T, c, precision=Precision.HIGHEST, preferred_element_type=dtype)
        return Moments(self.cross + cross.astype(dtype), self.count + len(a))

    def components(self, components: int | None = None) -> Components:
        """The principal relevant components of all samples so far; see `prca`."""
        features = len(self.cross)
        components = features if components is None else components
        if not 1 <= components <= features:
            raise ArgumentError(
                f"components={components} has to be between 1 and the number of features, {features}: "
                "orthogonal directions cannot be more than that."
            )
        if not isinstance(self.count, jax.core.Tracer) and self.count == 0:
            raise ArgumentError("There are no samples: principal relevant components need one at least.")
        mean = self.cross / jnp.maximum(self.count, 1).astype(self.cross.dtype)
        relevance, basis = jnp.linalg.eigh((mean + mean.T) / 2, symmetrize_input=False)
        relevance, basis = relevance[::-1][:components], basis[:, ::-1][:, :components]
        largest = jnp.take_along_axis(basis, jnp.abs(basis).argmax(0)[None], 0)
        return Components(basis * jnp.where(largest < 0, -1, 1).astype(basis.dtype), relevance)


def prca(activations: jax.Array, coefficients: jax.Array, components: int | None = None) -> Components:
    """Principal relevant component analysis: the directions that carry most relevance on the mean.

    Among all subspaces of that dimension, the one that the `components` span has the largest mean relevance,
    E[(U^T a) . (U^T c)]: they are eigenvectors of the symmetric part of E[a c^T], those of the largest eigenvalues.
    The eigenvalue is the mean relevance of the direction (the paper's matrix, E[a c^T + c a^T], is twice that, and so
    are its eigenvalues). Over all directions they sum to the mean of `a . c`. N samples make at most N positive and N
    negative ones; directions beyond carry nothing and are arbitrary.

    For more samples than memory holds, `Moments` adds up batches. `jit` and `vmap` apply (over classes, say).

    Args:
        activations: (..., features), floating point; all axes but the last count samples.
        coefficients: of the same shape, relevance divided by activation.
        components: how many, between 1 and the number of features; by default all.

    Returns:
        `Components`: basis (features, components) and relevance (components,), in float32, or float64 where given that.

    Raises:
        ArgumentError: for shapes that differ, no samples, values that are not real and finite (looked at outside of
            `jit` only), `components` out of range.

    Source:
        Chormai et al. 2024, PRCA.

    Example:
        The first feature varies most, but the decision does not use it:

        >>> import jax.numpy as jnp
        >>> from relprop.concepts import prca
        >>> a = jnp.array([[9.0, 1.0], [-9.0, 3.0]])
        >>> c = jnp.array([[0.0, 2.0], [0.0, 2.0]])
        >>> found = prca(a, c, 1)
        >>> found.basis.T, found.relevance
        (Array([[0., 1.]], dtype=float32), Array([4.], dtype=float32))
    """
    a, c = _samples(activations, coefficients)
    return Moments.zeros(a.shape[1], a.dtype).update(a, c).components(components)


class Subspaces(NamedTuple):
    """Orthogonal subspaces, the one that carries most relevance first; see `drsa`.

    Attributes:
        basis: (subspaces, features, dimensions), orthonormal within a subspace and between them. A subspace is what is
            found: the directions inside it are arbitrary.
        relevance: (subspaces,), the mean over samples of the relevance that each carries, in the units of `a * c`.
        objective: (steps + 1,), what is maximised, before the first step and after each, in the units of `a * c`.
    """

    basis: jax.Array
    relevance: jax.Array
    objective: jax.Array

    @property
    def projectors(self) -> jax.Array:
        """(subspaces, features, features), the orthogonal projections U U^T; see `projector`."""
        return projector(self.basis)


def drsa(
    activations: jax.Array,
    coefficients: jax.Array,
    subspaces: int,
    dimensions: int | None = None,
    *,
    key: jax.Array,
    steps: int = 500,
    restarts: int = 3,
) -> Subspaces:
    """Disentangled relevant subspace analysis: orthogonal subspaces, each strongly relevant for some of the samples.

    With R_kn = (U_k^T a_n) . (U_k^T c_n), the relevance that subspace k carries in sample n, it maximises

        M_k^(1/2) M_n^2 max(0, R_kn)    where    M_i^p x_i = (mean_i x_i^p)^(1/p)

    under U^T U = I, U = (U_1 | ... | U_K). The mean over samples, of power 2, favours subspaces that few samples use much
    over ones that all use a little; the mean over subspaces, of power 1/2, favours that all of them are used. Gradient
    ascent from a random U, made orthonormal after each step, U <- U (U^T U)^(-1/2).

    The first step is that of the authors' code: of length 1, for vectors scaled to `a / (rms(a) features^(1/4))` and `c`
    alike, so that units do not matter. A step that would not raise the objective is not taken, and the next one is half
    as long; after one that was, 1.5 times as long. So the objective never falls, and it ends where the authors' steps of
    constant length end, in about a fifth of their number.

    The objective has many local maxima, and a start may end in a poor one: more `restarts` help. Rectified, noise of either
    sign counts as relevance, so subspaces are drawn to directions along which activations vary widely, used or not. Where
    no relevance is positive there is nothing to climb, and a random partition comes back with an objective of 0.

    `jit` (with static numbers) and `vmap` apply. Every step reads all samples, `restarts` times at once.

    Args:
        activations: (..., features), floating point; all axes but the last count samples.
        coefficients: of the same shape, relevance divided by activation.
        subspaces: how many, K.
        dimensions: of each; by default features / K, so that they complete the space.
        key: what the random U are drawn with; the same key, the same result.
        steps: of gradient ascent; 0 for random subspaces, to compare with.
        restarts: random U to start from; of their results the one of the largest objective is kept.

    Returns:
        `Subspaces`: basis (subspaces, features, dimensions), relevance, objective and projectors, in float32, or float64
        where given that. Subspaces are in the order of their mean relevance.

    Raises:
        ArgumentError: for shapes that differ, no samples, values that are not real and finite (looked at outside of
            `jit` only), more directions than features, numbers that are too small.

    Source:
        Chormai et al. 2024, DRSA; the scale and the length of steps from their code, github.com/p16i/drsa-demo.

    Example:
        Each sample uses one pair of four features, and the pairs are found:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from relprop.concepts import drsa
        >>> pairs = jnp.repeat(jnp.eye(2), 2, axis=1)  # [[1, 1, 0, 0], [0, 0, 1, 1]]
        >>> a = jax.random.normal(jax.random.key(0), (50, 2, 4)) * pairs
        >>> found = drsa(a, a, 2, key=jax.random.key(1))
        >>> abs(found.projectors).round(2)[:, 0, 0].sum(), abs(found.projectors).round(2)[:, 0, 2].sum()
        (Array(1., dtype=float32), Array(0., dtype=float32))
    """
    a, c = _samples(activations, coefficients)
    features = a.shape[1]
    for name, number, least in [("subspaces", subspaces, 1), ("steps", steps, 0), ("restarts", restarts, 1)]:
        if number < least:
            raise ArgumentError(f"{name}={number} has to be {least} at least.")
    if not a.size:
        raise ArgumentError("There are no samples: relevant subspaces need one at least.")
    if dimensions is None:
        dimensions, rest = divmod(features, subspaces)
        if rest:
            raise ArgumentError(
                f"{features} features do not part into {subspaces} subspaces of equal dimensions. "
                f"Say dimensions={dimensions} to leave {rest} out, or another number of subspaces."
            )
    if not 1 <= dimensions <= features // subspaces:
        raise ArgumentError(
            f"{subspaces} orthogonal subspaces of dimensions={dimensions} do not fit into {features} features: "
            f"between 1 and {features // subspaces} do."
        )
    return _maximise(a, c, key, subspaces, dimensions, steps, restarts)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _maximise(a, c, key, subspaces, dimensions, steps, restarts) -> Subspaces:
    features = a.shape[1]
    (a, scale_a), (c, scale_c) = _scaled(a), _scaled(c)

    def parts(U):
        return U.reshape(features, subspaces, dimensions).swapaxes(0, 1)

    @jax.value_and_grad
    def objective(U):
        # power 4 of the mean over samples: its own root is taken where there is something to take it of
        squares = jnp.square(jax.nn.relu(subspace_relevance(a, c, parts(U)))).mean(0)
        used = squares > 0
        return jnp.square(jnp.where(used, jnp.where(used, squares, 1) ** 0.25, 0).mean())

    def step(state, _):
        U, value, slope, length = state
        candidate = _orthonormal(U + length * slope)
        found = candidate, *objective(candidate)
        higher = found[1] > value
        U, value, slope = jax.tree.map(lambda new, old: jnp.where(higher, new, old), found, (U, value, slope))
        # Far beyond 1 only the slope counts, and the bound keeps float32 from overflowing.
        length = jnp.where(higher, jnp.minimum(1.5 * length, 1e6), 0.5 * length)
        return (U, value, slope, length), value

    def climb(U):
        # The first turn looks at U itself, without a step: objective and slope are compiled once.
        start: Any = U, jnp.array(-jnp.inf, U.dtype), jnp.zeros_like(U), jnp.array(1 / 1.5, U.dtype)
        (U, *_), values = jax.lax.scan(step, start, length=steps + 1)
        return U, values

    starts = jax.random.orthogonal(key, features, (restarts,), a.dtype, subspaces * dimensions)
    ends, values = jax.vmap(climb)(starts)
    best = jnp.nanargmax(values[:, -1])
    basis, values = parts(ends[best]), values[best]
    relevance = subspace_relevance(a, c, basis).mean(0)
    order = jnp.argsort(relevance, descending=True)
    unit = scale_a * scale_c
    return Subspaces(basis[order], relevance[order] * unit, values * unit)


def projector(basis: jax.Array) -> jax.Array:
    """The orthogonal projection U U^T on the subspace that a basis spans.

    It is symmetric: `a @ P` projects activations, and `c @ P` coefficients. The projections on subspaces that complete
    one another sum to the identity.

    Args:
        basis: (..., features, dimensions), orthonormal columns, as `prca` and `drsa` return them; leading axes are
            several subspaces. For each of the directions by itself, `projector(basis.T[:, :, None])`.

    Returns:
        (..., features, features).

    Raises:
        ArgumentError: where the columns are not orthonormal (looked at outside of `jit` only).

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.concepts import projector
        >>> projector(jnp.array([[0.6], [-0.8], [0.0]])).round(2).tolist()
        [[0.36, -0.48, 0.0], [-0.48, 0.64, 0.0], [0.0, 0.0, 0.0]]
    """
    _check_basis(basis)
    return jnp.matmul(basis, basis.mT, precision=Precision.HIGHEST)


def subspace_relevance(activations: jax.Array, coefficients: jax.Array, basis: jax.Array) -> jax.Array:
    """The relevance that subspaces carry: (U^T a) . (U^T c) for each sample and each subspace.

    Over subspaces that complete one another it sums to `a . c`.

    Args:
        activations: (..., features).
        coefficients: of the same shape, relevance divided by activation.
        basis: (..., features, dimensions), orthonormal columns; its leading axes are several subspaces.

    Returns:
        The leading axes of `activations`, then those of `basis`; in float32, or float64 where given that.

    Raises:
        ArgumentError: for shapes that do not fit, or where columns are not orthonormal (looked at outside of `jit` only).

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.concepts import subspace_relevance
        >>> axes = jnp.eye(2)[:, :, None]  # two subspaces of one direction each
        >>> subspace_relevance(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, -4.0]]), axes)
        Array([[ 3., -8.]], dtype=float32)
    """
    _check_basis(basis)
    if activations.shape != coefficients.shape or activations.shape[-1:] != basis.shape[-2:-1]:
        raise ArgumentError(
            f"activations {activations.shape} and coefficients {coefficients.shape} have to be of one shape, and their "
            f"last axis has to be the one before last of the basis {basis.shape}: features."
        )
    dtype = _wide(activations, coefficients, basis)
    inside = [
        jnp.tensordot(x.astype(dtype), basis.astype(dtype), (-1, basis.ndim - 2), precision=Precision.HIGHEST)
        for x in (activations, coefficients)
    ]
    return (inside[0] * inside[1]).sum(-1)


def _samples(activations: Any, coefficients: Any) -> tuple[jax.Array, jax.Array]:
    """Pairs of (samples, features), checked, in float32 at least."""
    a, c = jnp.asarray(activations), jnp.asarray(coefficients)
    if a.shape != c.shape or a.ndim < 2:
        raise ArgumentError(
            f"activations {a.shape} and coefficients {c.shape} have to be of one shape, (samples, features), or with more "
            "axes of samples in front. Both are taken at the same layer, the features last: one sample is a[None]."
        )
    for name, x in {"activations": a, "coefficients": c}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ArgumentError(f"{name} have to be real floating-point numbers, but have dtype {x.dtype}.")
        if not isinstance(x, jax.core.Tracer) and not jnp.isfinite(x).all():
            raise ArgumentError(
                f"{name} are not finite: {int((~jnp.isfinite(x)).sum())} of {x.size} elements are nan or infinite. "
                "One of them would make every direction nan; look for where it comes from."
            )
    dtype = _wide(a, c)
    return a.reshape(-1, a.shape[-1]).astype(dtype), c.reshape(-1, c.shape[-1]).astype(dtype)


def _wide(*arrays: jax.Array) -> np.dtype:
    """The dtype to compute in: float32, or float64 where an array has that."""
    dtype = np.dtype(np.float32)
    for x in arrays:
        dtype = np.promote_types(dtype, x.dtype)  # not jnp's, which refuses where promotion is strict
    return dtype


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` at the scale that lengths of steps are for, and what gives its own scale back."""
    largest = jnp.abs(x).max()  # taken out first: squares of float32 overflow and vanish early
    x = x / jnp.where(largest > 0, largest, 1)
    scale = jnp.sqrt(jnp.square(x).mean()) * x.shape[-1] ** 0.25
    scale = jnp.where(scale > 0, scale, 1)
    return x / scale, scale * largest


def _orthonormal(U: jax.Array) -> jax.Array:
    """U (U^T U)^(-1/2), the orthonormal basis nearest to U; by singular values, which lose no digits to U^T U."""
    left, _, right = jnp.linalg.svd(U, full_matrices=False)
    return jnp.matmul(left, right, precision=Precision.HIGHEST)


def _check_basis(basis: jax.Array) -> None:
    if basis.ndim < 2:
        raise ArgumentError(f"A basis is (features, dimensions), but has shape {basis.shape}: one direction is u[:, None].")
    if isinstance(basis, jax.core.Tracer):
        return
    U = np.asarray(basis.astype(_wide(basis)))
    off = np.abs(U.swapaxes(-1, -2) @ U - np.eye(U.shape[-1], dtype=U.dtype)).max(initial=0.0)
    if not off < max(1e-4, 4 * float(jnp.finfo(basis.dtype).eps)):
        raise ArgumentError(
            f"The columns of this basis {basis.shape} are not orthonormal: U^T U differs from the identity by {off:.2g}. "
            "jnp.linalg.qr(basis)[0] spans the same with columns that are."
        )
