"""A Gaussian restricted Boltzmann machine: a density expert for activation maximisation, and how it is trained.

    log p(x) = sum_j log(1 + exp(w_j . x + b_j)) - x^T P x / 2 + constant        (x counted from a mean, P = Sigma^-1)

is the marginal of exp(h^T (W x + b) - x^T P x / 2) over binary h. Given h, x is normal with mean Sigma W^T h and covariance
Sigma; given x, the h_j are independent with probability sigma(w_j . x + b_j).
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..errors import ArgumentError
from .priors import cholesky

__all__ = ["GaussianRBM", "fit_rbm"]

EXACT = 16  # hidden units up to which all their states are enumerated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GaussianRBM:
    """An expert on what inputs look like: `rbm(x)` is log p(x) up to a constant; see the module.

    Attributes:
        weights: W, (hidden, features).
        bias: b, (hidden,).
        precision: P = Sigma^-1, (features, features), symmetric and positive definite.
        mean: what x is counted from, of the shape of one example; it has as many elements as there are features.

    Source:
        Montavon, Samek, Müller: Methods for interpreting and understanding deep neural networks, 2018, section 3.2.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.maximization import GaussianRBM
        >>> rbm = GaussianRBM(jnp.zeros((2, 1)), jnp.zeros(2), jnp.eye(1), jnp.zeros(1))
        >>> float(rbm(jnp.array([2.0])))  # 2 log 2 - 2^2 / 2
        -0.6137056
    """

    weights: jax.Array
    bias: jax.Array
    precision: jax.Array
    mean: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """log p(x) up to a constant, of examples (..., *mean.shape): one number each, (...)."""
        flat = self._flat(x)
        dtype = flat.dtype
        hidden = flat @ self.weights.astype(dtype).T
        hidden = jax.nn.softplus(hidden + jnp.broadcast_to(self.bias.astype(dtype), hidden.shape)).sum(-1)
        return hidden - jnp.einsum("...i,ij,...j->...", flat, self.precision.astype(dtype), flat) / 2

    def log_partition(
        self, key: jax.Array | None = None, *, chains: int = 200, temperatures: int = 2000
    ) -> tuple[jax.Array, jax.Array]:
        """The constant: log p(x) is `rbm(x) - log_partition()[0]`.

        Up to 16 hidden units all states of them are summed over, each of which leaves a Gaussian integral. Above, annealed
        importance sampling leads from the machine with W = 0 to this one.

        Args:
            key: for the sampling.
            chains: independent runs that are averaged.
            temperatures: steps on the way.

        Returns:
            The estimate, and its standard error; 0 where it is exact. The estimate of the logarithm is too low rather than
            too high, by more where chains differ much.

        Source:
            Neal: Annealed importance sampling, 2001; Salakhutdinov, Murray: On the quantitative analysis of deep belief
            networks, ICML 2008.
        """
        hidden, features = self.weights.shape
        root = cholesky(self.precision)
        # log of the integral of exp(-x^T P x / 2)
        integral = features * math.log(2 * math.pi) / 2 - jnp.log(jnp.diagonal(root)).sum()
        reach = jax.scipy.linalg.solve_triangular(root, self.weights.T, lower=True)  # W Sigma W^T = reach^T reach
        if hidden <= EXACT:
            states = jnp.asarray(np.array(list(itertools.product([0.0, 1.0], repeat=hidden))), reach.dtype)
            logs = states @ self.bias.astype(reach.dtype) + ((states @ (reach.T @ reach)) * states).sum(1) / 2
            return integral + jax.scipy.special.logsumexp(logs), jnp.zeros_like(integral)
        for name, number, least in (("chains", chains, 2), ("temperatures", temperatures, 1)):
            if number < least:
                raise ArgumentError(f"{name}={number} has to be {least} at least: fewer leave no estimate of the error.")
        if key is None:
            raise ArgumentError(
                f"With {hidden} hidden units the partition function is sampled: give a key, log_partition(key)."
            )
        logs = _anneal(self, root, key, chains, temperatures) + integral + hidden * math.log(2)
        estimate = jax.scipy.special.logsumexp(logs) - math.log(chains)
        relative = jnp.exp(logs - estimate)
        return estimate, jnp.std(relative) / math.sqrt(chains)

    def sample(self, key: jax.Array, count: int, *, steps: int = 1000, start: Any = None) -> jax.Array:
        """Examples (count, *mean.shape) after that many steps of Gibbs sampling, in one compiled loop.

        Args:
            key: of the randomness.
            count: how many chains.
            steps: of each: all hidden units are drawn given the input, then the input given these.
            start: examples (count, *mean.shape) to start from; by default the hidden units are drawn with probability 1/2.
        """
        for name, number in (("count", count), ("steps", steps)):
            if number < 0:
                raise ArgumentError(f"{name}={number} has to be 0 at least.")
        given = None if start is None else self._flat(start).astype(self.precision.dtype)
        if given is not None and given.shape[:-1] != (count,):
            raise ArgumentError(f"start holds {given.shape[:-1]} examples, but count={count}.")
        return _gibbs(self, cholesky(self.precision), key, given, count, steps)

    def _flat(self, x: jax.Array) -> jax.Array:
        """Examples as vectors (..., features), counted from the mean."""
        x, shape = jnp.asarray(x), self.mean.shape
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ArgumentError(
                f"The machine is of real floating-point examples, but is given {x.dtype}: convert them, and scale them as "
                "the images that it was fitted to."
            )
        features = self.mean.size
        fields = self.weights.shape, self.bias.shape, self.precision.shape
        if fields != ((len(self.bias), features), (len(self.bias),), (features, features)):
            raise ArgumentError(
                f"The shapes of weights, bias and precision, {fields}, do not belong together with a mean of {features} "
                "elements: they have to be (hidden, features), (hidden,) and (features, features)."
            )
        batch = x.shape[: x.ndim - len(shape)]
        if x.shape[len(batch) :] != shape or x.ndim < len(shape):
            raise ArgumentError(f"The machine is of examples of the shape {shape}, but is given {x.shape}.")
        return (x - jnp.broadcast_to(self.mean.astype(x.dtype), x.shape)).reshape(*batch, self.mean.size)


def fit_rbm(
    images: Any,
    hidden: int = 256,
    *,
    key: jax.Array,
    directions: int = 60,
    noise: float = 0.15,
    steps: int = 6000,
    batch: int = 256,
    learning_rate: float = 0.02,
) -> GaussianRBM:
    """Train a Gaussian RBM by persistent contrastive divergence.

    The likelihood's gradient is the mean of that of log p over the data, minus its mean over the model; the latter is taken
    over chains of Gibbs sampling that go on from step to step. Inputs are whitened first; there the precision is diagonal.
    At the start the Gaussian and random hidden units have half of the variance each.

    Args:
        images: (N, ...), floating-point; N examples.
        hidden: how many hidden units.
        key: of the randomness; same key, same machine.
        directions: how many of the principal directions of the data the hidden units look at, those of largest variance; in
            the others the density is a Gaussian's.
        noise: the standard deviation of noise that is added to the images, new at each step, in their units. Without it
            pixels that never change would have no density. More of it makes a smoother density.
        steps: of Adam, with a rate that falls to 0.
        batch: images for each step, and chains.
        learning_rate: of Adam at the start.

    Returns:
        A `GaussianRBM`. MNIST takes half a minute on two cores.

    Raises:
        ArgumentError: no images, not floating-point or not finite; numbers that are too small.

    Source:
        Tieleman: Training restricted Boltzmann machines using approximations to the likelihood gradient, ICML 2008.

    Example:
        >>> import jax
        >>> from relprop.maximization import fit_rbm
        >>> data = jax.random.normal(jax.random.key(0), (100, 2, 3))
        >>> fit_rbm(data, hidden=4, key=jax.random.key(1), steps=10)(data).shape
        (100,)
    """
    given, images = images, jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating) or images.ndim < 2 or len(images) < 2:
        raise ArgumentError(
            f"images are {images.dtype}{list(images.shape)}, but have to be floating-point (N, ...), N >= 2."
        )
    for name, number in (
        ("hidden", hidden),
        ("directions", directions),
        ("steps", steps),
        ("batch", batch),
        ("noise", noise),
        ("learning_rate", learning_rate),
    ):
        if not 0 < number < math.inf:
            raise ArgumentError(f"{name}={number} has to be above 0{'' if number <= 0 else ', and finite'}.")
    if not isinstance(given, jax.core.Tracer) and not np.isfinite(np.asarray(given)).all():
        raise ArgumentError("images are not finite: an expert on NaN or infinity would learn nothing else.")
    flat = images.reshape(len(images), -1)
    flat = flat.astype(np.promote_types(flat.dtype, np.float32))  # half precision has no eigenvectors
    directions = min(directions, flat.shape[1])
    weights, bias, precision, mean = _train(flat, key, hidden, directions, noise, steps, batch, learning_rate)
    return GaussianRBM(weights, bias, precision, mean.reshape(images.shape[1:]))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _train(data, key, hidden, directions, noise, steps, batch, learning_rate):
    features, dtype = data.shape[1], data.dtype
    mean = data.mean(0)
    centred = data - mean[None]
    variances, axes = jnp.linalg.eigh(centred.T @ centred / len(data))
    spread = jnp.sqrt(jnp.maximum(variances, 0) + noise**2)
    whiten = axes / spread[None]
    # u = (x - mean) whiten has unit variance. Hidden units look at the directions of largest variance, the last ones.
    strong = slice(features - directions, features)
    white, shaken = centred @ whiten[:, strong], noise / spread[None, strong]

    def fields(params, u):
        return (u - params["mean"][None]) @ params["weights"].T + params["bias"][None]

    def free(params, u):
        """log p(u) up to a constant, the mean over a batch."""
        quadratic = (jnp.square(u - params["mean"][None]) * jnp.exp(params["log_precision"])[None]).sum(1) / 2
        return (jax.nn.softplus(fields(params, u)).sum(1) - quadratic).mean()

    def gibbs(params, u, key):
        first, second = jax.random.split(key)
        on = jax.random.bernoulli(first, jax.nn.sigmoid(fields(params, u))).astype(dtype)
        variance = jnp.exp(-params["log_precision"])[None]
        normal = jax.random.normal(second, u.shape, dtype)
        return params["mean"][None] + variance * (on @ params["weights"]) + jnp.sqrt(variance) * normal

    optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, steps), b1=0.5)

    def step(state, key):
        params, memory, chains = state
        choice, shake, walk = jax.random.split(key, 3)
        u = white[jax.random.randint(choice, (batch,), 0, len(white))]
        u = u + shaken * jax.random.normal(shake, u.shape, dtype)
        chains = gibbs(params, chains, walk)
        slope = jax.grad(lambda params: free(params, chains) - free(params, u))(params)
        # The optimiser's numbers mix widths: it is written for the standard promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = optimizer.update(slope, memory)
            params = optax.apply_updates(params, updates)
        return (params, memory, chains), None

    start, first, later = jax.random.split(key, 3)
    # At the start the Gaussian has half of the variance, and hidden units, each on half of the time, the other half.
    weights = math.sqrt(8 / hidden) * jax.random.normal(start, (hidden, directions), dtype)
    params = {
        "weights": weights,
        "bias": -jnp.square(weights).sum(1) / 4,
        "mean": -weights.sum(0) / 4,
        "log_precision": jnp.full(directions, math.log(2), dtype),
    }
    chains = jax.random.normal(first, (batch, directions), dtype)
    state: Any = params, optimizer.init(params), chains
    (params, *_), _ = jax.lax.scan(step, state, jax.random.split(later, steps))
    # w . (u - m) = (whiten w) . (x - mean - unwhiten m), and likewise u^T D u
    diagonal = jnp.ones(features, dtype).at[strong].set(jnp.exp(params["log_precision"]))
    precision = (whiten * diagonal[None]) @ whiten.T
    mean = mean + (axes[:, strong] * spread[None, strong]) @ params["mean"]
    return params["weights"] @ whiten[:, strong].T, params["bias"], (precision + precision.T) / 2, mean


def _draw(rbm: GaussianRBM, root: jax.Array, x: jax.Array, key: jax.Array, scale: Any = 1.0) -> jax.Array:
    """One step of Gibbs sampling; `root` is the lower triangular root of the precision, `scale` that of W and b."""
    first, second = jax.random.split(key)
    fields = scale * (x @ rbm.weights.T + rbm.bias[None])
    on = jax.random.bernoulli(first, jax.nn.sigmoid(fields)).astype(x.dtype)
    return _given(rbm, root, on, second, scale)


def _given(rbm: GaussianRBM, root: jax.Array, on: jax.Array, key: jax.Array, scale: Any = 1.0) -> jax.Array:
    """The input, drawn given the hidden units."""
    # x = Sigma W^T h + noise = root^-T (root^-1 W^T h + normal)
    solve = functools.partial(jax.scipy.linalg.solve_triangular, root, lower=True)
    inner = solve((scale * (on @ rbm.weights)).T) + jax.random.normal(key, (root.shape[0], len(on)), on.dtype)
    return solve(inner, trans=1).T


@functools.partial(jax.jit, static_argnums=(4, 5))
def _gibbs(rbm: GaussianRBM, root, key, start, count: int, steps: int):
    first, second, later = jax.random.split(key, 3)
    if start is None:
        on = jax.random.bernoulli(first, 0.5, (count, len(rbm.bias))).astype(root.dtype)
        start = _given(rbm, root, on, second)
    x, _ = jax.lax.scan(lambda x, key: (_draw(rbm, root, x, key), None), start, jax.random.split(later, steps))
    return x.reshape(count, *rbm.mean.shape) + rbm.mean[None]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _anneal(rbm: GaussianRBM, root, key, chains: int, temperatures: int):
    """The logarithms of the importance weights of `chains` runs, against the machine with W and b at 0."""
    dtype = root.dtype
    first, later = jax.random.split(key)
    x = _given(rbm, root, jnp.zeros((chains, len(rbm.bias)), dtype), first)
    scales = jnp.linspace(0, 1, temperatures + 1, dtype=dtype)

    def step(state, given):
        x, logs = state
        before, after, key = given
        fields = x @ rbm.weights.T + rbm.bias[None]
        logs = logs + (jax.nn.softplus(after * fields) - jax.nn.softplus(before * fields)).sum(1)
        return (_draw(rbm, root, x, key, after), logs), None

    walk = scales[:-1], scales[1:], jax.random.split(later, temperatures)
    (_, logs), _ = jax.lax.scan(step, (x, jnp.zeros(chains, dtype)), walk)
    return logs
