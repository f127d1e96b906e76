"""Where relevance goes: what reaches every layer, what it hands on, and what keeps the rest.

`audit` answers why the relevance of the input does not sum to the output. Every layer is measured on the way backwards
by slots (see `relprop.taps`), so it costs one explanation and works under `jit`, `vmap` and through loops.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import primitives as prims
from .arguments import normalise_argnums, parameter_numbers
from .composite import short
from .errors import ArgumentError
from .jaxprs import Equation, Value
from .pipeline import Fallback, Planned, prepare
from .report import CAUSES, Audit, Line
from .structure import Layer, Plain
from .taps import Key, Place, loops_around, relevance, varying_over


def audit(
    fn: Callable[..., Any],
    rules: Any,
    *,
    argnums: int | Sequence[int] = -1,
    target: Any = None,
    has_aux: bool = False,
    parameters: int | Sequence[int] | None = None,
    fallback: Fallback = None,
    conditions: Any = (),
    backward_dtype: Any = None,
    batched: bool = False,
    by_step: bool = False,
    strict: bool = False,
    tolerance: float = 0.01,
) -> Callable[..., Audit]:
    """Transform `fn` into a function that returns an account of its relevance, layer by layer.

    For every layer: the relevance that reaches its output, what it hands to its inputs, and what keeps the difference.
    Causes are the bias, the stabiliser (epsilon), f(0) of an activation, the softmax, what is frozen (a value that is not
    explained, written beside explained ones), a fallback to the derivative, a condition, and whatever else the rule
    does not hand on (`Stop`, `Gradient` at an activation; less than nothing for `AlphaBeta` where nothing is negative).

    Args:
        fn, rules, argnums, target, has_aux, parameters, fallback, conditions, backward_dtype: as in `relprop.explain`.
        batched: the leading axis of the explained arguments (and of a target array) is a batch: each example is audited
            by itself, as a batch of one, and the printed table shows means and the worst. Without it, relevance is summed
            over all examples. `jax.vmap` of an audit is the same for functions of one example.
        by_step: keep the steps of loops apart; they are summed otherwise.
        strict: raise an error when a layer keeps more than `tolerance`, as a share of the relevance of the output, or hands
            on what is not finite. Not under `jit` and other transformations, where no values are known:
            `Audit.check(tolerance)` of the result does the same.
        tolerance: see `strict`.

    Returns:
        A function of the same arguments that returns an `Audit`: a pytree that prints as a table.

    Raises:
        RelevanceLossError: by `strict`.
        ArgumentError and others: as `explain` does.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> fn = lambda params, x: jnp.sum(x @ params["w"] + params["b"])
        >>> params = {"w": jnp.array([[1.0], [2.0]]), "b": jnp.array([[3.0]])}
        >>> found = rp.audit(fn, rp.Epsilon(0.0))(params, jnp.array([[1.0, 2.0]]))
        >>> float(found.output), float(found.inputs["x"]), float(found.absorbed["bias"])
        (8.0, 5.0, 3.0)
    """

    def audited(*args, **kwargs):
        def one(args, target):
            planned = prepare(
                fn, rules, args, kwargs, argnums, parameters, target, has_aux, fallback, conditions, backward_dtype
            )
            account = _audit(planned)
            return account if by_step else account.summed()

        found = _by_example(one, args, target, argnums, parameters) if batched else one(args, target)
        if strict:
            found.check(tolerance)
        return found

    return audited


def _by_example(one, args, target, argnums, parameters) -> Audit:
    explained = normalise_argnums(argnums, len(args))
    # As in `Leaves.data`: parameters have no batch; where they alone are explained, the last argument has.
    numbers = set(explained) - parameter_numbers(explained, parameters, args) or {len(args) - 1}
    mapped = [arg if n in numbers else None for n, arg in enumerate(args)]
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(mapped)}
    if len(sizes) != 1 or sizes == {()}:
        raise ArgumentError(
            f"batched=True: the explained arguments need one leading axis of one length, the batch; theirs are {sizes}."
        )
    (size,) = sizes.pop()
    along = not callable(target) and target is not None and not isinstance(target, str) and np.ndim(target) > 0
    if along and np.shape(target)[0] != size:
        raise ArgumentError(f"batched=True: the target has the shape {np.shape(target)}, but there are {size} examples.")

    def example(mapped, target):
        given = [m if n in numbers else arg for n, (arg, m) in enumerate(zip(args, mapped, strict=True))]
        return one(tuple(given), target)

    def alone(leaf):
        return jnp.asarray(leaf)[:, None]

    if along:
        return jax.vmap(example)(jax.tree.map(alone, mapped), alone(target))
    return jax.vmap(lambda mapped: example(mapped, target))(jax.tree.map(alone, mapped))


def _audit(planned: Planned) -> Audit:
    """Explain with a slot at every layer, and at every plain equation that may keep relevance."""
    leaves = planned.leaves
    dtype = jnp.result_type(float)
    rules = {entry.layer: entry.rule for entry in planned.plan}
    watched = dict(_watched(planned))
    slots: dict[Key, Any] = {}
    for place, calls in watched.items():
        steps = loops_around(calls)
        names = ["into", "out", *(["kept"] if planned.taps.slot(place, "mask") is not None else [])]
        slots |= {Key(place, name): jnp.zeros((*steps, 3), dtype) for name in names}
        if isinstance(place, Layer):
            slots[Key(place, "marks")] = jnp.ones((*steps, 2), dtype)
            slots[Key(place, "mark relatives")] = jnp.zeros((*steps, 2), dtype)
    indices = list(dict.fromkeys([*leaves.explained, *leaves.data]))
    run = planned.run(indices, slots, _gauge)
    seeds = planned.seeds(run)
    relevances, measured = run.measured(seeds)
    lines = tuple(_line(place, rules.get(place), measured, planned.taps.blocked) for place in watched)
    names = _unique([leaves.names[i] for i in indices])
    totals = dict(zip(indices, (_total(r) for r in relevances), strict=True))
    return Audit(
        lines=lines,
        output=sum(
            (_total(y * s) for y, s in zip(run.sources, seeds, strict=True) if _carries(y)), start=jnp.zeros((), dtype)
        ),
        inputs={name: totals[i] for name, i in zip(names, indices, strict=True) if i in leaves.data},
        parameters={name: totals[i] for name, i in zip(names, indices, strict=True) if i not in leaves.data},
    )


def _watched(planned: Planned):
    """Layers, and the plain equations that need not conserve relevance, with the calls around them."""
    section, blocked = planned.plan.section, planned.taps.blocked
    live = frozenset().union(*(part.live for part in section.sections()))
    for step, calls in section.walk():
        if isinstance(step, Plain):
            yield from ((eqn, calls) for eqn in step.equations if blocked.get(eqn) or not _conserves(eqn, live))
        else:
            yield step, calls


def _conserves(eqn: Equation, live: frozenset[Value]) -> bool:
    """Whether an equation hands on all relevance by its structure: it is linear and nothing constant is beside."""
    if eqn.name in ("mul", "div"):
        return True
    operands = [v for v in eqn.inputs if v.carries_relevance]
    return eqn.name in prims.STRUCTURAL and all(v in live for v in operands)


def _gauge(arrays, coefficients, relevances):
    """The relevance that passes, its largest coefficient, and how many of its elements are not finite."""
    dtype = jnp.result_type(float)
    total, largest, bad = jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((), dtype)
    for a, c, r in zip(arrays, coefficients, relevances, strict=True):
        passed = jnp.real(relevance(a.astype(_wide(a)), c.astype(_wide(a)), r if r is None else r.astype(_wide(a))))
        total += passed.sum().astype(dtype)
        largest = jnp.maximum(largest, jnp.max(jnp.abs(c), initial=0).astype(dtype))
        bad += (~jnp.isfinite(passed)).sum().astype(dtype)
    if axes := varying_over(arrays):  # what devices measure adds up
        largest = lax.pmax(largest, axes) / lax.psum(1, axes)
    return jnp.stack([total, largest, bad])


def _wide(a):
    """The dtype in which `a` is summed."""
    return jnp.result_type(complex) if jnp.iscomplexobj(a) else jnp.result_type(float)


def _carries(y) -> bool:
    return bool(jnp.issubdtype(y.dtype, jnp.inexact))


def _total(relevance):
    return jnp.real(relevance).astype(jnp.result_type(float)).sum()


def _unique(names: list[str]) -> list[str]:
    """Names told apart by a number, where one is taken already."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}:{seen[name]}")
    return found


