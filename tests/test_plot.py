"""Heatmaps, by the colours of the pixels that come out."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from relprop.plot import heatmap


def pixels(ax):
    """The colours (H, W, 4) of the heatmap in `ax`, as matplotlib paints them."""
    drawn = ax.images[-1]
    return drawn.cmap(drawn.norm(drawn.get_array()))


def painted(ax, shape):
    """The colours (H, W, 3) on the canvas at the centre of each pixel of the heatmap in `ax`."""
    ax.figure.canvas.draw()
    canvas = np.asarray(ax.figure.canvas.buffer_rgba())[..., :3] / 255
    height, width = shape
    centres = [(x, y) for y in range(height) for x in range(width)]
    across, up = np.round(ax.transData.transform(centres)).astype(int).T
    return canvas[len(canvas) - 1 - up, across].reshape(height, width, 3)


def agg(*args, **kwargs):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    ax = heatmap(*args, **kwargs)
    FigureCanvasAgg(np.ravel(ax)[0].figure)
    return ax


def clim(ax):
    return tuple(map(float, ax.images[-1].get_clim()))


RED, WHITE, BLUE = (1, 0, 0), (1, 1, 1), (0, 0, 1)


def test_positive_is_red_negative_blue_and_zero_white():
    relevance = jnp.array([[3.0, 0.0], [-3.0, 1.5]])
    for colours in (pixels(heatmap(relevance))[..., :3], painted(agg(relevance), (2, 2))):
        np.testing.assert_array_equal(colours[0, 0], RED)
        np.testing.assert_array_equal(colours[0, 1], WHITE)
        np.testing.assert_array_equal(colours[1, 0], BLUE)
        np.testing.assert_allclose(colours[1, 1], (1, 0.5, 0.5), atol=1 / 128)


def test_scale_is_symmetric_whatever_the_sign_of_the_relevance():
    assert clim(heatmap(jnp.array([[1.0, 0.5]]))) == (-1, 1)
    assert clim(heatmap(jnp.array([[-4.0, 0.5]]))) == (-4, 4)
    assert clim(heatmap(jnp.array([[-4.0, 0.5]]), limit=8)) == (-8, 8)


def test_relevance_beyond_a_given_limit_is_full_red():
    colours = pixels(heatmap(jnp.array([[5.0, 1.0, -5.0]]), limit=1.0))[0, :, :3]
    np.testing.assert_array_equal(colours, [RED, RED, BLUE])


def test_own_and_shared_limits():
    relevance = jnp.array([[[1.0, 0.0]], [[0.0, -4.0]]])
    assert [clim(ax) for ax in heatmap(relevance, layout="NHW").flat] == [(-1, 1), (-4, 4)]
    shared = heatmap(relevance, layout="NHW", limit="shared")
    assert [clim(ax) for ax in shared.flat] == [(-4, 4)] * 2
    np.testing.assert_allclose(pixels(shared.flat[0])[0, 0, :3], (1, 0.75, 0.75), atol=1 / 128)


@pytest.mark.parametrize("limit", ["own", "shared", 1.0])
def test_relevance_of_zero_throughout_is_white(limit):
    ax = agg(jnp.zeros((2, 3)), limit=limit)
    np.testing.assert_array_equal(painted(ax, (2, 3)), np.ones((2, 3, 3)))


def test_channels_are_summed_with_their_signs():
    relevance = np.zeros((2, 2, 3))
    relevance[0, 0] = 1.0, 1.0, 2.0
    relevance[1, 1] = 5.0, -5.0, 0.0
    ax = heatmap(relevance, layout="HWC")
    np.testing.assert_array_equal(ax.images[0].get_array(), [[4.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("layout", ["HWC", "CHW", "NHW", "NHWC", "NCHW", "WH"])
def test_every_layout_draws_the_same_picture(layout):
    relevance = np.random.default_rng(0).normal(size=(2, 4, 5, 3))  # NHWC
    full = "NHWC"
    if "N" not in layout:
        relevance, full = relevance[0], full.replace("N", "")
    if "C" not in layout:
        relevance, full = relevance.sum(-1), full.replace("C", "")
    expected = relevance.sum(-1) if "C" in layout else relevance
    axes = heatmap(jnp.asarray(np.transpose(relevance, [full.index(axis) for axis in layout])), layout=layout)
    for ax, each in zip(np.ravel(axes), expected if "N" in layout else [expected], strict=True):
        np.testing.assert_allclose(ax.images[0].get_array(), each, rtol=1e-12)


def test_rank_4_is_a_batch_with_channels_last():
    axes = heatmap(jnp.ones((2, 4, 5, 3)))
    assert axes.shape == (1, 2)
    assert axes[0, 0].images[0].get_array().shape == (4, 5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_float_type(dtype):
    relevance = jnp.array([[1.0, -2.0]], dtype)
    for array in (relevance, np.asarray(relevance)):
        np.testing.assert_array_equal(pixels(heatmap(array))[0, 1, :3], BLUE)


def test_image_lies_beneath_in_grey():
    relevance = jnp.array([[1.0, 0.0, 0.0, -1.0]])
    image = np.array([[[0] * 3, [0] * 3, [255] * 3, [255] * 3]], np.uint8)
    assert len(heatmap(relevance).images) == 1
    for layers in (relevance, relevance[..., None]):
        layout = "HW" if layers.ndim == 2 else "HWC"
        ax = agg(layers, layout=layout, image=image, alpha=0.25)
        assert len(ax.images) == 2
        expected = [(0.25, 0, 0), (0.25, 0.25, 0.25), (1, 1, 1), (0.75, 0.75, 1)]
        np.testing.assert_allclose(painted(ax, (1, 4))[0], expected, atol=2 / 255)
    np.testing.assert_allclose(
        painted(agg(relevance, image=image, alpha=1.0), (1, 4))[0], [RED, WHITE, WHITE, BLUE], atol=1e-12
    )


def test_images_of_a_batch_go_to_their_heatmaps():
    images = np.random.default_rng(0).uniform(size=(3, 4, 5, 3))
    for image in (images, images.mean(-1), jnp.asarray(images)):
        axes = heatmap(jnp.ones((3, 4, 5, 3)), image=image)
        for i, ax in enumerate(axes.flat[:3]):
            np.testing.assert_allclose(ax.images[0].get_array(), images[i].mean(-1), rtol=1e-12)
    axes = heatmap(jnp.ones((3, 3, 4, 5)), layout="NCHW", image=images.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(axes.flat[2].images[0].get_array(), images[2].mean(-1), rtol=1e-12)


def test_grid_titles_and_spare_axes():
    axes = heatmap(jnp.ones((5, 2, 2, 1)), titles=list("abcde"))
    assert axes.shape == (2, 3)
    assert [ax.get_title() for ax in axes.flat] == [*"abcde", ""]
    assert [len(ax.images) for ax in axes.flat] == [1, 1, 1, 1, 1, 0]
    assert not any(ax.axison for ax in axes.flat)
    assert heatmap(jnp.ones((5, 2, 2, 1)), columns=5).shape == (1, 5)
    assert heatmap(jnp.ones((1, 2, 2, 1))).shape == (1, 1)
    assert heatmap(jnp.ones((2, 2)), titles="a").get_title() == "a"


def test_draws_into_the_axes_that_are_given():
    axes = Figure().subplots(2, 2)
    assert heatmap(jnp.ones((2, 2)), ax=axes[0, 0]) is axes[0, 0]
    assert len(axes[0, 0].images) == 1
    assert heatmap(jnp.ones((3, 2, 2)), layout="NHW", ax=axes) is axes
    assert [len(ax.images) for ax in axes.flat] == [2, 1, 1, 0]
    assert heatmap(jnp.ones((1, 2, 2)), layout="NHW", ax=axes[1, 1]) is axes[1, 1]


@pytest.mark.parametrize(("limit", "bars"), [("own", 3), ("shared", 1), (2.0, 1)])
def test_colorbar(limit, bars):
    axes = heatmap(jnp.ones((3, 2, 2, 1)), limit=limit, colorbar=True)
    figure = axes[0, 0].figure
    assert len(figure.axes) == axes.size + bars
    figure.canvas.draw()


def test_writes_a_file_and_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys, jax.numpy as jnp, relprop.plot as plot\n"
        "assert 'matplotlib' not in sys.modules, 'imported before it is needed'\n"
        "plot.heatmap(jnp.ones((2, 2)), titles='a').figure.savefig(sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot has global state'\n"
    )
    path = tmp_path / "a.png"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "relprop\[plot\]"'):
        heatmap(jnp.ones((2, 2)))


@pytest.mark.parametrize(
    ("relevance", "arguments", "message"),
    [
        (jnp.ones((2, 3, 4)), {}, r'shape \(2, 3, 4\).* Say layout="HWC" or layout="NHW"'),
        (jnp.ones(3), {}, r"shape \(3,\).* rank 2"),
        (jnp.ones((1, 1, 1, 1, 1)), {}, "rank 2"),
        (jnp.ones((2, 2)), {"layout": "HWC"}, r"names 3 axes, but relevance has shape \(2, 2\)"),
        (jnp.ones((2, 2)), {"layout": "XY"}, "name each axis once"),
        (jnp.ones((2, 2)), {"layout": "NH"}, "name each axis once"),
        (jnp.ones((2, 2), int), {}, "real floating-point numbers, but has dtype int64"),
        (jnp.ones((2, 2), complex), {}, "dtype complex128"),
        (jnp.ones((2, 2), bool), {}, "dtype bool"),
        (jnp.ones((0, 2)), {}, "nothing to draw"),
        (jnp.array([[0.0, jnp.nan]]), {}, r"1 of its 2 elements .* nan at index \(0, 1\)"),
        (jnp.array([[jnp.inf, -jnp.inf]]), {}, r"2 of its 2 elements .* inf at index \(0, 0\)"),
        (jnp.ones((2, 2)), {"limit": "each"}, 'has to be "own", "shared"'),
        (jnp.ones((2, 2)), {"limit": 0.0}, "positive number"),
        (jnp.ones((2, 2)), {"limit": jnp.nan}, "positive number"),
        (jnp.ones((2, 2)), {"alpha": 2.0}, "opacity between 0 and 1"),
        (jnp.ones((2, 2)), {"titles": ["a"]}, "a string for one heatmap"),
        (jnp.ones((2, 2, 2, 1)), {"titles": "ab"}, "has to be 2 strings"),
        (jnp.ones((2, 2, 2, 1)), {"titles": ["a"]}, "has to be 2 strings"),
        (jnp.ones((2, 2)), {"columns": 2}, "needs a batch"),
        (jnp.ones((2, 2, 2, 1)), {"columns": 0}, "at least 1"),
        (jnp.ones((2, 2)), {"ax": "left"}, "has to be matplotlib Axes"),
        (jnp.ones((2, 2)), {"ax": Figure().subplots(1, 2)}, "holds 2 Axes, but has to be one"),
        (jnp.ones((3, 2, 2, 1)), {"ax": Figure().subplots(1, 2)}, "array of at least 3"),
        (jnp.ones((2, 2)), {"image": jnp.ones((2, 3))}, r"shape \(2, 3\).* HW = \(2, 2\), or HWC"),
        (jnp.ones((2, 2)), {"image": jnp.ones(4)}, "does not lie under"),
        (jnp.ones((5, 2, 2, 3)), {"image": jnp.ones((2, 2, 3))}, r"NHW = \(5, 2, 2\), or NHWC"),
        (jnp.ones((2, 2)), {"image": jnp.full((2, 2), jnp.nan)}, "image is not finite"),
        (jnp.ones((2, 2)), {"image": jnp.ones((2, 2), complex)}, "image has to be an array of real numbers"),
    ],
)
def test_errors_say_what_is_expected(relevance, arguments, message):
    with pytest.raises(ValueError, match=message):
        heatmap(relevance, **arguments)
