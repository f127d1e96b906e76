"""One pipeline for all transformations: trace, plan, interpret with surrogates, transpose."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .arguments import Leaves, flatten, seeds
from .composite import as_composite
from .conditions import resolve
from .errors import ArgumentError
from .interpreter import Interpreter
from .plan import Plan
from .registry import REGISTERED
from .taps import Key, Taps, relevance
from .traced import Traced, traced

Fallback = Literal["gradient"] | None


@dataclasses.dataclass
class Planned:
    """A function, traced at given arguments and planned: all that is needed to run it."""

    leaves: Leaves
    plan: Plan
    traced: Traced
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
            return (started if self.starts else outputs[: self.traced.explained]), outputs

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

    dtype = None if backward_dtype is None else jnp.dtype(backward_dtype)
    found, leaves = traced(fn, leaves, target, has_aux, fallback, dtype)
    plan = Plan(found.section, composite)
    planned = Planned(leaves, plan, found, target, resolve(conditions, plan, found.explained))
    if planned.starts and target is not None:
        raise ArgumentError(f"target={target!r} and relprop.start name two places where relevance starts; give one of them.")
    return planned
