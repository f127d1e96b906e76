"""Relevance of integer inputs: a token's relevance is that of the embedding that it selects.

An integer has no tangent. So every explained array of integers gets a companion of ones of its shape, and where the
program turns integers into numbers (rows gathered from a table, a product with a one-hot array) the result is multiplied
by the companion, carried to that place. The relevance of the companion is that of the token: the coefficient at the
gathered rows times the rows, summed over the features. Companions go where indices go: through reshapes, slices, arithmetic
and into the bodies of loops. What is counted from integers (positions by `cumsum`, masks) is not a choice of an embedding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import primitives as prims
from .jaxprs import REMAT, Constant, Equation, Program, Value, open_program, read, scan_groups

_MOVES = prims.PURE_RESHAPE | frozenset("slice split rev name optimization_barrier".split())


def follow(program: Program, integers: Sequence[int], used: set[int]) -> Callable[..., list[Any]]:
    """A function of the inputs of `program` and of companions of the inputs at `integers`, with the same outputs.

    When it is traced, the positions in `integers` whose companion is used are added to `used`.
    """

    def evaluate(arrays, companions):
        used.clear()
        follows: list[Tracked | None] = [None] * len(arrays)
        for i, c in zip(integers, companions, strict=True):
            follows[i] = Tracked(c, jnp.ones(c.shape, c.dtype), frozenset({i}))
        return _Follower(used).run(program, arrays, follows)

    return evaluate


def companion(array: Any, dtype: Any) -> Any:
    """The companion of an array of integers: ones of its shape, or the shape alone where that is all there is."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, dtype)
    return jnp.ones_like(array, dtype=dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """A companion at a place in the program: 0 where elements come from elsewhere, where `mask` is 0, too.

    `inputs` are the positions of the integers that it comes from; `whole` says that it has a companion everywhere.
    """

    companion: Any
    mask: Any
    inputs: frozenset[int]
    whole: bool = True

    def map(self, f: Callable[[Any], Any]) -> "Tracked":
        """The same operation on the companion and on its mask."""
        return dataclasses.replace(self, companion=f(self.companion), mask=f(self.mask))

    def factor(self):
        """1 everywhere, and the companion where there is one."""
        if self.whole:
            return self.companion
        return self.companion / jnp.maximum(self.mask, 1) + (self.mask == 0).astype(self.mask.dtype)


class _Follower:
    def __init__(self, used: set[int]):
        self.used = used

    def run(self, program: Program, operands: Sequence[Any], tracked: Sequence[Tracked | None]) -> list[Any]:
        env: dict[Value, Any] = dict(zip(program.inputs, operands, strict=True))
        follows = {v: t for v, t in zip(program.inputs, tracked, strict=True) if t is not None}
        producer = {v: eqn for eqn in program.equations for v in eqn.outputs}
        one_hot: set[Value] = set()
        for eqn in program.equations:
            given = [read(env, v) for v in eqn.inputs]
            own = [follows.get(v) for v in eqn.inputs]
            if not any(own):
                env.update(zip(eqn.outputs, eqn.evaluate(*given), strict=True))
                continue
            if eqn.name in prims.CALLS:
                env.update(zip(eqn.outputs, self._call(eqn, given, own), strict=True))
                continue
            if eqn.name in prims.MIXING:
                chosen = [v in one_hot for v in eqn.inputs]
                given = [self._multiply(x, t) if t and on else x for x, t, on in zip(given, own, chosen, strict=True)]
            outputs = eqn.evaluate(*given)
            moved = _moved(eqn, given, own)
            if moved is not None and eqn.outputs[0].carries_relevance and not _carries(eqn.inputs, own):
                if _selects(eqn, own):
                    outputs = tuple(self._multiply(out, moved) for out in outputs)
                    moved = None
                elif eqn.name == "convert_element_type" and eqn.inputs[0] in one_hot:
                    one_hot.update(eqn.outputs)
                else:
                    moved = None
            if moved is not None:
                parts = _split(eqn, moved) if eqn.name == "split" else [moved]
                follows.update(zip(eqn.outputs, parts, strict=False))
                chosen_here = eqn.name == "eq" and any(_is_iota(v, producer) for v in eqn.inputs)
                if chosen_here or (eqn.name in _MOVES and eqn.inputs[0] in one_hot):
                    one_hot.update(eqn.outputs)
            env.update(zip(eqn.outputs, outputs, strict=True))
        return [read(env, v) for v in program.outputs]

    def _multiply(self, x, tracked: Tracked):
        self.used |= tracked.inputs
        return x * jnp.broadcast_to(tracked.factor(), x.shape).astype(x.dtype)

    def _call(self, eqn: Equation, given, own):
        companions = [None if t is None else (t.companion, t.mask) for t in own]

        def body(jaxpr, operands, companions, own):
            pairs = [t and dataclasses.replace(t, companion=c[0], mask=c[1]) for t, c in zip(own, companions, strict=True)]
            return self.run(open_program(jaxpr), operands, pairs)

        if eqn.name in REMAT:
            options = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
            run = jax.checkpoint(lambda xs, cs: body(eqn.params["jaxpr"], xs, cs, own), **options)
            return run(given, companions)
        if eqn.name == "cond":
            branches = [lambda xs, cs, j=j: body(j, xs, cs, own[1:]) for j in eqn.params["branches"]]
            return lax.switch(given[0], branches, given[1:], companions[1:])
        if eqn.name != "scan":
            return eqn.evaluate(*given)
        consts, carry = scan_groups(eqn.params)
        first, moving = slice(0, consts), slice(consts + carry, None)

        def step(carried, scanned):
            xs, cs = scanned
            operands = [*given[first], *carried, *xs]
            follows = [*companions[first], *[None] * carry, *cs]
            outputs = body(eqn.params["jaxpr"], operands, follows, own)
            return outputs[:carry], outputs[carry:]

        options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
        carried, stacked = lax.scan(step, given[consts : consts + carry], (given[moving], companions[moving]), **options)
        return [*carried, *stacked]


def _carries(inputs, own) -> bool:
    """Whether a tracked operand is a number already."""
    return any(t is not None and v.carries_relevance for v, t in zip(inputs, own, strict=True))


def _selects(eqn: Equation, own) -> bool:
    """Whether an equation picks rows of a table by integers that are followed."""
    return eqn.name in ("gather", "dynamic_slice") and own[0] is None


def _moved(eqn: Equation, given, own) -> Tracked | None:
    """The companion of what `eqn` returns, in the shape of its first output; None where it is not a choice any more."""
    follows = [t for t in own if t is not None]
    first, shape = follows[0], eqn.outputs[0].shape
    if eqn.name in ("convert_element_type", "split", "optimization_barrier"):
        return first if len(eqn.inputs) == 1 else None
    if eqn.name in _MOVES or (eqn.name in ("gather", "dynamic_slice") and not any(own[1:])):
        return first.map(lambda c: eqn.evaluate(c, *given[1:])[0])
    if eqn.name in ("concatenate", "pad"):
        return _joined(eqn, own)
    if _selects(eqn, own):
        if eqn.name == "dynamic_slice":
            return _mean(follows, shape)
        offsets = eqn.params["dimension_numbers"].offset_dims
        batch = [d for d in range(len(shape)) if d not in offsets]
        summed = dataclasses.replace(first, whole=first.whole and first.companion.shape[-1] == 1)
        return summed.map(lambda c: lax.broadcast_in_dim(c[..., 0] if summed.whole else c.sum(-1), shape, batch))
    if eqn.name in prims.ELEMENTWISE:
        return _mean(list({id(t.companion): t for t in follows}.values()), shape)
    return None


def _split(eqn: Equation, whole: Tracked) -> list[Tracked]:
    pairs = zip(eqn.evaluate(whole.companion), eqn.evaluate(whole.mask), strict=True)
    return [dataclasses.replace(whole, companion=companion, mask=mask) for companion, mask in pairs]


def _joined(eqn: Equation, own) -> Tracked:
    """Companions beside elements from elsewhere, which have none."""
    follows = [t for t in own if t is not None]
    dtype = follows[0].companion.dtype

    def join(parts):
        return eqn.evaluate(*(jnp.zeros(v.shape, dtype) if c is None else c for v, c in zip(eqn.inputs, parts, strict=True)))

    (companion,) = join([t and t.companion for t in own])
    (mask,) = join([t and t.mask for t in own])
    inputs = frozenset().union(*(t.inputs for t in follows))
    return Tracked(companion, mask, inputs, all(t is not None and t.whole for t in own))


def _mean(follows: Sequence[Tracked], shape) -> Tracked:
    """The mean of several companions: tokens that choose together share the relevance of what they choose."""
    if len(follows) == 1:
        return follows[0].map(lambda c: jnp.broadcast_to(c, shape))
    companion = sum(jnp.broadcast_to(t.companion, shape) for t in follows)
    mask = sum(jnp.broadcast_to(t.mask, shape) for t in follows)
    whole = all(t.whole for t in follows)
    scale = 1 / len(follows) if whole else 1
    return Tracked(companion * scale, mask * scale, frozenset().union(*(t.inputs for t in follows)), whole)


def _is_iota(value: Value, producer: dict[Value, Equation]) -> bool:
    """Whether `value` counts: what a one-hot array compares with."""
    while (eqn := producer.get(value)) is not None and eqn.name in prims.PURE_RESHAPE:
        value = eqn.inputs[0]
    if isinstance(value, Constant):
        return np.ndim(value.value) > 0 and np.issubdtype(value.dtype, np.integer)
    return eqn is not None and eqn.name == "iota"
