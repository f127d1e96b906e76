"""Many targets in one go."""

import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import relprop as rp

RULES = rp.presets.epsilon_plus()


@pytest.fixture(scope="module")
def network():
    return networks.NETWORKS["conv_1d"], networks.init("conv_1d"), networks.sample("conv_1d")


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_all_classes_are_a_loop_over_targets(network, batch_size):
    fn, params, x = network
    found = jax.jit(rp.explain_targets(fn, RULES, batch_size=batch_size))(params, x)
    one = jax.jit(lambda t: rp.explain(fn, RULES, target=t)(params, x))
    looped = jnp.stack([one(t) for t in range(found.shape[0])])
    assert found.shape[0] == fn(params, x).shape[-1]
    np.testing.assert_allclose(found, looped, rtol=1e-12, atol=1e-14)


def test_targets_by_example_are_pooled_as_they_come(network):
    fn, params, x = network
    targets = jnp.array([[0, 1], [2, 0], [1, 1]])
    found = rp.explain_targets(fn, RULES, targets=targets, pool=rp.pool.pixels)(params, x)
    by_hand = [rp.pool.pixels(rp.explain(fn, RULES, target=t)(params, x)) for t in targets]
    np.testing.assert_allclose(found, by_hand, rtol=1e-12, atol=1e-14)


def test_the_forward_pass_is_shared_and_memory_is_that_of_a_chunk():
    """Twenty targets: products forwards of the batch itself, and backwards of chunks of four."""
    w = [jnp.ones((6, 6)), jnp.ones((6, 20))]

    def fn(w, x):
        return jax.nn.relu(x @ w[0]) @ w[1]

    x = jnp.ones((3, 6))
    compiled = jax.jit(rp.explain_targets(fn, rp.Epsilon(), batch_size=4)).lower(w, x).compile()
    products = re.findall(r" = f64\[([\d,]*)\]\S* dot\(", compiled.as_text())
    assert sorted(products) == sorted(["3,6", "3,20", "12,6", "12,6"])
    whole = jax.jit(rp.explain_targets(fn, rp.Epsilon(), batch_size=None)).lower(w, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes


def test_what_does_not_fit_is_said(network):
    fn, params, x = network
    with pytest.raises(rp.ArgumentError, match="at least 1"):
        rp.explain_targets(fn, RULES, batch_size=0)
    with pytest.raises(rp.ArgumentError, match="one target"):
        rp.explain_targets(fn, RULES, targets=3)(params, x)
    with pytest.raises(rp.TargetError, match="out of range"):
        rp.explain_targets(fn, RULES, targets=[0, 99])(params, x)
    with pytest.raises(rp.TargetError, match="scalar"):
        rp.explain_targets(lambda x: x.sum(), RULES)(x)
