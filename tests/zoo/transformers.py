"""Transformers: encoders of every library, and each common way to write attention."""

import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from .base import conv, dense, from_equinox, from_nnx, layer_norm, linen, model, rms_norm, row, sample, tokens, weights

OPTIONS = {"param_dtype": jnp.float64}


class Encoder(nn.Module):
    causal: bool = False

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        y = nn.LayerNorm(**OPTIONS)(x)
        x = x + nn.MultiHeadDotProductAttention(2, deterministic=True, **OPTIONS)(y, mask=mask)
        y = nn.Dense(8, **OPTIONS)(nn.LayerNorm(**OPTIONS)(x))
        x = x + nn.Dense(4, **OPTIONS)(nn.gelu(y))
        return nn.Dense(3, **OPTIONS)(x[:, -1] if self.causal else x.mean(1))


@model("attention", library="linen")
def encoder_linen():
    return linen(Encoder(), sample(2, 5, 4))


@model("attention", library="linen")
def causal_decoder_linen():
    return linen(Encoder(causal=True), sample(2, 5, 4))


@model("attention", "float32", library="nnx")
def encoder_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            options = {"rngs": rngs, **OPTIONS}
            self.norm, self.out = nnx.LayerNorm(4, **options), nnx.Linear(4, 3, **options)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, deterministic=True, keep_rngs=False, **options)

        def __call__(self, x):
            return self.out((x + self.attention(self.norm(x))).mean(1))

    return from_nnx(Net, sample(2, 5, 4))


@model("attention", library="equinox")
def encoder_equinox():
    def make(key):
        options = {"use_output_bias": True, "use_value_bias": True, "key": key}
        return eqx.nn.LayerNorm(4), eqx.nn.MultiheadAttention(2, 4, **options), eqx.nn.Linear(4, 3, key=key)

    def call(layers, x):
        norm, attention, out = layers

        def single(x):
            y = jax.vmap(norm)(x)
            return out((x + attention(y, y, y)).mean(0))

        return jax.vmap(single)(x)

    return from_equinox(make, sample(2, 5, 4), call=call)


# In plain JAX every transformer is one block around a different attention(params, x) of width 4.

BLOCK = {
    "q": (4, 4),
    "k": (4, 4),
    "v": (4, 4),
    "o": (4, 4),
    "n1": (4,),
    "n2": (4,),
    "up": (4, 8),
    "up_b": (8,),
    "down": (8, 4),
}


def block(attend, params, x):
    """A pre-norm block; `attend` maps the parameters and a normalised sequence to one of the same width."""
    x = x + dense(params, attend(params, layer_norm(params, x, "n1")), "o")
    return x + dense(params, jax.nn.gelu(dense(params, layer_norm(params, x, "n2"), "up")), "down")


def classifier(attend, **more):
    """`(fn, params, x)`: one block, the mean over the sequence, a dense layer."""

    def fn(params, x):
        return dense(params, block(attend, params, x).mean(1), "out")

    return fn, weights(**{**BLOCK, **more}, out=(4, 3)), sample(2, 5, 4)


def heads(params, x, name, width=2):
    """Queries, keys or values as (batch, sequence, heads, width)."""
    y = dense(params, x, name)
    return y.reshape(*y.shape[:-1], -1, width)


def merge(x):
    return x.reshape(*x.shape[:-2], -1)


def scores(q, k):
    return jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])


def mix(weights, v):
    return merge(jnp.einsum("bhqk,bkhd->bqhd", weights, v))


@model("attention")
def encoder_by_hand():
    def attend(params, x):
        q, k, v = (heads(params, x, name) for name in "qkv")
        return mix(jax.nn.softmax(scores(q, k)), v)

    return classifier(attend)


@model("attention")
def hand_written_softmax():
    def attend(params, x):
        q, k, v = (heads(params, x, name) for name in "qkv")
        s = scores(q, k)
        e = jnp.exp(s - s.max(-1, keepdims=True))
        return mix(e / e.sum(-1, keepdims=True), v)

    return classifier(attend)


