"""Random transformations of images, under which a prototype has to stay one: functions (key, x) -> x for `maximize`.

What a network likes in one place and one scale only, noise above all, is not liked on the average. After Olah, Mordvintsev
and Schubert 2017, "Feature Visualization", section "Transformation robustness".

Images are (..., height, width, channels), of any floating-point dtype, which is kept. The axes before are those of a batch,
of which each image has a draw of its own. Draws do not depend on the dtype. All transforms can be differentiated by `x`, and
put under `jax.jit` and `jax.vmap`: the shape of the result depends on that of `x` alone.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .. import pool
from ..errors import ArgumentError
from ..progress import require
from ..surrogate import widen
from ..windows import PADDINGS

__all__ = ["crop", "jitter", "lucid", "pad", "rotate", "scale"]

Transform = Callable[[jax.Array, jax.Array], jax.Array]


def jitter(pixels: int, mode: str | float = "edge") -> Transform:
    """Shift images by a whole number of pixels along height and width, each drawn from -pixels to pixels.

    Args:
        pixels: the largest shift.
        mode: what enters at the border, as for `pad`.

    Returns:
        A function (key, x) -> x that keeps the shape.

    Raises:
        ArgumentError: if pixels is not an int of 0 or more, or mode is unknown; when called, if `x` is no image.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from relprop.maximization import transforms
        >>> x = jnp.arange(5.0).reshape(1, 5, 1)
        >>> transforms.jitter(0)(jax.random.key(0), x)[0, :, 0]
        Array([0., 1., 2., 3., 4.], dtype=float32)
        >>> transforms.jitter(2)(jax.random.key(0), x).shape
        (1, 5, 1)
    """
    grown = pad(pixels, mode)
    return lambda key, x: crop(_checked(x).shape[-3:-1])(key, grown(key, x))


def pad(pixels: int, mode: str | float = "edge") -> Transform:
    """Grow images by `pixels` on each of the four sides. Nothing is random.

    Args:
        pixels: the width of the border.
        mode: "edge" repeats the border, "wrap" goes on at the other end, "reflect" and "symmetric" mirror without and with
            the border, "constant" is zero, as in `jax.numpy.pad`. A number fills with that number, in the units of `x`.

    Returns:
        A function (key, x) -> x for which height and width grow by 2 * pixels.

    Raises:
        ArgumentError: if pixels is not an int of 0 or more, or mode is unknown; when called, if `x` is no image.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from relprop.maximization import transforms
        >>> transforms.pad(1, 0.5)(jax.random.key(0), jnp.ones((1, 2, 1)))[..., 0]
        Array([[0.5, 0.5, 0.5, 0.5],
               [0.5, 1. , 1. , 0.5],
               [0.5, 0.5, 0.5, 0.5]], dtype=float32)
    """
    if not isinstance(pixels, int | np.integer) or pixels < 0:
        raise ArgumentError(f"pixels={pixels!r} has to be an integer, 0 or more.")
    if isinstance(mode, str) and mode not in PADDINGS:
        raise ArgumentError(f"mode={mode!r} has to be a number or one of {', '.join(map(repr, PADDINGS))}.")

    def padded(key, x):
        x = _checked(x)
        widths = [(0, 0)] * (x.ndim - 3) + [(pixels, pixels)] * 2 + [(0, 0)]
        return jnp.pad(x, widths, mode=mode) if isinstance(mode, str) else jnp.pad(x, widths, constant_values=mode)

    return padded


def crop(size: int | Sequence[int]) -> Transform:
    """Cut windows out of images, at a random place, all places being equally likely.

    Args:
        size: height and width of the window in pixels, or one number for both.

    Returns:
        A function (key, x) -> x of the shape (..., height, width, channels).

    Raises:
        ArgumentError: if size is not one or two positive ints; when called, if `x` is no image, or smaller than the window.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from relprop.maximization import transforms
        >>> transforms.crop((4, 5))(jax.random.key(0), jnp.ones((2, 8, 8, 3))).shape
        (2, 4, 5, 3)
    """
    height, width = pool.checked_lengths(size, 2, "size")

    def cropped(key, x):
        if height > x.shape[0] or width > x.shape[1]:
            raise ArgumentError(
                f"A window of {height} x {width} does not fit into an image of {x.shape[0]} x {x.shape[1]}. Pad it first."
            )
        places = jnp.array([x.shape[0] - height + 1, x.shape[1] - width + 1])
        top, left = jax.random.randint(key, (2,), 0, places)
        return jax.lax.dynamic_slice(x, (top, left, 0), (height, width, x.shape[2]))

    return _each(cropped)


def scale(low: float, high: float) -> Transform:
    """Enlarge what images show about their centre, by a factor drawn uniformly from [low, high].

    Pixels are interpolated linearly, with antialiasing where the content becomes smaller; there the border is repeated.
    bfloat16 and float16 are computed in float32, as they cannot tell the pixels of a large image apart.

    Args:
        low: the smallest factor. Below 1 the content shrinks. Memory grows with 1 / low squared.
        high: the largest; equal to `low` for a fixed one.

    Returns:
        A function (key, x) -> x that keeps the shape.

    Raises:
        ArgumentError: if not 0 < low <= high, both finite; when called, if `x` is no image of floating-point numbers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from relprop.maximization import transforms
        >>> x = jnp.array([0.0, 0.0, 1.0, 1.0]).reshape(1, 4, 1)  # a step
        >>> transforms.scale(2.0, 2.0)(jax.random.key(0), x)[0, :, 0]  # is half as steep
        Array([0.  , 0.25, 0.75, 1.  ], dtype=float32)
    """
    if not 0 < low <= high < float("inf"):
        raise ArgumentError(f"low={low} and high={high} have to be positive and finite, low the smaller.")

    def scaled(key, x):
        _check_floating(x, "scale")
        # Enough of a border for the smallest factor, so that no place is empty.
        rows, columns = (int(-(-n * (1 / low - 1) // 2)) if low < 1 else 0 for n in x.shape[:2])
        grown = widen(jnp.pad(x, [(rows, rows), (columns, columns), (0, 0)], mode="edge"))
        factor = _between(key, low, high, grown.dtype)
        sizes, wanted = jnp.array(grown.shape[:2], grown.dtype), jnp.array(x.shape[:2], grown.dtype)
        shift = (wanted - factor * sizes) / 2
        factors = jnp.stack([factor, factor])
        found = jax.image.scale_and_translate(grown, x.shape, (0, 1), factors, shift, "linear", antialias=True)
        return found.astype(x.dtype)

    return _each(scaled)


def rotate(degrees: float) -> Transform:
    """Turn images about their centre, by an angle drawn uniformly from [-degrees, degrees].

    Pixels are interpolated linearly, and the border is repeated. Needs dm-pix: ``pip install "relprop[maximization]"``.

    Args:
        degrees: the largest angle, in degrees.

    Returns:
        A function (key, x) -> x that keeps the shape.

    Raises:
        ArgumentError: if degrees is negative or not finite; when called, if `x` is no image of floating-point numbers.
        ImportError: if dm-pix is not installed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from relprop.maximization import transforms
        >>> transforms.rotate(10.0)(jax.random.key(0), jnp.ones((2, 8, 8, 3))).shape
        (2, 8, 8, 3)
    """
    if not 0 <= degrees < float("inf"):
        raise ArgumentError(f"degrees={degrees} has to be 0 or more, and finite.")
    pix = require("dm_pix", "turning images", "maximization")

    def turned(key, x):
        _check_floating(x, "rotate")
        angle = jnp.deg2rad(_between(key, -degrees, degrees, widen(x).dtype))
        # dm-pix mixes integers, angles and pixels: it is written for the standard promotion.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return pix.rotate(x, angle, order=1, mode="nearest").astype(x.dtype)

    return _each(turned)


def lucid(grey: float = 0.5) -> tuple[Transform, ...]:
    """The sequence that Lucid has by default: padding by 12, jitter of 8, scale 0.9 to 1.1, up to 10 degrees, jitter of 4.

    For images of some hundred pixels, of which height and width grow by 24. A network that takes one size only needs
    `crop(size)` at the end. Lucid's jitter cuts so many pixels off, and so shifts half as far; here the size is kept. Lucid
    draws factors and angles from lists.

    Args:
        grey: what images are padded with, in their units: 0.5 is the middle of [0, 1].

    Returns:
        Five functions (key, x) -> x, to be applied in order: the `transforms` of `maximize`.

    Raises:
        ImportError: if dm-pix is not installed.

    Example:
        >>> from relprop.maximization import transforms
        >>> len(transforms.lucid())
        5
    """
    return pad(12, grey), jitter(8), scale(0.9, 1.1), rotate(10.0), jitter(4)


def _between(key: jax.Array, low: float, high: float, dtype) -> jax.Array:
    """A number of [low, high], for a key the same in all dtypes up to rounding, and exact where both are equal."""
    return jax.random.uniform(key, (), jnp.float32).astype(dtype) * (high - low) + low


def _each(one: Transform) -> Transform:
    """A transform of one image, for each of a batch with a key of its own."""

    def transformed(key: jax.Array, x: jax.Array) -> jax.Array:
        x = _checked(x)
        if x.ndim == 3:
            return one(key, x)
        images = x.reshape(-1, *x.shape[-3:])
        found = jnp.asarray(jax.vmap(one)(jax.random.split(key, len(images)), images))
        return found.reshape(*x.shape[:-3], *found.shape[1:])

    return transformed


def _checked(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ArgumentError(f"Transforms take images (..., height, width, channels), not the shape {x.shape}.")
    return x


def _check_floating(x: jax.Array, name: str) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ArgumentError(f"{name} takes images of floating-point numbers, but was given {x.dtype}: convert them first.")
