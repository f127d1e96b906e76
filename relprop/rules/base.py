"""What a rule is."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..errors import RuleError


class Rule:
    """Base class of propagation rules: how relevance passes one layer.

    Subclass it as a frozen dataclass and define one of two methods (or both, whose relevances then add up):

    - `__call__(layer, x, z)` returns a *surrogate*: an array of the shape and dtype of `z` whose value is of no
      interest, and whose tangent is the rule. JAX transposes it, so the coefficient `c = R / a` of the output becomes
      that of the input. `relprop.scale_tangent(z, ratio)` is `z` with its tangent multiplied by a ratio.
    - `relative(layer, x, z, r)`, for rules whose relevance is not proportional to `x`: returns the linear map of `r`
      (shape of `x`) to the shape of `z` whose transpose takes the relevance of the output to that of the input.

    `x` is the live input (for an affine layer without shifts, see `relprop.layers`; a tuple where the layer has several:
    `add`, `product`), `z` the output with the layer's plain linearisation. `kinds` lists the kinds of layers that the
    rule is meant for.

    Example:
        >>> import dataclasses, jax.numpy as jnp, relprop as rp
        >>> @dataclasses.dataclass(frozen=True)
        ... class Damped(rp.Rule):
        ...     keep: float = 0.5
        ...     def __call__(self, layer, x, z):
        ...         return rp.scale_tangent(z, self.keep * jnp.ones_like(z))
        >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> rp.explain(lambda x: x @ w, Damped())(jnp.array([1.0, 1.0]))
        Array([1.5, 3.5], dtype=float32)
    """

    kinds: ClassVar[tuple[str, ...]] = ("affine", "scale")
    selects: ClassVar[bool] = False
    """Whether the rule hands all relevance of a max pooling to the selected inputs."""
    linear: ClassVar[bool] = True
    """Whether the coefficient of the input is linear in that of the output."""
    vanishes: ClassVar[bool] = False
    """Whether the rule of an activation hands nothing on where the activation is flat at 0, as a relu is below 0."""
    absorbs: ClassVar[str] = "rule"
    """What an audit calls the relevance that the rule keeps, apart from biases and stabilisers; see `relprop.audit`."""

    def __call__(self, layer, x, z) -> jax.Array | None:
        return None

    def relative(self, layer, x, z, r) -> jax.Array | None:
        return None

    def value(self, layer, x) -> jax.Array | None:
        """The output of an affine layer at `x`, where the rule's own products add up to it; None if they do not."""
        return None

    @property
    def is_relative(self) -> bool:
        """Whether the rule has a relative part. Static: the planner asks before anything runs."""
        return type(self).relative is not Rule.relative

    @property
    def has_coefficients(self) -> bool:
        """Whether the rule has a part that is proportional to the input."""
        return type(self).__call__ is not Rule.__call__

    def at(self, rank: int, count: int) -> "Rule":
        """The rule for the layer with the given rank among the `count` layers that its selector matches."""
        return self

    def check(self, info) -> None:
        """Raise `RuleError` when the rule has no meaning at the layer `info`."""
        if not self.has_coefficients and not self.is_relative:
            raise RuleError(f"The rule {type(self).__name__} defines neither `__call__` nor `relative`: it says nothing.")
        if not set(self.kinds).intersection(info.kinds):
            raise RuleError(
                f"The rule {self} is for layers of kind {' or '.join(self.kinds)}, but was selected for the {info.kind} "
                f"layer {info.address} at {info.source}. Use a selector that leaves this layer out, or a rule for it."
            )


@dataclasses.dataclass(frozen=True)
class RelevanceRule(Rule):
    """A rule in relevance form: `function(layer, x, z, R) -> R_in`, with `R` of the shape of `z` and `R_in` of `x`.

    The function need not be linear in `R`. A plain function is wrapped in this class wherever a rule is taken.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> def uniform(layer, x, z, R):
        ...     return jnp.broadcast_to(R.sum(-1, keepdims=True) / x.shape[-1], x.shape)
        >>> rp.explain(lambda x: x @ jnp.ones((4, 1)), uniform)(jnp.array([1.0, 2.0, 3.0, 4.0]))
        Array([2.5, 2.5, 2.5, 2.5], dtype=float32)
    """

    function: Callable[..., Any]

    kinds: ClassVar[tuple[str, ...]] = ("affine", "scale", "activation", "max_pool", "sum_pool", "norm", "softmax")

    def relative(self, layer, x, z, r):
        operands, rebuild = layer.split()

        @jax.custom_vjp
        def propagate(r, x, z, operands):
            return jnp.zeros_like(z)

        def forward(r, x, z, operands):
            return jnp.zeros_like(z), (x, z, operands)

        def backward(residuals, relevance):
            x, z, operands = residuals
            handed_on = self.function(rebuild(operands), x, z, relevance)
            if jnp.shape(handed_on) != x.shape:
                raise RuleError(
                    f"The relevance function {getattr(self.function, '__name__', self.function)} returned relevance of "
                    f"shape {jnp.shape(handed_on)} for the layer {layer.info.address} at {layer.info.source}, whose input "
                    f"has the shape {x.shape}."
                )
            return handed_on.astype(x.dtype), None, None, None

        propagate.defvjp(forward, backward)
        return propagate(r, x, z, operands)


@dataclasses.dataclass(frozen=True)
class Graded(Rule):
    """A rule that changes over depth: `make(depth)` is the rule at a layer, with a depth from 0 to 1.

    The first layer in order of execution that the selector matches has depth 0, the last one 1 (the only one has 0).

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> fn = lambda x: jnp.tanh(x @ jnp.ones((2, 3))) @ jnp.ones((3, 1))
        >>> rules = {"affine": rp.Graded(lambda depth: rp.Gamma(3.0 * (1 - depth)))}
        >>> [entry.rule.gamma for entry in rp.plan(fn, rules)(jnp.ones(2)) if entry.layer.kind == "dense"]
        [3.0, 0.0]
    """

    make: Callable[[float], Any]

    def at(self, rank: int, count: int) -> Rule:
        return as_rule(self.make(rank / max(count - 1, 1)))


def as_rule(rule: Any) -> Rule:
    """A rule as it is, a function of (layer, x, z, R) as a `RelevanceRule`, anything else refused."""
    if isinstance(rule, Rule):
        return rule
    if callable(rule) and not isinstance(rule, type):
        return RelevanceRule(rule)
    hint = f" Did you mean `{rule.__name__}()`?" if isinstance(rule, type) and issubclass(rule, Rule) else ""
    raise RuleError(
        f"Expected a rule such as `relprop.Epsilon()` or a function (layer, x, z, R) -> R_in, got {rule!r}.{hint}"
    )


def check_number(rule: Any, name: str) -> None:
    """Refuse a negative hyper-parameter, if its value is known (it may be a tracer)."""
    value = getattr(rule, name)
    if isinstance(value, int | float) and not value >= 0:
        raise RuleError(f"{type(rule).__name__} needs {name} >= 0, got {name}={value}.")
