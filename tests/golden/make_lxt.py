"""Relevances by LXT, the reference implementation of AttnLRP: writes lxt_<network>.npz beside this file.

    python make_lxt.py [network ...]

Every network of tests/transformer_models.py is rebuilt in torch from the same parameters, its logits are compared with those
of the JAX network, and LXT explains the logit of the target per element of the token embeddings, or per pixel. Its
relevance is its value. All in float64. LXT has two implementations, and both are here:

- efficient: Hugging Face's and torchvision's models, patched by LXT; relevance is input times modified gradient.
  A patch changes its classes for good, so that every model is explained in a process of its own.
- explicit: the networks written in LXT's functions, which pass relevance itself from layer to layer.

What is stored is in README.md.
"""

import concurrent.futures
import functools
import importlib.util
import math
import multiprocessing
import pathlib
import sys

import jax
import numpy as np
import torch
from lxt.efficient import monkey_patch, monkey_patch_zennit, patches
from lxt.efficient import rules as implicit
from lxt.efficient.models import gpt2 as lxt_gpt2
from lxt.efficient.models import llama as lxt_llama
from lxt.explicit import functional as lf
from lxt.explicit import rules
from torch.nn import functional
from torchvision.models import vision_transformer
from transformers.models.bert import modeling_bert
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.vit import modeling_vit
from zennit import composites
from zennit import rules as zennit_rules

HERE = pathlib.Path(__file__).resolve().parent


