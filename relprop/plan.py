"""Decide, before anything runs, which rule holds at which layer; print the decision."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .composite import Composite, short
from .errors import ArgumentError, RuleError
from .jaxprs import Value, scan_groups
from .ranges import Ranges
from .rules.activation import Gradient, Identity
from .rules.affine import Zero
from .rules.base import Rule
from .rules.normalisation import Frozen
from .rules.product import Uniform
from .selectors import as_selector
from .structure import Call, Layer, Plain, Section
from .tables import table

DEFAULTS: Mapping[str, Rule] = {
    **dict.fromkeys(("dense", "conv", "affine", "scale", "sum_pool", "add"), Zero()),
    "activation": Identity(),
    **dict.fromkeys(("product", "gate", "attention"), Uniform()),
    "norm": Frozen(),
    "softmax": Gradient(),
    "max_pool": Gradient(),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a plan: a layer and its rule."""

    layer: Layer
    rule: Rule


class Plan:
    """The layers of a function with their rules, in order of execution. Iterates over entries; prints as a table.

    `around` are the calls (loops, branches, ...) that each layer is in, from the outermost inwards.
    """

    def __init__(self, section: Section, composite: Composite):
        self.section = section
        self.around = {step: calls for step, calls in section.walk() if isinstance(step, Layer)}
        self.layers = list(self.around)
        rules = composite.assign(self.layers, DEFAULTS)
        self.entries = [Entry(layer, rule) for layer, rule in zip(self.layers, rules, strict=True)]
        self.rules = {entry.layer.index: entry.rule for entry in self.entries}
        found: set[Value] = set()
        mark_relatives(section, self.rules, [False] * len(section.program.outputs), found)
        self.needed = frozenset(found)
        self.rectified = frozenset(_rectified(section, self.rules, self.needed))

    def select(self, selector: Any, what: str = "The selector") -> list[Layer]:
        """The layers that match, in order of execution.

        Raises:
            ArgumentError: there are none; `what` names the selector in the message.
        """
        selector = as_selector(selector)
        chosen = [layer for layer, on in zip(self.layers, selector.matches(self.layers), strict=True) if on]
        if not chosen:
            present = ", ".join(dict.fromkeys(layer.path or layer.kind for layer in self.layers)) or "none"
            raise ArgumentError(f"{what} {selector} matches no layer. Layers here: {present}.")
        return chosen

    def outside_of(self, calls: Collection[str], layer: Layer, why: str) -> None:
        """Raise an `ArgumentError` that says `why` where a layer is inside of one of the `calls`, such as "scan"."""
        inside = [eqn.name for eqn in self.around[layer] if eqn.name in calls]
        if inside:
            call = "loop" if inside[-1] == "scan" else f"`{inside[-1]}`"
            raise ArgumentError(f"The layer {layer.address} at {layer.source} is inside of a {call}{why}")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Entry:
        return self.entries[index]

    def __repr__(self) -> str:
        head = ("#", "address", "kind", "primitive", "in -> out", "rule", "source")
        return table([head, *(_row(entry) for entry in self.entries)])


def _rectified(section: Section, rules: Mapping[int, Rule], needed: frozenset[Value]) -> Iterator[Layer]:
    """Layers whose output is read only by activations that are 0 wherever it is negative, and hand nothing on there."""
    for part in section.sections():
        readers: dict[Value, list[Any]] = defaultdict(list)
        for step in part.steps:
            for v in step.reads:
                readers[v].append(step)
        for step in part.steps:
            if isinstance(step, Layer) and step.output not in needed and step.output not in part.program.outputs:
                read = readers[step.output]
                if read and all(isinstance(r, Layer) and rules[r.index].vanishes and _is_rectifier(r) for r in read):
                    yield step


def _is_rectifier(layer: Layer) -> bool:
    """Whether an activation is 0 for every input below 0, by interval analysis."""
    if layer.kind != "activation":
        return False
    return Ranges(layer.equations, {layer.live[0]: (-math.inf, 0.0)}).of(layer.output) == (0.0, 0.0)


def _row(entry: Entry) -> tuple[str, ...]:
    layer = entry.layer
    shapes = ", ".join(str(list(s)) for s in layer.input_shapes)
    return (
        str(layer.index),
        layer.address,
        layer.kind,
        layer.primitive,
        f"{shapes} -> {list(layer.output_shape)}",
        short(entry.rule),
        layer.source.rpartition("/")[2],
    )


def mark_relatives(section: Section, rules: Mapping[int, Rule], outputs: list[bool], found: set[Value]) -> list[bool]:
    """Add to `found` the values of which relative tangents are needed; returns which inputs are among them.

    These are the live ancestors of layers whose rule has a relative part, and of the `outputs` that are asked for.
    """
    found.update(v for v, on in zip(section.program.outputs, outputs, strict=True) if on and v in section.live)
    for step in reversed(section.steps):
        if isinstance(step, Layer):
            rule = rules[step.index]
            if step.output in found and not rule.linear:
                raise RuleError(
                    f"{rule} at the {step.kind} layer {step.address} at {step.source} modifies the gradient; it cannot "
                    "stand below a rule that does not read the input (Flat, WSquare, ZBox, bias='distribute', a function)."
                )
            if step.output in found or rule.is_relative:
                found.update(step.live)
        elif isinstance(step, Plain):
            for eqn in reversed(step.equations):
                if any(v in found for v in eqn.outputs):
                    found.update(v for v in eqn.inputs if v in section.live)
        else:
            _mark_call(step, section, rules, found)
    return [v in found for v in section.program.inputs]


def _mark_call(step: Call, section: Section, rules: Mapping[int, Rule], found: set[Value]):
    eqn = step.equation
    asked = [v in found for v in eqn.outputs]
    operands = eqn.inputs[1:] if eqn.name == "cond" else eqn.inputs
    consts, carry = scan_groups(eqn.params) if eqn.name == "scan" else (0, 0)
    for body in step.bodies:
        while True:
            inputs = mark_relatives(body, rules, asked, found)
            # What one step of a loop needs of a carried value the step before has to hand on.
            carried = [a or b for a, b in zip(asked[:carry], inputs[consts : consts + carry], strict=True)]
            if carried == asked[:carry]:
                break
            asked = carried + asked[carry:]
        found.update(v for v, on in zip(operands, inputs, strict=True) if on and v in section.live)
