"""Relevances by zennit, for comparison: writes zennit_<network>.npz beside this file.

    python make_zennit.py [network ...]

Every network is rebuilt in torch from the parameters of tests/networks.py, its logits are compared with
those of the JAX network, and zennit explains the logit of the target (its relevance is its value, so that
relevances sum to the logit where nothing is absorbed). All in float64, every stabiliser is 1e-6, activations
pass relevance on, residual adds and average pooling take zennit's Norm. What is stored is in README.md.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import torch
from torch.nn import functional
from zennit import canonizers, composites, rules, types
from zennit.layer import Sum

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]

import imagenet_models  # noqa: E402
import networks  # noqa: E402

EPSILON = 1e-6


# Torch modules. Every module is registered in execution order: zennit's "first layer" depends on it.


class Padded:
    """Pads inside the convolution, as JAX does, on every side by its own amount.

    A padding module in front of the convolution would do for the values, but Flat and ZBox would then count
    the padding as inputs of the layer and lose the relevance that it gets.
    """

    def forward(self, x):
        pairs = self.pairs
        if pairs == "SAME":
            layout = zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
            pairs = [same(*axis) for axis in layout]
        return super().forward(functional.pad(x, [pad for pair in reversed(pairs) for pad in pair]))


class Conv1d(Padded, torch.nn.Conv1d):
    pass


class Conv2d(Padded, torch.nn.Conv2d):
    pass


class Conv3d(Padded, torch.nn.Conv3d):
    pass


def same(size, kernel, stride, dilation):
    """The padding before and after an axis that TensorFlow and JAX call SAME."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class ChannelsLast(torch.nn.Module):
    """Puts the channels last, so that a flattening that follows has JAX's order."""

    def forward(self, x):
        return x.movedim(1, -1)


def parameter(array):
    return torch.nn.Parameter(torch.tensor(np.ascontiguousarray(array), dtype=torch.float64))


def linear(params):
    layer = torch.nn.Linear(*params["kernel"].shape, dtype=torch.float64)
    layer.weight, layer.bias = parameter(params["kernel"].T), parameter(params["bias"])
    return layer


def conv(params, pairs=None, stride=1, dilation=1, groups=1):
    """A convolution with a JAX kernel (spatial, in, out), padded by `pairs`: a pair per axis or "SAME"."""
    kernel = np.moveaxis(params["kernel"], (-1, -2), (0, 1))
    kind = (Conv1d, Conv2d, Conv3d)[kernel.ndim - 3]
    layer = kind(
        kernel.shape[1] * groups,
        kernel.shape[0],
        kernel.shape[2:],
        stride=stride,
        dilation=dilation,
        groups=groups,
        bias="bias" in params,
        dtype=torch.float64,
    )
    layer.pairs = pairs or ((0, 0),) * (kernel.ndim - 2)
    layer.weight = parameter(kernel)
    if "bias" in params:
        layer.bias = parameter(params["bias"])
    return layer


def flatten():
    return torch.nn.Sequential(ChannelsLast(), torch.nn.Flatten())


# Twins of the synthetic networks.


def dense_tanh(p):
    tanh = torch.nn.Tanh
    return [linear(p["dense1"]), tanh(), linear(p["dense2"]), tanh(), linear(p["dense3"])]


def conv_mixed_2d(p):
    return [
        *(conv(p["conv1"], ((1, 2), (0, 1)), stride=2), torch.nn.ReLU()),
        *(conv(p["conv2"], "SAME", dilation=2, groups=2), torch.nn.ReLU()),
        *(conv(p["conv3"], "SAME", stride=2), torch.nn.ReLU()),
        *(flatten(), linear(p["dense"])),
    ]


def conv_1d(p):
    return [
        *(conv(p["conv1"], ((2, 1),), stride=2), torch.nn.ReLU()),
        *(conv(p["conv2"], "SAME", dilation=2), torch.nn.ReLU()),
        *(flatten(), linear(p["dense"])),
    ]


def conv_3d(p):
    return [
        *(conv(p["conv1"], "SAME"), torch.nn.ReLU()),
        *(conv(p["conv2"], ((0, 0), (1, 0), (0, 0)), stride=2), torch.nn.ReLU()),
        *(flatten(), linear(p["dense"])),
    ]


