"""Relevant subspaces: PRCA and DRSA by hand, on planted directions, and as conditions of an explanation."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from numpy.testing import assert_allclose

import relprop as rp
from relprop.concepts import Moments, drsa, prca, projector, subspace_relevance

GOLDEN = (1 + np.sqrt(5)) / 2


def orthogonal(seed, features):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(features, features)))[0]


def pairs(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape)


@functools.cache
def planted():
    """Two planes in four dimensions, hidden by a rotation: each sample uses one of them, and varies in both."""
    rng = np.random.default_rng(0)
    rotation = orthogonal(1, 4)
    used = np.eye(2)[rng.integers(0, 2, 200)][:, :, None]
    inside = rng.normal(size=(200, 2, 2)) * [1.5, 1.0]
    a = (inside * (0.3 + used)).reshape(200, 4) @ rotation.T
    c = (inside * used).reshape(200, 4) @ rotation.T
    return a, c, rotation.reshape(4, 2, 2).swapaxes(0, 1)


def search(a, c, seed=0):
    """Shares one compiled program per dtype."""
    return drsa(a, c, 2, key=jax.random.key(seed), steps=150, restarts=16)


@functools.cache
def found():
    return search(*planted()[:2])


def overlap(one, other):
    """For each pair of subspaces 1 if they are the same, 0 if they are orthogonal."""
    return jnp.einsum("kij,lij->kl", projector(one), projector(other)) / one.shape[-1]


def objective(a, c, basis):
    """What DRSA maximises, sample by sample and subspace by subspace."""
    strength = []
    for U in np.asarray(basis):
        positive = [max(0.0, (U.T @ x) @ (U.T @ y)) for x, y in zip(a, c, strict=True)]
        strength.append(np.sqrt(np.mean(np.square(positive))))
    return np.mean(np.sqrt(strength)) ** 2


# PRCA


def test_prca_by_hand():
    # the symmetric part of a c^T is [[1, 1], [1, 0]], with the golden ratio for its eigenvalue
    result = prca(jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 2.0]]))
    assert_allclose(result.relevance, [GOLDEN, 1 - GOLDEN], atol=1e-12)
    assert_allclose(result.basis[:, 0], np.array([GOLDEN, 1]) / np.hypot(GOLDEN, 1), atol=1e-12)
    assert_allclose(result.basis[:, 1], np.array([-1, GOLDEN]) / np.hypot(GOLDEN, 1), atol=1e-12)


def test_an_eigenvalue_is_the_mean_relevance_of_its_direction():
    a, c = pairs(0, 40, 6)
    basis, relevance = prca(a, c)
    assert_allclose(basis.T @ basis, np.eye(6), atol=1e-12)
    assert (jnp.diff(relevance) < 0).all()
    each = subspace_relevance(a, c, basis.T[:, :, None])  # (40, 6)
    assert_allclose(each.mean(0), relevance, atol=1e-12)
    assert_allclose(relevance.sum(), (a * c).sum(1).mean(), atol=1e-12)
    assert_allclose(each.sum(1), (a * c).sum(1), atol=1e-12)
    # the matrix of the paper is twice as large
    paper = np.linalg.eigvalsh((a.T @ c + c.T @ a) / 40)[::-1]
    assert_allclose(paper, 2 * relevance, atol=1e-12)


def test_no_subspace_carries_more_than_the_first_components():
    a, c = pairs(1, 30, 5)
    best = prca(a, c, 2).relevance.sum()
    others = np.stack([orthogonal(seed, 5)[:, :2] for seed in range(2000)])
    carried = subspace_relevance(a, c, others).mean(0)
    assert carried.max() < best
    assert carried.max() > 0.8 * best  # so that they came near


def test_prca_finds_what_pca_misses():
    rng = np.random.default_rng(2)
    rotation = orthogonal(3, 8)
    loud, used = rotation[:, :5], rotation[:, 5:6]
    a = 3 * rng.normal(size=(4000, 5)) @ loud.T + rng.normal(size=(4000, 1)) @ used.T
    c = (a @ used) @ used.T  # the decision is the square of one quiet direction
    pca = np.linalg.eigh(a.T @ a)[1][:, -5:]
    assert np.linalg.norm(pca.T @ used) < 0.05
    assert np.linalg.norm(prca(a, c, 1).basis.T @ used) > 0.99


def test_directions_that_speak_against_come_last():
    a = np.eye(3)
    result = prca(a, a * [3.0, -6.0, 0.0])
    assert_allclose(result.relevance, [1, 0, -2], atol=1e-12)
    assert_allclose(result.basis, np.eye(3)[:, [0, 2, 1]], atol=1e-12)


def test_positions_are_samples():
    a, c = pairs(4, 2, 3, 4, 5)
    jax.tree.map(assert_allclose, prca(a, c), prca(a.reshape(24, 5), c.reshape(24, 5)))


def test_a_stream_of_batches_is_one_sample():
    a, c = pairs(5, 6, 10, 4)

    @jax.jit
    def stream(a, c):
        return jax.lax.scan(lambda m, batch: (m.update(*batch), None), Moments.zeros(4, a.dtype), (a, c))[0]

    moments = stream(a, c).update(a[0, :0], c[0, :0])  # none at all change nothing
    assert moments.cross.shape == (4, 4)
    assert moments.count == 60
    basis, relevance = prca(a, c, 2)
    streamed = moments.components(2)
    assert_allclose(streamed.relevance, relevance, rtol=1e-12)
    assert_allclose(streamed.basis, basis, atol=1e-10)


def test_prca_under_jit_and_for_every_class_at_once():
    a, c = pairs(6, 3, 20, 4)
    classes = jax.jit(jax.vmap(lambda a, c: prca(a, c, 2)))(a, c)
    assert classes.basis.shape == (3, 4, 2)
    assert_allclose(classes.basis[1], prca(a[1], c[1], 2).basis, atol=1e-10)


def test_fewer_samples_than_features():
    a, c = pairs(7, 2, 9)
    result = prca(a, c)
    assert_allclose(result.basis.T @ result.basis, np.eye(9), atol=1e-12)
    assert (result.relevance[:2] > 0.1).all()
    assert_allclose(result.relevance[2:7], 0, atol=1e-12)
    assert (result.relevance[7:] < -0.1).all()


# DRSA


def test_drsa_by_hand():
    # two samples, each relevant for one axis: 1/2-mean of 4 / sqrt(2) and 1 / sqrt(2)
    a = c = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    result = drsa(a, c, 2, key=jax.random.key(0), steps=100)
    assert_allclose(result.objective[-1], 2.25 / np.sqrt(2), rtol=1e-12)
    assert_allclose(abs(result.basis[:, :, 0]), np.eye(2), atol=1e-6)
    assert_allclose(result.relevance, [2, 0.5], atol=1e-10)


def test_drsa_is_the_best_of_all_angles():
    a, c = pairs(8, 50, 2)
    angles = np.linspace(0, np.pi / 2, 101)
    turned = np.array([[np.cos(angles), np.sin(angles)], [-np.sin(angles), np.cos(angles)]])  # (subspace, feature, angle)
    values = [objective(a, c, turned[:, :, i, None]) for i in range(101)]
    result = drsa(a, c, 2, key=jax.random.key(1), steps=100)
    assert result.objective[-1] >= max(values)
    assert_allclose(result.objective[-1], max(values), rtol=1e-3)
    assert max(values) > 1.1 * min(values)  # so that there was something to find


def test_drsa_finds_planted_planes_up_to_their_order_and_rotation():
    shared = overlap(found().basis, planted()[2])
    assert_allclose(np.sort(shared), [[0, 1], [0, 1]], atol=0.01)
    assert_allclose(shared.sum(0), [1, 1], atol=0.01)


def test_principal_components_mix_what_drsa_keeps_apart():
    a, c, truth = planted()
    basis = prca(a, c).basis.reshape(4, 2, 2).swapaxes(0, 1)  # the long axes of both planes come first
    assert_allclose(overlap(basis, truth), np.full((2, 2), 0.5), atol=0.05)
    assert objective(a, c, basis) < 0.9 * found().objective[-1]


def test_subspaces_are_orthogonal_and_complete():
    U = found().basis.swapaxes(0, 1).reshape(4, 4)
    assert_allclose(U.T @ U, np.eye(4), atol=1e-10)
    assert_allclose(found().projectors.sum(0), np.eye(4), atol=1e-10)
    a, c, _ = planted()
    assert_allclose(subspace_relevance(a, c, found().basis).sum(-1), (a * c).sum(-1), atol=1e-10)


def test_subspaces_come_in_the_order_of_their_relevance():
    a, c, _ = planted()
    for seed in range(4):
        result = search(a, c, seed)
        assert result.relevance[0] >= result.relevance[1]
        assert_allclose(subspace_relevance(a, c, result.basis).mean(0), result.relevance, atol=1e-12)


def test_the_objective_never_falls_and_is_that_of_the_result():
    a, c, _ = planted()
    values = found().objective
    assert values.shape == (151,)
    assert (jnp.diff(values) >= 0).all()
    assert values[-1] > 1.01 * values[0]
    assert_allclose(objective(a, c, found().basis), values[-1], rtol=1e-10)


def test_units_of_activations_and_coefficients_do_not_matter():
    a, c, _ = planted()
    other = search(a * 2.0**60, c * 2.0**-200)
    assert_allclose(other.projectors, found().projectors, atol=1e-6)
    assert_allclose(other.objective, found().objective * 2.0**-140, rtol=1e-9)


def test_subspaces_need_not_complete_the_space():
    a, c, truth = planted()
    turn = orthogonal(9, 6)
    unused = 0.3 * np.random.default_rng(10).normal(size=(200, 2))
    a, c = np.hstack([a, unused]) @ turn.T, np.hstack([c, 0 * unused]) @ turn.T
    result = drsa(a, c, 2, 2, key=jax.random.key(0), steps=150, restarts=16)
    assert result.basis.shape == (2, 6, 2)
    U = result.basis.swapaxes(0, 1).reshape(6, 4)
    assert_allclose(U.T @ U, np.eye(4), atol=1e-10)
    expected = turn @ np.pad(truth, ((0, 0), (0, 2), (0, 0)))
    assert_allclose(np.sort(overlap(result.basis, expected)), [[0, 1], [0, 1]], atol=0.01)


def test_loud_noise_draws_drsa_away_from_what_is_used():
    # Rectified, noise of either sign counts as relevance: the objective itself is larger there, the relevance is not.
    a, c, truth = planted()
    a = np.hstack([a, 10 * np.random.default_rng(10).normal(size=(200, 2))])
    c, truth = np.hstack([c, np.zeros((200, 2))]), np.pad(truth, ((0, 0), (0, 2), (0, 0)))
    result = drsa(a, c, 2, 2, key=jax.random.key(0), steps=150, restarts=16)
    assert result.objective[-1] > 1.2 * objective(a, c, truth)
    assert result.relevance.sum() < 0.9 * subspace_relevance(a, c, truth).mean(0).sum()


def step_of_the_authors(a, c, basis):
    """One step of their procedure, in numpy: a gradient step of length 1, then U (U^T U)^(-1/2)."""
    a, c = (x / (np.sqrt(np.mean(x**2)) * x.shape[1] ** 0.25) for x in (a, c))
    basis = np.asarray(basis)
    R = np.maximum(0, np.einsum("nd,kde,nf,kfe->nk", a, basis, c, basis))
    strength = np.sqrt(np.mean(R**2, axis=0))
    outer = np.mean(np.sqrt(strength)) / (len(basis) * np.sqrt(strength))  # of the 1/2-mean, by each strength
    weights = outer * R / (len(a) * strength)
    slope = np.einsum("nk,nd,nf,kfe->kde", weights, a, c, basis) + np.einsum("nk,nd,nf,kfe->kde", weights, c, a, basis)
    U = np.concatenate(list(basis + slope), axis=1)
    values, vectors = np.linalg.eigh(U.T @ U)
    U = U @ (vectors / np.sqrt(values)) @ vectors.T
    return np.stack(np.split(U, len(basis), axis=1))


def test_the_first_step_is_that_of_the_authors():
    a, c = pairs(11, 30, 6)
    start, after = (drsa(a, c, 3, key=jax.random.key(4), restarts=1, steps=steps) for steps in (0, 1))
    expected = step_of_the_authors(a, c, start.basis)
    order = np.argsort(-subspace_relevance(a, c, expected).mean(0))
    assert_allclose(after.basis, expected[order], atol=1e-10)
    assert_allclose(after.objective, [objective(a, c, start.basis), objective(a, c, expected)], rtol=1e-10)
    assert after.objective[1] > 1.01 * after.objective[0]


def test_it_ends_where_a_step_of_the_authors_changes_nothing():
    a, c, _ = planted()
    assert_allclose(step_of_the_authors(a, c, found().basis), found().basis, atol=1e-6)


def test_drsa_for_every_class_at_once():
    a, c = pairs(12, 2, 30, 4)
    find = functools.partial(drsa, subspaces=2, steps=20, key=jax.random.key(5))
    classes = jax.jit(jax.vmap(find))(a, c)
    assert_allclose(classes.basis[1], find(a[1], c[1]).basis, atol=1e-8)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_without_positive_relevance_there_is_nothing_to_climb(sign):
    a = planted()[0]
    result = search(a, sign * a)
    assert_allclose(result.objective, np.zeros(151))
    assert_allclose(result.projectors.sum(0), np.eye(4), atol=1e-10)
    assert_allclose(result.relevance.sum(), sign * (a**2).sum(1).mean(), rtol=1e-10)


def test_one_sample_is_shared_evenly():
    # of shares that sum to 1, the 1/2-mean is largest where they are equal
    a = np.eye(4)[:1]
    result = drsa(a, a, 4, key=jax.random.key(7), steps=100)
    assert_allclose(subspace_relevance(a, a, result.basis)[0], np.full(4, 0.25), atol=1e-4)
    assert_allclose(result.objective[-1], 0.25, rtol=1e-6)


# precision, errors, explanations


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_single_and_half_precision_are_computed_in_single(dtype):
    a, c = (jnp.asarray(x, dtype) for x in planted()[:2])
    components, result = prca(a, c, 2), search(a, c)
    relevance = subspace_relevance(a, c, result.basis)
    for leaf in jax.tree.leaves((components, result, relevance)):
        assert leaf.dtype == jnp.float32
    assert_allclose(result.projectors.sum(0), np.eye(4), atol=1e-5)
    assert_allclose(components.relevance, prca(a.astype(float), c.astype(float), 2).relevance, rtol=1e-5)
    assert_allclose(result.objective[-1], found().objective[-1], rtol=1e-5 if dtype == jnp.float32 else 1e-2)
    assert_allclose(relevance.sum(1), (a.astype(float) * c.astype(float)).sum(1), atol=1e-4)


def test_small_numbers_of_single_precision_do_not_vanish():
    a, c = (jnp.asarray(x * 1e-18, jnp.float32) for x in planted()[:2])
    assert_allclose(search(a, c).objective[-1] * 1e36, found().objective[-1], rtol=1e-4)


def test_subspace_relevance_by_hand():
    a, c = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, -1.0, 2.0])
    basis = jnp.eye(3)[:, :2]
    assert subspace_relevance(a, c, basis) == -1  # 1 - 2
    batch = jnp.broadcast_to(a, (4, 5, 3)), jnp.broadcast_to(c, (4, 5, 3))
    assert subspace_relevance(*batch, jnp.stack([basis, basis])).shape == (4, 5, 2)
    assert subspace_relevance(batch[0][:0], batch[1][:0], basis).shape == (0, 5)


X = np.ones((3, 4))
KEY = jax.random.key(0)
ERRORS = {
    "prca: shapes": (lambda: prca(X, X[:2]), r"activations \(3, 4\) and coefficients \(2, 4\) have to be of one shape"),
    "prca: one sample": (lambda: prca(X[0], X[0]), r"one sample is a\[None\]"),
    "prca: no samples": (lambda: prca(X[:0], X[:0]), "no samples"),
    "prca: too many": (lambda: prca(X, X, 5), "components=5 has to be between 1 and the number of features, 4"),
    "prca: none": (lambda: prca(X, X, 0), "components=0"),
    "prca: nan": (lambda: prca(X, X * np.nan), "coefficients are not finite: 12 of 12"),
    "prca: integers": (lambda: prca(X.astype(int), X), "activations have to be real floating-point numbers"),
    "moments: features": (lambda: Moments.zeros(5).update(X, X), "4 features, but these moments are of 5"),
    "drsa: shapes": (lambda: drsa(X, X.T, 2, key=KEY), "have to be of one shape"),
    "drsa: no samples": (lambda: drsa(X[:0], X[:0], 2, key=KEY), "no samples"),
    "drsa: uneven": (lambda: drsa(X, X, 3, key=KEY), "Say dimensions=1 to leave 1 out"),
    "drsa: too large": (lambda: drsa(X, X, 2, 3, key=KEY), "do not fit into 4 features: between 1 and 2 do"),
    "drsa: infinite": (lambda: drsa(X / 0.0, X, 2, key=KEY), "activations are not finite"),
    "drsa: steps": (lambda: drsa(X, X, 2, key=KEY, steps=-1), "steps=-1"),
    "drsa: restarts": (lambda: drsa(X, X, 2, key=KEY, restarts=0), "restarts=0"),
    "drsa: subspaces": (lambda: drsa(X, X, 0, key=KEY), "subspaces=0"),
    "projector: scaled": (lambda: projector(2 * jnp.eye(3)), r"not orthonormal.*qr\(basis\)"),
    "projector: vector": (lambda: projector(jnp.eye(3)[0]), "one direction is"),
    "relevance: features": (lambda: subspace_relevance(X, X, jnp.eye(3)), r"basis \(3, 3\)"),
}


@pytest.mark.parametrize("name", ERRORS)
@np.errstate(divide="ignore")
def test_errors_teach(name):
    call, message = ERRORS[name]
    with pytest.raises(rp.ArgumentError, match=message):
        call()


def heatmaps(network, params, x, rules, layer, projectors):
    def one(P):
        return rp.explain(network, rules, target=1, conditions=[rp.condition(layer, lambda a: a @ P)])(params, x)

    return jax.jit(jax.vmap(one))(projectors)


def test_heatmaps_of_complete_subspaces_sum_to_the_heatmap_of_all():
    network, params, x = networks.conv_1d, networks.init("conv_1d"), networks.sample("conv_1d")
    layer, rules = rp.path("conv2/kernel"), rp.Epsilon()
    at = jax.jit(rp.relevances(network, rules, at=layer, target=1))(params, x)["conv2/kernel"]
    subspaces = drsa(at.value, at.coefficient, 2, key=jax.random.key(8), steps=20)
    each = heatmaps(network, params, x, rules, layer, subspaces.projectors)
    assert_allclose(each.sum(0), jax.jit(rp.explain(network, rules, target=1))(params, x), atol=1e-10)
    assert abs(each[0] - each[1]).max() > 1e-3


def test_what_a_subspace_carries_arrives_at_the_input():
    network, params, x = networks.dense_tanh, networks.init("dense_tanh"), networks.sample("dense_tanh")
    for name in ("dense1", "dense2"):  # biases below would keep a share
        params[name]["bias"] *= 0
    layer = rp.path("dense2/kernel")
    value, coefficient, _ = jax.jit(rp.relevances(network, rp.Zero(), at=layer, target=1))(params, x)["dense2/kernel"]
    basis = prca(value, coefficient).basis.reshape(12, 3, 4).swapaxes(0, 1)
    each = heatmaps(network, params, x, rp.Zero(), layer, projector(basis))
    carried = subspace_relevance(value, coefficient, basis)  # (batch, subspace)
    assert_allclose(each.sum(-1), carried.T, atol=1e-10)
    assert abs(carried[:, [0, 2]]).min() > 0.05
    assert_allclose(carried[:, 1], 0, atol=1e-12)  # what three samples have nothing of
