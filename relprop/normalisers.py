"""Softmax and norms: values that are divided by a statistic of themselves, found by dataflow in whatever spelling.

They are found before everything else, because what leads to a statistic carries no relevance of its own: a norm hands
relevance to its signal alone, a softmax to what is exponentiated.
"""

from collections.abc import Callable

from . import primitives as prims
from .axes import where_dims_go
from .flow import Flow
from .jaxprs import Constant, Equation, Value
from .ranges import UNIT, Range
from .regions import sources
from .structure import Layer, Options

# What a statistic may be made of between its root and its sum; an exponential there makes a gate of it.
_ALGEBRAIC = frozenset(
    "abs add add_any cbrt clamp convert_element_type div integer_pow max min mul neg pow rsqrt select_n sqrt square "
    "sub".split()
)
_ROOTS = frozenset({"rsqrt", "sqrt", "cbrt", "pow"})
_SUMS = prims.SUM_POOL | frozenset({"scatter-add", "scatter_add", "cumsum", "psum", "psum_invariant"})
_REARRANGES = frozenset(prims.MIXING) | frozenset("concatenate dynamic_slice gather pad slice".split())
_MAXIMA = prims.MAX_POOL | frozenset({"scatter-max", "scatter_max", "cummax", "pmax"})


def find_normalisers(flow: Flow, options: Options) -> tuple[list[Layer], dict[Value, Range]]:
    """The layers of kind softmax and norm, and products with a softmax that is divided after the multiplication.

    Also the bounds of what they return, as far as they are known.
    """
    finder = _Finder(flow, sources(flow, set(), options))
    layers = []
    for eqn in flow.moving:
        if eqn.name not in options.registered and eqn.outputs[0].carries_relevance:
            layer = finder.softmax(eqn) or finder.late_softmax(eqn) or finder.norm(eqn)
            if layer is not None and not any(e.name in options.registered for e in layer.equations):
                layers.append(layer)
    return layers, finder.bounds