def vgg(p, pool):
    return [
        *(conv(p["conv1"], "SAME"), torch.nn.ReLU()),
        *(conv(p["conv2"], "SAME"), torch.nn.ReLU(), pool(2)),
        *(conv(p["conv3"], "SAME"), torch.nn.ReLU(), pool(2)),
        *(conv(p["conv4"], "SAME"), torch.nn.ReLU()),
        *(flatten(), linear(p["dense1"]), torch.nn.ReLU(), linear(p["dense2"])),
    ]


SYNTHETIC = {
    "dense_tanh": dense_tanh,
    "conv_mixed_2d": conv_mixed_2d,
    "conv_1d": conv_1d,
    "conv_3d": conv_3d,
    "vgg_max": lambda p: vgg(p, torch.nn.MaxPool2d),
    "vgg_avg": lambda p: vgg(p, torch.nn.AvgPool2d),
}


# Twins of the trained networks.


def batch_norm(params):
    norm = torch.nn.BatchNorm2d(params["scale"].size, dtype=torch.float64).eval()
    norm.weight, norm.bias = parameter(params["scale"]), parameter(params["bias"])
    norm.running_mean = torch.tensor(params["mean"])
    norm.running_var = torch.tensor(params["var"])
    return norm


class Block(torch.nn.Module):
    """A residual block of a CIFAR ResNet."""

    def __init__(self, params):
        super().__init__()
        *_, self.inputs, _ = params["conv1"]["kernel"].shape
        self.features = params["conv2"]["kernel"].shape[-1]
        pairs = ((1, 1), (1, 1))
        self.conv1 = conv(params["conv1"], pairs, stride=self.features // self.inputs)
        self.norm1 = batch_norm(params["bn1"])
        self.relu1 = torch.nn.ReLU()
        self.conv2 = conv(params["conv2"], pairs)
        self.norm2 = batch_norm(params["bn2"])
        self.sum = Sum()
        self.relu2 = torch.nn.ReLU()

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        if self.features != self.inputs:
            side = (self.features - self.inputs) // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))
        return self.relu2(self.sum(torch.stack([y, x], -1)))


def resnet(p):
    blocks = [Block(block) for name in ("layer1", "layer2", "layer3") for block in p[name].values()]
    return [
        *(conv(p["conv1"], ((1, 1), (1, 1))), batch_norm(p["bn1"]), torch.nn.ReLU()),
        *blocks,
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), linear(p["linear"])),
    ]


class MergeBatchNorm(canonizers.SequentialMergeBatchNorm):
    """zennit's canonizer, exact: zennit leaves an epsilon of 1e-5 in the batch norm that it has merged."""

    def register(self, linears, batch_norm):
        super().register(linears, batch_norm)
        self.epsilon, batch_norm.eps = batch_norm.eps, 0.0

    def remove(self):
        super().remove()
        self.batch_norm.eps = self.epsilon


class Fire(torch.nn.Module):
    def __init__(self, weights, name):
        super().__init__()
        self.squeeze, self.squeeze_relu = conv(weights(f"{name}.squeeze1x1")), torch.nn.ReLU()
        self.expand1, self.relu1 = conv(weights(f"{name}.expand1x1")), torch.nn.ReLU()
        self.expand3, self.relu3 = conv(weights(f"{name}.expand3x3"), ((1, 1), (1, 1))), torch.nn.ReLU()

    def forward(self, x):
        x = self.squeeze_relu(self.squeeze(x))
        return torch.cat([self.relu1(self.expand1(x)), self.relu3(self.expand3(x))], 1)


def squeezenet():
    stored = np.load(networks.SHARED / "squeezenet" / "weights.npz")

    def weights(name):
        kernel = np.transpose(stored[f"{name}.weight"], (2, 3, 1, 0))
        return {"kernel": kernel, "bias": stored[f"{name}.bias"]}

    first = weights("conv1")
    first["kernel"] = first["kernel"][:, :, ::-1]  # of blue, green, red

    def pool():
        return torch.nn.MaxPool2d(3, 2, ceil_mode=True)

    fires = [Fire(weights, f"fire{number}") for number in range(2, 10)]
    return [
        *(conv(first, stride=2), torch.nn.ReLU(), pool()),
        *(*fires[:2], pool(), *fires[2:4], pool(), *fires[4:]),
        *(conv(weights("conv10"), ((1, 1), (1, 1))), torch.nn.ReLU()),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
    ]


