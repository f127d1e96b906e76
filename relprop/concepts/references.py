"""Reference examples: which inputs a channel responds to most, and which it matters most for; and what it sees of them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..arguments import is_array, normalise_argnums
from ..conditions import start
from ..errors import ArgumentError
from ..pipeline import Fallback, prepare
from ..plan import Plan
from ..relevances import measure
from ..rules.merge import window_sum
from ..selectors import optional
from ..structure import Layer
from ..surrogate import wide_dtype, widen
from ..transform import explain, plan


class Ranking(NamedTuple):
    """The best examples of every channel, best first.

    `score` (channels, count) is -inf and `example` -1 where there were not enough; a score that is NaN is no reference.
    `example` counts examples in the order in which they came. `position` (channels, count, axes) is the index of the
    channel's largest element in each, along the axes other than the batch and the channels.
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
    channels: int = -1,
    count: int = 8,
    score: Literal["sum", "max"] = "sum",
    argnums: int = -1,
    target: Any = "top",
    parameters: int | Sequence[int] | None = None,
    fallback: Fallback = None,
    conditions: Any = (),
) -> Callable[..., References]:
    """Find the inputs that make a channel most active, and those that it has most relevance for, over a stream of batches.

    Activation says what a channel responds to, relevance what it is used for: "relevance maximisation", Achtibat et al.
    2023. Only the best `count` of each channel are kept, so memory does not grow with the dataset.

    Args:
        fn, rules, argnums, target, parameters, fallback, conditions: as in `relprop.explain`. By default each example is
            explained for the class that is predicted.
        at: one layer, a selector as in rules, whose output has the batch as its first axis.
        channels: the axis of channels in that output, the last by default.
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
    if not isinstance(count, int) or count < 1:
        raise ArgumentError(f"count={count!r}: at least one example is kept for each channel.")

    def update(found, *args):
        leaves, form = jax.tree_util.tree_flatten(args)
        on = tuple(is_array(leaf) for leaf in leaves)
        arrays = [leaf for leaf, traced in zip(leaves, on, strict=True) if traced]
        flags = tuple(leaf for leaf, traced in zip(leaves, on, strict=True) if not traced)
        return step(found, arrays, form, on, flags)

    @functools.partial(jax.jit, static_argnums=(2, 3, 4))
    def step(found, arrays, form, on, flags):
        traced, static = iter(arrays), iter(flags)
        args = form.unflatten([next(traced) if o else next(static) for o in on])
        planned = prepare(fn, rules, args, {}, argnums, parameters, target, False, fallback, conditions)
        layer = _only(planned.plan, at)
        measured = measure(planned, [layer])[layer]
        _check_batch(layer, args[normalise_argnums(argnums, len(args))[0]])
        value, relevance = (jnp.moveaxis(array, channels, -1) for array in (measured.value, measured.relevance))
        found = _nothing(value, count) if found is None else found
        if found.activation.score.shape != (value.shape[-1], count) or found.activation.position.shape[2] != value.ndim - 2:
            raise ArgumentError(
                f"The references given are of {found.activation.score.shape} (channels, count), but the layer "
                f"{layer.address} has {value.shape[-1]} channels and count={count}. Start with None."
            )
        indices = found.seen + jnp.arange(value.shape[0], dtype=jnp.int32)
        return References(
            _best(found.activation, value, indices, score),
            _best(found.relevance, relevance, indices, score),
            found.seen + value.shape[0],
        )

    return update


def _only(planned: Plan, at: Any) -> Layer:
    chosen = planned.select(at)
    if len(chosen) != 1:
        raise ArgumentError(f"References are of one layer, but {at!r} matches {len(chosen)}: {[c.address for c in chosen]}.")
    planned.outside_of({"scan"}, chosen[0], "; select a layer outside.")
    return chosen[0]


def _check_batch(layer: Layer, argument: Any):
    """The first axis of the layer's output must be that of the input: there is no other way to tell examples apart."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(argument)}
    if layer.output.ndim < 2 or sizes != {layer.output_shape[:1]}:
        raise ArgumentError(
            f"The layer {layer.address} at {layer.source} has the output {layer.output_shape}; it needs the batch of the "
            f"explained input, {sizes}, as its first axis, and channels (the last axis, or `channels=`)."
        )


def _nothing(value: jax.Array, count: int) -> References:
    channels, axes = value.shape[-1], value.ndim - 2
    empty = Ranking(
        jnp.full((channels, count), -jnp.inf, wide_dtype(value)),
        jnp.full((channels, count), -1, jnp.int32),
        jnp.zeros((channels, count, axes), jnp.int32),
    )
    return References(empty, empty, jnp.zeros((), jnp.int32))


