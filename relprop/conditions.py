"""Conditions on the way of relevance: filter it at inner layers, start it there, leave out what goes past them.

Conditional relevance is "concept relevance propagation" (Achtibat et al. 2023): the heatmap of one channel is the
relevance that flows through that channel. Masks are data, so a `vmap` over them explains every channel with one forward
pass, and everything above the layer is shared, too.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from .errors import ArgumentError
from .jaxprs import REMAT, Value
from .plan import Plan
from .selectors import as_selector
from .structure import Layer, Plain, Section
from .taps import Key, Taps, loops_around


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """A mask on the relevance at some layers; made by `relprop.condition`."""

    selector: Any
    mask: Any
    exclusive: bool = False
    by_step: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A place where relevance starts; made by `relprop.start`."""

    selector: Any
    seed: Any
    by_step: bool = False


def condition(selector: Any, mask: Any, *, exclusive: bool = False, by_step: bool = False) -> Condition:
    """Let relevance pass a layer only as far as `mask` says: an entry of `conditions` of `explain` and its kin.

    Several conditions hold together: what is left has passed all of them.

    Args:
        selector: the layers, as in rules; more than one may match. A condition acts at the output of a layer.
        mask: an array that broadcasts to the layer's output, such as one-hot over channels; the relevance there is
            multiplied by it. It may be a tracer, so that `jax.vmap` over masks explains channel by channel. Or a linear
            function of an array of that shape, such as a projection `lambda a: a @ P`: the coefficient goes through its
            transpose, and relevance through a complete set of projections adds up to the whole.
        exclusive: leave out the relevance that reaches the input past these layers, in branches parallel to them.
        by_step: the mask has one leading axis for each loop that the layer is in, with an entry per step.

    Returns:
        A `Condition`.

    Example:
        >>> import jax, jax.numpy as jnp, relprop as rp
        >>> params = {"up": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "down": jnp.array([1.0, 1.0])}
        >>> fn = lambda params, x: (x @ params["up"]) @ params["down"]
        >>> def one(mask):
        ...     return rp.explain(fn, None, conditions=rp.condition(rp.path("up"), mask))(params, jnp.array([1.0, 2.0]))
        >>> jax.vmap(one)(jnp.eye(2)).tolist()
        [[1.0, 0.0], [2.0, 2.0]]
    """
    return Condition(as_selector(selector), mask, exclusive, by_step)


def start(selector: Any, seed: Any = 1.0, *, by_step: bool = False) -> Start:
    """Let relevance start at the output of a layer, not at that of the function: an entry of `conditions`.

    Args:
        selector: the layers, as in rules. Where several match, or several starts are given, their relevances add up.
        seed: the coefficient there, an array that broadcasts to the layer's output: the relevance that starts is
            `value * seed`. One-hot over channels explains the activation of one channel. Or a function from the value to
            such an array, `lambda a: a == a.max()` for the unit that is most active.
        by_step: the seed has one leading axis for each loop that the layer is in, with an entry per step.

    Returns:
        A `Start`.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> params = {"up": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "down": jnp.array([1.0, 1.0])}
        >>> fn = lambda params, x: (x @ params["up"]) @ params["down"]
        >>> second = rp.start(rp.path("up"), jnp.array([0.0, 1.0]))
        >>> rp.explain(fn, None, conditions=second)(params, jnp.array([1.0, 2.0])).tolist()
        [2.0, 2.0]
    """
    return Start(as_selector(selector), seed, by_step)


def resolve(conditions: Any, plan: Plan, explained: int) -> Taps:
    """The taps that conditions are, at the layers of a plan whose first `explained` outputs are explained.

    Raises:
        ArgumentError: a condition matches nothing, does not fit, or stands where it cannot be kept.
    """
    given = list(conditions) if isinstance(conditions, Iterable) else [] if conditions is None else [conditions]
    around = plan.around
    exclusive: list[tuple[list[Layer], set[Value]]] = []
    arrays: dict[Key, Any] = {}
    stepped: set[Key] = set()
    blocked: dict[Any, frozenset[Value]] = {}
    for item in given:
        if not isinstance(item, Condition | Start):
            raise ArgumentError(f"conditions are made by `relprop.condition` and `relprop.start`, got {item!r}.")
        chosen = plan.select(item.selector, "The condition at" if isinstance(item, Condition) else "The start at")
        name, data = ("mask", item.mask) if isinstance(item, Condition) else ("seed", item.seed)
        for layer in chosen:
            key = _free(arrays, layer, name)
            arrays[key] = _checked(data, layer, loops_around(around[layer]) if item.by_step else (), name, plan)
            if item.by_step:
                stepped.add(key)
            if name == "seed" and any(eqn.name not in {"scan", *REMAT} for eqn in around[layer]):
                raise ArgumentError(
                    f"Relevance cannot start at the layer {layer.address} at {layer.source}, inside of a "
                    f"`{around[layer][-1].name}`; it can inside of `scan` and `checkpoint`."
                )
        if isinstance(item, Condition) and item.exclusive:
            exclusive.append((chosen, _exclude(plan.section, frozenset(chosen), around, explained, blocked)))
    _check_in_line(exclusive)
    return Taps(arrays, frozenset(stepped), blocked)


def _free(arrays: dict[Key, Any], layer: Layer, name: str) -> Key:
    return next(key for number in itertools.count() if (key := Key(layer, name, number)) not in arrays)


