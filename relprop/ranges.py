"""Interval analysis: bounds of a value that hold whatever the arrays are, from the structure of the program alone.

Signs spare rules the half that is zero; a factor that stays within 0 and 1 is what makes a product a gate. What is not
known is unbounded.
"""

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np

from . import primitives as prims
from .axes import where_dims_go
from .jaxprs import Constant, Equation, Value

Range = tuple[float, float]
UNBOUNDED: Range = (-math.inf, math.inf)
UNIT: Range = (0.0, 1.0)
_NONNEGATIVE: Range = (0.0, math.inf)


class Ranges:
    """The bounds of every value of a program; `known` holds those of inputs and of recognised values."""

    def __init__(self, equations: Iterable[Equation], known: dict[Value, Range]):
        self._found = dict(known)
        self._producer: dict[Value, Equation] = {}
        for eqn in equations:
            self._producer.update((v, eqn) for v in eqn.outputs)
            for i, out in enumerate(eqn.outputs):
                if out not in self._found:
                    self._found[out] = _within(self._of_output(eqn, i), _of_dtype(out))

    def of(self, value: Value) -> Range:
        """The lowest and the highest value that an element of `value` can have."""
        if isinstance(value, Constant):
            array = value.value
            if value.ndim == 0 and isinstance(array, bool | int | float | np.generic | np.ndarray):
                return _bound(float(np.real(array)), float(np.real(array)))
            return _of_dtype(value)
        return self._found.get(value, _of_dtype(value))

    def _of_output(self, eqn: Equation, output: int) -> Range:
        name, inputs = eqn.name, eqn.inputs
        if not inputs or any(0 in v.shape for v in inputs):  # a maximum of nothing is infinite
            return UNBOUNDED
        kind = getattr(eqn.outputs[output].dtype, "kind", "")
        if kind == "c" or (kind in "iub" and name not in prims.SELECTION):  # integers wrap around
            return UNBOUNDED
        given = [self.of(v) for v in inputs]
        if name in _MONOTONE:
            return _bound(*(_safely(_MONOTONE[name], end) for end in given[0]))
        if name in _COMBINED:
            return _COMBINED[name](eqn, given)
        if name == "div":
            return UNIT if self._is_share(*inputs) else _divided(given)
        if name == "select_n":
            return _union(given[1:2] if self._asks_for_nan(inputs[0]) else given[1:])
        if name == "convert_element_type":
            cut = kind in "iub" and inputs[0].dtype.kind not in "iub"
            return UNBOUNDED if cut or kind == "b" else given[0]
        if name == "scatter":  # it may apply a function to what it updates
            return UNBOUNDED
        if name == "gather" and eqn.params.get("fill_value") is not None:
            return _union([given[0], (float(eqn.params["fill_value"]),) * 2])
        if name in prims.SELECTION or name == "stop_gradient":
            if len(inputs) == len(eqn.outputs):  # forms with several operands (sort ...) keep them apart
                return given[output]
            if output > 0 and name in ("top_k", "approx_top_k"):  # indices
                return UNBOUNDED
            moved = [r for v, r in zip(inputs, given, strict=True) if v.dtype == eqn.outputs[output].dtype]
            return _union(moved) if moved else UNBOUNDED
        return UNBOUNDED

    def _is_share(self, part: Value, total: Value) -> bool:
        """Whether `part / total` is a part of a sum of non-negative parts, `w / sum(w)`, with the sum along kept axes."""
        if self.of(part)[0] < 0:
            return False
        path: list[Equation] = []
        while (eqn := self._producer.get(total)) is not None and eqn.name != "reduce_sum":
            rest = [v for v in eqn.inputs if not isinstance(v, Constant)]
            grows = eqn.name in ("add", "max") and all(self.of(v)[0] >= 0 for v in eqn.inputs if isinstance(v, Constant))
            if len(rest) != 1 or (eqn.name not in prims.PURE_RESHAPE and not grows):
                return False
            path.insert(0, eqn)
            (total,) = rest
        if eqn is None or eqn.inputs[0] is not part:
            return False
        return all(kept <= {d} for d, kept in enumerate(where_dims_go((eqn, *path), part.ndim)))

    def _asks_for_nan(self, predicate: Value) -> bool:
        """Whether `predicate` is `d != d`, true for NaN alone: what is selected then bounds no number."""
        eqn = self._producer.get(predicate)
        return eqn is not None and eqn.name == "ne" and eqn.inputs[0] is eqn.inputs[1]


def _bound(low: float, high: float) -> Range:
    return UNBOUNDED if math.isnan(low) or math.isnan(high) else (low, high)


def _safely(f: Callable[[float], float], end: float) -> float:
    try:
        return f(end)
    except OverflowError:
        return math.copysign(math.inf, end)
    except ValueError:  # the logarithm of 0 or of what is negative
        return -math.inf


def _union(ranges) -> Range:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _within(found: Range, limits: Range) -> Range:
    return max(found[0], limits[0]), min(found[1], limits[1])


def _of_dtype(value: Value) -> Range:
    kind = getattr(getattr(value.aval, "dtype", None), "kind", "")
    return UNIT if kind == "b" else _NONNEGATIVE if kind == "u" else UNBOUNDED


