"""Find the layers of a program by dataflow: affine chains, pools, softmax, elementwise regions, merges, calls."""

import dataclasses
from collections import defaultdict

from . import primitives as prims
from .chains import affine_layer, is_chain_link, parametric, softmax_layer, sum_pool_layer
from .errors import NotDifferentiableError, UnknownPrimitiveError
from .facts import Facts
from .flow import Flow
from .jaxprs import REMAT, Equation, Program, Value, scan_groups
from .regions import find_regions
from .structure import Call, Layer, Options, Plain, Section


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
    ordered = [
        dataclasses.replace(step, section=section) if isinstance(step, Layer) else step
        for position in sorted(steps)
        for step in steps[position]
    ]
    carried = set(flow.moving)
    effects = tuple(e for e in program.equations if e.has_effects and e not in carried)
    return Section(program, tuple(ordered), frozenset(flow.live), facts.producer, effects)


def _single(eqn: Equation, flow: Flow, facts: Facts, options: Options, section: str, inside) -> Layer | Plain | Call:
    """The step that a single equation makes."""
    live = flow.live_operands(eqn)
    name = eqn.name
    if name in prims.CALLS:
        return _call(eqn, flow, facts, options, section)
    if name in options.registered:
        return Plain((eqn,))
    out = eqn.outputs[0]

    def layer(kind, values=live, frozen=()):
        return Layer(kind, (eqn,), tuple(values), out, eqn, frozen=frozen)

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
    if name in prims.SHIFTS and len(live) == 2:
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
    if reason is None and len(live) > 1:
        reason = f"it is nonlinear in {len(live)} different live values at once"
    elif reason is None and eqn.name in prims.ELEMENTWISE:
        reason = "it is nonlinear and broadcasts its live operand, or takes complex numbers"
    shapes = ", ".join(f"{v.dtype}{list(v.shape)}" for v in eqn.inputs)
    return (
        f"No propagation rule for the primitive '{eqn.name}' of ({shapes}) at {eqn.where}"
        f"{': ' + reason if reason else ''}. Two ways out: give it a linearisation with "
        f"`@relprop.register('{eqn.name}')`, or pass `fallback='gradient'` to use its derivative, which does not "
        "conserve relevance in general."
    )


def _is_statistic(value: Value, flow: Flow, facts: Facts) -> bool:
    """Whether `value` is 1/sqrt (or sqrt) of something that was summed: a norm's statistic, not a signal."""
    pending, seen = [(value, False)], set()
    while pending:
        current, rooted = pending.pop()
        eqn = facts.producer.get(current)
        if eqn is None or (eqn, rooted) in seen:
            continue
        seen.add((eqn, rooted))
        if rooted and eqn.name in prims.SUM_POOL | prims.MAX_POOL:
            return True
        if eqn.name in prims.ELEMENTWISE | prims.PURE_RESHAPE:
            rooted = rooted or eqn.name in ("rsqrt", "sqrt", "pow")
            pending.extend((v, rooted) for v in eqn.inputs if v in flow.live)
    return False


def _product(eqn: Equation, flow: Flow, facts: Facts, inside: set[Value]) -> Layer:
    """A tree of multiplications of live values as one n-ary product: pairwise splits would depend on association.

    Numbers, signs, casts and reshapes between two multiplications do not end the tree.
    """
    equations, factors = [eqn], []
    pending = list(eqn.inputs)
    while pending:
        value = pending.pop(0)
        branch = _multiplication(value, flow, facts, inside)
        if branch:
            equations.extend(branch)
            pending = list(branch[-1].inputs) + pending
        else:
            factors.append(value)
    equations.sort(key=flow.position.__getitem__)
    degrees = tuple(_degree(value, flow, facts) for value in factors)
    return Layer("product", tuple(equations), tuple(factors), eqn.outputs[0], eqn, degrees=degrees)


def _multiplication(value: Value, flow: Flow, facts: Facts, inside: set[Value]) -> list[Equation]:
    """The links from `value` back to a multiplication of values with two sources, and that; empty when there is none."""
    branch: list[Equation] = []
    while (inner := facts.producer.get(value)) is not None and flow.sole_consumer(value) is not None:
        branch.append(inner)
        live = flow.live_operands(inner)
        if inner.name == "mul" and len(live) == 2 and value not in inside:
            return [] if any(_is_statistic(v, flow, facts) for v in live) else branch
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


def _call(eqn: Equation, flow: Flow, facts: Facts, options: Options, section: str) -> Call:
    if eqn.name == "while":
        raise NotDifferentiableError(
            f"Relevance cannot be propagated backwards through the `while` loop at {eqn.where}: the number of its "
            "steps is not known before it runs. Use `lax.scan`, or `lax.fori_loop` with a static trip count."
        )
    operands = eqn.inputs[1:] if eqn.name == "cond" else eqn.inputs
    carried = range(0)
    if eqn.name == "scan":
        consts, carry = scan_groups(eqn.params)
        carried = range(consts, consts + carry)
    where = "/".join(part for part in (section, eqn.scope) if part)
    sections = []
    for body in flow.bodies[eqn]:
        pairs = list(zip(body.program.inputs, operands, strict=True))
        inner = recognise(
            body.program,
            body.live,
            {inner: facts.origin(outer) for inner, outer in pairs if outer not in flow.dependent},
            options,
            dependent=body.dependent,
            targets=flow.targets(eqn, body),
            section=_loop_scope(where, eqn),
            nonnegative={v for i, (v, outer) in enumerate(pairs) if i not in carried and facts.is_nonnegative(outer)},
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
