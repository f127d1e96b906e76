"""What happens to relevance on its way: the hooks of the interpreter that filter it, start it and measure it.

All of them are identities in value. A *mask* changes the coefficient at a layer's output, a *seed* makes it a source of
relevance, and a *slot* is an array of zeros whose cotangent is what a gauge reads off the relevance that passes: so
measurements come out of the pass backwards as derivatives do, stacked by step where the place is inside of a loop.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .jaxprs import Equation, Value, varying_axes
from .layers import LayerView
from .structure import LINEAR_KINDS, Layer, Plain, Section
from .surrogate import scale_tangent, wide_dtype, widen, with_tangent

Place = Layer | Equation


class Key(NamedTuple):
    """A hook of a place, by `name`, and its `number` where there may be several.

    Of its output there are any number of "mask" and "seed", and the slots "out" (what reaches it) and "kept" (what its
    masks leave of that); of its operands the slot "into" (what it hands on); and "marks", "mark relatives": see `marked`.
    """

    place: Place
    name: str
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Taps:
    """Hooks by place. `arrays` holds masks, seeds and slots; those in `stepped` have one leading axis for each loop around.

    `blocked` are values that a place hands nothing to. `gauge(arrays, coefficients, relevances)` is what a slot receives
    of what passes it, a pytree like the slot; a relevance is None where nothing is handed out regardless of the value.
    """

    arrays: Mapping[Key, Any] = dataclasses.field(default_factory=dict)
    stepped: frozenset[Key] = frozenset()
    blocked: Mapping[Any, frozenset[Value]] = dataclasses.field(default_factory=dict)
    gauge: Callable[..., Any] | None = None

    def into(self, place: Place, values: Sequence[Value], arrays: list, relatives: list) -> tuple[list, list]:
        """The live operands `values` of a place, as it is to see them."""
        arrays, relatives = self._measured(Key(place, "into"), arrays, relatives)
        for i, value in enumerate(values):
            if value in self.blocked.get(place, ()):
                arrays[i] = with_tangent(arrays[i], jnp.zeros_like(arrays[i]))
                relatives[i] = None if relatives[i] is None else jnp.zeros_like(relatives[i])
        return arrays, relatives

    def out(self, place: Place, arrays: list, relatives: list) -> tuple[list, list]:
        """The outputs of a place, as the rest of the program is to see them."""
        arrays, relatives = self._measured(Key(place, "kept"), arrays, relatives)
        for mask in self._all(place, "mask"):
            arrays = [masked(a, mask) for a in arrays]
            relatives = [r if r is None else masked(r, mask) for r in relatives]
        return self._measured(Key(place, "out"), arrays, relatives)

    def started(self, layer: Layer, array: jax.Array) -> list[jax.Array]:
        """The relevances that start at a layer, whose output is `array`."""
        return [_started(array, seed(array) if callable(seed) else seed) for seed in self._all(layer, "seed")]

    def adds_relevance(self, layer: Layer) -> bool:
        """Whether a hook may give a coefficient to elements of the output that what reads it gives none."""
        return any(True for _ in self._all(layer, "seed")) or any(map(callable, self._all(layer, "mask")))

    def slot(self, place: Place, name: str) -> Any:
        """The slot of a place, or None."""
        return self.arrays.get(Key(place, name))

    def _all(self, place: Place, name: str) -> Iterator[Any]:
        for number in itertools.count():
            if Key(place, name, number) not in self.arrays:
                return
            yield self.arrays[Key(place, name, number)]

    def _measured(self, key: Key, arrays: list, relatives: list) -> tuple[list, list]:
        arrays, relatives = list(arrays), list(relatives)
        if key not in self.arrays or self.gauge is None:
            return arrays, relatives
        on = [i for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.inexact)]
        shown, handed = _through(self.gauge, [arrays[i] for i in on], [relatives[i] for i in on], self.arrays[key])
        for i, a, r in zip(on, shown, handed, strict=True):
            arrays[i], relatives[i] = a, r
        return arrays, relatives

    def scanned(self, body: Section) -> dict[Key, Any]:
        """What the steps of a loop around `body` get one slice of each."""
        inside = set(places(body))
        return {key: array for key, array in self.arrays.items() if key in self.stepped and key.place in inside}

    def with_arrays(self, arrays: Mapping[Key, Any]) -> "Taps":
        """The same taps with other arrays: the slots to differentiate by, the slices for one step of a loop."""
        return dataclasses.replace(self, arrays={**self.arrays, **arrays})


def places(section: Section):
    """All layers and plain equations of a section, those of bodies included, in order of execution."""
    for step in section.flat():
        yield from step.equations if isinstance(step, Plain) else (step,)


def loops_around(calls: Sequence[Equation]) -> tuple[int, ...]:
    """The numbers of steps of the loops among `calls`, from the outermost inwards."""
    return tuple(eqn.params["length"] for eqn in calls if eqn.name == "scan")


def masked(array: jax.Array, mask: Any) -> jax.Array:
    """`array`, whose coefficient is multiplied by `mask`, or goes through the transpose of `mask` where it is a function."""
    if callable(mask):
        return with_tangent(array, mask(array))
    return scale_tangent(array, jnp.broadcast_to(jnp.asarray(mask, wide_dtype(array)), array.shape))


def marked(marks: Any, rule: Any, view: LayerView, z: jax.Array) -> tuple[Any, LayerView, jax.Array]:
    """A rule, its layer and the layer's output, with bias and stabiliser multiplied by the two `marks`, which are 1.

    The relevance of a mark is then what the rule leaves to the bias, or to the stabiliser. A rule with two parts is left
    as it is: its relative part gives away again what the other keeps.
    """
    if marks is None or (rule.is_relative and rule.has_coefficients):
        return rule, view, z
    if hasattr(rule, "epsilon") and dataclasses.is_dataclass(type(rule)):
        epsilon = jnp.asarray(rule.epsilon, jnp.result_type(float, rule.epsilon))
        rule = dataclasses.replace(rule, epsilon=epsilon * marks[1].astype(epsilon.dtype))
    if view.kind in LINEAR_KINDS:
        bias = jnp.where(jnp.isfinite(view.bias), view.bias, jnp.zeros_like(view.bias))
        scaled = (widen(bias) * marks[0].astype(wide_dtype(bias))).astype(bias.dtype)
        view = view.with_bias(scaled)
        z = with_tangent(z, z + (scaled - bias))
    return rule, view, z


def relevance(array: jax.Array, coefficient: jax.Array, relative: jax.Array | None) -> jax.Array:
    """`array * coefficient + relative`. What is infinite (a mask) and has the coefficient 0 has no relevance."""
    void = jnp.isinf(array) & (coefficient == 0)
    proportional = jnp.where(void, jnp.zeros_like(array), array) * coefficient
    return proportional if relative is None else proportional + relative


def _started(array: jax.Array, seed: Any) -> jax.Array:
    """The relevance `sum(array * seed)`, whose coefficient is `seed`."""
    total = jnp.sum(array * jnp.broadcast_to(jnp.asarray(seed, array.dtype), array.shape)).real
    return with_tangent(total, jnp.sum(masked(array, seed)).real)


def _through(measure: Callable[..., Any], arrays: list, relatives: list, slot: Any) -> tuple[list, list]:
    """Arrays and relatives as they are; the cotangent of `slot` is `measure(arrays, coefficients, relevances)`."""

    @jax.custom_vjp
    def through(arrays, relatives, slot):
        return arrays, relatives

    def forward(arrays, relatives, slot):
        return (arrays, relatives), arrays

    def backward(arrays, cotangents):
        coefficients, relevances = cotangents
        return coefficients, relevances, measure(arrays, coefficients, relevances)

    through.defvjp(forward, backward)
    return through(arrays, relatives, _varying(slot, arrays))


def _varying(slot: Any, arrays: list) -> Any:
    """`slot`, varying over the devices of a `shard_map` as the arrays do: what the devices measure adds up."""
    axes = varying_over(arrays)
    return jax.tree.map(lambda s: jax.lax.pcast(s, axes, to="varying") if axes else s, slot)


def varying_over(arrays: Sequence[Any]) -> tuple[str, ...]:
    """The axes of a device mesh over which any of the arrays varies, in a `shard_map`."""
    return tuple(frozenset[str]().union(*map(varying_axes, arrays)))