class MobileNet(torch.nn.Module):
    """Runs the stored list of operators, up to the logits.

    The last convolution, 1x1 on an image of one pixel, is a dense layer here: composites tell the two apart.
    """

    def __init__(self):
        super().__init__()
        folder = networks.SHARED / "mobilenet_v2"
        stored = np.load(folder / "mobilenet_v2_1.0_224_quant_float.npz")
        operators = json.loads((folder / "mobilenet_v2_1.0_224_quant_float.json").read_text())["ops"]
        self.wiring = []
        self.steps = torch.nn.ModuleList()
        for operator in operators:
            if operator["op"] == "RESHAPE":
                break
            self.wiring.append(([i for i in operator["in"] if isinstance(i, int)], operator["out"][0]))
            self.steps.append(mobilenet_step(operator, stored))
        self.steps[-1] = torch.nn.Sequential(torch.nn.Flatten(), dense_of_pixel(self.steps[-1]))

    def forward(self, x):
        values = {0: x}
        for (inputs, output), step in zip(self.wiring, self.steps, strict=True):
            operands = [values[i] for i in inputs]
            values[output] = step(operands[0] if len(operands) == 1 else torch.stack(operands, -1))
        return values[output]


def dense_of_pixel(layer):
    kernel, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return linear({"kernel": kernel[:, :, 0, 0].T, "bias": bias})


def mobilenet_step(operator, stored):
    name, options = operator["op"], operator["opt"]
    if name == "ADD":
        return Sum()
    if name == "AVERAGE_POOL_2D":
        return torch.nn.AvgPool2d(options["window"], options["stride"])
    kernel, bias = (stored[key] for key in operator["in"][1:])
    depthwise = name == "DEPTHWISE_CONV_2D"
    kernel = np.transpose(kernel, (1, 2, 0, 3) if depthwise else (1, 2, 3, 0))
    layer = conv(
        {"kernel": kernel, "bias": bias},
        options["padding"],
        stride=options["stride"],
        groups=kernel.shape[-1] if depthwise else 1,
    )
    return torch.nn.Sequential(layer, torch.nn.ReLU6()) if options["act"] == "RELU6" else layer


# Rules and composites. Whatever is stored under a key is made by the function of that key.


def everywhere(rule, canonizer=()):
    base = composites.layer_map_base(EPSILON)
    return composites.LayerMapComposite([*base, (types.Linear, rule)], [*canonizer])


def then_epsilon(rule, canonizer=()):
    base = [*composites.layer_map_base(EPSILON), (types.Linear, rules.Epsilon(EPSILON))]
    return composites.SpecialFirstLayerMapComposite(base, [(types.Linear, rule)], [*canonizer])


def flat_below(count, model):
    """Flat on the first `count` affine layers, Epsilon above."""
    names = [name for name, module in model.named_modules() if isinstance(module, types.Linear)][:count]
    layers = [*composites.layer_map_base(EPSILON), (types.Linear, rules.Epsilon(EPSILON))]
    return composites.NameLayerMapComposite([(names, rules.Flat(EPSILON))], layers)


def gamma(zero_params=None):
    """zennit's Gamma, mended: it chooses by the sign of z with the bias even where the bias is ignored."""
    rule = rules.Gamma(0.25, EPSILON, zero_params=zero_params)
    rule.param_modifiers[-1] = rules.NoMod(zero_params=zero_params)
    return rule


RULES = {
    "epsilon": lambda **options: rules.Epsilon(EPSILON, **options),
    "zplus": lambda **options: rules.ZPlus(EPSILON, **options),
    "alphabeta": lambda **options: rules.AlphaBeta(2.0, 1.0, EPSILON, **options),
    "gamma": gamma,
}


def exact(denominator):
    return denominator


def rule_composites(model, bounds, channel_bounds):
    """Composites that put single rules on the affine layers; `bounds` and `channel_bounds` are for ZBox."""
    made = {key: everywhere(rule()) for key, rule in RULES.items()}
    made |= {f"{key}_nobias": everywhere(rule(zero_params="bias")) for key, rule in RULES.items()}
    made["first_wsquare"] = then_epsilon(rules.WSquare(EPSILON, zero_params="bias"))
    made["first_wsquare_exact"] = then_epsilon(rules.WSquare(exact, zero_params="bias"))
    made["first_flat"] = then_epsilon(rules.Flat(EPSILON))
    made["first_flat_exact"] = then_epsilon(rules.Flat(exact))
    made["first_zbox"] = then_epsilon(rules.ZBox(*bounds, EPSILON))
    made["first_zbox_channel"] = then_epsilon(rules.ZBox(*channel_bounds, EPSILON))
    return made


