"""Products of live values: trees of multiplications as one n-ary product, and what each factor is in it."""

from collections.abc import Iterator

from . import primitives as prims
from .chains import is_chain_link, parametric
from .facts import Facts
from .flow import Flow
from .jaxprs import Constant, Equation, Value
from .structure import Layer

# What selects a part of a value: the parts of one projection are different things.
_PARTS = frozenset("slice split dynamic_slice gather unstack".split())


def is_product(eqn: Equation, flow: Flow) -> bool:
    """Whether an equation multiplies two live values: element by element, or as matrices."""
    return (eqn.name == "mul" or eqn.name in prims.MIXING) and len(flow.live_operands(eqn)) == 2


def product_layer(eqn: Equation, flow: Flow, facts: Facts, regions: dict[Value, Value], taken: set[Equation]) -> Layer:
    """A tree of multiplications of live values as one n-ary product: pairwise splits would depend on association.

    Numbers, signs, casts and reshapes between two multiplications do not end the tree. A product is a `gate` when some of
    its factors are gates or modulators, and others are not.
    """
    equations, factors = [eqn], []
    pending = [v for v in eqn.inputs if v in flow.live]
    while pending:
        value = pending.pop(0)
        branch = _multiplication(value, flow, facts, regions, taken)
        if branch:
            equations.extend(branch)
            pending = [v for v in branch[-1].inputs if v in flow.live] + pending
        else:
            factors.append(value)
    equations.sort(key=flow.position.__getitem__)
    degrees = tuple(_degree(value, flow, facts) for value in factors)
    roles = Roles(flow, facts, regions).of(factors)
    closed = [role in ("gate", "modulator") for role in roles]
    kind = "gate" if any(closed) and not all(closed) else "product"
    return Layer(kind, tuple(equations), tuple(factors), eqn.outputs[0], eqn, degrees=degrees, roles=roles)


def attention_layer(eqn: Equation, flow: Flow) -> Layer | None:
    """A fused attention kernel: a function of queries, keys, values and perhaps a bias, with its own backward pass."""
    floats = [v for v in eqn.inputs[eqn.params.get("num_consts", 0) :] if v.carries_relevance and v.ndim >= 2]
    if len(floats) < 3 or not eqn.outputs[0].carries_relevance:
        return None
    names = dict(zip(floats, ("query", "key", "value"), strict=False))
    live = tuple(v for v in dict.fromkeys(eqn.inputs) if v in flow.live)
    roles = tuple(names.get(v, "bias") for v in live)
    return Layer("attention", (eqn,), live, eqn.outputs[0], eqn, roles=roles)


def _multiplication(value: Value, flow: Flow, facts: Facts, regions: dict[Value, Value], taken) -> list[Equation]:
    """The links from `value` back to a multiplication of live values, and that; empty when there is none."""
    branch: list[Equation] = []
    while (inner := facts.producer.get(value)) is not None and inner not in taken and flow.sole_consumer(value) is not None:
        branch.append(inner)
        live = flow.live_operands(inner)
        if is_product(inner, flow) and value not in regions:
            return branch
        if len(live) != 1 or not is_chain_link(inner, live[0], flow) or parametric(inner, flow, facts):
            return []
        value = live[0]
    return []


def _degree(value: Value, flow: Flow, facts: Facts) -> int:
    """How many times the value under `value` is a factor: 3 for `x * x * x` and `x**3`."""
    eqn = facts.producer.get(value)
    if eqn is None or not flow.live_operands(eqn) or flow.sole_consumer(value) is None:
        return 1
    if eqn.name == "mul" and all(v in flow.live for v in eqn.inputs):
        bases = {_base(v, facts) for v in eqn.inputs}
        return sum(_degree(v, flow, facts) for v in eqn.inputs) if len(bases) == 1 else 1
    power = {"square": 2, "integer_pow": eqn.params.get("y", 1)}.get(eqn.name, 1)
    return power if power > 1 else 1


def _base(value: Value, facts: Facts) -> Value:
    """The value that powers of it are made of."""
    while (eqn := facts.producer.get(value)) is not None and eqn.name in ("mul", "square", "integer_pow"):
        if eqn.name == "mul" and _base(eqn.inputs[0], facts) is not _base(eqn.inputs[1], facts):
            return value
        value = eqn.inputs[0]
    return value


