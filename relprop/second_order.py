"""Explanations by pairs and by walks: BiLRP for similarities, GNN-LRP for graphs, both made of `vjp` and `vmap`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .conditions import Condition, condition
from .errors import ArgumentError
from .pipeline import Fallback, prepare
from .surrogate import widen
from .transform import explain, vjp


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
        return jnp.tensordot(self.left, self.right, axes=(0, 0))

    @property
    def kept(self) -> jax.Array:
        """What pairs leave to biases and the like: of one input with those of the other, and among themselves."""
        features = len(self.left_kept)
        left, right = (side.reshape(features, -1).sum(-1) for side in (self.left, self.right))
        return left @ self.right_kept + self.left_kept @ right + self.left_kept @ self.right_kept


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
    if batch_size is not None and batch_size < 1:
        raise ArgumentError(f"batch_size is a number of features, at least 1, got {batch_size}.")

    def side(args):
        embedding, pullback = vjp(
            fn, rules, *args, argnums=argnums, parameters=parameters, fallback=fallback, conditions=conditions
        )
        leaves = jax.tree_util.tree_leaves(embedding)
        form: Any = jax.tree_util.tree_structure(embedding)
        if len(leaves) != 1 or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
            raise ArgumentError(f"bilrp explains the dot product of two arrays of floats, but the function returns {form}.")
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
        return features, found, features - widen(found).reshape(features.size, -1).sum(-1).astype(features.dtype)

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

    if axis >= 0:
        raise ArgumentError(f"axis={axis}: count the axis of nodes from the end, such as -2 in (nodes, features).")

    def walked(*args, **kwargs):
        plan = prepare(fn, rules, args, kwargs, argnums, parameters, target, False, fallback).plan
        layers = plan.select(at)
        for layer in layers:
            plan.outside_of(
                {"scan"},
                layer,
                ", whose steps would all have one node. Write the loop out in Python, or select layers outside.",
            )
        counts = [layer.output_shape[axis] for layer in layers]

        def one(*nodes):
            masks = []
            for layer, count, node in zip(layers, counts, nodes, strict=True):
                mask = (jnp.arange(count) == node).astype(layer.output.dtype)
                masks.append(_at_index(layer.index, mask.reshape((count,) + (1,) * (-axis - 1))))
            relevance = explain(
                fn, rules, argnums=argnums, target=target, parameters=parameters, fallback=fallback, conditions=masks
            )(*args, **kwargs)
            (leaf,) = jax.tree.leaves(relevance)
            return widen(leaf).sum([d for d in range(leaf.ndim) if d != axis % leaf.ndim]).astype(leaf.dtype)

        def nested(*above):
            """The walks that go on through the nodes `above`: axes from the layer below these down to the input."""
            below = len(layers) - len(above)
            return one(*above) if below == 0 else jax.vmap(lambda node: nested(node, *above))(jnp.arange(counts[below - 1]))

        found = lax.map(nested, jnp.arange(counts[-1]), batch_size=batch_size or counts[-1])
        return found.T

    return walked


def _at_index(index: int, mask: jax.Array) -> Condition:
    return condition(lambda layer: layer.index == index, mask, exclusive=True)
