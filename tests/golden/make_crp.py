"""Conditional relevances by zennit-crp, for comparison: writes crp_<network>.npz beside this file.

    python make_crp.py

Two networks of tests/networks.py with parameters of their own, which are stored, are rebuilt in torch as in
make_zennit.py, and their logits compared with those of JAX. All in float64, every stabiliser is 1e-6. What is stored
is in README.md. Layers are masked from the output to the input: crp asks for that order in a condition.
"""

import collections
import pathlib
import sys

import jax
import make_zennit
import numpy as np
import torch
from crp.attribution import CondAttribution
from crp.concepts import ChannelConcept
from zennit import composites

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import networks  # noqa: E402

EPSILON = make_zennit.EPSILON
COMPOSITES = {"plus": composites.EpsilonPlus, "alpha2_beta1": composites.EpsilonAlpha2Beta1}


class Attribution(CondAttribution):
    """Keeps the channels of the heatmap, which crp adds up."""

    def heatmap_modifier(self, data, on_device=None):
        return data.grad.detach().clone()


# Networks: parameters of the functions in tests/networks.py, and their twins with the names of the layers.


def affine(rng, *shape):
    bias = np.abs(rng.normal(size=shape[-1])) * np.resize([0.2, -0.2], shape[-1])
    return {"kernel": rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1])), "bias": bias}


def plain(rng):
    shapes = {
        "conv1": (3, 3, 3, 4),
        "conv2": (3, 3, 4, 5),
        "conv3": (3, 3, 5, 6),
        "conv4": (3, 3, 6, 6),
        "dense1": (24, 10),
        "dense2": (10, 5),
    }
    params = {name: affine(rng, *shape) for name, shape in shapes.items()}
    names = "conv1 relu1 conv2 relu2 pool1 conv3 relu3 pool2 conv4 relu4 flatten dense1 relu5 dense2".split()
    layers = make_zennit.vgg(params, torch.nn.MaxPool2d)
    return networks.vgg_max, params, named(names, layers), ()


def residual(rng):
    def norm(features):
        ends = {"scale": (0.5, 1.5), "bias": (-0.3, 0.6), "mean": (-0.2, 0.2), "var": (0.5, 2.0)}
        return {name: rng.uniform(*end, size=features) for name, end in ends.items()}

    def convolution(inputs):
        return {"kernel": affine(rng, 3, 3, inputs, 4)["kernel"]}

    def block():
        return {"conv1": convolution(4), "bn1": norm(4), "conv2": convolution(4), "bn2": norm(4)}

    params = {
        "conv1": convolution(3),
        "bn1": norm(4),
        "layer1": {"block0": block(), "block1": block()},
        "layer2": {},
        "layer3": {},
        "linear": affine(rng, 4, 5),
    }
    names = "stem norm relu block0 block1 pool flatten linear".split()
    model = named(names, make_zennit.resnet(params)).eval()
    return networks.resnet, params, model, (make_zennit.MergeBatchNorm(),)


def named(names, layers):
    return torch.nn.Sequential(collections.OrderedDict(zip(names, layers, strict=True)))


# What is asked, as keyword arguments of crp; `example` says which of the input. A condition names what is kept.


def plain_cases(target, start):
    def at(**layers):
        return {"y": [target], **layers}

    return {
        "classes": {"conditions": [{"y": [y]} for y in range(5)]},
        "channel": {"conditions": [at(conv3=[2])]},
        "channels": {"conditions": [at(conv3=[1, 3, 5])]},
        "first_relu": {"conditions": [at(relu1=[0, 2])]},
        "first_conv": {"conditions": [at(conv1=[0, 2])]},
        "two_layers": {"conditions": [at(conv4=[0, 2, 4], conv2=[1, 3])]},
        "three_layers": {"conditions": [at(dense1=[0, 2, 4, 5, 9], conv4=[0, 2, 4], conv2=[1, 3])]},
        "every_channel": {"conditions": [at(conv2=[i]) for i in range(5)]},
        "neuron": {"conditions": [at(conv3={2: [0, 3, 10], 3: [4, 5]})], "mask_map": ChannelConcept.mask_rf},
        "paired": {"conditions": [at(conv3=[0]), at(conv3=[1, 4])], "example": slice(0, 2)},
        "start": {"conditions": [{"conv3": [2]}], "start_layer": "conv3"},
        "start_relu": {"conditions": [{"relu5": [0, 2, 4, 5, 9]}], "start_layer": "relu5"},
        "start_seed": {"conditions": [{}], "start_layer": "conv3", "init_rel": lambda a: a * start},
        "start_then": {"conditions": [{"conv4": [2, 5], "conv2": [1, 3]}], "start_layer": "conv4"},
    }


