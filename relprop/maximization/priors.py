"""Priors on inputs and codes: functions whose value is added to what is maximised, log-densities up to a constant.

Any function of the input that returns a log-density will do as well. One that returns several numbers, one for each example
of a batch, counts with their sum.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..surrogate import widen
from .parametrisations import SPACE

__all__ = ["L2", "Diversity", "Gaussian", "TotalVariation"]


@dataclasses.dataclass(frozen=True, eq=False)
class L2:
    """-strength ||x - centre||^2: close to 0, to the mean of the data or of a class, or (locality) to a given input.

    Args:
        strength: a number; may be traced.
        centre: of the form of the input, or arrays that broadcast to it.

    Source:
        Simonyan, Vedaldi, Zisserman 2014; Montavon, Samek, Müller 2018, section 3.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.maximization import L2
        >>> float(L2(0.5, 1.0)(jnp.array([3.0, 1.0])))
        -2.0
    """

    strength: Any = 1.0
    centre: Any = 0.0

    def __call__(self, x: Any) -> jax.Array:
        form: Any = jax.tree.structure(x)
        centre = self.centre if form == jax.tree.structure(self.centre) else jax.tree.map(lambda _: self.centre, x)

        def distance(leaf, around):
            around = jnp.asarray(around, leaf.dtype)
            try:
                around = jnp.broadcast_to(around, leaf.shape)
            except ValueError:
                raise ArgumentError(
                    f"The centre has the shape {around.shape}, which does not broadcast to that of x, {leaf.shape}."
                ) from None
            return jnp.square(leaf - around).sum()

        squares: Any = sum(jax.tree.leaves(jax.tree.map(distance, x, centre)))
        return -jnp.asarray(self.strength, squares.dtype) * squares


@dataclasses.dataclass(frozen=True, eq=False)
class TotalVariation:
    """-strength sum (dx^2 + dy^2)^(power / 2): neighbouring pixels are alike.

    dx and dy are differences to the next pixel to the right and below, 0 at the border, in each channel. Where an image is
    flat the gradient is 0 for any power.

    Args:
        strength: a number; may be traced.
        power: 1 keeps edges sharp, 2 blurs them.

    Source:
        Mahendran, Vedaldi: Understanding deep image representations by inverting them, CVPR 2015.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.maximization import TotalVariation
        >>> float(TotalVariation()(jnp.array([[0.0, 3.0], [4.0, 0.0]])[..., None]))  # 5, then 3 and 4
        -12.0
    """

    strength: Any = 1.0
    power: float = 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim < 3:
            raise ArgumentError(f"Total variation takes images (..., height, width, channels), not the shape {x.shape}.")
        across, down = (
            jnp.diff(x, axis=axis, append=jax.lax.slice_in_dim(x, -1, None, axis=axis + x.ndim)) for axis in SPACE[::-1]
        )
        squares = jnp.square(across) + jnp.square(down)
        flat = squares == 0
        steep = jnp.where(flat, jnp.zeros_like(x), jnp.where(flat, jnp.ones_like(x), squares) ** (self.power / 2))
        return -jnp.asarray(self.strength, x.dtype) * steep.sum()


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """The normal density: log p(x) = -(x - mean)^T P (x - mean) / 2 + (log det P - d log 2 pi) / 2.

    Args:
        mean: of the shape of one example.
        precision: (d, d), the inverse P of the covariance, for an example of d numbers, flattened.
        log_normaliser: the constant, (log det P - d log 2 pi) / 2; None computes it.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.maximization import Gaussian
        >>> round(float(Gaussian(jnp.zeros(1), jnp.eye(1))(jnp.ones(1))), 4)
        -1.4189
    """

    mean: jax.Array
    precision: jax.Array
    log_normaliser: Any = None

    def __post_init__(self):
        mean, precision = jnp.asarray(self.mean), jnp.asarray(self.precision)
        if precision.shape != (mean.size, mean.size):
            raise ArgumentError(
                f"The precision has the shape {precision.shape}; for a mean of the shape {mean.shape} it has to be "
                f"{(mean.size, mean.size)}."
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "precision", precision)
        if self.log_normaliser is None:
            constant = jnp.log(jnp.diagonal(cholesky(precision))).sum() - mean.size * math.log(2 * math.pi) / 2
            object.__setattr__(self, "log_normaliser", constant)

    @classmethod
    def fit(cls, images: Any, noise: float = 0.1) -> Self:
        """The Gaussian of largest likelihood for images (N, ...) with noise of that standard deviation added.

        Without noise pixels that never change would have no density.
        """
        images = jnp.asarray(images)
        if len(images) < 1 or not noise > 0:
            raise ArgumentError(f"Gaussian.fit needs one image at least and noise > 0, not {len(images)} and noise={noise}.")
        flat = images.reshape(len(images), -1)
        centred = flat - flat.mean(0)[None]
        covariance = centred.T @ centred / len(flat) + noise**2 * jnp.eye(flat.shape[1], dtype=flat.dtype)
        return cls(images.mean(0), jnp.linalg.inv(covariance))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The log-density of examples (..., *mean.shape), one number each."""
        shape = self.mean.shape
        batch = x.shape[: x.ndim - len(shape)]
        if x.shape[len(batch) :] != shape:
            raise ArgumentError(f"The Gaussian is of examples of the shape {shape}, but is given {x.shape}.")
        dtype = x.dtype
        flat = x.reshape(*batch, self.mean.size) - jnp.broadcast_to(
            self.mean.reshape(-1).astype(dtype), (*batch, self.mean.size)
        )
        quadratic = jnp.einsum("...i,ij,...j->...", flat, self.precision.astype(dtype), flat)
        return jnp.asarray(self.log_normaliser, dtype) - quadratic / 2


