"""Relevance at inner layers: value, coefficient and relevance at the output of every layer that a selector matches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .pipeline import Fallback, Planned, prepare
from .structure import Layer
from .taps import Key, loops_around, relevance


class LayerRelevance(NamedTuple):
    """What passes the output of a layer, all in its shape; inside of loops with a leading axis for each loop.

    `relevance` is `value * coefficient`, and besides what rules above hand out regardless of the value (Flat, WSquare,
    ZBox, bias="distribute", relevance functions).
    """

    value: jax.Array
    coefficient: jax.Array
    relevance: jax.Array


def relevances(
    fn: Callable[..., Any],
    rules: Any,
    *,
    at: Any,
    argnums: int | Sequence[int] = -1,
    target: Any = None,
    has_aux: bool = False,
    parameters: int | Sequence[int] | None = None,
    fallback: Fallback = None,
    conditions: Any = (),
    backward_dtype: Any = None,
) -> Callable[..., dict[str, LayerRelevance]]:
    """Transform `fn` into a function that returns the relevance at the outputs of its layers.

    Args:
        fn, rules, argnums, target, has_aux, parameters, fallback, backward_dtype: as in `relprop.explain`.
        at: which layers, a selector as in rules: a kind, a parameter path, `rp.last("conv")` ... `a | b` for several.
        conditions: as in `relprop.explain`; a mask at one of the layers has been applied to what is returned.

    Returns:
        A function of the same arguments that returns `{name: (value, coefficient, relevance)}`. A layer is named by the
        path of its parameter; where that is not unique, or there is none, `#` and its index in the plan are added. In a
        `scan` there is a leading axis for its steps; a branch of a `cond` that is not taken has zeros. The order is that of
        execution; `jit` sorts by name, as it does with every dictionary.

    Raises:
        ArgumentError: `at` matches no layer, or one inside of a `shard_map`, whose arrays are not whole.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> params = {"up": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "down": jnp.array([1.0, 1.0])}
        >>> fn = lambda params, x: jnp.maximum(x @ params["up"], 0) @ params["down"]
        >>> found = rp.relevances(fn, None, at=rp.path("up"))(params, jnp.array([1.0, 2.0]))
        >>> found["up"].relevance.tolist()
        [1.0, 4.0]
    """

    def located(*args, **kwargs):
        planned = prepare(
            fn, rules, args, kwargs, argnums, parameters, target, has_aux, fallback, conditions, backward_dtype
        )
        names = name_layers(planned.plan.layers)
        return {names[layer]: found for layer, found in measure(planned, planned.plan.select(at)).items()}

    return located


def measure(planned: Planned, layers: Sequence[Layer]) -> dict[Layer, LayerRelevance]:
    """What passes the outputs of some layers of a planned function."""
    slots: dict[Key, Any] = {}
    for layer in layers:
        planned.plan.outside_of(
            {"shard_map"},
            layer,
            ", where each device has a part of its output. Let the function return it, or ask for layers outside.",
        )
        zeros = jnp.zeros((*loops_around(planned.plan.around[layer]), *layer.output_shape), layer.output.dtype)
        slots[Key(layer, "kept")] = LayerRelevance(zeros, zeros, zeros)
    run = planned.run(slots=slots, gauge=_gauge)
    _, measured = run.measured(planned.seeds(run))
    return {layer: measured[Key(layer, "kept")] for layer in layers}


def _gauge(arrays, coefficients, relevances) -> LayerRelevance:
    (a,), (c,), (r,) = arrays, coefficients, relevances
    return LayerRelevance(a, c, relevance(a, c, r))


def name_layers(layers: Sequence[Layer]) -> dict[Layer, str]:
    """A unique name for each layer: its parameter path, else its address or kind with its index."""
    paths = [layer.path for layer in layers]
    return {
        layer: layer.path
        if layer.path is not None and paths.count(layer.path) == 1
        else f"{layer.kind if layer.address == '-' else layer.address}#{layer.index}"
        for layer in layers
    }