def _line(place: Place, rule: Any, measured: dict[Key, Any], blocked) -> Line:
    into, out = measured[Key(place, "into")], measured[Key(place, "out")]
    kept = measured.get(Key(place, "kept"), out)
    steps = out.shape[:-1]
    marks = jnp.zeros((*steps, 2), out.dtype)
    if isinstance(place, Layer):
        marks = measured[Key(place, "marks")] + measured[Key(place, "mark relatives")]
    absorbed = dict.fromkeys(CAUSES, jnp.zeros(steps, out.dtype))
    absorbed["bias"], absorbed["epsilon"] = marks[..., 0], marks[..., 1]
    if kept is not out:
        absorbed["condition"] = out[..., 0] - kept[..., 0]
    cause = "condition" if blocked.get(place) else _cause(place, rule)
    absorbed[cause] += kept[..., 0] - into[..., 0] - marks.sum(-1)
    return Line(
        **_described(place),
        rule=short(rule) if rule is not None else "",
        steps=steps,
        relevance_out=out[..., 0],
        relevance_in=into[..., 0],
        absorbed=absorbed,
        largest=into[..., 1],
        non_finite=into[..., 2],
    )


def _described(place: Place) -> dict[str, Any]:
    """What a place is called, as in a plan."""
    if isinstance(place, Layer):
        return {"index": place.index, "address": place.address, "kind": place.kind, "source": place.source}
    address = "/".join(part for part in (place.scope, place.function) if part) or "-"
    return {"index": -1, "address": address, "kind": place.name, "source": place.where}


def _cause(place: Place, rule: Any) -> str:
    """What keeps relevance at a place beside bias and stabiliser."""
    if isinstance(place, Layer):
        if place.kind in ("softmax", "attention"):
            return "softmax"
        return rule.absorbs if rule.absorbs in CAUSES else "rule"
    return "frozen" if place.name in prims.STRUCTURAL else "fallback"
