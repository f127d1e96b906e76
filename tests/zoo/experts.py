"""Mixtures of experts, with every way to dispatch, and networks over graphs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .base import dense, model, sample, weights

EXPERTS = {"router": (4, 3), "up": (3, 4, 6), "up_b": (3, 6), "down": (3, 6, 4), "out": (4, 3)}


def experts(mixture):
    """`(fn, params, x)` of a residual mixture `mixture(params, x)` over six items of width 4, and a dense layer."""

    def fn(params, x):
        return dense(params, x + mixture(params, x), "out")

    return fn, weights(**EXPERTS), sample(6, 4)


def renormalised(params, x):
    """The two best experts of every item, with their weights renormalised to sum to 1."""
    top, chosen = lax.top_k(jax.nn.softmax(dense(params, x, "router")), 2)
    return top / top.sum(-1, keepdims=True), chosen


@model()
def soft_mixture():
    def mixture(params, x):
        h = jnp.einsum("ni,eio->neo", x, params["up"]) + params["up_b"][None]
        y = jnp.einsum("neh,eho->neo", jax.nn.relu(h), params["down"])
        return (jax.nn.softmax(dense(params, x, "router"))[..., None] * y).sum(1)

    return experts(mixture)


@model()
def top_k_by_gathered_weights():
    def mixture(params, x):
        weight, chosen = renormalised(params, x)
        h = jnp.einsum("ni,nkio->nko", x, params["up"][chosen]) + params["up_b"][chosen]
        y = jnp.einsum("nkh,nkho->nko", jax.nn.relu(h), params["down"][chosen])
        return (weight[..., None] * y).sum(1)

    return experts(mixture)


@model()
def top_k_by_dispatch():
    """Items are scattered to slots of their experts and gathered back; what exceeds an expert's capacity is dropped."""

    def mixture(params, x):
        weight, chosen = renormalised(params, x)
        chosen, weight = chosen.reshape(-1), weight.reshape(-1)
        items = jnp.repeat(jnp.arange(6), 2)
        mine = jax.nn.one_hot(chosen, 3, dtype=jnp.int32)
        slot = (jnp.cumsum(mine, 0) * mine).sum(-1) - 1
        room = jnp.zeros((3, 5, 4), x.dtype).at[chosen, slot].set(x[items], mode="drop")
        h = jnp.einsum("esi,eio->eso", room, params["up"]) + params["up_b"][:, None]
        y = jnp.einsum("esh,eho->eso", jax.nn.relu(h), params["down"])
        back = y.at[chosen, slot].get(mode="fill", fill_value=0.0)
        return jnp.zeros_like(x).at[items].add(weight[:, None] * back)

    return experts(mixture)


@model("no vmap")
def top_1_by_ragged_dot():
    """Items sorted by expert, one grouped product, sorted back; the weight of the chosen expert is its probability."""

    def mixture(params, x):
        top, chosen = lax.top_k(jax.nn.softmax(dense(params, x, "router")), 1)
        order = jnp.argsort(chosen[:, 0])
        sizes = jnp.bincount(chosen[:, 0], length=3).astype(jnp.int32)
        h = lax.ragged_dot(x[order], params["up"], sizes) + params["up_b"][chosen[order, 0]]
        y = lax.ragged_dot(jax.nn.relu(h), params["down"], sizes)
        return top * y[jnp.argsort(order)]

    return experts(mixture)


@model()
def switched_branch():
    """One expert for the whole batch, by `lax.switch`."""
    params = weights(**EXPERTS)

    def fn(params, x):
        def expert(e):
            h = x @ params["up"][e] + params["up_b"][e][None]
            return jax.nn.relu(h) @ params["down"][e]

        best = jnp.argmax(dense(params, x, "router").sum(0))
        branches = [lambda e=e: expert(e) for e in range(3)]
        return dense(params, x + lax.switch(best, branches), "out")

    return fn, params, sample(6, 4)


# Graphs: five nodes with features of width 3; the edges are constants.

SENDERS = jnp.array([0, 1, 2, 3, 4, 0, 2, 1])
RECEIVERS = jnp.array([1, 2, 3, 4, 0, 2, 0, 4])


def adjacency():
    a = np.eye(5)
    a[RECEIVERS, SENDERS] = a[SENDERS, RECEIVERS] = 1
    degree = a.sum(1)
    return jnp.asarray(a / np.sqrt(degree[:, None] * degree))


@model(target=None)
def graph_convolution_dense():
    params = weights(a=(3, 6), a_b=(6,), b=(6, 4), b_b=(4,), out=(4, 2))
    mixing = adjacency()

    def fn(params, x):
        x = jax.nn.relu(mixing @ dense(params, x, "a"))
        x = jax.nn.relu(dense(params, mixing @ x, "b"))
        return dense(params, x.mean(0), "out")

    return fn, params, sample(5, 3)


@model("explained adjacency", target=None)
def graph_convolution_of_its_edges():
    """The explained input is the adjacency matrix: products of it with features that depend on it."""
    params = weights(x=(5, 3), a=(3, 6), a_b=(6,), b=(6, 4), out=(4, 2))

    def fn(params, mixing):
        x = jax.nn.relu(dense(params, mixing @ params["x"], "a"))
        x = jax.nn.relu(dense(params, mixing @ x, "b"))
        return dense(params, x.mean(0), "out")

    return fn, params, adjacency()


@model(target=None)
def message_passing():
    params = weights(a=(6, 6), a_b=(6,), b=(9, 5), b_b=(5,), out=(5, 2))

    def fn(params, x):
        messages = jax.nn.relu(dense(params, jnp.concatenate([x[SENDERS], x[RECEIVERS]], -1), "a"))
        received = jax.ops.segment_sum(messages, RECEIVERS, 5)
        x = jax.nn.relu(dense(params, jnp.concatenate([x, received], -1), "b"))
        return dense(params, x.sum(0), "out")

    return fn, params, sample(5, 3)


@model("attention", target=None)
def graph_attention():
    """Softmax over the edges of each node by segments. Velickovic et al. 2018."""
    params = weights(w=(3, 4), source=(4, 1), sink=(4, 1), out=(4, 2))

    def fn(params, x):
        h = dense(params, x, "w")
        s = jax.nn.leaky_relu(dense(params, h, "source")[SENDERS] + dense(params, h, "sink")[RECEIVERS])
        e = jnp.exp(s - jax.ops.segment_max(s, RECEIVERS, 5)[RECEIVERS])
        share = e / jax.ops.segment_sum(e, RECEIVERS, 5)[RECEIVERS]
        h = jax.nn.elu(jax.ops.segment_sum(share * h[SENDERS], RECEIVERS, 5))
        return dense(params, h.mean(0), "out")

    return fn, params, sample(5, 3)


@model(target=None)
def graph_isomorphism():
    """(1 + e) x + sum of the neighbours, through an MLP, twice, and a sum of both depths. Xu et al. 2019."""
    params = weights(a=(3, 6), a_b=(6,), b=(6, 4), c=(4, 6), c_b=(6,), d=(6, 4), out1=(4, 2), out2=(4, 2), own=(2,))

    def fn(params, x):
        def layer(x, first, second, own):
            x = (1 + own) * x + jax.ops.segment_sum(x[SENDERS], RECEIVERS, 5)
            return jax.nn.relu(dense(params, jax.nn.relu(dense(params, x, first)), second))

        one = layer(x, "a", "b", params["own"][0])
        two = layer(one, "c", "d", params["own"][1])
        return dense(params, one.sum(0), "out1") + dense(params, two.sum(0), "out2")

    return fn, params, sample(5, 3)
