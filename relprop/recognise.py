"""Find the layers of a program by dataflow: liveness, affine chains, pools, softmax, merges, then elementwise regions."""

import dataclasses
from collections import defaultdict

from . import primitives as prims
from .chains import affine_layer, softmax_layer, sum_pool_layer
from .errors import NotDifferentiableError, UnknownPrimitiveError
from .facts import Facts
from .jaxprs import REMAT, Equation, Program, Value, open_program, scan_groups
from .regions import find_regions
from .structure import Call, Layer, Options, Plain, Section


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
        for position, eqn in enumerate(program.equations):
            self.position[eqn] = position
            if not any(v in self.dependent for v in eqn.inputs):
                continue
            self.dependent.update(eqn.outputs)
            self.live.update(v for v, on in zip(eqn.outputs, self._live_outputs(eqn), strict=True) if on)
        self.exits = set(program.outputs if targets is None else targets) & self.live
        self.carries: set[Value] = set(self.exits)
        self.moving: list[Equation] = []
        self.consumers: dict[Value, list[Equation]] = defaultdict(list)
        for eqn in reversed(program.equations):
            if any(v in self.carries for v in eqn.outputs):
                self.moving.insert(0, eqn)
                self.carries.update(v for v in eqn.inputs if v in self.live)
                for v in dict.fromkeys(eqn.inputs):
                    self.consumers[v].insert(0, eqn)

    def _live_outputs(self, eqn: Equation) -> list[bool]:
        live_in = [v in self.live for v in eqn.inputs]
        if eqn.name in prims.CALLS:
            return call_liveness(eqn, live_in, [v in self.dependent for v in eqn.inputs])[1]
        on = any(live_in) and eqn.name not in prims.DISCRETE
        return [on and v.carries_relevance for v in eqn.outputs]

    def live_operands(self, eqn: Equation) -> list[Value]:
        return [v for v in eqn.inputs if v in self.live]

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


def call_liveness(eqn: Equation, live, dependent):
    """Liveness of each body's inputs and of the call's outputs, by a fixpoint where there is a carry.

    Returns `(bodies, outputs)`: `bodies` holds, for each body of the call, its program and the (live, dependent) flags
    of its inputs.
    """
    programs = [open_program(jaxpr) for jaxpr in _body_jaxprs(eqn)]
    if eqn.name == "cond":
        flows = [Flow(p, live[1:], dependent[1:]) for p in programs]
        outputs = [any(flags) for flags in zip(*(_output_flags(f) for f in flows), strict=True)]
        return [(p, live[1:], dependent[1:]) for p in programs], outputs
    if eqn.name not in ("scan", "while"):
        (program,) = programs
        return [(program, live, dependent)], _output_flags(Flow(program, live, dependent))
    if eqn.name == "scan":
        consts, carry = scan_groups(eqn.params)
    else:
        skipped, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        live, dependent, programs = live[skipped:], dependent[skipped:], programs[1:]
        carry = len(live) - consts
    (program,) = programs
    live, dependent = list(live), list(dependent)
    while True:
        flow = Flow(program, live, dependent)
        outputs = _output_flags(flow)
        touched = [v in flow.dependent for v in program.outputs]
        new_live = _join_carry(live, outputs, consts, carry)
        new_dependent = _join_carry(dependent, touched, consts, carry)
        if new_live == live and new_dependent == dependent:
            return [(program, live, dependent)], outputs
        live, dependent = new_live, new_dependent


def _join_carry(flags, outputs, consts, carry):
    joined = [a or b for a, b in zip(flags[consts : consts + carry], outputs[:carry], strict=True)]
    return flags[:consts] + joined + flags[consts + carry :]


def _output_flags(flow: Flow) -> list[bool]:
    return [v in flow.live for v in flow.program.outputs]


