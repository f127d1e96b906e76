"""The Gaussian RBM: its density against sums over hidden states and integrals, its samples, and its training."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import load_digits

import relprop as rp
from relprop.maximization import Gaussian, GaussianRBM, fit_rbm

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def machine(hidden, features, scale=1.0):
    rng = np.random.default_rng(hidden)  # its own: machines do not depend on which tests ran before
    root = 0.3 * rng.normal(size=(features, features))
    weights, bias, mean = (rng.normal(size=shape) for shape in ((hidden, features), hidden, features))
    return GaussianRBM(*map(jnp.asarray, (scale * weights, bias, root @ root.T + np.eye(features), mean)))


def states(hidden):
    return np.array(list(itertools.product([0.0, 1.0], repeat=hidden)))


RBM = machine(6, 5)
X = jnp.asarray(RNG.normal(size=(7, 5)))


def test_the_density_is_the_sum_over_all_hidden_states():
    x = np.asarray(X - RBM.mean[None])
    joint = states(6) @ (np.asarray(RBM.weights) @ x.T + np.asarray(RBM.bias)[:, None])
    expected = np.log(np.exp(joint).sum(0)) - np.einsum("ni,ij,nj->n", x, RBM.precision, x) / 2
    assert_allclose(RBM(X), expected, rtol=1e-10)


def test_its_gradient():
    x = np.asarray(X - RBM.mean[None])
    sigma = 1 / (1 + np.exp(-(x @ np.asarray(RBM.weights).T + np.asarray(RBM.bias))))
    expected = sigma @ np.asarray(RBM.weights) - x @ np.asarray(RBM.precision)
    assert_allclose(jax.grad(lambda x: RBM(x).sum())(X), expected, rtol=1e-10)


def test_batches_images_and_transformations():
    rbm = GaussianRBM(RBM.weights[:, :4], RBM.bias, RBM.precision[:4, :4], RBM.mean[:4].reshape(2, 2, 1))
    images = jnp.asarray(RNG.normal(size=(3, 5, 2, 2, 1)))
    assert rbm(images).shape == (3, 5)
    assert_allclose(jax.vmap(jax.vmap(rbm))(images), rbm(images), rtol=1e-12)
    assert_allclose(jax.jit(lambda rbm, x: rbm(x))(rbm, images), rbm(images), rtol=1e-12)


def test_the_partition_function_is_an_integral():
    rbm = machine(3, 2)
    grid = np.linspace(-15, 15, 601)
    points = np.stack(np.meshgrid(grid, grid), -1)
    integral = np.exp(rbm(jnp.asarray(points))).sum() * (grid[1] - grid[0]) ** 2
    estimate, error = rbm.log_partition()
    assert_allclose(estimate, np.log(integral), rtol=1e-9)
    assert error == 0


def test_annealed_importance_sampling_agrees_with_the_sum(monkeypatch):
    rbm = machine(8, 5, 0.7)
    exact, _ = rbm.log_partition()
    monkeypatch.setattr("relprop.maximization.boltzmann.EXACT", 4)
    estimate, error = rbm.log_partition(KEY, chains=400, temperatures=300)
    assert 0 < error < 0.05
    assert abs(estimate - exact) < 4 * error


def test_samples_have_the_moments_of_the_machine():
    rbm = machine(3, 2)
    covariance = np.linalg.inv(rbm.precision)
    h = states(3)
    centres = np.asarray(rbm.mean) + h @ np.asarray(rbm.weights) @ covariance
    effect = h @ np.asarray(rbm.weights)
    weight = np.exp(h @ np.asarray(rbm.bias) + np.einsum("ni,ij,nj->n", effect, covariance, effect) / 2)
    weight /= weight.sum()
    mean = weight @ centres
    spread = covariance + (centres - mean).T @ (weight[:, None] * (centres - mean))
    samples = np.asarray(rbm.sample(KEY, 20000, steps=100))
    assert_allclose(samples.mean(0), mean, atol=4 * math.sqrt(spread.max() / 20000))
    assert_allclose(np.cov(samples, rowvar=False), spread, rtol=0.05, atol=0.05 * spread.max())


def test_sampling_starts_where_it_is_told():
    start = jnp.broadcast_to(RBM.mean + 3.0, (4, 5))
    assert_allclose(RBM.sample(KEY, 4, steps=0, start=start), start, rtol=1e-12)
    assert_array_equal(RBM.sample(KEY, 4, steps=3), RBM.sample(KEY, 4, steps=3))


@functools.cache
def digits():
    """Digits to train on, and others with noise to judge by."""
    images = jnp.asarray(load_digits().images[..., None] / 16)
    held_out = images[1300:] + 0.15 * jax.random.normal(jax.random.key(9), images[1300:].shape)
    return images[:1300], held_out


@functools.cache
def fitted():
    return fit_rbm(digits()[0], 16, key=KEY, directions=30, steps=1500)


def test_a_fitted_machine_beats_the_gaussian_on_digits_it_has_not_seen():
    images, held_out = digits()
    rbm = fitted()
    likelihood = rbm(held_out) - rbm.log_partition()[0]
    gaussian = Gaussian.fit(images, noise=0.15)(held_out)
    difference = likelihood - gaussian
    assert difference.mean() > 5 * difference.std() / math.sqrt(len(difference))


def test_its_samples_are_as_likely_as_digits_and_noise_is_not():
    rbm, held_out = fitted(), digits()[1]
    samples = rbm.sample(KEY, 200, steps=300)
    assert abs(rbm(samples).mean() - rbm(held_out).mean()) < rbm(held_out).std()
    noise = held_out[:, ::-1, ::-1].transpose(0, 2, 1, 3)  # the same pixels, in other places
    assert rbm(noise).mean() < rbm(held_out).mean() - 2 * rbm(held_out).std()


def test_the_same_key_gives_the_same_machine_and_single_precision_is_kept():
    images = digits()[0].astype(jnp.float32)
    one, other = (fit_rbm(images, 4, key=KEY, steps=5) for _ in range(2))
    jax.tree.map(assert_array_equal, one, other)
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {jnp.dtype(jnp.float32)}
    assert one(images).dtype == jnp.float32
    assert one.precision.shape == (64, 64)


def test_half_precision_is_fitted_in_single():
    images = digits()[0].astype(jnp.bfloat16)
    rbm = fit_rbm(images, 4, key=KEY, steps=5)
    assert {leaf.dtype for leaf in jax.tree.leaves(rbm)} == {jnp.dtype(jnp.float32)}
    assert rbm.sample(KEY, 3, steps=2, start=images[:3]).dtype == jnp.float32


def test_it_is_a_prior():
    found = rp.maximize(lambda x: 0.0 * x.sum(), fitted().mean, steps=60, log_prior=fitted(), optimizer=optax.sgd(0.002))
    assert (jnp.diff(found.scores) > 0).all()


ERRORS = {
    "fields": (lambda: GaussianRBM(RBM.weights, RBM.bias[:1], RBM.precision, RBM.mean)(X), r"do not belong together"),
    "another shape": (lambda: RBM(jnp.ones((2, 4))), r"shape \(5,\), but is given \(2, 4\)"),
    "integer input": (lambda: RBM(jnp.ones(5, int)), "floating-point examples, but is given int64"),
    "chains": (lambda: machine(17, 2).log_partition(KEY, chains=1), "chains=1 has to be 2 at least"),
    "temperatures": (lambda: machine(17, 2).log_partition(KEY, temperatures=0), "temperatures=0 has to be 1 at least"),
    "steps": (lambda: RBM.sample(KEY, 3, steps=-1), "steps=-1 has to be 0 at least"),
    "rate": (lambda: fit_rbm(X, key=KEY, learning_rate=-1.0), r"learning_rate=-1\.0 has to be above 0"),
    "no key": (lambda: machine(17, 2).log_partition(), "17 hidden units.*give a key"),
    "start": (lambda: RBM.sample(KEY, 3, start=X), r"start holds \(7,\) examples, but count=3"),
    "integers": (lambda: fit_rbm(jnp.ones((4, 2), int), key=KEY), r"int64\[4, 2\].*floating-point"),
    "one example": (lambda: fit_rbm(X[:1], key=KEY), "N >= 2"),
    "indefinite": (lambda: GaussianRBM(RBM.weights, RBM.bias, -RBM.precision, RBM.mean).sample(KEY, 2), "positive definite"),
    "nan": (lambda: fit_rbm(X * jnp.nan, key=KEY), "not finite"),
    "hidden": (lambda: fit_rbm(X, 0, key=KEY), "hidden=0 has to be above 0"),
    "noise": (lambda: fit_rbm(X, key=KEY, noise=0.0), r"noise=0\.0 has to be above 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_teach(name):
    call, message = ERRORS[name]
    with pytest.raises(rp.ArgumentError, match=message):
        call()
