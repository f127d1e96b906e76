"""Explanations made of many: hand-worked shifts and windows, their laws, and loops written out as references."""

import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import relprop as rp
from relprop.errors import ArgumentError
from relprop.windows import relevant_pattern, sliding_window, translated

PARAMS = networks.init("conv_mixed_2d")  # takes 9 x 8 pixels with 4 channels, has strides
IMAGES = np.random.default_rng(1).uniform(-1, 1, size=(2, 13, 13, 4))
EXPLAIN = rp.explain(networks.conv_mixed_2d, rp.presets.epsilon_plus(), target=2)
BOTH = rp.value_and_explain(networks.conv_mixed_2d, rp.presets.epsilon_plus(), target=2)
ONE_BY_ONE = jax.jit(BOTH)

X = jnp.array([1.0, 2.0, 4.0])
MODES = ["edge", "wrap", "reflect", "symmetric", "constant"]


def linear(w, x):
    """The relevance of `x` for `sum(w * x)`."""
    return w * x


def ones(x):
    """Relevance that does not depend on `x`, as Flat gives it."""
    return jnp.ones_like(x)


def moved(explain, shifts, **options):
    """`translated` as it is meant to be used: compiled."""
    return jax.jit(translated(explain, shifts, **options))


def slid(explain, window, stride, **options):
    """`sliding_window` as it is meant to be used: compiled."""
    return jax.jit(sliding_window(explain, window, stride, **options))


pattern = jax.jit(relevant_pattern, static_argnames=("axes", "channels", "quantile"))


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)


# Shifts.


@pytest.mark.parametrize(
    ("mode", "of_linear", "of_ones"),
    [  # the shifted input is (?, 1, 2), its relevance for weights (1, 10, 100) is (?, 10, 200)
        ("edge", [1 + 10, 200, 0], [2, 1, 0]),  # ? = x[0] = 1
        ("wrap", [10, 200, 4], [1, 1, 1]),  # ? = x[2] = 4
        ("reflect", [10, 2 + 200, 0], [1, 2, 0]),  # ? = x[1] = 2
        ("symmetric", [1 + 10, 200, 0], [2, 1, 0]),  # ? = x[0] = 1
        ("constant", [10, 200, 0], [1, 1, 0]),  # ? = 0
    ],
)
def test_one_shift_by_hand(mode, of_linear, of_ones):
    shifted = moved(linear, [1], axes=0, mode=mode)
    np.testing.assert_array_equal(shifted(jnp.array([1.0, 10.0, 100.0]), X), of_linear)
    np.testing.assert_array_equal(moved(ones, [1], axes=0, mode=mode)(X), of_ones)


def test_shifts_are_averaged():
    w = jnp.array([1.0, 10.0, 100.0])
    # By -1 the input is (2, 4, 4), its relevance (2, 40, 400); by 0 it is (1, 20, 400); by 1 as above.
    expected = np.mean([[0, 2, 40 + 400], [1, 20, 400], [11, 200, 0]], axis=0)
    np.testing.assert_allclose(moved(linear, 1, axes=0)(w, X), expected, rtol=1e-15)
    np.testing.assert_allclose(moved(linear, [(1,), (-1,), (0,)], axes=0)(w, X), expected, rtol=1e-15)


def written_out(explain, x, shifts, mode):
    """`translated` for batches of images, by index maps in numpy."""
    total = np.zeros_like(x)
    for shift in shifts:
        rows, columns = (
            np.pad(np.arange(n), 9, mode=mode)[9 - s : 9 - s + n] for n, s in zip(x.shape[1:3], shift, strict=True)
        )
        relevance = np.asarray(explain(x[:, rows][:, :, columns]))
        for i, j in np.ndindex(relevance.shape[1:3]):
            total[:, rows[i], columns[j]] += relevance[:, i, j]
    return total / len(shifts)


def test_a_network_against_the_loop_written_out():
    x = networks.sample("conv_mixed_2d")
    found = moved(EXPLAIN, 1, batch_size=2)(PARAMS, x)  # the last batch has one shift
    nine = list(itertools.product([-1, 0, 1], repeat=2))
    close(found, written_out(lambda x: ONE_BY_ONE(PARAMS, x)[1], x, nine, "edge"))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "constant"])
