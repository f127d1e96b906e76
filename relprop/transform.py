"""The public transformations `explain`, `value_and_explain`, `vjp`, `plan`."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ArgumentError, NonFiniteRelevanceWarning
from .pipeline import Fallback, prepare
from .plan import Plan
from .surrogate import quotient


def explain(
    fn: Callable[..., Any],
    rules: Any,
    *,
    argnums: int | Sequence[int] = -1,
    target: Any = None,
    has_aux: bool = False,
    parameters: int | Sequence[int] | None = None,
    fallback: Fallback = None,
    coefficients: bool = False,
    conditions: Any = (),
    backward_dtype: Any = None,
) -> Callable[..., Any]:
    """Transform `fn` into a function that returns the relevance of its input for its output.

    Args:
        fn: any JAX function of arrays in pytrees.
        rules: a rule for all affine layers, pairs or a mapping of (selector, rule), or a `Composite`. What is not named
            has the default of its kind: Zero for affine layers and sums, Identity for activations.
        argnums: the explained argument(s), as in `jax.grad`; the last positional one by default. Arrays of integers that
            select rows of an embedding are explained, too: their relevance is a float array of their shape.
        target: what is explained. `None`: the output as it stands, summed over its elements. An int, or an int array of
            the shape of the output without its last axis: one class per example. `"top"`: the predicted class. A
            function: its value at the output.
        has_aux: whether `fn` returns a pair (output, aux), as in `jax.grad`.
        parameters: which of `argnums` are parameters. They take part in layers as weights and biases and receive
            `weight * coefficient`; relevance flows on as if they were not explained, so that biases receive what they
            absorb. By default the explained arguments that are containers and come before the last positional argument.
        fallback: `"gradient"` uses the derivative where no rule is known, which is an error otherwise.
        coefficients: return the coefficients `c` of the explained arguments, not the relevance `x * c`. This is the
            picture of methods that modify the gradient, such as guided backpropagation.
        conditions: filters on the way of relevance and other places where it starts, one or a sequence; see
            `relprop.condition` and `relprop.start`.
        backward_dtype: the dtype of the products of the pass backwards, such as `jax.numpy.bfloat16` for a float32
            function. Values and denominators, and what is done element by element, keep the dtype of the function, in at
            least float32 for ratios. Each product then rounds the coefficients, the weights and what it gives, once each;
            so do derivatives of the explanation. A fused attention kernel keeps its own. Use it under `jax.jit`: outside
            of it every product is computed twice. By default (None) products have the dtype of the function.

    Returns:
        A function of the same arguments. It returns relevance in the form of the explained argument (a tuple where
        `argnums` is one), in the units of the output; with `has_aux`, a pair (relevance, aux).

    Raises:
        UnknownPrimitiveError: `fn` does something live for which no rule is known.
        NotDifferentiableError: relevance would have to pass a `while` loop, or integers that select nothing.
        TargetError, ArgumentError, RuleError: what is given does not fit.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> params = {"w": jnp.array([[1.0, -1.0], [1.0, 2.0]]), "b": jnp.array([0.0, 1.0])}
        >>> fn = lambda params, x: jnp.maximum(x @ params["w"] + params["b"], 0.0)
        >>> rp.explain(fn, rp.Epsilon(), target=1)(params, jnp.array([1.0, 2.0])).round(3)
        Array([-1.,  4.], dtype=float32)
    """
    both = value_and_explain(
        fn,
        rules,
        argnums=argnums,
        target=target,
        has_aux=has_aux,
        parameters=parameters,
        fallback=fallback,
        coefficients=coefficients,
        conditions=conditions,
        backward_dtype=backward_dtype,
    )

    def explained(*args, **kwargs):
        value, relevance = both(*args, **kwargs)
        return (relevance, value[1]) if has_aux else relevance

    return explained


def value_and_explain(
    fn: Callable[..., Any],
    rules: Any,
    *,
    argnums: int | Sequence[int] = -1,
    target: Any = None,
    has_aux: bool = False,
    parameters: int | Sequence[int] | None = None,
    fallback: Fallback = None,
    coefficients: bool = False,
    conditions: Any = (),
    backward_dtype: Any = None,
) -> Callable[..., Any]:
    """As `explain`, for a function that returns a pair (value of `fn`, relevance).

    With `has_aux` it returns ((output, aux), relevance), as `jax.value_and_grad` does.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> rp.value_and_explain(lambda x: jnp.sum(x**2), None)(jnp.array([1.0, 2.0]))
        (Array(5., dtype=float32), Array([1., 4.], dtype=float32))
    """

    def explained(*args, **kwargs):
        planned = prepare(
            fn, rules, args, kwargs, argnums, parameters, target, has_aux, fallback, conditions, backward_dtype
        )
        run = planned.run()
        explained_outputs, rest = run.outputs[: planned.traced.explained], run.outputs[planned.traced.explained :]
        if coefficients and any(planned.relative_inputs):
            raise ArgumentError(
                "coefficients=True asks for the factor c of relevance = input * c, but a rule at the first layers (Flat, "
                "WSquare, ZBox, bias='distribute' or a relevance function) gives relevance that is not of that form."
            )
        found = run.coefficients(planned.seeds(run)) if coefficients else run.relevances(planned.seeds(run))
        _report_non_finite(found, explained_outputs)
        structure: Any = jax.tree_util.tree_structure(planned.traced.shapes[1:])
        value, aux = structure.unflatten(rest)
        if has_aux:
            form, parts = planned.traced.static_aux
            arrays = iter(aux)
            aux = form.unflatten([next(arrays) if part is None else part for part in parts])
        return ((value, aux) if has_aux else value), planned.leaves.restore(found)

    return explained


def vjp(
    fn: Callable[..., Any],
    rules: Any,
    *args: Any,
    argnums: int | Sequence[int] = -1,
    parameters: int | Sequence[int] | None = None,
    fallback: Fallback = None,
    conditions: Any = (),
    backward_dtype: Any = None,
) -> tuple[Any, Callable[[Any], Any]]:
    """The value of `fn` at `args`, and the map from the relevance of its output to that of its arguments.

    The map takes a pytree of the form of the output. An output element that is exactly 0 has no relevance to hand on.
    `conditions` are masks on the way; see `relprop.condition`. `backward_dtype` is as in `relprop.explain`.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> value, pullback = rp.vjp(lambda x: x * jnp.array([2.0, 3.0]), None, jnp.array([1.0, 1.0]))
        >>> pullback(jnp.array([1.0, 0.0]))
        Array([1., 0.], dtype=float32)
    """
    planned = prepare(fn, rules, args, {}, argnums, parameters, None, False, fallback, conditions, backward_dtype)
    if planned.starts:
        raise ArgumentError("vjp takes the relevance of the output; to start elsewhere use explain with relprop.start.")
    run = planned.run()
    outputs = run.sources
    structure: Any = jax.tree_util.tree_structure(planned.traced.shapes[0])

    def pullback(relevance):
        given, form = jax.tree_util.tree_flatten(relevance)
        if form != structure:
            raise ArgumentError(f"The relevance of the output has the form {form}, but the output has the form {structure}.")
        coefficients: list[Any] = []
        for y, r in zip(outputs, given, strict=True):
            if jnp.shape(r) != y.shape:
                raise ArgumentError(
                    f"The relevance of the output has the shape {jnp.shape(r)}, but the output has {y.shape}."
                )
            if jnp.issubdtype(y.dtype, jnp.inexact):
                coefficients.append(quotient(jnp.asarray(r, y.dtype), y).astype(y.dtype))
            else:
                coefficients.append(np.zeros(y.shape, jax.dtypes.float0))
        return planned.leaves.restore(run.relevances(coefficients))

    return structure.unflatten(outputs), pullback


def plan(
    fn: Callable[..., Any],
    rules: Any,
    argnums: int | Sequence[int] = -1,
    *,
    parameters: int | Sequence[int] | None = None,
    fallback: Fallback = None,
    target: Any = None,
    has_aux: bool = False,
) -> Callable[..., Plan]:
    """Which layer of `fn` has which rule: a function of the arguments of `fn` that returns a printable `Plan`.

    Nothing is computed; arguments may be `jax.ShapeDtypeStruct`s. Warns of selectors that match nothing.

    Example:
        >>> import jax, jax.numpy as jnp, relprop as rp
        >>> fn = lambda w, x: jax.nn.relu(x @ w)
        >>> plan = rp.plan(fn, rp.Epsilon())(jnp.ones((3, 2)), jnp.ones((4, 3)))
        >>> [(entry.layer.kind, entry.layer.path, entry.rule) for entry in plan]  # doctest: +NORMALIZE_WHITESPACE
        [('dense', 'w', Epsilon(bias='absorb', epsilon=1e-06)), ('activation', None, Identity())]
    """

    def planned(*args, **kwargs):
        return prepare(fn, rules, args, kwargs, argnums, parameters, target, has_aux, fallback).plan

    return planned


def _report_non_finite(relevances, outputs):
    """Warn of NaN and infinity in relevance, where values can be looked at: outside of jit and other transformations."""
    if any(isinstance(v, jax.core.Tracer) for v in [*relevances, *outputs]):
        return
    if all(bool(jnp.isfinite(r).all()) for r in relevances):
        return
    own = all(bool(jnp.isfinite(y).all()) for y in outputs if jnp.issubdtype(y.dtype, jnp.inexact))
    cause = (
        "Its output is finite: look at the rules. A denominator close to 0 needs a larger epsilon; a rule or a "
        "linearisation of your own may divide by 0."
        if own
        else "Its own output is not finite: look at the input and the parameters."
    )
    warnings.warn(f"The relevance of the explained function is not finite. {cause}", NonFiniteRelevanceWarning, stacklevel=4)
