"""One network in plain JAX, flax linen, flax nnx and equinox: one relevance, with addresses that can be read."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import relprop as rp

KEYS = jax.random.split(jax.random.key(4), 8)
IMAGES = jax.random.normal(KEYS[0], (3, 8, 8, 2))
KERNELS = {
    "conv1": jax.random.normal(KEYS[1], (3, 3, 2, 4)) / 3,
    "conv2": jax.random.normal(KEYS[2], (3, 3, 4, 6)) / 4,
    "dense": jax.random.normal(KEYS[3], (6 * 4 * 4, 5)) / 8,
}
BIASES = {k: jax.random.normal(key, (v.shape[-1],)) / 3 for (k, v), key in zip(KERNELS.items(), KEYS[4:], strict=False)}
SCALE, SHIFT, MEAN, VARIANCE = (jnp.linspace(a, b, 4) for a, b in ((0.5, 1.5), (-0.2, 0.3), (-0.1, 0.1), (0.5, 2.0)))
PRESETS = {
    "epsilon_plus_flat": rp.presets.epsilon_plus_flat(),
    "epsilon_alpha2_beta1": rp.presets.epsilon_alpha2_beta1(),
    "epsilon_gamma_box": rp.presets.epsilon_gamma_box(-4.0, 4.0),
    "deep_taylor": rp.presets.deep_taylor(),
}
PARAMS = {
    **{k: {"kernel": KERNELS[k], "bias": BIASES[k]} for k in KERNELS},
    "norm": {"scale": SCALE, "bias": SHIFT, "mean": MEAN, "var": VARIANCE},
}


def plain(params, x):
    def row(v):
        return v.reshape(1, 1, 1, -1)

    def conv(layer, x):
        y = lax.conv_general_dilated(x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + row(layer["bias"])

    norm = params["norm"]
    x = conv(params["conv1"], x)
    x = (x - row(norm["mean"])) / jnp.sqrt(row(norm["var"]) + 1e-5) * row(norm["scale"]) + row(norm["bias"])
    x = jax.nn.relu(x)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(conv(params["conv2"], x))
    y = x.reshape(x.shape[0], -1) @ params["dense"]["kernel"]
    return y + params["dense"]["bias"].reshape(1, -1)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), param_dtype=jnp.float64)(x)
        x = nn.BatchNorm(use_running_average=True, param_dtype=jnp.float64)(x)
        x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(6, (3, 3), param_dtype=jnp.float64)(x))
        return nn.Dense(5, param_dtype=jnp.float64)(x.reshape(x.shape[0], -1))


def linen():
    layer = {k: {"kernel": KERNELS[k], "bias": BIASES[k]} for k in KERNELS}
    params = {
        "params": {
            "Conv_0": layer["conv1"],
            "BatchNorm_0": {"scale": SCALE, "bias": SHIFT},
            "Conv_1": layer["conv2"],
            "Dense_0": layer["dense"],
        },
        "batch_stats": {"BatchNorm_0": {"mean": MEAN, "var": VARIANCE}},
    }
    return Linen().apply, params, "params/Conv_0/kernel"


class Nnx(nnx.Module):
    def __init__(self, rngs):
        options = {"rngs": rngs, "param_dtype": jnp.float64}
        self.conv1 = nnx.Conv(2, 4, (3, 3), **options)
        self.norm = nnx.BatchNorm(4, use_running_average=True, **options)
        self.conv2 = nnx.Conv(4, 6, (3, 3), **options)
        self.dense = nnx.Linear(96, 5, **options)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv1(x))), (2, 2), strides=(2, 2))
        return self.dense(nnx.relu(self.conv2(x)).reshape(x.shape[0], -1))


def nnx_model():
    model = Nnx(nnx.Rngs(0))
    for name in KERNELS:
        getattr(model, name).kernel[...] = KERNELS[name]
        getattr(model, name).bias[...] = BIASES[name]
    model.norm.scale[...], model.norm.bias[...] = SCALE, SHIFT
    model.norm.mean, model.norm.var = nnx.BatchStat(MEAN), nnx.BatchStat(VARIANCE)
    graph, state = nnx.split(model)
    return (lambda state, x: nnx.merge(graph, state)(x)), state, "conv1/kernel"


class Equinox(eqx.Module):
    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    dense: eqx.nn.Linear
    norm: dict
    pool: eqx.nn.MaxPool2d

    def __init__(self):
        self.conv1 = eqx.nn.Conv2d(2, 4, 3, padding=1, key=KEYS[0])
        self.conv2 = eqx.nn.Conv2d(4, 6, 3, padding=1, key=KEYS[0])
        self.dense = eqx.nn.Linear(96, 5, key=KEYS[0])
        self.norm = {k: v.reshape(4, 1, 1) for k, v in PARAMS["norm"].items()}
        self.pool = eqx.nn.MaxPool2d(2, 2)

    def __call__(self, x):
        """One image, channels first."""
        x = self.conv1(x.transpose(2, 0, 1))
        norm = self.norm
        x = (x - norm["mean"]) / jnp.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]
        x = jax.nn.relu(self.conv2(self.pool(jax.nn.relu(x))))
        return self.dense(x.transpose(1, 2, 0).reshape(-1))


def equinox():
    model = Equinox()
    weights = {k: (v.T if k == "dense" else v.transpose(3, 2, 0, 1)) for k, v in KERNELS.items()}
    model = eqx.tree_at(
        lambda m: [m.conv1.weight, m.conv1.bias, m.conv2.weight, m.conv2.bias, m.dense.weight, m.dense.bias],
        model,
        [
            weights["conv1"],
            BIASES["conv1"].reshape(4, 1, 1),
            weights["conv2"],
            BIASES["conv2"].reshape(6, 1, 1),
            weights["dense"],
            BIASES["dense"],
        ],
    )
    params, static = eqx.partition(model, eqx.is_array)
    return (lambda params, x: jax.vmap(eqx.combine(params, static))(x)), params, "conv1/weight"


@pytest.mark.parametrize("build", [linen, nnx_model, equinox], ids=["linen", "nnx", "equinox"])
def test_the_same_network_has_the_same_relevance_and_readable_addresses(build, default_promotion):
    fn, params, address = build()
    np.testing.assert_allclose(fn(params, IMAGES), plain(PARAMS, IMAGES), rtol=1e-9)
    for name, rules in PRESETS.items():
        expected = rp.explain(plain, rules, target="top")(PARAMS, IMAGES)
        found = rp.explain(fn, rules, target="top")(params, IMAGES)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-10, err_msg=name)
    plan = rp.plan(fn, None)(params, IMAGES)
    assert plan[0].layer.path == address
    kinds = [entry.layer.kind for entry in plan]
    assert kinds == ["conv", "activation", "max_pool", "conv", "activation", "dense"]


def test_whole_modules_are_arguments_too(default_promotion):
    """nnx and equinox modules are pytrees; what is no array in them is left alone."""
    rules = rp.presets.epsilon_plus()
    expected = rp.explain(plain, rules)(PARAMS, IMAGES)
    _, state, _ = nnx_model()
    _, params, _ = equinox()
    model = eqx.combine(params, eqx.partition(Equinox(), eqx.is_array)[1])
    found = rp.explain(lambda model, x: jax.vmap(model)(x), rules)(model, IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-10)
    module = Nnx(nnx.Rngs(0))
    nnx.update(module, state)
    found = rp.explain(lambda x: module(x), rules)(IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-10)


def test_selection_by_library_addresses(default_promotion):
    fn, params, _ = linen()
    rules = [("params/Conv_*/kernel", rp.Gamma()), (rp.scope("Linen/Dense_0") | rp.path("Dense_0"), rp.Epsilon())]
    names = [type(entry.rule).__name__ for entry in rp.plan(fn, rules)(params, IMAGES) if entry.layer.path]
    assert names == ["Gamma", "Gamma", "Epsilon"]


def test_dropout_in_evaluation_mode_changes_nothing(default_promotion):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(4)(x))
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=True)(x))

    x = jnp.ones((2, 3), jnp.float32)
    params = Net().init(jax.random.key(0), x)
    assert [e.layer.kind for e in rp.plan(Net().apply, None)(params, x)] == ["dense", "activation", "dense"]


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"param_dtype": jnp.float64}
        y = nn.LayerNorm(**options)(x)
        x = x + nn.MultiHeadDotProductAttention(2, **options)(y, y)
        y = nn.Dense(8, **options)(nn.LayerNorm(**options)(x))
        return x + nn.Dense(4, **options)(nn.gelu(y, approximate=False))


def encoder_by_hand(params, x):
    """The same as `Encoder` in plain jax.numpy, attention and norms and gelu written out.

    A bias belongs to what it is added to, so it is added before the residual sum here, too.
    """

    def norm(p, x):
        m = x.mean(-1, keepdims=True)
        return (x - m) / jnp.sqrt(((x - m) ** 2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    p = params["params"]
    y, attention = norm(p["LayerNorm_0"], x), p["MultiHeadDotProductAttention_0"]
    q, k, v = (
        jnp.einsum("btd,dhe->bthe", y, attention[n]["kernel"]) + attention[n]["bias"] for n in ("query", "key", "value")
    )
    e = jnp.exp(jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(2.0))
    mixed = jnp.einsum("bhqk,bkhe->bqhe", e, v) / e.sum(-1).transpose(0, 2, 1)[..., None]
    x = x + (jnp.einsum("bthe,hed->btd", mixed, attention["out"]["kernel"]) + attention["out"]["bias"])
    y = norm(p["LayerNorm_1"], x) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    y = 0.5 * y * (1 + jax.lax.erf(y / np.sqrt(2.0)))
    return x + (y @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"])


def test_attention_norms_and_gelu_of_flax_are_those_by_hand(default_promotion):
    x = jax.random.normal(KEYS[0], (2, 5, 4))
    params = Encoder().init(jax.random.key(0), x)
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(KEYS[1], a.shape), params)
    np.testing.assert_allclose(Encoder().apply(params, x), encoder_by_hand(params, x), rtol=1e-9)
    # Without a stabiliser: linen scales queries where the other scales logits, and epsilon is in the units of a layer.
    presets = (rp.presets.attn_lrp, rp.presets.cp_lrp, rp.presets.res_lrp, rp.presets.attn_lrp_vit)
    for rules in (None, *(preset(epsilon=0.0) for preset in presets)):
        expected, found = (jax.jit(rp.explain(fn, rules))(params, x) for fn in (encoder_by_hand, Encoder().apply))
        np.testing.assert_allclose(found, expected, atol=1e-6 * jnp.abs(expected).max())
