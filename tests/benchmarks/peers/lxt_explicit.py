"""LXT's explicit mode: the transformers in its functions, which pass relevance itself from layer to layer.

Stabilisers are its own, without a sign: 1e-6 and 1e-8 are added to what relevance is divided by, in sums, products and
norms, too. They are its difference from ours in float64, 3e-3 after twelve blocks of BERT or ViT; in float32 it loses as
much and more, up to 4e-2, by dividing by activations that it has to multiply with again. What torch does to relevance
between the functions (reshaping, selecting) is right.
"""

import functools
import math

import torch
from lxt.explicit import functional as lf
from lxt.explicit import rules
from torch.nn import functional

from ..networks.transformers import rotary_angles
from . import torch_transformers
from .torch_transformers import FAMILY  # noqa: F401


class Explicit:
    """The networks of networks/transformers.py; `cp`: attention weights and the gate of a feed-forward are held constant."""

    def __init__(self, sizes, params, cp):
        self.sizes, self.params, self.cp = sizes, params, cp
        angles = rotary_angles(sizes.length, sizes.width // sizes.heads)
        self.cosine, self.sine = (torch.tensor(part) for part in angles)

    def dense(self, p, x):
        return lf.linear_epsilon(x, p["weight"], p.get("bias"))

    def layer_norm(self, p, x):
        return lf.layer_norm(x, p["weight"], p["bias"], self.sizes.epsilon)

    def rms_norm(self, p, x):
        return lf.rms_norm_identity(x, p["weight"], self.sizes.epsilon)

    def heads(self, p, x, count):
        return self.dense(p, x).unflatten(-1, (count, -1)).transpose(1, 2)

    def rotate(self, x):
        first, second = x.chunk(2, -1)
        return lf.add2(lf.mul2(x, self.cosine), lf.mul2(torch.cat([lf.mul2(second, -1), first], -1), self.sine))

    def attention(self, p, x):
        heads, key_heads = self.sizes.heads, self.sizes.key_heads or self.sizes.heads
        q, k, v = (self.heads(p[n], x, c) for n, c in (("query", heads), ("key", key_heads), ("value", key_heads)))
        if self.sizes.key_heads:
            q, k = self.rotate(q), self.rotate(k)
            k, v = (part.repeat_interleave(heads // key_heads, 1) for part in (k, v))
        scores = lf.mul2(lf.matmul(q, k.transpose(-1, -2)), 1 / math.sqrt(q.shape[-1]))
        if self.sizes.key_heads:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
        weights = lf.softmax(scores, -1)
        # With one factor constant all goes to the other, as in LXT's own attention of CP-LRP.
        mixed = rules.epsilon_lrp(torch.matmul, 1e-6, weights.detach(), v) if self.cp else lf.matmul(weights, v)
        return self.dense(p["output"], mixed.transpose(1, 2).flatten(2))

    def feed_forward(self, p, x):
        return self.dense(p["down"], rules.identity(functional.gelu, self.dense(p["up"], x)))

    def gated(self, p, x):
        gate = rules.identity(functional.silu, self.dense(p["gate"], x))
        return self.dense(p["down"], lf.mul2(gate.detach() if self.cp else gate, self.dense(p["up"], x)))

    def vit_b16(self, x):
        p = self.params["patch"]
        convolve = functools.partial(functional.conv2d, weight=p["weight"], bias=p["bias"], stride=self.sizes.patch)
        x = rules.epsilon_lrp(convolve, 1e-6, x.movedim(-1, 1))
        x = torch.cat([self.params["class_token"].expand(x.shape[0], 1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = lf.add2(x, self.params["position"].expand_as(x))
        for p in self.params["blocks"]:
            x = lf.add2(x, self.attention(p["attention"], self.layer_norm(p["norm1"], x)))
            x = lf.add2(x, self.feed_forward(p, self.layer_norm(p["norm2"], x)))
        return self.dense(self.params["head"], self.layer_norm(self.params["norm"], x)[:, 0])

    def bert_base(self, x):
        x = self.layer_norm(self.params["norm"], lf.add2(x, self.params["position"].expand_as(x)))
        for p in self.params["blocks"]:
            x = self.layer_norm(p["norm1"], lf.add2(x, self.attention(p["attention"], x)))
            x = self.layer_norm(p["norm2"], lf.add2(x, self.feed_forward(p, x)))
        return self.dense(self.params["head"], rules.identity(torch.tanh, self.dense(self.params["pooler"], x[:, 0])))

    def llama(self, x):
        for p in self.params["blocks"]:
            x = lf.add2(x, self.attention(p["attention"], self.rms_norm(p["norm1"], x)))
            x = lf.add2(x, self.gated(p, self.rms_norm(p["norm2"], x)))
        return self.dense(self.params["head"], self.rms_norm(self.params["norm"], x[:, -1]))


def relevances(problem):
    return {name: functools.partial(_prepare, problem, name == "cp_lrp") for name in ("attn_lrp", "cp_lrp")}


def _prepare(problem, cp):
    network = Explicit(problem.about, torch_transformers.weights(problem), cp)
    x, target = torch.tensor(problem.x, requires_grad=True), torch.tensor(problem.target, dtype=torch.int64)[:, None]

    def run():
        chosen = getattr(network, problem.name)(x).gather(1, target)
        (relevance,) = torch.autograd.grad(chosen, x, chosen.detach())
        return relevance.numpy()

    return run