@dataclasses.dataclass(frozen=True, eq=False)
class Diversity:
    """-strength times the mean cosine similarity of pairs: several inputs (count, ...) of `Several` come out different.

    Args:
        strength: a number; may be traced.
        features: a function of the batch of inputs (count, ...) that returns what is compared, (count, ...): the activations
            of a layer, or by default the inputs themselves.

    Source:
        Olah, Mordvintsev, Schubert: Feature Visualization, Distill 2017, "Diversity".

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.maximization import Diversity
        >>> float(Diversity()(jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])))  # one pair of three is parallel
        -0.33333334
    """

    strength: Any = 1.0
    features: Callable[[Any], jax.Array] | None = None

    def __call__(self, x: Any) -> jax.Array:
        compared = x if self.features is None else self.features(x)
        if jnp.ndim(compared) < 2 or len(compared) < 2:
            raise ArgumentError(
                "Diversity compares several inputs along the first axis, (count, ...) with count >= 2, not "
                f"{jnp.shape(compared)}: use it with the parametrisation Several(one, count)."
            )
        flat = widen(compared.reshape(len(compared), -1))
        squares = jnp.square(flat).sum(1, keepdims=True)  # an input of 0 is like no other, and has no gradient
        flat = flat / jnp.sqrt(jnp.where(squares > 0, squares, jnp.ones_like(squares)))
        similar = flat @ flat.T
        count = len(flat)
        mean = (similar.sum() - jnp.trace(similar)) / (count * (count - 1))
        return (-jnp.asarray(self.strength, mean.dtype) * mean).astype(compared.dtype)


def cholesky(precision: jax.Array) -> jax.Array:
    """The lower triangular root of a precision matrix; an error where it is not positive definite."""
    root = jnp.linalg.cholesky(precision)
    if not isinstance(root, jax.core.Tracer) and not np.isfinite(root).all():
        raise ArgumentError(
            f"The precision {precision.shape} is not positive definite in {precision.dtype}: it belongs to no density. Is "
            "it the inverse of a covariance, with something on its diagonal for what never changes?"
        )
    return root
