"""Where relevance goes, layer by layer: what comes out of the rules is accounted for at every edge."""

import dataclasses

import jax
import jax.numpy as jnp

from relprop.arguments import seeds
from relprop.interpreter import Interpreter
from relprop.registry import REGISTERED
from relprop.transform import _prepare


@dataclasses.dataclass
class Line:
    """One layer: the relevance that reaches its output, and that it hands to its inputs; the rest is absorbed."""

    layer: object
    out: jax.Array
    handed_on: jax.Array

    @property
    def absorbed(self):
        return self.out - self.handed_on


def ledger(fn, rules, *args, target=None):
    """`(lines, input relevance, output relevance)` of layers outside of loops, for rules without relative parts."""
    planned = _prepare(fn, rules, args, {}, -1, None, target)
    assert not planned.plan.needed
    section, leaves = planned.plan.section, planned.leaves
    layers = [entry.layer for entry in planned.plan]
    taps = {
        layer.index: (
            [jnp.zeros(v.shape, v.dtype) for v in layer.live],
            jnp.zeros(layer.output.shape, layer.output.dtype),
        )
        for layer in layers
    }
    inputs = [leaves.arrays[i] for i in leaves.explained]

    def evaluate(inputs, taps):
        operands = list(leaves.arrays)
        for i, x in zip(leaves.explained, inputs, strict=True):
            operands[i] = x
        seen = {}

        def tap(index):
            def into(xs):
                seen[index] = [xs]
                return [x + t for x, t in zip(xs, taps[index][0], strict=True)]

            def out(y):
                seen[index].append(y)
                return y + taps[index][1]

            return into, out

        interpreter = Interpreter(planned.plan.rules, planned.plan.needed, REGISTERED, {i: tap(i) for i in taps})
        outputs, _ = interpreter.evaluate(section, operands, [None] * len(operands))
        return outputs[: planned.explained], seen

    outputs, pullback, seen = jax.vjp(evaluate, inputs, taps, has_aux=True)
    given = seeds(outputs, target)
    coefficients, at_taps = pullback(given)
    lines = []
    for layer in layers:
        xs, y = seen[layer.index]
        cs, c = at_taps[layer.index]
        handed = sum((x * k).sum() for x, k in zip(xs, cs, strict=True))
        lines.append(Line(layer, (y * c).sum(), handed))
    total = sum((y * s).sum() for y, s in zip(outputs, given, strict=True))
    return lines, sum((x * c).sum() for x, c in zip(inputs, coefficients, strict=True)), total