@model("attention")
def causal_decoder():
    def attend(params, x):
        q, k, v = (heads(params, x, name) for name in "qkv")
        past = jnp.tril(jnp.ones((5, 5), bool)).reshape(1, 1, 5, 5)
        return mix(jax.nn.softmax(jnp.where(past, scores(q, k), -jnp.inf)), v)

    return classifier(attend)


def library_attention(key_heads=2, **options):
    """`jax.nn.dot_product_attention` with two heads of queries."""

    def attend(params, x):
        given = {name: value(params) if callable(value) else value for name, value in options.items()}
        q, k, v = (heads(params, x, name) for name in "qkv")
        return merge(jax.nn.dot_product_attention(q, k, v, **given))

    return attend, {"k": (4, 2 * key_heads), "v": (4, 2 * key_heads)}


@model("attention", "float32")
def attention_with_bias():
    attend, shapes = library_attention(bias=lambda params: params["position"])
    return classifier(attend, **shapes, position=(1, 2, 5, 5))


@model("attention", "float32")
def attention_with_mask():
    mask = np.arange(5)[None] < np.array([[5], [3]])
    attend, shapes = library_attention(mask=jnp.asarray(mask[:, None, None]))
    return classifier(attend, **shapes)


@model("attention", "float32")
def attention_is_causal():
    attend, shapes = library_attention(is_causal=True)
    return classifier(attend, **shapes)


@model("attention", "float32")
def grouped_query_attention():
    def attend(params, x):
        q, k, v = heads(params, x, "q", 1), heads(params, x, "k", 1), heads(params, x, "v", 1)
        return merge(jax.nn.dot_product_attention(q, k, v))

    return classifier(attend, k=(4, 2), v=(4, 2))


@model("attention", "float32")
def multi_query_attention():
    attend, shapes = library_attention(key_heads=1, is_causal=True)
    return classifier(attend, **shapes)


@model("attention")
def alibi():
    def attend(params, x):
        q, k, v = (heads(params, x, name) for name in "qkv")
        distance = jnp.abs(jnp.arange(5)[:, None] - jnp.arange(5)[None]).astype(x.dtype)
        slopes = jnp.array([0.5, 0.25]).reshape(1, 2, 1, 1)
        return mix(jax.nn.softmax(scores(q, k) - slopes * distance.reshape(1, 1, 5, 5)), v)

    return classifier(attend)


@model("attention")
def rotary_positions():
    def rotate(x):
        angle = jnp.arange(5.0).reshape(1, 5, 1, 1)
        a, b = x[..., :1], x[..., 1:]
        return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)

    def attend(params, x):
        q, k, v = (heads(params, x, name) for name in "qkv")
        return mix(jax.nn.softmax(scores(rotate(q), rotate(k))), v)

    return classifier(attend)


@model("attention")
def relative_position_bias():
    """A learned bias per head and distance, without scaling, and RMS norm. T5: Raffel et al. 2020."""

    def attend(params, x):
        q, k, v = (heads(params, rms_norm(x), name) for name in "qkv")
        offset = jnp.arange(5)[None] - jnp.arange(5)[:, None]
        bias = params["position"][jnp.clip(offset, -2, 2) + 2]
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) + jnp.transpose(bias, (2, 0, 1))[None]
        return mix(jax.nn.softmax(s), v)

    return classifier(attend, position=(5, 2))


@model("attention")
def query_key_norm():
    def attend(params, x):
        q, k, v = (heads(params, x, name) for name in "qkv")
        return mix(jax.nn.softmax(scores(rms_norm(q), rms_norm(k)) * 2.0), v)

    return classifier(attend)


@model("attention")
def heads_by_vmap():
    def head(wq, wk, wv, x):
        return jax.nn.softmax(x @ wq @ (x @ wk).T / math.sqrt(2)) @ (x @ wv)

    def attend(params, x):
        split = (params[name].reshape(4, 2, 2) for name in "qkv")
        over_heads = jax.vmap(head, (1, 1, 1, None), 1)
        return merge(jax.vmap(over_heads, (None, None, None, 0))(*split, x))

    return classifier(attend)


