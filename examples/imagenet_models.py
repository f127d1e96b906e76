"""MobileNetV2 and SqueezeNet 1.1 in plain JAX: functions of (params, x) and loaders of their trained weights.

Both take a batch of images (N, H, W, 3) in RGB and return logits (N, classes); no softmax. Parameters are
nested dictionaries of ``kernel`` (HWIO) and ``bias``.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# MobileNetV2, table 2 of https://arxiv.org/abs/1801.04381: expansion, output channels, repeats, first stride
MOBILENET_STAGES = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]
MOBILENET_WEIGHTS = "mobilenet_v2_1.0_224_quant_float.npz"

# SqueezeNet 1.1, https://arxiv.org/abs/1602.07360: the modules between one max pooling and the next
SQUEEZENET_STAGES = [("fire2", "fire3"), ("fire4", "fire5"), ("fire6", "fire7", "fire8", "fire9")]
SQUEEZENET_WEIGHTS = "weights.npz"
SQUEEZENET_MEAN = (123.0, 117.0, 104.0)  # red, green, blue


def conv(params, x, stride=1, padding="SAME", groups=1):
    """A convolution (N, H, W, I) -> (N, H', W', O) with its bias."""
    y = lax.conv_general_dilated(
        x,
        params["kernel"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + params["bias"].reshape(1, 1, 1, -1)


def mobilenet_v2(params, x):
    """MobileNetV2 1.0 of x (N, 224, 224, 3), preprocessed by `preprocess_mobilenet` -> logits (N, 1001).

    Batch norm is folded into the convolutions. Class 0 is the background.
    """
    x = jax.nn.relu6(conv(params["stem"], x, stride=2))
    blocks = iter(params["blocks"].values())
    for expansion, channels, repeats, first_stride in MOBILENET_STAGES:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            block = next(blocks)
            y = x if expansion == 1 else jax.nn.relu6(conv(block["expand"], x))
            y = jax.nn.relu6(conv(block["depthwise"], y, stride=stride, groups=y.shape[-1]))
            y = conv(block["project"], y)
            x = x + y if stride == 1 and x.shape[-1] == channels else y
    x = jax.nn.relu6(conv(params["head"], x))
    x = jnp.mean(x, axis=(1, 2))
    return x @ params["classifier"]["kernel"] + params["classifier"]["bias"].reshape(1, -1)


def squeezenet(params, x):
    """SqueezeNet 1.1 of x (N, 227, 227, 3), preprocessed by `preprocess_squeezenet` -> logits (N, 1000)."""
    x = jax.nn.relu(conv(params["conv1"], x, stride=2, padding="VALID"))
    for stage in SQUEEZENET_STAGES:
        x = max_pool(x)
        for name in stage:
            fire = params[name]
            x = jax.nn.relu(conv(fire["squeeze1x1"], x))
            x = jnp.concatenate([jax.nn.relu(conv(fire["expand1x1"], x)), jax.nn.relu(conv(fire["expand3x3"], x))], axis=-1)
    # A padding of 1 around a 1x1 convolution: the border holds the bias alone, and counts in the mean.
    x = jax.nn.relu(conv(params["conv10"], x, padding=[(1, 1), (1, 1)]))
    return jnp.mean(x, axis=(1, 2))


def max_pool(x):
    """3x3, stride 2; a last window that sticks out is kept (Caffe's rounding up)."""
    padding = [(0, 0), *((0, (size - 3) % 2) for size in x.shape[1:3]), (0, 0)]
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def preprocess_mobilenet(pixels):
    """RGB pixels 0..255, of shape (..., 3), integer or float -> -1..1."""
    return _as_float(pixels) / 127.5 - 1.0


def preprocess_squeezenet(pixels):
    """RGB pixels 0..255, of shape (..., 3), integer or float -> minus the mean of ImageNet."""
    pixels = _as_float(pixels)
    return pixels - jnp.asarray(SQUEEZENET_MEAN, pixels.dtype).reshape((1,) * (pixels.ndim - 1) + (3,))


def load_mobilenet_v2(folder):
    """The parameters of `mobilenet_v2` in float32 from a folder with mobilenet_v2_1.0_224_quant_float.npz."""
    stored = _load(folder, MOBILENET_WEIGHTS)
    # Numbered in execution order: stem; (expand,) depthwise and project of each block; head; classifier.
    layers = iter(sorted({key.split(".")[0] for key in stored if key.endswith(".w")}))

    def layer(axes):
        name = next(layers)
        return {"kernel": stored[f"{name}.w"].transpose(axes), "bias": stored[f"{name}.b"]}

    ordinary = (1, 2, 3, 0)  # from OHWI
    depthwise = (1, 2, 0, 3)  # from 1HWC: C groups of one input channel
    params = {"stem": layer(ordinary), "blocks": {}}
    for expansion, _, repeats, _ in MOBILENET_STAGES:
        for _ in range(repeats):
            block = {} if expansion == 1 else {"expand": layer(ordinary)}
            block |= {"depthwise": layer(depthwise), "project": layer(ordinary)}
            # Two digits, because JAX sorts the keys of a dictionary, and blocks are taken in order.
            params["blocks"][f"block_{len(params['blocks']):02d}"] = block
    params["head"] = layer(ordinary)
    classifier = layer(ordinary)  # a 1x1 convolution of a 1x1 image
    params["classifier"] = {"kernel": classifier["kernel"][0, 0], "bias": classifier["bias"]}
    return jax.tree.map(jnp.asarray, params)


def load_squeezenet(folder):
    """The parameters of `squeezenet` in float32 from a folder with weights.npz (Caffe's, OIHW, float16)."""
    stored = _load(folder, SQUEEZENET_WEIGHTS)

    def layer(name):
        kernel = stored[f"{name}.weight"].transpose(2, 3, 1, 0)
        return {"kernel": kernel.astype(np.float32), "bias": stored[f"{name}.bias"].astype(np.float32)}

    params = {"conv1": layer("conv1"), "conv10": layer("conv10")}
    # The weights were trained on blue, green, red.
    params["conv1"]["kernel"] = params["conv1"]["kernel"][:, :, ::-1]
    for fire in (fire for stage in SQUEEZENET_STAGES for fire in stage):
        params[fire] = {part: layer(f"{fire}.{part}") for part in ("squeeze1x1", "expand1x1", "expand3x3")}
    return jax.tree.map(jnp.asarray, params)


def _as_float(pixels):
    pixels = jnp.asarray(pixels)
    return pixels if jnp.issubdtype(pixels.dtype, jnp.floating) else pixels.astype(jnp.float32)


def _load(folder, name):
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has to be a folder with the trained weights in a file {name}.")
    with np.load(path) as stored:
        return dict(stored)
