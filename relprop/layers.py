"""What a rule sees of a layer: its parts, evaluated, with effective weights.

An affine layer is `z = layer.linear(x) + layer.bias`. Its `x` is the input of the mixing primitive without any shift:
scales and reshapes before the primitive have been applied, so that `x[i] * w[i, j]` are the contributions to `z[j]`
whatever chain the layer is made of. Scales after the primitive are folded into the weight.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import primitives as prims
from .axes import dims_forward, proper, summing, weight_dims
from .jaxprs import Constant, Equation, Value, read, varying_axes
from .structure import Layer

_LINEAR_LINKS = prims.PURE_RESHAPE | prims.SCALES

Elementwise = Callable[[jax.Array], jax.Array]


def run(equations: Sequence[Equation], env: dict, start: dict) -> dict:
    """Evaluate `equations` with operands from `start`, else from `env`; returns what they produce."""
    local = dict(start)
    for eqn in equations:
        operands = [local[v] if v in local else read(env, v) for v in eqn.inputs]
        local.update(zip(eqn.outputs, eqn.evaluate(*operands), strict=True))
    return local


class LayerView:
    """A layer at run time: its description (`info`) and the values of everything that it reads."""

    rectified: bool = False
    """Whether relevance reaches the output only where it is positive, because all that reads it is a rectifier."""

    def __init__(self, info: Layer, env: dict):
        self.info = info
        self._env = env
        self._found: dict[Any, tuple[jax.Array, jax.Array]] = {}

    def once(self, f: Callable[..., jax.Array], x: jax.Array, *options: Any) -> jax.Array:
        """`f(self, x, *options)`, which must not depend on the bias, traced once for each array `x`.

        XLA merges equal products, but not the sums over devices that follow them where weights are sharded.
        """
        key = (f, id(x), *options)
        if key not in self._found:
            self._found[key] = (x, f(self, x, *options))  # as long as `x` is kept, no other array has its id
        return self._found[key][1]

    def evaluate(self, *inputs: jax.Array) -> jax.Array:
        """The layer's own equations at `inputs`."""
        if len(self.info.equations) == 1:  # by position: one value may be two operands
            (eqn,) = self.info.equations
            live = set(self.info.live)
            places = [i for i, v in enumerate(eqn.inputs) if v in live]
            if [eqn.inputs[i] for i in places] == list(self.info.live):
                given = dict(zip(places, inputs, strict=True))
                operands = [given[i] if i in given else read(self._env, v) for i, v in enumerate(eqn.inputs)]
                return eqn.evaluate(*operands)[eqn.outputs.index(self.info.output)]
        start = dict(zip(self.info.live, inputs, strict=True))
        return run(self.info.equations, self._env, start)[self.info.output]

    def jointly(self, x: jax.Array) -> jax.Array:
        """A norm as a function of its signal, statistic included."""
        return run(self.info.joint, self._env, {self.info.live[0]: x})[self.info.output]

    def split(self):
        """The arrays that the layer reads, and a function that builds the layer from such arrays.

        For rules with a backward function of their own, which must not close over tracers.
        """
        made = {v for eqn in self.info.equations for v in eqn.outputs}.union(self.info.live)
        reads = [v for eqn in self.info.equations for v in eqn.inputs if v not in made and not isinstance(v, Constant)]
        reads = list(dict.fromkeys(reads))

        def rebuild(arrays):
            return type(self)(self.info, dict(zip(reads, arrays, strict=True)))

        return [self._env[v] for v in reads], rebuild

    @property
    def kind(self) -> str:
        return self.info.kind

    @property
    def reads_numbers(self) -> bool:
        """Whether all that the layer reads besides its inputs are numbers, so that it can be evaluated at scalars."""
        made = {v for eqn in self.info.equations for v in eqn.outputs}.union(self.info.live)
        return all(v in made or v.ndim == 0 for eqn in self.info.equations for v in eqn.inputs)

    def input(self, x: jax.Array, keep: frozenset[str] = _LINEAR_LINKS) -> jax.Array:
        """What a rule receives as `x` for a layer input `x`."""
        return x

    @cached_property
    def bias(self) -> jax.Array:
        """What the layer gives for inputs of 0, in the shape of its output."""
        return self.evaluate(*(jnp.zeros_like(read(self._env, v)) for v in self.info.live))

    def with_bias(self, bias: jax.Array) -> "LayerView":
        """The same layer with another bias; what has been evaluated of its weights is kept."""
        view = copy.copy(self)
        view.bias = bias
        return view

    def frozen(self, index: int = 0) -> jax.Array:
        """An operand that the layer holds constant: the statistic of a norm."""
        return read(self._env, self.info.frozen[index])


