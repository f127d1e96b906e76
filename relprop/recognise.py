"""Find the layers of a program by dataflow: affine chains, pools, softmax, elementwise regions, merges, calls."""

import dataclasses
from collections import defaultdict

from . import primitives as prims
from .chains import affine_layer, sum_pool_layer
from .errors import NotDifferentiableError, UnknownPrimitiveError
from .facts import Facts, Outer
from .flow import Flow
from .jaxprs import REMAT, Equation, Program, Value, scan_groups
from .normalisers import find_normalisers
from .preactivations import preactivations
from .products import Roles, attention_layer, is_product, product_layer
from .ranges import Range
from .regions import find_regions
from .structure import Call, Layer, Options, Plain, Section


def recognise(
    program: Program,
    live,
    origins,
    options: Options,
    *,
    dependent=None,
    targets=None,
    section="",
    known: dict[Value, Range] | None = None,
    outer: Outer | None = None,
) -> Section:
    """Find the layers of `program`.

    `live` says for each input whether relevance can reach it, `origins` maps inputs to parameter paths, `targets` are
    the outputs that are explained (all by default), `known` holds bounds of inputs, `outer` what they are outside of a loop.
    Layers have no index yet (see `number`).
    """
    flow = Flow(program, live, live if dependent is None else dependent, targets)
    steps: dict[int, list] = defaultdict(list)  # by the position of the equation that completes a step
    normalisers, bounds = find_normalisers(flow, options)
    cores = {flow.producer[layer.output]: layer for layer in normalisers}
    flow.reroute({eqn: layer.live for eqn, layer in cores.items()})
    facts = Facts(flow, origins, {**(known or {}), **bounds}, outer)
    taken: set[Equation] = set()
    for eqn in flow.moving:
        if eqn in cores:
            taken.add(eqn)
            steps[flow.position[eqn]].append(cores[eqn])
    for finder in (sum_pool_layer, affine_layer):
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
        product = is_product(eqn, flow) and eqn.name not in options.registered
        step = product_layer(eqn, flow, facts, inside, taken) if product else _single(eqn, flow, facts, options, section)
        if isinstance(step, Layer):
            members.update(step.equations)
            if step.kind == "add":
                step = dataclasses.replace(step, roles=Roles(flow, facts, inside).of_sum(list(step.live)))
        steps[flow.position[eqn]].append(step)
    in_order = [step for position in sorted(steps) for step in steps[position]]
    sums = preactivations(in_order, flow.exits)
    ordered = [
        dataclasses.replace(step, section=section, preactivation=sums.get(step, "")) if isinstance(step, Layer) else step
        for step in in_order
    ]
    carried = set(flow.moving)
    effects = tuple(e for e in program.equations if e.has_effects and e not in carried)
    return Section(program, tuple(ordered), frozenset(flow.live), facts.producer, effects)


def _single(eqn: Equation, flow: Flow, facts: Facts, options: Options, section: str) -> Layer | Plain | Call:
    """The step that a single equation makes."""
    live = flow.live_operands(eqn)
    name = eqn.name
    if name in prims.CALLS:
        return _call(eqn, flow, facts, options, section)
    if name in options.registered:
        return Plain((eqn,))
    out = eqn.outputs[0]

    def layer(kind):
        return Layer(kind, (eqn,), tuple(live), out, eqn)

    if name in prims.MAX_POOL:
        return layer("max_pool")
    if name in prims.PRODUCTS:
        return layer("product")
    if name in prims.KERNELS and (attention := attention_layer(eqn, flow)):
        return attention
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
    if eqn.name in prims.KERNELS:
        reason = "it is a kernel with a backward pass of its own, and not one of attention over queries, keys and values"
    elif reason is None and len(live) > 1:
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
            {inner: facts.origin(value) for inner, value in pairs if value not in flow.dependent},
            options,
            dependent=body.dependent,
            targets=flow.targets(eqn, body),
            section=_loop_scope(where, eqn),
            known={inner: facts.range(value) for i, (inner, value) in enumerate(pairs) if i not in carried},
            outer={inner: (value, facts) for inner, value in pairs},
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
