"""No relevance is created or lost unseen: input relevance and what each layer absorbs sum to the output."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from ledger import ledger

import relprop as rp
from relprop.structure import Layer

COMPOSITES = {
    "zero": rp.Zero(),
    "epsilon": rp.Epsilon(),
    "gamma": rp.Gamma(),
    "alphabeta": rp.AlphaBeta(),
    "ignoring biases": rp.ZPlus(bias="ignore"),
    "norm at adds": [
        ("affine", rp.Gamma()),
        (rp.optional("add"), rp.Norm(0.1)),
        (rp.optional("sum_pool"), rp.Norm(0.1)),
    ],
    "residual gamma": [("affine", rp.Epsilon()), (rp.optional("add"), rp.ResidualGamma())],
    "proportional pooling": [("affine", rp.ZPlus()), (rp.optional("max_pool"), rp.ProportionalPool())],
    "gradient": [(rp.where(lambda layer: True, "all"), rp.Gradient())],
}


def closes(fn, rules, *args, rtol, **options):
    lines, at_input, at_output = ledger(fn, rules, *args, **options)
    absorbed = sum(line.absorbed for line in lines)
    scale = max(abs(at_output), *(abs(line.out) for line in lines))
    np.testing.assert_allclose(at_input + absorbed, at_output, rtol=0, atol=rtol * scale)
    return lines


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", ["dense_tanh", "conv_mixed_2d", "vgg_max", "vgg_avg"])
def test_synthetic_networks_close(name, composite):
    args = networks.init(name), networks.sample(name)
    closes(networks.NETWORKS[name], COMPOSITES[composite], *args, rtol=1e-12, target="top")


def test_each_layer_s_line_says_what_it_absorbs():
    w, b, x = jnp.array([[1.0], [2.0]]), jnp.array([4.0]), jnp.array([[1.0, 2.0]])

    def fn(w, b, x):
        return jax.nn.softplus(x @ w + b.reshape(1, 1))

    dense, activation = (line for line in ledger(fn, rp.Zero(), w, b, x)[0] if isinstance(line.layer, Layer))
    z, y = 9.0, float(jnp.log1p(jnp.exp(9.0)))
    np.testing.assert_allclose(activation.out, y)
    np.testing.assert_allclose(activation.absorbed, np.log(2), rtol=1e-9)  # f(0)
    np.testing.assert_allclose(dense.absorbed, (y - np.log(2)) * 4 / z, rtol=1e-9)  # the share of the bias


def test_float32_closes_within_its_rounding():
    params, x = jax.tree.map(lambda a: a.astype(np.float32), (networks.init("vgg_max"), networks.sample("vgg_max")))
    closes(networks.vgg_max, rp.presets.epsilon_alpha2_beta1(), params, x, rtol=1e-5, target="top")


@networks.requires("resnet20/weights.npz")
@networks.requires("cifar10/cifar10_test_jpeg_2000.npz")
@pytest.mark.parametrize("composite", ["epsilon", "alphabeta", "residual gamma"])
def test_resnet20_closes_with_the_default_at_adds(composite):
    params, (x, _) = networks.load_resnet(), networks.cifar10(slice(0, 2))
    lines = closes(networks.resnet20, COMPOSITES[composite], params, x, rtol=1e-10, target="top")
    for line in lines:
        if getattr(line.layer, "kind", "plain") in ("add", "sum_pool", "activation", "plain"):
            np.testing.assert_allclose(line.absorbed, 0.0, atol=1e-9 * abs(line.out) + 1e-12)


@networks.requires("resnet20/weights.npz")
@networks.requires("cifar10/cifar10_test_jpeg_2000.npz")
def test_the_biases_of_resnet20_receive_what_is_missing():
    params, (x, _) = networks.load_resnet(), networks.cifar10(slice(0, 2))
    explain = jax.jit(rp.value_and_explain(networks.resnet20, rp.Zero(), argnums=(0, 1), target="top"))
    value, (for_params, for_x) = explain(params, x)
    shifts = [
        leaf.sum() for path, leaf in jax.tree_util.tree_leaves_with_path(for_params) if path[-1].key in ("bias", "mean")
    ]
    assert len(shifts) >= 20
    np.testing.assert_allclose(for_x.sum() + sum(shifts), value.max(-1).sum(), rtol=1e-8)
