"""What relprop knows of jaxprs: opening calls, naming things, and every difference between versions of JAX.

A traced function becomes a `Program`: a flat list of `Equation`s over `Value`s. Calls that mean nothing for a
linearisation (`jit`, `custom_jvp_call`, `custom_vjp_call`, `closed_call`, `custom_vmap_call` ...) are opened, so that a
layer may cross their boundaries; loops, branches, `remat` and `shard_map` stay equations with bodies of their own.
A `custom_vjp` is opened to its primal function: the backward pass that its author wrote is not LRP's.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core as jex_core
from jax.extend import source_info_util

from .surrogate import with_tangent

# Calls that are opened, each with the parameter that holds its jaxpr. Names differ between versions of JAX.
_OPENED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
    "custom_lin": "call_jaxpr",
    "eval_jaxpr": "jaxpr",
    "composite": "jaxpr",
}
REMAT = frozenset({"remat2", "remat", "checkpoint"})
# Kernels that cannot be read. A function with a backward pass of its own stays closed around them.
_KERNELS = frozenset(
    "dot_product_attention_fp8_fwd_wrapper dot_product_attention_fwd_wrapper ffi_call pallas_call pure_callback "
    "tpu_custom_call".split()
)
# Frames in these folders are not the user's own.
_LIBRARIES = (
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
    os.path.dirname(os.path.abspath(jax.__file__)) + os.sep,
    *(f"{os.sep}site-packages{os.sep}{name}{os.sep}" for name in ("flax", "equinox", "haiku", "penzai")),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value of a program: one array of a known shape and dtype. Compared by identity."""

    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aval.shape

    @property
    def ndim(self) -> int:
        return len(self.aval.shape)

    @property
    def dtype(self):
        return self.aval.dtype

    @property
    def carries_relevance(self) -> bool:
        """Whether its dtype has a tangent space: integers, booleans, keys and tokens have none."""
        dtype = getattr(self.aval, "dtype", None)
        return dtype is not None and jax.dtypes.issubdtype(dtype, np.inexact)


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(Value):
    """A value that is written into the program: a number in the code (`literal`), or a closed-over array."""

    value: Any
    literal: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """`outputs = primitive(inputs)`, with where it came from: a source location and a `named_scope` path.

    A product has the tangent of the same product in `tangent_dtype`, where that is given and narrower; its value is exact.
    """

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    source: Any
    scope: str
    function: str = ""  # the innermost function under `jit` around it, for people to read
    has_effects: bool = False
    tangent_dtype: Any = None

    @property
    def name(self) -> str:
        return self.primitive.name

    def evaluate(self, *operands):
        """Run the primitive on `operands`; returns a tuple of outputs."""
        out = self._bind(operands, self.params)
        if not self._has_narrow_tangent:
            return out
        narrow = [lax.convert_element_type(x, self.tangent_dtype) for x in operands[:2]]  # the others are sizes of groups
        params = {**self.params, "preferred_element_type": self.tangent_dtype, "precision": None}
        # Its value is not used, which costs nothing under `jit`: only its transpose remains of it.
        (surrogate,) = self._bind([*narrow, *operands[2:]], params)
        return (with_tangent(out[0], lax.convert_element_type(surrogate, out[0].dtype)),)

    @property
    def _has_narrow_tangent(self) -> bool:
        if self.tangent_dtype is None or "preferred_element_type" not in self.params:  # which every product has
            return False
        dtype = self.outputs[0].dtype
        floating = jax.dtypes.issubdtype(dtype, np.floating)
        return floating and jax.numpy.finfo(dtype).bits > jax.numpy.finfo(self.tangent_dtype).bits

    def _bind(self, operands, params):
        bind = self.primitive.get_bind_params(params)
        # A pair (functions, params) until jax 0.9, a dict since.
        functions, params = bind if isinstance(bind, tuple) else ((), bind)
        # Under its own name stack and source line, so that profiles and JAX's errors speak of the user's code.
        stack = source_info_util.current_name_stack() + self.source.name_stack
        with source_info_util.user_context(self.source.traceback, name_stack=stack):
            out = self.primitive.bind(*functions, *operands, **params)
        return tuple(out) if self.primitive.multiple_results else (out,)

    @property
    def where(self) -> str:
        """The user's file and line, for errors and for the plan."""
        return source_line(self.source)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A function as a flat list of equations in order of execution."""

    inputs: tuple[Value, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Value, ...]

    def with_tangents_in(self, dtype: Any) -> "Program":
        """The same program, whose products and those of its loops and branches have their tangents in `dtype`."""
        equations = tuple(dataclasses.replace(eqn, tangent_dtype=dtype) for eqn in self.equations)
        return dataclasses.replace(self, equations=equations)


class Environment(dict[Value, Any]):
    """The arrays of values. One that is not there is computed, as the program has it, when it is asked for."""

    def __init__(self, producer: dict[Value, Equation]):
        super().__init__()
        self._producer = producer

    def __missing__(self, value: Value):
        pending = [value]
        while pending:
            eqn = self._producer[pending[-1]]
            missing = [v for v in eqn.inputs if not isinstance(v, Constant) and v not in self]
            if missing:
                pending.extend(missing)
                continue
            if pending.pop() not in self:
                self.run(eqn)
        return self[value]

    def run(self, eqn: Equation):
        """Evaluate one equation and keep its outputs."""
        self.update(zip(eqn.outputs, eqn.evaluate(*(read(self, v) for v in eqn.inputs)), strict=True))


def read(env: dict[Value, Any], value: Value):
    """The array that `value` has in `env`; constants stand for themselves."""
    return value.value if isinstance(value, Constant) else env[value]


def hoisted(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Any]]:
    """A function `(captured, *args)` that does what `function(*args)` does, and the arrays that that one closes over.

    Under `jax.jit` these are arguments then, and not constants in the executable.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    captured = list(traced.consts)
    jaxpr = getattr(traced, "jaxpr", traced)
    form = jax.tree.structure(shapes)

    def run(captured, *args):
        return jax.tree.unflatten(form, jax.core.eval_jaxpr(jaxpr, captured, *jax.tree.leaves(args)))

    return run, captured


