"""Many targets of one input: one forward pass, and the passes backwards in chunks of bounded memory."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .arguments import checked_batch_size, seeds
from .errors import ArgumentError
from .pipeline import Fallback, prepare


def explain_targets(
    fn: Callable[..., Any],
    rules: Any,
    *,
    targets: Any = None,
    batch_size: int | None = 16,
    pool: Callable[[Any], Any] | None = None,
    argnums: int | Sequence[int] = -1,
    parameters: int | Sequence[int] | None = None,
    fallback: Fallback = None,
    conditions: Any = (),
    backward_dtype: Any = None,
) -> Callable[..., Any]:
    """Transform `fn` into a function that explains several classes, or all of them.

    `jax.vmap` over the `target` of `explain` is the same with all targets at once. Forward pass and denominators are
    shared; K targets cost the products of one forward pass and of K backwards.

    Args:
        fn, rules, argnums, parameters, fallback, conditions, backward_dtype: as in `relprop.explain`.
        targets: integers (K,), classes along the last axis of the output, or (K, ...) with a class for each example; all
            classes by default.
        batch_size: how many targets are propagated at once; None for all. Memory grows with it.
        pool: what is made of the relevance for one target, a function of what `explain` returns: for instance
            `lambda r: rp.pool.patches(r, 16)`, where the relevance of all pixels for all classes would be too much to keep.

    Returns:
        A function of the same arguments that returns relevances (or what `pool` makes of them) with a leading axis for the
        targets. Put it under `jax.jit`.

    Raises:
        ArgumentError: batch_size or the form of targets has no meaning.
        TargetError and others: as `explain` does.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> w = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
        >>> rp.explain_targets(lambda w, x: x @ w, None)(w, jnp.array([1.0, 2.0])).tolist()
        [[1.0, 0.0], [2.0, 2.0], [3.0, 0.0]]
    """
    checked_batch_size(batch_size)

    def explained(*args, **kwargs):
        planned = prepare(fn, rules, args, kwargs, argnums, parameters, 0, False, fallback, conditions, backward_dtype)
        run = planned.run()
        seeds(run.sources, 0)  # one array with classes along its last axis, or an error that says so
        classes = run.sources[0].shape[-1]
        if targets is not None and not isinstance(targets, jax.core.Tracer):
            for end in (np.min(targets), np.max(targets)) if np.size(targets) else ():
                seeds(run.sources, end)  # a class that does not exist is an error before anything is propagated
        wanted = jnp.arange(classes) if targets is None else jnp.asarray(targets)
        if wanted.ndim == 0:
            raise ArgumentError(
                f"targets={targets} is one target: use `explain(..., target={targets})`, or a sequence of them."
            )

        def one(target):
            relevance = planned.leaves.restore(run.relevances(seeds(run.sources, target)))
            return relevance if pool is None else pool(relevance)

        return lax.map(one, wanted, batch_size=batch_size or max(len(wanted), 1))

    return explained
