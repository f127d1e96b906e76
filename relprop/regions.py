"""Elementwise regions: activations and stand-alone scales, found by dataflow and not by the names of functions.

Every elementwise equation whose live operands all derive from one *source* by elementwise equations belongs to the
region of that source. Where a value of a region is read from outside, the part of the region between source and that
value is one activation, however it is written. Affine equations with parameters at its ends (a batch norm that stands
alone) are layers of their own, of kind `scale`.
"""

from . import primitives as prims
from .chains import is_chain_link, parametric
from .jaxprs import Equation, Value
from .structure import Layer, Options, Plain


def find_regions(moving, flow, facts, taken, options: Options):
    """Return the steps of all regions and the set of values that they produce or hold inside."""
    sources = _sources(moving, flow, taken, options)
    steps: dict[Value, list] = {}
    for eqn in moving:
        for value in eqn.outputs:
            if value in sources and _leaves(value, sources, flow, taken):
                for layer, output in _split(value, sources, flow, facts):
                    steps.setdefault(output, layer)
    return list(steps.values()), set(sources)


def _sources(moving, flow, taken, options: Options) -> dict[Value, Value]:
    """The source of every value inside a region."""
    sources: dict[Value, Value] = {}
    for eqn in moving:
        if eqn in taken or eqn.name not in prims.ELEMENTWISE or eqn.name in options.registered:
            continue
        out = eqn.outputs[0]
        live = {sources.get(v, v) for v in eqn.inputs if v in flow.live}
        if not live and out not in flow.live:  # a comparison of dependent values, the sign of one ...
            live = {sources.get(v, v) for v in eqn.inputs if v in flow.dependent}
        if len(live) != 1:
            continue
        (source,) = live
        real = source.carries_relevance and source.dtype.kind != "c" and out.aval.dtype.kind != "c"
        if real and source.shape == out.shape:
            sources[out] = source
    return sources


def _leaves(value: Value, sources, flow, taken) -> bool:
    """Whether `value` is read outside of its region."""
    if value in flow.exits:
        return True
    return any(
        reader in taken or not reader.outputs or sources.get(reader.outputs[0]) is not sources[value]
        for reader in flow.consumers[value]
    )


def _members(value: Value, source: Value, sources, flow, facts) -> list[Equation]:
    """The equations between `source` and `value`, in order of execution."""
    members: set[Equation] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current is source or sources.get(current) is not source:
            continue
        eqn = facts.producer[current]
        if eqn not in members:
            members.add(eqn)
            pending.extend(eqn.inputs)
    return sorted(members, key=flow.position.__getitem__)


def _split(value: Value, sources, flow, facts):
    """Steps from the source of `value` to it: leading scale, activation, trailing scale, whichever there are."""
    source = sources[value]
    members = _members(value, source, sources, flow, facts)
    if value not in flow.live:
        yield Plain(tuple(members)), value
        return
    head = _run(source, members, flow)
    if len(head) == len(members):
        if any(parametric(e, flow, facts) for e in members):
            yield _scale(members, source, flow, facts), value
        else:
            yield Plain(tuple(members)), value
        return
    while head and not parametric(head[-1], flow, facts):
        head.pop()
    if head:
        yield _scale(head, source, flow, facts), head[-1].outputs[0]
        source = head[-1].outputs[0]
        members = [e for e in members if e not in head]
    tail = _tail(value, members, flow)
    while tail and not parametric(tail[0], flow, facts):
        tail.pop(0)
    middle = [e for e in members if e not in tail]
    out = middle[-1].outputs[0]
    core = next((e for e in reversed(middle) if e.name in prims.NONLINEAR), middle[-1])
    yield Layer("activation", tuple(middle), (source,), out, core), out
    if tail:
        yield _scale(tail, out, flow, facts), value


def _run(value: Value, members, flow) -> list[Equation]:
    """The chain of affine equations that starts at `value`, as long as it is the only way on."""
    chain: list[Equation] = []
    while True:
        readers = [e for e in members if value in e.inputs]
        if len(readers) != 1 or not is_chain_link(readers[0], value, flow):
            return chain
        chain.append(readers[0])
        value = readers[0].outputs[0]


def _tail(value: Value, members, flow) -> list[Equation]:
    """The chain of affine equations that ends at `value`."""
    chain: list[Equation] = []
    for eqn in reversed(members):
        if eqn.outputs[0] is not value:
            return chain
        moving = [v for v in eqn.inputs if v in flow.dependent]
        if len(moving) != 1 or not is_chain_link(eqn, moving[0], flow):
            return chain
        readers = [e for e in members if moving[0] in e.inputs]
        if readers != [eqn]:
            return chain
        chain.insert(0, eqn)
        value = moving[0]
    return chain


def _scale(equations, source: Value, flow, facts) -> Layer:
    named = [facts.origin(v) for e in equations for v in e.inputs if v not in flow.dependent]
    path = next((name for name in named if name is not None), None)
    core = next(e for e in equations if parametric(e, flow, facts))
    return Layer("scale", tuple(equations), (source,), equations[-1].outputs[0], core, path=path)
