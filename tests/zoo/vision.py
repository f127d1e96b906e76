"""Networks over space: images, videos, signals; convolutions, patches and norms."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from .base import conv, dense, from_equinox, from_nnx, layer_norm, linen, model, row, sample, weights


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"param_dtype": jnp.float64}
        x = nn.relu(nn.BatchNorm(use_running_average=True, **options)(nn.Conv(4, (3, 3), **options)(x)))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(5, (3, 3), **options)(x))
        x = nn.avg_pool(nn.BatchNorm(use_running_average=True, **options)(x), (2, 2), strides=(2, 2))
        return nn.Dense(3, **options)(x.reshape(x.shape[0], -1))


@model(library="linen")
def cnn_linen():
    return linen(ConvNet(), sample(2, 6, 6, 2))


class NnxConvNet(nnx.Module):
    def __init__(self, rngs):
        options = {"rngs": rngs, "param_dtype": jnp.float64}
        self.conv = nnx.Conv(2, 4, (3, 3), **options)
        self.norm = nnx.BatchNorm(4, use_running_average=True, **options)
        self.dense = nnx.Linear(36, 3, **options)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))
        return self.dense(x.reshape(x.shape[0], -1))


@model(library="nnx")
def cnn_nnx():
    return from_nnx(NnxConvNet, sample(2, 6, 6, 2))


@model(library="equinox")
def cnn_equinox():
    def make(key):
        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, axis_name="batch", mode="batch", inference=True)
        first, last = eqx.nn.Conv2d(2, 4, 3, key=key), eqx.nn.Linear(16, 3, key=key)
        return {"first": first, "norm": norm, "state": state, "pool": eqx.nn.AvgPool2d(2, 2), "last": last}

    def call(layers, x):
        def single(x):
            x, _ = layers["norm"](layers["first"](x), layers["state"])
            return layers["last"](layers["pool"](jax.nn.relu(x)).reshape(-1))

        return jax.vmap(single, axis_name="batch")(x)

    return from_equinox(make, sample(2, 2, 6, 6), call=call)


def batch_norm(params, x, name):
    mean, var, scale, shift = (row(params[f"{name}_{part}"], x) for part in ("mean", "var", "scale", "shift"))
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + shift


def norm_shapes(name, n):
    return {f"{name}_{part}": (n,) for part in ("mean", "var", "scale", "shift")}


@model()
def resnet():
    kernels = {"stem": (3, 3, 2, 4), "a": (3, 3, 4, 4), "b": (3, 3, 4, 4), "c": (3, 3, 4, 6), "d": (3, 3, 6, 6)}
    norms = {k: v for name, shape in kernels.items() for k, v in norm_shapes(f"bn_{name}", shape[-1]).items()}
    params = weights(**kernels, **norms, short=(1, 1, 4, 6), out=(6, 3), out_b=(3,))

    def fn(params, x):
        def layer(x, name, stride=1):
            return batch_norm(params, conv(params, x, name, stride), f"bn_{name}")

        x = jax.nn.relu(layer(x, "stem"))
        x = jax.nn.relu(x + layer(jax.nn.relu(layer(x, "a")), "b"))
        x = jax.nn.relu(conv(params, x, "short", 2) + layer(jax.nn.relu(layer(x, "c", 2)), "d"))
        return dense(params, x.mean((1, 2)), "out")

    return fn, params, sample(2, 6, 6, 2)


@model()
def mobile_squeeze_excite():
    params = weights(
        up=(1, 1, 2, 6), up_b=(6,), depth=(3, 3, 1, 6), depth_b=(6,), down=(1, 1, 6, 4), squeeze=(6, 3), excite=(3, 6),
        excite_b=(6,), out=(4, 3),
    )  # fmt: skip

    def fn(params, x):
        x = jax.nn.hard_swish(conv(params, x, "up"))
        x = jax.nn.relu6(conv(params, x, "depth", groups=6))
        gate = jax.nn.hard_sigmoid(dense(params, jax.nn.relu(dense(params, x.mean((1, 2)), "squeeze")), "excite"))
        return dense(params, conv(params, x * gate[:, None, None], "down").mean((1, 2)), "out")

    return fn, params, sample(2, 5, 5, 2)


@model()
def convnext():
    params = weights(
        stem=(2, 2, 2, 4), depth=(3, 3, 1, 4), norm=(4,), up=(4, 8), up_b=(8,), down=(8, 4), layer_scale=(4,), out=(4, 3)
    )

    def fn(params, x):
        x = conv(params, x, "stem", 2)
        y = layer_norm(params, conv(params, x, "depth", groups=4), "norm")
        y = dense(params, jax.nn.gelu(dense(params, y, "up"), approximate=False), "down")
        return dense(params, (x + y * row(params["layer_scale"], y)).mean((1, 2)), "out")

    return fn, params, sample(2, 6, 6, 2)


@model()
def local_response_norm():
    params = weights(a=(3, 3, 2, 6), a_b=(6,), out=(6, 3))

    def fn(params, x):
        x = jax.nn.relu(conv(params, x, "a"))
        near = lax.reduce_window(jnp.square(x), 0.0, lax.add, (1, 1, 1, 3), (1, 1, 1, 1), "SAME")
        x = x / (2.0 + 0.5 * near) ** 0.75
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return dense(params, x.mean((1, 2)), "out")

    return fn, params, sample(2, 6, 6, 2)


@model()
def wave_net():
    params = weights(a=(3, 2, 4), a_b=(4,), filter=(2, 4, 4), gate=(2, 4, 4), gate_b=(4,), skip=(1, 4, 4), out=(4, 3))

    def fn(params, x):
        x = conv(params, x, "a", padding=((2, 0),))
        past = ((1, 0),)
        y = jnp.tanh(conv(params, x, "filter", padding=past)) * jax.nn.sigmoid(conv(params, x, "gate", padding=past))
        return dense(params, (x + conv(params, y, "skip"))[:, -1], "out")

    return fn, params, sample(2, 6, 2)


@model()
def video_3d():
    params = weights(a=(2, 3, 3, 2, 4), a_b=(4,), b=(2, 2, 2, 4, 4), b_b=(4,), out=(4, 3))

    def fn(params, x):
        x = jax.nn.relu(conv(params, x, "a"))
        x = jax.nn.relu(conv(params, x, "b", 2, "VALID"))
        return dense(params, x.max((1, 2, 3)), "out")

    return fn, params, sample(2, 4, 4, 4, 2)


def unet(method):
    params = weights(
        down=(3, 3, 2, 4), down_b=(4,), low=(3, 3, 4, 4), low_b=(4,), up=(3, 3, 8, 4), up_b=(4,), out=(1, 1, 4, 2)
    )

    def fn(params, x):
        high = jax.nn.relu(conv(params, x, "down"))
        low = lax.reduce_window(high, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        low = jax.image.resize(jax.nn.relu(conv(params, low, "low")), high.shape, method)
        x = jax.nn.relu(conv(params, jnp.concatenate([high, low], -1), "up"))
        return conv(params, x, "out")

    return fn, params, sample(2, 4, 4, 2)


@model()
def unet_bilinear():
    return unet("bilinear")


@model()
def unet_nearest():
    return unet("nearest")


@model()
def eeg_shallow_net():
    """Square, average, logarithm: log of the power per band. Schirrmeister et al. 2017."""
    params = weights(time=(3, 1, 1, 4), space=(1, 3, 4, 4), **norm_shapes("bn", 4), out=(12, 2), out_b=(2,))

    def fn(params, x):
        x = batch_norm(params, conv(params, conv(params, x, "time"), "space", padding="VALID"), "bn")
        power = lax.reduce_window(jnp.square(x), 0.0, lax.add, (1, 4, 1, 1), (1, 2, 1, 1), "VALID") / 4
        return dense(params, jnp.log(jnp.maximum(power, 1e-6)).reshape(2, -1), "out")

    return fn, params, sample(2, 8, 3, 1)


@model()
def eeg_variance_pooling():
    params = weights(time=(3, 1, 1, 4), space=(1, 3, 4, 4), out=(4, 2), out_b=(2,))

    def fn(params, x):
        x = conv(params, conv(params, x, "time"), "space", padding="VALID")
        return dense(params, jnp.log1p(x.var(1)).reshape(2, -1), "out")

    return fn, params, sample(2, 8, 3, 1)


class GroupNormNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"param_dtype": jnp.float64}
        x = nn.relu(nn.GroupNorm(2, **options)(nn.Conv(4, (3, 3), **options)(x)))
        return nn.Dense(3, **options)(nn.silu(nn.Conv(4, (3, 3), **options)(x)).mean((1, 2)))


@model(library="linen")
def group_norm_linen():
    return linen(GroupNormNet(), sample(2, 5, 5, 2))


@model(library="nnx")
def instance_norm_nnx():
    def make(rngs):
        options = {"rngs": rngs, "param_dtype": jnp.float64}
        layers = [nnx.Conv(2, 4, (3, 3), **options), nnx.InstanceNorm(4, **options), nnx.relu]
        return nnx.Sequential(*layers, lambda x: x.max((1, 2)), nnx.Linear(4, 3, **options))

    return from_nnx(make, sample(2, 5, 5, 2))


@model(target=None)
def transposed_autoencoder():
    params = weights(a=(3, 3, 1, 4), a_b=(4,), b=(3, 3, 4, 2), b_b=(1,))

    def fn(params, x):
        x = jax.nn.relu(conv(params, x, "a", 2))
        x = lax.conv_transpose(x, params["b"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.nn.sigmoid(x[..., :1] + row(params["b_b"], x))

    return fn, params, sample(2, 6, 6, 1, low=0.0)


@model()
def mlp_mixer():
    params = weights(
        patch=(2, 2, 2, 6), n1=(6,), t1=(4, 5), t1_b=(5,), t2=(5, 4), n2=(6,), c1=(6, 8), c1_b=(8,), c2=(8, 6), out=(6, 3)
    )

    def fn(params, x):
        x = conv(params, x, "patch", 2).reshape(2, 4, 6)
        y = jnp.swapaxes(layer_norm(params, x, "n1"), 1, 2)
        x = x + jnp.swapaxes(dense(params, jax.nn.gelu(dense(params, y, "t1")), "t2"), 1, 2)
        x = x + dense(params, jax.nn.gelu(dense(params, layer_norm(params, x, "n2"), "c1")), "c2")
        return dense(params, x.mean(1), "out")

    return fn, params, sample(2, 4, 4, 2)