def open_body(eqn: Equation, jaxpr) -> Program:
    """The body of a loop, branch or other call as a `Program`."""
    return open_program(jaxpr).with_tangents_in(eqn.tangent_dtype)


def open_program(jaxpr) -> Program:
    """Turn a (closed) jaxpr into a `Program`, opening calls on the way."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)  # from jax 0.11 a closed jaxpr is a jaxpr, whose `jaxpr` is itself
    env: dict[Any, Value] = {v: Value(v.aval) for v in inner.invars}
    equations: list[Equation] = []
    outputs = _open(jaxpr, env, equations)
    return Program(tuple(env[v] for v in inner.invars), tuple(equations), tuple(outputs))


def _open(jaxpr, env, equations, scope="", call_source=None, function="") -> list[Value]:
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for var, const in zip(jaxpr.constvars, consts or (), strict=True):
        env[var] = Constant(var.aval, const)

    def lookup(atom) -> Value:
        if isinstance(atom, jex_core.Literal):
            return Constant(atom.aval, atom.val, literal=np.ndim(atom.val) == 0)
        return env[atom]

    for eqn in jaxpr.eqns:
        inputs = [lookup(atom) for atom in eqn.invars]
        here = "/".join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
        source = call_source or eqn.source_info
        if eqn.primitive.name in _OPENED and not _is_kernel(eqn):
            callee = eqn.params[_OPENED[eqn.primitive.name]]
            callee_jaxpr = getattr(callee, "jaxpr", callee)
            # Functions of a library are traced once and remember the first caller's line: keep this caller's.
            filename = getattr(callee_jaxpr.debug_info, "func_filename", None) or ""
            from_library = eqn.primitive.name.startswith("custom_") or _is_library(filename)
            inner_env = dict(zip(callee_jaxpr.invars, inputs, strict=True))
            label = eqn.params.get("name") or function
            inner = _open(callee, inner_env, equations, here, source if from_library else call_source, label)
            env.update(zip(eqn.outvars, inner, strict=True))
        else:
            outputs = tuple(Value(v.aval) for v in eqn.outvars)
            env.update(zip(eqn.outvars, outputs, strict=True))
            equations.append(
                Equation(eqn.primitive, eqn.params, tuple(inputs), outputs, source, here, function, bool(eqn.effects))
            )
    return [lookup(atom) for atom in jaxpr.outvars]


def _is_kernel(eqn) -> bool:
    """Whether an equation is a `custom_vjp` function around a kernel: its own backward pass is all that is known of it."""
    return eqn.primitive.name.startswith("custom_vjp") and _has_kernel(eqn.params[_OPENED[eqn.primitive.name]])


def _has_kernel(jaxpr) -> bool:
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name in _KERNELS:
            return True
        params = [p for value in eqn.params.values() for p in (value if isinstance(value, tuple | list) else [value])]
        if any(_has_kernel(p) for p in params if hasattr(getattr(p, "jaxpr", p), "eqns")):
            return True
    return False


def _is_library(filename: str) -> bool:
    return any(folder in filename for folder in _LIBRARIES)


def source_line(source) -> str:
    """`file:line (function)` of the innermost frame that is the user's own."""
    frames = getattr(getattr(source, "traceback", None), "frames", None) or ()
    own = [f for f in frames if not _is_library(f.file_name) and not f.file_name.startswith("<")]
    if not own:
        return "unknown source"
    frame = own[0]
    return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"


def varying_axes(array: Any) -> frozenset[str]:
    """The axes of a device mesh over which an array varies; none outside of a `shard_map`."""
    aval = jax.typeof(array)
    kinds = getattr(aval, "manual_axis_type", None)  # jax 0.10 has moved `vma` there
    return frozenset(getattr(aval, "vma", ()) if kinds is None else kinds.varying)


def scan_groups(params: dict[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values of a `scan`."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = (len(group) for group in params["ft_in"].unpack())  # from jax 0.11
    return consts, carry


def manual_axes(params: dict[str, Any]) -> frozenset[str]:
    """The mesh axes over which a `shard_map` maps."""
    name = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"  # renamed after jax 0.10.0
    return frozenset(params[name])


def path_name(path: Sequence[Any]) -> str:
    """A pytree path as `params/Conv_0/kernel`; the `.value` of an nnx variable is left out."""
    if len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
