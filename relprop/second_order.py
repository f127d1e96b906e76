"""Explanations by pairs and by walks: BiLRP for similarities, GNN-LRP for graphs, both made of `vjp` and `vmap`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .arguments import checked_batch_size, normalise_argnums
from .conditions import Condition, condition, resolve
from .errors import ArgumentError
from .pipeline import Fallback, prepare
from .surrogate import widen
from .transform import vjp


class Similarity(NamedTuple):
    """A dot product `value = sum_m f_m(x) f_m(y)`, explained.

    `left` (features, ...) is the relevance of `x` for each feature `f_m(x)`, `right` that of `y`. `left_kept` and
    `right_kept` (features,) are what of each feature does not arrive there: `f_m(x) - left[m].sum()`.
    """

    value: jax.Array
    left: jax.Array
    right: jax.Array
    left_kept: jax.Array
    right_kept: jax.Array

    @property
    def joint(self) -> jax.Array:
        """The relevance of pairs, `sum_m left[m, i] right[m, j]`: the axes of the left, then those of the right."""
        return self._each(lambda left, right: jnp.tensordot(left, right, axes=(0, 0)), self.left, self.right)

    @property
    def kept(self) -> jax.Array:
        """What pairs leave to biases and the like: of one input with those of the other, and among themselves."""

        def kept(left, right, left_kept, right_kept):
            left, right = (side.sum(range(1, side.ndim)) for side in (left, right))
            return left @ right_kept + left_kept @ right + left_kept @ right_kept

        return self._each(kept, self.left, self.right, self.left_kept, self.right_kept)

    def _each(self, function, *arrays):
        """`function` for each of the pairs over which `bilrp` was mapped."""
        for _ in range(self.value.ndim):
            function = jax.vmap(function)
        return function(*arrays)


def bilrp(
    fn: Callable[..., Any],
    rules: Any,
    *,
    argnums: int | Sequence[int] = -1,
    parameters: int | Sequence[int] | None = None,
    fallback: Fallback = None,
    conditions: Any = (),
    pool: Callable[[Any], jax.Array] | None = None,
    batch_size: int | None = None,
) -> Callable[..., Similarity]:
    """Explain a similarity, the dot product of two embeddings, by pairs of elements of the two inputs.

    One pair of inputs: `jax.vmap` it over several.

    Each feature of an embedding is explained by its own input, and the products are summed over features. BiLRP, Eberle
    et al. 2020 ("Building and interpreting deep similarity models"). An `fn` that normalises its output gives the cosine.

    Args:
        fn: the embedding, a function `fn(*shared, x)`. All elements of its output are features.
        rules, argnums, parameters, fallback, conditions: as in `relprop.explain`; `argnums` are positions in the
            arguments of `fn`.
        pool: what is made of the relevance for one feature before pairs are formed: a function of what `explain` returns
            to an array, such as `lambda r: rp.pool.patches(r, 8)`. Pairs of pixels are too many to keep.
        batch_size: how many features are explained at once; all of them by default. Fewer take less memory.

    Returns:
        A function `(*shared, x, y)` that returns a `Similarity`.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> w = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> found = rp.bilrp(lambda w, x: x @ w, None)(w, jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0]))
        >>> float(found.value), found.joint.tolist()
        (14.0, [[10.0, 0.0], [4.0, 0.0]])
    """
    checked_batch_size(batch_size)

    def side(args):
        embedding, pullback = vjp(
            fn, rules, *args, argnums=argnums, parameters=parameters, fallback=fallback, conditions=conditions
        )
        leaves = jax.tree_util.tree_leaves(embedding)
        form: Any = jax.tree_util.tree_structure(embedding)
        shapes = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
        if len(leaves) != 1 or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
            raise ArgumentError(
                f"bilrp explains the dot product of two arrays of floats, but the function returns {shapes}."
            )
        features = leaves[0].ravel()

        def feature(m):
            # All of the value of one feature is relevance, the others have none.
            given = jnp.where(jnp.arange(features.size) == m, features, jnp.zeros_like(features))
            relevance = pullback(form.unflatten([given.reshape(leaves[0].shape)]))
            pooled = relevance if pool is None else pool(relevance)
            if not isinstance(pooled, jax.Array):
                raise ArgumentError("The relevance of one feature is a pytree; `pool` must make one array of it.")
            return pooled

        found = lax.map(feature, jnp.arange(features.size), batch_size=batch_size or max(features.size, 1))
        return features, found, features - widen(found).sum(range(1, found.ndim)).astype(features.dtype)

    def similarity(*args):
        if len(args) < 2:
            raise ArgumentError(f"bilrp compares its last two positional arguments, but was called with {len(args)}.")
        *shared, x, y = args
        (left_features, left, left_kept), (right_features, right, right_kept) = side((*shared, x)), side((*shared, y))
        if left_features.shape != right_features.shape:
            raise ArgumentError(
                f"The embeddings have {left_features.size} and {right_features.size} features; a dot product needs as many."
            )
        return Similarity(left_features @ right_features, left, right, left_kept, right_kept)

    return similarity


def walks(
    fn: Callable[..., Any],
    rules: Any,
    *,
    at: Any,
    axis: int = -2,
    argnums: int = -1,
    target: Any = None,
    parameters: int | Sequence[int] | None = None,
    fallback: Fallback = None,
    batch_size: int | None = None,
) -> Callable[..., jax.Array]:
    """Explain the output of a graph network by walks: sequences of nodes, one for each layer. GNN-LRP, Schnake et al. 2022.

    The relevance of a walk is what flows through its node at every layer: a condition at each, one-hot over nodes, nested
    in a `vmap` each, so that walks that share their last nodes share that part of the pass backwards. All walks together
    have the relevance that passes these layers.

    Args:
        fn, rules, target, parameters, fallback: as in `relprop.explain`.
        at: the layers whose outputs are the states of nodes, one after each interaction: a selector, such as
            `"activation"`, whose matches are taken in order of execution.
        axis: the axis of nodes, in these outputs and in the explained argument, whose other axes are summed.
        argnums: the position of the explained argument.
        batch_size: how many nodes of the last layer are followed at once; all by default. For N nodes and L layers the
            result has N^(L + 1) elements.

    Returns:
        A function of the same arguments that returns an array (nodes of the input, nodes of the first layer, ...).

    Raises:
        ArgumentError: the layers do not follow one another, or are inside of a loop.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> adjacency = jnp.array([[1.0, 1.0], [0.0, 1.0]])  # the first node hears the second
        >>> fn = lambda adjacency, x: jnp.sum(adjacency @ x)
        >>> rp.walks(fn, None, at="dense")(adjacency, jnp.array([[1.0], [3.0]])).tolist()
        [[1.0, 0.0], [3.0, 3.0]]
    """

    checked_batch_size(batch_size)
    if axis >= 0:
        raise ArgumentError(f"axis={axis}: count the axis of nodes from the end, such as -2 in (nodes, features).")

    def walked(*args, **kwargs):
        planned = prepare(fn, rules, args, kwargs, argnums, parameters, target, False, fallback)
        plan = planned.plan
        layers = plan.select(at)
        for layer in layers:
            plan.outside_of(
                {"scan"},
                layer,
                ", whose steps would all have one node. Write the loop out in Python, or select layers outside.",
            )
        explained = jax.tree.leaves(args[normalise_argnums(argnums, len(args))[0]])
        if len(explained) != 1 or jnp.ndim(explained[0]) < -axis:
            raise ArgumentError(
                f"walks explain one array with nodes along axis {axis}, got {jax.tree.map(jnp.shape, explained)}."
            )
        count = jnp.shape(explained[0])[axis]
        for layer in layers:
            if layer.output.ndim < -axis or layer.output_shape[axis] != count:
                raise ArgumentError(
                    f"The input has {count} nodes along axis {axis}, but the {layer.kind} layer {layer.address} at "
                    f"{layer.source} has the output {layer.output_shape}. Select the layers that hold states of nodes, with "
                    "relprop.path(...) or relprop.where(lambda layer: ...)."
                )

        def one(*nodes):
            masks = []
            for layer, node in zip(layers, nodes, strict=True):
                mask = (jnp.arange(count) == node).astype(layer.output.dtype)
                masks.append(_at_index(layer.index, mask.reshape((count,) + (1,) * (-axis - 1))))
            # The plan is the same under all conditions: made once.
            conditioned = dataclasses.replace(planned, taps=resolve(masks, plan, planned.traced.explained))
            run = conditioned.run()
            (leaf,) = run.relevances(conditioned.seeds(run))
            return widen(leaf).sum([d for d in range(leaf.ndim) if d != axis % leaf.ndim]).astype(leaf.dtype)

        def nested(*above):
            """The walks that go on through the nodes `above`: axes from the layer below these down to the input."""
            below = len(layers) - len(above)
            return one(*above) if below == 0 else jax.vmap(lambda node: nested(node, *above))(jnp.arange(count))

        found = lax.map(nested, jnp.arange(count), batch_size=batch_size or max(count, 1))
        return found.T

    return walked


def _at_index(index: int, mask: jax.Array) -> Condition:
    return condition(lambda layer: layer.index == index, mask, exclusive=True)
