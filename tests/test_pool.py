"""Pooled relevance: hand-worked sums, and the laws that every way of pooling obeys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relprop import pool
from relprop.errors import ArgumentError

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 5, 7, 3))
SUPERPIXELS = RNG.integers(0, 4, size=(5, 7))
OWN_SUPERPIXELS = RNG.integers(0, 4, size=(2, 5, 7))
BOXES = ((jnp.array([0, 1]), jnp.array([2, 5])), (jnp.array([3, 0]), 7))
MASK = RNG.random(size=(5, 7)) < 0.4


def everything_pooled(relevance):
    """Each way to pool, applied to images: the parts, which together have the relevance of the whole."""
    return {
        "pixels": pool.pixels(relevance),
        "channels": pool.channels(relevance),
        "patches": pool.patches(relevance, (2, 3)),
        "box": pool.box(relevance, ((1, 3), (0, 4))),
        "mask": pool.box(relevance, MASK),
        "groups": pool.groups(relevance, SUPERPIXELS, axes=(-3, -2)),
    }


def total(parts):
    return sum(np.sum(np.asarray(part, float)) for part in jax.tree.leaves(parts))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_parts_sum_to_the_whole_in_the_dtype_that_was_given(dtype):
    # Multiples of 1/2, whose sums every dtype here holds exactly.
    relevance = jnp.asarray(np.round(IMAGES) / 2, dtype)
    for parts in jax.jit(everything_pooled)(relevance).values():
        assert all(part.dtype == relevance.dtype for part in jax.tree.leaves(parts))
        assert total(parts) == total(relevance)


def test_jit_and_vmap_change_nothing():
    expected = everything_pooled(IMAGES)
    for transformed in (jax.jit(everything_pooled), jax.vmap(everything_pooled)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-14), transformed(IMAGES), expected)


def test_an_empty_batch_gives_an_empty_batch():
    for parts in jax.jit(everything_pooled)(jnp.zeros((0, 5, 7, 3))).values():
        assert all(part.shape[0] == 0 for part in jax.tree.leaves(parts))
    assert pool.groups(jnp.zeros((0, 4)), jnp.zeros((0, 4), int)).shape == (0, 0)
    assert pool.groups(jnp.zeros((0, 4)), jnp.zeros((0, 4), int), 3).shape == (0, 3)


def test_sums_are_taken_in_float32_at_least():
    # In bfloat16 256 + 1 is 256.
    relevance = jnp.asarray([256.0] + [1.0] * 256, jnp.bfloat16)
    assert pool.pixels(relevance) == 512
    assert pool.patches(relevance, 257, axes=0) == 512
    assert pool.box(relevance, ((0, 257),), axes=0)[0] == 512
    assert pool.groups(relevance, np.zeros(257, int)) == 512


# Pixels and channels.


def test_pixels_and_channels_of_both_layouts():
    relevance = jnp.array([[[1.0, -2.0], [4.0, 8.0]], [[0.0, 0.5], [-1.0, 2.0]], [[3.0, 0.0], [0.0, 0.0]]])  # 3 x 2 pixels
    np.testing.assert_array_equal(pool.pixels(relevance), [[-1, 12], [0.5, 1], [3, 0]])
    np.testing.assert_array_equal(pool.channels(relevance), [7, 8.5])
    first = jnp.moveaxis(relevance, -1, 0)
    np.testing.assert_array_equal(pool.pixels(first, axis=-3), [[-1, 12], [0.5, 1], [3, 0]])
    np.testing.assert_array_equal(pool.channels(first, axes=(-2, -1)), [7, 8.5])
    assert pool.channels(jnp.ones((4, 10, 6)), axes=-2).shape == (4, 6)  # filters of a network on signals


# Patches.


def test_patches_sum_blocks_and_the_last_ones_are_smaller():
    relevance = jnp.arange(15.0).reshape(3, 5)
    np.testing.assert_array_equal(
        pool.patches(relevance, 2, axes=(-2, -1)),
        [[0 + 1 + 5 + 6, 2 + 3 + 7 + 8, 4 + 9], [10 + 11, 12 + 13, 14]],
    )
    np.testing.assert_array_equal(pool.patches(relevance, (1, 5), axes=(0, 1)), [[10], [35], [60]])
    np.testing.assert_array_equal(pool.patches(relevance, (5, 1), axes=(1, 0)), [[10], [35], [60]])


def test_patches_of_one_are_the_relevance_and_patches_longer_than_the_axis_the_sum():
    np.testing.assert_array_equal(pool.patches(IMAGES, 1), IMAGES)
    whole = pool.patches(IMAGES, (10**12, 7))
    np.testing.assert_allclose(whole[:, 0, 0], pool.channels(IMAGES), rtol=1e-14)


def test_patches_along_one_and_along_three_axes():
    np.testing.assert_array_equal(pool.patches(jnp.arange(7.0), 3, axes=0), [3, 12, 6])
    volume = RNG.normal(size=(4, 6, 5))
    expected = [[[volume[i : i + 2, j : j + 3, k : k + 4].sum() for k in (0, 4)] for j in (0, 3)] for i in (0, 2)]
    np.testing.assert_allclose(pool.patches(volume, (2, 3, 4), axes=(0, 1, 2)), expected, rtol=1e-13)


# Boxes.


def test_inside_and_outside_of_a_box():
    relevance = jnp.arange(12.0).reshape(3, 4)
    inside, outside = pool.box(relevance, ((1, 3), (2, 4)), axes=(-2, -1))
    assert (inside, outside) == (6 + 7 + 10 + 11, 66 - 34)
    as_array = pool.box(relevance, jnp.array([[1, 3], [2, 4]]), axes=(-2, -1))
    assert as_array == (34, 32)
    assert pool.box(relevance, ((2, 2), (0, 4)), axes=(-2, -1)) == (0, 66)
    assert pool.box(relevance[0], ((1, 3),), axes=0) == (3, 3)  # part of a signal


def test_a_box_for_each_example():
    inside, outside = pool.box(IMAGES, BOXES)
    np.testing.assert_allclose(inside[0], IMAGES[0, 0:2, 3:7].sum((0, 1)), rtol=1e-13)
    np.testing.assert_allclose(inside[1], IMAGES[1, 1:5, 0:7].sum((0, 1)), rtol=1e-13)
    np.testing.assert_allclose(inside + outside, IMAGES.sum((1, 2)), rtol=1e-13)


def test_traced_boxes_are_those_of_a_loop():
    rows = jnp.array([[0, 2], [1, 5]])
    inside, _ = jax.jit(jax.vmap(lambda r, rows: pool.box(r, (rows, (1, 4)))))(IMAGES, rows)
    np.testing.assert_allclose(
        inside, np.stack([IMAGES[0, 0:2, 1:4].sum((0, 1)), IMAGES[1, 1:5, 1:4].sum((0, 1))]), rtol=1e-13
    )


def test_what_a_traced_box_has_outside_of_the_image_counts_for_nothing():
    inside, outside = jax.jit(lambda r, start: pool.box(r, ((start, start + 3),), axes=0))(jnp.array([1.0, 2.0, 4.0]), -2)
    assert (inside, outside) == (1, 6)


def test_a_mask_for_all_and_a_mask_for_each():
    relevance = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    shared, own = jnp.array([True, False, True]), jnp.array([[True, False, True], [False, False, False]])
    np.testing.assert_array_equal(pool.box(relevance, shared, axes=-1), [[5, 40], [2, 16]])
    np.testing.assert_array_equal(pool.box(relevance, own, axes=-1), [[5, 0], [2, 56]])
    inside, _ = pool.box(IMAGES, np.stack([MASK, ~MASK]))
    np.testing.assert_allclose(inside[1], IMAGES[1][~MASK].sum(0), rtol=1e-13)


def test_what_is_not_finite_outside_stays_outside():
    inside, outside = pool.box(jnp.array([1.0, jnp.nan]), ((0, 1),), axes=0)
    assert inside == 1
    assert jnp.isnan(outside)


# Groups.


def test_groups_of_tokens_shared_and_own():
    relevance = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    np.testing.assert_array_equal(pool.groups(relevance, [0, 2, 0]), [[5, 0, 2], [40, 0, 16]])
    np.testing.assert_array_equal(pool.groups(relevance, [0, 1, 1], count=4), [[1, 6, 0, 0], [8, 48, 0, 0]])
    np.testing.assert_array_equal(pool.groups(relevance, np.array([[0, 0, 1], [1, 0, 0]])), [[3, 4], [48, 8]])


def test_the_groups_stand_where_the_first_of_their_axes_was():
    electrodes = jnp.array([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])[None]  # (batch, electrodes, time)
    np.testing.assert_array_equal(pool.groups(electrodes, [1, 0, 1], axes=-2), [[[4, 8], [17, 34]]])
    assert pool.groups(IMAGES, SUPERPIXELS, 4, axes=(-3, -2)).shape == (2, 4, 3)
    across = pool.groups(IMAGES, SUPERPIXELS.T, axes=(2, 1))
    np.testing.assert_allclose(across, pool.groups(IMAGES, SUPERPIXELS, axes=(1, 2)), rtol=1e-13)  # in another order


@pytest.mark.parametrize("labels", [SUPERPIXELS, OWN_SUPERPIXELS], ids=["shared", "own"])
def test_superpixels_are_those_of_a_loop(labels):
    each = np.broadcast_to(labels, (2, 5, 7))
    expected = [[r[own == k].sum(0) for k in range(4)] for r, own in zip(IMAGES, each, strict=True)]
    np.testing.assert_allclose(pool.groups(IMAGES, labels, axes=(-3, -2)), expected, rtol=1e-12)
    traced = jax.jit(lambda r, labels: pool.groups(r, labels, 4, axes=(-3, -2)))(IMAGES, labels)
    np.testing.assert_allclose(traced, expected, rtol=1e-12)
    mapped = jax.vmap(lambda r, labels: pool.groups(r, labels, 4, axes=(0, 1)))(IMAGES, each)
    np.testing.assert_allclose(mapped, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_labels_of_any_integer_type(dtype):
    labels = np.array([0, 255 if dtype == "uint8" else 300, 0], dtype)
    found = pool.groups(jnp.array([1.0, 2.0, 4.0]), labels)
    assert found.shape == (labels.max().astype(int) + 1,)
    assert (found[0], found[-1]) == (5, 2)


def test_traced_labels_out_of_range_are_left_out():
    labels = jnp.array([-1, 0, 1, 2])
    found = jax.jit(lambda labels: pool.groups(jnp.array([1.0, 2.0, 4.0, 8.0]), labels, 2))(labels)
    np.testing.assert_array_equal(found, [2, 4])


# Errors.

R = jnp.ones((2, 4, 6, 3))


@pytest.mark.parametrize(
    ("pooled", "message"),
    [
        (lambda: pool.pixels(jnp.ones((2, 2), int)), "floating-point numbers, but has dtype int64"),
        (lambda: pool.pixels(R, axis=4), r"axis=4 names axis 4, but relevance has shape \(2, 4, 6, 3\) and rank 4"),
        (lambda: pool.channels(R[0, 0]), r"names axis -3, but relevance has shape \(6, 3\).* with `axes`"),
        (lambda: pool.channels(R, axes=(1, -3)), "none twice"),
        (lambda: pool.channels(R, axes=()), "at least one axis"),
        (lambda: pool.patches(R, 0), "size=0 has to be a positive integer"),
        (lambda: pool.patches(R, 2.0), "size=2.0 has to be a positive integer"),
        (lambda: pool.patches(R, (2, 2.5)), "has to be a positive integer"),
        (lambda: pool.patches(R, (2, 2, 2)), "has 3 numbers for 2 axes"),
        (lambda: pool.box(R, ((0, 5), (0, 6))), r"\(0, 5\) for axis 0 of its axes, of length 4.* clip"),
        (lambda: pool.box(R, ((-1, 3), (0, 6))), "not wrapped"),
        (lambda: pool.box(R, ((3, 1), (0, 6))), "0 <= start <= stop <= length"),
        (lambda: pool.box(R, ((0, jnp.array([3, 7])), (0, 6))), "for axis 0 of its axes"),
        (lambda: pool.box(R, ((jnp.array([0, 3]), 2), (0, 6))), "0 <= start <= stop <= length"),
        (lambda: pool.box(R, ((0.5, 2), (0, 6))), "dtype float64 for axis 0: round"),
        (lambda: pool.box(R, ((0, jnp.array([1, 2, 3])), (0, 6))), r"shape \(3,\), but has to have \(\) or \(2,\)"),
        (lambda: pool.box(R, ((0, 2),)), r"a pair \(start, stop\) for each axis.* there are 2 axes"),
        (lambda: pool.box(R, (0, 2)), "a pair"),
        (lambda: pool.box(R, 3), "a pair"),
        (lambda: pool.box(R, jnp.zeros((2, 2, 2), int)), "array of shape .* For a box per example"),
        (lambda: pool.box(R, jnp.ones((6, 4), bool)), r"The mask has shape \(6, 4\), .* \(4, 6\) or \(2, 4, 6\)"),
        (lambda: pool.groups(R, jnp.zeros(6, int)), r"labels has shape \(6,\), .* \(3,\) or \(2, 3\) for axes=-1"),
        (lambda: pool.groups(R, [0.0, 1.0, 2.0]), "integers, the group of each input, but has dtype float64"),
        (lambda: pool.groups(R, [True, False, True]), "dtype bool. A mask is what `pool.box` takes"),
        (lambda: pool.groups(R, [0, -1, 1]), r"labels holds -1 at index \(1,\).* a group of its own"),
        (lambda: pool.groups(R, [0, 1, 2], 2), "labels holds 2 at index .* labels are 0 to 1"),
        (lambda: jax.jit(pool.groups)(R, jnp.array([0, 1, 2])), "give `count`"),
    ],
)
def test_errors_say_what_is_expected(pooled, message):
    with pytest.raises(ArgumentError, match=message):
        pooled()