def residual_cases(target):
    inner, outer = "block0.conv2", "block1.conv1"

    def both(**case):
        return {"exclusive": case, "parallel": case | {"exclude_parallel": False}}

    made = {
        "one": both(conditions=[{"y": [target], inner: [0, 1, 3]}]),
        "every": both(conditions=[{"y": [target], inner: [i]} for i in range(4)]),
        "two": both(conditions=[{"y": [target], outer: [0, 2], inner: [0, 1, 3]}]),
        "start": both(conditions=[{outer: [0, 2], inner: [0, 1, 3]}], start_layer=outer),
        "sum": both(conditions=[{"y": [target], "block0.sum": [0, 2, 3]}]),
    }
    cases = {f"{name}_{kind}": case for name, pair in made.items() for kind, case in pair.items()}
    return {"none": {"conditions": [{"y": [target]}]}} | cases


# Relevance inside, which crp records: with parallel branches, for it adds up a conditioned layer's twice without them.

RECORDED = {
    "plain": ({"conv4": [0, 2, 4]}, ["dense1", "conv3", "conv1"]),
    "residual": ({"block1.conv1": [0, 2]}, ["block1.conv1", "block0.sum", "block0.conv2"]),
}


def attribute(model, composite, x, *, conditions, example=slice(0, 1), **options):
    x = make_zennit.channels_first(x[example]).requires_grad_()
    return Attribution(model)(x, conditions, composite, **options)


def explain_all(name, model, composite, x, target, cases):
    found = {key: attribute(model, composite, x, **case) for key, case in cases.items()}
    found = {key: make_zennit.channels_last(given.heatmap) for key, given in found.items()}
    for key, heatmap in found.items():
        assert heatmap.reshape(len(heatmap), -1).any(-1).all(), f"{key}: nothing passes the condition"
    condition, layers = RECORDED[name]
    for key, layer_condition in (("at", {}), ("conditioned_at", condition)):
        conditions = [{"y": [target], **layer_condition}]
        inside = attribute(
            model, composite, x, conditions=conditions, record_layer=[*layers], exclude_parallel=False
        ).relevances
        found |= {f"{key}_{layer}": make_zennit.channels_last(inside[layer]) for layer in layers}
    return found


def flattened(params, path=""):
    for key, value in params.items():
        yield from flattened(value, f"{path}/{key}") if isinstance(value, dict) else [(f"{path}/{key}", value)]


def make(name, network, seed, size):
    rng = np.random.default_rng(seed)
    fn, params, model, canonizer = network(rng)
    x = rng.uniform(-1.0, 1.0, size=(2, *size, 3))
    logits = np.asarray(fn(params, x))
    make_zennit.assert_equal_logits(name, model, x, logits)
    target = int(logits[0].argmax())
    start = torch.tensor(rng.normal(size=(1, 6, 4, 4)))
    cases = plain_cases(target, start) if name == "plain" else residual_cases(target)
    stored = {"x": x, "target": target, "logits": logits}
    stored |= {f"params{path}": value for path, value in flattened(params)}
    if name == "plain":
        stored["start"] = make_zennit.channels_last(start)
    for key, composite in COMPOSITES.items():
        made = composite(epsilon=EPSILON, stabilizer=EPSILON, canonizers=[*canonizer])
        found = explain_all(name, model, made, x, target, cases)
        stored |= {f"{key}/{case}": value for case, value in found.items()}
    path = HERE / f"crp_{name}.npz"
    np.savez_compressed(path, **stored)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


def main():
    jax.config.update("jax_enable_x64", True)
    make("plain", plain, 0, (8, 8))
    make("residual", residual, 1, (6, 6))


if __name__ == "__main__":
    main()
