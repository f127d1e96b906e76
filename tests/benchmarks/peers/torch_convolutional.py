"""The convolutional networks in torch, as modules in order of execution.

In float64 its gradients are JAX's to 1e-14. In float32 they differ by 1e-2 for MobileNetV2, whose logits differ by 1e-6: of
millions of units some are on the other side of a kink of relu6.
"""

import numpy as np
import torch

FAMILY = "convolutional"


class Residual(torch.nn.Module):
    """Two branches and their sum, by a module that may be replaced."""

    def __init__(self, main, shortcut):
        super().__init__()
        self.main, self.add = main, Add()
        self.shortcut = shortcut if len(shortcut) else None

    def forward(self, x):
        return self.add(self.main(x), x if self.shortcut is None else self.shortcut(x))


class Add(torch.nn.Module):
    def forward(self, main, shortcut):
        return main + shortcut


class Flatten(torch.nn.Module):
    """Of (batch, channels, height, width), channels last, as in JAX."""

    def forward(self, x):
        return x.movedim(1, -1).flatten(1)


def modules(layers, params):
    """From the description in networks/convolutional.py."""
    for layer, p in zip(layers, params, strict=True):
        match layer:
            case ("conv", kernel, inputs, outputs, stride, groups, biased):
                with torch.device("meta"):
                    made = torch.nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=biased)
                yield _filled(made, p)
            case ("dense", inputs, outputs):
                with torch.device("meta"):
                    made = torch.nn.Linear(inputs, outputs)
                yield _filled(made, p)
            case ("batch_norm", channels):
                made = _filled(torch.nn.BatchNorm2d(channels), p)
                made.running_mean, made.running_var = torch.tensor(p["mean"]), torch.tensor(p["var"])
                yield made
            case ("relu",):
                yield torch.nn.ReLU()
            case ("relu6",):
                yield torch.nn.ReLU6()
            case ("max_pool", size, pad):
                yield torch.nn.MaxPool2d(size, 2, pad)
            case ("flatten",):
                yield Flatten()
            case ("mean",):
                yield torch.nn.AdaptiveAvgPool2d(1)
                yield Flatten()
            case ("residual", *branches):
                pairs = zip(branches, p, strict=True)
                yield Residual(*(torch.nn.Sequential(*modules(*pair)) for pair in pairs))


def _filled(module, p):
    kernel = p.get("kernel", p.get("scale"))
    kernel = np.moveaxis(kernel, (-1, -2), (0, 1)) if kernel.ndim > 1 else kernel
    module.weight = torch.nn.Parameter(torch.tensor(np.ascontiguousarray(kernel)), requires_grad=False)
    if "bias" in p:
        module.bias = torch.nn.Parameter(torch.tensor(p["bias"]), requires_grad=False)
    return module


def model(problem):
    return torch.nn.Sequential(*modules(problem.about, problem.params)).eval()


def image(problem):
    return torch.tensor(problem.x.transpose(0, 3, 1, 2).copy(), requires_grad=True)


def as_ours(found):
    return found.detach().numpy().transpose(0, 2, 3, 1)


def gradient(problem):
    network, x = model(problem), image(problem)
    target = torch.tensor(problem.target, dtype=torch.int64)[:, None]

    def run():
        (found,) = torch.autograd.grad(network(x).gather(1, target).sum(), x)
        return as_ours(found)

    return run
