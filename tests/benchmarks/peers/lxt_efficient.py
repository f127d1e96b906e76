"""LXT's efficient mode: Hugging Face's models, patched so that input times gradient is relevance.

A patch changes classes and modules for everyone: here it is in place while its model is made and run, and out of place
while torch's gradient is. LXT has no patches for Hugging Face's ViT and none of CP-LRP for BERT; those for ViT are put
together of its own for other models.

It has no stabiliser in layers with weights, `rp.presets.attn_lrp()` has 1e-6: 8e-4 of the relevance of twelve blocks of
BERT, and all of the difference (with `epsilon=0` 7e-8 in float64, 1.5e-6 in float32). Under `attn_lrp_vit` another 3e-3: to
our Gamma the shift of a layer norm is a bias of the layer after it, to zennit's a part of its input.
"""

import functools
import warnings

import torch
from lxt.efficient import monkey_patch, monkey_patch_zennit, patches
from lxt.efficient.models import bert, llama
from transformers.models.vit import modeling_vit
from zennit import composites, core, rules

from . import torch_transformers
from .torch_transformers import FAMILY  # noqa: F401


def _vit(attention):
    return {
        type(modeling_vit.ACT2FN["gelu"]): functools.partial(
            patches.patch_method, patches.non_linear_forward, keep_original=True
        ),
        torch.nn.LayerNorm: functools.partial(patches.patch_method, patches.layer_norm_forward),
        modeling_vit: attention,
    }


def _zennit(_):
    monkey_patch_zennit()
    return True


def _feed_forward_by_gamma(model):
    """zennit's Gamma as in `rp.presets.attn_lrp_vit`: the patches' convolution and the feed-forward layers."""
    dense = [name for name, _ in model.named_modules() if name.endswith((".intermediate.dense", ".output.dense"))]
    dense = [name for name in dense if "attention" not in name]
    layers = [(torch.nn.Conv2d, rules.Gamma(0.25, 1e-6))]
    composites.NameLayerMapComposite([(dense, rules.Gamma(0.05, 1e-6))], layers).register(model)


# By network and preset: the patches, and what is done to the model.
PATCHES = {
    ("bert_base", "attn_lrp"): (bert.attnLRP, None),
    ("llama", "attn_lrp"): (llama.attnLRP, None),
    ("llama", "cp_lrp"): (llama.cp_LRP, None),
    ("vit_b16", "attn_lrp"): (_vit(patches.patch_attention), None),
    ("vit_b16", "cp_lrp"): (_vit(patches.patch_cp_attention), None),
    ("vit_b16", "attn_lrp_vit"): (_vit(patches.patch_attention) | {core.BasicHook: _zennit}, _feed_forward_by_gamma),
}


class Patched:
    """A context in which patches hold."""

    def __init__(self, patch_map):
        before = {target: dict(vars(target)) for target in patch_map}
        for target in patch_map:
            if "ALL_ATTENTION_FUNCTIONS" in vars(target):  # LXT's patch of CP-LRP changes this table in place
                target.ALL_ATTENTION_FUNCTIONS = dict(target.ALL_ATTENTION_FUNCTIONS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # LXT warns of a patch that fails
                monkey_patch(None, patch_map)
        finally:
            self.changes = [
                (target, name, old.get(name, self), new)
                for target, old in before.items()
                for name, new in vars(target).items()
                if not name.startswith("__") and old.get(name, self) is not new
            ]
            self.__exit__()

    def __enter__(self):
        for target, name, _, new in self.changes:
            setattr(target, name, new)

    def __exit__(self, *_):
        for target, name, old, _ in self.changes:
            if old is self:
                delattr(target, name)
            else:
                setattr(target, name, old)


def relevances(problem):
    offered = [preset for network, preset in PATCHES if network == problem.name]
    return {preset: functools.partial(_prepare, problem, preset) for preset in offered}


def _prepare(problem, preset):
    patch_map, prepare = PATCHES[problem.name, preset]
    patched = Patched(patch_map)
    with patched:
        model, call = torch_transformers.build(problem)
        if prepare:
            prepare(model)
    explain = torch_transformers.gradient_runner(call, problem, weigh=True)

    def run():
        with patched:
            return explain()

    return run