def test_modes_against_the_loop_written_out(mode):
    w, x = np.random.default_rng(10).normal(size=(2, 2, 4, 5, 3))
    shifts = [(-2, 1), (0, 3), (1, 0)]
    close(moved(linear, shifts, mode=mode)(w, x), written_out(lambda x: linear(w, x), x, shifts, mode))


@pytest.mark.parametrize("mode", MODES)
def test_the_average_of_the_shifted_inputs_relevance_is_kept(mode):
    w = jnp.asarray(np.random.default_rng(2).normal(size=(5, 6)))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 6)))
    shifts = [(0, 0), (2, -3), (-1, 1)]
    sums = [(w * jnp.pad(x, 4, mode=mode)[4 - a : 9 - a, 4 - b : 10 - b]).sum() for a, b in shifts]
    found = moved(linear, shifts, axes=(0, 1), mode=mode)(w, x)
    np.testing.assert_allclose(found.sum(), np.mean(sums), rtol=1e-12)


def test_a_function_that_moves_with_its_input_has_the_same_explanation():
    def circular(w, x):
        return jnp.sum(jax.nn.relu(w[0] * x + w[1] * jnp.roll(x, 1) + w[2] * jnp.roll(x, -2)) ** 2)

    explain = rp.explain(circular, None)
    w, x = jnp.array([1.0, -0.5, 2.0]), jnp.asarray(np.random.default_rng(4).normal(size=8))
    close(moved(explain, 3, axes=0, mode="wrap")(w, x), explain(w, x))


def test_no_shift_is_the_explanation():
    close(moved(linear, 0)(jnp.full((2, 2, 1), 3.0), jnp.ones((2, 2, 1))), 3 * np.ones((2, 2, 1)))


def test_several_shifts_at_once_vmap_and_the_order_of_axes():
    w, x = np.random.default_rng(5).normal(size=(2, 3, 4, 5))
    one = moved(linear, [(2, -1), (0, 1), (1, 1)], axes=(-2, -1))
    expected = one(w, x)
    close(moved(linear, [(2, -1), (0, 1), (1, 1)], axes=(-2, -1), batch_size=2)(w, x), expected)
    close(moved(linear, [(-1, 2), (1, 0), (1, 1)], axes=(-1, -2), batch_size=9)(w, x), expected)
    close(jax.vmap(one)(w, x), expected)


# Windows.


def direct_sum(images, rows, columns):
    """The relevance of `conv_mixed_2d` in windows at these places, added one by one; and its logits there."""
    total = np.zeros_like(images)
    logits = np.zeros((len(images), len(rows), len(columns), 5))
    for (a, i), (b, j) in itertools.product(enumerate(rows), enumerate(columns)):
        here = np.s_[:, i : i + 9, j : j + 8]
        logits[:, a, b], relevance = ONE_BY_ONE(PARAMS, images[here])
        total[here] += relevance
    return logits, total


def test_a_network_against_the_direct_sum_written_out():
    # The last column of windows lies flush with the border: 13 - 8 = 5, which steps of 3 do not reach.
    logits, expected = direct_sum(IMAGES, [0, 2, 4], [0, 3, 5])
    both = slid(BOTH, (9, 8), (2, 3), batch_size=5, values=True)  # 18 windows, the last batch has 3
    values, relevance = both(PARAMS, IMAGES)
    close((values, relevance), (logits, expected))
    # The relevance of all windows is there.
    windows = [IMAGES[:, i : i + 9, j : j + 8] for i in (0, 2, 4) for j in (0, 3, 5)]
    np.testing.assert_allclose(relevance.sum(), sum(ONE_BY_ONE(PARAMS, w)[1].sum() for w in windows), rtol=1e-12)


def patch_network(w, x):
    return jnp.sum(jax.nn.relu(jnp.einsum("nhwc,hwcd->nd", x, w)) ** 2, axis=-1)