class _Finder:
    def __init__(self, flow: Flow, sources: dict[Value, Value]):
        self.flow = flow
        self.producer = flow.producer
        self.sources = sources  # of elementwise regions: a quotient of two functions of one value is an activation
        self.bounds: dict[Value, Range] = {}

    def softmax(self, core: Equation) -> Layer | None:
        """`e / sum(e)` with `e = exp(u)`, `exp(u - logsumexp(u))`, or `logsumexp(u)` itself, whose derivative it is."""
        if core.name == "log" and core.inputs[0] in self.flow.live:
            source = self._summed_exponential(core.inputs[0])
            return None if source is None else self._layer(core, source)
        if core.name == "exp":
            eqn = self.producer.get(core.inputs[0])
            if eqn is None or eqn.name != "sub" or not self._is_log_sum(eqn.inputs[1], eqn.inputs[0]):
                return None
            self.bounds[core.outputs[0]] = UNIT
            return self._layer(core, eqn.inputs[0])
        ratio = self._ratio(core)
        path = None if ratio is None else self._exponential(ratio[0])
        if ratio is None or path is None or not self._sum_of(ratio[1], path):
            return None
        if self._are_shares(path, ratio[1]):
            self.bounds[core.outputs[0]] = UNIT
        return self._layer(core, path[-1])

    def late_softmax(self, core: Equation) -> Layer | None:
        """`(e @ v) / sum(e)`: attention that is divided last, a product of the softmax and `v` if that is live."""
        ratio = self._ratio(core)
        if ratio is None:
            return None
        eqn = self._back(ratio[0], lambda e: self._is_link(e) or e.name in prims.SUM_POOL)
        if eqn is None or eqn.name not in (*prims.MIXING, "mul"):
            return None
        for weights, value in (eqn.inputs[:2], eqn.inputs[1::-1]):
            path = self._exponential(weights) if weights in self.flow.live else None
            if path is None or not self._sum_of(ratio[1], path):
                continue
            if value not in self.flow.live:
                return self._layer(core, path[-1])
            live = (self._unshifted(path[-1]), value)
            members = self._between(live, core)
            return Layer("gate", members, live, core.outputs[0], eqn, degrees=(1, 1), roles=("gate", "signal"))
        return None

    def norm(self, core: Equation) -> Layer | None:
        """A live value over a statistic, or times the inverse root or reciprocal of a sum."""
        a, b = (*core.inputs, None)[:2] if core.name in ("mul", "div") else (None, None)
        if a not in self.flow.live or b not in self.flow.live or self.sources.get(a, a) is self.sources.get(b, b):
            return None
        if self._is_statistic(b, a, core.name == "div"):
            signal, statistic = a, b
        elif core.name == "mul" and self._is_statistic(a, b):
            signal, statistic = b, a
        else:
            return None
        joint = self._joint(signal, statistic, core)
        return Layer("norm", (core,), (signal,), core.outputs[0], core, frozen=(statistic,), joint=joint)

    def _layer(self, core: Equation, source: Value) -> Layer:
        source = self._unshifted(source)
        return Layer("softmax", self._between((source,), core), (source,), core.outputs[0], core)

    def _ratio(self, core: Equation) -> tuple[Value, Value] | None:
        """Numerator and denominator, both live, of a division or of a multiplication by a reciprocal."""
        live = self.flow.live
        if core.name not in ("div", "mul") or not all(v in live for v in core.inputs):
            return None
        if core.name == "div":
            return core.inputs[0], core.inputs[1]
        for part, factor in (core.inputs, core.inputs[::-1]):
            eqn = self._back(factor, self._is_link)
            if eqn is not None and eqn.name == "div" and eqn.inputs[0] not in self.flow.dependent:
                return part, eqn.inputs[1]
            if eqn is not None and eqn.name == "integer_pow" and eqn.params["y"] == -1:
                return part, eqn.inputs[0]
        return None

    def _is_link(self, eqn: Equation) -> bool:
        """Whether an equation keeps the elements of its one live operand apart, and is linear in it."""
        if len(self.flow.live_operands(eqn)) != 1:
            return False
        if eqn.name == "select_n":
            return eqn.inputs[0] not in self.flow.live
        return eqn.name in prims.PURE_RESHAPE | {"mul"} or (eqn.name == "div" and eqn.inputs[0] in self.flow.live)

    def _back(self, value: Value, passes: Callable[[Equation], bool]) -> Equation | None:
        """The equation that `value` comes from, over links that pass."""
        while (eqn := self.producer.get(value)) is not None and passes(eqn):
            (value,) = self.flow.live_operands(eqn)
        return eqn

    def _exponential(self, value: Value) -> list[Value] | None:
        """The values from `value` back to the live operand of an exponential, that one last."""
        path = [value]
        while (eqn := self.producer.get(path[-1])) is not None:
            live = self.flow.live_operands(eqn)
            path += live[:1]
            if eqn.name in ("exp", "exp2"):
                return path if live else None
            if not self._is_link(eqn):
                return None
        return None

    def _sum_of(self, total: Value, path: list[Value]) -> bool:
        """Whether `total` is a sum of the exponentials on `path`: linear in them, up to what is not live."""
        bases, summed = set(path[:-1]), False
        pending, seen = [total], set()
        while pending:
            value = pending.pop()
            if value in bases or value in seen:
                continue
            seen.add(value)
            eqn = self.producer.get(value)
            if eqn is not None and eqn.name in ("exp", "exp2") and self._same(eqn.inputs[0], path[-1]):
                continue
            if eqn is None or not self._is_linear(eqn):
                return False
            summed |= eqn.name in _SUMS or eqn.name in prims.MIXING
            pending.extend(self.flow.live_operands(eqn))
        return summed

    def _are_shares(self, path: list[Value], total: Value) -> bool:
        """Whether exponentials divided by `total` stay within 0 and 1: nothing weighs them, and the axes agree."""
        links = [self.producer[value] for value in path[-3::-1]]
        for eqn in links:
            masks = eqn.name == "select_n" and all(self._is_zero(v) for v in eqn.inputs[1:] if v not in self.flow.live)
            if not masks and eqn.name not in prims.PURE_RESHAPE:
                return False
        steps: list[Equation] = []
        value = total
        while value not in path[:-1] and (eqn := self.producer[value]).name not in ("exp", "exp2"):
            steps.insert(0, eqn)
            if eqn.name in ("scatter-add", "scatter_add"):  # a sum over segments, gathered back
                return all(e.name in prims.SELECTION or e.name in _SUMS for e in steps)
            if eqn.name not in prims.PURE_RESHAPE | {"reduce_sum", "add", "max", "abs", "select_n"}:
                return False
            live = self.flow.live_operands(eqn)
            if len(live) != 1:
                return False
            (value,) = live
        kept, parts = (where_dims_go(equations, path[-2].ndim) for equations in (steps, links))
        return all(not k or k == p for k, p in zip(kept, parts, strict=True))

    def _is_zero(self, value: Value) -> bool:
        while (eqn := self.producer.get(value)) is not None and eqn.name in prims.PURE_RESHAPE:
            value = eqn.inputs[0]
        return isinstance(value, Constant) and value.ndim == 0 and bool(value.value == 0)

    def _same(self, a: Value, b: Value, depth: int = 8) -> bool:
        """Whether two values are computed in the same way from the same values: written twice in the code."""
        first, second = self.producer.get(a), self.producer.get(b)
        if a is b or first is None or second is None or depth == 0:
            return a is b or (isinstance(a, Constant) and isinstance(b, Constant) and a.literal and a.value == b.value)
        if first.name != second.name or first.name in prims.CALLS or str(first.params) != str(second.params):
            return False
        alike = first.outputs.index(a) == second.outputs.index(b)
        return alike and all(self._same(u, v, depth - 1) for u, v in zip(first.inputs, second.inputs, strict=True))

    def _is_linear(self, eqn: Equation) -> bool:
        live = self.flow.live_operands(eqn)
        if eqn.name in prims.STRUCTURAL - prims.MAX_POOL - {"select_n", "max", "min"}:
            return True
        # A sum of exponentials is positive: its absolute value and its maximum with a small number are itself.
        return len(live) == 1 and (self._is_link(eqn) or eqn.name in ("abs", "max") or eqn.name in prims.MIXING)

    def _summed_exponential(self, total: Value) -> Value | None:
        """`u` where `total` is a sum of `exp(u)`."""
        pending, seen = [total], set()
        while pending:
            value = pending.pop()
            eqn = self.producer.get(value)
            if eqn is None or value in seen:
                continue
            seen.add(value)
            path = self._exponential(value)
            if path:
                return path[-1] if self._sum_of(total, path) else None
            if not self._is_linear(eqn):
                return None
            pending.extend(self.flow.live_operands(eqn))
        return None

    def _is_log_sum(self, value: Value, of: Value) -> bool:
        """Whether `value` is logsumexp of `of`, up to subtracting the maximum on both sides."""
        while (eqn := self.producer.get(value)) is not None and eqn.name != "log":
            live = self.flow.live_operands(eqn)
            if len(live) > 1:  # the maximum, added back where it was not stopped
                live = [v for v in live if not self._is_maximum(v, of)]
            if len(live) != 1 or eqn.name not in prims.PURE_RESHAPE | prims.SHIFTS:
                return False
            (value,) = live
        source = self._summed_exponential(eqn.inputs[0]) if eqn is not None else None
        return source is not None and self._unshifted(source) is self._unshifted(of)

    def _unshifted(self, value: Value) -> Value:
        """`u` for a `value` that is `u - max(u)`, with or without `stop_gradient`."""
        eqn = self.producer.get(value)
        if eqn is not None and eqn.name == "sub" and self._is_maximum(eqn.inputs[1], eqn.inputs[0]):
            return eqn.inputs[0]
        return value

    def _is_maximum(self, value: Value, of: Value) -> bool:
        """Whether `value` is a maximum over elements of `of`, reshaped or selected from."""
        passed = False
        passing = prims.SELECTION | {"stop_gradient"}
        while value is not of and (eqn := self.producer.get(value)) is not None:
            known = [v for v in eqn.inputs if v in self.flow.dependent and v.carries_relevance]
            if eqn.name not in passing | _MAXIMA or len(known) != 1:
                return False
            passed |= eqn.name in _MAXIMA
            (value,) = known
        return passed and value is of

    def _is_statistic(self, value: Value, of: Value, rooted: bool = False) -> bool:
        """Whether `value` is a root or the reciprocal of a sum or maximum: a norm's statistic, not a signal.

        A sum may also be written as slices that are added, or as a product with a constant matrix, of even powers, or as
        an addition to `of`, the value that it normalises. With `rooted` the reciprocal is taken by a division.
        """
        pending, seen = [(value, rooted, False, False)], set()
        while pending:
            current, rooted, mixed, added = pending.pop()
            if added and current is of:
                return True
            eqn = self.producer.get(current)
            if eqn is None or (eqn, rooted, mixed, added) in seen:
                continue
            seen.add((eqn, rooted, mixed, added))
            live = self.flow.live_operands(eqn)
            summed = eqn.name in _SUMS | prims.MAX_POOL or (eqn.name in prims.MIXING and len(live) == 2)
            if rooted and (summed or eqn.name in prims.CALLS or (mixed and _is_even(eqn))):
                return True
            if eqn.name in _ALGEBRAIC | prims.PURE_RESHAPE:
                reciprocal = eqn.name == "div" and eqn.inputs[0] not in self.flow.dependent
                reciprocal |= eqn.name == "integer_pow" and eqn.params["y"] < 0
                root = rooted or reciprocal or eqn.name in _ROOTS
                pending.extend((v, root, mixed, added or (root and eqn.name in prims.SHIFTS)) for v in live)
            elif rooted and eqn.name in _REARRANGES:
                pending.extend((v, rooted, True, added) for v in live)
        return False

    def _between(self, sources: tuple[Value, ...], core: Equation) -> tuple[Equation, ...]:
        """The equations from `sources` to the output of `core`, in order of execution."""
        derived = set(sources)
        members: dict[Value, Equation] = {}
        starts = [self.flow.position[self.producer[v]] if v in self.producer else 0 for v in sources]
        for eqn in self.flow.program.equations[min(starts) : self.flow.position[core] + 1]:
            if any(v in derived for v in eqn.inputs) and not any(v in sources for v in eqn.outputs):
                derived.update(eqn.outputs)
                members.update((v, eqn) for v in eqn.outputs)
        found: set[Equation] = set()
        pending = [core.outputs[0]]
        while pending:
            member = members.get(pending.pop())
            if member is not None and member not in found:
                found.add(member)
                pending.extend(member.inputs)
        return tuple(sorted(found, key=self.flow.position.__getitem__))

    def _joint(self, signal: Value, statistic: Value, core: Equation) -> tuple[Equation, ...]:
        """The equations from `signal` to the output of `core`; none where the statistic is of anything else, too."""
        start = self.flow.position[self.producer[signal]] if signal in self.producer else -1
        pending, seen = [statistic], {signal}
        while pending:
            value = pending.pop()
            if value in seen or isinstance(value, Constant) or value not in self.flow.live:
                continue
            seen.add(value)
            eqn = self.producer.get(value)
            if eqn is None or self.flow.position[eqn] < start:
                return ()
            pending.extend(eqn.inputs)
        return self._between((signal,), core)


def _is_even(eqn: Equation) -> bool:
    even = eqn.name == "integer_pow" and eqn.params["y"] % 2 == 0
    return even or eqn.name in ("abs", "square") or (eqn.name == "mul" and eqn.inputs[0] is eqn.inputs[1])
