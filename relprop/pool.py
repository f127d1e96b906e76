"""Relevance pooled over groups of inputs: the sums of the parts, which together sum to the relevance of the whole.

Relevance that is conserved can be read at any resolution: pixels instead of colour channels, patches, boxes and
superpixels instead of pixels, brain regions instead of electrodes, words instead of word pieces (Montavon, Samek and
Müller 2018, "Methods for interpreting and understanding deep neural networks", section 4.4).

All of these are linear functions of an array of relevance, in any form and at any layer. They sum over the axes they
are told and leave the others as they are, work under `jit` and `vmap`, add in at least float32, and return the dtype
they were given. For word pieces see also `relprop.text.words`, which knows from the tokens where words start.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ArgumentError
from .surrogate import widen

__all__ = ["box", "channels", "groups", "patches", "pixels"]

Array = jax.Array | np.ndarray


def pixels(relevance: Array, axis: int = -1) -> jax.Array:
    """The relevance of each pixel, or of each token or time step: the sum over its channels.

    Args:
        relevance: floating-point, of any shape.
        axis: that of the channels, the features of an embedding, ...

    Returns:
        The shape of `relevance` without `axis`.

    Raises:
        ArgumentError: if `axis` does not exist, or relevance is not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop import pool
        >>> relevance = jnp.array([[[1.0, 2.0, 0.0], [0.0, -1.0, 0.5]]])  # height 1, width 2, three colours
        >>> pool.pixels(relevance)
        Array([[ 3. , -0.5]], dtype=float32)
    """
    relevance = _relevance(relevance)
    return _sum(relevance, checked_axes(axis, relevance.shape, "axis"))


def channels(relevance: Array, axes: int | Sequence[int] = (-3, -2)) -> jax.Array:
    """The relevance of each channel (of each filter, at a layer's output): the sum over all positions.

    Args:
        relevance: floating-point; channels-last images by default, one (height, width, channels) or a batch of them.
        axes: those of the positions, so (-2, -1) for channels-first images and -2 for signals (..., time, channels).

    Returns:
        The shape of `relevance` without `axes`: (channels,), or (batch, channels).

    Raises:
        ArgumentError: if `axes` do not exist, or relevance is not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop import pool
        >>> relevance = jnp.array([[[1.0, 2.0, 0.0], [0.0, -1.0, 0.5]]])
        >>> pool.channels(relevance)
        Array([1. , 1. , 0.5], dtype=float32)
    """
    relevance = _relevance(relevance)
    return _sum(relevance, checked_axes(axes, relevance.shape))


def patches(relevance: Array, size: int | Sequence[int], axes: int | Sequence[int] = (-3, -2)) -> jax.Array:
    """The relevance of each patch of an image, window of a signal, or block of any number of axes.

    Patches lie side by side from index 0 on. Where `size` does not divide an axis, its last patches are smaller, so
    that nothing is left out.

    Args:
        relevance: floating-point; channels-last images by default, one or a batch of them.
        size: how long a patch is: one number for all of `axes`, or one for each.
        axes: the axes that are divided into patches.

    Returns:
        The shape of `relevance` with ceil(length / size) in place of the length of each of `axes`.

    Raises:
        ArgumentError: if sizes are not positive integers, one per axis, or `axes` do not exist.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop import pool
        >>> pool.patches(jnp.array([1.0, 2.0, 4.0, 8.0, 16.0]), 2, axes=-1)
        Array([ 3., 12., 16.], dtype=float32)
        >>> pool.patches(jnp.ones((2, 7, 8, 3)), (4, 8)).shape
        (2, 2, 1, 3)
    """
    relevance = _relevance(relevance)
    places = checked_axes(axes, relevance.shape)
    sizes = dict(zip(places, checked_lengths(size, len(places), "size"), strict=True))
    padding, shape, summed = [], list[int](), []
    for d, length in enumerate(relevance.shape):
        if d not in sizes:
            padding.append((0, 0))
            shape.append(length)
            continue
        own = max(1, min(sizes[d], length))
        count = -(-length // own)
        padding.append((0, count * own - length))
        summed.append(len(shape) + 1)
        shape += [count, own]
    return _sum(jnp.pad(relevance, padding).reshape(shape), tuple(summed))


def box(relevance: Array, box: Any, axes: int | Sequence[int] = (-3, -2)) -> tuple[jax.Array, jax.Array]:
    """The relevance inside of a bounding box, or of a mask, and that outside of it.

    What is left of the shape has a channel axis; for one number per image take
    ``pool.box(pool.pixels(relevance), box, axes=(-2, -1))``.

    Args:
        relevance: floating-point; channels-last images by default, one or a batch of them.
        box: a pair (start, stop) for each of `axes`, counted from 0, stop not included. Positions are integers, or
            arrays of integers with one for each example: of the shape of the axes that are left, or of the first few
            of them. Or a mask: a boolean array of the shape of `axes`, with the axes of the examples in front where
            each has its own.
        axes: the axes in which the box lies.

    Returns:
        The pair (inside, outside), both of the shape of `relevance` without `axes`. They sum to what `relevance`
        sums to.

    Raises:
        ArgumentError: if the box does not have the form above, or leaves the image. Positions that are traced cannot
            be looked at: what such a box has outside of the image counts for nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop import pool
        >>> relevance = jnp.arange(9.0).reshape(3, 3)
        >>> inside, outside = pool.box(relevance, ((1, 3), (0, 2)), axes=(-2, -1))
        >>> float(inside), float(outside)
        (20.0, 16.0)
    """
    relevance = _relevance(relevance)
    places = checked_axes(axes, relevance.shape)
    values, rest, lengths = _to_the_end(relevance, places)
    mask = _mask(box, rest, lengths)
    zero = jnp.zeros((), values.dtype)
    pooled = tuple(range(len(rest), values.ndim))
    return _sum(jnp.where(mask, values, zero), pooled), _sum(jnp.where(mask, zero, values), pooled)


def groups(relevance: Array, labels: Any, count: int | None = None, axes: int | Sequence[int] = -1) -> jax.Array:
    """The relevance of each group of inputs: superpixels, words of word pieces, brain regions of electrodes.

    Args:
        relevance: floating-point, of any shape.
        labels: integers, to which group each input belongs: of the shape of `axes`, the same for all examples, or with
            the axes of the examples in front, where each has its own. Groups are counted from 0; a group may be empty.
        count: how many groups there are; by default the largest label and one. Where labels are traced (under `jit`
            and `vmap`) it has to be given.
        axes: the axes that are grouped: -1 for the tokens in (batch, time), -2 for the electrodes in
            (batch, electrodes, time), (-3, -2) for the pixels of channels-last images.

    Returns:
        The shape of `relevance` with one axis of length `count` in place of `axes`: where the first of them was.

    Raises:
        ArgumentError: if labels do not fit to the shape, are not integers, or are negative or not below `count`. Labels
            that are traced cannot be looked at: what they put into no group is left out.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop import pool
        >>> relevance = jnp.array([[1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 1.0, 1.0]])
        >>> pool.groups(relevance, [0, 1, 1, 2])
        Array([[1., 6., 8.],
               [1., 2., 1.]], dtype=float32)
        >>> pool.groups(relevance, jnp.array([[0, 0, 0, 1], [0, 1, 1, 1]]))
        Array([[7., 8.],
               [1., 3.]], dtype=float32)
    """
    relevance = _relevance(relevance)
    places = checked_axes(axes, relevance.shape)
    values, rest, lengths = _to_the_end(relevance, places)
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    own = _own_axes(labels.shape, rest, lengths, "labels", f"axes={axes}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        hint = " A mask is what `pool.box` takes." if labels.dtype == bool else ""
        raise ArgumentError(f"labels has to hold integers, the group of each input, but has dtype {labels.dtype}.{hint}")
    count = _checked_count(labels, count)

    # One scatter for each example that has labels of its own, over rows that hold everything they are shared by.
    size = math.prod(lengths)
    each = jnp.asarray(labels).astype(jnp.int32).reshape(math.prod(rest[:own]), size)
    rows = widen(values).reshape(len(each), math.prod(rest[own:]), size).swapaxes(1, 2)
    each = jnp.where(each < 0, jnp.full_like(each, count), each)  # -1 would mean the last group; `count` is dropped
    found = jax.vmap(lambda r, g: jnp.zeros((count, r.shape[1]), r.dtype).at[g].add(r, mode="drop"))(rows, each)
    found = found.swapaxes(1, 2).reshape(*rest, count).astype(relevance.dtype)
    return jnp.moveaxis(found, -1, min(places))


def checked_axes(axes: int | Sequence[int], shape: tuple[int, ...], name: str = "axes", of: str = "relevance") -> Any:
    """`axes` as a tuple of positive positions in `shape`, in the order given."""
    given = (axes,) if isinstance(axes, int | np.integer) else tuple(axes)
    places = []
    for axis in given:
        axis = operator.index(axis)
        if not -len(shape) <= axis < len(shape):
            raise ArgumentError(
                f"{name}={axes} names axis {axis}, but {of} has shape {shape} and rank {len(shape)}. Say which axes are "
                f"meant with `{name}`."
            )
        places.append(axis % len(shape))
    if not places or len(set(places)) != len(places):
        raise ArgumentError(f"{name}={axes} has to name at least one axis, and none twice; {of} has shape {shape}.")
    return tuple(places)


def checked_lengths(given: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """One positive int for each of `count` axes, from one for all or one for each."""
    lengths = tuple(given) if isinstance(given, Iterable) else (given,) * count
    if len(lengths) != count:
        raise ArgumentError(f"{name}={given} has {len(lengths)} numbers for {count} axes: give one for all or one for each.")
    for length in lengths:
        if not isinstance(length, int | np.integer) or length < 1:
            raise ArgumentError(f"{name}={given} has to be a positive integer, or one for each axis.")
    return tuple(int(length) for length in lengths)


def _relevance(relevance: Array) -> jax.Array:
    relevance = jnp.asarray(relevance)
    if not jnp.issubdtype(relevance.dtype, jnp.inexact):
        raise ArgumentError(f"relevance has to be an array of floating-point numbers, but has dtype {relevance.dtype}.")
    return relevance


def _sum(relevance: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return widen(relevance).sum(axes).astype(relevance.dtype)


def _to_the_end(relevance: jax.Array, places: tuple[int, ...]):
    """`relevance` with the axes at `places` last; the shape of the axes before them, and their own."""
    values = jnp.moveaxis(relevance, places, range(-len(places), 0))
    at = relevance.ndim - len(places)
    return values, values.shape[:at], values.shape[at:]


def _own_axes(shape: tuple[int, ...], rest: tuple[int, ...], lengths: tuple[int, ...], name: str, where: str) -> int:
    """How many axes of the examples, the first of `rest`, an array of `shape` has in front of `lengths`."""
    own = len(shape) - len(lengths)
    if own < 0 or own > len(rest) or shape != rest[:own] + lengths:
        fitting = " or ".join(str(rest[:n] + lengths) for n in range(min(len(rest), 1) + 1))
        raise ArgumentError(
            f"{name} has shape {shape}, but has to have {fitting} for {where}: first the axes of the examples, if each has "
            "its own, then those that are pooled."
        )
    return own


def _mask(box: Any, rest: tuple[int, ...], lengths: tuple[int, ...]) -> jax.Array:
    """A boolean array that broadcasts to shape `rest + lengths`, of the same rank."""
    is_array = isinstance(box, jax.Array | np.ndarray)
    if is_array and box.dtype == bool:
        own = _own_axes(box.shape, rest, lengths, "The mask", "these axes")
        return jnp.asarray(box).reshape(rest[:own] + (1,) * (len(rest) - own) + lengths)
    form = "a pair (start, stop) for each axis, or a boolean mask"
    if is_array and box.shape != (len(lengths), 2):
        raise ArgumentError(
            f"box is an array of shape {box.shape}, but has to be {form}: an array of shape {(len(lengths), 2)}. "
            "For a box per example give pairs of arrays: ((top, bottom), (left, right)), each with one number per example."
        )
    pairs = tuple(box) if isinstance(box, Iterable) else ()
    if len(pairs) != len(lengths) or any(not hasattr(pair, "__len__") or len(pair) != 2 for pair in pairs):
        raise ArgumentError(f"box={box!r} has to be {form}; there are {len(lengths)} axes.")
    mask = jnp.ones((1,) * (len(rest) + len(lengths)), bool)
    for d, (pair, length) in enumerate(zip(pairs, lengths, strict=True)):
        start, stop = (_position(position, rest, d) for position in pair)
        _check_known(start, stop, length, d)
        along = (length,) + (1,) * (len(lengths) - d - 1)
        here = jnp.arange(length, dtype=jnp.int32).reshape((1,) * (len(rest) + d) + along)
        low, high = (jnp.asarray(p).astype(jnp.int32).reshape(p.shape + (1,) * (here.ndim - p.ndim)) for p in (start, stop))
        mask = mask & (here >= low) & (here < high)
    return mask


def _position(position: Any, rest: tuple[int, ...], d: int) -> Any:
    array = position if isinstance(position, jax.Array) else np.asarray(position)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ArgumentError(f"box has positions of dtype {array.dtype} for axis {d}: round them to integers.")
    _own_axes(array.shape, rest, (), f"A position of box for axis {d}", "a number for all examples or one for each")
    return array


def _check_known(start: Any, stop: Any, length: int, d: int) -> None:
    """Raise where positions are known and do not lie in the image, in order."""
    # Axes of examples come first, and numpy aligns the last: transposed, a shared end is compared with each of the others.
    known = [np.asarray(p).astype(int).T for p in (start, stop) if not isinstance(p, jax.core.Tracer)]
    outside = any(((p < 0) | (p > length)).any() for p in known)
    if outside or (len(known) == 2 and (known[0] > known[1]).any()):
        raise ArgumentError(
            f"box has (start, stop) = ({start}, {stop}) for axis {d} of its axes, of length {length}: it has to be "
            "0 <= start <= stop <= length. Positions count from 0 and are not wrapped; clip a box that leaves the image."
        )


def _checked_count(labels: Any, count: int | None) -> int:
    """How many groups there are; raises where labels are known and do not fit."""
    if isinstance(labels, jax.core.Tracer):
        if count is None:
            raise ArgumentError(
                "labels are traced here (under jit or vmap), so that the number of groups is not known: give `count`."
            )
        return operator.index(count)
    known = np.asarray(labels)
    if count is None:
        count = int(known.max()) + 1 if known.size else 0
    count = operator.index(count)
    bad = np.argwhere((known < 0) | (known >= count))
    if len(bad):
        where = tuple(map(int, bad[0]))
        raise ArgumentError(
            f"labels holds {known[where]} at index {where}, but with count={count} labels are 0 to {count - 1}. What "
            "belongs to no group needs a group of its own, so that no relevance is lost: "
            "jnp.where(labels < 0, count, labels) and count + 1."
        )
    return count
