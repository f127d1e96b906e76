"""minGPT's gpt-nano, trained to sort six letters out of three, in plain JAX: the model, its weights, what it computed.

The input is six letters and the sorted letters so far (up to five); the outputs from position 5 on are the sorted ones.
https://github.com/karpathy/minGPT
"""

import base64
import itertools
import json

import jax
import jax.numpy as jnp
import networks
import numpy as np

FOLDER = networks.SHARED / "gpt_nano"
LENGTH, LETTERS, HEADS = 6, 3, 3


def gpt(params, tokens):
    """The logits (time, letters) for integer `tokens` (time,)."""
    return gpt_from_embeddings(params, params["letter"][tokens])


def gpt_from_embeddings(params, x):
    """As `gpt`, of the embedded tokens (time, features) without their positions."""
    x = x + params["position"][: len(x)]
    for block in params["blocks"]:
        x = x + attention(block, layer_norm(block["norm1"], x))[0]
        x = x + feed_forward(block, layer_norm(block["norm2"], x))
    return layer_norm(params["norm"], x) @ params["readout"]


def attention_weights(params, tokens):
    """The attention of every block, each (heads, time, time)."""
    x = params["letter"][tokens] + params["position"][: len(tokens)]
    weights = []
    for block in params["blocks"]:
        mixed, attended = attention(block, layer_norm(block["norm1"], x))
        weights.append(attended)
        x = x + mixed
        x = x + feed_forward(block, layer_norm(block["norm2"], x))
    return weights


def dense(params, x):
    return x @ params["kernel"] + params["bias"].reshape(1, -1)


def layer_norm(params, x):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * params["scale"].reshape(1, -1) + params["bias"].reshape(1, -1)


def attention(params, x):
    """The output of a causal attention of x (time, features), and its weights (heads, time, time)."""
    time = len(x)
    q, k, v = (part.reshape(time, HEADS, -1) for part in jnp.split(dense(params["attend"], x), 3, axis=-1))
    scores = jnp.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1]).item()
    causal = jnp.tril(jnp.ones((1, time, time), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("hts,shd->thd", weights, v).reshape(x.shape)
    return dense(params["project"], mixed), weights


def feed_forward(params, x):
    return dense(params["down"], jax.nn.gelu(dense(params["up"], x), approximate=True))


def load():
    """The parameters of `gpt` in float32."""
    with np.load(FOLDER / "gpt_nano_sort.npz") as file:
        stored = dict(file)

    def layer(name):
        weight, bias = stored[f"{name}.weight"], stored[f"{name}.bias"]
        return {"scale": weight, "bias": bias} if weight.ndim == 1 else {"kernel": weight.T, "bias": bias}

    names = {
        "norm1": "ln_1",
        "attend": "attn.c_attn",
        "project": "attn.c_proj",
        "norm2": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }
    params = {
        "letter": stored["transformer.wte.weight"],
        "position": stored["transformer.wpe.weight"],
        "blocks": [{ours: layer(f"transformer.h.{i}.{theirs}") for ours, theirs in names.items()} for i in range(3)],
        "norm": layer("transformer.ln_f"),
        "readout": stored["lm_head.weight"].T,
    }
    return jax.tree.map(jnp.asarray, params)


def stored_run():
    """A run of the original: integer tokens (3, 11), and its logits (3, 11, letters)."""
    run = json.loads((FOLDER / "gpt-nano-sort-t0-partials.json").read_text())

    def array(entry):
        return np.frombuffer(base64.b64decode(entry["data"]), "<f4").reshape(entry["shape"])

    return array(run["idx"]).astype(np.int32), array(run["lm_head"])


def problems():
    """All 729 inputs with their solutions: tokens (729, 11), the letters to predict (729, 6)."""
    letters = np.array(list(itertools.product(range(LETTERS), repeat=LENGTH)), np.int32)
    ordered = np.sort(letters, axis=1)
    return np.concatenate([letters, ordered[:, :-1]], axis=1), ordered