def test_it_explains_the_sum_of_the_outputs_of_all_windows():
    def of_all_windows(w, images):
        cut = [images[:, i : i + 3, j : j + 2] for i in (0, 2, 3) for j in (0, 2, 3)]
        return sum(patch_network(w, window) for window in cut)

    rng = np.random.default_rng(6)
    w, images = jnp.asarray(rng.normal(size=(3, 2, 2, 4))), jnp.asarray(rng.normal(size=(2, 6, 5, 2)))
    expected = rp.explain(of_all_windows, rp.Epsilon(0.0))(w, images)
    explain = rp.explain(patch_network, rp.Epsilon(0.0))
    found = slid(explain, (3, 2), 2, batch_size=4)
    close(found(w, images), expected)
    close(jax.vmap(lambda image: found(w, image))(images), expected)  # one image at a time


def test_windows_by_hand():
    w = jnp.array([[1.0, 10.0]])
    found = slid(linear, 2, 1, axes=-1)(w, X)  # windows (1, 2) and (2, 4)
    np.testing.assert_array_equal(found, [1, 20 + 2, 40])
    count = slid(ones, 3, 2, axes=0)(jnp.zeros(8))  # at 0, 2, 4, and 5 flush with the border
    np.testing.assert_array_equal(count, [1, 1, 2, 1, 2, 2, 2, 1])
    np.testing.assert_array_equal(slid(ones, 2, 3, axes=0)(jnp.zeros(5)), [1, 1, 0, 1, 1])  # gaps are not seen
    np.testing.assert_array_equal(slid(ones, 3, 1, axes=0)(X), [1, 1, 1])


def test_every_layout():
    weights, image = np.random.default_rng(7).normal(size=(2, 2, 3)), np.random.default_rng(8).normal(size=(6, 7, 3))
    last = slid(lambda w, x: linear(jnp.broadcast_to(w, x.shape), x), 2, 2, batch_size=3)
    expected = last(weights, image)
    first = slid(lambda w, x: linear(jnp.broadcast_to(w, x.shape), x), (3, 2, 2), (3, 2, 2), axes=(-3, -2, -1), batch_size=3)
    close(first(weights.transpose(2, 0, 1), image.transpose(2, 0, 1)), expected.transpose(2, 0, 1))
    stacked = last(weights, np.stack([image, 2 * image])[None])  # two axes of examples
    close(stacked, np.stack([expected, 2 * expected])[None])


def test_values_may_be_any_pytree_of_batches():
    def both(x):
        return {"sum": x.sum(1), "range": (x.min(1), x.max(1))}, x

    values, relevance = slid(both, 2, 1, axes=-1, batch_size=3, values=True)(X)
    np.testing.assert_array_equal(values["sum"], [3, 6])
    np.testing.assert_array_equal(values["range"][1], [2, 4])
    np.testing.assert_array_equal(relevance, [1, 4, 4])


def test_an_empty_batch_gives_an_empty_batch():
    both = slid(lambda x: (x.sum((1, 2, 3)), x), 2, 1, values=True)
    values, relevance = both(jnp.zeros((0, 4, 5, 3)))
    assert (values.shape, relevance.shape) == ((0, 3, 4), (0, 4, 5, 3))
    assert moved(ones, 1)(jnp.zeros((0, 4, 5, 3))).shape == (0, 4, 5, 3)


def test_gradients_pass_through():
    w, x = jnp.array([[1.0, -2.0]]), jnp.array([1.0, 2.0, 3.0])
    loss = lambda w: jnp.sum(slid(lambda w, x: (w * x) ** 2, 2, 1, axes=-1)(w, x))  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(w), [[2 * 1 * (1 + 4), 2 * -2 * (4 + 9)]], rtol=1e-14)


# Both.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dtype_is_kept_and_sums_are_taken_in_float32(dtype):
    # 257 windows show the element in the middle; in bfloat16 the sum of ones would stop at 256.
    total = slid(lambda x: jnp.ones_like(x), 257, 1, axes=0, batch_size=300)(jnp.zeros(513, dtype))
    assert total.dtype == dtype
    assert total[256] == jnp.asarray(257, dtype)
    average = moved(ones, [0] * 300, axes=0, batch_size=300)(jnp.zeros(2, dtype))
    assert average.dtype == dtype
    np.testing.assert_array_equal(average, [1, 1])


