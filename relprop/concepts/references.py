"""Reference examples: which inputs a channel responds to most, and which it matters most for; and what it sees of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..conditions import start
from ..errors import ArgumentError
from ..plan import Plan
from ..relevances import relevances
from ..rules.base import Rule
from ..rules.merge import window_sum
from ..rules.relative import Flat
from ..selectors import optional
from ..structure import Layer
from ..surrogate import reciprocal, scale_tangent, wide_dtype, widen
from ..transform import explain, plan


class Ranking(NamedTuple):
    """The best examples of every channel, best first.

    `score` (channels, count) is -inf and `example` -1 where there were not enough. `example` counts examples in the order
    in which they came. `position` (channels, count, axes) is the index of the channel's largest element in each, along the
    axes between the batch and the channels.
    """

    score: jax.Array
    example: jax.Array
    position: jax.Array


class References(NamedTuple):
    """Reference examples by `activation` and by `relevance`, after `seen` examples."""

    activation: Ranking
    relevance: Ranking
    seen: jax.Array


def references(
    fn: Callable[..., Any],
    rules: Any,
    *,
    at: Any,
    count: int = 8,
    score: Literal["sum", "max"] = "sum",
    argnums: int = -1,
    target: Any = "top",
    parameters: int | Sequence[int] | None = None,
    fallback: Any = None,
    conditions: Any = (),
) -> Callable[..., References]:
    """Find the inputs that make a channel most active, and those that it has most relevance for, over a stream of batches.

    Activation says what a channel responds to, relevance what it is used for: "relevance maximisation", Achtibat et al.
    2023. Only the best `count` of each channel are kept, so memory does not grow with the dataset.

    Args:
        fn, rules, argnums, target, parameters, fallback, conditions: as in `relprop.explain`. By default each example is
            explained for the class that is predicted.
        at: one layer, a selector as in rules. Its output has the batch as its first axis and channels as its last.
        count: how many examples are kept for each channel.
        score: how an example is ranked: by the sum or the maximum over positions.

    Returns:
        A function `update(found, *args)`: with `found=None` for the first batch, and what it returned for the next. It is
        compiled once for each shape of a batch.

    Raises:
        ArgumentError: `at` does not match exactly one layer outside of loops, or count or score have no meaning.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> fn = lambda w, x: x @ w
        >>> update = rp.concepts.references(fn, None, at="dense", count=2, target=0)
        >>> w, found = jnp.array([[1.0, -1.0]]), None
        >>> for batch in (jnp.array([[1.0], [5.0]]), jnp.array([[3.0], [-2.0]])):
        ...     found = update(found, w, batch)
        >>> found.activation.example.tolist(), found.activation.score.tolist()
        ([[1, 2], [3, 0]], [[5.0, 3.0], [2.0, -1.0]])
    """
    if score not in ("sum", "max"):
        raise ArgumentError(f"score={score!r}: examples are ranked by the 'sum' or the 'max' over positions.")
    if count < 1:
        raise ArgumentError(f"count={count}: at least one example is kept for each channel.")
    options = {"argnums": argnums, "parameters": parameters, "fallback": fallback}

    @jax.jit
    def update(found, *args):
        layer = _only(plan(fn, rules, target=target, **options)(*args), at)
        (measured,) = relevances(fn, rules, at=at, target=target, conditions=conditions, **options)(*args).values()
        if layer.output.ndim < 2:
            raise ArgumentError(
                f"The layer {layer.address} needs an output (batch, ..., channels), not {layer.output_shape}."
            )
        found = _nothing(layer, count) if found is None else found
        indices = found.seen + jnp.arange(measured.value.shape[0], dtype=jnp.int32)
        return References(
            _best(found.activation, measured.value, indices, score),
            _best(found.relevance, measured.relevance, indices, score),
            found.seen + measured.value.shape[0],
        )

    return update


def _only(planned: Plan, at: Any) -> Layer:
    chosen = planned.select(at)
    if len(chosen) != 1:
        raise ArgumentError(f"References are of one layer, but {at!r} matches {len(chosen)}: {[c.address for c in chosen]}.")
    planned.outside_of({"scan"}, chosen[0], "; select a layer outside.")
    return chosen[0]


def _nothing(layer: Layer, count: int) -> References:
    channels, axes = layer.output_shape[-1], layer.output.ndim - 2
    empty = Ranking(
        jnp.full((channels, count), -jnp.inf, wide_dtype(layer.output)),
        jnp.full((channels, count), -1, jnp.int32),
        jnp.zeros((channels, count, axes), jnp.int32),
    )
    return References(empty, empty, jnp.zeros((), jnp.int32))


def _best(ranking: Ranking, array: jax.Array, indices: jax.Array, score: str) -> Ranking:
    """The best of those that were found before and of a batch; of equals, those that came first."""
    inner = array.shape[1:-1]
    flat = widen(array).reshape(array.shape[0], -1, array.shape[-1])
    scores = (flat.sum(1) if score == "sum" else flat.max(1)).T
    position = jnp.stack(jnp.unravel_index(flat.argmax(1), inner), -1) if inner else jnp.zeros((*scores.T.shape, 0))
    position = position.astype(jnp.int32).swapaxes(0, 1)
    everything = Ranking(
        jnp.concatenate([ranking.score, scores], 1),
        jnp.concatenate([ranking.example, jnp.broadcast_to(indices, scores.shape)], 1),
        jnp.concatenate([ranking.position, position], 1),
    )
    _, order = lax.top_k(everything.score, ranking.score.shape[1])
    return Ranking(*(jnp.take_along_axis(v, order.reshape(order.shape + (1,) * (v.ndim - 2)), 1) for v in everything))


@dataclasses.dataclass(frozen=True)
class _Even(Rule):
    """Every element of a window takes the same share, whatever its value: what `Flat` is for layers with weights."""

    kinds: ClassVar[tuple[str, ...]] = ("max_pool", "sum_pool")

    def relative(self, layer, x, z, r):
        def total(v):
            return window_sum(layer, v) if layer.kind == "max_pool" else layer.evaluate(v)

        return scale_tangent(total(r), reciprocal(total(jnp.ones_like(x))))


def receptive_field(fn: Callable[..., Any], *, at: Any, argnums: int = -1, fallback: Any = None) -> Callable[..., jax.Array]:
    """Find what a unit sees of the input: the box that all paths from it to the input lie in.

    The unit is explained under rules that share evenly (Flat, Bach et al. 2016), whose relevance reaches every connected
    input, so strides, dilation, padding and parallel branches are all seen to. Not so what only a statistic reads (a norm
    over positions), since statistics are held constant.

    Args:
        fn, argnums, fallback: as in `relprop.explain`.
        at: one layer, a selector as in rules.

    Returns:
        A function `(positions, *args)` of integers (..., axes), indices along the axes of the layer's output between the
        batch and the channels, and the arguments of `fn`; of the explained one only the shape matters. It returns integers
        (..., input axes, 2): start and stop along the axes of the explained argument after the batch.

    Raises:
        ArgumentError: as `references`.

    Example:
        >>> import jax, jax.numpy as jnp, relprop as rp
        >>> def fn(w, x):  # every second window of three
        ...     return jax.lax.conv_general_dilated(x, w, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
        >>> boxes = rp.concepts.receptive_field(fn, at="conv")
        >>> boxes(jnp.array([[0], [1]]), jnp.ones((3, 1, 1)), jnp.ones((1, 6, 1))).tolist()
        [[[0, 3], [0, 1]], [[2, 5], [0, 1]]]
    """
    rules = [(optional("affine"), Flat()), (optional("max_pool"), _Even()), (optional("sum_pool"), _Even())]

    def located(positions, *args):
        number = range(len(args))[argnums]
        (example,) = jax.tree.leaves(args[number])
        # In general position: no unit is 0, and none cancel.
        noise = jax.random.normal(jax.random.key(0), (1, *example.shape[1:]), example.dtype)
        given = (*args[:number], jax.tree.map(lambda _: noise, args[number]), *args[number + 1 :])
        layer = _only(plan(fn, rules, argnums=argnums, fallback=fallback)(*given), at)
        inner = layer.output_shape[1:-1]
        positions = jnp.asarray(positions)
        if positions.shape[-1:] != (len(inner),):
            raise ArgumentError(
                f"positions has the shape {positions.shape}; its last axis needs the {len(inner)} indices of a unit of "
                f"{layer.address} within {inner}."
            )

        def box(position):
            here = jnp.ones((), bool)
            for axis, size in enumerate(inner):
                here = here[..., None] & (jnp.arange(size, dtype=position.dtype) == position[axis]).reshape(
                    (1,) * axis + (size,)
                )
            # All channels of the unit, each with positive relevance.
            origin = start(at, lambda a: jnp.sign(a) * here[None, ..., None].astype(a.dtype))
            relevance = explain(fn, rules, argnums=argnums, fallback=fallback, conditions=origin)(*given)
            (leaf,) = jax.tree.leaves(relevance)
            seen = leaf[0] != 0
            ends = []
            for axis in range(seen.ndim):
                line = seen.any([d for d in range(seen.ndim) if d != axis])
                first, last = jnp.argmax(line), line.size - jnp.argmax(line[::-1])
                ends.append(jnp.where(line.any(), jnp.stack([first, last]), 0))
            return jnp.stack(ends).astype(jnp.int32)

        flat = positions.reshape(-1, positions.shape[-1])
        boxes = lax.map(box, flat, batch_size=64)
        return boxes.reshape(*positions.shape[:-1], *boxes.shape[1:])

    return located


def crops(examples: Any, ranking: Ranking, boxes: jax.Array) -> list[list[np.ndarray]]:
    """Cut what every channel sees out of its reference examples.

    Args:
        examples: the dataset in the order of the stream, anything that takes an index: an array (examples, ...), a list,
            a memory map. Only reference examples are read.
        ranking: `activation` or `relevance` of what `references` found.
        boxes: (channels, count, axes, 2), from `receptive_field` at `ranking.position`.

    Returns:
        For each channel its crops, best first; fewer where there were not enough examples, smaller at a border.

    Example:
        >>> import jax.numpy as jnp, numpy as np, relprop as rp
        >>> ranking = rp.concepts.Ranking(jnp.array([[7.0]]), jnp.array([[1]]), jnp.array([[[0]]]))
        >>> rp.concepts.crops(np.arange(8).reshape(2, 4), ranking, jnp.array([[[[1, 3]]]]))
        [[array([5, 6])]]
    """
    chosen, ends = np.asarray(ranking.example), np.asarray(boxes)
    if ends.shape[:2] != chosen.shape or ends.ndim != 4:
        raise ArgumentError(
            f"boxes has the shape {ends.shape}, but needs (channels, count, axes, 2), with the ranking's {chosen.shape}: "
            "call the function that `receptive_field` returns with `ranking.position`."
        )

    def cut(i, box):
        return np.asarray(examples[int(i)])[tuple(slice(first, last) for first, last in box)]

    return [[cut(i, box) for i, box in zip(*row, strict=True) if i >= 0] for row in zip(chosen, ends, strict=True)]
