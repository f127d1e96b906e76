"""Explanations made of many: of shifted copies of an input, and of all windows of an image that is larger than the input.

Also the picture of what was relevant. All after Montavon, Samek and Müller 2018, "Methods for interpreting and
understanding deep neural networks", section 6.

Both kinds of explanation are sums over windows of one array, each explained on its own and added where it was cut out:
a shifted copy is a window of the padded input. One compiled loop makes them, so that memory does not grow with their
number and the network is compiled once.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import pool
from .errors import ArgumentError
from .surrogate import wide_dtype, widen

__all__ = ["relevant_pattern", "sliding_window", "translated"]

Array = jax.Array | np.ndarray
Padding = Literal["edge", "wrap", "reflect", "symmetric", "constant"]

PADDINGS = get_args(Padding)


def translated(
    explain: Callable[..., Any],
    shifts: int | Sequence[Any] | np.ndarray,
    *,
    axes: int | Sequence[int] = (-3, -2),
    mode: Padding = "edge",
    batch_size: int = 1,
) -> Callable[..., jax.Array]:
    """Average explanations of shifted inputs, each shifted back: the translation trick against noise and checkerboards.

    Filters with strides and pooling see an input on a grid; its pattern in the explanation is averaged away.

    `x` is shifted by `s` so that what was at index `i` is at `i + s`. What enters at the border is made by `mode`. The
    relevance of a shifted input goes back by the transpose of this map, to the elements that were read: for "edge" the
    border receives what all its copies have. So the result sums to the average of the relevance of the shifted inputs,
    nothing is lost; except for "constant", where zeros enter: what these have (with rules such as Flat and ZBox) is
    dropped.

    Args:
        explain: a function of any arguments that returns the relevance of the last positional one, such as
            ``rp.explain(fn, rules, target=3)``. With ``target="top"`` each shifted input is explained for the class
            predicted for it; name the class to explain one and the same.
        shifts: an int `n` for all shifts from -n to n along each axis, (2n + 1)^2 for images; or the shifts: a sequence
            of tuples with one int per axis, for one axis also a sequence of ints.
        axes: the axes of `x` along which it is shifted.
        mode: "edge" repeats the border, "wrap" goes on at the other end, "reflect" and "symmetric" mirror without and
            with the border, "constant" is zero, as in `jax.numpy.pad`.
        batch_size: how many shifts are explained at once, by `jax.vmap`. More is faster and takes more memory.

    Returns:
        A function of the same arguments: the averaged relevance, of the shape of `x`. Put it under `jax.jit`, as a loop
        outside of it is compiled at each call.

    Raises:
        ArgumentError: if shifts, mode or batch_size have no meaning; when called, if `explain` does not return one array
            of the shape of `x`.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> from relprop.windows import translated
        >>> fn = lambda w, x: x[::2] @ w  # sees every second element
        >>> explain = rp.explain(fn, rp.Epsilon(0.0))
        >>> w, x = jnp.ones(2), jnp.array([1.0, 2.0, 3.0, 4.0])
        >>> explain(w, x)
        Array([1., 0., 3., 0.], dtype=float32)
        >>> translated(explain, [0, 1], axes=0, mode="wrap")(w, x)
        Array([0.5, 1. , 1.5, 2. ], dtype=float32)
    """
    many = (axes,) if isinstance(axes, int | np.integer) else tuple(axes)
    offsets = _checked_shifts(shifts, len(many))
    if mode not in PADDINGS:
        raise ArgumentError(f"mode={mode!r} has to be one of {', '.join(map(repr, PADDINGS))}.")
    _check_batch_size(batch_size)

    def averaged(*args: Any, **kwargs: Any) -> jax.Array:
        *others, x = _arguments(args)
        places = pool.checked_axes(many, x.shape, of="the explained argument")
        widths = [(0, 0)] * x.ndim
        starts = np.zeros((len(offsets), 1 + x.ndim), np.int32)
        for place, along in zip(places, offsets.T, strict=True):
            widths[place] = (max(along.max(), 0), max(-along.min(), 0))
            starts[:, 1 + place] = widths[place][0] - along

        def padded(v):
            return jnp.pad(v, widths, mode=mode)

        def one(window):
            return _checked(explain(*others, window, **kwargs), x.shape, "of the explained argument")

        def several(windows):  # a batch of one needs no vmap, which not every function can do
            return (), jax.vmap(one)(windows) if len(windows) > 1 else one(windows[0])[None]

        table = jnp.asarray(starts)
        count = len(offsets)
        total, _, dtype = _sum_of_windows(several, padded(x)[None], x.shape, lambda k: table[k], count, batch_size)
        (back,) = jax.linear_transpose(padded, jax.ShapeDtypeStruct(x.shape, total.dtype))(total[0])
        return (back / count).astype(dtype)

    return averaged


def sliding_window(
    explain: Callable[..., Any],
    window: int | Sequence[int],
    stride: int | Sequence[int],
    *,
    axes: int | Sequence[int] = (-3, -2),
    batch_size: int = 1,
    values: bool = False,
) -> Callable[..., Any]:
    """Explain images that are larger than the input of the network: a window moves over them.

    What is explained is the sum of the network's output over all windows, ``g(X) = sum_s f(X[s])``, and the result is
    the sum of the relevance of the windows, each at its place: a pixel has the relevance that it has in all windows that
    show it. Near the border of the image there are fewer of these.

    The window moves by `stride` from index 0 on. Where this does not end at the border, one more window lies flush with
    it, so that the border is seen.

    Args:
        explain: a function of any arguments that returns the relevance of the last positional one, a batch of windows:
            ``rp.explain(fn, rules, target=3)``. It is called with `batch_size` windows; targets that differ from example
            to example do not fit. With ``target="top"`` each window is explained for the class predicted there.
        window: the size of the windows along `axes`: one number for all, or one for each.
        stride: how far the window moves, likewise.
        axes: the axes of the image along which the window moves. The axes before the first of them are those of a batch
            of images, all others belong to a window. So for channels-first images take the channels among `axes`:
            ``window=(3, 224, 224), stride=(3, 112, 112), axes=(-3, -2, -1)``.
        batch_size: how many windows are explained at once. More is faster and takes more memory.
        values: `explain` returns pairs (value, relevance), as `value_and_explain` does, and so does the result.

    Returns:
        A function of the same arguments, with an image (height, width, channels) or a batch of them in the place of the
        windows: its relevance, of its shape. With `values`, a pair (values, relevance): values are those of all
        windows, with the number of windows along each of the moving axes in place of the batch of windows, behind the
        axes of a batch of images: (batch, windows down, windows across, classes). Put it under `jax.jit`, as a loop
        outside of it is compiled at each call.

    Raises:
        ArgumentError: if sizes have no meaning; when called, if the image is smaller than the window, or if `explain`
            does not return relevance of the shape of the windows.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> from relprop.windows import sliding_window
        >>> fn = lambda w, x: jnp.einsum("nhwc,hwc->n", x, w)  # takes 2 x 2 pixels
        >>> explain = rp.value_and_explain(fn, rp.Epsilon(0.0))
        >>> image = jnp.ones((2, 4, 1))
        >>> values, relevance = sliding_window(explain, 2, 1, values=True)(jnp.ones((2, 2, 1)), image)
        >>> values
        Array([[4., 4., 4.]], dtype=float32)
        >>> relevance[..., 0]
        Array([[1., 2., 2., 1.],
               [1., 2., 2., 1.]], dtype=float32)
    """
    many = (axes,) if isinstance(axes, int | np.integer) else tuple(axes)
    windows = pool.checked_lengths(window, len(many), "window")
    strides = pool.checked_lengths(stride, len(many), "stride")
    _check_batch_size(batch_size)

    def summed(*args: Any, **kwargs: Any) -> Any:
        *others, x = _arguments(args)
        places = pool.checked_axes(many, x.shape, of="the image")
        size, step, grid = list(x.shape), [1] * x.ndim, [1] * x.ndim
        for place, length, moved in zip(places, windows, strides, strict=True):
            if length > x.shape[place]:
                raise ArgumentError(
                    f"The window has length {length} along axis {place}, but the image has shape {x.shape}. Pad the image, "
                    "or explain it without sliding_window."
                )
            size[place], step[place] = length, moved
            grid[place] = -(-(x.shape[place] - length) // moved) + 1

        first = min(places)
        leading = math.prod(x.shape[:first])
        images = x.reshape(leading, *x.shape[first:])
        size, step, grid = size[first:], [1, *step[first:]], [leading, *grid[first:]]
        last = [n - s for n, s in zip(images.shape, [1, *size], strict=True)]

        def start(k):
            at = jnp.stack(jnp.unravel_index(k, grid)).astype(jnp.int32)
            return jnp.minimum(at * jnp.array(step, jnp.int32), jnp.array(last, jnp.int32))

        def explained(batch):
            found = explain(*others, batch, **kwargs)
            if values and not (isinstance(found, tuple) and len(found) == 2):
                raise ArgumentError(f"With values=True explain has to return a pair (value, relevance), not {_form(found)}.")
            value, relevance = found if values else ((), found)
            for leaf in jax.tree.leaves(value):
                if jnp.shape(leaf)[:1] != (len(batch),):
                    raise ArgumentError(
                        f"Values have shape {jnp.shape(leaf)}, but for {len(batch)} windows have to have the shape "
                        f"({len(batch)}, ...)."
                    )
            return value, _checked(relevance, batch.shape, "of the windows that it was given")

        total, found, dtype = _sum_of_windows(explained, images, tuple(size), start, math.prod(grid), batch_size)
        relevance = total.astype(dtype).reshape(x.shape)
        if not values:
            return relevance
        moving = tuple(grid[1 + place - first] for place in sorted(places))
        return jax.tree.map(lambda v: v.reshape(*x.shape[:first], *moving, *v.shape[1:]), found), relevance

    return summed


def relevant_pattern(
    x: Array,
    relevance: Array,
    *,
    axes: int | Sequence[int] = (-3, -2),
    channels: int | None = -1,
    quantile: float = 1.0,
) -> jax.Array:
    """The picture of what was relevant: the input seen through its relevance, `x * R` with `R` brought into [0, 1].

    Relevance is summed over the channels, so that colours stay; what is negative becomes 0; it is divided by a limit,
    and what is above the limit becomes 1. So pixels are shown as they are where relevance is strong, and fade to 0.

    Args:
        x: the picture, in units in which 0 is the background: undo a normalisation first, as it makes 0 a mean colour.
            Images with channels last by default, one (height, width, channels) or a batch of them. Any real type.
        relevance: floating-point, of the shape of `x`, or without its channels.
        axes: those of one picture, over which the limit is taken; each has its own.
        channels: the axis of `x` over which relevance is summed. None: `x` has no channels, or each its own mask.
        quantile: the limit, as a quantile of those sums that are positive. 1 is the largest; 0.99 keeps a few very
            strong pixels from darkening all others.

    Returns:
        The shape of `x`, in its dtype if that is floating-point, in that of the relevance otherwise. All 0 where nothing
        is positive.

    Raises:
        ArgumentError: if shapes do not fit, relevance is not floating-point, or quantile is not in (0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.windows import relevant_pattern
        >>> x = jnp.array([[[9, 6, 3], [9, 6, 3], [9, 6, 3]]])  # height 1, width 3, three colours
        >>> relevance = jnp.array([[[1.0, 1.0, 1.0], [2.0, 1.0, -1.0], [0.0, -1.0, 0.0]]])
        >>> relevant_pattern(x, relevance)
        Array([[[9., 6., 3.],
                [6., 4., 2.],
                [0., 0., 0.]]], dtype=float32)
    """
    x, relevance = jnp.asarray(x), jnp.asarray(relevance)
    if not jnp.issubdtype(relevance.dtype, jnp.floating):
        raise ArgumentError(f"relevance has to be an array of real floating-point numbers, but has dtype {relevance.dtype}.")
    if not 0 < quantile <= 1:
        raise ArgumentError(f"quantile={quantile} has to be above 0 and at most 1.")
    places = pool.checked_axes(axes, x.shape, of="x")
    strength = widen(relevance)
    if channels is not None:
        (channel,) = pool.checked_axes(channels, x.shape, "channels", of="x")
        if relevance.shape == x.shape:
            strength = strength.sum(channel, keepdims=True)
        elif relevance.shape == x.shape[:channel] + x.shape[channel + 1 :]:
            strength = jnp.expand_dims(strength, channel)
        else:
            raise ArgumentError(
                f"relevance has shape {relevance.shape}, but has to have that of x, {x.shape}, or that without its "
                f"channels, axis {channel}."
            )
    elif relevance.shape != x.shape:
        raise ArgumentError(f"relevance has shape {relevance.shape}, but has to have that of x, {x.shape}.")
    limit = _positive_quantile(strength, places, quantile)
    mask = jnp.clip(strength / jnp.where(limit > 0, limit, jnp.ones_like(limit)), 0, 1)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else relevance.dtype
    return (widen(x.astype(dtype)).astype(mask.dtype) * mask).astype(dtype)


def _positive_quantile(strength: jax.Array, places: tuple[int, ...], quantile: float) -> jax.Array:
    """The quantile of the positive elements over the axes at `places`, which are kept with length 1; 0 without any."""
    front = jnp.moveaxis(strength, places, range(len(places)))
    rest = front.shape[len(places) :]
    flat = jnp.sort(jnp.maximum(front, 0).reshape(math.prod(front.shape[: len(places)]), *rest), axis=0)
    count = jnp.sum(flat > 0, axis=0, keepdims=True)
    down = (count - 1).astype(flat.dtype) * (1 - quantile)  # ranks below the largest, which is exact for quantile 1
    ranks = [
        jnp.clip(len(flat) - 1 - rank.astype(jnp.int32), 0, len(flat) - 1) for rank in (jnp.ceil(down), jnp.floor(down))
    ]
    below, above = (jnp.take_along_axis(flat, rank, axis=0) for rank in ranks)
    limit = above + (below - above) * (down - jnp.floor(down))  # between ranks as numpy does
    return jnp.expand_dims(limit[0], sorted(places))


def _sum_of_windows(
    explain: Callable[[jax.Array], tuple[Any, jax.Array]],
    images: jax.Array,
    size: tuple[int, ...],
    start: Callable[[jax.Array], jax.Array],
    count: int,
    batch_size: int,
) -> tuple[jax.Array, Any, Any]:
    """Explain `count` windows of `images` and add up their relevance where they were cut out.

    Images have the shape (images, ...), a window is `images[i, a : a + size[0], ...]` with `start(k) = (i, a, ...)`, and
    `explain` maps windows (batch, *size) to (values, relevance). Returns the sum, the values of all windows in order, and
    the dtype of the relevance, as the sum is in at least float32.
    """
    batch_size = min(batch_size, max(count, 1))
    values, relevance = jax.eval_shape(explain, jax.ShapeDtypeStruct((batch_size, *size), images.dtype))
    zeros = jnp.zeros(images.shape, wide_dtype(relevance))
    if count == 0:
        return zeros, jax.tree.map(lambda v: jnp.zeros((0, *v.shape[1:]), v.dtype), values), relevance.dtype

    def add(total, item):
        at, r = item
        there = lax.dynamic_slice(total, at, (1, *size))
        return lax.dynamic_update_slice(total, there + r[None], at), None

    def step(carry, _):
        total, block = carry
        k = block * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        at = jax.vmap(start)(jnp.minimum(k, count - 1))
        cut = jax.vmap(lambda a: lax.dynamic_slice(images, a, (1, *size))[0])(at)
        found, r = explain(cut)
        # The last batch is filled up with a window that counts no more.
        counts = (k < count).reshape(-1, *(1,) * len(size))
        r = jnp.where(counts, r.astype(total.dtype), jnp.zeros((), total.dtype))
        return (lax.scan(add, total, (at, r))[0], block + 1), found

    blocks = -(-count // batch_size)
    (total, _), found = lax.scan(step, (zeros, jnp.int32(0)), length=blocks)
    found = jax.tree.map(lambda v: v.reshape(blocks * batch_size, *v.shape[2:])[:count], found)
    return total, found, relevance.dtype


def _arguments(args: tuple[Any, ...]) -> list[Any]:
    if not args:
        raise ArgumentError("The explanation was called without positional arguments; the last one is explained.")
    return [*args[:-1], jnp.asarray(args[-1])]


def _checked(relevance: Any, shape: tuple[int, ...], of: str) -> jax.Array:
    is_array = isinstance(relevance, jax.Array | np.ndarray)
    if is_array and relevance.shape == shape and jnp.issubdtype(relevance.dtype, jnp.inexact):
        return jnp.asarray(relevance)
    raise ArgumentError(
        f"explain has to return relevance of the shape {shape} {of}, in floating point, but returned {_form(relevance)}. "
        "Pass what rp.explain returns, without has_aux."
    )


def _form(found: Any) -> str:
    if isinstance(found, jax.Array | np.ndarray):
        return f"{found.dtype}{list(found.shape)}"
    if isinstance(found, tuple | list):
        return f"a {type(found).__name__} of {len(found)}"
    return type(found).__name__


def _checked_shifts(shifts: Any, count: int) -> np.ndarray:
    """Shape (shifts, axes)."""
    form = "an int, or a sequence of shifts with one int for each axis"
    if isinstance(shifts, jax.core.Tracer):
        raise ArgumentError(f"shifts has to be known when the function is made: {form}. Here it is traced.")
    found = np.asarray(shifts)
    if found.ndim == 0 and found.dtype.kind in "iu":
        if found < 0:
            raise ArgumentError(f"shifts={shifts} has to be {form}; an int n means all shifts from -n to n.")
        found = np.array(list(itertools.product(range(-int(found), int(found) + 1), repeat=count)))
    if found.ndim == 1 and count == 1:
        found = found[:, None]
    if found.ndim != 2 or found.shape[1] != count or len(found) == 0 or found.dtype.kind not in "iu":
        raise ArgumentError(f"shifts={shifts} has to be {form}; there are {count} axes.")
    return found.astype(np.int64)


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ArgumentError(f"batch_size={batch_size} has to be a positive integer.")