def test_integers_can_be_explained():
    embedding = jnp.array([1.0, 10.0, 100.0])
    tokens = jnp.array([0, 1, 2])
    explain = lambda table, t: table[t]  # noqa: E731
    np.testing.assert_array_equal(moved(explain, [1], axes=0)(embedding, tokens), [2, 10, 0])
    np.testing.assert_array_equal(slid(explain, 2, 1, axes=0)(embedding, tokens), [1, 20, 100])


def test_keyword_arguments_are_handed_on():
    scaled = lambda x, *, scale: scale * x  # noqa: E731
    np.testing.assert_array_equal(moved(scaled, 0, axes=0)(X, scale=2.0), 2 * X)
    np.testing.assert_array_equal(slid(scaled, 3, 1, axes=0)(X, scale=2.0), 2 * X)


def temporary(made, *args):
    return made.lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_number_of_windows():
    explain = rp.explain(lambda w, x: jnp.tanh(jnp.einsum("nhwc,hwcd->nd", x, w)), rp.Epsilon(), target=0)
    w, x = jnp.ones((8, 8, 3, 64)), jnp.ones((40, 40, 3))
    few, many = (temporary(slid(explain, 8, stride), w, x) for stride in (32, 1))  # 4 and 1089 windows
    assert many == few
    few, many = (temporary(slid(explain, 8, 4), w, x) for x in (x, jnp.ones((7, 40, 40, 3))))
    assert many - few <= 6 * x.nbytes  # but for the sum itself, which is the result


def test_memory_does_not_grow_with_the_number_of_shifts():
    explain = lambda x: jnp.tanh(x) * x  # noqa: E731
    x = jnp.ones((40, 40, 3))
    few, many = (temporary(moved(explain, shifts), x) for shifts in ([(-3, -3), (3, 3)], 3))
    assert many - few <= 49 * 100  # the shifts themselves


# The relevant pattern.


def test_the_pattern_is_the_input_where_relevance_is_strong():
    x = jnp.array([[10.0, 20.0], [30.0, 40.0]])
    relevance = jnp.array([[4.0, 1.0], [-3.0, 2.0]])
    expected = [[10.0, 5.0], [0.0, 20.0]]
    np.testing.assert_array_equal(pattern(x, relevance, axes=(0, 1), channels=None), expected)
    # The median of the positive relevance 1, 2, 4 is 2.
    half = pattern(x, relevance, axes=(0, 1), channels=None, quantile=0.5)
    np.testing.assert_array_equal(half, [[10.0, 10.0], [0.0, 40.0]])


def test_quantiles_are_those_of_numpy_over_what_is_positive():
    relevance = np.random.default_rng(9).normal(size=(3, 6, 7))
    for quantile in (0.05, 0.3, 0.9, 1.0):
        found = pattern(np.ones_like(relevance), relevance, axes=(1, 2), channels=None, quantile=quantile)
        limits = np.array([np.quantile(r[r > 0], quantile) for r in relevance]).reshape(3, 1, 1)
        np.testing.assert_allclose(found, np.clip(relevance / limits, 0, 1), rtol=1e-12)


def test_channels_share_one_mask_and_each_picture_has_its_own_limit():
    x = jnp.ones((2, 1, 2, 3))
    relevance = jnp.array([[[[1.0, 2.0, 1.0], [3.0, -1.0, 0.0]]], [[[0.1, 0.1, 0.0], [-1.0, 0.0, 0.5]]]])  # 4, 2; 0.2, -0.5
    expected = np.broadcast_to(np.array([[[[1.0], [0.5]]], [[[1.0], [0.0]]]]), x.shape)
    np.testing.assert_allclose(pattern(x, relevance), expected, rtol=1e-15)
    np.testing.assert_allclose(pattern(x, relevance.sum(-1)), expected, rtol=1e-15)
    np.testing.assert_allclose(jax.vmap(pattern)(x, relevance), expected, rtol=1e-15)
    first = pattern(jnp.moveaxis(x, -1, 1), jnp.moveaxis(relevance, -1, 1), axes=(-2, -1), channels=-3)
    np.testing.assert_allclose(first, np.moveaxis(expected, -1, 1), rtol=1e-15)


