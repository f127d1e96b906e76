"""Small transformers in plain jax.numpy, with their parameters and inputs: BERT, GPT-2, Llama and ViT in shape.

Two layers, width 16, 4 heads. `init(name)` and `sample(name)` give parameters and input (tokens, pixels) of
`NETWORKS[name]`, a function `network(params, tokens)` to logits; `FROM_EMBEDDINGS[name]` is its part after the
embedding of the tokens, `network(params, embed(params, tokens))`. Gains are not 1 and biases not 0. Everything random
is drawn by numpy in float64, so that `golden/make_lxt.py` can rebuild the same networks in torch.

| network | as in | attention | feed-forward | norm | head |
|---|---|---|---|---|---|
| `bert` | Devlin et al. 2019 | full | gelu | layer, after the residual | tanh pooler on the first token, classes |
| `gpt2` | Radford et al. 2019 | causal | gelu by tanh | layer, before | next token, weights of the embedding |
| `llama` | Touvron et al. 2023 | causal, rotary, 2 heads of keys | silu-gated | RMS, before | next token |
| `vit` | Dosovitskiy et al. 2021 | full | gelu | layer, before | classes, on the class token |
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax, nn

LAYERS, WIDTH, HEADS, KEY_HEADS, HIDDEN = 2, 16, 4, 2, 32
HEAD = WIDTH // HEADS
VOCABULARY, POSITIONS, TYPES, CLASSES = 20, 8, 2, 5
BATCH, LENGTH = 2, 6
IMAGE, PATCH, CHANNELS = 8, 4, 3
NORM_EPSILON = {"bert": 1e-12, "gpt2": 1e-5, "llama": 1e-6, "vit": 1e-6}
ROTARY_BASE = 10000.0


# Building blocks.


def dense(params, x):
    return x @ params["kernel"] + params["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def linear(params, x):
    return x @ params["kernel"]


def layer_norm(params, x, epsilon):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (x - mean) / jnp.sqrt(variance + epsilon) * params["scale"].reshape(shape) + params["bias"].reshape(shape)


def rms_norm(params, x, epsilon):
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    return x * params["scale"].reshape((1,) * (x.ndim - 1) + (-1,))


def split_heads(x, heads):
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def causal_mask(length):
    return jnp.tril(jnp.ones((1, 1, length, length), bool))


def attend(q, k, v, mask=None):
    """Softmax attention; q, k and v are (batch, length, heads, features)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores, axis=-1), v)
    return mixed.reshape(*mixed.shape[:2], -1)


def attention(params, x, mask=None):
    q, k, v = (split_heads(dense(params[name], x), HEADS) for name in ("query", "key", "value"))
    return dense(params["output"], attend(q, k, v, mask))


def rotary_angles(length):
    """The cosine and sine of every position and feature of a head, (length, features)."""
    frequency = ROTARY_BASE ** (-np.arange(0, HEAD, 2) / HEAD)
    angle = np.outer(np.arange(length), np.concatenate([frequency, frequency]))
    return np.cos(angle), np.sin(angle)


def rotate(x):
    """Rotary positions (Su et al. 2021): feature i turns with feature i + half."""
    cosine, sine = (jnp.asarray(part, x.dtype)[None, :, None, :] for part in rotary_angles(x.shape[1]))
    first, second = jnp.split(x, 2, axis=-1)
    return x * cosine + jnp.concatenate([-second, first], axis=-1) * sine


