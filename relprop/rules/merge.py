"""Rules of places where values are added or pooled."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from ..surrogate import in_proportion, quotient, scale_tangent
from .base import Rule, check_number


@dataclasses.dataclass(frozen=True)
class Norm(Rule):
    """Relevance in proportion to the summands with a stabiliser, `c_in = c z / s(z)`: zennit's rule for sums and pools.

    Not a rule for layers of kind `norm` (layer norm and the like), whose rule is `Frozen`.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.explain(lambda x: x.sum(), {"sum_pool": rp.Norm(1.0)})(jnp.array([1.0, 2.0]))
        Array([0.75, 1.5 ], dtype=float32)
    """

    epsilon: float | jax.Array = 1e-6

    kinds: ClassVar[tuple[str, ...]] = ("add", "sum_pool")

    def __post_init__(self):
        check_number(self, "epsilon")

    def __call__(self, layer, x, z):
        return in_proportion(z, z, self.epsilon)


@dataclasses.dataclass(frozen=True)
class ResidualGamma(Rule):
    """The summand that agrees in sign with the sum counts `1 + gamma` times. Berend et al. 2026.

    `c_a = c z w_a / (w_a a + w_b b)` with `w = 1 + gamma [a z > 0]`: both factors are in [0, 1], nothing is lost and
    no stabiliser is needed.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> fn = lambda a, b: a + b
        >>> a, b = rp.explain(fn, {"add": rp.ResidualGamma(1.0)}, argnums=(0, 1))(3.0, -1.0)
        >>> float(a), float(b)
        (2.4, -0.4)
    """

    gamma: float | jax.Array = 1.0

    kinds: ClassVar[tuple[str, ...]] = ("add",)

    def __post_init__(self):
        check_number(self, "gamma")

    def __call__(self, layer, x, z):
        a, b = (jnp.broadcast_to(v, z.shape) for v in x)
        if layer.info.core.name == "sub":
            b = -b
        gamma = jnp.asarray(self.gamma, z.dtype)
        weigh = [jnp.where(v * jnp.sign(z) > 0, 1 + gamma, jnp.ones_like(gamma)) for v in (a, b)]
        total = scale_tangent(a, weigh[0]) + scale_tangent(b, weigh[1])
        weighted = a * weigh[0] + b * weigh[1]
        return scale_tangent(total, quotient(z, weighted, empty=1.0))


@dataclasses.dataclass(frozen=True)
class ProportionalPool(Rule):
    """Max pooling shared in proportion to the (non-negative) inputs of a window: `R_i = x_i / sum(x) R`. Montavon 2017.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.explain(lambda x: x.max(), {"max_pool": rp.ProportionalPool()})(jnp.array([1.0, 3.0])).tolist()
        [0.75, 2.25]
    """

    epsilon: float | jax.Array = 1e-6

    kinds: ClassVar[tuple[str, ...]] = ("max_pool",)

    def __post_init__(self):
        check_number(self, "epsilon")

    def __call__(self, layer, x, z):
        return in_proportion(window_sum(layer, x), z, self.epsilon)


def window_sum(layer, x) -> jax.Array:
    """The sums over the windows of a max pooling."""
    params = layer.info.core.params
    if layer.info.core.name == "reduce_max":
        return jnp.sum(x, params["axes"])
    return lax.reduce_window(
        x,
        x.dtype.type(0),  # not a tracer, or JAX would not see that this is a sum
        lax.add,
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params["base_dilation"],
        params["window_dilation"],
    )
