"""Relevance as pictures: red speaks for the explained output, blue against it, white is zero.

Needs matplotlib, which is imported when a picture is drawn and not before: ``pip install "relprop[plot]"``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from . import scales

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heatmap"]

Array = jax.Array | np.ndarray

PANEL = 2.5  # inches: the width of one heatmap in a figure made here
DEFAULT_LAYOUT = {2: "HW", 4: "NHWC"}  # rank 3 could be HWC or NHW, so it has no default


def heatmap(
    relevance: Array,
    *,
    layout: str | None = None,
    image: Array | None = None,
    alpha: float = 0.6,
    limit: Literal["own", "shared"] | float = "own",
    titles: str | Sequence[str] | None = None,
    columns: int | None = None,
    colorbar: bool = False,
    ax: Any = None,
) -> Any:
    """Draw relevance as one heatmap, or a batch of it as a grid of heatmaps.

    Channels are summed, with their signs, so that the pixels of a picture sum to the relevance of the input.
    The scale is symmetric about zero: red is positive relevance, blue negative, white none. Absolute values
    are never taken; for the strength regardless of sign pass ``jnp.abs(relevance)`` yourself.

    Nothing is shown and ``matplotlib.pyplot`` is not touched: without ``ax`` a new
    ``matplotlib.figure.Figure`` is made, which ``ax.figure.savefig(path)`` writes.

    Args:
        relevance: real floating-point numbers (bfloat16 too), all finite; a jax or numpy array of rank 2
            to 4.
        layout: what the axes are, one letter each: ``H`` and ``W``, with or without ``C`` (channels, summed)
            and ``N`` (examples, one heatmap each), for instance ``"HWC"``, ``"NHW"`` or ``"NCHW"``. Rank 2 is
            ``"HW"`` and rank 4 is ``"NHWC"`` if nothing else is said; rank 3 has to be told.
        image: the explained image, or batch of images, drawn beneath in grey. In the layout of
            ``relevance``, with or without channels (last, where ``relevance`` has none); of any real type and
            range, as each image is drawn from its own darkest to its own brightest value.
        alpha: opacity of the heatmap over ``image``: 0 shows only the image, 1 only the heatmap.
        limit: the relevance drawn in full red; minus it is full blue. ``"own"``: the largest magnitude of
            each heatmap. ``"shared"``: the largest magnitude of the batch, so that heatmaps can be compared.
            A positive number: that value; stronger relevance is drawn in the same full red or blue.
        titles: a string for one heatmap, a sequence of ``N`` strings for a batch.
        columns: heatmaps per row of a new grid; by default the grid is about as wide as it is high.
        colorbar: draw the scale: beside each heatmap for ``limit="own"``, one for all heatmaps otherwise.
        ax: matplotlib ``Axes`` to draw into, or for a batch an array of at least ``N`` of them, filled row
            by row (any that are left over are blanked).

    Returns:
        ``ax`` if it was given. Otherwise new ``Axes``, or for a batch the array (rows, columns) of them.

    Raises:
        ValueError: if the relevance is not finite, not real floating-point, or does not have the axes that
            ``layout`` names, or if an argument does not fit to it.
        ImportError: if matplotlib is not installed.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.plot import heatmap
        >>> relevance = jnp.array([[[0.5, -1.0], [0.0, 0.25]], [[0.0, 0.0], [2.0, 0.0]]])
        >>> axes = heatmap(relevance, layout="NHW", titles=["first", "second"])
        >>> [float(axes[0, i].images[0].get_clim()[1]) for i in range(2)]
        [1.0, 2.0]
        >>> axes = heatmap(relevance, layout="NHW", limit="shared")
        >>> [float(axes[0, i].images[0].get_clim()[1]) for i in range(2)]
        [2.0, 2.0]
        >>> axes[0, 0].figure.savefig("heatmaps.png")  # doctest: +SKIP
    """
    matplotlib = _import_matplotlib()

    values = _numbers(relevance, "relevance", "real floating-point numbers", jnp.floating)
    layout = _checked_layout(layout, values.shape)
    maps = _maps(values, layout)
    backgrounds = None if image is None else _greyscale(image, layout, maps.shape)
    limits = scales.limits(limit, list(maps))
    labels = scales.labels(titles, len(maps), "N" in layout, "heatmap", "heatmap of the batch")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is an opacity between 0 and 1, but is {alpha}.")

    ax, panels = _panels(matplotlib, ax, maps.shape, "N" in layout, columns)
    # An odd number of colours has one in the middle, so that zero is exactly white.
    colours = matplotlib.colormaps["bwr"].resampled(257)
    drawn = []
    for i, panel in enumerate(panels):
        panel.set_axis_off()
        if i >= len(maps):
            continue
        if backgrounds is not None:
            panel.imshow(backgrounds[i], cmap="gray", interpolation="nearest")
        drawn.append(
            panel.imshow(
                maps[i],
                cmap=colours,
                vmin=-limits[i],
                vmax=limits[i],
                alpha=1.0 if backgrounds is None else alpha,
                interpolation="nearest",
            )
        )
        if labels is not None:
            panel.set_title(labels[i])
    if colorbar and limit == "own":
        for panel, mappable in zip(panels, drawn, strict=False):
            panel.figure.colorbar(mappable, ax=panel)
    elif colorbar:
        panels[0].figure.colorbar(drawn[0], ax=panels)
    return ax


def _import_matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.axes
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            'relprop.plot draws with matplotlib, which is not installed: pip install "relprop[plot]"'
        ) from error
    return matplotlib


def _numbers(array: Array, name: str, wanted: str, *kinds: Any) -> np.ndarray:
    """`array` in float64, after checks that need no layout."""
    values = np.asarray(array)
    # jnp's issubdtype, because numpy's does not know bfloat16
    if not any(jnp.issubdtype(values.dtype, kind) for kind in kinds):
        raise ValueError(f"{name} has to be an array of {wanted}, but has dtype {values.dtype}.")
    if values.size == 0:
        raise ValueError(f"{name} has shape {values.shape}: there is nothing to draw.")
    values = values.astype(np.float64)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        where = tuple(map(int, bad[0]))
        raise ValueError(
            f"{name} is not finite: {len(bad)} of its {values.size} elements are nan or infinite, the first "
            f"is {values[where]} at index {where}. A heatmap would hide that; look for where it comes from."
        )
    return values


def _checked_layout(layout: str | None, shape: tuple[int, ...]) -> str:
    rank = len(shape)
    if layout is None:
        if rank == 3:
            raise ValueError(
                f"relevance has shape {shape}: one image with channels last, or a batch of images without "
                'channels? Say layout="HWC" or layout="NHW".'
            )
        if rank not in DEFAULT_LAYOUT:
            raise ValueError(f"relevance has shape {shape}, but a heatmap needs rank 2 (HW), 3 (HWC or NHW) or 4 (NHWC).")
        return DEFAULT_LAYOUT[rank]
    if "".join(sorted(layout)) not in ("HW", "CHW", "HNW", "CHNW"):
        raise ValueError(
            f"layout={layout!r} has to name each axis once: H, W and where there are such axes N and C, "
            'for instance "HWC" or "NCHW".'
        )
    if len(layout) != rank:
        raise ValueError(f"layout={layout!r} names {len(layout)} axes, but relevance has shape {shape}.")
    return layout


def _maps(values: np.ndarray, layout: str) -> np.ndarray:
    """Shape (N, H, W): channels summed, a single image as a batch of one."""
    if "N" in layout:
        return np.asarray(np.einsum(f"{layout}->NHW", values))
    return np.asarray(np.einsum(f"{layout}->HW", values)[None])


def _greyscale(image: Array, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    values = _numbers(image, "image", "real numbers", jnp.floating, jnp.integer)
    without = layout.replace("C", "")
    with_channels = layout if "C" in layout else layout + "C"
    by_rank = {len(without): without, len(with_channels): with_channels}
    if values.ndim in by_rank:
        image_layout = by_rank[values.ndim]
        maps = _maps(values, image_layout)
        if maps.shape == shape:
            channels = values.shape[image_layout.index("C")] if "C" in image_layout else 1
            return maps / channels
    expected = shape if "N" in layout else shape[1:]
    raise ValueError(
        f"image has shape {values.shape}, which does not lie under the heatmap of relevance with layout "
        f"{layout!r}: it has to be {without} = {expected}, or {with_channels} with channels besides."
    )


def _panels(
    matplotlib: Any, ax: Any, shape: tuple[int, ...], batched: bool, columns: int | None
) -> tuple[Any, "list[Axes]"]:
    """What `heatmap` returns, and the axes in it in drawing order."""
    count, height, width = shape
    if columns is not None and (ax is not None or not batched or columns < 1):
        raise ValueError(f"columns={columns} shapes a new grid: it needs a batch (N in the layout), no ax, and at least 1.")
    if ax is None:
        columns = 1 if not batched else (columns or int(np.ceil(np.sqrt(count))))
        rows = -(-count // columns)
        size = (PANEL * columns, PANEL * rows * height / width + 0.3 * rows)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        ax = figure.subplots(rows, columns, squeeze=not batched)
    panels = list(np.ravel(np.asarray(ax, dtype=object)))
    if not all(isinstance(panel, matplotlib.axes.Axes) for panel in panels):
        raise ValueError(f"ax has to be matplotlib Axes or an array of them, not {ax!r}.")
    if len(panels) < count or (not batched and len(panels) != 1):
        wanted = f"an array of at least {count} for the batch" if batched else "one for the one heatmap"
        raise ValueError(f"ax holds {len(panels)} Axes, but has to be {wanted}.")
    return ax, panels