def test_a_picture_without_positive_relevance_is_black():
    x = jnp.ones((2, 2, 3))
    np.testing.assert_array_equal(pattern(x, -x), 0 * x)
    np.testing.assert_array_equal(pattern(x, 0 * x, quantile=0.3), 0 * x)
    assert pattern(jnp.ones((0, 2, 2, 3)), jnp.ones((0, 2, 2, 3))).shape == (0, 2, 2, 3)


@pytest.mark.parametrize(
    ("of_x", "of_relevance", "expected"),
    [
        ("uint8", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "bfloat16"),
        ("float16", "float64", "float16"),
    ],
)
def test_photographs_and_relevance_of_any_type(of_x, of_relevance, expected):
    x = jnp.full((1, 2, 3), 200, of_x)
    found = pattern(x, jnp.asarray([[[1, 1, 2], [0, 1, 1]]], of_relevance))
    assert found.dtype == expected
    np.testing.assert_array_equal(found.astype("float32"), [[[200] * 3, [100] * 3]])


# Errors.

IMAGE = jnp.ones((4, 5, 3))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: translated(ones, -1), "shifts=-1 has to be .* from -n to n"),
        (lambda: translated(ones, [1, 2]), "one int for each axis; there are 2 axes"),
        (lambda: translated(ones, [(1, 2, 3)]), "there are 2 axes"),
        (lambda: translated(ones, [(0.5, 1.0)]), "sequence of shifts"),
        (lambda: translated(ones, []), "sequence of shifts"),
        (lambda: jax.jit(lambda n: translated(ones, n)(IMAGE))(1), "Here it is traced"),
        (lambda: translated(ones, 1, mode="nearest"), "mode='nearest' has to be one of 'edge', 'wrap'"),
        (lambda: translated(ones, 1, batch_size=0), "batch_size=0 has to be a positive integer"),
        (lambda: translated(ones, 1)(X), r"names axis -3, but the explained argument has shape \(3,\)"),
        (lambda: translated(ones, 1)(), "without positional arguments"),
        (
            lambda: translated(lambda x: x.sum(-1), 1)(IMAGE),
            r"shape \(4, 5, 3\) of the explained .* returned float64\[4, 5\]",
        ),
        (lambda: translated(lambda x: (x, x), 1)(IMAGE), "returned a tuple of 2. Pass what rp.explain returns"),
        (lambda: translated(lambda x: x > 0, 1)(IMAGE), "in floating point, but returned bool"),
        (lambda: sliding_window(ones, 0, 1), "window=0 has to be a positive integer"),
        (lambda: sliding_window(ones, 2, (1, 0)), r"stride=\(1, 0\) has to be"),
        (lambda: sliding_window(ones, 2, 1, batch_size=1.5), "batch_size=1.5"),
        (lambda: sliding_window(ones, 5, 1)(IMAGE), r"length 5 along axis 0, but the image has shape \(4, 5, 3\). Pad"),
        (lambda: sliding_window(ones, 2, 1)(X), r"the image has shape \(3,\)"),
        (lambda: sliding_window(lambda x: x[0], 2, 1)(IMAGE), r"shape \(1, 2, 2, 3\) of the windows .* float64\[2, 2, 3\]"),
        (lambda: sliding_window(ones, 2, 1, values=True)(IMAGE), r"return a pair \(value, relevance\), not float64"),
        (lambda: sliding_window(lambda x: (x.sum(), x), 2, 1, values=True)(IMAGE), r"shape \(\), but for 1 windows"),
        (lambda: relevant_pattern(IMAGE, IMAGE.astype(int)), "dtype int64"),
        (lambda: relevant_pattern(IMAGE, IMAGE, quantile=0), "quantile=0 has to be above 0"),
        (lambda: relevant_pattern(IMAGE, jnp.ones((5, 4))), r"shape \(5, 4\), .* of x, \(4, 5, 3\), or that without"),
        (lambda: relevant_pattern(X, jnp.ones(2), axes=0, channels=None), r"has to have that of x, \(3,\)"),
    ],
)
def test_errors_say_what_is_expected(made, message):
    with pytest.raises(ArgumentError, match=message):
        made()