def presets(bounds, canonizer=()):
    options = {"epsilon": EPSILON, "stabilizer": EPSILON, "canonizers": [*canonizer]}
    # Without this zennit's ExcitationBackprop takes the gradient of activations, which differs where that is
    # neither 0 nor 1 (tanh) or where a ReLU6 saturates.
    passing = [(types.Activation, rules.Pass()), (types.BatchNorm, rules.Pass())]
    excitation = composites.ExcitationBackprop(EPSILON, passing, canonizers=[*canonizer])
    return {
        "preset_epsilon_plus": composites.EpsilonPlus(**options),
        "preset_epsilon_plus_flat": composites.EpsilonPlusFlat(**options),
        "preset_epsilon_alpha2_beta1": composites.EpsilonAlpha2Beta1(**options),
        "preset_epsilon_alpha2_beta1_flat": composites.EpsilonAlpha2Beta1Flat(**options),
        "preset_epsilon_gamma_box": composites.EpsilonGammaBox(*bounds, **options),
        "preset_excitation_backprop": excitation,
    }


def gradient_presets():
    """Gradients, not relevances. zennit takes a ReLU6 for no ReLU here: it is told."""
    return {
        "preset_guided_backprop": composites.GuidedBackprop([(torch.nn.ReLU6, rules.ReLUGuidedBackprop())]),
        "preset_deconvnet": composites.DeconvNet([(torch.nn.ReLU6, rules.ReLUDeconvNet())]),
    }


def scalar_bounds(low, high):
    """As tensors, for zennit makes float32 of Python numbers."""
    return torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)


def per_channel(bounds, x):
    """Bounds of shape (channels,) as tensors that broadcast to `x`."""
    return tuple(torch.tensor(bound).reshape(1, -1, *(1,) * (x.ndim - 2)) for bound in bounds)


# Explaining and storing.


def channels_first(x):
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def channels_last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def explain(model, composite, x, target, *, gradient=False):
    """zennit's relevance of the input for the logit of `target`, or its gradient."""
    x = x.clone().requires_grad_()
    one_hot = functional.one_hot(torch.tensor(target), model(x).shape[-1]).to(x.dtype)
    with composite.context(model) as modified:
        logits = modified(x)
        start = one_hot if gradient else one_hot * logits.detach()
        (relevance,) = torch.autograd.grad(logits, x, start)
    return channels_last(relevance)


def explain_all(model, x, target, relevance, gradient):
    found = {key: explain(model, made, x, target) for key, made in relevance.items()}
    return found | {key: explain(model, made, x, target, gradient=True) for key, made in gradient.items()}


def float32_error(model, composite, x, target, expected):
    """How far float32 takes zennit itself: Epsilon amplifies rounding where outputs come close to 0."""
    narrow = explain(model.float(), composite, x.float(), target).astype(np.float64)
    model.double()
    return np.linalg.norm(narrow - expected) / np.linalg.norm(expected)


def assert_equal_logits(name, model, x, expected):
    difference = np.abs(model(channels_first(x)).detach().numpy() - np.asarray(expected)).max()
    print(f"{name}: logits differ by {difference:.1e} from those of JAX")
    assert difference < 1e-10


def report_zeros(name, model, x):
    """zennit's Gamma gives no relevance to a unit whose output is exactly 0: say how many there are."""
    zeros = []

    def count(module, inputs, output):
        zeros.append(int((output == 0).sum()))

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, types.Linear)]
    model(x)
    for hook in hooks:
        hook.remove()
    print(f"{name}: {sum(zeros)} outputs of affine layers are exactly 0")


def save(name, **arrays):
    path = HERE / f"zennit_{name}.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