@model("attention")
def cross_attention():
    """Learned queries read the sequence."""
    params = weights(latent=(3, 4), k=(3, 4), v=(3, 4), o=(4, 4), up=(4, 8), up_b=(8,), out=(24, 3))

    def fn(params, x):
        q = jnp.broadcast_to(params["latent"][None], (2, 3, 4)).reshape(2, 3, 2, 2)
        k, v = heads(params, x, "k"), heads(params, x, "v")
        x = dense(params, mix(jax.nn.softmax(scores(q, k)), v), "o")
        return dense(params, jax.nn.relu(dense(params, x, "up")).reshape(2, -1), "out")

    return fn, params, sample(2, 5, 3)


@model("attention")
def kernel_attention():
    """Linear attention with the feature map elu + 1. Katharopoulos et al. 2020."""

    def attend(params, x):
        q, k, v = (heads(params, x, name) for name in "qkv")
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        top = jnp.einsum("bqhd,bhde->bqhe", q, jnp.einsum("bkhd,bkhe->bhde", k, v))
        return merge(top / jnp.einsum("bqhd,bhd->bqh", q, k.sum(1))[..., None])

    return classifier(attend)


@model("attention", "float32")
def llama_block():
    """RMS norms and a gated feed-forward layer, as in Llama."""
    params = weights(**BLOCK, gate=(4, 8), out=(4, 3))

    def fn(params, x):
        q, k, v = (heads(params, rms_norm(x) * row(params["n1"], x), name) for name in "qkv")
        x = x + dense(params, merge(jax.nn.dot_product_attention(q, k, v, is_causal=True)), "o")
        y = rms_norm(x) * row(params["n2"], x)
        x = x + dense(params, jax.nn.silu(dense(params, y, "gate")) * dense(params, y, "up"), "down")
        return dense(params, rms_norm(x)[:, -1], "out")

    return fn, params, sample(2, 5, 4)


@model("attention", "float32", "bfloat16")
def transformer_bfloat16():
    fn, params, x = llama_block()
    return fn, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), x.astype(jnp.bfloat16)


@model("attention")
def scan_over_layers():
    """Two blocks with stacked parameters, rematerialised."""
    layers = [weights(seed, **BLOCK) for seed in range(2)]
    params = {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), **weights(2, out=(4, 3))}

    def attend(params, x):
        q, k, v = (heads(params, x, name) for name in "qkv")
        return mix(jax.nn.softmax(scores(q, k)), v)

    def fn(params, x):
        step = jax.checkpoint(lambda x, layer: (block(attend, layer, x), None))
        x, _ = lax.scan(step, x, params["layers"])
        return dense(params, x.mean(1), "out")

    return fn, params, sample(2, 5, 4)


@model("attention")
def vision_transformer():
    params = weights(**BLOCK, patch=(2, 2, 2, 4), patch_b=(4,), token=(1, 4), position=(1, 5, 4), out=(4, 3))

    def attend(params, x):
        q, k, v = (heads(params, x, name) for name in "qkv")
        return mix(jax.nn.softmax(scores(q, k)), v)

    def fn(params, x):
        patches = conv(params, x, "patch", 2, "VALID").reshape(2, 4, 4)
        token = jnp.broadcast_to(params["token"][None], (2, 1, 4))
        x = block(attend, params, jnp.concatenate([token, patches], 1) + params["position"])
        return dense(params, x[:, 0], "out")

    return fn, params, sample(2, 4, 4, 2)


def token_classifier(embed):
    params = weights(**BLOCK, table=(7, 4), position=(1, 5, 4), out=(4, 3))

    def attend(params, x):
        q, k, v = (heads(params, x, name) for name in "qkv")
        return mix(jax.nn.softmax(scores(q, k)), v)

    def fn(params, x):
        return dense(params, block(attend, params, embed(params, x) + params["position"]).mean(1), "out")

    return fn, params, tokens(2, 5, below=7)


@model("attention", "tokens")
def token_classifier_gather():
    return token_classifier(lambda params, ids: params["table"][ids])


@model("attention", "tokens")
def token_classifier_one_hot():
    return token_classifier(lambda params, ids: jax.nn.one_hot(ids, 7, dtype=jnp.float64) @ params["table"])


@model("attention", "tokens", library="linen")
def token_classifier_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return Encoder()(nn.Embed(7, 4, **OPTIONS)(ids))

    return linen(Net(), tokens(2, 5, below=7))