def _best(ranking: Ranking, array: jax.Array, indices: jax.Array, score: str) -> Ranking:
    """The best of those that were found before and of a batch; of equals, those that came first."""
    inner = array.shape[1:-1]
    flat = widen(array).reshape(array.shape[0], math.prod(inner), array.shape[-1])
    scores = (flat.sum(1) if score == "sum" else flat.max(1)).T
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)  # what is not a number is nobody's best
    position = jnp.stack(jnp.unravel_index(flat.argmax(1), inner), -1) if inner else jnp.zeros((*scores.T.shape, 0))
    position = position.astype(jnp.int32).swapaxes(0, 1)
    everything = Ranking(
        jnp.concatenate([ranking.score, scores], 1),
        jnp.concatenate([ranking.example, jnp.broadcast_to(indices, scores.shape)], 1),
        jnp.concatenate([ranking.position, position], 1),
    )
    _, order = lax.top_k(everything.score, ranking.score.shape[1])
    return Ranking(*(jnp.take_along_axis(v, order.reshape(order.shape + (1,) * (v.ndim - 2)), 1) for v in everything))


def _reached(layer, x, z, relevance):
    """1 for every input that something with relevance is connected to, whatever the values are: never 0 by chance."""
    seen = jnp.where(relevance != 0, jnp.ones_like(z), jnp.zeros_like(z))

    def element_by_element(v):
        return jnp.broadcast_to(v, z.shape).astype(z.dtype)

    connect = element_by_element
    if "affine" in layer.info.kinds:  # a weight that is exactly 0 is no connection
        connect = layer.with_weights(lambda w: (w != 0).astype(w.dtype))
    elif layer.kind == "max_pool":
        connect = functools.partial(window_sum, layer)
    elif layer.kind == "sum_pool":
        connect = layer.evaluate
    (reached,) = jax.vjp(connect, jnp.ones_like(x))[1](seen)
    return (reached != 0).astype(x.dtype)


def receptive_field(
    fn: Callable[..., Any], *, at: Any, channels: int = -1, argnums: int = -1, fallback: Fallback = None
) -> Callable[..., jax.Array]:
    """Find what a unit sees of the input: the box that all paths from it to the input lie in.

    Every layer marks all inputs that are connected to a marked output, whatever their values (weights that are exactly 0 do
    not connect), so strides, dilation, padding, masked weights and parallel branches are all seen to. What only the scale of
    a norm reads is not, since statistics are held constant.

    Args:
        fn, argnums, fallback: as in `relprop.explain`.
        at: one layer, a selector as in rules: any but sums and products of several values.
        channels: the axis of channels in its output.

    Returns:
        A function `(positions, *args)` of integers (..., axes), indices along the axes of the layer's output other than the
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
    kinds = ("affine", "scale", "activation", "max_pool", "sum_pool", "norm")
    everywhere = [(optional(kind), _reached) for kind in kinds]

    def located(positions, *args):
        (number,) = normalise_argnums(argnums, len(args))
        leaves = jax.tree_util.tree_leaves(args[number])
        if len(leaves) != 1 or not jnp.issubdtype(jnp.result_type(leaves[0]), jnp.floating):
            given = ", ".join(f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in leaves)
            raise ArgumentError(f"A receptive field lies in one array of floats, but the explained argument is {given}.")
        # In general position, so that sums and products of several values hand something to each of them.
        noise = jax.random.normal(jax.random.key(0), (1, *leaves[0].shape[1:]), leaves[0].dtype)
        args = (*args[:number], jax.tree.map(lambda _: noise, args[number]), *args[number + 1 :])
        layer = _only(plan(fn, everywhere, argnums=argnums, fallback=fallback)(*args), at)
        _check_batch(layer, args[number])
        axis = channels % layer.output.ndim
        inner = [size for d, size in enumerate(layer.output_shape) if d not in (0, axis)]
        positions = jnp.asarray(positions)
        if positions.shape[-1:] != (len(inner),):
            raise ArgumentError(
                f"positions is {positions.dtype}{list(positions.shape)}; its last axis needs the {len(inner)} indices of a "
                f"unit of {layer.address} within {tuple(inner)}."
            )
        known = not isinstance(positions, jax.core.Tracer)
        if known and ((np.asarray(positions) < 0) | (np.asarray(positions) >= np.array(inner, int))).any():
            raise ArgumentError(f"positions are out of range: the layer {layer.address} has units within {tuple(inner)}.")

        def box(position):
            here = jnp.ones((1,), bool)
            for d, size in enumerate(inner):
                on = jnp.arange(size, dtype=position.dtype) == position[d]
                here = here[..., None] & on.reshape((1,) * here.ndim + (size,))
            here = jnp.broadcast_to(jnp.expand_dims(here, axis), layer.output_shape).astype(layer.output.dtype)
            # No relevance comes from above; the layer itself starts with that of its unit.
            origin = (at, lambda layer, x, z, relevance: _reached(layer, x, z, here))
            nothing = start(at, 0.0)
            found = explain(fn, [origin, *everywhere], argnums=argnums, fallback=fallback, conditions=nothing)(*args)
            seen = jax.tree.leaves(found)[0][0] != 0
            ends = []
            for d in range(seen.ndim):
                line = seen.any([other for other in range(seen.ndim) if other != d])
                first, last = jnp.argmax(line), line.size - jnp.argmax(line[::-1])
                ends.append(jnp.where(line.any(), jnp.stack([first, last]), 0))
            return jnp.stack(ends).astype(jnp.int32)

        flat = positions.reshape(math.prod(positions.shape[:-1]), len(inner))
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