class Roles:
    """What the factors of a product, and the summands of a residual sum, are to it.

    - `gate`: between 0 and 1 by its structure (`logistic`, `1 - logistic`, softmax, the exponential of a decay)
    - `modulator`: computed, by a layer with weights, from what another factor carries on (the excitation of
      squeeze-and-excitation; B, C and the step of a selective state space)
    - `activated`: the output of an activation, beside a factor that is not one (a gated feed-forward network)
    - `signal`: everything else

    A sum of a value and what layers with weights make of it is residual: its summands are the `skip` and the `branch`.
    """

    def __init__(self, flow: Flow, facts: Facts, regions: dict[Value, Value]):
        self.flow = flow
        self.facts = facts
        self.regions = regions

    def of(self, factors: list[Value]) -> tuple[str, ...]:
        """The role of each factor; where all of them would be closed, the weaker reason to close one does not count."""
        roles = ["gate" if self.facts.is_gate(v) else "signal" for v in factors]
        if "signal" not in roles:
            roles = ["signal"] * len(factors)
        for name, test in (("modulator", self.is_modulator), ("activated", self._is_activated)):
            found = [
                name if role == "signal" and test(v, [u for u in factors if u is not v]) else role
                for v, role in zip(factors, roles, strict=True)
            ]
            roles = found if "signal" in found else roles
        return tuple(roles)

    def of_sum(self, summands: list[Value]) -> tuple[str, ...]:
        """`("skip", "branch")` in their order for a residual sum, else nothing."""
        branches = [self.is_modulator(v, [u for u in summands if u is not v]) for v in summands]
        return tuple("branch" if on else "skip" for on in branches) if sum(branches) == 1 else ()

    def _is_activated(self, value: Value, others: list[Value]) -> bool:
        while (eqn := self.facts.producer.get(value)) is not None and value not in self.regions:
            if eqn.name not in prims.PURE_RESHAPE:
                return False
            value = eqn.inputs[0]
        pending = [value]
        while pending:
            current = pending.pop()
            if self.regions.get(current) is not self.regions.get(value) or current not in self.regions:
                continue
            eqn = self.facts.producer[current]
            if eqn.name in prims.NONLINEAR or len(self.flow.live_operands(eqn)) > 1:
                return True
            pending.extend(self.flow.live_operands(eqn))
        return False

    def is_modulator(self, value: Value, others: list[Value]) -> bool:
        """Whether `value` comes from what one of `others` carries on, by a layer with weights."""
        own = {v for v, _ in _carried_on(value, self.facts)}
        if own.intersection(others):
            return False
        carried = [pair for other in others for pair in _carried_on(other, self.facts) if pair[0] not in own]
        return _is_computed_from(value, self.facts, carried)


def _carried_on(value: Value, facts: Facts) -> Iterator[tuple[Value, Facts]]:
    """`value` and what it is made of without layers with weights and without choosing a part of what they return.

    The walk leaves the body of a loop for the values outside that it reads.
    """
    pending, seen = [(value, facts)], set()
    while pending:
        current, here = pending.pop()
        if current in seen or isinstance(current, Constant):
            continue
        seen.add(current)
        yield current, here
        eqn = here.producer.get(current)
        if eqn is None:
            pending.extend(here.outside(current))
            continue
        part = eqn.name in _PARTS and _is_projected(eqn.inputs[0], here)
        if not part and not here.flow.has_weights(eqn):
            pending.extend((v, here) for v in here.flow.live_operands(eqn))


def _is_projected(value: Value, facts: Facts) -> bool:
    """Whether `value` is what a layer with weights returns: its parts are then different things, not different times."""
    while (eqn := facts.producer.get(value)) is not None and not facts.flow.has_weights(eqn):
        live = facts.flow.live_operands(eqn)
        if len(live) != 1 or eqn.name not in prims.LINEAR | prims.PURE_RESHAPE:
            return False
        (value,) = live
    return eqn is not None


def _is_computed_from(value: Value, facts: Facts, candidates: list[tuple[Value, Facts]]) -> bool:
    """Whether one of `candidates` is an ancestor of `value`."""
    wanted = {v for v, _ in candidates}
    earliest: dict[Facts, int] = {}
    for v, here in candidates:
        earliest[here] = min(earliest.get(here, here.position(v)), here.position(v))
    pending, seen = [(value, facts)], set()
    while pending:
        current, here = pending.pop()
        if current in seen or isinstance(current, Constant):
            continue
        if current in wanted:
            return True
        seen.add(current)
        eqn = here.producer.get(current)
        if eqn is None:
            pending.extend(here.outside(current))
        elif here.outer or here.position(current) > earliest.get(here, -1):
            pending.extend((v, here) for v in eqn.inputs)
    return False
