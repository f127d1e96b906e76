"""Rules of affine layers (dense, convolution) that are proportional to the input.

Formulas in the notation of Montavon et al., "Layer-Wise Relevance Propagation: An Overview" (2019); `s(z)` is the
signed stabiliser `z + epsilon * sign(z)`, `W+`/`W-` and `x+`/`x-` are positive and negative parts.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from ..errors import RuleError
from ..surrogate import in_proportion, quotient, reciprocal, scale_tangent, with_tangent
from .base import Rule, check_number

Bias = Literal["absorb", "ignore", "distribute"]


@dataclasses.dataclass(frozen=True)
class AffineRule(Rule):
    """A rule made of terms `share * R / s(total)`, where `total` is linear in `x` up to a bias.

    Subclasses with a field `epsilon` are stabilised by it; where a denominator is exactly 0 the ratio is `empty`.

    `bias` says what happens to the share of the bias: `"absorb"` leaves it in the denominator, where it keeps its
    relevance; `"ignore"` drops it from the denominator (zennit's `zero_params="bias"`); `"distribute"` spreads what the
    layer absorbs evenly over the inputs that each output is connected to (Arras et al. 2017, with bias factor 1).
    """

    empty: ClassVar[float] = 0.0

    bias: Bias = dataclasses.field(default="absorb", kw_only=True)

    def __post_init__(self):
        if self.bias not in ("absorb", "ignore", "distribute"):
            raise RuleError(f"bias must be 'absorb', 'ignore' or 'distribute', got {self.bias!r}.")
        for name in ("epsilon", "gamma", "beta"):
            if hasattr(self, name):
                check_number(self, name)

    def terms(self, layer, x, z) -> list[tuple]:
        """Pairs `(share, total)`; shares sum to 1."""
        raise NotImplementedError

    def __call__(self, layer, x, z):
        epsilon = getattr(self, "epsilon", 0.0)
        parts = [in_proportion(total, z, epsilon, share, self.empty) for share, total in self.terms(layer, x, z)]
        return sum(parts[1:], parts[0])

    @property
    def is_relative(self) -> bool:
        return self.bias == "distribute"

    def relative(self, layer, x, z, r):
        # What is handed on in proportion to x: the tangent of the surrogate in the direction of x itself.
        _, kept = jax.jvp(lambda v: self(layer, v, layer(v)), (x,), (x,))
        even = layer.with_weights(jnp.ones_like)
        return scale_tangent(even(r), (1 - quotient(kept, z)) * reciprocal(even(jnp.ones_like(x))))

    def check(self, info) -> None:
        super().check(info)
        if self.bias != "absorb" and "affine" not in info.kinds:
            raise RuleError(
                f"{self} was selected for the {info.kind} layer {info.address} at {info.source}: only bias='absorb' has a "
                "meaning at layers other than affine ones (dense, conv)."
            )


def positive(v: jax.Array) -> jax.Array:
    """`max(v, 0)` with the derivative 0 at 0."""
    return jnp.where(v > 0, v, jnp.zeros_like(v))


def negative(v: jax.Array) -> jax.Array:
    """`min(v, 0)` with the derivative 0 at 0."""
    return jnp.where(v < 0, v, jnp.zeros_like(v))


@dataclasses.dataclass(frozen=True)
class Zero(AffineRule):
    """LRP-0: relevance in proportion to the contributions, `R_i = x_i sum_j w_ij R_j / z_j`.

    Equal to input times gradient of the layer; the default of affine layers, sums and scales. Bach et al. 2015, eq. 56.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.explain(lambda x: x @ jnp.array([3.0, -1.0]), rp.Zero())(jnp.array([1.0, 2.0]))
        Array([ 3., -2.], dtype=float32)
    """

    kinds: ClassVar[tuple[str, ...]] = ("affine", "scale", "sum_pool", "add")

    def __call__(self, layer, x, z):
        return z if self.bias != "ignore" else super().__call__(layer, x, z)

    def terms(self, layer, x, z):
        return [(1.0, layer.linear(x))]


@dataclasses.dataclass(frozen=True)
class Epsilon(AffineRule):
    """LRP-epsilon: `R_i = x_i sum_j w_ij R_j / s(z_j)`; `epsilon` is in the units of `z`. Bach et al. 2015, eq. 58.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.explain(lambda x: x @ jnp.array([3.0, -1.0]), rp.Epsilon(1.0))(jnp.array([1.0, 2.0]))
        Array([ 1.5, -1. ], dtype=float32)
    """

    epsilon: float | jax.Array = 1e-6

    def terms(self, layer, x, z):
        return [(1.0, layer.linear(x) if self.bias == "ignore" else z)]


def by_sign(layer, x, f, g) -> jax.Array:
    """`x+ f(W) + x- g(W)`."""
    if layer.nonnegative:  # the value is x, which is at hand
        return layer.by_sign(f, g)(with_tangent(x, positive(x)), None)
    return layer.by_sign(f, g)(positive(x), negative(x))


def positive_part(layer, x) -> jax.Array:
    """The sum of the positive contributions, `x+ W+ + x- W-`."""
    return by_sign(layer, x, positive, negative)


def negative_part(layer, x) -> jax.Array:
    """The sum of the negative contributions, `x+ W- + x- W+`."""
    return by_sign(layer, x, negative, positive)


@dataclasses.dataclass(frozen=True)
class AlphaBeta(AffineRule):
    """LRP-alpha-beta: positive contributions share `alpha R`, negative ones `-beta R`. Bach et al. 2015, eq. 60.

    `alpha - beta = 1` and `beta >= 0`. At an output without negative contributions nothing takes the share `-beta R`, so
    the relevance there sums to `alpha R`: a known property of the rule. The positive part of the bias stands in the
    denominator of the positive share, its negative part in that of the negative one.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.explain(lambda x: x @ jnp.array([3.0, -1.0]), rp.AlphaBeta(2.0, 1.0))(jnp.array([1.0, 2.0])).tolist()
        [2.0, -1.0]
    """

    alpha: float | jax.Array = 2.0
    beta: float | jax.Array = 1.0
    epsilon: float | jax.Array = 1e-6

    kinds: ClassVar[tuple[str, ...]] = ("affine",)

    def __post_init__(self):
        super().__post_init__()
        alpha, beta = self.alpha, self.beta
        if isinstance(alpha, int | float) and isinstance(beta, int | float) and abs(alpha - beta - 1) > 1e-6:
            raise RuleError(f"AlphaBeta needs alpha - beta = 1, got alpha={self.alpha} and beta={self.beta}.")

    def value(self, layer, x):
        # The two products of this rule add up to the layer; in half precision each would be rounded on its own.
        if self._no_beta or jnp.finfo(x.dtype).bits < 32:
            return None
        return layer.once(positive_part, x) + layer.once(negative_part, x) + layer.bias

    def terms(self, layer, x, z):
        counts_bias = layer.has_bias and self.bias != "ignore"
        up = layer.once(positive_part, x)
        found = [(self.alpha, up + positive(layer.bias) if counts_bias else up)]
        if not self._no_beta:
            down = layer.once(negative_part, x)
            found.append((-self.beta, down + negative(layer.bias) if counts_bias else down))
        return found

    @property
    def _no_beta(self) -> bool:
        return isinstance(self.beta, int | float) and self.beta == 0


@dataclasses.dataclass(frozen=True)
class ZPlus(AffineRule):
    """LRP-z+: only positive contributions take relevance; the same as `AlphaBeta(1, 0)`. Montavon et al. 2017.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.explain(lambda x: x @ jnp.array([3.0, -1.0]), rp.ZPlus())(jnp.array([1.0, 2.0])).tolist()
        [1.0, 0.0]
    """

    epsilon: float | jax.Array = 1e-6

    kinds: ClassVar[tuple[str, ...]] = ("affine",)

    def terms(self, layer, x, z):
        return AlphaBeta(1.0, 0.0, bias=self.bias).terms(layer, x, z)


@dataclasses.dataclass(frozen=True)
class Gamma(AffineRule):
    """LRP-gamma in its generalised form: contributions with the sign of `z` count `1 + gamma` times.

    `z > 0`: numerator `x+ (W + g W+) + x- (W + g W-)`, denominator its sum with `b + g b+`; `z < 0`: with `W-` and
    `b-`. For `x >= 0` and `z > 0` it is the rule of Montavon et al. 2019, which has no second branch. `gamma = 0` is
    `Epsilon`, a large `gamma` approaches `ZPlus`. With `epsilon = 0` the ratio 0/0 counts as 1.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.explain(lambda x: x @ jnp.array([3.0, -1.0]), rp.Gamma(1.0))(jnp.array([1.0, 2.0])).tolist()
        [1.5, -0.5]
    """

    gamma: float | jax.Array = 0.25
    epsilon: float | jax.Array = 1e-6

    kinds: ClassVar[tuple[str, ...]] = ("affine",)
    empty: ClassVar[float] = 1.0

    def terms(self, layer, x, z):
        g = jnp.asarray(self.gamma, z.dtype)
        ignored = layer.has_bias and self.bias == "ignore"
        base = layer.linear(x) if ignored else z
        bias = layer.bias if layer.has_bias and not ignored else jnp.zeros_like(z)

        def up(w):
            return w + jnp.asarray(self.gamma, w.dtype) * positive(w)

        def down(w):
            return w + jnp.asarray(self.gamma, w.dtype) * negative(w)

        rise = by_sign(layer, x, up, down) + bias + g * positive(bias)
        if layer.rectified and not ignored:  # the sign of `base` is then that of `z`
            return [(1.0, rise)]
        fall = by_sign(layer, x, down, up) + bias + g * negative(bias)
        if jnp.finfo(z.dtype).bits >= 32:
            # Together they count every contribution 2 + gamma times: the value of the one is that of the other. In half
            # precision it would be rounded too often.
            fall = with_tangent((2 + g) * base - rise, fall)
        return [(1.0, jnp.where(base >= 0, rise, fall))]
