"""The transformers as models of Hugging Face, with our weights."""

import functools

import torch
from transformers.modeling_utils import no_init_weights
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama
from transformers.models.vit import modeling_vit

FAMILY = "transformer"
ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}  # in Llama


def as_in_torch(params):
    """The tree of our parameters, kernels transposed, gains and kernels named `weight`."""
    if isinstance(params, list):
        return [as_in_torch(value) for value in params]
    if not isinstance(params, dict):
        return torch.tensor(params)
    made = {name: as_in_torch(value) for name, value in params.items() if name != "kernel"}
    if "kernel" in params:
        order = (1, 0) if params["kernel"].ndim == 2 else (3, 2, 0, 1)
        made["weight"] = torch.tensor(params["kernel"]).permute(order).contiguous()
    if "scale" in made:
        made["weight"] = made.pop("scale")
    return made


# Our names in Hugging Face's. Each of them returns the model and how it is called.


def vit_b16(sizes, dimensions):
    config = modeling_vit.ViTConfig(
        **dimensions, image_size=sizes.image, patch_size=sizes.patch, num_labels=sizes.classes, layer_norm_eps=sizes.epsilon
    )
    names = {
        "class_token": "vit.embeddings.cls_token",
        "position": "vit.embeddings.position_embeddings",
        "patch": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    block = {f"attention.{name}": f"attention.attention.{name}" for name in ("query", "key", "value")}
    block |= {"attention.output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
    block |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    model = modeling_vit.ViTForImageClassification(config)
    return model, names, "vit.encoder.layer", block, lambda x: model(pixel_values=x.movedim(-1, 1)).logits


def bert_base(sizes, dimensions):
    config = modeling_bert.BertConfig(
        **dimensions,
        vocab_size=1,
        max_position_embeddings=sizes.length,
        type_vocab_size=1,
        num_labels=sizes.classes,
        layer_norm_eps=sizes.epsilon,
    )
    names = {
        "position": "bert.embeddings.position_embeddings.weight",
        "norm": "bert.embeddings.LayerNorm",
        "pooler": "bert.pooler.dense",
        "head": "classifier",
    }
    block = {f"attention.{name}": f"attention.self.{name}" for name in ("query", "key", "value")}
    block |= {"attention.output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
    block |= {"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"}
    model = modeling_bert.BertForSequenceClassification(config)
    return model, names, "bert.encoder.layer", block, lambda x: model(inputs_embeds=x).logits


def llama(sizes, dimensions):
    config = modeling_llama.LlamaConfig(
        **dimensions,
        num_key_value_heads=sizes.key_heads,
        vocab_size=sizes.classes,
        max_position_embeddings=sizes.length,
        rms_norm_eps=sizes.epsilon,
        pad_token_id=None,
    )
    names = {"norm": "model.norm", "head": "lm_head"}
    block = {f"attention.{here}": f"self_attn.{there}_proj" for here, there in ATTENTION.items()}
    block |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    block |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    model = modeling_llama.LlamaForCausalLM(config)

    def call(x):
        return model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[:, -1]

    return model, names, "model.layers", block, call


def build(problem):
    """The model and the function of its input, channels last for images."""
    sizes = problem.about
    dimensions = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.hidden,
        "attn_implementation": "sdpa",
    }
    with no_init_weights():
        model, names, blocks, block, call = globals()[problem.name](sizes, dimensions)
    params = weights(problem)
    found = {}
    for here, there in names.items():
        found |= _named(there, params[here])
    for index, p in enumerate(params["blocks"]):
        for here, there in block.items():
            found |= _named(f"{blocks}.{index}.{there}", functools.reduce(dict.get, here.split("."), p))
    found = {name: value.view_as(model.get_parameter(name)) for name, value in found.items()}
    missing, unexpected = model.load_state_dict(found, strict=False, assign=True)
    assert not unexpected, unexpected
    absent = [name for name in missing if "embed" not in name]  # of tokens and types: the input is embedded already
    assert not absent, absent
    for name in missing:
        torch.nn.init.zeros_(model.get_parameter(name))
    return model.eval().requires_grad_(False), call


def _named(name, value):
    if not isinstance(value, dict):
        return {name: value}
    return {f"{name}.{part}": leaf for part, leaf in value.items()}


_latest = {}


def weights(problem):
    """In torch, shared by the peers of one problem."""
    if _latest.get("params") is not problem.params:
        _latest.update(params=problem.params, weights=as_in_torch(problem.params))
    return _latest["weights"]


def gradient_runner(call, problem, weigh=False):
    """A run of the gradient of the explained logits by the input; `weigh`: times the input."""
    x, target = torch.tensor(problem.x, requires_grad=True), torch.tensor(problem.target, dtype=torch.int64)[:, None]

    def run():
        (found,) = torch.autograd.grad(call(x).gather(1, target).sum(), x)
        return (found * x if weigh else found).detach().numpy()

    return run


def gradient(problem):
    _, call = build(problem)
    return gradient_runner(call, problem)
