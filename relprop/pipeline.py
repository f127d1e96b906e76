"""One pipeline for all transformations: trace, plan, interpret with surrogates, transpose."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .arguments import Leaves, flatten, is_array, seeds, with_companions
from .composite import as_composite
from .conditions import resolve
from .errors import ArgumentError, TargetError
from .interpreter import Interpreter
from .jaxprs import trace
from .plan import Plan
from .recognise import number, recognise
from .registry import REGISTERED
from .structure import Options
from .taps import Key, Taps, relevance

Fallback = Literal["gradient"] | None


@dataclasses.dataclass
class Planned:
    """A function, traced at given arguments and planned: all that is needed to run it."""

    leaves: Leaves
    plan: Plan
    explained: int
    shapes: Any
    static_aux: list[Any]
    target: Any
    taps: Taps

    @property
    def starts(self) -> bool:
        """Whether relevance starts inside of the function, not at its output."""
        return any(key.name == "seed" for key in self.taps.arrays)

    def seeds(self, run: "Run") -> list[Any]:
        """The coefficients of the sources of relevance that the target asks for."""
        return [jnp.ones_like(y) for y in run.sources] if self.starts else seeds(run.sources, self.target)

    @property
    def relative_inputs(self) -> list[bool]:
        """Which explained leaves take part in relative space."""
        inputs = self.plan.section.program.inputs
        return [inputs[i] in self.plan.needed for i in self.leaves.explained]

    def run(
        self,
        indices: Sequence[int] | None = None,
        slots: Mapping[Key, Any] | None = None,
        gauge: Callable[..., Any] | None = None,
    ) -> "Run":
        """Evaluate the function with surrogates.

        `indices` are the arrays whose relevance can be asked for, the explained ones by default. What passes the `slots`
        is measured by `gauge`, see `Taps`.
        """
        program, section, leaves = self.plan.section.program, self.plan.section, self.leaves
        indices = leaves.explained if indices is None else indices
        inputs = [leaves.arrays[i] for i in indices]
        slots = slots or {}
        taps = dataclasses.replace(self.taps, stepped=self.taps.stepped | slots.keys(), gauge=gauge)

        def evaluate(xs, rs, measured):
            operands = list(leaves.arrays)
            relatives: list[Any] = [None] * len(operands)
            for i, x, r in zip(indices, xs, rs, strict=True):
                operands[i], relatives[i] = x, r
            interpreter = Interpreter(self.plan, REGISTERED, taps.with_arrays(dict(zip(slots, measured, strict=True))))
            outputs, _, started = interpreter.evaluate(section, operands, relatives)
            return (started if self.starts else outputs[: self.explained]), outputs

        needed = [program.inputs[i] in self.plan.needed for i in indices]
        zeros = [jnp.zeros_like(x) if on else None for x, on in zip(inputs, needed, strict=True)]
        sources, transpose, outputs = jax.vjp(evaluate, inputs, zeros, list(slots.values()), has_aux=True)
        return Run(outputs, sources, inputs, transpose, list(slots))


@dataclasses.dataclass
class Run:
    """An evaluated function: the flat `outputs`, the `sources` of relevance among them (or inside), and the transpose."""

    outputs: list[jax.Array]
    sources: list[jax.Array]
    inputs: list[jax.Array]
    transpose: Callable[..., Any]
    keys: list[Key]

    def coefficients(self, seeds) -> list[Any]:
        """The coefficient of each input, for the coefficients `seeds` of the sources."""
        return self.transpose(seeds)[0]

    def relevances(self, seeds) -> list[Any]:
        """The relevance of each input."""
        return self.measured(seeds)[0]

    def measured(self, seeds) -> tuple[list[Any], dict[Key, Any]]:
        """The relevance of each input, and what the slots measure."""
        cs, rs, slots = self.transpose(seeds)
        relevances = [relevance(x, c, r) for x, c, r in zip(self.inputs, cs, rs, strict=True)]
        return relevances, dict(zip(self.keys, slots, strict=True))


def prepare(
    fn,
    rules,
    args,
    kwargs,
    argnums,
    parameters,
    target=None,
    has_aux=False,
    fallback=None,
    conditions=(),
    backward_dtype=None,
) -> Planned:
    """Trace a function at its arguments and plan it."""
    if backward_dtype is not None and not jnp.issubdtype(backward_dtype, jnp.floating):
        raise ArgumentError(
            "backward_dtype is the dtype of the products that carry relevance, a floating-point one such as "
            f"jax.numpy.bfloat16, or None for that of the function; got {backward_dtype!r}."
        )
    if fallback not in (None, "gradient"):
        raise ArgumentError(f"fallback must be None or 'gradient', got {fallback!r}.")
    composite = as_composite(rules)
    leaves = flatten(fn, args, kwargs, argnums, parameters)

    static_aux: list[Any] = []

    def flat(*arrays):
        positional, named = leaves.rebuild(arrays)
        out = fn(*positional, **named)
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

    program, shapes = trace(flat, *leaves.arrays)
    explained = len(jax.tree_util.tree_leaves(shapes[0]))
    if not any(v.carries_relevance for v in program.outputs[:explained]):
        given = ", ".join(f"{v.dtype}{list(v.shape)}" for v in program.outputs[:explained]) or "nothing"
        raise TargetError(
            f"The function returns {given}: there is no floating-point output whose relevance could be explained."
        )
    if leaves.integers:
        program, leaves = with_companions(program, leaves)
    if backward_dtype is not None:
        program = program.with_tangents_in(jnp.dtype(backward_dtype))
    options = Options(fallback, REGISTERED)
    live = [i in leaves.data for i in range(len(leaves.arrays))]
    origins = {v: name for v, name, on in zip(program.inputs, leaves.names, live, strict=True) if not on}
    targets = program.outputs[:explained]
    section, _ = number(recognise(program, live, origins, options, targets=targets))
    plan = Plan(section, composite)
    planned = Planned(leaves, plan, explained, shapes, static_aux, target, resolve(conditions, plan, explained))
    if planned.starts and target is not None:
        raise ArgumentError(f"target={target!r} and relprop.start name two places where relevance starts; give one of them.")
    return planned
