"""Static facts about the values of a program: where they come from, where they vary, how they are bounded."""

from . import primitives as prims
from .axes import dims_forward, proper
from .flow import Flow
from .jaxprs import Constant, Value
from .ranges import Range, Ranges

Outer = dict[Value, tuple[Value, "Facts"]]


class Facts:
    """Facts about one program, found on demand and remembered. The unknown is answered by the safe side."""

    def __init__(self, flow: Flow, origins: dict[Value, str], known: dict[Value, Range], outer: Outer | None = None):
        """`origins` names inputs (parameter paths), `known` holds bounds of values.

        `outer` says for the inputs of a body which value outside they are, and the facts there.
        """
        self.flow = flow
        self.outer = outer or {}
        self.producer = flow.producer
        self._known = known
        self._origins: dict[Value, str | None] = dict(origins)
        self._literal: dict[Value, bool] = {}
        self._varying: dict[Value, frozenset[int]] = {}
        self._ranges: Ranges | None = None

    def position(self, value: Value) -> int:
        """When `value` is computed; -1 for inputs."""
        return self.flow.position[self.producer[value]] if value in self.producer else -1

    def outside(self, value: Value) -> list[tuple[Value, "Facts"]]:
        """The value outside of the body that an input of it is, with the facts there."""
        return [self.outer[value]] if value in self.outer else []

    def origin(self, value: Value) -> str | None:
        """The path of the parameter that `value` derives from, the first one where there are several."""
        if value not in self._origins:
            eqn = self.producer.get(value)
            found = [self.origin(v) for v in eqn.inputs] if eqn is not None else []
            self._origins[value] = next((name for name in found if name is not None), None)
        return self._origins[value]

    def is_literal(self, value: Value) -> bool:
        """Whether `value` is made of numbers in the code alone, not of arrays or arguments."""
        if isinstance(value, Constant):
            return value.literal
        if value not in self._literal:
            eqn = self.producer.get(value)
            numeric = prims.ELEMENTWISE | prims.PURE_RESHAPE | prims.SUM_POOL
            self._literal[value] = eqn is not None and eqn.name in numeric and all(self.is_literal(v) for v in eqn.inputs)
        return self._literal[value]

    def varying(self, value: Value) -> frozenset[int]:
        """The dimensions along which `value` may vary."""
        if value not in self._varying:
            self._varying[value] = self._find_varying(value)
        return self._varying[value]

    def _find_varying(self, value: Value) -> frozenset[int]:
        eqn = self.producer.get(value)
        if eqn is not None and eqn.name in prims.PURE_RESHAPE:
            return dims_forward(eqn, self.varying(eqn.inputs[0]))
        if eqn is not None and eqn.name in prims.ELEMENTWISE:
            dims = [self.varying(v) for v in eqn.inputs if v.ndim == value.ndim]
            return frozenset().union(*dims) & proper(value.shape)
        return proper(value.shape)

    def range(self, value: Value) -> Range:
        """Bounds of the elements of `value`; see `relprop.ranges`."""
        if self._ranges is None:
            self._ranges = Ranges(self.flow.program.equations, self._known)
        return self._ranges.of(value)

    def is_nonnegative(self, value: Value) -> bool:
        """Whether no element of `value` can be negative."""
        return value.carries_relevance and self.range(value)[0] >= 0

    def is_gate(self, value: Value) -> bool:
        """Whether `value` is squashed: no element can be below 0 or above 1."""
        low, high = self.range(value)
        return low >= 0 and high <= 1 + 1e-3  # a guard such as `+ 1e-9` does not open a gate
