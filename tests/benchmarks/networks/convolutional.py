"""VGG-16, ResNet-50 and MobileNetV2.

A network is a nested list of layers, a layer a tuple. From one description come the weights, the network of JAX and those
of the peers. The originals have images of 224 x 224, a `width` of 64 channels, and all of the `stages`.
"""

import functools

import jax
import numpy as np
from jax import lax

import relprop as rp

from .base import Problem, dense, normal, targets

BOX = (-2.0, 2.0)  # of the input
CLASSES = 1000


def vgg16(size, width, stages):
    """VGG-16 with its three dense layers. Simonyan and Zisserman 2015."""
    layers, channels = [], 3
    for count, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))[:stages]:
        for _ in range(count):
            layers += [("conv", 3, channels, width * factor, 1, 1, True), ("relu",)]
            channels = width * factor
        layers.append(("max_pool", 2, 0))
    layers += [("flatten",), ("dense", channels * (size >> layers.count(("max_pool", 2, 0))) ** 2, 64 * width), ("relu",)]
    return [*layers, ("dense", 64 * width, 64 * width), ("relu",), ("dense", 64 * width, CLASSES)]


def _conv_norm(kernel, inputs, outputs, stride=1, groups=1):
    return [("conv", kernel, inputs, outputs, stride, groups, False), ("batch_norm", outputs)]


def resnet50(size, width, stages):
    """ResNet-50 (stride at the 3x3 convolution) with its batch norms written out. He et al. 2016."""
    layers, channels = [*_conv_norm(7, 3, width, 2), ("relu",), ("max_pool", 3, 1)], width
    for stage, count in enumerate((3, 4, 6, 3)[:stages]):
        narrow = width * 2**stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            main = [*_conv_norm(1, channels, narrow), ("relu",), *_conv_norm(3, narrow, narrow, stride)]
            main += [("relu",), *_conv_norm(1, narrow, 4 * narrow)]
            shortcut = [] if block else _conv_norm(1, channels, 4 * narrow, stride)
            layers += [("residual", main, shortcut), ("relu",)]
            channels = 4 * narrow
    return [*layers, ("mean",), ("dense", channels, CLASSES)]


def mobilenet_v2(size, width, stages):
    """MobileNetV2: depthwise convolutions between a wide and a narrow 1x1 convolution, relu6. Sandler et al. 2018."""
    narrow = width // 2
    layers = [*_conv_norm(3, 3, narrow, 2), ("relu6",)]
    for expand, outputs, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    )[:stages]:  # fmt: skip
        outputs = outputs * width // 64
        for block in range(count):
            step, wide = 1 if block else stride, expand * narrow
            main = [*_conv_norm(1, narrow, wide), ("relu6",)] if expand > 1 else []
            main += [*_conv_norm(3, wide, wide, step, wide), ("relu6",), *_conv_norm(1, wide, outputs)]
            layers += [("residual", main, [])] if step == 1 and narrow == outputs else main
            narrow = outputs
    return [*layers, *_conv_norm(1, narrow, 20 * width), ("relu6",), ("mean",), ("dense", 20 * width, CLASSES)]


def initialize(layer, rng):
    match layer:
        case ("conv", kernel, inputs, outputs, _, groups, biased):
            fan_in = kernel**2 * inputs // groups
            made = {"kernel": normal(rng, kernel, kernel, inputs // groups, outputs, scale=(2 / fan_in) ** 0.5)}
            return made | ({"bias": normal(rng, outputs, scale=0.1)} if biased else {})
        case ("dense", inputs, outputs):
            return dense(rng, inputs, outputs, gain=2**0.5)
        case ("batch_norm", channels):
            moments = {"mean": normal(rng, channels, scale=0.1), "bias": normal(rng, channels, scale=0.1)}
            return moments | {name: rng.uniform(0.5, 1.5, channels).astype("f") for name in ("scale", "var")}
        case ("residual", main, shortcut):
            return [initialize(part, rng) for part in main], [initialize(part, rng) for part in shortcut]
    return {}


def apply(layers, params, x):
    """The network in plain JAX; images are (batch, height, width, channels)."""
    for layer, p in zip(layers, params, strict=True):
        match layer:
            case ("conv", kernel, _, _, stride, groups, biased):
                pads, dims = ((kernel // 2, kernel // 2),) * 2, ("NHWC", "HWIO", "NHWC")
                x = lax.conv_general_dilated(
                    x, p["kernel"], (stride, stride), pads, dimension_numbers=dims, feature_group_count=groups
                )
                x = x + p["bias"] if biased else x
            case ("dense", *_):
                x = x @ p["kernel"] + p["bias"]
            case ("batch_norm", _):
                x = (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]
            case ("relu",):
                x = jax.nn.relu(x)
            case ("relu6",):
                x = jax.nn.relu6(x)
            case ("max_pool", size, pad):
                pads = ((0, 0), (pad, pad), (pad, pad), (0, 0))
                x = lax.reduce_window(x, -np.inf, lax.max, (1, size, size, 1), (1, 2, 2, 1), pads)
            case ("flatten",):
                x = x.reshape(x.shape[0], -1)
            case ("mean",):
                x = x.mean((1, 2))
            case ("residual", main, shortcut):
                x = apply(main, p[0], x) + apply(shortcut, p[1], x)
    return x


def alpha1_beta0_of_captum():
    """ZPlus as captum has it, without biases; below signed input captum's is another rule, so that Epsilon stands there."""
    return [(rp.first("conv"), rp.Epsilon()), ("conv", rp.ZPlus(bias="ignore")), ("affine", rp.Epsilon())]


PRESETS = {
    "Epsilon": rp.Epsilon,
    "Gamma": rp.Gamma,
    "epsilon_plus": rp.presets.epsilon_plus,
    "epsilon_plus_flat": rp.presets.epsilon_plus_flat,
    "epsilon_alpha2_beta1": rp.presets.epsilon_alpha2_beta1,
    "epsilon_alpha2_beta1_flat": rp.presets.epsilon_alpha2_beta1_flat,
    "epsilon_gamma_box": lambda: rp.presets.epsilon_gamma_box(*BOX),
    "deep_taylor": lambda: rp.presets.deep_taylor(*BOX),
    "excitation_backprop": rp.presets.excitation_backprop,
    "guided_backprop": rp.presets.guided_backprop,
    "deconvnet": rp.presets.deconvnet,
}


def build(describe, own_batch, stages, presets, short=False, batch=None):
    """`short`: only the first `stages`, an eighth of the channels, 32 x 32 pixels."""
    size, width, stages = (32, 8, stages) if short else (224, 64, None)
    batch = batch or (2 if short else own_batch)
    layers, rng = describe(size, width, stages), np.random.default_rng(0)
    return Problem(
        describe.__name__,
        "convolutional",
        functools.partial(apply, layers),
        [initialize(layer, rng) for layer in layers],
        rng.uniform(*BOX, (batch, size, size, 3)).astype(np.float32),
        targets(rng, batch, CLASSES),
        presets,
        layers,
    )


NETWORKS = {
    "vgg16": functools.partial(build, vgg16, 4, 2, PRESETS | {"alpha1_beta0 (captum's)": alpha1_beta0_of_captum}),
    "resnet50": functools.partial(build, resnet50, 4, 1, PRESETS),
    "mobilenet_v2": functools.partial(build, mobilenet_v2, 4, 2, PRESETS),
}
