"""What is optimised, what it decodes to, and the priors on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import multivariate_normal

import relprop as rp
from relprop.maximization import (
    IMAGENET_COLOURS,
    L2,
    Code,
    Diversity,
    Fourier,
    Gaussian,
    Maco,
    Pixel,
    Several,
    TotalVariation,
    bounded,
    colour_matrix,
    colours,
    dgn_am,
    facets,
    mean_normalized,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SHAPES = [(8, 8, 1), (7, 9, 3), (5, 8, 3), (1, 1, 1)]


def image(*shape):
    return jnp.asarray(RNG.uniform(size=shape))


# Pixel, Several, then


def test_pixel_starts_from_an_image_with_noise():
    start = image(4, 4, 1)
    assert_array_equal(Pixel(start).init(KEY), start)
    noise = Pixel(jnp.zeros((50, 50)), 0.3).init(KEY)
    assert_allclose(noise.std(), 0.3, rtol=0.05)
    assert_allclose(noise.mean(), 0, atol=0.02)


def test_noise_of_the_leaves_of_a_pytree_is_independent():
    code = Pixel({"a": jnp.zeros(4), "b": jnp.zeros(4, jnp.float32)}, 1.0).init(KEY)
    assert code["b"].dtype == jnp.float32
    assert abs(code["a"] - code["b"].astype(float)).min() > 1e-3


def test_functions_of_the_input_are_applied_in_their_order():
    code = Code(lambda z: z, 2, prior=L2(1.0), high=1.0).then(jnp.exp, lambda x: x + 1.0)
    z = jnp.array([0.0, 3.0])
    assert_allclose(code.decode(z), np.exp(z) + 1)
    assert_allclose(code.log_prior(z), -9)
    assert_allclose(code.project(z), [0, 1])


def test_several_start_apart_and_keep_prior_and_bounds_of_one():
    several = Several(Code(jnp.tanh, 3, prior=L2(0.5), low=-1.0, high=1.0), 4)
    code = several.init(KEY)
    assert code.shape == (4, 3)
    assert len(np.unique(np.asarray(code))) == 12
    assert_allclose(several.decode(code), np.tanh(code))
    assert_allclose(several.log_prior(code), -0.5 * (code**2).sum())
    assert_allclose(several.project(2 * code), np.clip(2 * code, -1, 1))


# Fourier


@pytest.mark.parametrize("shape", SHAPES)
def test_fourier_starts_from_an_image_exactly(shape):
    start = image(*shape)
    fourier = Fourier(shape, noise=0.0, start=start)
    assert_allclose(fourier.decode(fourier.init(KEY)), start, atol=1e-12)


def test_a_batch_of_fourier_images():
    start = image(2, 6, 7, 3)
    fourier = Fourier(start.shape, noise=0.0, start=start)
    assert_allclose(fourier.decode(fourier.init(KEY)), start, atol=1e-12)


def test_spectra_fall_with_frequency():
    fourier = Fourier((32, 32, 1), decay=1.0, noise=1.0)
    images = jax.vmap(lambda key: fourier.decode(fourier.init(key)))(jax.random.split(KEY, 200))
    magnitude = np.abs(np.fft.rfft2(images, axes=(1, 2))).mean((0, 3))
    assert_allclose(magnitude[0, 2] / magnitude[0, 8], 4, rtol=0.2)
    assert_allclose(magnitude[3, 4] / magnitude[6, 8], 2, rtol=0.2)
    flat = Fourier((32, 32, 1), decay=0.0, noise=1.0)
    images = jax.vmap(lambda key: flat.decode(flat.init(key)))(jax.random.split(KEY, 200))
    magnitude = np.abs(np.fft.rfft2(images, axes=(1, 2))).mean((0, 3))
    assert_allclose(magnitude[0, 2] / magnitude[0, 8], 1, rtol=0.2)


def test_a_step_in_fourier_space_moves_low_frequencies_more():
    target = image(16, 16, 1)
    pull = lambda x: -jnp.sum((x - target) ** 2)  # noqa: E731
    found = rp.maximize(pull, Fourier((16, 16, 1), noise=0.0), optax.sgd(1e-3), 5)
    moved = np.abs(np.fft.rfft2(found.input[..., 0])) / np.abs(np.fft.rfft2(target[..., 0]))
    assert moved[0, 1] > 10 * moved[0, 7]
    pixels = rp.maximize(pull, jnp.zeros((16, 16, 1)), optax.sgd(1e-3), 5)
    moved = np.abs(np.fft.rfft2(pixels.input[..., 0])) / np.abs(np.fft.rfft2(target[..., 0]))
    assert_allclose(moved[0, 1], moved[0, 7], rtol=1e-6)


def test_lucid_scale():
    # of Lucid: irfft2(spectrum * scale) / 4 with scale = sqrt(w h) / max(f, 1 / max(w, h))
    fourier = Fourier((4, 6, 1))
    code = fourier.init(KEY)
    frequency = np.hypot(np.fft.fftfreq(4)[:, None], np.fft.fftfreq(6)[None, :4])
    scale = np.sqrt(24) / np.maximum(frequency, 1 / 6)
    expected = np.fft.irfft2((np.asarray(code["real"]) + 1j * np.asarray(code["imag"]))[..., 0] * scale, s=(4, 6)) / 4
    assert_allclose(fourier.decode(code)[..., 0], expected, atol=1e-12)


# MACO


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("started", [False, True])
def test_the_magnitude_is_that_of_the_images_whatever_the_phases(shape, started):
    images = image(3, *shape)
    maco = Maco.of(images, noise=2.0, start=image(*shape) if started else None)
    decoded = maco.decode(maco.init(KEY))
    assert decoded.shape == shape
    expected = np.abs(np.fft.rfft2(images, axes=(1, 2))).mean(0)
    assert_allclose(np.abs(np.fft.rfft2(decoded, axes=(0, 1))), expected, atol=1e-10)
    assert_allclose(decoded.mean(), images.mean(), rtol=1e-10)


def test_maco_starts_from_the_phases_of_an_image():
    start = image(8, 6, 3)
    maco = Maco.of(start[None], start=start, noise=0.0)
    assert_allclose(maco.decode(maco.init(KEY)), start, atol=1e-12)


def test_only_phases_are_optimised():
    images = image(4, 8, 8, 1)
    maco = Maco.of(images)
    found = rp.maximize(lambda x: jnp.sum(x * images[0]), maco, optax.sgd(0.05), 200)
    assert found.trajectory[-1] > found.trajectory[0] + 1
    expected = np.abs(np.fft.rfft2(images, axes=(1, 2))).mean(0)
    assert_allclose(np.abs(np.fft.rfft2(found.input, axes=(0, 1))), expected, atol=1e-10)


# colours, bounds


def test_the_colours_of_imagenet():
    published = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    expected = published / np.linalg.norm(published, axis=0).max()
    assert_allclose(IMAGENET_COLOURS, expected, atol=5e-5)
    x = image(2, 4, 4, 3)
    assert_allclose(colours()(x), np.einsum("...i,ji->...j", x, IMAGENET_COLOURS), rtol=1e-12)


def test_measured_colours_have_their_covariance():
    images = image(50, 4, 4, 3) @ jnp.asarray(RNG.normal(size=(3, 3)))
    root = np.asarray(colour_matrix(images))
    covariance = np.cov(images.reshape(-1, 3), rowvar=False, bias=True)
    scale = covariance[0, 0] / (root @ root.T)[0, 0]
    assert_allclose(scale * root @ root.T, covariance, atol=1e-10)
    lengths = np.linalg.norm(root, axis=0)
    assert_allclose(lengths[0], 1)
    assert (np.diff(lengths) <= 0).all()


def test_bounded():
    x = bounded(-1.0, 3.0)(jnp.array([-50.0, 0.0, 50.0]))
    assert_allclose(x, [-1, 1, 3], atol=1e-12)


# priors


def test_l2_of_a_pytree():
    x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    assert_allclose(L2(2.0)(x), -28)
    assert_allclose(L2(2.0, {"a": jnp.array([1.0, 1.0]), "b": jnp.array(1.0)})(x), -10)
    assert_allclose(L2(1.0, jnp.array([[1.0]]))(jnp.ones((2, 2))), 0)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_total_variation_is_a_sum_over_neighbours(power):
    x = np.asarray(image(2, 4, 5, 3))
    expected = 0.0
    for n, i, j, c in np.ndindex(*x.shape):
        right = x[n, i, j + 1, c] - x[n, i, j, c] if j < 4 else 0.0
        below = x[n, i + 1, j, c] - x[n, i, j, c] if i < 3 else 0.0
        expected -= (right**2 + below**2) ** (power / 2)
    prior = TotalVariation(0.5, power)
    assert_allclose(prior(jnp.asarray(x)), 0.5 * expected, rtol=1e-12)
    check_grads(prior, (jnp.asarray(x),), 1, modes=["rev"])
    assert_array_equal(jax.grad(prior)(jnp.ones((3, 3, 1))), np.zeros((3, 3, 1)))


def test_gaussian_is_scipys():
    root = jnp.asarray(RNG.normal(size=(4, 4)))
    covariance = root @ root.T + jnp.eye(4)
    mean = image(2, 2)
    x = image(5, 3, 2, 2)
    expected = multivariate_normal(mean.reshape(-1), covariance).logpdf(x.reshape(5, 3, 4))
    gaussian = Gaussian(mean, jnp.linalg.inv(covariance))
    assert_allclose(gaussian(x), expected, rtol=1e-10)
    check_grads(lambda x: gaussian(x).sum(), (x,), 1, modes=["rev"])


def test_gaussian_fit():
    images = image(200, 3, 1)
    gaussian = Gaussian.fit(images, noise=0.2)
    covariance = np.cov(images.reshape(200, 3), rowvar=False, bias=True) + 0.04 * np.eye(3)
    assert_allclose(
        gaussian(images), multivariate_normal(images.mean(0).ravel(), covariance).logpdf(images[..., 0]), rtol=1e-10
    )


def test_under_a_gaussian_prior_the_maximiser_is_the_posterior_mode():
    # w.x - (x - m)^T P (x - m) / 2 is largest at m + P^-1 w
    precision, w = jnp.array([[2.0, 0.5], [0.5, 1.0]]), jnp.array([1.0, -1.0])
    gaussian = Gaussian(jnp.array([1.0, 2.0]), precision)
    found = rp.maximize(lambda x: w @ x, jnp.zeros(2), optax.sgd(0.2), 300, log_prior=gaussian)
    assert_allclose(found.input, gaussian.mean + jnp.linalg.solve(precision, w), atol=1e-8)


def test_diversity_is_the_mean_cosine_of_pairs():
    x = image(4, 3, 2)
    flat = x.reshape(4, 6) / np.linalg.norm(x.reshape(4, 6), axis=1, keepdims=True)
    pairs = [flat[i] @ flat[j] for i in range(4) for j in range(4) if i != j]
    assert_allclose(Diversity(0.5)(x), -0.5 * np.mean(pairs), rtol=1e-10)
    assert_allclose(
        Diversity(1.0, lambda x: x.sum(-1))(jnp.stack([x, x])), Diversity()(jnp.stack([x.sum(-1)] * 2)), rtol=1e-12
    )
    check_grads(Diversity(), (x,), 1, modes=["rev"])
    assert_array_equal(jax.grad(Diversity())(jnp.zeros((2, 3))), np.zeros((2, 3)))
    beside_zero = jax.grad(Diversity())(jnp.array([[0.0, 0.0], [0.1, 0.0]]))
    assert abs(beside_zero).max() < 10
    assert_allclose(Diversity()(jnp.array([[1e-3, 0.0], [2e-3, 0.0]], jnp.float16)), -1, atol=1e-3)


# presets


# optax 0.2.5 computes schedules in float32: 8 is exact there, what lies between 8 and 0 is not.
@pytest.mark.parametrize(("last", "tolerance"), [(8.0, 1e-10), (1e-10, 1e-6)])
def test_dgn_am_makes_the_steps_of_its_authors(last, tolerance):
    A = RNG.normal(size=(6, 4))
    start, high = RNG.uniform(0, 2, size=4), np.array([0.5, 1.0, 2.0, 3.0])
    settings = dgn_am(
        lambda z: jnp.asarray(A) @ z, jnp.asarray(start), jnp.asarray(high), steps=10, noise=0.0, learning_rate=(8.0, last)
    )
    found = rp.maximize(lambda x: jnp.sum(jnp.sin(x)), **settings)
    code = np.clip(start, 0, high) * 0.99  # what is allowed at the start
    for i in range(10):
        gradient = A.T @ np.cos(A @ code)
        code = code + (8.0 + (last - 8.0) * i / 10) / np.abs(gradient).mean() * gradient
        code = 0.99 * np.minimum(np.maximum(code, 0), high)
    assert_allclose(found.code, code, rtol=tolerance)


def test_gradients_of_zero_are_not_divided():
    updates, _ = mean_normalized().update({"a": jnp.array([1.0, -3.0]), "b": jnp.zeros(2)}, optax.EmptyState())
    assert_array_equal(updates["a"], [0.5, -1.5])
    assert_array_equal(updates["b"], [0, 0])


def test_facets_are_means_of_images_that_are_alike():
    kinds = jnp.asarray(RNG.normal(size=(3, 4, 4, 1))) * 5
    numbers = np.repeat([0, 1, 2], [20, 30, 10])
    images = kinds[numbers] + 0.01 * jnp.asarray(RNG.normal(size=(60, 4, 4, 1)))
    found = facets(images, 3, nearest=8)
    assert_allclose(found, kinds[jnp.array([1, 0, 2])], atol=0.03)
    by_feature = facets(images, 2, features=(numbers == 2).astype(float)[:, None], nearest=100)
    assert_allclose(by_feature[1], kinds[2], atol=0.03)


def test_prototypes_of_several_facets_differ():
    # two hills of one class, far apart: a start on each finds both
    hills = jnp.array([[2.0, 0.0], [-2.0, 0.0]])
    objective = lambda x, _: jax.nn.logsumexp(-jnp.sum((x[None] - hills) ** 2, -1))  # noqa: E731
    images = jnp.repeat(hills, 10, 0) + 0.5 * jnp.asarray(RNG.normal(size=(20, 2)))
    starts = facets(images, 2)
    found = rp.maximize(objective, rp.maximization.ForEach(Pixel), optax.sgd(0.1), 200, each=starts)
    assert_allclose(np.sort(found.input[:, 0]), [-2, 2], atol=1e-3)


X = jnp.ones((4, 4, 1))
ERRORS = {
    "fourier: shape": (lambda: Fourier((8, 8)), r"shape=\(8, 8\) has to be \(height, width, channels\)"),
    "fourier: start": (lambda: Fourier((8, 8, 1), start=X), r"shape \(4, 4, 1\), but has to have \(8, 8, 1\)"),
    "maco: images": (lambda: Maco.of(X), r"images have the shape \(4, 4, 1\)"),
    "maco: none": (lambda: Maco.of(X[None][:0]), "one at least"),
    "maco: width": (lambda: Maco(X, 4), r"\(4, 4, 1\).*\(height, 3, channels\)"),
    "pixel: integers": (lambda: Pixel(jnp.arange(3)), "holds int64"),
    "pixel: nothing": (lambda: Pixel(()), "holds no arrays"),
    "code: generator": (lambda: Code(3.0, 2), "generator=3.0 has to be a function"),
    "code: prior": (lambda: Code(jnp.exp, 2, prior=0.1), "prior=0.1 has to be a function"),
    "code: bounds": (lambda: Code(jnp.exp, 2, low=1.0, high=jnp.array([2.0, 0.0])), r"low=1\.0 is above high="),
    "maco: integers": (lambda: Maco(jnp.ones((4, 3, 1), int), 4), "magnitude holds int64"),
    "several: none": (lambda: Several(Pixel(X), 0), "count=0"),
    "colours: matrix": (lambda: colours(jnp.ones(3)), r"shape \(3,\)"),
    "variation: vector": (
        lambda: TotalVariation()(jnp.ones(3)),
        r"\(\.\.\., height, width, channels\), not the shape \(3,\)",
    ),
    "gaussian: precision": (lambda: Gaussian(X, jnp.eye(3)), r"\(3, 3\).*\(16, 16\)"),
    "gaussian: indefinite": (lambda: Gaussian(jnp.zeros(2), jnp.diag(jnp.array([1.0, -1.0]))), "not positive definite"),
    "gaussian: example": (lambda: Gaussian(X, jnp.eye(16))(jnp.ones((2, 3))), r"\(4, 4, 1\), but is given \(2, 3\)"),
    "gaussian: noise": (lambda: Gaussian.fit(X, noise=0.0), "noise > 0"),
    "diversity: one": (lambda: Diversity()(jnp.ones((1, 3))), r"Several\(one, count\)"),
    "dgn: decay": (lambda: dgn_am(jnp.tanh, 3, 1.0, decay=0.0), "decay=0.0"),
    "facets: too many": (lambda: facets(X, 9), "number of images, 4"),
    "facets: all alike": (lambda: facets(jnp.ones((5, 2)), 2), "Only 1 of 5 images"),
    "colours: none": (lambda: colour_matrix(jnp.ones((4, 4, 3))), "do not vary"),
    "several: a fraction": (lambda: Several(Pixel(X), 1.5), r"count=1\.5 has to be an integer"),
    "facets: features": (lambda: facets(X, 2, features=X[:2]), "4 images, but features of 2"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_teach(name):
    call, message = ERRORS[name]
    with pytest.raises(rp.ArgumentError, match=message):
        call()


@pytest.mark.parametrize("name", ["init", "decode"])
def test_a_parametrisation_of_ones_own_says_what_is_missing(name):
    with pytest.raises(NotImplementedError, match=f"Parametrisation needs a method {name}"):
        getattr(rp.maximization.Parametrisation(), name)(KEY)


def test_single_precision_is_kept():
    start = image(8, 8, 3).astype(jnp.float32)
    for parametrisation in (Fourier((8, 8, 3), start=start), Maco.of(start[None]), Pixel(start, 0.1)):
        mapped = parametrisation.then(colours(), bounded(0.0, 1.0))
        assert mapped.decode(mapped.init(KEY)).dtype == jnp.float32
    for prior in (L2(), TotalVariation(), Gaussian(start[:2, :1], jnp.eye(6)), Diversity()):
        assert prior(start[:2, :1] if isinstance(prior, Gaussian) else start).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_spectra_of_half_precision_are_single(dtype):
    start = image(8, 8, 3).astype(dtype)
    phases = Maco.of(start[None], start=start, noise=0.0)
    for parametrisation in (Fourier((8, 8, 3), noise=0.0, start=start), phases):
        x = parametrisation.decode(parametrisation.init(KEY))
        assert x.dtype == jnp.float32
        assert_allclose(x, start.astype(jnp.float32), atol=1e-6)
        found = rp.maximize(lambda x: x.sum(), parametrisation.then(lambda x: x.astype(dtype)), steps=2)
        assert found.input.dtype == dtype