def _product(a: Range, b: Range) -> Range:
    # 0 times something unbounded is 0: bounds are limits of finite numbers.
    corners = [0.0 if 0 in (x, y) else x * y for x, y in itertools.product(a, b)]
    return min(corners), max(corners)


def _divided(given) -> Range:
    (low, high), (least, most) = given
    if least > 0 or most < 0:
        return _product((low, high), (1 / most, 1 / least))
    if least >= 0 and low >= 0:
        return _NONNEGATIVE
    return UNBOUNDED


def _multiplied(eqn, given) -> Range:
    low, high = _product(*given)
    return (max(low, 0.0), high) if eqn.inputs[0] is eqn.inputs[1] else (low, high)


def _powered(eqn, given) -> Range:
    low, high = given[0]
    power = eqn.params["y"] if eqn.name == "integer_pow" else 2
    if power < 0:
        return _NONNEGATIVE if power % 2 == 0 or low >= 0 else UNBOUNDED
    if power % 2:
        return _bound(*(_safely(lambda end: end**power, end) for end in (low, high)))
    ends = [_safely(lambda end: end**power, abs(end)) for end in (low, high)]
    return (0.0 if low <= 0 <= high else min(ends)), max(ends)


def _real_power(eqn, given) -> Range:
    (low, high), (exponent, _) = given
    if low < 0:
        return UNBOUNDED
    return UNIT if high <= 1 and exponent >= 0 else _NONNEGATIVE


def _summed(eqn, given) -> Range:
    """A sum of any number of terms, or of products of terms: its sign where that of the terms is known."""
    low, high = _product(*given[:2]) if eqn.name in prims.MIXING else _union(given[:1])
    return _signs(low, high)


def _accumulated(eqn, given) -> Range:
    low, high = _union([r for v, r in zip(eqn.inputs, given, strict=True) if v.dtype == eqn.outputs[0].dtype])
    return _signs(low, high)


def _signs(low: float, high: float) -> Range:
    return (0.0 if low >= 0 else -math.inf), (0.0 if high <= 0 else math.inf)


def _absolute(eqn, given) -> Range:
    low, high = given[0]
    return (0.0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))


def _whole(to_integer: Callable[[float], int], x: float) -> float:
    return float(to_integer(x)) if math.isfinite(x) else x


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


_MONOTONE: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "exp2": lambda x: 2.0**x,
    "expm1": math.expm1,
    "log": math.log,
    "log1p": math.log1p,
    "logistic": _sigmoid,
    "tanh": math.tanh,
    "erf": math.erf,
    "atan": math.atan,
    "sqrt": lambda x: math.sqrt(max(x, 0.0)),
    "cbrt": math.cbrt,
    "sinh": math.sinh,
    "asinh": math.asinh,
    "sign": lambda x: float(np.sign(x)),
    "floor": lambda x: _whole(math.floor, x),
    "ceil": lambda x: _whole(math.ceil, x),
}
_COMBINED: dict[str, Callable[[Equation, list[Range]], Range]] = {
    "add": lambda eqn, given: _bound(given[0][0] + given[1][0], given[0][1] + given[1][1]),
    "add_any": lambda eqn, given: _bound(given[0][0] + given[1][0], given[0][1] + given[1][1]),
    "sub": lambda eqn, given: _bound(given[0][0] - given[1][1], given[0][1] - given[1][0]),
    "neg": lambda eqn, given: (-given[0][1], -given[0][0]),
    "mul": _multiplied,
    "max": lambda eqn, given: (max(given[0][0], given[1][0]), max(given[0][1], given[1][1])),
    "min": lambda eqn, given: (min(given[0][0], given[1][0]), min(given[0][1], given[1][1])),
    "clamp": lambda eqn, given: (
        min(max(given[1][0], given[0][0]), given[2][0]),
        min(max(given[1][1], given[0][1]), given[2][1]),
    ),
    "abs": _absolute,
    "square": _powered,
    "integer_pow": _powered,
    "pow": _real_power,
    "round": lambda eqn, given: (_whole(math.ceil, given[0][0] - 0.5), _whole(math.floor, given[0][1] + 0.5)),
    "rsqrt": lambda eqn, given: _NONNEGATIVE,
    "cosh": lambda eqn, given: (1.0, math.inf),
    "erfc": lambda eqn, given: (0.0, 2.0),
    "sin": lambda eqn, given: (-1.0, 1.0),
    "cos": lambda eqn, given: (-1.0, 1.0),
    **dict.fromkeys((*prims.MIXING, "reduce_sum", "reduce_window_sum", "cumsum", "psum", "psum_invariant"), _summed),
    **dict.fromkeys(("scatter-add", "scatter_add"), _accumulated),
    # A product of anything between 0 and 1 stays there.
    **dict.fromkeys(
        ("cumprod", "reduce_prod"),
        lambda eqn, given: UNIT if given[0][0] >= 0 and given[0][1] <= 1 else (*_summed(eqn, given)[:1], math.inf),
    ),
}