def _body_jaxprs(eqn: Equation):
    if eqn.name == "cond":
        return eqn.params["branches"]
    if eqn.name == "while":
        return (eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"])
    return (eqn.params["jaxpr"],)


def recognise(
    program: Program, live, origins, options: Options, *, dependent=None, targets=None, section="", nonnegative=()
) -> Section:
    """Find the layers of `program`.

    `live` says for each input whether relevance can reach it, `origins` maps inputs to parameter paths, `targets` are
    the outputs that are explained (all by default), `nonnegative` holds inputs that are known to be >= 0. Layers have no
    index yet (see `number`).
    """
    flow = Flow(program, live, live if dependent is None else dependent, targets)
    facts = Facts(program.equations, origins, set(nonnegative))
    steps: dict[int, list] = defaultdict(list)  # by the position of the equation that completes a step
    taken: set[Equation] = set()
    for finder in (softmax_layer, sum_pool_layer, affine_layer):
        for eqn in flow.moving:
            if eqn not in taken and eqn.name not in options.registered:
                layer = finder(eqn, flow, facts, taken)
                if layer is not None:
                    # A chain before the core is copied where others read it too; what is left of it is found below.
                    taken.update(e for e in layer.equations if e not in layer.pre)
                    flow.release(layer)
                    steps[flow.position[layer.equations[-1]]].append(layer)
    regions, inside = find_regions(flow, facts, taken, options)
    for layer in regions:
        steps[flow.position[layer.equations[-1]]].append(layer)
    members: set[Equation] = set()
    for eqn in reversed(flow.moving):
        read = [v for v in eqn.outputs if flow.consumers[v] or v in flow.exits]
        if eqn in taken or eqn in members or all(v in inside for v in read):
            continue
        step = _single(eqn, flow, facts, options, section, inside)
        if isinstance(step, Layer):
            members.update(step.equations)
        steps[flow.position[eqn]].append(step)
    ordered = [_finish(step, facts, section) for position in sorted(steps) for step in steps[position]]
    effects = tuple(e for e in program.equations if e.has_effects and e not in set(flow.moving))
    return Section(program, tuple(ordered), frozenset(flow.live), facts.producer, effects)


def _finish(step, facts: Facts, section: str):
    if not isinstance(step, Layer):
        return step
    known = step.nonnegative if step.pre else all(facts.is_nonnegative(v) for v in step.live)
    return dataclasses.replace(step, section=section, nonnegative=known)


def _single(eqn: Equation, flow: Flow, facts: Facts, options: Options, section: str, inside) -> Layer | Plain | Call:
    """The step that a single equation makes."""
    live = flow.live_operands(eqn)
    name = eqn.name
    if name in prims.CALLS:
        return _call(eqn, flow, facts, options, section)
    if name in options.registered:
        return Plain((eqn,))
    out = eqn.outputs[0]

    def layer(kind, values=live, equations=(eqn,), frozen=()):
        return Layer(kind, tuple(equations), tuple(values), out, eqn, frozen=tuple(frozen))

    if name in prims.MAX_POOL:
        return layer("max_pool")
    if name in prims.PRODUCTS:
        return layer("product")
    if name in prims.MIXING and len(live) == 2:
        return layer("product")
    if name == "mul" and len(live) == 2:
        a, b = eqn.inputs
        for signal, statistic in ((a, b), (b, a)):
            if _is_statistic(statistic, flow, facts):
                return layer("norm", (signal,), frozen=(statistic,))
        return _product(eqn, flow, facts, inside)
    if name == "div" and eqn.inputs[1] in flow.live:
        numerator, denominator = eqn.inputs
        if numerator in flow.live:
            return layer("norm", (numerator,), frozen=(denominator,))
    if name in ("add", "sub", "add_any") and len(live) == 2:
        return layer("add")
    complex_abs = name == "abs" and live[0].dtype.kind == "c"  # homogeneous: its derivative conserves
    if name in prims.STRUCTURAL or complex_abs:
        return Plain((eqn,))
    if name in ("mul", "div") and len(live) == 1 and (name == "mul" or eqn.inputs[0] is live[0]):
        return Plain((eqn,))
    if name in prims.SOLVES and eqn.inputs[0] not in flow.live and live == [eqn.inputs[-1]]:
        return Plain((eqn,))
    if options.fallback == "gradient":
        return Plain((eqn,))
    raise UnknownPrimitiveError(_unknown_message(eqn, live))


def _unknown_message(eqn: Equation, live) -> str:
    reason = prims.REFUSED.get(eqn.name)
    if reason is None and eqn.name in prims.NONLINEAR:
        reason = f"it is nonlinear in {len(live)} different live values at once"
    shapes = ", ".join(f"{v.dtype}{list(v.shape)}" for v in eqn.inputs)
    return (
        f"No propagation rule for the primitive '{eqn.name}' of ({shapes}) at {eqn.where}"
        f"{': ' + reason if reason else ''}. Two ways out: give it a linearisation with "
        f"`@relprop.register('{eqn.name}')`, or pass `fallback='gradient'` to use its derivative, which does not "
        "conserve relevance in general."
    )


def _is_statistic(value: Value, flow: Flow, facts: Facts) -> bool:
    """Whether `value` is 1/sqrt (or sqrt) of something that was summed: a norm's statistic, not a signal."""
    pending, seen, rooted = [value], set(), False
    while pending:
        eqn = facts.producer.get(pending.pop())
        if eqn is None or eqn in seen:
            continue
        seen.add(eqn)
        if eqn.name in prims.SUM_POOL | prims.MAX_POOL:
            if rooted:
                return True
            continue
        if eqn.name in prims.ELEMENTWISE | prims.PURE_RESHAPE:
            rooted = rooted or eqn.name in ("rsqrt", "sqrt") or (eqn.name == "pow")
            pending.extend(v for v in eqn.inputs if v in flow.live)
    return False


def _product(eqn: Equation, flow: Flow, facts: Facts, inside) -> Layer:
    """A tree of multiplications of live values as one n-ary product: pairwise splits would depend on association."""
    equations, factors = [eqn], []
    pending = list(eqn.inputs)
    while pending:
        value = pending.pop(0)
        inner = facts.producer.get(value)
        if (
            inner is not None
            and inner.name == "mul"
            and value not in inside
            and len(flow.live_operands(inner)) == 2
            and flow.sole_consumer(value) is not None
            and not any(_is_statistic(v, flow, facts) for v in inner.inputs)
        ):
            equations.insert(0, inner)
            pending = list(inner.inputs) + pending
        else:
            factors.append(value)
    equations.sort(key=flow.position.__getitem__)
    return Layer("product", tuple(equations), tuple(factors), eqn.outputs[0], eqn)


def _call(eqn: Equation, flow: Flow, facts: Facts, options: Options, section: str) -> Call:
    live = [v in flow.live for v in eqn.inputs]
    bodies, _ = call_liveness(eqn, live, [v in flow.dependent for v in eqn.inputs])
    if eqn.name == "while" and any(v in flow.carries for v in eqn.outputs):
        raise NotDifferentiableError(
            f"Relevance cannot be propagated backwards through the `while` loop at {eqn.where}: the number of its "
            "steps is not known before it runs. Use `lax.scan`, or `lax.fori_loop` with a static trip count."
        )
    operands = eqn.inputs[1:] if eqn.name == "cond" else eqn.inputs
    if eqn.name == "while":
        operands = eqn.inputs[eqn.params["cond_nconsts"] :]
    carried = range(0)
    if eqn.name == "scan":
        consts, carry = scan_groups(eqn.params)
        carried = range(consts, consts + carry)
    where = "/".join(part for part in (section, eqn.scope) if part)
    sections = []
    for program, body_live, body_dependent in bodies:
        pairs = list(zip(program.inputs, operands, strict=True))
        origins = {inner: facts.origin(outer) for inner, outer in pairs}
        positive = {v for i, (v, outer) in enumerate(pairs) if i not in carried and facts.is_nonnegative(outer)}
        inner = recognise(
            program,
            body_live,
            origins,
            options,
            dependent=body_dependent,
            section=_loop_scope(where, eqn),
            nonnegative=positive,
        )
        sections.append(inner)
    return Call(eqn, tuple(sections))


def _loop_scope(where: str, eqn: Equation) -> str:
    label = "" if eqn.name in REMAT or eqn.name == "shard_map" else eqn.name
    return "/".join(part for part in (where, label) if part)


def number(section: Section, start: int = 0) -> tuple[Section, int]:
    """Give the layers of a section, bodies included, their indices in order of execution."""
    steps = []
    for step in section.steps:
        if isinstance(step, Layer):
            step = dataclasses.replace(step, index=start)
            start += 1
        elif isinstance(step, Call):
            bodies = []
            for body in step.bodies:
                body, start = number(body, start)
                bodies.append(body)
            step = Call(step.equation, tuple(bodies))
        steps.append(step)
    return dataclasses.replace(section, steps=tuple(steps)), start
