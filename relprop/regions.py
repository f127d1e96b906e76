"""Elementwise regions: activations and stand-alone scales, found by dataflow and not by the names of functions.

Every elementwise equation whose live operands all derive from one *source* by elementwise equations belongs to the
region of that source. Where a value of a region is read from outside, the part of the region between source and that
value is one activation, however it is written. Affine equations with parameters that all paths go through (a batch norm
that stands alone) are layers of their own, of kind `scale`.
"""

import itertools

from . import primitives as prims
from .chains import is_linear_here, parametric
from .jaxprs import Constant, Equation, Value
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
            rays = is_homogeneous(equations, source, facts)
            yield Layer("activation", tuple(equations), (source,), out, core, homogeneous=rays), out
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


_KEEPS_DEGREE = frozenset("max min add add_any sub neg abs convert_element_type copy copy_p".split())
_LOSES_DEGREE = frozenset("eq ge gt le lt ne sign".split())


def is_homogeneous(equations, source: Value, facts) -> bool:
    """Whether an activation is linear along rays from 0 (relu, leaky relu, abs): its slope from 0 is its derivative."""
    degrees: dict[Value, int | None] = {source: 1}
    for eqn in equations:
        # What does not depend on the source has degree 0; the number 0 has any.
        given = [degrees.get(v, 0) for v in eqn.inputs if v in degrees or not _is_zero(v, facts)]
        rounds = eqn.name == "convert_element_type" and not eqn.outputs[0].carries_relevance and any(given)
        degrees[eqn.outputs[0]] = None if rounds else _degree(eqn.name, given)
    return degrees[equations[-1].outputs[0]] == 1


def _degree(name: str, given: list[int | None]) -> int | None:
    """The degree of `f` in `f(a x) = a^degree f(x)` for operands of these degrees; None where there is none."""
    if None in given:
        return None
    if not any(given):
        return 0
    if name == "select_n" and given[0] == 0 and len(set(given[1:])) == 1:
        return given[1]
    if name in _KEEPS_DEGREE and len(set(given)) == 1:
        return given[0]
    if name in _LOSES_DEGREE and len(set(given)) == 1:
        return 0
    return 1 if (name == "mul" and given in ([0, 1], [1, 0])) or (name == "div" and given == [1, 0]) else None


def _is_zero(value: Value, facts) -> bool:
    if isinstance(value, Constant):
        return value.literal and not value.value
    eqn = facts.producer.get(value)
    return eqn is not None and eqn.name in ("broadcast_in_dim", "convert_element_type") and _is_zero(eqn.inputs[0], facts)
