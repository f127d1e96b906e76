"""Dense networks, sets, pairs, signals: everything without space, time or attention as its main idea."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from .base import dense, fill, from_equinox, from_nnx, linen, model, row, sample, weights


@model()
def mlp():
    params = weights(a=(5, 8), a_b=(8,), b=(8, 7), b_b=(7,), c=(7, 6), c_b=(6,), d=(6, 4))

    def fn(params, x):
        x = jax.nn.relu(dense(params, x, "a"))
        x = jnp.tanh(dense(params, x, "b"))
        x = jax.nn.gelu(dense(params, x, "c"))
        return dense(params, x, "d")

    return fn, params, sample(2, 5)


@model(library="linen")
def mlp_linen():
    options = {"param_dtype": jnp.float64}
    layers = [
        nn.Dense(8, **options),
        nn.silu,
        nn.LayerNorm(**options),
        nn.Dense(6, **options),
        nn.elu,
        nn.Dense(4, **options),
    ]
    return linen(nn.Sequential(layers), sample(2, 5))


@model(library="nnx")
def mlp_nnx():
    def make(rngs):
        options = {"rngs": rngs, "param_dtype": jnp.float64}
        return nnx.Sequential(
            nnx.Linear(5, 8, **options), nnx.RMSNorm(8, **options), nnx.softplus, nnx.Linear(8, 4, **options)
        )

    return from_nnx(make, sample(2, 5))


@model(library="equinox")
def mlp_equinox():
    return from_equinox(lambda key: eqx.nn.MLP(5, 4, 8, 2, activation=jax.nn.leaky_relu, key=key), sample(2, 5))


@model("bfloat16")
def mlp_bfloat16():
    fn, params, x = mlp()
    return fn, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), x.astype(jnp.bfloat16)


@model()
def maxout():
    params = weights(a=(5, 12), a_b=(12,), b=(4, 9), b_b=(9,))

    def fn(params, x):
        x = dense(params, x, "a").reshape(-1, 4, 3).max(-1)
        return dense(params, x, "b").reshape(-1, 3, 3).max(-1)

    return fn, params, sample(2, 5)


@model()
def gated_linear_units():
    params = weights(a=(5, 12), gate=(6, 8), up=(6, 8), down=(8, 6), out=(6, 3))

    def fn(params, x):
        x = jax.nn.glu(dense(params, x, "a"))
        x = x + dense(params, jax.nn.silu(dense(params, x, "gate")) * dense(params, x, "up"), "down")
        return dense(params, x, "out")

    return fn, params, sample(2, 5)


@model()
def highway():
    params = weights(a=(5, 5), a_b=(5,), gate=(5, 5), gate_b=(5,), out=(5, 3))

    def fn(params, x):
        gate = jax.nn.sigmoid(dense(params, x, "gate"))
        return dense(params, gate * jnp.tanh(dense(params, x, "a")) + (1 - gate) * x, "out")

    return fn, params, sample(2, 5)


@model()
def classifier_with_log_softmax():
    params = weights(a=(5, 8), a_b=(8,), b=(8, 4), b_b=(4,))

    def fn(params, x):
        return jax.nn.log_softmax(dense(params, jax.nn.mish(dense(params, x, "a")), "b"))

    return fn, params, sample(2, 5)


@model(target=None)
def siamese_cosine():
    params = weights(a=(4, 8), a_b=(8,), b=(8, 6), b_b=(6,))

    def fn(params, x):
        y = dense(params, jax.nn.relu(dense(params, x, "a")), "b")
        unit = y / jnp.linalg.norm(y, axis=-1, keepdims=True)
        return (unit[:, 0] * unit[:, 1]).sum(-1)

    return fn, params, sample(2, 2, 4)


@model()
def deep_set():
    params = weights(a=(3, 6), a_b=(6,), b=(18, 6), b_b=(6,), c=(6, 3))

    def fn(params, x):
        x = jax.nn.relu(dense(params, x, "a"))
        pooled = jnp.concatenate([x.sum(1), x.mean(1), x.max(1)], -1)
        return dense(params, jax.nn.relu(dense(params, pooled, "b")), "c")

    return fn, params, sample(2, 5, 3)


@model("attention")
def attention_pooling():
    params = weights(a=(3, 6), a_b=(6,), score=(6, 1), b=(6, 3))

    def fn(params, x):
        x = jnp.tanh(dense(params, x, "a"))
        return dense(params, (jax.nn.softmax(dense(params, x, "score"), 1) * x).sum(1), "b")

    return fn, params, sample(2, 5, 3)


@model()
def relation_network():
    params = weights(a=(6, 8), a_b=(8,), b=(8, 6), b_b=(6,), c=(6, 3))

    def fn(params, x):
        n = x.shape[1]
        left, right = (jnp.broadcast_to(jnp.expand_dims(x, axis), (2, n, n, 3)) for axis in (1, 2))
        pairs = jnp.concatenate([left, right], -1)
        pairs = jax.nn.relu(dense(params, jax.nn.relu(dense(params, pairs, "a")), "b"))
        return dense(params, pairs.sum((1, 2)), "c")

    return fn, params, sample(2, 4, 3)


@model()
def nerf_encoding():
    params = weights(a=(15, 8), a_b=(8,), b=(8, 4), b_b=(4,))
    frequencies = jnp.array([1.0, 2.0])

    def fn(params, x):
        angles = (x[..., None] * row(frequencies, x[..., None])).reshape(2, 6)
        x = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], -1)
        return jax.nn.sigmoid(dense(params, jax.nn.relu(dense(params, x, "a")), "b"))

    return fn, params, sample(2, 3)


@model()
def vmapped_network():
    params = weights(a=(5, 8), a_b=(8,), b=(8, 4), b_b=(4,))

    def single(params, x):
        return jax.nn.relu(x @ params["a"] + params["a_b"]) @ params["b"] + params["b_b"]

    return jax.vmap(single, (None, 0)), params, sample(2, 5)


@model()
def ensemble():
    members = [weights(seed, a=(5, 6), a_b=(6,), b=(6, 4)) for seed in range(3)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def fn(params, x):
        return jax.vmap(lambda p: dense(p, jax.nn.relu(dense(p, x, "a")), "b"))(params).mean(0)

    return fn, params, sample(2, 5)


@model()
def fourier_layer():
    params = weights(lift=(2, 4), re=(4, 4, 4), im=(4, 4, 4), skip=(4, 4), skip_b=(4,), out=(4, 3))

    def fn(params, x):
        x = dense(params, x, "lift")
        modes = jnp.fft.rfft(x, axis=1)
        modes = jnp.einsum("bki,kio->bko", modes, lax.complex(params["re"], params["im"]))
        x = jax.nn.gelu(jnp.fft.irfft(modes, 6, axis=1) + dense(params, x, "skip"))
        return dense(params, x.mean(1), "out")

    return fn, params, sample(2, 6, 2)


@model(target=None)
def variational_autoencoder():
    params = weights(enc=(6, 8), enc_b=(8,), mean=(8, 3), dev=(8, 3), dev_b=(3,), dec=(3, 8), dec_b=(8,), out=(8, 6))
    noise = sample(2, 3, seed=3)

    def fn(params, x):
        h = jax.nn.relu(dense(params, x, "enc"))
        z = dense(params, h, "mean") + jnp.exp(0.5 * dense(params, h, "dev")) * noise
        return dense(params, jax.nn.relu(dense(params, z, "dec")), "out")

    return fn, params, sample(2, 6)


@model()
def factorisation_machine():
    params = fill({"w": jax.ShapeDtypeStruct((5, 3), jnp.float64), "v": jax.ShapeDtypeStruct((5, 12), jnp.float64)})

    def fn(params, x):
        factors = dense(params, x, "v").reshape(2, 3, 4)
        return dense(params, x, "w") + (factors[..., :2] * factors[..., 2:]).sum(-1)

    return fn, params, sample(2, 5)
