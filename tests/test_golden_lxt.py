"""Relevances of transformers equal LXT's, the reference implementation of AttnLRP and, with it, of CP-LRP.

LXT's rules are our defaults: the defining equations leave no freedom once its stabilisers are out (`_exact`). What
the stabilisers do to LXT's values, and where they sit, is shown at the end. See golden/README.md for how they were made.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_models
from golden import load

import relprop as rp

ATTN_LRP = None  # half to each factor of a product, norms' statistics frozen, no stabiliser: the defaults
CP_LRP = [("product", rp.SignalTakeAll(hold=("gate", "activated")))]  # attention weights, and silu(gate) of Llama
SHIPPED = {"efficient": 2e-9, "efficient_cp": 2e-9, "explicit": 2e-4, "explicit_cp": 2e-4}  # the size of LXT's stabilisers


def final(network):
    """The logits that are explained: those of the classes, or of the token after the last."""

    def logits(params, x):
        y = network(params, x)
        return y if y.ndim == 2 else y[:, -1]

    return logits


def arguments(name):
    """Parameters, and what LXT explains: the embeddings of the tokens, or pixels."""
    params, x = jax.tree.map(jnp.asarray, (transformer_models.init(name), transformer_models.sample(name)))
    return params, x if name == "vit" else transformer_models.embed(params, x)


def explained(name, rules):
    network = transformer_models.FROM_EMBEDDINGS.get(name, transformer_models.NETWORKS[name])
    target = jnp.asarray(load(f"lxt_{name}")["target"])
    return np.asarray(jax.jit(rp.explain(final(network), rules, target=target))(*arguments(name)))


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def keys(name, cp):
    return [
        k for k in load(f"lxt_{name}").files if k not in ("logits", "target") and ("_cp" in k) == cp and "gamma" not in k
    ]


@pytest.mark.parametrize("name", transformer_models.NETWORKS)
def test_networks_are_those_that_lxt_explained(name):
    logits = jax.jit(transformer_models.NETWORKS[name])(transformer_models.init(name), transformer_models.sample(name))
    np.testing.assert_allclose(logits, load(f"lxt_{name}")["logits"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", transformer_models.NETWORKS)
@pytest.mark.parametrize(("rules", "cp"), [(ATTN_LRP, False), (CP_LRP, True)], ids=["attn_lrp", "cp_lrp"])
def test_relevance_equals_lxt(name, rules, cp):
    """Patched models of Hugging Face and torchvision, and LXT's explicit functions: without stabilisers to rounding."""
    golden, relevance = load(f"lxt_{name}"), explained(name, rules)
    found = {key: distance(relevance, golden[key]) for key in keys(name, cp)}
    limits = {key: 1e-12 if key.endswith("_exact") else SHIPPED[key] for key in found}
    assert {key: d for key, d in found.items() if d > limits[key]} == {}
    assert sum(limit == 1e-12 for limit in limits.values()) == (1 if (name, cp) == ("bert", True) else 2)


def test_attention_weights_carry_much_of_the_relevance():
    """AttnLRP and CP-LRP are far apart on these networks: neither test above would pass with the other's rule."""
    for name in transformer_models.NETWORKS:
        golden = load(f"lxt_{name}")
        assert distance(golden["explicit_cp_exact"], golden["explicit_exact"]) > 0.3


@pytest.mark.parametrize("name", transformer_models.NETWORKS)
def test_presets_equal_lxt_without_stabilisers(name):
    golden = load(f"lxt_{name}")
    assert distance(explained(name, rp.presets.attn_lrp(epsilon=0.0)), golden["explicit_exact"]) < 1e-12
    assert distance(explained(name, rp.presets.cp_lrp(epsilon=0.0)), golden["explicit_cp_exact"]) < 1e-12


def test_cp_lrp_of_llama_holds_the_activated_operand_of_its_feed_forward():
    """LXT detaches silu(gate); with attention weights alone held constant the relevance is another."""
    golden = load("lxt_llama")["efficient_cp_exact"]
    assert distance(explained("llama", [("gate", rp.SignalTakeAll())]), golden) > 0.1
    assert distance(explained("llama", CP_LRP), golden) < 1e-12


@pytest.mark.parametrize("name", transformer_models.FROM_EMBEDDINGS)
def test_relevance_of_tokens_is_that_of_their_embeddings(name):
    golden = load(f"lxt_{name}")
    params, tokens = jax.tree.map(jnp.asarray, (transformer_models.init(name), transformer_models.sample(name)))
    explain = rp.explain(final(transformer_models.NETWORKS[name]), ATTN_LRP, target=jnp.asarray(golden["target"]))
    relevance = np.asarray(jax.jit(explain)(params, tokens))
    assert relevance.shape == tokens.shape
    assert distance(relevance, golden["efficient_exact"].sum(-1)) < 1e-12


# Where LXT's own values differ.


@dataclasses.dataclass(frozen=True)
class UnsignedIdentity(rp.Rule):
    """LXT's identity rule, c f(x) / (x + 1e-10): the stabiliser keeps its sign where x is negative."""

    kinds: ClassVar[tuple[str, ...]] = ("activation",)

    def __call__(self, layer, x, z):
        return rp.scale_tangent(x, z / (x + 1e-10))


@pytest.mark.parametrize("name", transformer_models.NETWORKS)
def test_stabiliser_of_the_efficient_identity_rule(name):
    """All that parts LXT's patched models from the exact relevance is the 1e-10 in their identity rule."""
    golden = load(f"lxt_{name}")
    unmasked = rp.kind("activation") & ~rp.primitive("select_n")  # the causal mask has no stabiliser
    assert distance(explained(name, [(unmasked, UnsignedIdentity())]), golden["efficient"]) < 1e-13
    assert distance(golden["efficient"], golden["efficient_exact"]) > 1e-10


@pytest.mark.parametrize("name", transformer_models.NETWORKS)
def test_stabilisers_of_the_explicit_functions_cost_relevance(name):
    """1e-6 in each linear layer and layer norm, 1e-8 at sums and products: its implementations part at 1e-5 to 1e-4."""
    golden = load(f"lxt_{name}")
    assert distance(golden["explicit_exact"], golden["efficient_exact"]) < 1e-13
    assert 1e-5 < distance(golden["explicit"], golden["efficient"]) < 1e-4


def test_gamma_in_a_vit_sees_the_gain_and_bias_of_the_norm_before_it(monkeypatch):
    """zennit's Gamma inside LXT starts from the output of the layer norm.

    Here gain and bias are part of the dense layers that they feed, as a batch norm's are, and Gamma weighs contributions of
    what the norm has standardised. Where the norm is a program of its own (`checkpoint`) they stay with it, and we agree.
    """
    golden = load("lxt_vit")["efficient_cp_gamma_exact"]
    feed_forward = rp.path("block*/up") | rp.path("block*/down") | rp.path("head")
    rules = [("conv", rp.Gamma(0.25, epsilon=0.0)), (feed_forward, rp.Gamma(0.05, epsilon=0.0)), *CP_LRP]
    merged = explained("vit", rules)
    monkeypatch.setattr(transformer_models, "layer_norm", jax.checkpoint(transformer_models.layer_norm, static_argnums=2))
    assert distance(explained("vit", rules), golden) < 2e-9  # relevance / (input + 1e-10 sign) in LXT's patch of zennit
    assert distance(merged, golden) > 1e-3
