"""Random transformations of images, under which a prototype has to stay one: functions (key, x) -> x for `maximize`.

Images are (..., height, width, channels); of a batch each is transformed in a way of its own. What a network likes in one
place and one scale only, noise above all, is not liked on the average.

After Olah, Mordvintsev, Schubert: Feature Visualization, Distill 2017, "Transformation robustness".
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import ArgumentError
from ..progress import require

__all__ = ["crop", "jitter", "lucid", "pad", "rotate", "scale"]

Transform = Callable[[jax.Array, jax.Array], jax.Array]


def jitter(pixels: int, mode: str = "edge") -> Transform:
    """Shift an image by up to `pixels` in each direction; what enters is made by `mode`, as in `jax.numpy.pad`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from relprop.maximization import transforms
        >>> x = jnp.arange(3.0).reshape(1, 3, 1)
        >>> transforms.jitter(1)(jax.random.key(1), x).shape
        (1, 3, 1)
    """
    grown = pad(pixels, mode)

    def shifted(key, x):
        return crop(x.shape[-3:-1])(key, grown(key, x))

    return shifted


def pad(pixels: int, mode: str | float = "edge") -> Transform:
    """Grow an image by `pixels` on each side: by a `mode` of `jax.numpy.pad`, or with a number."""
    if not isinstance(pixels, int) or pixels < 0:
        raise ArgumentError(f"pixels={pixels!r} has to be an integer, 0 or more.")

    def padded(key, x):
        _checked(x)
        widths = [(0, 0)] * (x.ndim - 3) + [(pixels, pixels)] * 2 + [(0, 0)]
        if isinstance(mode, str):
            return jnp.pad(x, widths, mode=mode)
        return jnp.pad(x, widths, constant_values=mode)

    return padded


def crop(size: int | Sequence[int]) -> Transform:
    """A window of that size (height, width), or a square, at a random place."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ArgumentError(f"size={size} has to be positive.")

    def cropped(key, x):
        if height > x.shape[0] or width > x.shape[1]:
            raise ArgumentError(f"A window of {height} x {width} does not fit into an image of {x.shape[0]} x {x.shape[1]}.")
        most = jnp.array([x.shape[0] - height + 1, x.shape[1] - width + 1])
        top, left = jax.random.randint(key, (2,), 0, most)
        return jax.lax.dynamic_slice(x, (top, left, 0), (height, width, x.shape[2]))

    return _each(cropped)


def scale(low: float, high: float) -> Transform:
    """Enlarge what an image shows about its centre, by a factor drawn from [low, high]; the size is kept.

    Where it is made smaller the border is repeated.
    """
    if not 0 < low <= high:
        raise ArgumentError(f"low={low} and high={high} have to be positive, low the smaller.")

    def scaled(key, x):
        factor = jnp.broadcast_to(jax.random.uniform(key, (), x.dtype, low, high), (2,))
        # Enough of a border for the smallest factor, so that no place is empty.
        rows, columns = (int(-(-n * (1 / low - 1) // 2)) if low < 1 else 0 for n in x.shape[:2])
        grown = jnp.pad(x, [(rows, rows), (columns, columns), (0, 0)], mode="edge")
        sizes = jnp.array(grown.shape[:2], x.dtype)
        shift = (jnp.array(x.shape[:2], x.dtype) - factor * sizes) / 2
        return jax.image.scale_and_translate(grown, x.shape, (0, 1), factor, shift, "linear", antialias=True)

    return _each(scaled)


def rotate(degrees: float) -> Transform:
    """Turn an image about its centre, by an angle drawn from [-degrees, degrees]; the border is repeated.

    Needs dm-pix: ``pip install "relprop[maximization]"``.
    """
    if not degrees >= 0:
        raise ArgumentError(f"degrees={degrees} has to be 0 or more.")
    pix = require("dm_pix", "turning images", "maximization")

    def turned(key, x):
        angle = jnp.deg2rad(jax.random.uniform(key, (), jnp.float32, -degrees, degrees))
        # dm-pix mixes integers, angles and pixels: it is written for the standard promotion.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return pix.rotate(x, angle, order=1, mode="nearest").astype(x.dtype)

    return _each(turned)


def lucid(grey: float = 0.5) -> tuple[Transform, ...]:
    """The sequence that Lucid has by default: padding, jitter, scale, rotation, and jitter again.

    For images of some hundred pixels; the size grows by 24. A network that takes one size needs `crop(size)` at the end.

    Args:
        grey: what the image is padded with.
    """
    return pad(12, grey), jitter(8), scale(0.9, 1.1), rotate(10.0), jitter(4)


def _each(one: Transform) -> Transform:
    """A transform of one image, for each of a batch with a key of its own."""

    def transformed(key: jax.Array, x: jax.Array) -> jax.Array:
        _checked(x)
        if x.ndim == 3:
            return one(key, x)
        images = x.reshape(-1, *x.shape[-3:])
        found: Any = jax.vmap(one)(jax.random.split(key, len(images)), images)
        return found.reshape(*x.shape[:-3], *found.shape[1:])

    return transformed


def _checked(x: jax.Array) -> None:
    if x.ndim < 3:
        raise ArgumentError(f"Transforms take images (..., height, width, channels), not the shape {x.shape}.")
