"""What each rule does, on numbers that can be worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import relprop as rp

W = jnp.array([[3.0, -1.0], [-2.0, 4.0]])
X = jnp.array([[1.0, 2.0]])  # contributions: 3, -4 | -1, 8; z = -1, 7


def dense(x):
    return x @ W


BY_HAND = {
    rp.Zero(): [3 - 1, -4 + 8],
    rp.Epsilon(1.0): [3 * 1 / 2 - 1 * 7 / 8, -4 * 1 / 2 + 8 * 7 / 8],
    rp.ZPlus(0.0): [-1, 7],
    rp.AlphaBeta(2.0, 1.0, 0.0): [2 * -1 - 7, -1 * -1 + 2 * 7],
    rp.Gamma(1.0, 0.0): [-1 * 3 / -5 + 7 * -1 / 15, -1 * -8 / -5 + 7 * 16 / 15],
    rp.WSquare(): [-1 * 9 / 13 + 7 * 1 / 17, -1 * 4 / 13 + 7 * 16 / 17],
    rp.Flat(): [(-1 + 7) / 2, (-1 + 7) / 2],
    # low = 0, high = 3: numerators x w - 3 w-: 3, -4 + 6 | -1 + 3, 8
    rp.ZBox(0.0, 3.0, 0.0): [-1 * 3 / 5 + 7 * 2 / 10, -1 * 2 / 5 + 7 * 8 / 10],
    rp.Pass(): [-1, 7],
    rp.Gradient(): [3 - 1, -4 + 8],
}


@pytest.mark.parametrize("rule", BY_HAND, ids=str)
def test_affine_rules_by_hand(rule):
    np.testing.assert_allclose(rp.explain(dense, rule)(X)[0], BY_HAND[rule], rtol=1e-12)


def test_bias_modes_by_hand():
    def fn(x):
        return x @ W[:, :1] + 5.0 * jnp.ones((1, 1))  # 3 - 4 + 5 = 4

    explain = lambda **options: rp.explain(fn, rp.Epsilon(0.0, **options))(X)[0]  # noqa: E731
    np.testing.assert_allclose(explain(), [3.0, -4.0])
    np.testing.assert_allclose(explain(bias="ignore"), [4 * 3 / -1, 4 * -4 / -1])
    np.testing.assert_allclose(explain(bias="distribute"), [3 + 2.5, -4 + 2.5])


def test_a_negative_output_prefers_negative_contributions_under_gamma():
    """As gamma grows, everything goes to the contributions that have the sign of the output."""
    relevance = rp.explain(dense, rp.Gamma(1e9), target=0)(X)[0]
    np.testing.assert_allclose(relevance, [0.0, -1.0], atol=1e-6)


def test_rules_at_adds():
    a, b = jnp.array([3.0]), jnp.array([-1.0])

    def fn(a, b):
        return a + b

    def shares(rule):
        return np.concatenate(rp.explain(fn, {"add": rule}, argnums=(0, 1))(a, b))

    np.testing.assert_allclose(shares(rp.Zero()), [3.0, -1.0])
    np.testing.assert_allclose(shares(rp.Norm(0.5)), [3 * 2 / 2.5, -1 * 2 / 2.5])
    np.testing.assert_allclose(shares(rp.ResidualGamma(1.0)), [2 * 6 / 5, 2 * -1 / 5])
    minus = rp.explain(lambda a, b: a - b, {"add": rp.ResidualGamma(1.0)}, argnums=(0, 1))(a, -b)
    np.testing.assert_allclose(np.concatenate(minus), shares(rp.ResidualGamma(1.0)))
    zero = rp.explain(fn, {"add": rp.ResidualGamma()}, argnums=(0, 1))(a, -a)
    np.testing.assert_allclose(np.concatenate(zero).sum(), 0.0)


def test_modified_gradients():
    """guided: c+ [x > 0]; deconvnet: c+; the picture is the coefficient, the relevance input times it."""
    v = jnp.array([[1.0], [-1.0], [2.0]])
    x = jnp.array([[2.0, 3.0, -1.0]])

    def fn(x):
        return jax.nn.relu(x) @ v

    guided = rp.explain(fn, rp.presets.guided_backprop(), coefficients=True)(x)
    np.testing.assert_allclose(guided, [[1.0, 0.0, 0.0]])
    np.testing.assert_allclose(rp.explain(fn, rp.presets.guided_backprop())(x), [[2.0, 0.0, 0.0]])
    np.testing.assert_allclose(rp.explain(fn, rp.presets.deconvnet(), coefficients=True)(x), [[1.0, 0.0, 2.0]])


def test_gradient_everywhere_is_input_times_gradient():
    def fn(x):
        h = jnp.tanh(x @ W) * jax.nn.sigmoid(x)
        return jax.nn.softmax(h + x).max()

    everywhere = [(rp.where(lambda layer: True, "all"), rp.Gradient())]
    np.testing.assert_allclose(rp.explain(fn, everywhere)(X), X * jax.grad(fn)(X), rtol=1e-9)


def test_identity_at_a_log_counts_f_of_0_as_nothing():
    x = jnp.array([0.5, 2.0, 1.0])
    np.testing.assert_allclose(rp.explain(jnp.log, None)(x), jnp.log(x), atol=1e-12)


# Rules that do not read the input, at any depth.

KEYS = jax.random.split(jax.random.key(3), 4)
KERNELS = [jax.random.normal(k, (3, 3, n, m)) / 3 for k, n, m in zip(KEYS, (1, 4, 4), (4, 4, 2), strict=False)]
IMAGE = jax.random.normal(KEYS[3], (2, 6, 6, 1)).at[:, 2:4].set(0.0)


def convnet(x, skip=False):
    for i, kernel in enumerate(KERNELS):
        y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = x + jax.nn.relu(y) if skip and i == 1 else jax.nn.relu(y)
        if i == 0:
            x = x.reshape(2, 3, 2, 3, 2, 4).max((2, 4))
    return x.sum((1, 2))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("skip", [False, True])
def test_flat_from_a_layer_downwards_conserves_and_reaches_black_pixels(depth, skip):
    lowest = rp.where(lambda layer: layer.index <= [0, 3, 6][depth - 1] and layer.kind == "conv", "lowest")
    rules = [(lowest, rp.Flat()), (rp.optional("conv"), rp.Gamma())]
    fn = lambda x: convnet(x, skip)  # noqa: E731
    relevance = rp.explain(fn, rules)(IMAGE)
    if not (skip and depth == 3):  # a sum of two zeros has no share to hand on
        np.testing.assert_allclose(relevance.sum(), fn(IMAGE).sum(), rtol=1e-4)
    assert (np.abs(relevance[:, 2:4]) > 0).mean() > 0.5
    np.testing.assert_allclose(jax.jit(rp.explain(fn, rules))(IMAGE), relevance, rtol=1e-9)


def test_a_coefficient_rule_below_a_relative_one():
    """zennit's relevance form, written out: Flat above, Gamma below."""
    w1, w2 = jnp.array([[1.0, -2.0], [0.5, 1.0]]), jnp.array([[1.0], [1.0]])
    x = jnp.array([[2.0, 1.0]])  # z1 = 2.5, -3

    def fn(x):
        return jax.nn.relu(x @ w1) @ w2

    rules = [(rp.first("dense"), rp.Zero()), ("dense", rp.Flat())]
    half = 2.5 / 2  # Flat hands half of the output to each hidden unit, the inactive one included
    expected = [half * 2 / 2.5 + half * -4 / -3, half * 0.5 / 2.5 + half * 1 / -3]
    np.testing.assert_allclose(rp.explain(fn, rules)(x)[0], expected, rtol=1e-9)


