"""Functions, traced and read: done once for a function and the shapes of its arguments.

What is remembered is forgotten with the function. A function that closes over arrays is traced at every call, because they
may have changed; numbers, flags and names that it closes over, or finds among globals and its own attributes, are compared.
What the functions that it calls read besides their arguments counts, as with `jax.jit`, as it was when it was traced.
"""

import dataclasses
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax

from .arguments import Leaves, follow_companions, is_array, with_companions
from .errors import ArgumentError, TargetError
from .jaxprs import Constant, Program, open_program
from .recognise import number, recognise
from .registry import REGISTERED
from .structure import Options, Section

_SIZE = 16  # how many ways to call one function are remembered
_PLAIN = bool | int | float | complex | str | None
_functions: weakref.WeakKeyDictionary[Any, dict[Any, "Flat"]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Traced:
    """What there is to know of a function before rules are chosen.

    `shapes` is the pytree of what is explained, the output and the auxiliary arrays, flat in the program's outputs, of which
    the first `explained` are explained. `static_aux` are the parts of the auxiliary output that are no arrays.
    """

    section: Section
    shapes: Any
    explained: int
    static_aux: list[Any]


class Flat:
    """A function of the arrays among its arguments, with the jaxprs that it has been traced to."""

    def __init__(self, fn: Callable[..., Any], leaves: Leaves, target: Any, has_aux: bool):
        self.read: list[tuple[Any, Any, Traced]] = []
        rebuild, static_aux = leaves.rebuild, list[Any]()
        function: Callable[[], Any] = weakref.ref(fn) if _is_weak(fn) else lambda: fn

        def flat(*arrays):
            positional, named = rebuild(arrays)
            out = function()(*positional, **named)
            if has_aux:
                if not isinstance(out, tuple) or len(out) != 2:
                    raise ArgumentError(
                        f"With has_aux=True the function must return a pair (output, aux), got {type(out).__name__}."
                    )
                out, aux = out
                leaves_of_aux, form = jax.tree_util.tree_flatten(aux)
                static_aux[:] = [form, [None if is_array(leaf) else leaf for leaf in leaves_of_aux]]
                aux = [leaf for leaf in leaves_of_aux if is_array(leaf)]
            else:
                aux = []
            return (target(out) if callable(target) else out), out, aux

        self.call, self.static_aux = flat, static_aux


def traced(
    fn: Callable[..., Any], leaves: Leaves, target: Any, has_aux: bool, fallback: Any, tangent_dtype: Any
) -> tuple[Traced, Leaves]:
    """Trace a function and find its layers; returns the leaves with the companions of explained integers."""
    known, key = _known(fn, leaves, target, has_aux)
    flat = known.get(key) or Flat(fn, leaves, target, has_aux)
    # JAX remembers the jaxpr of a function object, for the context that it was traced in.
    jaxpr, shapes = jax.make_jaxpr(flat.call, return_shape=True)(*leaves.arrays)
    options = Options(fallback, dict(REGISTERED))
    for earlier, given, found in flat.read:
        if earlier is jaxpr and given == (options, tangent_dtype):
            return found, with_companions(leaves, found.section.program.outputs)
    program = open_program(jaxpr)
    static_aux = next((f.static_aux for earlier, _, f in flat.read if earlier is jaxpr), list(flat.static_aux))
    found, leaves = _read(program, shapes, static_aux, leaves, options, tangent_dtype)
    flat.read.append((jaxpr, (options, tangent_dtype), found))
    if _captures(program) or len(flat.read) > _SIZE:
        known.pop(key, None)
    elif len(known) < _SIZE:
        known[key] = flat
    return found, leaves


def _read(program: Program, shapes, static_aux, leaves: Leaves, options, tangent_dtype) -> tuple[Traced, Leaves]:
    explained = len(jax.tree_util.tree_leaves(shapes[0]))
    if not any(v.carries_relevance for v in program.outputs[:explained]):
        given = ", ".join(f"{v.dtype}{list(v.shape)}" for v in program.outputs[:explained]) or "nothing"
        raise TargetError(
            f"The function returns {given}: there is no floating-point output whose relevance could be explained."
        )
    plain, leaves = leaves, with_companions(leaves, program.outputs)
    if leaves is not plain:
        program = follow_companions(program, plain, leaves)
    if tangent_dtype is not None:
        program = program.with_tangents_in(tangent_dtype)
    live = [i in leaves.data for i in range(len(leaves.arrays))]
    origins = {v: name for v, name, on in zip(program.inputs, leaves.names, live, strict=True) if not on}
    section, _ = number(recognise(program, live, origins, options, targets=program.outputs[:explained]))
    return Traced(section, shapes, explained, static_aux), leaves


def _known(fn, leaves: Leaves, target, has_aux) -> tuple[dict[Any, Flat], Any]:
    """What is remembered of a function, and the name of this way to call it; nothing of what cannot be compared."""
    target = target if callable(target) else None
    key: Any = (leaves.form, tuple(leaves.names), tuple(leaves.explained), tuple(leaves.data), target, has_aux)
    try:
        key = (*key, tuple(_reads(fn)), tuple(_reads(target)))
        hash(key)
        return _functions.setdefault(fn, {}), key
    except (TypeError, ValueError):  # not hashable; a closure that is not filled yet
        return {}, None


def _reads(fn: Any) -> Iterator[tuple[Any, ...]]:
    """What a function reads that may change: the contents of its closure, plain values among its globals and attributes."""
    if isinstance(fn, functools.partial):
        yield from _reads(fn.func)
        return
    code = getattr(fn, "__code__", None)
    for cell in getattr(fn, "__closure__", None) or ():
        content = cell.cell_contents  # a function is not kept: it may be this one
        yield type(content), weakref.ref(content) if isinstance(content, types.FunctionType) else content
    named = getattr(fn, "__globals__", {})
    found = {name: named[name] for name in getattr(code, "co_names", ()) if name in named}
    found |= getattr(getattr(fn, "__self__", fn), "__dict__", {})
    yield from ((name, type(value), value) for name, value in found.items() if isinstance(value, _PLAIN))


def _captures(program: Program) -> bool:
    """Whether a program holds arrays that are not among its inputs."""
    read = itertools.chain(program.outputs, *(eqn.inputs for eqn in program.equations))
    return any(isinstance(v, Constant) and not v.literal for v in read)


def _is_weak(fn: Any) -> bool:
    try:
        return weakref.ref(fn) is not None
    except TypeError:
        return False
