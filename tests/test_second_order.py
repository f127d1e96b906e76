"""Explanations by pairs (BiLRP, Eberle et al. 2020) and by walks (GNN-LRP, Schnake et al. 2022)."""

import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import relprop as rp

A = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])  # a chain of three nodes, each hears itself
W = [jnp.asarray(np.random.default_rng(i).normal(0.3, 1.0, shape)) for i, shape in enumerate([(2, 4), (4, 5), (5, 3)])]
X = jnp.asarray(np.random.default_rng(9).normal(0.5, 1.0, (3, 2)))


def graph_network(x):
    for w in W:
        x = jax.nn.relu((A @ x) @ w)
    return x.sum()


def walk_by_hand(nodes, gamma):
    """Schnake et al. 2022, eq. 3: `R_jK = sum_k lambda_JK h_j w_jk / (sum_J,j lambda_JK h_j w_jk) R_kL`, at given nodes."""
    states = [np.asarray(X)]
    for w in W:
        states.append(np.maximum(np.asarray(A) @ states[-1] @ w, 0))
    relevance = states[-1][nodes[-1]]  # of the features of the last node
    for layer in reversed(range(len(W))):
        below, above = nodes[layer], nodes[layer + 1]
        mixed, w = np.asarray(A)[above] @ states[layer], np.asarray(W[layer])
        z = mixed @ w

        def boosted(x, w=w, z=z, mixed=mixed):
            """Contributions of x (features,) to each output; those with the sign of the output count 1 + gamma times."""
            parts = x[:, None] * w
            own = mixed[:, None] * w * np.where(z >= 0, 1, -1) > 0
            return parts * np.where(own, 1 + gamma, 1)

        total = boosted(mixed).sum(0)
        share = np.asarray(A)[above, below] * states[layer][below]
        relevance = boosted(share) @ np.where(total == 0, 0, relevance / np.where(total == 0, 1, total))
    return relevance.sum()


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_walks_have_the_relevance_of_the_published_formula(gamma):
    weights = rp.where(
        lambda layer: layer.kind == "dense" and layer.frozen[0] is layer.core.inputs[1], "h @ w"
    )  # a @ h shares in proportion
    rules = [(weights, rp.Gamma(gamma, epsilon=0.0))]
    found = jax.jit(rp.walks(graph_network, rules, at="activation"))(X)
    assert found.shape == (3, 3, 3, 3)
    for nodes in itertools.product(range(3), repeat=4):
        np.testing.assert_allclose(found[nodes], walk_by_hand(nodes, gamma), rtol=1e-9, atol=1e-11, err_msg=str(nodes))


def test_walks_go_along_edges_and_sum_to_the_relevance_of_nodes():
    found = rp.walks(graph_network, rp.Epsilon(0.0), at="activation", batch_size=2)(X)
    np.testing.assert_allclose(found.sum((1, 2, 3)), rp.explain(graph_network, rp.Epsilon(0.0))(X).sum(1), rtol=1e-10)
    np.testing.assert_allclose(found.sum(), graph_network(X), rtol=1e-10)
    steps = np.stack(np.meshgrid(*[np.arange(3)] * 4, indexing="ij"))
    apart = (np.abs(np.diff(steps, axis=0)) > 1).any(0)
    assert (np.asarray(found)[apart] == 0).all()
    assert (np.asarray(found)[~apart] != 0).any()


def test_walks_past_a_layer_are_left_out():
    def fn(x):
        h = jax.nn.relu(A @ x)
        return (h + jax.nn.relu(A @ h)).sum()

    found = rp.walks(fn, None, at="activation")(X)
    without_the_branch = rp.explain(lambda x: jax.nn.relu(A @ jax.nn.relu(A @ x)).sum(), None)(X)
    np.testing.assert_allclose(found.sum(), without_the_branch.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"at": "conv"}, "matches no layer"), ({"at": "activation", "axis": 0}, "count the axis of nodes from the end")],
)
def test_walks_say_what_does_not_fit(options, message):
    with pytest.raises(rp.ArgumentError, match=message):
        rp.walks(graph_network, None, **options)(X)