def make_synthetic(name):
    params, x = networks.init(name), networks.sample(name)
    model = torch.nn.Sequential(*SYNTHETIC[name](params))
    logits = np.asarray(networks.NETWORKS[name](params, x))
    assert_equal_logits(name, model, x, logits)
    inputs = channels_first(x)
    report_zeros(name, model, inputs)
    target = logits.argmax(-1)
    target[1] = logits[1].argmin()  # a negative logit
    low, high = networks.bounds(name)
    bounds = scalar_bounds(low, high)
    relevance = rule_composites(model, bounds, per_channel(networks.channel_bounds(name), inputs))
    relevance |= presets(bounds)
    if name != "dense_tanh":
        relevance["two_flat"] = flat_below(2, model)
    if name.startswith("vgg"):
        relevance["three_flat"] = flat_below(3, model)  # a pooling lies between them
    gradient = {} if name == "dense_tanh" else gradient_presets()
    values = explain_all(model, inputs, target, relevance, gradient)
    save(name, x=x, target=target, logits=logits, **values)


def make_resnet20():
    index = np.arange(0, 2000, 500)  # the images are in the order of their classes
    params = networks.load_resnet()
    x, _ = networks.cifar10(index)
    model = torch.nn.Sequential(*resnet(params)).eval()
    logits = np.asarray(jax.jit(networks.resnet20)(params, x))
    assert_equal_logits("resnet20", model, x, logits)
    inputs = channels_first(x)
    report_zeros("resnet20", model, inputs)
    merge = (MergeBatchNorm(),)
    bounds = per_channel(networks.cifar10_bounds(), inputs)
    relevance = {key: everywhere(RULES[key](), merge) for key in ("epsilon", "alphabeta", "gamma")}
    # Not Epsilon without biases: its denominators come so close to 0 that relevances reach 1e12.
    relevance["gamma_nobias"] = everywhere(RULES["gamma"](zero_params="bias"), merge)
    relevance["first_wsquare"] = then_epsilon(rules.WSquare(EPSILON, zero_params="bias"), merge)
    relevance |= presets(bounds, merge)
    target = logits.argmax(-1)
    values = explain_all(model, inputs, target, relevance, gradient_presets())
    values["epsilon_float32_error"] = float32_error(model, relevance["epsilon"], inputs, target, values["epsilon"])
    save("resnet20", index=index, digest=networks.digest(x), target=target, logits=logits, **values)


def make_photograph(name, model, image, x, bounds):
    """Stores a sample of the positions only: the relevances of a photograph are large."""
    network, load = (getattr(imagenet_models, f"{prefix}{name}") for prefix in ("", "load_"))
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), load(networks.SHARED / name))
    x = x[None]
    logits = np.asarray(jax.jit(network)(params, x))
    assert_equal_logits(name, model, x, logits)
    inputs = channels_first(x)
    report_zeros(name, model, inputs)
    target = logits.argmax(-1)
    relevance = {key: everywhere(RULES[key]()) for key in ("epsilon", "gamma")}
    relevance |= presets(per_channel(bounds, inputs))
    values = explain_all(model, inputs, target, relevance, gradient_presets())
    positions = np.sort(np.random.default_rng(0).choice(x.size, 3000, replace=False))
    stored = {}
    for key, value in values.items():
        stored[f"{key}_values"] = value.reshape(-1)[positions]
        stored[f"{key}_norm"] = np.linalg.norm(value)
        stored[f"{key}_sum"] = value.sum()
    stored["epsilon_float32_error"] = float32_error(model, relevance["epsilon"], inputs, target, values["epsilon"])
    digest = networks.digest(image)
    save(name, digest=digest, positions=positions, target=target, logits=logits, **stored)


def make_squeezenet():
    mean = np.array([123.0, 117.0, 104.0])
    image = networks.photo("parrot.jpg", 227)
    bounds = 0 - mean, 255 - mean
    make_photograph("squeezenet", torch.nn.Sequential(*squeezenet()), image, image - mean, bounds)


def make_mobilenet_v2():
    image = networks.photo("parrot.jpg", 224)
    make_photograph("mobilenet_v2", MobileNet(), image, image / 127.5 - 1, (-np.ones(3), np.ones(3)))


TRAINED = {
    "resnet20": make_resnet20,
    "squeezenet": make_squeezenet,
    "mobilenet_v2": make_mobilenet_v2,
}


def main(names):
    jax.config.update("jax_enable_x64", True)
    for name in names or [*SYNTHETIC, *TRAINED]:
        TRAINED[name]() if name in TRAINED else make_synthetic(name)


if __name__ == "__main__":
    main(sys.argv[1:])
