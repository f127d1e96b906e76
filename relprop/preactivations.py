"""Sums of several affine layers into one preactivation, as in a recurrent cell: `x W + h U + b`.

To a rule with a stabiliser they are one layer with one denominator, which stands where the sum is complete.
"""

from collections import Counter
from collections.abc import Sequence

from . import primitives as prims
from .jaxprs import Equation, Value
from .structure import AFFINE_KINDS, Layer, Plain, Step


def preactivations(steps: Sequence[Step], exits: set[Value]) -> dict[Layer, str]:
    """ "total" or "part" for the layers of a section that make up sums of affine layers, which nothing else reads."""
    readers = Counter(v for step in steps for v in _reads(step))
    choosers = Counter(v for step in steps if isinstance(step, Plain) for eqn in step.equations for v in _chosen(eqn))
    made_of: dict[Value, list[Layer]] = {}  # the layers that a sum of affine layers consists of, as far as it goes
    found: dict[Layer, str] = {}

    def parts(values: Sequence[Value]) -> list[Layer]:
        """The layers that `values` are made of; none if one of them is something else, or is read elsewhere, too."""
        # The gates of a cell may be several slices of one product.
        if not all(v in made_of and readers[v] in (1, choosers[v]) and v not in exits for v in values):
            return []
        return [layer for v in values for layer in made_of[v]]

    for step in steps:
        if isinstance(step, Plain):
            for eqn in step.equations:
                live = [v for v in eqn.inputs if v in made_of]
                if live and eqn.name in prims.SELECTION and parts(live):
                    made_of.update((v, parts(live)) for v in eqn.outputs)
        elif isinstance(step, Layer):
            if step.kind in AFFINE_KINDS:
                made_of[step.output] = [step]
            elif step.kind == "gate":  # held constant, a gate is a factor of the weights
                signals = [v for v, role in zip(step.live, step.roles, strict=True) if role == "signal"]
                if len(signals) == 1 and parts(signals):
                    made_of[step.output] = parts(signals)
            elif step.kind in ("add", "scale"):
                members = parts(step.live)
                begun = step.kind == "add" or any(layer in found for layer in members)
                # A difference of two outputs of one layer is no sum of layers.
                if members and begun and len(set(members)) == len(members):
                    found.update(dict.fromkeys(members, "part"))
                    found[step] = "total"
                    made_of[step.output] = [*members, step]
    return found


def _chosen(eqn: Equation) -> list[Value]:
    return list(eqn.inputs) if eqn.name in prims.SELECTION else []


def _reads(step: Step) -> list[Value]:
    if isinstance(step, Layer):
        return list(step.live)
    equations = step.equations if isinstance(step, Plain) else (step.equation,)
    return [v for eqn in equations for v in eqn.inputs]
