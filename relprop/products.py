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
    """Whether an equation multiplies or divides live values: element by element, or as matrices."""
    return eqn.name in {"mul", "div", *prims.MIXING} and len(flow.live_operands(eqn)) == 2


def product_layer(eqn: Equation, flow: Flow, facts: Facts, regions: dict[Value, Value], taken: set[Equation]) -> Layer:
    """A tree of multiplications of live values as one n-ary product: pairwise splits would depend on association.

    Numbers, signs, casts and reshapes between two multiplications do not end the tree; a divisor has a negative degree. A
    product is a `gate` when some of its factors are gates or modulators, and others are not.
    """
    equations: list[Equation] = [eqn]
    found: list[tuple[Value, int]] = []
    pending = _factors(eqn, 1, flow)
    while pending:
        value, sign = pending.pop(0)
        branch = _multiplication(value, flow, facts, regions, taken)
        if branch:
            equations.extend(branch)
            pending = _factors(branch[-1], sign, flow) + pending
        else:
            found.append((value, sign * _power(value, flow)[1]))
    equations.sort(key=flow.position.__getitem__)
    factors, degrees = [v for v, _ in found], tuple(d for _, d in found)
    roles = Roles(flow, facts, regions).of(factors, degrees)
    closed = [role in ("gate", "modulator") for role in roles]
    kind = "gate" if any(closed) and not all(closed) else "product"
    return Layer(kind, tuple(equations), tuple(factors), eqn.outputs[0], eqn, degrees=degrees, roles=roles)


def _factors(eqn: Equation, sign: int, flow: Flow) -> list[tuple[Value, int]]:
    signs = (sign, -sign) if eqn.name == "div" else (sign,) * len(eqn.inputs)
    return [(v, s) for v, s in zip(eqn.inputs, signs, strict=True) if v in flow.live]


def attention_layer(eqn: Equation, flow: Flow) -> Layer | None:
    """A fused attention kernel: a function of queries, keys, values and perhaps a bias, with its own backward pass."""
    floats = [v for v in eqn.inputs[eqn.params.get("num_consts", 0) :] if v.carries_relevance and v.ndim >= 2]
    if len(floats) < 3 or not eqn.outputs[0].carries_relevance:
        return None
    query, key, value = (v.shape for v in floats[:3])
    if query[-1] != key[-1] or key[:-1] != value[:-1]:
        return None
    names = iter(("query", "key", "value"))
    roles = [next(names, "bias") if v in floats else "bias" for v in eqn.inputs[eqn.params.get("num_consts", 0) :]]
    roles = ["bias"] * (len(eqn.inputs) - len(roles)) + roles
    live = [(v, role) for v, role in zip(eqn.inputs, roles, strict=True) if v in flow.live]
    return Layer("attention", (eqn,), tuple(v for v, _ in live), eqn.outputs[0], eqn, roles=tuple(r for _, r in live))


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


def _power(value: Value, flow: Flow) -> tuple[Value, int]:
    """The value that `value` is a power of, and the exponent: `(x, 3)` for `x * x * x` and `x**3`."""
    eqn = flow.producer.get(value)
    if eqn is None or not flow.live_operands(eqn) or flow.sole_consumer(value) is None:
        return value, 1
    if eqn.name == "mul" and all(v in flow.live for v in eqn.inputs):
        if eqn.inputs[0] is eqn.inputs[1]:
            return eqn.inputs[0], 2
        (a, m), (b, n) = (_power(v, flow) if flow.sole_consumer(v) else (v, 1) for v in eqn.inputs)
        return (a, m + n) if a is b else (value, 1)
    exponent = {"square": 2, "integer_pow": eqn.params.get("y", 1)}.get(eqn.name, 1)
    if exponent < 2:
        return value, 1
    base, n = _power(eqn.inputs[0], flow)
    return base, n * exponent


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

    def of(self, factors: list[Value], degrees: tuple[int, ...]) -> tuple[str, ...]:
        """The role of each factor; where all of them would be closed, the weaker reason to close one does not count."""
        roles = ["gate" if self._is_gate(v, d) else "signal" for v, d in zip(factors, degrees, strict=True)]
        if "signal" not in roles:
            roles = ["signal"] * len(factors)
        tests = {
            "modulator": lambda v: self._is_modulator(v, [u for u in factors if u is not v]),
            "activated": self._is_activated,
        }
        for name, test in tests.items():
            found = [name if role == "signal" and test(v) else role for v, role in zip(factors, roles, strict=True)]
            roles = found if "signal" in found else roles
        return tuple(roles)

    def _is_gate(self, value: Value, degree: int) -> bool:
        return self.facts.is_gate(value) if degree >= 0 else self.facts.range(value)[0] >= 1

    def of_sum(self, summands: list[Value]) -> tuple[str, ...]:
        """`("skip", "branch")` in their order for a residual sum, else nothing."""
        branches = [self._is_modulator(v, [u for u in summands if u is not v]) for v in summands]
        return tuple("branch" if on else "skip" for on in branches) if sum(branches) == 1 else ()

    def _is_activated(self, value: Value) -> bool:
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

    def _is_modulator(self, value: Value, others: list[Value]) -> bool:
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
