"""Rules of affine layers that do not read the input: Flat, w^2 and z^B (deep Taylor decomposition).

They hand relevance to inputs of 0 too, so they work in relative space (`Rule.relative`): the map of `r`, the relative
perturbation of the inputs, whose transpose distributes relevance. Nothing is left for a bias.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..errors import RuleError
from ..surrogate import reciprocal, scale_tangent, stabilize, stabilizer, widen, with_tangent
from .affine import negative, positive
from .base import Rule, check_number


@dataclasses.dataclass(frozen=True)
class Flat(Rule):
    """Every connected input takes the same share: the layer with weights 1 and bias 0. Bach et al. 2016.

    Respects the receptive field and padding. At the first layer it smooths the picture at the resolution of that
    layer; put on every layer below a chosen one it lowers the resolution.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.explain(lambda x: x @ jnp.array([3.0, -1.0]), rp.Flat())(jnp.array([1.0, 0.0]))
        Array([1.5, 1.5], dtype=float32)
    """

    kinds: ClassVar[tuple[str, ...]] = ("affine",)

    def relative(self, layer, x, z, r):
        even = layer.with_weights(jnp.ones_like)
        return scale_tangent(even(r), reciprocal(even(jnp.ones_like(x))))


@dataclasses.dataclass(frozen=True)
class WSquare(Rule):
    """`R_i = sum_j w_ij^2 / (sum_i w_ij^2 + epsilon) R_j`, for real-valued inputs. Montavon et al. 2017, eq. 12.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.explain(lambda x: x @ jnp.array([3.0, -1.0]), rp.WSquare())(jnp.array([1.0, 1.0])).tolist()
        [1.8, 0.2]
    """

    epsilon: float | jax.Array = 0.0

    kinds: ClassVar[tuple[str, ...]] = ("affine",)

    def __post_init__(self):
        check_number(self, "epsilon")

    def relative(self, layer, x, z, r):
        squared, factor = layer.with_weights(jnp.square), jnp.square(layer.input_scale)
        return _shared(squared(factor * r), squared(factor), self.epsilon)


@dataclasses.dataclass(frozen=True)
class ZBox(Rule):
    """z^B, for inputs in a box such as pixels: `x W - low W+ - high W-`, numerator and denominator alike.

    `low <= x <= high` are numbers or arrays that broadcast to the layer's input (per channel: shape `(C,)` where channels
    are last), in the units of that input. Where the normalisation of pixels is inside of the explained function it is a
    part of the layer, and the bounds are raw pixel values. Montavon et al. 2017, eq. 14.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.explain(lambda x: x @ jnp.array([3.0, -1.0]), rp.ZBox(0.0, 1.0))(jnp.array([1.0, 0.5])).tolist()
        [2.143, 0.357]
    """

    low: Any
    high: Any
    epsilon: float | jax.Array = 1e-6

    kinds: ClassVar[tuple[str, ...]] = ("affine",)

    def __post_init__(self):
        check_number(self, "epsilon")
        if all(isinstance(v, int | float) for v in (self.low, self.high)) and not self.low < self.high:
            raise RuleError(f"ZBox needs low < high, got low={self.low} and high={self.high}.")

    def check(self, info) -> None:
        super().check(info)
        for name in ("low", "high"):
            shape, expected = jnp.shape(getattr(self, name)), info.input_shapes[0]
            try:
                fits = jnp.broadcast_shapes(shape, expected) == expected
            except ValueError:
                fits = False
            if not fits:
                raise RuleError(
                    f"ZBox: {name} has the shape {shape}, which does not broadcast to the input {expected} of the layer "
                    f"{info.address} at {info.source}. Give a number, or an array such as (channels,) or the full shape."
                )

    def relative(self, layer, x, z, r):
        ends = [layer.constant(v) for v in (self.low, self.high)]
        low, high = jnp.minimum(*ends), jnp.maximum(*ends)
        plus, minus = layer.with_weights(positive), layer.with_weights(negative)
        # x W - low W+ - high W-, of which only x W depends on the input: the layer's own product.
        total = z - layer.bias - plus(low) - minus(high)
        return _shared(plus((x - low) * r) + minus((x - high) * r), total, self.epsilon)


def _shared(part, total, epsilon):
    """`part / s(total)`, a map of relatives, in which the stabiliser has its own part: what it absorbs."""
    shared = with_tangent(jnp.zeros_like(part), part + stabilizer(total, epsilon))
    return scale_tangent(shared, reciprocal(stabilize(widen(total), epsilon)))
