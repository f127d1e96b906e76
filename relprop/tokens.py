"""Relevance of integer inputs: a token's relevance is that of the embedding that it selects.

An integer has no tangent. So every explained array of integers gets a companion of ones of its shape, and where the
program turns integers into numbers (rows gathered from a table, a product with a one-hot array) the result is multiplied
by the companion, carried to that place. The relevance of the companion is that of the token: the coefficient at the
gathered rows times the rows, summed over the features. Companions go where indices go: through reshapes, slices, arithmetic,
and into scanned inputs, branches and checkpoints. Where they cannot follow and rows are looked up all the same, an error
says so. What is looked up in values that depend on an explained input (the logit of a label) is no embedding, and masks,
which are booleans, are no choice of one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import primitives as prims
from .errors import NotDifferentiableError
from .jaxprs import REMAT, Constant, Equation, Program, Value, open_program, read, scan_groups

_MOVES = prims.PURE_RESHAPE | frozenset("slice split unstack tile rev name optimization_barrier".split())
_JOINS = frozenset("concatenate pad stack dynamic_update_slice".split())
_SELECTS = frozenset({"gather", "dynamic_slice"})


def follow(program: Program, integers: Sequence[int], explained: Sequence[int], used: set[int]) -> Callable[..., list[Any]]:
    """A function of the inputs of `program` and of companions of the inputs at `integers`, with the same outputs.

    `explained` are the positions of all inputs that relevance is asked of. When the function is traced, the positions
    in `integers` whose companion is used are added to `used`.
    """

    def evaluate(arrays, companions):
        used.clear()
        follows: list[Tracked | None] = [None] * len(arrays)
        for i, c in zip(integers, companions, strict=True):
            follows[i] = Tracked(c, jnp.ones(c.shape, c.dtype), frozenset({i}))
        dependent = [i in explained or i in integers for i in range(len(arrays))]
        return _Follower(used).run(program, arrays, follows, dependent)

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

    def run(self, program: Program, operands: Sequence[Any], tracked: Sequence[Tracked | None], dependent) -> list[Any]:
        env: dict[Value, Any] = dict(zip(program.inputs, operands, strict=True))
        follows = {v: t for v, t in zip(program.inputs, tracked, strict=True) if t is not None}
        known = {v for v, on in zip(program.inputs, dependent, strict=True) if on}
        producer = {v: eqn for eqn in program.equations for v in eqn.outputs}
        one_hot: set[Value] = set()
        lost: dict[Value, Equation] = {}  # integers and one-hot arrays that come from tokens in a way that is not followed
        for eqn in program.equations:
            given = [read(env, v) for v in eqn.inputs]
            own = [follows.get(v) for v in eqn.inputs]
            flags = [v in known for v in eqn.inputs]
            if any(flags):
                known.update(eqn.outputs)
            self._check(eqn, own, flags, lost)
            if eqn.name in prims.CALLS and any(own):
                env.update(zip(eqn.outputs, self._call(eqn, given, own, flags), strict=True))
                lost.update((v, eqn) for v in eqn.outputs if jnp.issubdtype(v.dtype, jnp.integer))
                continue
            if eqn.name in prims.MIXING and sum(flags) == 1:
                given = [
                    self._multiply(x, t) if t and v in one_hot else x for x, t, v in zip(given, own, eqn.inputs, strict=True)
                ]
            outputs = eqn.evaluate(*given)
            moved = _moved(eqn, given, own) if any(own) else None
            others = any(on and v.carries_relevance and v not in one_hot for v, on in zip(eqn.inputs, flags, strict=True))
            if moved is not None and eqn.outputs[0].carries_relevance:
                if _selects(eqn, own) and not flags[0]:
                    outputs = tuple(self._multiply(out, moved) for out in outputs)
                if others or not any(v in one_hot for v in eqn.inputs):
                    moved = None
            masks = eqn.name == "convert_element_type" and eqn.inputs[0].dtype.kind == "b" and eqn.inputs[0] not in one_hot
            if masks:  # as numbers they count
                moved = None
            if moved is not None:
                parts = _split(eqn, moved) if eqn.name in ("split", "unstack") else [moved]
                follows.update(zip(eqn.outputs, parts, strict=False))
                chosen = eqn.name == "eq" and any(_is_iota(v, producer) for v in eqn.inputs)
                if chosen or any(v in one_hot for v in eqn.inputs):
                    one_hot.update(eqn.outputs)
            elif eqn.name not in prims.DISCRETE and not others:
                self._lose(eqn, own, one_hot, lost)
            env.update(zip(eqn.outputs, outputs, strict=True))
        return [read(env, v) for v in program.outputs]

    @staticmethod
    def _lose(eqn: Equation, own, one_hot: set[Value], lost: dict[Value, Equation]):
        """Remember where tokens, or rows that are one-hot, end in something that is not followed."""
        choices = [v for v, t in zip(eqn.inputs, own, strict=True) if t and (v.dtype.kind in "iu" or v in one_hot)]
        causes = [lost[v] for v in eqn.inputs if v in lost] or [eqn] * bool(choices)
        if causes and not _selects(eqn, own) and eqn.name not in prims.MIXING:
            integers = [v for v in eqn.outputs if jnp.issubdtype(v.dtype, jnp.integer)]
            floats = list(eqn.outputs) if any(u in one_hot or u in lost for u in eqn.inputs) else []
            lost.update(dict.fromkeys(integers or floats, causes[0]))

    @staticmethod
    def _check(eqn: Equation, own, dependent, lost: dict[Value, Equation]):
        """Refuse to leave out what tokens select in ways that are not followed."""
        looks_up = eqn.name in _SELECTS and eqn.outputs[0].carries_relevance and not dependent[0]
        mixes = eqn.name in prims.MIXING and sum(dependent) == 1
        causes = [lost[v] for v in eqn.inputs if v in lost]
        if causes and (looks_up or mixes):
            raise NotDifferentiableError(_ended(causes[0], eqn))
        carry = slice(0, 0)
        if eqn.name == "scan":
            consts, count = scan_groups(eqn.params)
            carry = slice(consts, consts + count)
        elif eqn.name in ("while", "shard_map"):
            carry = slice(None)
        body = eqn.params.get("jaxpr") or eqn.params.get("body_jaxpr")
        if any(own[carry]) and _may_select(open_program(body)):
            raise NotDifferentiableError(_ended(eqn, eqn))

    def _multiply(self, x, tracked: Tracked):
        self.used |= tracked.inputs
        return x * jnp.broadcast_to(tracked.factor(), x.shape).astype(x.dtype)

    def _call(self, eqn: Equation, given, own, flags):
        pairs = [None if t is None else (t.companion, t.mask) for t in own]

        def body(jaxpr, operands, pairs, own, flags):
            tracked = [
                None if t is None or p is None else dataclasses.replace(t, companion=p[0], mask=p[1])
                for t, p in zip(own, pairs, strict=True)
            ]
            return self.run(open_program(jaxpr), operands, tracked, flags)

        if eqn.name in REMAT:
            options = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
            run = jax.checkpoint(lambda xs, ps: body(eqn.params["jaxpr"], xs, ps, own, flags), **options)
            return run(given, pairs)
        if eqn.name == "cond":
            branches = [lambda xs, ps, j=j: body(j, xs, ps, own[1:], flags[1:]) for j in eqn.params["branches"]]
            return lax.switch(given[0], branches, given[1:], pairs[1:])
        if eqn.name != "scan":
            return eqn.evaluate(*given)
        consts, carry = scan_groups(eqn.params)
        first, moving = slice(0, consts), slice(consts + carry, None)
        flags = [*flags[first], *[True] * carry, *flags[moving]]

        def step(carried, scanned):
            xs, ps = scanned
            outputs = body(
                eqn.params["jaxpr"], [*given[first], *carried, *xs], [*pairs[first], *[None] * carry, *ps], own, flags
            )
            return outputs[:carry], outputs[carry:]

        options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
        carried, stacked = lax.scan(step, given[consts : consts + carry], (given[moving], pairs[moving]), **options)
        return [*carried, *stacked]


def _ended(cause: Equation, eqn: Equation) -> str:
    return (
        f"Tokens select rows of an embedding at {eqn.where} in a way that is not followed: by way of '{cause.name}' at "
        f"{cause.where}. Their relevance would be left out. Look the rows up outside of it (tokens are followed through "
        "reshapes, slices, arithmetic, and into scanned inputs, branches and checkpoints), or explain the embeddings."
    )


def _may_select(program: Program) -> bool:
    """Whether rows of floating-point numbers are looked up somewhere in a program."""
    for eqn in program.equations:
        if eqn.name in _SELECTS and eqn.outputs[0].carries_relevance:
            return True
        inner = [eqn.params.get(key) for key in ("jaxpr", "body_jaxpr")] + list(eqn.params.get("branches", ()))
        if eqn.name in prims.CALLS and any(_may_select(open_program(j)) for j in inner if j is not None):
            return True
    return False


def _selects(eqn: Equation, own) -> bool:
    """Whether an equation picks rows of a table by integers that are followed."""
    return eqn.name in _SELECTS and own[0] is None and any(own)


def _moved(eqn: Equation, given, own) -> Tracked | None:
    """The companion of what `eqn` returns, in the shape of its first output; None where it is not a choice any more."""
    follows = [t for t in own if t is not None]
    first, shape = follows[0], eqn.outputs[0].shape
    if eqn.name in ("convert_element_type", "split", "unstack", "optimization_barrier"):
        return first if len(eqn.inputs) == 1 else None
    if eqn.name == "gather" and not any(own[1:]) and eqn.params.get("fill_value") is not None:
        filled = dataclasses.replace(eqn, params={**eqn.params, "fill_value": 0})  # what is out of bounds is no token
        return dataclasses.replace(first.map(lambda c: filled.evaluate(c, *given[1:])[0]), whole=False)
    if eqn.name in _MOVES or (eqn.name in _SELECTS and not any(own[1:])):
        return first.map(lambda c: eqn.evaluate(c, *given[1:])[0])
    if eqn.name in _JOINS:
        return None if any(own[2:]) and eqn.name == "dynamic_update_slice" else _joined(eqn, own, given)
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


def _joined(eqn: Equation, own, given) -> Tracked:
    """Companions beside elements from elsewhere, which have none."""
    follows = [t for t in own if t is not None]
    dtype = follows[0].companion.dtype
    places = given[2:] if eqn.name == "dynamic_update_slice" else []

    def join(parts):
        parts = parts[: len(parts) - len(places)]
        arrays = [jnp.zeros(v.shape, dtype) if c is None else c for v, c in zip(eqn.inputs, parts, strict=False)]
        return eqn.evaluate(*arrays, *places)[0]

    inputs = frozenset().union(*(t.inputs for t in follows))
    whole = all(t is not None and t.whole for t in own)
    return Tracked(join([t and t.companion for t in own]), join([t and t.mask for t in own]), inputs, whole)


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
