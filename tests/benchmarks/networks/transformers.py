"""ViT-B/16, BERT-base, and a stack of blocks in the shape of Llama.

Kernels are (inputs, outputs). Those of the text networks read the embeddings of tokens.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import relprop as rp

from .base import Problem, dense, normal, targets


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a transformer; `length` counts tokens, for images patches and the class token."""

    layers: int
    width: int
    heads: int
    hidden: int
    length: int
    classes: int
    epsilon: float  # of norms
    key_heads: int = 0
    image: int = 0
    patch: int = 0


SIZES = {  # full and short
    "vit_b16": (
        Sizes(12, 768, 12, 3072, 197, 1000, 1e-12, image=224, patch=16),
        Sizes(1, 32, 4, 64, 5, 10, 1e-12, image=16, patch=8),
    ),
    "bert_base": (Sizes(12, 768, 12, 3072, 128, 2, 1e-12), Sizes(1, 32, 4, 64, 8, 2, 1e-12)),
    # A block is one of TinyLlama-1.1B: 4 heads of keys and values for 32 of queries.
    "llama": (Sizes(4, 2048, 32, 5632, 256, 32000, 1e-5, key_heads=4), Sizes(1, 32, 4, 64, 8, 50, 1e-5, key_heads=2)),
}
BATCH = {"vit_b16": 2, "bert_base": 4, "llama": 1}
ROTARY_BASE = 10000.0


# Parts.


def project(p, x):
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def layer_norm(p, x, epsilon):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + epsilon) * p["scale"] + p["bias"]


def rms_norm(p, x, epsilon):
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon) * p["scale"]


def heads(p, x, count):
    y = project(p, x)
    return y.reshape(*y.shape[:2], count, -1)