class AffineView(LayerView):
    """An affine layer as rules see it. `layer(x)`, `layer.linear(x)`, `layer.bias`, `layer.with_weights(f)`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer at `x`, bias included."""
        return self.linear(x) + self.bias

    def linear(self, x: jax.Array) -> jax.Array:
        """The layer at `x` without its bias."""
        return self._after(self._mix({self._operand: x}), keep=_LINEAR_LINKS)

    def with_weights(self, f: Elementwise) -> Callable[[jax.Array], jax.Array]:
        """The linear map whose weights are `f(weight)`, elementwise, without bias.

        Where a factor `q` after the core cannot be folded into the weight (it differs from example to example), the map
        is `|q| f(sign(q) weight)`: the same for every `f` with `f(a w) = a f(w)` for `a > 0`, and in all ratios.
        """

        if self.info.foldable:
            weight = f(self.weight)
            return lambda x: self._mix_weights(weight, x)
        factor = self._after(self._fill_mixed(self._mixed, 1), keep=_LINEAR_LINKS)
        up, down = f(self.weight), f(-self.weight)
        return lambda x: jnp.abs(factor) * jnp.where(factor < 0, self._mix_weights(down, x), self._mix_weights(up, x))

    def by_sign(self, f: Elementwise, g: Elementwise) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The map of the positive and the negative part of an input, the one with the weights `f(w)`, the other with `g(w)`.

        One product, where the primitive sums over something. Of an input that is known to be >= 0 the negative part is left
        out.
        """
        plus = self.with_weights(f)
        if self.nonnegative:
            return lambda x, _: plus(x)
        paired = summing(self.info.core, self._weight) if self.info.foldable else None
        if paired is None:
            minus = self.with_weights(g)
            return lambda x, y: plus(x) + minus(y)
        core, pair, pair_weights = paired
        weights = pair_weights(f(self.weight), g(self.weight))
        return lambda x, y: self._mix_weights(weights, pair(x, y), core)

    def _mix_weights(self, weight: jax.Array, x: jax.Array, core: Equation | None = None) -> jax.Array:
        value = self._mix({self._operand: x, self._weight: weight.astype(self._weight_dtype)}, core)
        return self._after(jnp.broadcast_to(value, self._mixed.shape), keep=prims.PURE_RESHAPE)

    @property
    def nonnegative(self) -> bool:
        """Whether the input is known to be >= 0, from the structure of the program alone."""
        return self.info.nonnegative

    @property
    def _weight(self) -> Value:
        return self.info.frozen[0]

    @property
    def _weight_dtype(self):
        """The weight's dtype; that of the other operand for weights that are integers (quantised ones)."""
        return (self._weight if self._weight.carries_relevance else self._operand).dtype

    @property
    def _operand(self) -> Value:
        return self.info.pre[-1].outputs[0] if self.info.pre else self.info.live[0]

    @property
    def _mixed(self) -> Value:
        """What the mixing primitive makes, summed over devices where they share its product."""
        return (self.info.core, *self.info.device_sums)[-1].outputs[0]

    def _mix(self, operands: dict[Value, jax.Array], core: Equation | None = None) -> jax.Array:
        return run((core or self.info.core, *self.info.device_sums), self._env, operands)[self._mixed]

    @cached_property
    def weight(self) -> jax.Array:
        """The effective weight: that of the mixing primitive, times every factor that follows it if it can be folded."""
        weight = read(self._env, self._weight).astype(self._weight_dtype)
        core = self.info.core
        scaled = self.info.foldable and _is_scaled(self.info.post, self._mixed)
        if not scaled or 0 in self._mixed.shape:
            return weight
        blank = self._fill_mixed(self._mixed, 1)
        # Chains are diagonal up to reshapes: the transpose applied to ones is the factor of each core output.
        _, transpose = jax.vjp(lambda v: self._after(v, keep=_LINEAR_LINKS), blank)
        (factor,) = transpose(self._fill_mixed(self.info.output, 1))
        _, pairs = weight_dims(core, self._weight)
        outputs = [out for out, _ in pairs]
        index = tuple(slice(None) if d in outputs else slice(0, 1) for d in range(factor.ndim))
        others = tuple(d for d in range(factor.ndim) if d not in outputs)
        factor = lax.squeeze(factor[index], others)
        kept = sorted(outputs)  # the order in which the remaining dimensions stand
        order = sorted(pairs, key=lambda pair: pair[1])
        factor = lax.transpose(factor, [kept.index(out) for out, _ in order])
        shape = [1] * weight.ndim
        for out, d in pairs:
            shape[d] = self._mixed.shape[out]
        return weight * factor.reshape(shape).astype(weight.dtype)

    @cached_property
    def bias(self) -> jax.Array:
        """What the layer gives for an input of 0, in the shape of its output."""
        if any(e.name in prims.SHIFTS for e in self.info.pre):
            shift = self._before(self._fill(self.info.live[0], 0))
            value = jnp.broadcast_to(self._mix({self._operand: self._shrink(shift)}), self._mixed.shape)
        else:
            value = self._fill_mixed(self._mixed, 0)
        return self._after(value)

    @property
    def has_bias(self) -> bool:
        return any(e.name in prims.SHIFTS for e in self.info.pre + self.info.post)

    def input(self, x: jax.Array, keep: frozenset[str] = _LINEAR_LINKS) -> jax.Array:
        """The mixing primitive's operand for a layer input `x`, without shifts (or only reshaped)."""
        return self.once(AffineView._before, x, keep)

    @cached_property
    def input_scale(self) -> jax.Array:
        """The factor by which each input is scaled before it is mixed, in the shape of `x`."""
        return self.input(self._fill(self.info.live[0], 1))

    def _fill(self, value: Value, number) -> jax.Array:
        """An array for `value` with one number in it, sharded and varying over devices as the weight is."""
        return lax.full_like(read(self._env, self._weight), number, value.dtype, value.shape)

    def _fill_mixed(self, value: Value, number) -> jax.Array:
        """As `_fill`, for a value behind the mixing primitive: equal on devices where its sum over devices is."""
        if not self.info.device_sums:
            return self._fill(value, number)
        axes = set(varying_axes(read(self._env, self._weight))).difference(
            *(e.params["axes"] for e in self.info.device_sums)
        )
        filled = jnp.full(value.shape, number, value.dtype)
        return lax.pcast(filled, tuple(axes), to="varying") if axes else filled

    def _before(self, x, keep=None):
        return _chain(self.info.pre, self._env, self.info.live[0], x, keep)

    def _after(self, value, keep=None):
        return _chain(self.info.post, self._env, self._mixed, value, keep)

    def constant(self, value: Any) -> jax.Array:
        """The mixing primitive's operand for an input that is a number, or an array that broadcasts to the layer's input.

        Of many equal examples one is kept, which broadcasts to the others.
        """
        source = self.info.live[0]
        value = jnp.asarray(value, source.dtype)
        dims = frozenset(source.ndim - value.ndim + d for d in proper(value.shape))
        for eqn in self.info.pre:
            dims = dims_forward(eqn, dims) if eqn.name in prims.PURE_RESHAPE else dims
        return self._shrink(self.input(jnp.broadcast_to(value, source.shape)), dims)

    def _shrink(self, shift: jax.Array, dims: frozenset[int] = frozenset()) -> jax.Array:
        """Keep one of many equal examples of what varies along `dims`, so that its product costs next to nothing."""
        core, operand = self.info.core, self._operand
        position = next(i for i, v in enumerate(core.inputs) if v is operand)
        if core.name == "dot_general":
            contract, batch = core.params["dimension_numbers"]
            spare = set(range(operand.ndim)) - set(contract[position]) - set(batch[position])
        elif core.name == "conv_general_dilated" and position == 0 and core.params["batch_group_count"] == 1:
            spare = {core.params["dimension_numbers"].lhs_spec[0]}
        else:
            spare = set()
        spare = spare - self.info.shift_dims - dims
        index = tuple(slice(0, 1) if d in spare else slice(None) for d in range(operand.ndim))
        return shift[index]


def _is_scaled(equations: Sequence[Equation], source: Value) -> bool:
    for eqn in equations:
        if eqn.name in prims.SCALES or (eqn.name == "sub" and eqn.inputs[1] is source):
            return True
        source = eqn.outputs[0]
    return False


def _chain(equations, env, source: Value, x, keep=None):
    """Run a chain at `x`. With `keep`, equations of other primitives hand their live operand on unchanged."""
    local = {source: x}
    value = source
    for eqn in equations:
        if keep is None or eqn.name in keep:
            local[eqn.outputs[0]] = run((eqn,), env, local)[eqn.outputs[0]]
        elif eqn.name == "sub" and eqn.inputs[1] is value and "mul" in keep:
            local[eqn.outputs[0]] = -local[value]
        else:
            local[eqn.outputs[0]] = local[value]
        value = eqn.outputs[0]
    return local[value]