def test_parallel_branches_one_flat_one_not():
    w = jnp.array([[2.0], [3.0]])
    x = jnp.array([[1.0, 0.0]])

    def fn(params, x):
        return x @ params["a"] + x @ params["b"]

    params = {"a": w, "b": -w}
    relevance = rp.explain(fn, [(rp.path("a"), rp.Flat()), ("affine", rp.Zero())])(params, x)
    np.testing.assert_allclose(relevance, [[1.0 - 2.0, 1.0]])


def test_several_explained_inputs_of_relative_rules():
    def fn(a, b):
        return a @ W + 2.0 * b @ W

    ra, rb = rp.explain(fn, rp.Flat(), argnums=(0, 1))(X, 0.5 * X)
    np.testing.assert_allclose(ra, rb)
    np.testing.assert_allclose(ra.sum() + rb.sum(), fn(X, 0.5 * X).sum())


def test_grad_vmap_and_checkpoint_of_relative_rules():
    rules = rp.presets.epsilon_plus_flat()
    explain = rp.explain(lambda x: convnet(x[None].repeat(2, 0))[0], rules, target=0)
    one = IMAGE[0]
    batch = jax.vmap(explain)(IMAGE)
    np.testing.assert_allclose(batch[0], explain(one), rtol=1e-9, atol=1e-12)
    score = lambda x: (explain(x) ** 2).sum()  # noqa: E731
    d = jnp.cos(jnp.arange(36.0)).reshape(6, 6, 1)
    step = 1e-5
    expected = (score(one + step * d) - score(one - step * d)) / (2 * step)
    np.testing.assert_allclose((jax.grad(jax.checkpoint(score))(one) * d).sum(), expected, rtol=1e-5)


