"""Networks of full size with random weights, in plain JAX and in torch.

A network is a nested list of layers, a layer a tuple. From one description come the weights, the network of
JAX and that of torch.
"""

import jax
import numpy as np
from jax import lax

try:
    import torch
except ImportError:
    torch = None


def vgg16(size, width):
    """VGG-16 with its three dense layers; `width` is 64 in the original."""
    layers, channels = [], 3
    for count, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)):
        for _ in range(count):
            layers += [("conv", 3, channels, width * factor, 1, True), ("relu",)]
            channels = width * factor
        layers.append(("max_pool", 2, 0))
    layers += [("flatten",), ("dense", channels * (size // 32) ** 2, 64 * width), ("relu",)]
    return [*layers, ("dense", 64 * width, 64 * width), ("relu",), ("dense", 64 * width, 1000)]


def resnet50(size, width):
    """ResNet-50 (stride at the 3x3 convolution) with its batch norms written out."""

    def conv_norm(kernel, inputs, outputs, stride=1):
        return [("conv", kernel, inputs, outputs, stride, False), ("batch_norm", outputs)]

    layers, channels = [*conv_norm(7, 3, width, 2), ("relu",), ("max_pool", 3, 1)], width
    for stage, count in enumerate((3, 4, 6, 3)):
        narrow = width * 2**stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            main = [*conv_norm(1, channels, narrow), ("relu",), *conv_norm(3, narrow, narrow, stride)]
            main += [("relu",), *conv_norm(1, narrow, 4 * narrow)]
            shortcut = [] if block else conv_norm(1, channels, 4 * narrow, stride)
            layers += [("residual", main, shortcut), ("relu",)]
            channels = 4 * narrow
    return [*layers, ("mean",), ("dense", channels, 1000)]


NETWORKS = {"vgg16": (vgg16, 4), "resnet50": (resnet50, 2)}  # and the default batch


def initialize(layer, rng):
    def normal(*shape, scale):
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    match layer:
        case ("conv", kernel, inputs, outputs, _, biased):
            scale = (2 / (kernel**2 * inputs)) ** 0.5
            made = {"kernel": normal(kernel, kernel, inputs, outputs, scale=scale)}
            return made | ({"bias": normal(outputs, scale=0.1)} if biased else {})
        case ("dense", inputs, outputs):
            kernel = normal(inputs, outputs, scale=(2 / inputs) ** 0.5)
            return {"kernel": kernel, "bias": normal(outputs, scale=0.1)}
        case ("batch_norm", channels):
            moments = {"mean": normal(channels, scale=0.1), "bias": normal(channels, scale=0.1)}
            return moments | {name: rng.uniform(0.5, 1.5, channels).astype("f") for name in ("scale", "var")}
        case ("residual", main, shortcut):
            return [initialize(part, rng) for part in main], [initialize(part, rng) for part in shortcut]
    return {}


def apply(layers, params, x):
    """The network in plain JAX."""
    for layer, p in zip(layers, params, strict=True):
        match layer:
            case ("conv", kernel, _, _, stride, biased):
                pads = ((kernel // 2, kernel // 2),) * 2
                dims = ("NHWC", "HWIO", "NHWC")
                x = lax.conv_general_dilated(x, p["kernel"], (stride, stride), pads, dimension_numbers=dims)
                x = x + p["bias"] if biased else x
            case ("dense", *_):
                x = x @ p["kernel"] + p["bias"]
            case ("batch_norm", _):
                x = (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]
            case ("relu",):
                x = jax.nn.relu(x)
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


def torch_modules(layers, params):
    """The same network in torch, as a list of modules in order of execution, with the same weights."""

    def filled(module, p):
        kernel = p.get("kernel", p.get("scale"))
        kernel = np.moveaxis(kernel, (-1, -2), (0, 1)) if kernel.ndim > 1 else kernel
        module.weight = torch.nn.Parameter(torch.tensor(np.ascontiguousarray(kernel)), requires_grad=False)
        if "bias" in p:
            module.bias = torch.nn.Parameter(torch.tensor(p["bias"]), requires_grad=False)
        return module

    for layer, p in zip(layers, params, strict=True):
        match layer:
            case ("conv", kernel, inputs, outputs, stride, biased):
                yield filled(torch.nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=biased), p)
            case ("dense", inputs, outputs):
                yield filled(torch.nn.Linear(inputs, outputs), p)
            case ("batch_norm", channels):
                module = filled(torch.nn.BatchNorm2d(channels), p)
                module.running_mean, module.running_var = torch.tensor(p["mean"]), torch.tensor(p["var"])
                yield module
            case ("relu",):
                yield torch.nn.ReLU()
            case ("max_pool", size, pad):
                yield torch.nn.MaxPool2d(size, 2, pad)
            case ("flatten",):
                yield ChannelsLast()
                yield torch.nn.Flatten()
            case ("mean",):
                yield torch.nn.AdaptiveAvgPool2d(1)
                yield torch.nn.Flatten()
            case ("residual", *branches):
                pairs = zip(branches, p, strict=True)
                yield Residual(*(torch.nn.Sequential(*torch_modules(*pair)) for pair in pairs))


if torch is not None:

    class ChannelsLast(torch.nn.Module):
        def forward(self, x):
            return x.movedim(1, -1)

    class Residual(torch.nn.Module):
        def __init__(self, main, shortcut):
            super().__init__()
            self.main, self.shortcut, self.sum = main, shortcut, None

        def forward(self, x):
            if self.sum is None:
                return self.main(x) + self.shortcut(x)
            # As zennit's canonizer for ResNets has it.
            return self.sum(torch.stack([self.shortcut(x), self.main(x)], -1))
