"""How relevance can move through a program: which values are live, and which equations carry relevance to a target."""

import dataclasses
from collections import defaultdict

from . import primitives as prims
from .jaxprs import Equation, Program, Value, open_body, scan_groups
from .structure import Layer


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """The body of a call, opened, with the (live, dependent) flags of its inputs."""

    program: Program
    live: list[bool]
    dependent: list[bool]


class Flow:
    """How relevance can move through one program.

    A value is *live* when it depends on an explained input and has a tangent, *dependent* when it depends on one at
    all, and *free* otherwise. It *carries* relevance when it is live and a target can be reached from it through live
    values. Only equations that carry relevance count as `consumers`: dead code, auxiliary outputs, masks and prints
    may read a value without changing what the layers are.
    """

    def __init__(self, program: Program, live_inputs, dependent_inputs, targets=None):
        self.program = program
        self.live: set[Value] = {v for v, on in zip(program.inputs, live_inputs, strict=True) if on}
        self.dependent: set[Value] = {v for v, on in zip(program.inputs, dependent_inputs, strict=True) if on}
        self.dependent |= self.live
        self.position: dict[Equation, int] = {}
        self.producer: dict[Value, Equation] = {v: eqn for eqn in program.equations for v in eqn.outputs}
        self.bodies: dict[Equation, list[Body]] = {}
        self._weighted: dict[Equation, bool] = {}
        for position, eqn in enumerate(program.equations):
            self.position[eqn] = position
            if not any(v in self.dependent for v in eqn.inputs):
                continue
            self.dependent.update(eqn.outputs)
            self.live.update(v for v, on in zip(eqn.outputs, self._live_outputs(eqn), strict=True) if on)
        self.exits = set(program.outputs if targets is None else targets) & self.live
        self.carries: set[Value] = set()
        self.moving: list[Equation] = []
        self.consumers: dict[Value, list[Equation]] = {}
        self.reroute({})

    def reroute(self, reads: dict[Equation, tuple[Value, ...]]):
        """Find what carries relevance, where the equations in `reads` hand it to those values and not to their operands.

        So what lies inside of a softmax, or leads to the statistic of a norm, carries none of its own.
        """
        self.carries = set(self.exits)
        self.moving = []
        for eqn in reversed(self.program.equations):
            if any(v in self.carries for v in eqn.outputs):
                self.moving.append(eqn)
                self.carries.update(v for v in reads.get(eqn, eqn.inputs) if v in self.live)
        self.moving.reverse()
        self.consumers = defaultdict(list)
        for eqn in self.moving:
            for v in dict.fromkeys(reads.get(eqn, eqn.inputs)):
                self.consumers[v].append(eqn)

    def _live_outputs(self, eqn: Equation) -> list[bool]:
        live_in = [v in self.live for v in eqn.inputs]
        if eqn.name in prims.CALLS:
            dependent_in = [v in self.dependent for v in eqn.inputs]
            self.bodies[eqn], outputs = _call_liveness(eqn, live_in, dependent_in)
            return outputs
        on = any(live_in) and eqn.name not in prims.DISCRETE
        return [on and v.carries_relevance for v in eqn.outputs]

    def live_operands(self, eqn: Equation) -> list[Value]:
        return [v for v in eqn.inputs if v in self.live]

    def has_weights(self, eqn: Equation) -> bool:
        """Whether an equation mixes elements of its one live operand with weights, or is a call of such a layer."""
        if eqn.name in prims.MIXING:
            return len(self.live_operands(eqn)) == 1
        if eqn not in self._weighted:
            inner = [Flow(body.program, body.live, body.dependent) for body in self.bodies.get(eqn, ())]
            self._weighted[eqn] = any(flow.has_weights(e) for flow in inner for e in flow.program.equations)
        return self._weighted[eqn]

    def targets(self, eqn: Equation, body: "Body") -> list[Value]:
        """The outputs of a call's body that relevance comes from: those that are explained, or carried to one that is."""
        asked = [v in self.carries for v in eqn.outputs]
        consts, carry = scan_groups(eqn.params) if eqn.name == "scan" else (0, 0)
        while True:
            targets = [v for v, on in zip(body.program.outputs, asked, strict=True) if on]
            inner = Flow(body.program, body.live, body.dependent, targets)
            carried = [v in inner.carries for v in body.program.inputs[consts : consts + carry]]
            wider = [a or b for a, b in zip(asked, carried + asked[carry:], strict=True)]
            if wider == asked:
                return targets
            asked = wider

    def release(self, layer: Layer):
        """Let `layer` read the source of the chain before its core: it has a copy of the chain, others may have theirs."""
        if not layer.pre:
            return
        source, reader = layer.live[0], layer.core
        self.consumers[source].append(layer.core)
        for link in reversed(layer.pre):
            value = link.outputs[0]
            self.consumers[value].remove(reader)
            if self.consumers[value] or value in self.exits:
                return
            reader = link
        self.consumers[source].remove(reader)

    def sole_consumer(self, value: Value) -> Equation | None:
        """The one equation that hands relevance to `value`, or None when there are several, or when it is a target."""
        readers = self.consumers[value]
        return readers[0] if len(readers) == 1 and value not in self.exits else None


def _call_liveness(eqn: Equation, live, dependent) -> tuple[list[Body], list[bool]]:
    """The bodies of a call and the liveness of its outputs, by a fixpoint where there is a carry."""
    if eqn.name == "cond":
        bodies = [Body(open_body(eqn, jaxpr), live[1:], dependent[1:]) for jaxpr in eqn.params["branches"]]
        outputs = [any(flags) for flags in zip(*map(_output_flags, bodies), strict=True)]
        return bodies, outputs
    consts = carry = 0
    if eqn.name == "scan":
        consts, carry = scan_groups(eqn.params)
    elif eqn.name == "while":
        skipped, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        live, dependent = live[skipped:], dependent[skipped:]
        carry = len(live) - consts
    program = open_body(eqn, eqn.params["body_jaxpr" if eqn.name == "while" else "jaxpr"])
    while True:
        flow = Flow(program, live, dependent)
        outputs = [v in flow.live for v in program.outputs]
        touched = [v in flow.dependent for v in program.outputs]
        wider = _join_carry(live, outputs, consts, carry), _join_carry(dependent, touched, consts, carry)
        if wider == (live, dependent):
            return [Body(program, live, dependent)], outputs
        live, dependent = wider


def _join_carry(flags, outputs, consts, carry):
    joined = [a or b for a, b in zip(flags[consts : consts + carry], outputs[:carry], strict=True)]
    return flags[:consts] + joined + flags[consts + carry :]


def _output_flags(body: Body) -> list[bool]:
    live = Flow(body.program, body.live, body.dependent).live
    return [v in live for v in body.program.outputs]
