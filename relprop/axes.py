"""Which axis of one array is which axis of another: through reshapes and sums, and from a weight to what it makes."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from .jaxprs import Equation, Value


def proper(shape) -> frozenset[int]:
    """The dimensions of which there is more than one element."""
    return frozenset(d for d, size in enumerate(shape) if size != 1)


def dims_forward(eqn: Equation, dims: frozenset[int]) -> frozenset[int]:
    """The dimensions of a pure reshape's output, or of a sum's, that correspond to `dims` of its input."""
    source, target = eqn.inputs[0].shape, eqn.outputs[0].shape
    if eqn.name == "reduce_sum":
        summed = eqn.params["axes"]
        return frozenset(d - sum(a < d for a in summed) for d in dims if d not in summed)
    if eqn.name == "transpose":
        return frozenset(out for out, d in enumerate(eqn.params["permutation"]) if d in dims)
    if eqn.name == "broadcast_in_dim":
        moved = eqn.params["broadcast_dimensions"]
        return frozenset(moved[d] for d in dims) & proper(target)
    if eqn.name in ("reshape", "squeeze", "expand_dims"):
        return _through_reshape(source, target, dims)
    return dims


def where_dims_go(equations: Iterable[Equation], count: int) -> list[frozenset[int]]:
    """Which dimensions each of `count` dimensions has become after a chain of reshapes, sums and elementwise equations."""
    dims = [frozenset({d}) for d in range(count)]
    for eqn in equations:
        dims = [dims_forward(eqn, d) for d in dims]
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
        return proper(target)
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
    return frozenset(found) & proper(target)


def weight_dims(core: Equation, weight: Value) -> tuple[frozenset[int], list[tuple[int, int]]]:
    """Which output dimensions of a mixing primitive belong to its weight: as a set, and as (output, weight) pairs."""
    position = next(i for i, v in enumerate(core.inputs) if v is weight)
    if core.name == "dot_general":
        contract, batch = core.params["dimension_numbers"]
        free = [
            [d for d in range(v.ndim) if d not in contract[i] and d not in batch[i]] for i, v in enumerate(core.inputs[:2])
        ]
        first_free = len(batch[0]) + (len(free[0]) if position == 1 else 0)
        pairs = [(out, d) for out, d in enumerate(batch[position])]
        pairs += [(first_free + i, d) for i, d in enumerate(free[position])]
    elif core.name == "conv_general_dilated" and position == 1 and core.params["batch_group_count"] == 1:
        numbers = core.params["dimension_numbers"]
        pairs = [(numbers.out_spec[1], numbers.rhs_spec[0])]
    else:
        pairs = []
    return frozenset(out for out, _ in pairs), pairs


def summing(core: Equation, weight: Value) -> tuple[Equation, Callable[..., Any], Callable[..., Any]] | None:
    """The equation that sums `core` over pairs of operands and weights, and how operands and how weights are paired for it.

    Pairs of matrices are stacked along a dimension of their own, which leaves the others sharded as they are. None where
    there is nothing that the primitive sums over.
    """
    if core.name == "dot_general":
        contract, batch = core.params["dimension_numbers"]
        if not contract[0]:
            return None
        places = [dims[0] for dims in contract]

        def moved(side, dims):
            return tuple(d + (d >= places[side]) for d in dims)

        numbers = (
            tuple((places[side], *moved(side, contract[side])) for side in (0, 1)),
            tuple(moved(side, batch[side]) for side in (0, 1)),
        )
        equation = dataclasses.replace(core, params={**core.params, "dimension_numbers": numbers})
        position = next(i for i, v in enumerate(core.inputs) if v is weight)
        return (
            equation,
            lambda *xs: jnp.stack(xs, places[1 - position]),
            lambda *ws: jnp.stack(ws, places[position]),
        )
    if core.name == "conv_general_dilated" and core.inputs[1] is weight:
        if core.params["batch_group_count"] != 1 or core.params["feature_group_count"] != 1:
            return None
        numbers = core.params["dimension_numbers"]
        return (
            core,
            lambda *xs: jnp.concatenate(xs, numbers.lhs_spec[1]),
            lambda *ws: jnp.concatenate(ws, numbers.rhs_spec[1]),
        )
    return None
