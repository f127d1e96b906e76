"""Sums of several affine layers into one preactivation, as in a recurrent cell: `x W + h U + b`.

To a rule with a stabiliser they are one layer with one denominator, which stands where the sum is complete.
"""

from collections.abc import Iterable

from . import primitives as prims
from .jaxprs import Value
from .structure import AFFINE_KINDS, Layer, Plain, Step


def preactivations(steps: Iterable[Step]) -> dict[Layer, str]:
    """ "total" or "part" for the layers of a section that make up sums of affine layers."""
    made_of: dict[Value, list[Layer]] = {}  # the layers that a sum of affine layers consists of, as far as it goes
    found: dict[Layer, str] = {}
    for step in steps:
        if isinstance(step, Plain):
            for eqn in step.equations:
                live = [v for v in eqn.inputs if v in made_of]
                if live and eqn.name in prims.SELECTION:
                    made_of.update((v, [layer for u in live for layer in made_of[u]]) for v in eqn.outputs)
        elif isinstance(step, Layer):
            if step.kind in AFFINE_KINDS:
                made_of[step.output] = [step]
            if step.kind == "gate":  # held constant, a gate is a factor of the weights
                signals = [v for v, role in zip(step.live, step.roles, strict=True) if role == "signal"]
                if len(signals) == 1 and signals[0] in made_of:
                    made_of[step.output] = made_of[signals[0]]
                continue
            begun = any(part in found for part in made_of.get(step.live[0], ()))
            if (step.kind == "add" or (step.kind == "scale" and begun)) and all(v in made_of for v in step.live):
                parts = [layer for v in step.live for layer in made_of[v]]
                if len(set(parts)) < len(parts):  # a difference of two outputs of one layer
                    continue
                found.update(dict.fromkeys(parts, "part"))
                found[step] = "total"
                made_of[step.output] = [*parts, step]
    return found
