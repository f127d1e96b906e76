"""Networks that the tests explain, in plain jax.numpy and lax, with their parameters and inputs.

Layouts are channels-last (NWC, NHWC, NDHWC), kernels spatial-in-out. Every network is a function
`network(params, x)` from a batch to logits. The scripts under `golden/` rebuild the same networks in other
frameworks from the same parameters, so whatever is random here is drawn by numpy and in float64.

- synthetic networks: `init(name)` and `sample(name)` give the parameters and the input of `NETWORKS[name]`
- `resnet`: real weights and images from `SHARED`, which a checkout may lack: mark such tests with `requires`
"""

import hashlib
import pathlib

import jax.numpy as jnp
import numpy as np
from jax import lax, nn

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"

CIFAR_MEAN = np.array([0.485, 0.456, 0.406])
CIFAR_STD = np.array([0.229, 0.224, 0.225])


def requires(path):
    """A mark that skips a test where a file of the shared data is absent."""
    import pytest  # here, because the scripts under golden/ import this module and need no pytest

    path = SHARED / path
    return pytest.mark.skipif(not path.exists(), reason=f"needs shared/data/{path.relative_to(SHARED)}")


def digest(array):
    """Identifies an array whose values may not be stored beside what was computed from it."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# Building blocks.


def _along_channels(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _dense(params, x):
    y = x @ params["kernel"]
    return y + _along_channels(params["bias"], y)


def _convolve(kernel, x, stride=1, padding="VALID", dilation=1, groups=1):
    spatial = "DHW"[5 - x.ndim :]
    rank = len(spatial)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * rank,
        padding,
        rhs_dilation=(dilation,) * rank,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
    )


def _conv(params, x, **options):
    y = _convolve(params["kernel"], x, **options)
    return y + _along_channels(params["bias"], y)


def _max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _average_pool(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


def _flatten(x):
    return x.reshape(x.shape[0], -1)


# Synthetic networks.


def dense_tanh(params, x):
    x = jnp.tanh(_dense(params["dense1"], x))
    x = jnp.tanh(_dense(params["dense2"], x))
    return _dense(params["dense3"], x)


def conv_mixed_2d(params, x):
    x = nn.relu(_conv(params["conv1"], x, stride=2, padding=((1, 2), (0, 1))))
    x = nn.relu(_conv(params["conv2"], x, padding="SAME", dilation=2, groups=2))
    x = nn.relu(_conv(params["conv3"], x, stride=2, padding="SAME"))
    return _dense(params["dense"], _flatten(x))


def conv_1d(params, x):
    x = nn.relu(_conv(params["conv1"], x, stride=2, padding=((2, 1),)))
    x = nn.relu(_conv(params["conv2"], x, padding="SAME", dilation=2))
    return _dense(params["dense"], _flatten(x))


def conv_3d(params, x):
    x = nn.relu(_conv(params["conv1"], x, padding="SAME"))
    x = nn.relu(_conv(params["conv2"], x, stride=2, padding=((0, 0), (1, 0), (0, 0))))
    return _dense(params["dense"], _flatten(x))


def _vgg(params, x, pool):
    x = nn.relu(_conv(params["conv1"], x, padding="SAME"))
    x = pool(nn.relu(_conv(params["conv2"], x, padding="SAME")))
    x = pool(nn.relu(_conv(params["conv3"], x, padding="SAME")))
    x = nn.relu(_conv(params["conv4"], x, padding="SAME"))
    x = nn.relu(_dense(params["dense1"], _flatten(x)))
    return _dense(params["dense2"], x)


def vgg_max(params, x):
    return _vgg(params, x, _max_pool)


def vgg_avg(params, x):
    return _vgg(params, x, _average_pool)


NETWORKS = {f.__name__: f for f in (dense_tanh, conv_mixed_2d, conv_1d, conv_3d, vgg_max, vgg_avg)}

_VGG_KERNELS = {
    "conv1": (3, 3, 3, 6),
    "conv2": (3, 3, 6, 8),
    "conv3": (3, 3, 8, 10),
    "conv4": (3, 3, 10, 10),
    "dense1": (90, 16),
    "dense2": (16, 6),
}
_KERNELS = {
    "dense_tanh": {"dense1": (20, 16), "dense2": (16, 12), "dense3": (12, 5)},
    "conv_mixed_2d": {
        "conv1": (3, 3, 4, 6),
        "conv2": (3, 3, 3, 8),
        "conv3": (2, 3, 8, 6),
        "dense": (36, 5),
    },
    "conv_1d": {"conv1": (5, 3, 4), "conv2": (3, 4, 6), "dense": (42, 4)},
    "conv_3d": {"conv1": (3, 3, 3, 2, 4), "conv2": (2, 2, 2, 4, 6), "dense": (72, 4)},
    "vgg_max": _VGG_KERNELS,
    "vgg_avg": _VGG_KERNELS,
}
_INPUTS = {  # shape, lowest value, highest value
    "dense_tanh": ((3, 20), -1.0, 1.0),
    "conv_mixed_2d": ((2, 9, 8, 4), -1.0, 1.0),
    "conv_1d": ((2, 14, 3), -1.0, 1.0),
    "conv_3d": ((2, 4, 5, 4, 2), -1.0, 1.0),
    "vgg_max": ((2, 12, 12, 3), -1.0, 1.0),
    "vgg_avg": ((2, 12, 12, 3), 0.0, 1.0),
}


def _rng(name, purpose):
    return np.random.default_rng([list(NETWORKS).index(name), purpose])


def init(name):
    """Parameters of `NETWORKS[name]` in float64: He-scaled kernels, biases of both signs."""
    rng = _rng(name, 0)
    params = {}
    for layer, shape in _KERNELS[name].items():
        fan_in = np.prod(shape[:-1])
        params[layer] = {
            "kernel": rng.normal(size=shape) * np.sqrt(2 / fan_in),
            "bias": np.abs(rng.normal(size=shape[-1])) * np.resize([0.2, -0.2], shape[-1]),
        }
    return params


def sample(name):
    """An input batch of `NETWORKS[name]` in float64, within `bounds(name)`."""
    shape, low, high = _INPUTS[name]
    return _rng(name, 1).uniform(low, high, size=shape)


def bounds(name):
    """The lowest and the highest value that an input of `NETWORKS[name]` may have."""
    return _INPUTS[name][1:]


def channel_bounds(name):
    """Bounds that contain `sample(name)`, different for every channel: two arrays of shape (channels,)."""
    shape, low, high = _INPUTS[name]
    widen = 0.1 * np.arange(shape[-1])
    return low - widen, high + widen[::-1]


# ResNets for CIFAR-10, with batch norm written out from the running statistics.


def _batch_norm(params, x):
    scale, bias, mean, var = (_along_channels(params[k], x) for k in ("scale", "bias", "mean", "var"))
    return scale * (x - mean) / jnp.sqrt(var + 1e-5) + bias


def _shortcut(x, features):
    """Option A of He et al. (2015): every second pixel, the new channels zero."""
    if x.shape[-1] == features:
        return x
    side = (features - x.shape[-1]) // 2
    return jnp.pad(x[:, ::2, ::2, :], ((0, 0), (0, 0), (0, 0), (side, side)))


def _block(params, x):
    """A residual block; where it widens, it also halves the resolution."""
    features = params["conv2"]["kernel"].shape[-1]
    stride = features // x.shape[-1]
    y = _convolve(params["conv1"]["kernel"], x, stride=stride, padding=((1, 1), (1, 1)))
    y = nn.relu(_batch_norm(params["bn1"], y))
    y = _convolve(params["conv2"]["kernel"], y, padding=((1, 1), (1, 1)))
    return nn.relu(_batch_norm(params["bn2"], y) + _shortcut(x, features))


def resnet(params, x):
    """ResNet-20 or -56, as deep as `params`; `x` is normalised already (see `cifar10`)."""
    x = _convolve(params["conv1"]["kernel"], x, padding=((1, 1), (1, 1)))
    x = nn.relu(_batch_norm(params["bn1"], x))
    for layer in ("layer1", "layer2", "layer3"):
        for block in params[layer].values():
            x = _block(block, x)
    return _dense(params["linear"], x.mean((1, 2)))


resnet20 = resnet56 = resnet

_BATCH_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def _from_torch(name, value):
    """Our path and layout of a parameter of the stored ResNets."""
    *path, layer, kind = name.split(".")
    if layer.startswith("bn"):
        leaf = _BATCH_NORM[kind]
    else:
        leaf = "kernel" if kind == "weight" else "bias"
        value = np.transpose(value, (2, 3, 1, 0)) if value.ndim == 4 else value.T
    path = [f"block{step}" if step.isdigit() else step for step in path]
    return (*path, layer, leaf), value


def load_resnet(path=SHARED / "resnet20" / "weights.npz"):
    """The parameters of `resnet` in float64 from a stored ResNet-20 or -56."""
    params = {}
    with np.load(path) as stored:
        for name in stored.files:
            (*steps, leaf), value = _from_torch(name, stored[name].astype(np.float64))
            node = params
            for step in steps:
                node = node.setdefault(step, {})
            node[leaf] = value
    return params


def cifar10(index):
    """CIFAR-10 test images, normalised, in float64 and NHWC, and their labels."""
    with np.load(SHARED / "cifar10" / "cifar10_test_jpeg_2000.npz") as stored:
        images, labels = stored["x"][index], stored["y"][index]
    x = images / 255
    return (x - _along_channels(CIFAR_MEAN, x)) / _along_channels(CIFAR_STD, x), labels


def cifar10_bounds():
    """What black and white become by the normalisation: two arrays of shape (3,)."""
    return (0 - CIFAR_MEAN) / CIFAR_STD, (1 - CIFAR_MEAN) / CIFAR_STD


def photo(name, side):
    """A whole photograph resized to a square: uint8, RGB, (side, side, 3)."""
    from PIL import Image  # here, because few tests need a photograph

    with Image.open(SHARED / "photos" / name) as image:
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
