"""Rules of activations and of anything else that keeps shapes: identity, pass, gradient, and the modified gradients."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from ..errors import RuleError
from ..structure import KINDS
from ..surrogate import along_rays, quotient, scale_tangent, secant, with_tangent
from .affine import positive
from .base import Rule


@dataclasses.dataclass(frozen=True)
class Identity(Rule):
    """The default of activations: `c_in = c (f(x) - f(0)) / x`, so that relevance passes unchanged where `f(0) = 0`.

    relu becomes a step, silu `sigmoid(x)`, gelu `Phi(x)`, tanh `tanh(x) / x`. What `f(0)` contributes is absorbed.
    """

    kinds: ClassVar[tuple[str, ...]] = ("activation",)
    vanishes: ClassVar[bool] = True
    absorbs: ClassVar[str] = "f(0)"

    def __call__(self, layer, x, z):
        if layer.info.homogeneous:
            one = jnp.ones((), x.dtype) if layer.reads_numbers else jnp.ones_like(x)
            return along_rays(layer.evaluate, x, one)
        return scale_tangent(x.astype(z.dtype), secant(layer.evaluate, x, z))


@dataclasses.dataclass(frozen=True)
class Pass(Rule):
    """Relevance passes unchanged, `R_in = R_out`, at any layer whose input and output have one shape.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> fn = lambda x: jnp.array([[1.0, 1.0], [0.0, 2.0]]).T @ x
        >>> rp.explain(fn, rp.Pass())(jnp.array([1.0, 2.0]))
        Array([1., 5.], dtype=float32)
    """

    kinds: ClassVar[tuple[str, ...]] = ("affine", "scale", "activation", "norm", "softmax", "max_pool", "sum_pool")
    vanishes: ClassVar[bool] = True

    def __call__(self, layer, x, z):
        return scale_tangent(x.astype(z.dtype), quotient(z, x.astype(z.dtype)))

    def check(self, info) -> None:
        super().check(info)
        if info.input_shapes[0] != info.output_shape:
            raise RuleError(
                f"Pass hands relevance on element by element, but the layer {info.address} at {info.source} takes "
                f"{info.input_shapes[0]} to {info.output_shape}."
            )


@dataclasses.dataclass(frozen=True)
class Stop(Rule):
    """No relevance passes: the layer keeps all that reaches it. At a softmax it is a part of CP-LRP (Ali et al. 2022).

    Example:
        >>> import jax, jax.numpy as jnp, relprop as rp
        >>> rp.explain(jax.nn.softmax, {"softmax": rp.Stop()})(jnp.array([1.0, 2.0])).tolist()
        [0.0, 0.0]
    """

    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __call__(self, layer, x, z):
        return jnp.zeros_like(z)


@dataclasses.dataclass(frozen=True)
class Gradient(Rule):
    """The plain derivative, `c_in = J^T c`: the default of max pooling (winner takes all) and softmax (AttnLRP)."""

    kinds: ClassVar[tuple[str, ...]] = KINDS
    vanishes: ClassVar[bool] = True
    selects: ClassVar[bool] = True

    def __call__(self, layer, x, z):
        if layer.kind != "activation":
            return layer.evaluate(*x) if isinstance(x, tuple) else layer.evaluate(x)
        # At 0 the derivative from the left, as jax.nn has it for relu.
        left = jnp.where(x == 0, jnp.full_like(x, -float(jnp.finfo(x.dtype).tiny)), x)
        return layer.evaluate(with_tangent(left, x))


def with_backward(backward: Callable[..., jax.Array], x: jax.Array, *residuals: jax.Array) -> jax.Array:
    """Return `x`; a coefficient `c` comes back as `backward(c, *residuals)`, which need not be linear in `c`."""

    @jax.custom_vjp
    def through(x, residuals):
        return x

    through.defvjp(lambda x, residuals: (x, residuals), lambda residuals, c: (backward(c, *residuals), None))
    return through(x, residuals)


@dataclasses.dataclass(frozen=True)
class GuidedBackprop(Rule):
    """`c_in = c+ f'(x) [x > 0]`: only positive coefficients pass, and only where the input is. Springenberg et al. 2015."""

    kinds: ClassVar[tuple[str, ...]] = ("activation",)
    vanishes: ClassVar[bool] = True
    linear: ClassVar[bool] = False

    def __call__(self, layer, x, z):
        _, slope = jax.jvp(layer.evaluate, (x,), (jnp.ones_like(x),))
        active = jnp.where(x > 0, slope, jnp.zeros_like(slope))
        return with_backward(lambda c, active: positive(c) * active, x.astype(z.dtype), active)


@dataclasses.dataclass(frozen=True)
class Deconvnet(Rule):
    """`c_in = c+`: the activation function is applied to the coefficient instead. Zeiler and Fergus 2014."""

    kinds: ClassVar[tuple[str, ...]] = ("activation",)
    linear: ClassVar[bool] = False

    def __call__(self, layer, x, z):
        return with_backward(positive, x.astype(z.dtype))