def _checked(data: Any, layer: Layer, steps: tuple[int, ...], name: str, plan: Plan) -> Any:
    if callable(data):
        if steps:
            raise ArgumentError(f"A {name} by step must be an array, got a function; it would see one step at a time.")
        if name == "seed":
            return lambda a: _fitting(data(a), layer, (), name)
        if layer.output in plan.needed:
            raise ArgumentError(
                f"A mask that is a function cannot stand at the layer {layer.address} at {layer.source}: a rule above it "
                "(Flat, WSquare, ZBox, bias='distribute', a relevance function) hands it relevance that is not of the form "
                "value * coefficient. Use another rule there, or an array as a mask."
            )
        return _linear(data, layer)
    return _fitting(data, layer, steps, name)


def _fitting(data: Any, layer: Layer, steps: tuple[int, ...], name: str) -> jax.Array:
    """`data` as an array that broadcasts to the layer's output."""
    try:
        array = jnp.asarray(data)
    except TypeError as error:
        raise ArgumentError(f"A {name} is an array, a number or a function, got {data!r}.") from error
    shape, output = jnp.shape(array), layer.output_shape
    try:
        fits = shape[: len(steps)] == steps and jnp.broadcast_shapes(shape[len(steps) :], output) == output
    except ValueError:
        fits = False
    if not fits:
        by_step = f" with one leading axis for each loop, {steps}" if steps else ""
        raise ArgumentError(
            f"The {name} has the shape {shape}, which does not broadcast to the output {output} of the layer "
            f"{layer.address} at {layer.source}{by_step}. Channels are usually the last axis: (channels,) is enough."
        )
    return array


def _linear(function: Any, layer: Layer) -> Any:
    """A mask that is a function, checked when it is used."""

    def mask(a):
        try:
            jax.eval_shape(lambda c: jax.linear_transpose(function, a)(c), jax.eval_shape(function, a))
        except Exception as error:
            raise ArgumentError(
                f"A mask function must be linear, such as `lambda a: a @ projection`; the one for the layer {layer.address} "
                f"at {layer.source} has no transpose ({str(error) or type(error).__name__})."
            ) from error
        out = function(a)
        if jnp.shape(out) != a.shape:
            raise ArgumentError(
                f"The mask function returned the shape {jnp.shape(out)} for the output {a.shape} of the layer "
                f"{layer.address} at {layer.source}; it must return an array of the same shape."
            )
        return out.astype(a.dtype)

    return mask


def _exclude(section: Section, chosen: frozenset[Layer], around, explained: int, blocked: dict[Any, frozenset[Value]]):
    """Block what goes past the `chosen` layers; returns the values that depend on them."""
    for layer in chosen:
        if any(eqn.name not in REMAT for eqn in around[layer]):
            raise ArgumentError(
                f"exclusive=True at the layer {layer.address} at {layer.source}: inside of a `{around[layer][-1].name}` it "
                "is not clear which branches are parallel to it. Conditions there must not be exclusive."
            )
    inside: set[Value] = set()
    _downstream(section, inside, chosen, blocked)
    for value in section.program.outputs[:explained]:
        if value in section.live and value not in inside:
            raise ArgumentError(
                f"exclusive=True: an explained output {value.dtype}{list(value.shape)} does not depend on the layers "
                f"{', '.join(layer.address for layer in chosen)}, so no relevance comes by them. Explain the others alone."
            )
    return inside


def _check_in_line(exclusive: list[tuple[list[Layer], set[Value]]]) -> None:
    """Raise where two exclusive conditions stand in branches parallel to each other: nothing passes both."""
    for (first, below), (second, beside) in itertools.combinations(exclusive, 2):
        if (
            not any(v in below for layer in second for v in layer.live)
            and not any(v in beside for layer in first for v in layer.live)
            and set(first) != set(second)
        ):
            raise ArgumentError(
                f"exclusive=True at {first[0].address} at {first[0].source} and at {second[0].address} at "
                f"{second[0].source}: neither is above the other, so no relevance passes both. Put layers that are parallel "
                "into one condition (`a | b`), or select layers that follow one another."
            )


def _downstream(section: Section, inside: set[Value], chosen: frozenset[Layer], blocked) -> None:
    """Add to `inside` what depends on `chosen` layers, and to `blocked` the operands by which relevance would go past them.

    Such an operand does not depend on the layers itself, and is read by something, not one of them, that does.
    """

    def visit(place, reads, writes):
        past = frozenset(v for v in reads if v not in inside)
        if len(past) < len(set(reads)):
            inside.update(writes)
            if past:
                blocked[place] = blocked.get(place, frozenset()) | past

    for step in section.steps:
        if isinstance(step, Layer):
            if step in chosen:
                inside.add(step.output)
            else:
                visit(step, step.live, [step.output])
        elif isinstance(step, Plain):
            for eqn in step.equations:
                visit(eqn, [v for v in eqn.inputs if v in section.live], eqn.outputs)
        elif step.equation.name not in REMAT:  # holds none of the layers, see `_exclude`
            visit(step.equation, [v for v in step.equation.inputs if v in section.live], step.equation.outputs)
        else:
            call, body = step.equation, step.bodies[0]
            inside.update(v for v, given in zip(body.program.inputs, call.inputs, strict=True) if given in inside)
            _downstream(body, inside, chosen, blocked)
            inside.update(v for v, found in zip(call.outputs, body.program.outputs, strict=True) if found in inside)