def attention(p, x, sizes):
    q, k, v = (heads(p[name], x, sizes.heads) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return project(p["output"], mixed.reshape(x.shape))


def rotary_angles(length, features):
    """The cosine and sine for every position and feature of a head, (length, features); in float32, as Hugging Face."""
    frequency = 1 / np.float32(ROTARY_BASE) ** (np.arange(0, features, 2, dtype=np.float32) / features)
    angle = np.outer(np.arange(length, dtype=np.float32), frequency)
    return [np.concatenate([part, part], 1) for part in (np.cos(angle), np.sin(angle))]


def rotate(x):
    """Rotary positions (Su et al. 2021): feature i turns with feature i + half."""
    cosine, sine = (part[None, :, None] for part in rotary_angles(x.shape[1], x.shape[-1]))
    first, second = jnp.split(x, 2, -1)
    return x * cosine + jnp.concatenate([-second, first], -1) * sine


def grouped_attention(p, x, sizes):
    """Causal; several heads of queries share a head of keys and values."""
    q = rotate(heads(p["query"], x, sizes.heads))
    k, v = rotate(heads(p["key"], x, sizes.key_heads)), heads(p["value"], x, sizes.key_heads)
    q = q.reshape(*q.shape[:2], sizes.key_heads, -1, q.shape[-1])
    scores = jnp.einsum("bqngd,bknd->bngqk", q, k) / math.sqrt(q.shape[-1])
    visible = np.tril(np.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    return project(p["output"], jnp.einsum("bngqk,bknd->bqngd", weights, v).reshape(x.shape))


def feed_forward(p, x):
    return project(p["down"], jax.nn.gelu(project(p["up"], x), approximate=False))


# Networks, to logits (batch, classes).


def vit_b16(sizes, params, x):
    """Dosovitskiy et al. 2021; images (batch, height, width, 3)."""
    p, dims = params["patch"], ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, p["kernel"], (sizes.patch,) * 2, "VALID", dimension_numbers=dims) + p["bias"]
    x = x.reshape(x.shape[0], -1, sizes.width)
    x = jnp.concatenate([jnp.broadcast_to(params["class_token"], (x.shape[0], 1, sizes.width)), x], 1) + params["position"]
    for p in params["blocks"]:
        x = x + attention(p["attention"], layer_norm(p["norm1"], x, sizes.epsilon), sizes)
        x = x + feed_forward(p, layer_norm(p["norm2"], x, sizes.epsilon))
    return project(params["head"], layer_norm(params["norm"], x, sizes.epsilon)[:, 0])


def bert_base(sizes, params, x):
    """Devlin et al. 2019; embeddings (batch, length, width)."""
    x = layer_norm(params["norm"], x + params["position"], sizes.epsilon)
    for p in params["blocks"]:
        x = layer_norm(p["norm1"], x + attention(p["attention"], x, sizes), sizes.epsilon)
        x = layer_norm(p["norm2"], x + feed_forward(p, x), sizes.epsilon)
    return project(params["head"], jnp.tanh(project(params["pooler"], x[:, 0])))


def llama(sizes, params, x):
    """Touvron et al. 2023; embeddings (batch, length, width). Logits of the next token."""
    for p in params["blocks"]:
        x = x + grouped_attention(p["attention"], rms_norm(p["norm1"], x, sizes.epsilon), sizes)
        y = rms_norm(p["norm2"], x, sizes.epsilon)
        x = x + project(p["down"], jax.nn.silu(project(p["gate"], y)) * project(p["up"], y))
    return project(params["head"], rms_norm(params["norm"], x[:, -1:], sizes.epsilon))[:, 0]


# Weights.


def _norm(rng, width, bias=True):
    return {"scale": 1 + normal(rng, width, scale=0.1)} | ({"bias": normal(rng, width, scale=0.1)} if bias else {})


def _block(rng, sizes):
    width, bias = sizes.width, not sizes.key_heads
    keys = width // sizes.heads * (sizes.key_heads or sizes.heads)
    # Queries and keys are drawn large, or every token would attend to every other alike.
    attention = {"query": dense(rng, width, width, 1.5, bias), "key": dense(rng, width, keys, 1.5, bias)}
    attention |= {"value": dense(rng, width, keys, 1.0, bias), "output": dense(rng, width, width, 1.0, bias)}
    layers = {"up": dense(rng, width, sizes.hidden, 1.0, bias), "down": dense(rng, sizes.hidden, width, 1.0, bias)}
    gate = {} if bias else {"gate": dense(rng, width, sizes.hidden, 1.0, bias)}
    return {"attention": attention, "norm1": _norm(rng, width, bias), "norm2": _norm(rng, width, bias)} | layers | gate


def initialize(name, sizes, rng):
    width = sizes.width
    params = {"blocks": [_block(rng, sizes) for _ in range(sizes.layers)]}
    params |= {"norm": _norm(rng, width, name != "llama"), "head": dense(rng, width, sizes.classes, bias=name != "llama")}
    if name == "bert_base":
        params |= {"position": normal(rng, sizes.length, width), "pooler": dense(rng, width, width)}
    if name == "vit_b16":
        kernel = normal(rng, sizes.patch, sizes.patch, 3, width, scale=1 / (3 * sizes.patch**2) ** 0.5)
        params |= {"patch": {"kernel": kernel, "bias": normal(rng, width, scale=0.1)}}
        params |= {"class_token": normal(rng, 1, 1, width), "position": normal(rng, sizes.length, width)}
    return params


PRESETS = {"attn_lrp": rp.presets.attn_lrp, "cp_lrp": rp.presets.cp_lrp}


def build(fn, short=False, batch=None):
    """`short`: one block of width 32."""
    name = fn.__name__
    sizes, rng = SIZES[name][short], np.random.default_rng(0)
    batch = batch or (2 if short else BATCH[name])
    params = initialize(name, sizes, rng)
    shape = (batch, sizes.image, sizes.image, 3) if sizes.image else (batch, sizes.length, sizes.width)
    x, target = normal(rng, *shape), targets(rng, batch, sizes.classes)
    presets = PRESETS | ({"attn_lrp_vit": rp.presets.attn_lrp_vit} if sizes.image else {})
    return Problem(name, "transformer", functools.partial(fn, sizes), params, x, target, presets, sizes)


NETWORKS = {fn.__name__: functools.partial(build, fn) for fn in (vit_b16, bert_base, llama)}
