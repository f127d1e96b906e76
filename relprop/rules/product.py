"""Rules of products of live values: gates, attention, bilinear layers."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from ..errors import RuleError
from ..structure import ROLES
from ..surrogate import held, scale_tangent, widen
from .base import Rule


@dataclasses.dataclass(frozen=True)
class Uniform(Rule):
    """A product of n live factors hands 1/n of its relevance to each. AttnLRP (Achtibat et al. 2024), prop. 3.2.

    A factor that is a power of something counts as often as that is in it, so that `x * x * y` is `x * y * x`; `x / y` is
    `x * (1 / y)`. A fused
    attention kernel hands a quarter each to queries and keys and half to values: what its two products and the softmax give.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> a, b = rp.explain(lambda a, b: a * b, {"product": rp.Uniform()}, argnums=(0, 1))(2.0, 3.0)
        >>> float(a), float(b)
        (3.0, 3.0)
    """

    kinds: ClassVar[tuple[str, ...]] = ("product", "attention")

    def __call__(self, layer, x, z):
        core, x = layer.info.core, x if isinstance(x, tuple) else (x,)
        if layer.kind == "attention":
            return _shared(layer, x, _attention_shares(layer.info.roles))
        if layer.info.degrees:
            total = sum(map(abs, layer.info.degrees)) or 1
            return _shared(layer, x, [degree / total for degree in layer.info.degrees])
        if core.name == "cumprod":
            axis, length = core.params["axis"], z.shape[core.params["axis"]]
            count = lax.broadcasted_iota(z.dtype, z.shape, axis) + 1
            if core.params["reverse"]:
                count = length + 1 - count
        else:
            count = jnp.full_like(z, math.prod(layer.info.live[0].shape[d] for d in core.params["axes"]))
        return scale_tangent(z, 1 / widen(count))


def _attention_shares(roles: tuple[str, ...]) -> list[float]:
    """What the product of weights and values, and below it that of queries and keys, hand to their live factors."""
    share = 1 / 2 if "value" in roles and len(set(roles)) > 1 else 1.0
    logits = share / max(sum(role in ("query", "key") for role in roles), 1)
    return [logits if role in ("query", "key") else share for role in roles]


def _shared(layer, x, shares) -> jax.Array:
    return layer.evaluate(*(scale_tangent(v, widen(jnp.full_like(v, s))) for v, s in zip(x, shares, strict=True)))


@dataclasses.dataclass(frozen=True)
class SignalTakeAll(Rule):
    """Gates are held constant, the signals of a product take all of its relevance. Arras et al. 2017.

    `hold` says which factors are held: a role or several, indices of factors in the order of execution, or a function of
    `(layer, index)`. Roles are found by dataflow: `"gate"` stays within 0 and 1 by its structure (a sigmoid and one minus
    it, a softmax, the exponential of a decay), `"modulator"` is computed by a layer with weights from what another factor
    carries on (squeeze-and-excitation, B, C and the step of a selective state space), `"activated"` is the output of an
    activation beside a factor that is not (gated feed-forward networks).

    Several signals share equally; where no factor is held, or all are, the rule is `Uniform`. In a fused attention kernel
    all but the values is held.

    Example:
        >>> import jax, jax.numpy as jnp, relprop as rp
        >>> fn = lambda g, x: jax.nn.sigmoid(g) * x
        >>> g, x = rp.explain(fn, {"gate": rp.SignalTakeAll()}, argnums=(0, 1))(0.0, 3.0)
        >>> float(g), float(x)
        (0.0, 1.5)
    """

    hold: Any = "gate"

    kinds: ClassVar[tuple[str, ...]] = ("product", "attention")

    def held(self, info) -> list[bool]:
        """Which factors of a layer are held constant."""
        count = len(info.live)
        if callable(self.hold):
            return [bool(self.hold(info, i)) for i in range(count)]
        wanted = self._wanted()
        on = [i in wanted or (bool(info.roles) and info.roles[i] in wanted) for i in range(count)]
        if len(info.equations) == 1:
            return on
        # In a tree of products a value that is a factor more than once is one input.
        return [all(o for v, o in zip(info.live, on, strict=True) if v is u) for u in info.live]

    def _wanted(self) -> tuple:
        return (self.hold,) if isinstance(self.hold, str | int) else tuple(self.hold)

    def __call__(self, layer, x, z):
        fused = layer.kind == "attention"
        on = [role != "value" for role in layer.info.roles] if fused else self.held(layer.info)
        if all(on) or not any(on):
            return Uniform()(layer, x, z)
        degrees = [0 if h else d for h, d in zip(on, layer.info.degrees or (1,) * len(x), strict=True)]
        shares = [degree / (sum(map(abs, degrees)) or 1) for degree in degrees]
        if fused:  # a kernel with a backward pass of its own
            return _shared(layer, x, shares)
        operands, rebuild = layer.split()

        def product(constant, moving):
            operands, values = constant
            factors = iter(moving)
            return rebuild(operands).evaluate(*(next(factors) if h is None else h for h in values))

        moving = [
            v if share == 1 else scale_tangent(v, widen(jnp.full_like(v, share)))
            for v, share, h in zip(x, shares, on, strict=True)
            if not h
        ]
        return held(product, (operands, [v if h else None for v, h in zip(x, on, strict=True)]), moving)

    def check(self, info) -> None:
        super().check(info)
        for item in () if callable(self.hold) else self._wanted():
            if isinstance(item, str) and item not in ROLES:
                raise RuleError(f"{self}: there is no role {item!r}; roles are {', '.join(ROLES)}.")
            if isinstance(item, int) and not 0 <= item < len(info.live):
                raise RuleError(
                    f"{self}: the {info.kind} at {info.source} has {len(info.live)} live factors, none at {item}."
                )
