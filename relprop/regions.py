"""Elementwise regions: activations and stand-alone scales, found by dataflow and not by the names of functions.

Every elementwise equation whose live operands all derive from one *source* by elementwise equations belongs to the
region of that source. Where a value of a region is read from outside, the part of the region between source and that
value is one activation, however it is written. Affine equations with parameters that all paths go through (a batch norm
that stands alone) are layers of their own, of kind `scale`.
"""

import itertools

from . import primitives as prims
from .chains import is_linear_here, parametric
from .jaxprs import Equation, Value
from .structure import Layer, Options, Plain


def find_regions(flow, facts, taken, options: Options):
    """Return the steps of all regions, and the source of every value that they produce or hold inside."""
    inside = sources(flow, taken, options)
    steps: dict[Value, Layer | Plain] = {}
    for eqn in flow.moving:
        for value in eqn.outputs:
            if value in inside and value in flow.carries and _leaves(value, inside, flow, taken):
                for layer, output in _split(value, inside, flow, facts):
                    steps.setdefault(output, layer)
    return list(steps.values()), inside


def sources(flow, taken, options: Options) -> dict[Value, Value]:
    """The source of every value inside a region."""
    found: dict[Value, Value] = {}
    for eqn in flow.program.equations:
        if eqn in taken or eqn.name not in prims.ELEMENTWISE or eqn.name in options.registered:
            continue
        out = eqn.outputs[0]
        if out not in flow.dependent:
            continue
        live = {found.get(v, v) for v in eqn.inputs if v in flow.live}
        if not live and out not in flow.live:  # a comparison of dependent values, the sign of one ...
            live = {found.get(v, v) for v in eqn.inputs if v in flow.dependent}
        if len(live) != 1:
            continue
        (source,) = live
        real = source.carries_relevance and source.dtype.kind != "c" and out.aval.dtype.kind != "c"
        if real and source.shape == out.shape:
            found[out] = source
    return found


def _leaves(value: Value, sources, flow, taken) -> bool:
    """Whether `value` is read outside of its region."""
    if value in flow.exits:
        return True
    return any(r in taken or sources.get(r.outputs[0]) is not sources[value] for r in flow.consumers[value])


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
    """The steps from the source of `value` to it, each with its output: activations, and scales between them."""
    source = sources[value]
    members = _members(value, source, sources, flow, facts)
    for is_scale, equations in _runs(_blocks(members, source, flow), flow, facts):
        out = equations[-1].outputs[0]
        if is_scale:
            yield _scale(equations, source, flow, facts), out
        elif all(is_linear_here(e, flow) for e in equations):
            yield Plain(tuple(equations)), out
        else:
            core = next((e for e in reversed(equations) if e.name in prims.NONLINEAR), equations[-1])
            yield Layer("activation", tuple(equations), (source,), out, core), out
        source = out


def _blocks(members, source: Value, flow) -> list[list[Equation]]:
    """Cut a region at every value that all paths from its source go through."""
    last_read = {v: i for i, e in enumerate(members) for v in e.inputs}
    blocks: list[list[Equation]] = [[]]
    reach = last_read[source]
    for i, eqn in enumerate(members):
        blocks[-1].append(eqn)
        if reach <= i and i + 1 < len(members):
            blocks.append([])
        reach = max([reach, *(last_read.get(v, i) for v in eqn.outputs)])
    return blocks


def _runs(blocks, flow, facts):
    """Merge blocks into runs: scales, which begin and end with parameters, and what lies between them."""
    runs: list[tuple[bool, list[Equation]]] = []
    for affine, group in itertools.groupby(blocks, lambda block: len(block) == 1 and is_linear_here(block[0], flow)):
        equations = [e for block in group for e in block]
        marks = [i for i, e in enumerate(equations) if affine and e.name != "select_n" and parametric(e, flow, facts)]
        start, stop = (marks[0], marks[-1] + 1) if marks else (0, 0)
        for is_scale, part in (
            (False, equations[:start]),
            (True, equations[start:stop]),
            (False, equations[stop:]),
        ):
            if part and runs and runs[-1][0] == is_scale:
                runs[-1][1].extend(part)
            elif part:
                runs.append((is_scale, part))
    return runs


def _scale(equations, source: Value, flow, facts) -> Layer:
    named = [facts.origin(v) for e in equations for v in e.inputs if v not in flow.dependent]
    path = next((name for name in named if name is not None), None)
    core = next(e for e in equations if parametric(e, flow, facts))
    return Layer("scale", tuple(equations), (source,), equations[-1].outputs[0], core, path=path)
