"""Which layers a rule is for: selectors by kind, primitive, parameter path, scope, order and predicate.

A selector is asked about all layers at once and answers with a list of booleans, so that `first` and `last` mean the
order of execution. `&`, `|` and `~` combine selectors.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

from . import primitives as prims
from .errors import ArgumentError
from .structure import KINDS, Layer


@dataclasses.dataclass(frozen=True)
class Selector:
    """A set of layers: `matches(layers)` gives a boolean for each, `text` is how the selector is written.

    `required=False` marks a selector that may match nothing without a warning, as those of presets do.
    """

    matches: Callable[[Sequence[Layer]], list[bool]]
    text: str
    required: bool = True

    def __and__(self, other: Any) -> "Selector":
        return _combine(self, as_selector(other), lambda a, b: a and b, "&")

    def __or__(self, other: Any) -> "Selector":
        return _combine(self, as_selector(other), lambda a, b: a or b, "|")

    def __invert__(self) -> "Selector":
        return Selector(lambda layers: [not on for on in self.matches(layers)], f"~{self.text}", self.required)

    def __repr__(self) -> str:
        return self.text


def _combine(a: Selector, b: Selector, operator, sign: str) -> Selector:
    def matches(layers):
        return [operator(x, y) for x, y in zip(a.matches(layers), b.matches(layers), strict=True)]

    return Selector(matches, f"({a.text} {sign} {b.text})", a.required or b.required)


def where(predicate: Callable[[Layer], bool], text: str | None = None) -> Selector:
    """Layers for which `predicate(layer)` holds; see `relprop.structure.Layer` for what can be asked.

    Example:
        >>> import relprop as rp
        >>> wide = rp.where(lambda layer: layer.output_shape[-1] > 1000, "wide")
    """
    text = text or f"where({getattr(predicate, '__name__', predicate)})"
    return Selector(lambda layers: [bool(predicate(layer)) for layer in layers], text)


def kind(name: str) -> Selector:
    """Layers of a kind: affine (dense, conv and other), dense, conv, scale, activation, product (gates too), gate, attention
    (fused kernels), norm, softmax, max_pool, sum_pool or add.

    Raises:
        ArgumentError: for any other name.
    """
    if name not in KINDS:
        raise ArgumentError(f"There is no kind of layer called {name!r}. Kinds are: {', '.join(sorted(KINDS))}.")
    return where(lambda layer: name in layer.kinds, f"kind({name!r})")


def primitive(name: str) -> Selector:
    """Layers whose core is the JAX primitive `name`, such as `dot_general`."""
    return where(lambda layer: layer.primitive == name, f"primitive({name!r})")


def path(pattern: str) -> Selector:
    """Layers whose parameter path matches a glob, as a whole or in a run of its components.

    `Conv_*`, `Conv_0/kernel` and `params/*/kernel` all match `params/Conv_0/kernel`; `*` matches across `/`.
    """
    return where(lambda layer: layer.path is not None and _within(pattern, layer.path), f"path({pattern!r})")


def scope(pattern: str) -> Selector:
    """Layers inside a `jax.named_scope` (flax linen and equinox make them) that matches a glob, as in `path`."""
    return where(lambda layer: _within(pattern, layer.scope), f"scope({pattern!r})")


def _within(pattern: str, address: str) -> bool:
    return fnmatch.fnmatchcase(f"/{address}/", f"*/{pattern.strip('/')}/*")


def first(selector: Any = "affine") -> Selector:
    """The first match of `selector` in order of execution."""
    return _edge(as_selector(selector), "first", slice(None, 1))


def last(selector: Any = "affine") -> Selector:
    """The last match of `selector` in order of execution."""
    return _edge(as_selector(selector), "last", slice(-1, None))


def _edge(selector: Selector, name: str, part: slice) -> Selector:
    def matches(layers):
        found = [i for i, on in enumerate(selector.matches(layers)) if on][part]
        return [i in found for i in range(len(layers))]

    return Selector(matches, f"{name}({selector.text})", selector.required)


def until(selector: Any) -> Selector:
    """All layers up to the last match of `selector`, in order of execution, that one included.

    Example:
        >>> import jax, jax.numpy as jnp, relprop as rp
        >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3)), "c": jnp.ones((3, 1))}
        >>> fn = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
        >>> rules = [(rp.until(rp.path("b")) & "affine", rp.Flat()), ("affine", rp.Epsilon(0.0))]
        >>> [type(e.rule).__name__ for e in rp.plan(fn, rules)(params, jnp.ones((1, 2))) if e.layer.path]
        ['Flat', 'Flat', 'Epsilon']
    """
    inner = as_selector(selector)

    def matches(layers):
        found = inner.matches(layers)
        return [any(found[i:]) for i in range(len(found))]

    return Selector(matches, f"until({inner.text})", inner.required)


def optional(selector: Any) -> Selector:
    """The same layers, without a warning when there are none."""
    return dataclasses.replace(as_selector(selector), required=False)


def as_selector(given: Any) -> Selector:
    """A selector as it is; a string as a kind or a primitive, or as a path when it has `/` or `*`; a predicate.

    Raises:
        ArgumentError: for anything else.
    """
    if isinstance(given, Selector):
        return given
    if isinstance(given, str):
        if "/" in given or "*" in given:
            return path(given)
        if given in KINDS:
            return kind(given)
        if given in prims.KNOWN:
            return primitive(given)
        raise ArgumentError(
            f"{given!r} is neither a kind of layer ({', '.join(sorted(KINDS))}) nor a primitive of JAX. For parameter "
            f"paths use relprop.path({given!r}) or a pattern with '/' or '*'; for named scopes relprop.scope({given!r})."
        )
    if callable(given):
        return where(given)
    raise ArgumentError(f"Expected a selector, a string or a predicate on layers, got {given!r}.")