def grouped_attention(params, x):
    """Causal rotary attention in which `HEADS // KEY_HEADS` heads of queries share a head of keys and values."""
    q = rotate(split_heads(linear(params["query"], x), HEADS))
    k = rotate(split_heads(linear(params["key"], x), KEY_HEADS))
    v = split_heads(linear(params["value"], x), KEY_HEADS)
    q = q.reshape(*q.shape[:2], KEY_HEADS, HEADS // KEY_HEADS, HEAD)
    scores = jnp.einsum("bqngd,bknd->bngqk", q, k) / math.sqrt(HEAD)
    scores = jnp.where(causal_mask(x.shape[1])[:, :, None], scores, -jnp.inf)
    mixed = jnp.einsum("bngqk,bknd->bqngd", nn.softmax(scores, axis=-1), v)
    return linear(params["output"], mixed.reshape(*mixed.shape[:2], -1))


def embed(params, tokens):
    """The vector of every token; positions and types are added later."""
    return params["embed"]["word"][tokens]


def blocks(params):
    return [params[f"block{index}"] for index in range(LAYERS)]


# Networks, from the embeddings of the tokens.


def bert_from_embeddings(params, x):
    """Logits of classes, (batch, classes). Every token is of type 0 in the first half, of type 1 in the second."""
    epsilon, table = NORM_EPSILON["bert"], params["embed"]
    length = x.shape[1]
    x = x + table["position"][None, :length] + table["type"][jnp.arange(length) * 2 // length][None]
    x = layer_norm(table["norm"], x, epsilon)
    for p in blocks(params):
        x = layer_norm(p["norm1"], x + attention(p["attention"], x), epsilon)
        y = nn.gelu(dense(p["up"], x), approximate=False)
        x = layer_norm(p["norm2"], x + dense(p["down"], y), epsilon)
    return dense(params["classifier"], jnp.tanh(dense(params["pooler"], x[:, 0])))


def gpt2_from_embeddings(params, x):
    """Logits of the next token at every position, (batch, length, vocabulary)."""
    epsilon = NORM_EPSILON["gpt2"]
    x = x + params["embed"]["position"][None, : x.shape[1]]
    mask = causal_mask(x.shape[1])
    for p in blocks(params):
        x = x + attention(p["attention"], layer_norm(p["norm1"], x, epsilon), mask)
        y = nn.gelu(dense(p["up"], layer_norm(p["norm2"], x, epsilon)), approximate=True)
        x = x + dense(p["down"], y)
    return layer_norm(params["norm"], x, epsilon) @ params["embed"]["word"].T


def llama_from_embeddings(params, x):
    """Logits of the next token at every position, (batch, length, vocabulary)."""
    epsilon = NORM_EPSILON["llama"]
    for p in blocks(params):
        x = x + grouped_attention(p["attention"], rms_norm(p["norm1"], x, epsilon))
        y = rms_norm(p["norm2"], x, epsilon)
        x = x + linear(p["down"], nn.silu(linear(p["gate"], y)) * linear(p["up"], y))
    return linear(params["head"], rms_norm(params["norm"], x, epsilon))


# Networks, whole.


def bert(params, tokens):
    return bert_from_embeddings(params, embed(params, tokens))


def gpt2(params, tokens):
    return gpt2_from_embeddings(params, embed(params, tokens))


def llama(params, tokens):
    return llama_from_embeddings(params, embed(params, tokens))


def vit(params, images):
    """Logits of classes, (batch, classes), of images (batch, height, width, channels)."""
    epsilon = NORM_EPSILON["vit"]
    kernel = params["patch"]["kernel"]
    x = lax.conv_general_dilated(images, kernel, kernel.shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = x.reshape(x.shape[0], -1, WIDTH) + params["patch"]["bias"][None, None]
    x = jnp.concatenate([jnp.broadcast_to(params["class_token"], (x.shape[0], 1, WIDTH)), x], axis=1)
    x = x + params["position"]
    for p in blocks(params):
        x = x + attention(p["attention"], layer_norm(p["norm1"], x, epsilon))
        y = nn.gelu(dense(p["up"], layer_norm(p["norm2"], x, epsilon)), approximate=False)
        x = x + dense(p["down"], y)
    return dense(params["head"], layer_norm(params["norm"], x, epsilon)[:, 0])


FROM_EMBEDDINGS = {"bert": bert_from_embeddings, "gpt2": gpt2_from_embeddings, "llama": llama_from_embeddings}
NETWORKS = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit}


# Parameters and inputs.


class _Draw:
    """Draws parameters one after another: kernels scaled by fan-in, gains around 1, biases around 0."""

    def __init__(self, rng):
        self.rng = rng

    def linear(self, inputs, outputs, gain=1.0):
        return {"kernel": self.rng.normal(size=(inputs, outputs)) * gain / math.sqrt(inputs)}

    def dense(self, inputs, outputs, gain=1.0):
        return self.linear(inputs, outputs, gain) | {"bias": 0.2 * self.rng.normal(size=outputs)}

    def rms_norm(self):
        return {"scale": 1 + 0.3 * self.rng.normal(size=WIDTH)}

    def layer_norm(self):
        return self.rms_norm() | {"bias": 0.2 * self.rng.normal(size=WIDTH)}

    def table(self, rows):
        return self.rng.normal(size=(rows, WIDTH))

    def block(self):
        # Queries and keys are drawn large, or every token would attend to every other alike.
        attention = {name: self.dense(WIDTH, WIDTH, gain=1.5) for name in ("query", "key")}
        attention |= {name: self.dense(WIDTH, WIDTH) for name in ("value", "output")}
        feed_forward = {"up": self.dense(WIDTH, HIDDEN), "down": self.dense(HIDDEN, WIDTH)}
        return {"attention": attention, "norm1": self.layer_norm(), "norm2": self.layer_norm(), **feed_forward}

    def llama_block(self):
        widths = {"query": HEADS * HEAD, "key": KEY_HEADS * HEAD, "value": KEY_HEADS * HEAD}
        attention = {name: self.linear(WIDTH, width, gain=1.5) for name, width in widths.items()}
        attention["output"] = self.linear(HEADS * HEAD, WIDTH)
        feed_forward = {"gate": self.linear(WIDTH, HIDDEN, gain=1.5), "up": self.linear(WIDTH, HIDDEN)}
        feed_forward["down"] = self.linear(HIDDEN, WIDTH)
        return {"attention": attention, "norm1": self.rms_norm(), "norm2": self.rms_norm(), **feed_forward}


def _rng(name, purpose):
    return np.random.default_rng([list(NETWORKS).index(name), purpose])


def init(name):
    """Parameters of `NETWORKS[name]` in float64."""
    draw = _Draw(_rng(name, 0))
    block = draw.llama_block if name == "llama" else draw.block
    params = {f"block{index}": block() for index in range(LAYERS)}
    if name == "vit":
        kernel = draw.linear(PATCH * PATCH * CHANNELS, WIDTH)["kernel"]
        params["patch"] = {
            "kernel": kernel.reshape(PATCH, PATCH, CHANNELS, WIDTH),
            "bias": 0.2 * draw.rng.normal(size=WIDTH),
        }
        params["class_token"] = draw.table(1)[None]
        params["position"] = draw.table((IMAGE // PATCH) ** 2 + 1)[None]
        return params | {"norm": draw.layer_norm(), "head": draw.dense(WIDTH, CLASSES)}
    params["embed"] = {"word": draw.table(VOCABULARY)}
    if name == "llama":
        return params | {"norm": draw.rms_norm(), "head": draw.linear(WIDTH, VOCABULARY)}
    params["embed"]["position"] = draw.table(POSITIONS)
    if name == "gpt2":
        return params | {"norm": draw.layer_norm()}
    params["embed"] |= {"type": draw.table(TYPES), "norm": draw.layer_norm()}
    return params | {"pooler": draw.dense(WIDTH, WIDTH), "classifier": draw.dense(WIDTH, CLASSES)}


def sample(name):
    """An input batch of `NETWORKS[name]`: tokens (batch, length), or images (batch, height, width, channels)."""
    rng = _rng(name, 1)
    if name == "vit":
        return rng.uniform(-1, 1, size=(BATCH, IMAGE, IMAGE, CHANNELS))
    return rng.integers(0, VOCABULARY, size=(BATCH, LENGTH))
