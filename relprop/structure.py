"""What the planner finds in a program: layers, plain equations and calls, in order of execution."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from .jaxprs import Equation, Program, Value

AFFINE_KINDS = ("dense", "conv", "affine")
KINDS = (*AFFINE_KINDS, *"scale activation product gate attention norm softmax max_pool sum_pool add".split())
# Affine in all live inputs together: what such a layer gives for inputs of 0 is its bias.
LINEAR_KINDS = (*AFFINE_KINDS, "scale", "sum_pool", "add")
ROLES = ("gate", "modulator", "activated", "signal")
_WIDER = {**dict.fromkeys(AFFINE_KINDS, ("affine",)), "gate": ("product",)}


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A place that takes a rule: a group of equations with live inputs and one output.

    `kind` is one of dense, conv, affine, scale, activation, product, gate, attention, norm, softmax, max_pool, sum_pool,
    add. `core` is the equation that names it; an affine layer also has the equations of its chain before (`pre`) and after
    (`post`) the core, and the `device_sums` that complete the core's product. `foldable` says whether the factor after the
    core can be folded into the weight, `shift_dims` along which dimensions of the core's operand the shift before it
    varies. `live` are the inputs that carry relevance, in the order in which a rule receives them, `degrees` how often each
    is a factor of a product and `roles` what it is there ("gate", "modulator", "activated" or "signal"; in a residual sum
    "skip" or "branch"; see `relprop.products`). `frozen` are operands that stay constant: the weight of an affine layer,
    the statistic of a norm. `joint` are the equations from the input of a norm to its output, where the statistic is one of
    that input alone. Where several affine layers are summed into one preactivation (`x W + h U + b` of a recurrent cell),
    `preactivation` is "total" for the last layer of the sum, "part" for the others. An activation that is linear along rays
    from 0 is `homogeneous`.
    """

    kind: str
    equations: tuple[Equation, ...]
    live: tuple[Value, ...]
    output: Value
    core: Equation
    pre: tuple[Equation, ...] = ()
    post: tuple[Equation, ...] = ()
    path: str | None = None
    device_sums: tuple[Equation, ...] = ()
    frozen: tuple[Value, ...] = ()
    nonnegative: bool = False
    shift_dims: frozenset[int] = frozenset()
    foldable: bool = True
    degrees: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()
    joint: tuple[Equation, ...] = ()
    preactivation: str = ""
    homogeneous: bool = False
    index: int = -1
    section: str = ""

    @property
    def primitive(self) -> str:
        return self.core.name

    @property
    def reads(self) -> tuple[Value, ...]:
        """What relevance can leave by, as in every step."""
        return self.live

    @property
    def scope(self) -> str:
        """The `named_scope` path, with that of the loop around it."""
        return "/".join(part for part in (self.section, self.core.scope) if part)

    @property
    def address(self) -> str:
        """The parameter path, else the scope and the function under `jit`, else `-`."""
        return self.path or "/".join(part for part in (self.scope, self.core.function) if part) or "-"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names under which selectors find this layer."""
        return (self.kind, *_WIDER.get(self.kind, ()))

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(v.shape for v in self.live)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.output.shape

    @property
    def source(self) -> str:
        """The user's file and line."""
        return self.core.where


@dataclasses.dataclass(frozen=True, eq=False)
class Plain:
    """Equations that are evaluated as they are: JAX's own VJP is the linearisation."""

    equations: tuple[Equation, ...]

    @property
    def reads(self) -> tuple[Value, ...]:
        return tuple(v for eqn in self.equations for v in eqn.inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A loop, branch, `remat` or `shard_map`, with a section for each of its bodies."""

    equation: Equation
    bodies: tuple["Section", ...]

    @property
    def reads(self) -> tuple[Value, ...]:
        return tuple(self.equation.inputs)


Step = Layer | Plain | Call


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
    """A program with what was found in it.

    `steps` are what relevance passes, in order; every other value is computed by its `producer` when it is asked for.
    `effects` are equations that are run for what they do (prints, callbacks).
    """

    program: Program
    steps: tuple[Step, ...]
    live: frozenset[Value]
    producer: dict[Value, Equation]
    effects: tuple[Equation, ...]

    def layers(self) -> Iterator[Layer]:
        """All layers, those of bodies included, in order of execution."""
        return (step for step in self.flat() if isinstance(step, Layer))

    def flat(self) -> Iterator[Layer | Plain]:
        """All layers and plain steps, those of bodies included, in order of execution."""
        return (step for step, _ in self.walk())

    def sections(self) -> Iterator["Section"]:
        """This section and those of all bodies in it."""
        yield self
        for step in self.steps:
            if isinstance(step, Call):
                for body in step.bodies:
                    yield from body.sections()

    def walk(self, around: tuple[Equation, ...] = ()) -> Iterator[tuple[Layer | Plain, tuple[Equation, ...]]]:
        """As `flat`, each with the calls that it is in, from the outermost inwards."""
        for step in self.steps:
            if isinstance(step, Call):
                for body in step.bodies:
                    yield from body.walk((*around, step.equation))
            else:
                yield step, around


@dataclasses.dataclass
class Options:
    """How to read a program: `fallback` is what happens to unknown primitives, `registered` what users added."""

    fallback: str | None
    registered: dict[str, Any]