def test_walks_need_layers_one_after_the_other_over_the_nodes_of_the_input():
    def parallel(x):
        return (jax.nn.relu(A @ x) + jax.nn.relu(A @ A @ x)).sum()

    with pytest.raises(rp.ArgumentError, match="parallel"):
        rp.walks(parallel, None, at="activation")(X)
    with pytest.raises(rp.ArgumentError, match="3 nodes along axis -2, but the activation"):
        rp.walks(lambda x: jax.nn.relu(jnp.ones((2, 3)) @ jax.nn.relu(A @ x)).sum(), None, at="activation")(X)


def test_walks_through_a_loop_are_refused():
    def fn(x):
        return jax.lax.scan(lambda h, _: (jax.nn.relu(A @ h), None), x, None, length=2)[0].sum()

    with pytest.raises(rp.ArgumentError, match="inside of a loop"):
        rp.walks(fn, None, at="activation")(X)


# Pairs.


def embedding(w, x):
    return jnp.tanh(x @ w)


def test_pairs_are_products_of_relevances_summed_over_features():
    w, x, y = W[0], X[0], X[1]
    found = jax.jit(rp.bilrp(embedding, rp.Epsilon(0.0)))(w, x, y)
    left, right = (
        [rp.explain(lambda w, v, m=m: embedding(w, v)[m], rp.Epsilon(0.0))(w, v) for m in range(4)] for v in (x, y)
    )
    np.testing.assert_allclose(found.left, left, rtol=1e-12)
    np.testing.assert_allclose(found.joint, sum(np.outer(a, b) for a, b in zip(left, right, strict=True)), rtol=1e-12)
    np.testing.assert_allclose(found.value, embedding(w, x) @ embedding(w, y), rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_pairs_and_what_biases_keep_sum_to_the_similarity(batch_size):
    params, x = networks.init("conv_1d"), networks.sample("conv_1d")

    def pixels(relevance):
        return rp.pool.pixels(relevance)[0]

    explain = rp.bilrp(networks.NETWORKS["conv_1d"], rp.Epsilon(0.1), pool=pixels, batch_size=batch_size)
    found = jax.jit(explain)(params, x[:1], x[1:2])
    length = x.shape[1]
    assert found.joint.shape == (length, length)
    assert abs(found.kept) > 1e-3 * abs(found.value)
    np.testing.assert_allclose(found.joint.sum() + found.kept, found.value, rtol=1e-10)


def test_pairs_of_several_inputs_by_vmap():
    explain = rp.bilrp(embedding, rp.Epsilon(0.0))
    many = jax.vmap(explain, (None, 0, 0))(W[0], X, X[::-1])
    for i in range(3):
        one = explain(W[0], X[i], X[2 - i])
        np.testing.assert_allclose(many.joint[i], one.joint, rtol=1e-12)
        np.testing.assert_allclose(many.kept[i], one.kept, atol=1e-12)


def test_pairs_say_what_does_not_fit():
    with pytest.raises(rp.ArgumentError, match="last two positional arguments"):
        rp.bilrp(embedding, None)(X[0])
    with pytest.raises(rp.ArgumentError, match="as many"):
        rp.bilrp(lambda x: x, None)(jnp.ones(2), jnp.ones(3))
    with pytest.raises(rp.ArgumentError, match="`pool` must make one array"):
        rp.bilrp(lambda x: x["a"] + x["b"], None)({"a": X[0], "b": X[1]}, {"a": X[0], "b": X[1]})
    with pytest.raises(rp.ArgumentError, match="two arrays of floats"):
        rp.bilrp(lambda x: (x, x), None)(X[0], X[1])
    with pytest.raises(rp.ArgumentError, match="at least 1"):
        rp.bilrp(embedding, None, batch_size=0)
