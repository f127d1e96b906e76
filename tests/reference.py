"""A slow and obvious layer-wise relevance propagation, for comparison: it shares no code with relprop.

Where relprop propagates coefficients through surrogates, this materialises the Jacobian of every layer and
applies the formulas of the papers in their *relevance form*, in numpy and float64. Everything is flat: an
affine layer is

    z = x W + b        x: (inputs,)   W: (inputs, outputs)   b, z, R: (outputs,)

and a batch is one long vector. A rule is a function `rule(layer, x, R, ...)` of an `Affine` layer, its input
and the relevance of its output, and returns the relevance of its input, in the shape of `x`.

Biases are treated as by relprop: "absorb" (the bias keeps its share), "ignore" (as if there were none) and
"distribute" (what the layer would keep goes in equal parts to the inputs of each output; Arras et al. 2017).
"""

import dataclasses

import jax
import numpy as np

EPSILON = 1e-6

# Notation of the formulas below.


def positive(v):
    return np.maximum(v, 0)


def negative(v):
    return np.minimum(v, 0)


def stabilize(z, epsilon=EPSILON):
    """z + epsilon * sign(z), where sign(0) = +1."""
    return z + epsilon * np.where(z < 0, -1.0, 1.0)


def divide(a, b):
    """a / b, and a / 0 = 0: where there are no contributions, there is nothing to hand on."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.zeros(a.shape), where=b != 0)


# Affine layers.


@dataclasses.dataclass(frozen=True)
class Affine:
    """An affine layer as matrices. `connected[i, j]` is 1 where output j reads input i, else 0."""

    W: np.ndarray
    b: np.ndarray
    connected: np.ndarray

    def __call__(self, x):
        return np.ravel(x) @ self.W + self.b


def materialise(function, shape, ones=None):
    """The `Affine` layer that `function` is, on inputs of a shape.

    `ones` is the same function with every weight 1 and no shift: where its Jacobian is not 0, an input is
    connected with an output. By default that is where the Jacobian of `function` is not 0.
    """
    origin = np.zeros(shape)

    def matrix(function):
        return np.asarray(jax.jit(jax.jacobian(function))(origin)).reshape(-1, origin.size).T

    W = matrix(function)
    connected = matrix(ones) if ones is not None else W
    return Affine(W, np.asarray(function(origin)).ravel(), (connected != 0).astype(float))


def _share(layer, contributions, denominators, R, distribute):
    """Hand R_j to the inputs in the proportions `contributions[i, j] / denominators[j]`.

    `distribute`: what of R_j is left then goes in equal parts to all inputs that output j reads.
    """
    R = np.ravel(R)
    R_in = contributions @ divide(R, denominators)
    if distribute:
        left = R - divide(R, denominators) * contributions.sum(0)
        R_in = R_in + layer.connected @ (left / layer.connected.sum(0))
    return R_in


def _bias(layer, bias):
    return np.zeros_like(layer.b) if bias == "ignore" else layer.b


def zero(layer, x, R, bias="absorb"):
    """LRP-0: contributions x_i w_ij."""
    contributions = np.ravel(x)[:, None] * layer.W
    z = contributions.sum(0) + _bias(layer, bias)
    return _share(layer, contributions, z, R, bias == "distribute").reshape(np.shape(x))


def epsilon(layer, x, R, epsilon=EPSILON, bias="absorb"):
    """LRP-epsilon: LRP-0 with a stabilised denominator."""
    contributions = np.ravel(x)[:, None] * layer.W
    z = contributions.sum(0) + _bias(layer, bias)
    return _share(layer, contributions, stabilize(z, epsilon), R, bias == "distribute").reshape(np.shape(x))


def gamma(layer, x, R, gamma=0.25, epsilon=EPSILON, bias="absorb"):
    """Generalised LRP-gamma: contributions with the sign of z_j count 1 + gamma times."""
    contributions = np.ravel(x)[:, None] * layer.W
    b = _bias(layer, bias)
    z = contributions.sum(0) + b
    contributions = contributions + gamma * np.where(z >= 0, positive(contributions), negative(contributions))
    b = b + gamma * np.where(z >= 0, positive(b), negative(b))
    denominators = stabilize(contributions.sum(0) + b, epsilon)
    return _share(layer, contributions, denominators, R, bias == "distribute").reshape(np.shape(x))


def alphabeta(layer, x, R, alpha=2.0, beta=1.0, epsilon=EPSILON, bias="absorb"):
    """LRP-alpha-beta: alpha times by the positive contributions, less beta times by the negative ones."""
    contributions = np.ravel(x)[:, None] * layer.W
    b = _bias(layer, bias)

    def part(sign):
        own = sign(contributions)
        denominators = stabilize(own.sum(0) + sign(b), epsilon)
        return _share(layer, own, denominators, R, bias == "distribute")

    return (alpha * part(positive) - beta * part(negative)).reshape(np.shape(x))


def zplus(layer, x, R, epsilon=EPSILON, bias="absorb"):
    """LRP-z+: by the positive contributions alone."""
    return alphabeta(layer, x, R, 1.0, 0.0, epsilon, bias)


def wsquare(layer, x, R):
    """LRP-w^2: by the squared weights, whatever the input. Biases have no part in it."""
    squares = layer.W**2
    return _share(layer, squares, squares.sum(0), R, False).reshape(np.shape(x))


def flat(layer, x, R):
    """Flat: in equal parts to all inputs that an output reads. Biases have no part in it."""
    return _share(layer, layer.connected, layer.connected.sum(0), R, False).reshape(np.shape(x))


def zbox(layer, x, R, low, high, epsilon=EPSILON):
    """LRP-z^B: contributions counted from the bound that works against each weight. Biases cancel.

    `low`, `high`: bounds of the input that broadcast to `x`.
    """
    low, high = (np.broadcast_to(bound, np.shape(x)).reshape(-1, 1) for bound in (low, high))
    contributions = np.reshape(x, (-1, 1)) * layer.W - low * positive(layer.W) - high * negative(layer.W)
    denominators = stabilize(contributions.sum(0), epsilon)
    return _share(layer, contributions, denominators, R, False).reshape(np.shape(x))


def pass_on(layer, x, R):
    """Relevance as it is, between equal shapes."""
    return np.reshape(R, np.shape(x))


# Places without weights.


def identity(function, x, R):
    """An activation y = f(x) passes its relevance on, but for the share of f(0): R (f(x) - f(0)) / f(x)."""
    y, y0 = np.asarray(function(x)), np.asarray(function(np.zeros_like(x)))
    return divide(np.reshape(R, y.shape) * (y - y0), y)


def winner(layer, x, R):
    """Max pooling: all relevance to the first largest input of each window (`layer.connected`)."""
    inside = np.where(layer.connected != 0, np.ravel(x)[:, None], -np.inf)
    R_in = np.zeros(np.size(x))
    np.add.at(R_in, inside.argmax(0), np.ravel(R))
    return R_in.reshape(np.shape(x))


def proportional(layer, x, R):
    """Max pooling of non-negative values in deep Taylor decomposition: R x_i / sum of the window."""
    contributions = np.ravel(x)[:, None] * layer.connected
    return _share(layer, contributions, contributions.sum(0), R, False).reshape(np.shape(x))


def add_zero(a, b, R):
    """A sum y = a + b hands R to both terms in proportion to them."""
    return divide(a * R, a + b), divide(b * R, a + b)


def add_norm(a, b, R, epsilon=EPSILON):
    """The same with a stabilised denominator (zennit's Norm)."""
    return a * R / stabilize(a + b, epsilon), b * R / stabilize(a + b, epsilon)


def add_gamma(a, b, R, gamma=1.0):
    """The same where the terms with the sign of y count 1 + gamma times (Berend et al. 2026)."""
    y = a + b
    a, b = (v * np.where(v * y > 0, 1 + gamma, 1.0) for v in (a, b))
    return divide(a * R, a + b), divide(b * R, a + b)


# Networks.


def propagate(layers, x, R=None):
    """The relevance of `x` for a network given as a list of (kind, function, rule).

    kind "affine": `rule(layer, x, R)` is one of the rules for affine layers, average pooling included;
    kind "activation": `rule` is `identity`;
    kind "max_pool": `function` is the pooling, `rule` is `winner` or `proportional`;
    kind "residual": `function` is such a list too, the branch of `x + branch(x)`, and `rule` one of `add_*`.
    `R` is the relevance of the output; by default the output itself.
    """
    inputs = [np.asarray(x)]
    for kind, function, _ in layers:
        inputs.append(_forward(kind, function, inputs[-1]))
    output = inputs.pop()
    R = output if R is None else R
    for (kind, function, rule), x in zip(reversed(layers), reversed(inputs), strict=True):
        if kind == "affine":
            R = rule(materialise(function, x.shape), x, R)
        elif kind == "max_pool":
            R = rule(_windows(function, x.shape), x, R)
        elif kind == "activation":
            R = rule(function, x, R)
        elif kind == "residual":
            own, branch = rule(x, _forward("branch", function, x), R)
            R = own + propagate(function, x, branch)
        else:
            raise ValueError(f"unknown kind of layer: {kind!r}")
    return R


def _forward(kind, function, x):
    if kind in ("residual", "branch"):
        y = x
        for inner in function:
            y = _forward(*inner[:2], y)
        return x + y if kind == "residual" else y
    return np.asarray(function(x))


def _windows(pool, shape):
    """The windows of a max pooling: an input is in one if raising it alone raises the maximum."""
    size = int(np.prod(shape))
    raised = np.asarray(jax.lax.map(pool, np.eye(size).reshape(size, *shape))).reshape(size, -1)
    return Affine(raised, np.zeros(raised.shape[1]), (raised != 0).astype(float))
