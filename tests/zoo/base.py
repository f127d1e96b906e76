"""How a model of the zoo is registered, and the blocks that several of them are built of."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


@dataclasses.dataclass(frozen=True)
class Model:
    """A small network: `build()` returns `(fn, params, x)` with `fn(params, x)`; its explained argument is `x`.

    `library` is what it is written in: jax, linen, nnx or equinox. `target` is what is explained of its output. `tags`:
    `attention`, `recurrent` and `state space` (presets made for them apply), `tokens` (`x` is integers), `bfloat16`,
    `float32` (the library casts to it inside, as `jax.nn.dot_product_attention` does around its softmax, which takes
    JAX's default promotion), `no vmap` (JAX has no batching rule for what it does).
    """

    name: str
    build: Callable[[], tuple[Callable[..., Any], Any, jax.Array]]
    library: str = "jax"
    target: Any = "top"
    tags: frozenset[str] = frozenset()


ZOO: dict[str, Model] = {}


def model(*tags, library="jax", target="top"):
    """Registers the builder that it decorates under the builder's name."""

    def register(build):
        assert build.__name__ not in ZOO
        ZOO[build.__name__] = Model(build.__name__, build, library, target, frozenset(tags))
        return build

    return register


def sample(*shape, seed=1, low=-1.0, high=1.0):
    """An input: uniform in float64."""
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, shape))


def tokens(*shape, below, seed=1):
    """An input of integers."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, below, shape))


def fill(shapes, seed=0):
    """Parameters in float64 in the form of a tree of shapes: of unit gain, biases of both signs, variances positive.

    Drawn by numpy: initialisers of libraries would compile dozens of small programs for every model.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path)
        if any(word in name for word in ("var", "scale", "norm", "state")):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        elif len(leaf.shape) < 2:
            value = 0.3 * rng.normal(size=leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) * math.sqrt(leaf.shape[-1] / math.prod(leaf.shape))
        return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def weights(seed=0, **shapes):
    """A dict of parameters by name and shape."""
    return fill({name: jax.ShapeDtypeStruct(shape, jnp.float64) for name, shape in shapes.items()}, seed)


def linen(module, x, seed=0, **options):
    """`(fn, params, x)` of a linen module."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, **options))
    return (lambda params, x: module.apply(params, x, **options)), fill(shapes, seed), x


def from_nnx(make, x, seed=0):
    """`(fn, params, x)` of an nnx module that `make(rngs)` makes."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return (lambda state, x: nnx.merge(graph, state)(x)), fill(shapes, seed), x


def from_equinox(make, x, seed=0, call=lambda module, x: jax.vmap(module)(x)):
    """`(fn, params, x)` of an equinox module that `make(key)` makes; by default vmapped over the batch."""
    shapes, static = eqx.partition(
        eqx.filter_eval_shape(make, jax.random.key(0)), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    )
    return (lambda params, x: call(eqx.combine(params, static), x)), fill(shapes, seed), x


# Blocks in plain JAX. Ranks are matched by hand: the tests run under `jax_numpy_rank_promotion="raise"`.


def row(vector, like):
    """`vector` along the last axis of `like`."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def dense(params, x, name):
    """`x @ params[name]`, with the bias `params[name + "_b"]` where there is one."""
    y = jnp.tensordot(x, params[name], 1)
    bias = params.get(f"{name}_b")
    return y if bias is None else y + row(bias, y)


def conv(params, x, name, stride=1, padding="SAME", groups=1):
    """A convolution over the axes between the first and the last."""
    spatial = "DHW"[5 - x.ndim :]
    layout = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    y = lax.conv_general_dilated(
        x, params[name], (stride,) * len(spatial), padding, dimension_numbers=layout, feature_group_count=groups
    )
    bias = params.get(f"{name}_b")
    return y if bias is None else y + row(bias, y)


def layer_norm(params, x, name):
    """Layer norm over the last axis, with `scale` and without shift."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * row(params[name], x)


def rms_norm(x):
    """RMS norm over the last axis, without parameters."""
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
