"""Linearisations for primitives that relprop does not know, added by users."""

from collections.abc import Callable
from typing import Any

from .errors import ArgumentError

REGISTERED: dict[str, Callable[..., Any]] = {}


def register(primitive: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a linearisation for `primitive`, a name or a `jax.extend.core.Primitive`.

    The decorated function takes `(bind, *operands)` and returns what the primitive returns: `bind(*operands)` runs the
    primitive with the parameters of the equation, and the tangent of the result is the linearisation. Returning
    `bind(*operands)` itself means the derivative. A registered primitive is a layer of nothing else: it takes
    precedence over what relprop does with it otherwise.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> @rp.register("cumlogsumexp")
        ... def _(bind, x):
        ...     y = bind(x)  # relevance passes element by element
        ...     return rp.with_tangent(y, rp.scale_tangent(x, y / rp.stabilize(x)))
        >>> from jax import lax
        >>> rp.explain(lax.cumlogsumexp, None)(jnp.array([1.0, 2.0])).tolist()
        [1.0, 2.313]
    """
    name = primitive if isinstance(primitive, str) else getattr(primitive, "name", None)
    if not isinstance(name, str):
        raise ArgumentError(f"register takes the name of a primitive or a primitive, got {primitive!r}.")

    def decorate(linearisation):
        REGISTERED[name] = linearisation
        return linearisation

    return decorate
