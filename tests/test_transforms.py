"""Random transformations of images: what they do to pixels, their shapes, dtypes and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

import relprop as rp
from relprop.maximization.transforms import crop, jitter, lucid, pad, rotate, scale

KEYS = jax.random.split(jax.random.key(0), 60)
X = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 7, 2)))
ALL = {  # compiled, as `maximize` uses them
    "jitter": jax.jit(jitter(2)),
    "scale": jax.jit(scale(0.8, 1.3)),
    "rotate": jax.jit(rotate(20.0)),
    "pad": jax.jit(pad(2, 0.5)),
    "crop": jax.jit(crop((4, 5))),
}


@pytest.mark.parametrize("transform", [jitter(0), scale(1.0, 1.0), rotate(0.0), pad(0), crop((6, 7))])
def test_nothing_is_changed_by_transforms_that_do_nothing(transform):
    assert_allclose(jax.jit(transform)(KEYS[0], X), X, atol=1e-12)


def test_jitter_makes_all_shifts_and_repeats_the_border():
    shifted = np.asarray(jax.jit(jax.vmap(lambda key: jitter(1)(key, X)))(KEYS))
    grown = np.pad(X, [(1, 1), (1, 1), (0, 0)], mode="edge")
    windows = {(i, j): grown[i : i + 6, j : j + 7] for i in range(3) for j in range(3)}
    found = [next(at for at, window in windows.items() if np.array_equal(window, image)) for image in shifted]
    assert set(found) == set(windows)


def test_crop_takes_windows_of_the_image():
    cut = np.asarray(jax.jit(jax.vmap(lambda key: crop((4, 5))(key, X)))(KEYS))
    windows = {(i, j): np.asarray(X)[i : i + 4, j : j + 5] for i in range(3) for j in range(3)}
    assert {next(at for at, window in windows.items() if np.array_equal(window, image)) for image in cut} == set(windows)


def test_pad():
    assert_array_equal(pad(2, 0.5)(KEYS[0], X), np.pad(X, [(2, 2), (2, 2), (0, 0)], constant_values=0.5))
    assert_array_equal(pad(1, "reflect")(KEYS[0], X), np.pad(X, [(1, 1), (1, 1), (0, 0)], mode="reflect"))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_scale_keeps_the_centre_of_a_ramp(factor):
    # a ramp that is enlarged is a flatter ramp; where the border is repeated it is flat
    ramp = jnp.broadcast_to(jnp.arange(9.0)[:, None, None] - 4, (9, 9, 1))
    scaled = jax.jit(scale(factor, factor))(KEYS[0], ramp)
    assert_allclose(scaled[3:6, 4, 0], np.array([-1, 0, 1]) / factor, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.5])
def test_a_constant_image_stays_constant_under_scale(factor):
    assert_allclose(jax.jit(scale(factor, factor))(KEYS[0], jnp.full((8, 9, 1), 0.7)), 0.7, rtol=1e-6)


def test_factors_lie_between_the_bounds():
    ramp = jnp.broadcast_to(jnp.arange(9.0)[:, None, None] - 4, (9, 9, 1))
    steps = jax.jit(jax.vmap(lambda key: scale(1.0, 2.0)(key, ramp)[5, 4, 0]))(KEYS)
    assert (steps >= 0.5 - 1e-9).all()
    assert (steps <= 1 + 1e-9).all()
    assert steps.max() - steps.min() > 0.3


def test_rotations_are_scipys():
    image = np.zeros((11, 11))
    image[5, 8] = 1.0  # to the right of the centre
    turned = np.asarray(jax.jit(jax.vmap(lambda key: rotate(40.0)(key, jnp.asarray(image)[..., None])))(KEYS))[..., 0]
    angles = []
    for each in turned:
        rows, columns = (
            np.sum(each * np.arange(11.0)[shape]) / each.sum() - 5 for shape in (np.s_[:, None], np.s_[None, :])
        )
        angles.append(np.degrees(np.arctan2(rows, columns)))
    assert max(np.abs(angles)) < 45
    assert max(angles) > 20
    assert min(angles) < -20
    assert min(np.abs(angles)) < 5
    expected = scipy.ndimage.rotate(image, -angles[0], reshape=False, order=1, mode="nearest")
    assert_allclose(turned[0], expected, atol=0.1)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_rotations_are_scipys_at_every_pixel(dtype):
    for key in KEYS[:2]:
        turned = np.asarray(jax.jit(rotate(40.0))(key, X.astype(dtype)), np.float64)
        angle = 80 * float(jax.random.uniform(key, (), jnp.float32)) - 40
        expected = scipy.ndimage.rotate(X, angle, axes=(1, 0), reshape=False, order=1, mode="nearest")
        assert_allclose(turned, expected, atol=1e-9 if dtype == jnp.float64 else 1e-5)


@pytest.mark.parametrize("name", ["scale", "rotate"])
def test_coarse_dtypes_lose_digits_but_misplace_no_pixel(name):
    # coordinates up to 300 have no exact bfloat16: computed in it, the ramp is off by five pixels
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 300)[:, None, None], (300, 3, 1))
    transform = jax.jit({"scale": scale(0.9, 0.9), "rotate": rotate(1.0)}[name])
    exact, coarse = transform(KEYS[0], ramp), transform(KEYS[0], ramp.astype(jnp.bfloat16))
    assert_allclose(np.asarray(coarse, np.float64), exact, atol=2**-8)


@pytest.mark.parametrize("name", ["jitter", "scale", "rotate", "crop"])
def test_a_key_draws_the_same_in_every_dtype(name):
    transform = ALL[name]
    for key in KEYS[:4]:
        assert_allclose(transform(key, X.astype(jnp.float32)), np.asarray(transform(key, X), np.float32), atol=1e-5)


@pytest.mark.parametrize("name", ["jitter", "crop"])
def test_the_transpose_keeps_the_sum(name):
    found, back = jax.vjp(lambda x: ALL[name](KEYS[0], x), X)
    assert_allclose(back(jnp.ones_like(found))[0].sum(), found.size)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(name, dtype):
    shape = {"pad": (10, 11, 2), "crop": (4, 5, 2)}.get(name, X.shape)
    found = ALL[name](KEYS[0], jnp.broadcast_to(X, (2, 3, *X.shape)).astype(dtype))
    assert found.shape == (2, 3, *shape)
    assert found.dtype == dtype
    assert jnp.isfinite(found).all()


@pytest.mark.parametrize("name", ["jitter", "scale", "rotate", "crop"])
def test_images_of_a_batch_are_transformed_in_different_ways_and_alike_for_the_same_key(name):
    found = ALL[name](KEYS[0], jnp.stack([X] * 8))
    assert len(np.unique(np.asarray(found).reshape(8, -1), axis=0)) > 2
    assert_array_equal(found, ALL[name](KEYS[0], jnp.stack([X] * 8)))


@pytest.mark.parametrize("name", ALL)
def test_gradients_pass(name):
    check_grads(lambda x: jnp.sum(jnp.sin(ALL[name](KEYS[0], x))), (X,), 1, modes=["rev"], atol=1e-4, rtol=1e-4)


def test_lucids_sequence_finds_what_is_large_rather_than_fine():
    # an objective that likes a fine pattern and a coarse one alike, at one place only
    fine = jnp.where((jnp.arange(32)[:, None] + jnp.arange(32)[None, :]) % 2 == 0, 1.0, -1.0)[..., None]
    coarse = jnp.where(jnp.arange(32) < 16, 1.0, -1.0)[:, None, None] * jnp.ones((1, 32, 1))
    objective = lambda x: jnp.sum(x[12:-12, 12:-12] * (fine + coarse)) if len(x) > 32 else jnp.sum(x * (fine + coarse))  # noqa: E731
    options = {"optimizer": optax.sgd(0.01), "steps": 30}
    plain = rp.maximize(objective, jnp.zeros((32, 32, 1)), **options).input
    robust = rp.maximize(objective, jnp.zeros((32, 32, 1)), transforms=lucid(0.0), **options).input
    assert_allclose((plain * fine).sum(), (plain * coarse).sum(), rtol=1e-6)
    assert (robust * coarse).sum() > 5 * abs((robust * fine).sum())


ERRORS = {
    "jitter: negative": (lambda: jitter(-1), "pixels=-1 has to be an integer, 0 or more"),
    "pad: fraction": (lambda: pad(1.5), r"pixels=1\.5"),
    "pad: mode": (lambda: pad(2, "egde"), "mode='egde' has to be a number or one of 'edge'"),
    "crop: nothing": (lambda: crop(0), "size=0 has to be a positive integer"),
    "crop: fraction": (lambda: crop((2.5, 3)), "has to be a positive integer"),
    "crop: three": (lambda: crop((2, 3, 4)), "has 3 numbers for 2 axes"),
    "crop: too large": (lambda: crop(8)(KEYS[0], X), "8 x 8 does not fit into an image of 6 x 7"),
    "scale: order": (lambda: scale(2.0, 1.0), r"low=2\.0 and high=1\.0"),
    "scale: infinite": (lambda: scale(1.0, float("inf")), "positive and finite"),
    "scale: integers": (lambda: scale(1.0, 2.0)(KEYS[0], jnp.ones((4, 4, 1), int)), "scale takes images of floating-point"),
    "rotate: integers": (lambda: rotate(5.0)(KEYS[0], jnp.ones((4, 4, 1), int)), "rotate takes images of floating-point"),
    "scale: zero": (lambda: scale(0.0, 1.0), "have to be positive"),
    "rotate: negative": (lambda: rotate(-5.0), r"degrees=-5\.0"),
    "an image without channels": (lambda: scale(1.0, 2.0)(KEYS[0], X[..., 0]), r"not the shape \(6, 7\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_teach(name):
    call, message = ERRORS[name]
    with pytest.raises(rp.ArgumentError, match=message):
        call()


def test_without_dm_pix_rotate_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dm_pix", None)
    with pytest.raises(ImportError, match=r"dm_pix is not installed; turning images needs it.*relprop\[maximization\]"):
        rotate(5.0)
