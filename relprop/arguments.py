"""Arguments of the explained function: which leaves are explained, traced or static, what they are called, what is asked."""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import tokens
from .errors import ArgumentError, NotDifferentiableError, TargetError
from .jaxprs import Program, Value, open_program, path_name


@dataclasses.dataclass
class Leaves:
    """The flattened arguments of a call.

    `arrays` are the leaves that are traced, named by `names`; everything else (flags, strings, functions) is static.
    `explained` and `data` index into `arrays`: what relevance is asked of, and where the flow of relevance starts (the
    explained arguments that are not parameters; the last positional argument where only parameters are explained);
    `integers` are those among the explained that hold integers (tokens).
    `form` is all that the call is besides arrays; hashable if the static leaves are.
    `rebuild(arrays)` gives back the arguments; `restore(relevances)` puts relevances into the explained arguments' form.
    """

    arrays: list[jax.Array]
    names: list[str]
    explained: list[int]
    data: list[int]
    integers: list[int]
    form: Any
    rebuild: Callable[[Sequence[Any]], tuple[tuple, dict]]
    restore: Callable[[Sequence[Any]], Any]


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced: arrays, and the shapes that `plan` takes in their place."""
    kinds = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    return isinstance(leaf, kinds) or hasattr(leaf, "__jax_array__")


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)


def normalise_argnums(argnums: int | Sequence[int], count: int, name: str = "argnums") -> tuple[int, ...]:
    """`argnums` as positive positions."""
    given = (argnums,) if isinstance(argnums, int | np.integer) else tuple(argnums)
    found = []
    for number in given:
        number = operator.index(number)
        if not -count <= number < count:
            raise ArgumentError(
                f"{name}={argnums} is out of range: the function was called with {count} positional arguments."
            )
        found.append(number % count)
    if len(set(found)) != len(found):
        raise ArgumentError(f"{name}={argnums} names an argument twice.")
    return tuple(found)


def checked_batch_size(batch_size: int | None) -> None:
    """Refuse a number that is no size of a batch; None means all at once."""
    if batch_size is not None and not (isinstance(batch_size, int | np.integer) and batch_size >= 1):
        raise ArgumentError(f"batch_size is how many are done at once, an int of at least 1 or None, got {batch_size!r}.")


def flatten(fn: Callable, args: tuple, kwargs: dict, argnums, parameters) -> Leaves:
    """Sort out the leaves of a call; see `Leaves`."""
    if not args:
        raise ArgumentError("The explained function was called without positional arguments; there is nothing to explain.")
    numbers = normalise_argnums(argnums, len(args))
    held = parameter_numbers(numbers, parameters, args)
    prefixes = _argument_names(fn, len(args))
    arrays: list[Any] = []
    names: list[str] = []
    slots: list[tuple[str, Any]] = []
    explained: list[int] = []
    data: list[int] = []
    integers: list[int] = []
    others: list[int] = []
    for position, argument in enumerate(args):
        for path, leaf in jax.tree_util.tree_flatten_with_path(argument)[0]:
            label = path_name(path) or prefixes[position]
            wanted = position in numbers
            if wanted:
                leaf = _explainable(leaf, label)
            if not is_array(leaf):
                slots.append(("static", leaf))
                continue
            index = len(arrays)
            slots.append(("array", index))
            arrays.append(_as_array(leaf))
            names.append(label)
            if wanted:
                explained.append(index)
                if jnp.issubdtype(arrays[-1].dtype, jnp.integer):
                    integers.append(index)
            if wanted and position not in held:
                data.append(index)
            if not wanted and position == len(args) - 1 and jnp.issubdtype(arrays[-1].dtype, jnp.inexact):
                others.append(index)
    for path, leaf in jax.tree_util.tree_flatten_with_path(kwargs)[0]:
        if is_array(leaf):
            slots.append(("array", len(arrays)))
            arrays.append(_as_array(leaf))
            names.append(path_name(path))
        else:
            slots.append(("static", leaf))
    structure: Any = jax.tree_util.tree_structure((args, kwargs))
    trees: list[Any] = [jax.tree_util.tree_structure(args[n]) for n in numbers]

    def rebuild(values):
        return structure.unflatten([values[item] if sort == "array" else item for sort, item in slots])

    def restore(values):
        values, parts = list(values), []
        for tree in trees:
            parts.append(tree.unflatten(values[: tree.num_leaves]))
            values = values[tree.num_leaves :]
        return parts[0] if isinstance(argnums, int | np.integer) else tuple(parts)

    static = tuple((type(item), item) for sort, item in slots if sort == "static")
    form = structure, tuple(sort for sort, _ in slots), static
    return Leaves(arrays, names, explained, data or others or explained, integers, form, rebuild, restore)


def parameter_numbers(numbers, parameters, args) -> set[int]:
    """The explained arguments that are parameters: as given, else containers before the last positional argument."""
    if parameters is not None:
        held = normalise_argnums(parameters, len(args), "parameters")
        if not set(held) <= set(numbers):
            raise ArgumentError(f"parameters={parameters} must be among the explained arguments {numbers}.")
        return set(held)
    last = len(args) - 1
    return {n for n in numbers if n != last and not jax.tree_util.all_leaves([args[n]])}


def _explainable(leaf: Any, label: str) -> jax.Array:
    if isinstance(leaf, bool | int) or not (is_array(leaf) or isinstance(leaf, float | complex)):
        raise NotDifferentiableError(_no_relevance(label, type(leaf).__name__))
    array = _as_array(leaf)
    if not jnp.issubdtype(array.dtype, jnp.inexact) and not jnp.issubdtype(array.dtype, jnp.integer):
        raise NotDifferentiableError(_no_relevance(label, f"{array.dtype}{list(array.shape)}"))
    return array


def _no_relevance(label: str, given: str) -> str:
    return (
        f"The explained argument '{label}' is {given}, which carries no relevance: relevance is carried by floating-point "
        "arrays, and by arrays of integers that select rows of an embedding. Cast it to a float (pixels: "
        "x.astype('float32')), explain another argument with `argnums`, or split what is no array off a module "
        "(eqx.partition, nnx.split)."
    )


def with_companions(leaves: Leaves, outputs: Sequence[Value]) -> Leaves:
    """Put companions in the place of the explained integers; see `relprop.tokens`."""
    if not leaves.integers:
        return leaves
    floats = [v.dtype for v in outputs if v.carries_relevance]
    dtype = jnp.float64 if jnp.float64 in floats else jnp.float32
    count = len(leaves.arrays)
    companions = [tokens.companion(leaves.arrays[i], dtype) for i in leaves.integers]
    place = dict(zip(leaves.integers, range(count, count + len(companions)), strict=True))
    return dataclasses.replace(
        leaves,
        arrays=[*leaves.arrays, *companions],
        names=[*leaves.names, *(leaves.names[i] for i in leaves.integers)],
        explained=[place.get(i, i) for i in leaves.explained],
        data=[place.get(i, i) for i in leaves.data],
    )


def follow_companions(program: Program, leaves: Leaves, extended: Leaves) -> Program:
    """The program of `leaves` with the companions that `extended` has besides as further inputs."""
    count, used = len(leaves.arrays), set[int]()
    follow = tokens.follow(program, leaves.integers, leaves.data, used)
    program = open_program(jax.make_jaxpr(lambda *arrays: follow(arrays[:count], arrays[count:]))(*extended.arrays))
    for i in leaves.integers:
        if i not in used and leaves.arrays[i].size > 0:
            array = leaves.arrays[i]
            given = f"{array.dtype}{list(array.shape)}, and selects no rows of an embedding"
            raise NotDifferentiableError(_no_relevance(leaves.names[i], given))
    return program


def _argument_names(fn: Callable, count: int) -> list[str]:
    try:
        names = [
            p.name
            for p in inspect.signature(fn).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        names = []
    return (names + [f"arg{i}" for i in range(len(names), count)])[:count]


def seeds(outputs: list[jax.Array], target: Any) -> list[Any]:
    """The coefficients of the explained outputs: ones, or one class per example along the last axis."""
    if target is None or callable(target):
        return [_ones(y) for y in outputs]
    if len(outputs) != 1:
        raise TargetError(
            f"target={target!r} picks a class along the last axis of one array, but the function returns {len(outputs)} "
            "arrays. Pass a function that picks what is to be explained, such as target=lambda out: out['logits'][:, 3]."
        )
    (y,) = outputs
    if y.ndim == 0:
        raise TargetError(
            f"target={target!r} picks a class along the last axis, but the output is a scalar. Use target=None."
        )
    classes = y.shape[-1]
    index: Any
    if isinstance(target, str):
        if target != "top":
            raise TargetError(f"target={target!r}: the only string that is understood is 'top', the predicted class.")
        index = jnp.argmax(y, axis=-1)
    else:
        index = target if isinstance(target, jax.Array) else np.asarray(target)  # known under jit, too
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise TargetError(f"target must be None, an int, an array of ints, 'top' or a function; got {target!r}.")
        try:
            fits = jnp.broadcast_shapes(index.shape, y.shape[:-1]) == y.shape[:-1]
        except ValueError:
            fits = False
        if not fits:
            raise TargetError(
                f"target has the shape {index.shape}, but the output {y.shape} takes one class for each of "
                f"{y.shape[:-1]}. To explain every class of every example, `jax.vmap` over an int target."
            )
        known = not isinstance(index, jax.core.Tracer)
        if known and np.any((np.asarray(index) >= classes) | (np.asarray(index) < -classes)):
            raise TargetError(f"target={target} is out of range: the output has {classes} classes along its last axis.")
        index = jnp.broadcast_to(jnp.where(index < 0, index + classes, index), y.shape[:-1])
    # As ones of the output, so that it varies over the devices of a `shard_map` as that does.
    return [_ones(y) * jax.nn.one_hot(index, classes, dtype=y.dtype)]


def _ones(y: jax.Array):
    if jnp.issubdtype(y.dtype, jnp.inexact):
        return jnp.ones_like(y)
    return np.zeros(y.shape, jax.dtypes.float0)
