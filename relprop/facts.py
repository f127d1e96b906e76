"""Static facts about the values of a program: where they come from, where they vary, what sign they have."""

import numpy as np

from . import primitives as prims
from .jaxprs import Constant, Equation, Value


class Facts:
    """Facts about one program, found on demand and remembered. The unknown is answered by the safe side."""

    def __init__(self, equations, origins: dict[Value, str], nonnegative: set[Value]):
        """`origins` names inputs (parameter paths); `nonnegative` holds inputs known to be >= 0."""
        self.producer: dict[Value, Equation] = {v: eqn for eqn in equations for v in eqn.outputs}
        self._origins: dict[Value, str | None] = dict(origins)
        self._literal: dict[Value, bool] = {}
        self._varying: dict[Value, frozenset[int]] = {}
        self._nonnegative: dict[Value, bool] = dict.fromkeys(nonnegative, True)

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
            return frozenset().union(*dims) & _proper(value.shape)
        return _proper(value.shape)

    def is_nonnegative(self, value: Value) -> bool:
        """Whether no element of `value` can be negative."""
        if isinstance(value, Constant):
            array = value.value
            known = value.ndim == 0 and isinstance(array, bool | int | float | np.generic | np.ndarray)
            return bool(known and value.carries_relevance and array >= 0)
        if value not in self._nonnegative:
            self._nonnegative[value] = False  # a cycle cannot occur; this only stops a wrong program early
            eqn = self.producer.get(value)
            self._nonnegative[value] = eqn is not None and self._sign_of(eqn, eqn.outputs.index(value))
        return self._nonnegative[value]

    def _sign_of(self, eqn: Equation, output: int) -> bool:
        name, inputs = eqn.name, eqn.inputs
        positive = self.is_nonnegative
        if name in ("exp", "exp2", "logistic", "abs", "square", "cosh", "erfc", "sqrt", "rsqrt"):
            return eqn.outputs[0].carries_relevance and not np.issubdtype(inputs[0].dtype, np.complexfloating)
        if name == "integer_pow":
            return eqn.params["y"] % 2 == 0 or positive(inputs[0])
        if name == "mul":
            return inputs[0] is inputs[1] or all(map(positive, inputs))
        if name == "max":
            return any(map(positive, inputs))
        if name == "clamp":
            return positive(inputs[0])
        if name == "select_n":
            return all(map(positive, inputs[1:]))
        if name in ("div", "add", "add_any", "min", "pow", "concatenate", "pad", "dynamic_update_slice", "scatter-add"):
            floats = [v for v in inputs if v.carries_relevance]
            return all(map(positive, floats))
        if name in ("sort", "psum", "psum_invariant", "pvary", "optimization_barrier"):
            return len(inputs) == len(eqn.outputs) and positive(inputs[output])
        if name in _KEEPS_SIGN:
            return positive(inputs[0])
        return False


_KEEPS_SIGN = (
    prims.PURE_RESHAPE
    | prims.SUM_POOL
    | prims.MAX_POOL
    | frozenset(
        "slice dynamic_slice gather reduce_min reduce_window_min cumsum cummax name stop_gradient tanh expm1 log1p cbrt "
        "sharding_constraint floor ceil round reduce_precision reduce_prod cumprod".split()
    )
)


def _proper(shape) -> frozenset[int]:
    return frozenset(d for d, size in enumerate(shape) if size != 1)


def dims_forward(eqn: Equation, dims: frozenset[int]) -> frozenset[int]:
    """The dimensions of a pure reshape's output that correspond to `dims` of its input."""
    source, target = eqn.inputs[0].shape, eqn.outputs[0].shape
    if eqn.name == "transpose":
        return frozenset(out for out, d in enumerate(eqn.params["permutation"]) if d in dims)
    if eqn.name == "broadcast_in_dim":
        moved = eqn.params["broadcast_dimensions"]
        return frozenset(moved[d] for d in dims) & _proper(target)
    if eqn.name in ("reshape", "squeeze", "expand_dims"):
        return _through_reshape(source, target, dims)
    return dims


def dims_back(eqn: Equation, dims: frozenset[int]) -> frozenset[int]:
    """The dimensions of a pure reshape's input that correspond to `dims` of its output."""
    source, target = eqn.inputs[0].shape, eqn.outputs[0].shape
    if eqn.name == "transpose":
        return frozenset(eqn.params["permutation"][d] for d in dims)
    if eqn.name == "broadcast_in_dim":
        return frozenset(d for d, out in enumerate(eqn.params["broadcast_dimensions"]) if out in dims)
    if eqn.name in ("reshape", "squeeze", "expand_dims"):
        return _through_reshape(target, source, dims)
    return dims


def _through_reshape(source, target, dims) -> frozenset[int]:
    """Follow dimensions through a reshape: blocks of dimensions with the same product belong together."""
    if 0 in source:
        return _proper(target)
    found: set[int] = set()
    i = j = 0
    while i < len(source) or j < len(target):
        block_i: list[int] = []
        block_j: list[int] = []
        size_i = size_j = 1
        while True:
            if size_i <= size_j and i < len(source) and (size_i < size_j or not block_i):
                size_i *= source[i]
                block_i.append(i)
                i += 1
            elif j < len(target) and (size_j < size_i or not block_j):
                size_j *= target[j]
                block_j.append(j)
                j += 1
            else:
                break
            if size_i == size_j and block_i and block_j:
                break
        if dims.intersection(block_i):
            found.update(block_j)
    return frozenset(found) & _proper(target)