def networks():
    """tests/transformer_models.py, by its path."""
    spec = importlib.util.spec_from_file_location("tested_transformers", HERE.parent / "transformer_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tested = networks()


# Parameters under the names of Hugging Face and torchvision.


def tensor(array):
    return torch.tensor(np.ascontiguousarray(array), dtype=torch.float64)


def linear(name, params):
    found = {f"{name}.weight": params["kernel"].T}
    return found | ({f"{name}.bias": params["bias"]} if "bias" in params else {})


def conv1d(name, *params):
    """GPT-2's dense layer: its kernel is stored as ours; several may lie side by side."""
    return {
        f"{name}.weight": np.concatenate([p["kernel"] for p in params], 1),
        f"{name}.bias": np.concatenate([p["bias"] for p in params]),
    }


def norm(name, params):
    return {f"{name}.weight": params["scale"]} | ({f"{name}.bias": params["bias"]} if "bias" in params else {})


def patch_embedding(name, params):
    return {f"{name}.weight": np.transpose(params["kernel"], (3, 2, 0, 1)), f"{name}.bias": params["bias"]}


def load(model, weights, tied=()):
    missing, unexpected = model.double().eval().load_state_dict({k: tensor(v) for k, v in weights.items()}, strict=False)
    assert set(missing) == set(tied), missing
    assert not unexpected, unexpected
    return model


def numbered(params):
    return enumerate(tested.blocks(params))


# Models of Hugging Face and torchvision, and how LXT patches them.

ATTENTION = {"attn_implementation": "sdpa"}  # the eager one of Llama computes its softmax in float32
SIZES = {
    "hidden_size": tested.WIDTH,
    "num_hidden_layers": tested.LAYERS,
    "num_attention_heads": tested.HEADS,
    "intermediate_size": tested.HIDDEN,
}


def bert(params):
    config = modeling_bert.BertConfig(
        **(SIZES | ATTENTION),
        vocab_size=tested.VOCABULARY,
        max_position_embeddings=tested.POSITIONS,
        type_vocab_size=tested.TYPES,
        num_labels=tested.CLASSES,
        layer_norm_eps=tested.NORM_EPSILON["bert"],
    )
    table = params["embed"]
    names = {"word": "word_embeddings", "position": "position_embeddings", "type": "token_type_embeddings"}
    weights = {f"bert.embeddings.{there}.weight": table[here] for here, there in names.items()}
    weights |= norm("bert.embeddings.LayerNorm", table["norm"])
    for index, p in numbered(params):
        layer = f"bert.encoder.layer.{index}"
        for name in ("query", "key", "value"):
            weights |= linear(f"{layer}.attention.self.{name}", p["attention"][name])
        weights |= linear(f"{layer}.attention.output.dense", p["attention"]["output"])
        weights |= norm(f"{layer}.attention.output.LayerNorm", p["norm1"])
        weights |= linear(f"{layer}.intermediate.dense", p["up"]) | linear(f"{layer}.output.dense", p["down"])
        weights |= norm(f"{layer}.output.LayerNorm", p["norm2"])
    weights |= linear("bert.pooler.dense", params["pooler"]) | linear("classifier", params["classifier"])
    model = load(modeling_bert.BertForSequenceClassification(config), weights)
    length = tested.LENGTH
    types = (torch.arange(length) * 2 // length).expand(tested.BATCH, length)
    return lambda x: model(inputs_embeds=x, token_type_ids=types).logits


def gpt2(params):
    config = modeling_gpt2.GPT2Config(
        **ATTENTION,
        n_embd=tested.WIDTH,
        n_layer=tested.LAYERS,
        n_head=tested.HEADS,
        n_inner=tested.HIDDEN,
        vocab_size=tested.VOCABULARY,
        n_positions=tested.POSITIONS,
        layer_norm_epsilon=tested.NORM_EPSILON["gpt2"],
        bos_token_id=0,
        eos_token_id=0,
    )
    weights = {"transformer.wte.weight": params["embed"]["word"], "transformer.wpe.weight": params["embed"]["position"]}
    for index, p in numbered(params):
        layer = f"transformer.h.{index}"
        weights |= conv1d(f"{layer}.attn.c_attn", *(p["attention"][name] for name in ("query", "key", "value")))
        weights |= conv1d(f"{layer}.attn.c_proj", p["attention"]["output"])
        weights |= norm(f"{layer}.ln_1", p["norm1"]) | norm(f"{layer}.ln_2", p["norm2"])
        weights |= conv1d(f"{layer}.mlp.c_fc", p["up"]) | conv1d(f"{layer}.mlp.c_proj", p["down"])
    weights |= norm("transformer.ln_f", params["norm"])
    model = load(modeling_gpt2.GPT2LMHeadModel(config), weights, tied=["lm_head.weight"])
    return lambda x: model(inputs_embeds=x, use_cache=False).logits


class Rotary(torch.nn.Module):
    """Hugging Face computes angles in float32."""

    def forward(self, x, position_ids):
        return tuple(tensor(part)[None] for part in tested.rotary_angles(x.shape[1]))


def llama(params):
    config = modeling_llama.LlamaConfig(
        **(SIZES | ATTENTION),
        num_key_value_heads=tested.KEY_HEADS,
        vocab_size=tested.VOCABULARY,
        max_position_embeddings=tested.POSITIONS,
        rms_norm_eps=tested.NORM_EPSILON["llama"],
        rope_theta=tested.ROTARY_BASE,
    )
    weights = {"model.embed_tokens.weight": params["embed"]["word"]}
    for index, p in numbered(params):
        layer = f"model.layers.{index}"
        for here, there in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
            weights |= linear(f"{layer}.self_attn.{there}_proj", p["attention"][here])
        for name in ("gate", "up", "down"):
            weights |= linear(f"{layer}.mlp.{name}_proj", p[name])
        weights |= norm(f"{layer}.input_layernorm", p["norm1"]) | norm(f"{layer}.post_attention_layernorm", p["norm2"])
    weights |= norm("model.norm", params["norm"]) | linear("lm_head", params["head"])
    model = load(modeling_llama.LlamaForCausalLM(config), weights)
    model.model.rotary_emb = Rotary()
    return lambda x: model(inputs_embeds=x, use_cache=False).logits


def vit(params):
    config = modeling_vit.ViTConfig(
        **(SIZES | ATTENTION),
        image_size=tested.IMAGE,
        patch_size=tested.PATCH,
        num_labels=tested.CLASSES,
        layer_norm_eps=tested.NORM_EPSILON["vit"],
    )
    weights = {"vit.embeddings.cls_token": params["class_token"], "vit.embeddings.position_embeddings": params["position"]}
    weights |= patch_embedding("vit.embeddings.patch_embeddings.projection", params["patch"])
    for index, p in numbered(params):
        layer = f"vit.encoder.layer.{index}"
        for name in ("query", "key", "value"):
            weights |= linear(f"{layer}.attention.attention.{name}", p["attention"][name])
        weights |= linear(f"{layer}.attention.output.dense", p["attention"]["output"])
        weights |= norm(f"{layer}.layernorm_before", p["norm1"]) | norm(f"{layer}.layernorm_after", p["norm2"])
        weights |= linear(f"{layer}.intermediate.dense", p["up"]) | linear(f"{layer}.output.dense", p["down"])
    weights |= norm("vit.layernorm", params["norm"]) | linear("classifier", params["head"])
    model = load(modeling_vit.ViTForImageClassification(config), weights)
    return lambda x: model(pixel_values=x.movedim(-1, 1)).logits


def torchvision_vit(params):
    model = vision_transformer.VisionTransformer(
        image_size=tested.IMAGE,
        patch_size=tested.PATCH,
        num_layers=tested.LAYERS,
        num_heads=tested.HEADS,
        hidden_dim=tested.WIDTH,
        mlp_dim=tested.HIDDEN,
        num_classes=tested.CLASSES,
    )
    weights = {"class_token": params["class_token"], "encoder.pos_embedding": params["position"]}
    weights |= patch_embedding("conv_proj", params["patch"])
    for index, p in numbered(params):
        layer, parts = f"encoder.layers.encoder_layer_{index}", [p["attention"][n] for n in ("query", "key", "value")]
        weights[f"{layer}.self_attention.in_proj_weight"] = np.concatenate([part["kernel"].T for part in parts])
        weights[f"{layer}.self_attention.in_proj_bias"] = np.concatenate([part["bias"] for part in parts])
        weights |= linear(f"{layer}.self_attention.out_proj", p["attention"]["output"])
        weights |= norm(f"{layer}.ln_1", p["norm1"]) | norm(f"{layer}.ln_2", p["norm2"])
        weights |= linear(f"{layer}.mlp.0", p["up"]) | linear(f"{layer}.mlp.3", p["down"])
    weights |= norm("encoder.ln", params["norm"]) | linear("heads.head", params["head"])
    model = load(model, weights)
    return lambda x: model(x.movedim(-1, 1))


def torchvision_vit_gamma(params):
    """With zennit's Gamma, as LXT's own example of this model: torchvision's attention has no Linear that is called."""
    monkey_patch_zennit()
    conv, dense = (zennit_rules.Gamma(gamma, stabilizer=lambda z: z) for gamma in (0.25, 0.05))
    network = torchvision_vit(params)
    (model,) = (cell.cell_contents for cell in network.__closure__)
    composites.LayerMapComposite([(torch.nn.Conv2d, conv), (torch.nn.Linear, dense)]).register(model)
    return network


def rms_norm_forward(self, x):
    """LXT's patch of LlamaRMSNorm without its cast to float32."""
    scale = implicit.stop_gradient(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
    return self.weight * (x * scale)


def llama_in_float64(patch_map):
    return patch_map | {modeling_llama.LlamaRMSNorm: functools.partial(patches.patch_method, rms_norm_forward)}


def vit_patches(attention):
    """LXT has no patches for Hugging Face's ViT: these are put together from its own for other models."""
    gelu = type(modeling_vit.ACT2FN["gelu"])
    return {
        gelu: functools.partial(patches.patch_method, patches.non_linear_forward, keep_original=True),
        torch.nn.LayerNorm: functools.partial(patches.patch_method, patches.layer_norm_forward),
        modeling_vit: attention,
    }


PATCHED = {  # network, key without `_exact`: build, module to patch, patches (None: LXT's default for the module)
    ("bert", "efficient"): (bert, modeling_bert, lambda: None),
    ("gpt2", "efficient"): (gpt2, modeling_gpt2, lambda: None),
    ("gpt2", "efficient_cp"): (gpt2, modeling_gpt2, lambda: lxt_gpt2.cp_LRP),
    ("llama", "efficient"): (llama, modeling_llama, lambda: llama_in_float64(lxt_llama.attnLRP)),
    ("llama", "efficient_cp"): (llama, modeling_llama, lambda: llama_in_float64(lxt_llama.cp_LRP)),
    ("vit", "efficient"): (vit, modeling_vit, lambda: vit_patches(patches.patch_attention)),
    ("vit", "efficient_cp"): (torchvision_vit, vision_transformer, lambda: None),
    ("vit", "efficient_cp_gamma"): (torchvision_vit_gamma, vision_transformer, lambda: None),
}


def efficient(name, key, x, target):
    """Logits and relevance of a patched model: call it once in a process.

    `_exact` takes the stabiliser of 1e-10 out of LXT's identity rule, f(x) / (x + 1e-10).
    """
    build, module, patch_map = PATCHED[name, key.removesuffix("_exact")]
    if key.endswith("_exact"):
        implicit.identity_rule_implicit_fn.forward.__defaults__ = (0.0,)
    monkey_patch(module, patch_map())
    x = torch.tensor(x, requires_grad=True)
    logits = build(tested.init(name))(x)
    (gradient,) = torch.autograd.grad(final(logits).gather(-1, torch.tensor(target)[:, None]).sum(), x)
    return logits.detach().numpy(), (x * gradient).detach().numpy()


# The same networks in LXT's explicit functions. What torch does to relevance between them (reshaping, selecting) is right.


class Explicit:
    """`exact`: no stabilisers. `cp`: attention weights and the gate of a feed-forward are held constant."""

    def __init__(self, params, *, exact=False, cp=False):
        self.params = jax.tree.map(tensor, params)
        self.cp = cp
        self.stabiliser = {"epsilon": 0.0} if exact else {}

    def dense(self, p, x):
        return lf.linear_epsilon(x, p["kernel"].T, p.get("bias"), **self.stabiliser)

    def add(self, a, b):
        return lf.add2(a, b, **self.stabiliser)

    def matmul(self, a, b):
        if a.requires_grad:
            return lf.matmul(a, b, **self.stabiliser)
        return rules.epsilon_lrp(torch.matmul, self.stabiliser.get("epsilon", 1e-6), a, b)  # as LXT's own CP attention

    def layer_norm(self, p, x, epsilon):
        # Not lf.layer_norm, which is this with the default stabiliser.
        return lf.layer_norm_grad_fn.apply(x, p["scale"], p["bias"], epsilon, self.stabiliser.get("epsilon", 1e-6))

    def rms_norm(self, p, x, epsilon):
        # lf.rms_norm_identity is the same rule on a norm in float32.
        return rules.identity(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * p["scale"], x)

    def heads(self, p, x, count):
        return self.dense(p, x).unflatten(-1, (count, -1)).transpose(1, 2)

    def rotate(self, x):
        cosine, sine = (tensor(part) for part in tested.rotary_angles(x.shape[-2]))
        first, second = x.chunk(2, -1)
        return self.add(lf.mul2(x, cosine), lf.mul2(torch.cat([lf.mul2(second, -1), first], -1), sine))

    def attention(self, p, x, *, causal=False, rotary=False):
        key_heads = p["key"]["kernel"].shape[1] // tested.HEAD
        q = self.heads(p["query"], x, tested.HEADS)
        k, v = (self.heads(p[name], x, key_heads) for name in ("key", "value"))
        if rotary:
            q, k = self.rotate(q), self.rotate(k)
        k, v = (part.repeat_interleave(tested.HEADS // key_heads, 1) for part in (k, v))
        scores = lf.mul2(self.matmul(q, k.transpose(-1, -2)), 1 / math.sqrt(tested.HEAD))
        if causal:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~visible, -math.inf)
        weights = lf.softmax(scores, -1)
        mixed = self.matmul(weights.detach() if self.cp else weights, v)
        return self.dense(p["output"], mixed.transpose(1, 2).flatten(2))

    def feed_forward(self, p, x, activation):
        return self.dense(p["down"], rules.identity(activation, self.dense(p["up"], x)))

    def gated(self, p, x):
        gate = rules.identity(functional.silu, self.dense(p["gate"], x))
        return self.dense(p["down"], lf.mul2(gate.detach() if self.cp else gate, self.dense(p["up"], x)))

    def bert(self, x):
        epsilon, table = tested.NORM_EPSILON["bert"], self.params["embed"]
        length = x.shape[1]
        x = self.add(x, (table["position"][:length] + table["type"][torch.arange(length) * 2 // length]).expand_as(x))
        x = self.layer_norm(table["norm"], x, epsilon)
        for p in tested.blocks(self.params):
            x = self.layer_norm(p["norm1"], self.add(x, self.attention(p["attention"], x)), epsilon)
            x = self.layer_norm(p["norm2"], self.add(x, self.feed_forward(p, x, functional.gelu)), epsilon)
        return self.dense(self.params["classifier"], rules.identity(torch.tanh, self.dense(self.params["pooler"], x[:, 0])))

    def gpt2(self, x):
        epsilon, table = tested.NORM_EPSILON["gpt2"], self.params["embed"]
        gelu = functools.partial(functional.gelu, approximate="tanh")
        x = self.add(x, table["position"][: x.shape[1]].expand_as(x))
        for p in tested.blocks(self.params):
            x = self.add(x, self.attention(p["attention"], self.layer_norm(p["norm1"], x, epsilon), causal=True))
            x = self.add(x, self.feed_forward(p, self.layer_norm(p["norm2"], x, epsilon), gelu))
        return self.dense({"kernel": table["word"].T}, self.layer_norm(self.params["norm"], x, epsilon))

    def llama(self, x):
        epsilon = tested.NORM_EPSILON["llama"]
        for p in tested.blocks(self.params):
            y = self.rms_norm(p["norm1"], x, epsilon)
            x = self.add(x, self.attention(p["attention"], y, causal=True, rotary=True))
            x = self.add(x, self.gated(p, self.rms_norm(p["norm2"], x, epsilon)))
        return self.dense(self.params["head"], self.rms_norm(self.params["norm"], x, epsilon))

    def vit(self, x):
        epsilon, patch = tested.NORM_EPSILON["vit"], self.params["patch"]
        kernel = patch["kernel"].permute(3, 2, 0, 1)
        convolve = functools.partial(functional.conv2d, weight=kernel, bias=patch["bias"], stride=tested.PATCH)
        x = rules.epsilon_lrp(convolve, self.stabiliser.get("epsilon", 1e-8), x.movedim(-1, 1))
        x = torch.cat([self.params["class_token"].expand(x.shape[0], 1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = self.add(x, self.params["position"].expand_as(x))
        for p in tested.blocks(self.params):
            x = self.add(x, self.attention(p["attention"], self.layer_norm(p["norm1"], x, epsilon)))
            x = self.add(x, self.feed_forward(p, self.layer_norm(p["norm2"], x, epsilon), functional.gelu))
        return self.dense(self.params["head"], self.layer_norm(self.params["norm"], x, epsilon)[:, 0])


EXPLICIT = {
    "explicit": {},
    "explicit_exact": {"exact": True},
    "explicit_cp": {"cp": True},
    "explicit_cp_exact": {"cp": True, "exact": True},
}


def explicit(name, key, x, target):
    """Logits and relevance by LXT's explicit functions."""
    x = torch.tensor(x, requires_grad=True)
    logits = getattr(Explicit(tested.init(name), **EXPLICIT[key]), name)(x)
    chosen = final(logits).gather(-1, torch.tensor(target)[:, None])
    (relevance,) = torch.autograd.grad(chosen, x, chosen.detach())
    return logits.detach().numpy(), relevance.numpy()


# Explaining and storing.


def final(logits):
    """Those of the classes, or of the token after the last."""
    return logits if logits.ndim == 2 else logits[:, -1]


def targets(logits):
    """A class or next token per example: the likeliest of the first example, the least likely of the second."""
    return np.array([logits[0].argmax(), logits[1].argmin()])


def in_a_process_of_its_own(job, *arguments):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as process:
        return process.submit(job, *arguments).result()


def relevances(name, x, target):
    """Key, logits and relevance of every way to explain a network."""
    for key in (key for network, key in PATCHED if network == name):
        for variant in (key, f"{key}_exact"):
            yield variant, *in_a_process_of_its_own(efficient, name, variant, x, target)
    for key in EXPLICIT:
        yield key, *explicit(name, key, x, target)


def make(name):
    params, sample = tested.init(name), tested.sample(name)
    expected = np.asarray(tested.NETWORKS[name](params, sample))
    x = sample if name == "vit" else np.asarray(tested.embed(params, sample))
    stored = {"target": targets(final(expected))}
    for key, logits, relevance in relevances(name, x, stored["target"]):
        difference = np.abs(logits - expected).max()
        print(f"{name} {key}: logits differ by {difference:.1e} from those of JAX")
        assert difference < 1e-12
        stored.setdefault("logits", logits)  # torch's
        stored[key] = relevance
    path = HERE / f"lxt_{name}.npz"
    np.savez_compressed(path, **stored)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


def main(names):
    jax.config.update("jax_enable_x64", True)
    for name in names or tested.NETWORKS:
        make(name)


if __name__ == "__main__":
    main(sys.argv[1:])
