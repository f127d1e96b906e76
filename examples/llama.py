"""A Llama in plain JAX: the function, the loader of llama2.c's files, the tokenizer. Used by language_model.py.

RMS norms, rotary positions, grouped-query attention, a gated feed-forward: https://arxiv.org/abs/2307.09288.
The layout of the files is that of https://github.com/karpathy/llama2.c, version 0.
"""

import struct
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BEGIN = 1  # the token in front of every text
BYTES = 3  # the token of byte 0; the 255 others follow


def llama(params, tokens):
    """The logits of every next token, (time, vocabulary), for integer `tokens` (time,)."""
    return llama_from_embeddings(params, params["embedding"][tokens])


def llama_from_embeddings(params, x):
    """As `llama`, of the embedded tokens (time, features)."""
    for block in params["blocks"]:
        x = x + attention(block, rms_norm(block["attention_norm"], x))
        x = x + feed_forward(block, rms_norm(block["feed_forward_norm"], x))
    return rms_norm(params["norm"], x) @ params["embedding"].T


def rms_norm(scale, x):
    """x (time, features) over its root mean square, times a scale per feature."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale.reshape(1, -1)


def attention(params, x):
    """Causal attention of x (time, features); several heads of queries share one of keys and values."""
    time = len(x)
    q = rotate(jnp.einsum("tf,fkgd->tkgd", x, params["query"]))  # k heads of keys with g queries each
    k = rotate(jnp.einsum("tf,fkd->tkd", x, params["key"]))
    v = jnp.einsum("tf,fkd->tkd", x, params["value"])
    scores = jnp.einsum("tkgd,skd->kgts", q, k) / np.sqrt(q.shape[-1]).item()
    causal = jnp.tril(jnp.ones((1, 1, time, time), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("kgts,skd->tkgd", weights, v)
    return jnp.einsum("tkgd,kgdf->tf", mixed, params["out"])


def rotate(x):
    """Turns each pair of features of x (time, ..., features) by an angle that grows with time: relative positions."""
    time, features = x.shape[0], x.shape[-1]
    speed = 10000.0 ** -(np.arange(0, features, 2) / features)
    angle = (np.arange(time)[:, None] * speed).reshape(time, *(1,) * (x.ndim - 2), -1)
    cos, sin = jnp.asarray(np.cos(angle), x.dtype), jnp.asarray(np.sin(angle), x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def feed_forward(params, x):
    """The gated feed-forward of x (time, features)."""
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def load_llama(path):
    """The parameters of `llama` in float32 from a file of llama2.c (version 0: seven integers, then the weights)."""
    with open(path, "rb") as file:
        features, hidden, layers, heads, kv_heads, vocabulary, context = struct.unpack("7i", file.read(28))
        if features % heads or heads % kv_heads or vocabulary == 0:
            raise ValueError(f"{path} is no model of llama2.c, version 0: its header makes no sense.")
        weights = np.fromfile(file, "<f4")
    shared, vocabulary = vocabulary > 0, abs(vocabulary)
    size, group = features // heads, heads // kv_heads
    position = 0

    def take(*shape):
        nonlocal position
        start, position = position, position + int(np.prod(shape))
        return weights[start:position].reshape(shape)

    embedding = take(vocabulary, features)
    stored = {
        "attention_norm": take(layers, features),
        "query": take(layers, kv_heads, group, size, features).transpose(0, 4, 1, 2, 3),
        "key": take(layers, kv_heads, size, features).transpose(0, 3, 1, 2),
        "value": take(layers, kv_heads, size, features).transpose(0, 3, 1, 2),
        "out": take(layers, features, kv_heads, group, size).transpose(0, 2, 3, 4, 1),
        "feed_forward_norm": take(layers, features),
        "gate": take(layers, hidden, features).transpose(0, 2, 1),
        "down": take(layers, features, hidden).transpose(0, 2, 1),
        "up": take(layers, hidden, features).transpose(0, 2, 1),
    }
    norm = take(features)
    take(2, context, size // 2)  # cosines and sines of `rotate`
    if not shared:
        raise ValueError(f"{path} has a readout apart from its embedding, which `llama` has not.")
    if position != len(weights):
        raise ValueError(f"{path} holds {len(weights)} weights where its header announces {position}.")
    blocks = [{name: array[layer] for name, array in stored.items()} for layer in range(layers)]
    return jax.tree.map(jnp.asarray, {"embedding": embedding, "blocks": blocks, "norm": norm})


class Tokenizer(NamedTuple):
    """Byte pairs: the pieces of text by token, and how early each pair was merged, as a score."""

    pieces: list[bytes]
    scores: list[float]

    @classmethod
    def load(cls, path):
        """From a file of llama2.c: the longest length, then score, length and bytes of every piece."""
        data = Path(path).read_bytes()
        pieces, scores, position = [], [], 4
        while position < len(data):
            score, length = struct.unpack_from("<fi", data, position)
            pieces.append(data[position + 8 : position + 8 + length])
            scores.append(score)
            position += 8 + length
        return cls(pieces, scores)

    def encode(self, text):
        """Text to tokens, the first of which is `BEGIN`."""
        known = {piece: token for token, piece in enumerate(self.pieces)}
        tokens = []
        for character in " " + text if text else "":
            encoded = character.encode()
            tokens += [known[encoded]] if encoded in known else [BYTES + byte for byte in encoded]
        while True:
            pairs = [known.get(self.pieces[a] + self.pieces[b]) for a, b in pairwise(tokens)]
            merges = [(self.scores[token], -i) for i, token in enumerate(pairs) if token is not None]
            if not merges:
                return [BEGIN, *tokens]
            i = -max(merges)[1]
            tokens[i : i + 2] = [pairs[i]]

    def decode(self, tokens):
        """Tokens to text, without what marks its beginning."""
        data = b"".join(self._bytes(token) for token in tokens if token != BEGIN)
        return data.decode(errors="replace").removeprefix(" ")

    def words(self, tokens):
        """The text of each token by itself; half a character cannot be decoded and is drawn as a question mark."""
        return ["<s>" if token == BEGIN else self._bytes(token).decode(errors="replace") for token in tokens]

    def _bytes(self, token):
        return bytes([token - BYTES]) if BYTES <= token < BYTES + 256 else self.pieces[token]
