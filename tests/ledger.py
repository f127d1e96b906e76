"""Where relevance goes, layer by layer: what comes out of the rules is accounted for at every edge."""

import dataclasses

import jax
import jax.numpy as jnp

from relprop.arguments import seeds
from relprop.interpreter import Interpreter
from relprop.registry import REGISTERED
from relprop.structure import Layer
from relprop.transform import _prepare


@dataclasses.dataclass
class Line:
    """One place: the relevance that reaches its output, and that it hands to its inputs; the rest is absorbed.

    `layer` is a layer, or a plain equation. In a loop both sums are over all steps.
    """

    layer: object
    out: jax.Array
    handed_on: jax.Array

    @property
    def absorbed(self):
        return self.out - self.handed_on


class Taps:
    """Every array that passes a place is multiplied by the place's own 1, whose derivative is then sum(a * c)."""

    def __init__(self, ones):
        self.ones = ones

    def into(self, place, arrays):
        return [self._tap(a, self.ones[place][0]) for a in arrays]

    def out(self, place, arrays):
        return [self._tap(a, self.ones[place][1]) for a in arrays]

    @staticmethod
    def _tap(array, one):
        if not jnp.issubdtype(jnp.result_type(array), jnp.inexact):
            return array
        # An infinite element (a mask) has no relevance, and infinity times its coefficient 0 is none either.
        finite = jnp.isfinite(array)
        return jnp.where(finite, jnp.where(finite, array, jnp.zeros_like(array)) * one.astype(array.dtype), array)


def places(section):
    """All layers and plain equations of a section, those of bodies included."""
    for step in section.flat():
        yield from (step,) if isinstance(step, Layer) else step.equations


def _total(array, coefficient):
    if not jnp.issubdtype(array.dtype, jnp.inexact):  # an integer output carries nothing
        return jnp.zeros(())
    return (array * coefficient).sum().real.astype(jnp.float64)


def ledger(fn, rules, *args, target=None, argnums=-1):
    """`(lines, input relevance, output relevance)`, through loops and branches, for rules without relative parts."""
    planned = _prepare(fn, rules, args, {}, argnums, None, target)
    assert not planned.plan.needed
    section, leaves = planned.plan.section, planned.leaves
    keys = list(places(section))
    ones = [(jnp.ones(()), jnp.ones(())) for _ in keys]
    inputs = [leaves.arrays[i] for i in leaves.explained]

    def evaluate(inputs, ones):
        operands = list(leaves.arrays)
        for i, x in zip(leaves.explained, inputs, strict=True):
            operands[i] = x
        taps = Taps(dict(zip(keys, ones, strict=True)))
        interpreter = Interpreter(planned.plan.rules, planned.plan.needed, REGISTERED, taps)
        outputs, _ = interpreter.evaluate(section, operands, [None] * len(operands))
        return outputs[: planned.explained]

    @jax.jit
    def run(inputs, ones):
        outputs, pullback = jax.vjp(evaluate, inputs, ones)
        given = seeds(outputs, target)
        coefficients, totals = pullback(given)
        at_output = sum(_total(y, s) for y, s in zip(outputs, given, strict=True))
        at_input = sum(_total(x, c) for x, c in zip(inputs, coefficients, strict=True))
        return totals, at_input, at_output

    totals, at_input, at_output = run(inputs, ones)
    lines = [Line(key, out, handed) for key, (handed, out) in zip(keys, totals, strict=True)]
    return lines, at_input, at_output