# New rules.


@dataclasses.dataclass(frozen=True)
class Absolute(rp.Rule):
    """Contributions count by their size: `|x| |W|` in numerator and denominator."""

    def __call__(self, layer, x, z):
        total = layer.with_weights(jnp.abs)(jnp.abs(x))
        return rp.scale_tangent(total, z / rp.stabilize(total))


def test_a_rule_as_a_class_in_coefficient_form():
    expected = [-1 * 3 / 7 + 7 * 1 / 9, -1 * 4 / 7 + 7 * 8 / 9]
    np.testing.assert_allclose(rp.explain(dense, Absolute())(X)[0], expected, rtol=1e-6)
    scaled = rp.explain(lambda x: (x @ W) * jnp.array([[2.0, -3.0]]), Absolute())(X)
    np.testing.assert_allclose(scaled, rp.explain(lambda x: x @ (W * jnp.array([[2.0, -3.0]])), Absolute())(X))


def squared(layer, x, z, R):
    weights = jnp.square(layer.weight)
    shares = jnp.square(x)[:, :, None] * weights[None]
    return jnp.einsum("nij,nj->ni", shares / shares.sum(1, keepdims=True), R)


def test_a_rule_as_a_function_in_relevance_form():
    expected = [-1 * 9 / 25 + 7 * 1 / 65, -1 * 16 / 25 + 7 * 64 / 65]
    np.testing.assert_allclose(rp.explain(dense, squared)(X)[0], expected, rtol=1e-12)
    two_layers = lambda x: jnp.tanh(x @ W) @ W  # noqa: E731
    relevance = rp.explain(two_layers, squared)(X)
    np.testing.assert_allclose(relevance.sum(), two_layers(X).sum(), rtol=1e-12)
    for transformed in (
        jax.jit(rp.explain(two_layers, squared)),
        rp.explain(jax.checkpoint(two_layers), squared),
        jax.jit(rp.explain(jax.jit(jax.checkpoint(two_layers)), squared)),
    ):
        np.testing.assert_allclose(transformed(X), relevance, rtol=1e-12)
    batch = jnp.stack([X, 2 * X])
    np.testing.assert_allclose(jax.vmap(rp.explain(two_layers, squared))(batch)[0], relevance, rtol=1e-12)


def test_grad_through_a_rule_in_relevance_form():
    score = lambda w, x: (rp.explain(lambda x: jnp.tanh(x @ w) @ w, squared)(x) ** 2).sum()  # noqa: E731
    d, step = jnp.array([[0.3, -0.2], [0.1, 0.7]]), 1e-6
    expected = (score(W + step * d, X) - score(W - step * d, X)) / (2 * step)
    np.testing.assert_allclose((jax.grad(score)(W, X) * d).sum(), expected, rtol=1e-5)


def test_a_rule_in_relevance_form_need_not_be_linear():
    keep_positive = lambda layer, x, z, R: jnp.maximum(R, 0.0)  # noqa: E731
    rules = [("activation", keep_positive), ("dense", rp.Zero())]
    fn = lambda x: jnp.tanh(x) @ W  # noqa: E731
    expected = jnp.maximum(rp.explain(fn, rp.Zero())(X), 0.0)
    np.testing.assert_allclose(rp.explain(fn, rules)(X), expected, rtol=1e-12)


def test_presets_hold_what_they_say():
    def kinds(composite):
        return [(str(s), type(r).__name__) for s, r in composite]

    assert kinds(rp.presets.epsilon_plus()) == [("kind('conv')", "ZPlus"), ("kind('affine')", "Epsilon")]
    assert kinds(rp.presets.epsilon_gamma_box(0.0, 1.0))[0] == ("first(kind('conv'))", "ZBox")
    assert kinds(rp.presets.deep_taylor())[0][1] == "WSquare"
    assert kinds(rp.presets.deep_taylor(0.0, 1.0))[0][1] == "ZBox"
    assert kinds(rp.Composite([("add", rp.Norm()), *rp.presets.excitation_backprop()])) == [
        ("kind('add')", "Norm"),
        ("kind('affine')", "ZPlus"),
    ]


def test_deep_taylor_conserves_without_positive_biases():
    relevance = rp.explain(lambda x: convnet(jnp.abs(x)), rp.presets.deep_taylor(0.0, 4.0))(IMAGE)
    total = convnet(jnp.abs(IMAGE)).sum()
    assert (relevance >= -1e-9).all()
    np.testing.assert_allclose(relevance.sum(), total, rtol=1e-3)
