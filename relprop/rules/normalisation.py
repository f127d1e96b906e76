"""Rules of norms, local response normalisation and softmax."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from ..errors import RuleError
from ..surrogate import quotient, reciprocal, scale_tangent, widen, with_tangent
from .base import Rule, check_number


@dataclasses.dataclass(frozen=True)
class Frozen(Rule):
    """A norm `x / s` or `x * s` whose statistic `s` is held constant: `c_in = c / s` or `c s`. Ali et al. 2022 (LN-rule)."""

    kinds: ClassVar[tuple[str, ...]] = ("norm",)
    absorbs: ClassVar[str] = "frozen"

    def __call__(self, layer, x, z):
        statistic = widen(jnp.broadcast_to(layer.frozen(), z.shape)).astype(widen(z).dtype)
        factor = reciprocal(statistic) if layer.info.core.name == "div" else statistic
        return scale_tangent(jnp.broadcast_to(x, z.shape).astype(z.dtype), factor)


@dataclasses.dataclass(frozen=True)
class LocalResponse(Rule):
    """Local response normalisation by its first-order expansion. Binder et al. 2016.

    With `y_c = x_c (k + a sum_i x_i^2)^-b` the unit `c` contributes what it gives alone, `x_c (k + a x_c^2)^-b`, its
    neighbours what they take away, `x_i dy_c/dx_i`; relevance is shared in proportion, so that it is conserved. Only
    values and derivatives of the norm are used, so it holds for every norm whose statistic is one of its input.

    `axis` is the axis of the units `c`. Each of them is evaluated alone, which costs one evaluation of the norm per unit;
    where a window of `size` units is normalised together, say so, and units that far apart are evaluated at once.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> fn = lambda x: x / (1 + (x**2).sum())
        >>> rp.explain(fn, {"norm": rp.LocalResponse()}, target=0)(jnp.array([1.0, 1.0])).tolist()
        [0.6, -0.267]
    """

    axis: int = -1
    size: int | None = None

    kinds: ClassVar[tuple[str, ...]] = ("norm",)

    def __call__(self, layer, x, z):
        length = x.shape[self.axis]
        period = length if self.size is None else min(self.size, length)
        place = lax.broadcasted_iota(jnp.int32, x.shape, self.axis % x.ndim) % period

        def alone(carry, offset):
            mask = (place == offset).astype(x.dtype)
            _, own_slope = jax.jvp(layer.jointly, (x,), (mask,))
            own = layer.jointly(x * mask)
            return (carry[0] + own * mask, carry[1] + own_slope * mask), None

        start = jnp.zeros_like(x)
        (own, own_slope), _ = lax.scan(alone, (start, start), jnp.arange(period, dtype=jnp.int32))
        _, through = jax.jvp(layer.jointly, (x,), (x,))
        total = own + through - own_slope * x
        ratio = quotient(z, total)
        # The tangent of all neighbours, that of the unit itself replaced.
        neighbours = scale_tangent(layer.jointly(x), ratio) - scale_tangent(x, ratio * widen(own_slope))
        return neighbours + scale_tangent(x, ratio * quotient(own, x))

    def check(self, info) -> None:
        super().check(info)
        if not info.joint or info.input_shapes[0] != info.output_shape:
            raise RuleError(
                f"{self} was selected for the norm {info.address} at {info.source}, whose statistic is not one of its own "
                "input alone. It is meant for local response normalisation; use Frozen here."
            )


@dataclasses.dataclass(frozen=True)
class Temperature(Rule):
    """The softmax at a temperature, `c_in = s_T (c - <s_T, c>)` with `s_T = softmax(x / T)`. T = 1 is its derivative.

    A higher temperature lets relevance pass where a softmax is saturated (GIM: gradient interaction modifications).

    Example:
        >>> import jax, jax.numpy as jnp, relprop as rp
        >>> x = jnp.array([8.0, 0.0])
        >>> [rp.explain(jax.nn.softmax, {"softmax": rp.Temperature(t)}, target=0)(x)[0].item() for t in (1.0, 4.0)]
        [0.003, 0.840]
    """

    temperature: float | jax.Array = 1.0

    kinds: ClassVar[tuple[str, ...]] = ("softmax",)

    def __post_init__(self):
        check_number(self, "temperature")
        if isinstance(self.temperature, int | float) and self.temperature == 0:
            raise RuleError("Temperature needs a temperature > 0, got 0.")

    def __call__(self, layer, x, z):
        return layer.evaluate(with_tangent(x / jnp.asarray(self.temperature, x.dtype), x))
