"""Layers are found by dataflow: what is grouped, as which kind, and that the way of writing does not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import relprop as rp

KEYS = jax.random.split(jax.random.key(2), 8)
IMAGE = jax.random.normal(KEYS[0], (2, 6, 5, 3))
KERNEL = jax.random.normal(KEYS[1], (3, 3, 3, 4)) / 3
BIAS = jax.random.normal(KEYS[2], (4,))
MEAN, SCALE, SHIFT = (jax.random.normal(k, (4,)) for k in KEYS[3:6])
VARIANCE = jnp.abs(jax.random.normal(KEYS[6], (4,))) + 0.1
AFFINE_RULES = [
    rp.Zero(),
    rp.Epsilon(0.1),
    rp.Gamma(0.5),
    rp.AlphaBeta(2.0, 1.0),
    rp.ZPlus(),
    rp.WSquare(),
    rp.Flat(),
    rp.ZBox(-4.0, 4.0),
    rp.Epsilon(0.1, bias="ignore"),
    rp.Gamma(0.5, bias="distribute"),
    rp.AlphaBeta(2.0, 1.0, bias="distribute"),
]


def conv(x, kernel=KERNEL):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def row(v, x):
    """`v` along the last axis of `x`."""
    return v.reshape((1,) * (x.ndim - 1) + (-1,))


def batch_norm(x, mean=MEAN, scale=SCALE, shift=SHIFT, variance=VARIANCE):
    y = (x - row(mean, x)) * row(scale / jnp.sqrt(variance + 1e-5), x)
    return y + row(shift, x)


def layers(fn, *args, rules=None):
    return [(e.layer.kind, e.layer.primitive) for e in rp.plan(fn, rules)(*args)]


def assert_same(f, g, x, rule, rtol=1e-9):
    a, b = rp.explain(f, rule)(x), rp.explain(g, rule)(x)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-11)


# Affine chains.

FOLDED = SCALE / jnp.sqrt(VARIANCE + 1e-5)


def conv_then_norm(x):
    return batch_norm(conv(x) + row(BIAS, x))


def conv_with_norm_folded(x):
    return conv(x, KERNEL * row(FOLDED, KERNEL)) + row((BIAS - MEAN) * FOLDED + SHIFT, x)


@pytest.mark.parametrize("rule", AFFINE_RULES, ids=str)
def test_batch_norm_after_a_convolution_equals_its_folding(rule):
    assert layers(conv_then_norm, IMAGE) == [("conv", "conv_general_dilated")]
    assert_same(conv_then_norm, conv_with_norm_folded, IMAGE, rule)


def norm_then_dense(x):
    return batch_norm(x) @ W + row(B, x)


W = jax.random.normal(KEYS[7], (4, 3))
B = jnp.array([0.5, -1.0, 0.2])
VECTORS = jax.random.normal(KEYS[0], (5, 4))


def norm_folded_into_dense(x):
    return x @ (FOLDED[:, None] * W) + row(B + (SHIFT - MEAN * FOLDED) @ W, x)


@pytest.mark.parametrize("rule", AFFINE_RULES, ids=str)
def test_batch_norm_before_a_dense_layer_equals_its_folding(rule):
    assert layers(norm_then_dense, VECTORS) == [("dense", "dot_general")]
    assert_same(norm_then_dense, norm_folded_into_dense, VECTORS, rule)


def test_layer_scale_casts_and_reshapes_belong_to_the_layer():
    def fn(x):
        y = (x.astype(jnp.float32) @ W.astype(jnp.float32)).astype(jnp.float64)
        return y.reshape(5, 3, 1) * B[None, :, None] + 1.5 * B[None, :, None]

    assert layers(fn, VECTORS) == [("dense", "dot_general")]


@pytest.mark.parametrize("mean", [0.3, jnp.array([0.1, 0.2, 0.3]), IMAGE[0] / 9], ids=["scalar", "channel", "pixel"])
@pytest.mark.parametrize("std", [0.5, -2.0, jnp.array([0.5, -0.25, 2.0])], ids=["scalar", "negative", "channel"])
def test_input_normalisation_is_part_of_the_first_layer(mean, std):
    """z^B with raw pixel bounds equals z^B on normalised input with normalised bounds."""

    def spread(v):
        v = jnp.asarray(v)
        return v.reshape((1,) * (4 - v.ndim) + v.shape)

    def raw(x):
        return conv((x - spread(mean)) / spread(std))

    ends = [jnp.broadcast_to((v - spread(mean)) / spread(std), IMAGE[:1].shape) for v in (-4.0, 4.0)]
    low, high = jnp.minimum(*ends), jnp.maximum(*ends)
    normalised = (IMAGE - spread(mean)) / spread(std)
    assert layers(raw, IMAGE) == [("conv", "conv_general_dilated")]
    found = rp.explain(raw, rp.ZBox(-4.0, 4.0))(IMAGE)
    np.testing.assert_allclose(found, rp.explain(conv, rp.ZBox(low, high))(normalised), rtol=1e-9, atol=1e-11)


def test_a_batch_norm_that_stands_alone_is_a_scale_layer():
    def fn(x):
        return jax.nn.relu(batch_norm(jax.nn.relu(x))).max(0)

    assert layers(fn, VECTORS) == [
        ("activation", "max"),
        ("scale", "sub"),
        ("activation", "max"),
        ("max_pool", "reduce_max"),
    ]


def test_pre_activation_residual_blocks():
    def block(x):
        h = jax.nn.relu(batch_norm(conv(x)))
        return jnp.concatenate([x, x[..., :1]], -1) + h

    assert [kind for kind, _ in layers(block, IMAGE)] == ["conv", "activation", "add"]
    x = rp.explain(block, rp.Zero())(IMAGE)
    assert x.shape == IMAGE.shape


def test_a_norm_that_is_read_twice_belongs_to_every_layer_that_reads_it():
    def fn(x):
        h = batch_norm(x)
        return h @ W + jax.nn.relu(h) @ W

    assert [kind for kind, _ in layers(fn, VECTORS)] == ["scale", "dense", "activation", "dense", "add"]

    def shared(x):
        h = batch_norm(x)
        return h @ W + h @ (2.0 * W)

    def twice(x):
        return batch_norm(x) @ W + batch_norm(x) @ (2.0 * W)

    assert [kind for kind, _ in layers(shared, VECTORS)] == ["dense", "dense", "add"]
    for rule in AFFINE_RULES:
        assert_same(shared, twice, VECTORS, rule)


def test_dead_code_auxiliary_outputs_prints_and_masks_change_no_layer():
    def fn(x, read=lambda h, y: y):
        h = x @ W + row(B, x)
        return read(h, jax.nn.relu(h * 2.0 * row(B, h) + row(B, h)) @ W.T)

    def with_callback(h, y):
        jax.debug.callback(lambda v: None, h)
        return y

    def with_dead_code(h, y):
        jnp.linalg.cholesky(h.T @ h)
        return y

    def with_mask(h, y):
        return y * (h.sum(-1, keepdims=True) > -1e9).astype(y.dtype)

    expected = rp.explain(fn, rp.ZPlus())(VECTORS)
    for read in (with_callback, with_dead_code, with_mask):
        np.testing.assert_allclose(rp.explain(lambda x, r=read: fn(x, r), rp.ZPlus())(VECTORS), expected, rtol=1e-9)
    with_aux = rp.explain(lambda x: fn(x, lambda h, y: (y, {"h": h, "name": "aux"})), rp.ZPlus(), has_aux=True)
    relevance, aux = with_aux(VECTORS)
    np.testing.assert_allclose(relevance, expected, rtol=1e-9)
    np.testing.assert_allclose(aux["h"], VECTORS @ W + row(B, VECTORS))
    assert aux["name"] == "aux"


def test_numbers_in_the_code_belong_to_the_activation_and_parameters_to_the_layer():
    def hard_sigmoid(x):
        return jnp.clip((x @ W) + 3.0, 0.0, 6.0) / 6.0 @ W.T

    assert [kind for kind, _ in layers(hard_sigmoid, VECTORS)] == ["dense", "activation", "dense"]
    slope = jax.grad(lambda v: jnp.clip(v + 3.0, 0.0, 6.0) / 6.0)(0.1)
    relevance = rp.explain(lambda x: jnp.clip(x + 3.0, 0.0, 6.0) / 6.0, None)(jnp.array([0.1]))
    np.testing.assert_allclose(relevance, [0.1 * slope], rtol=1e-9)


SPATIAL_CONVS = {
    "1d": ((2, 9, 4), (3, 4, 6), ("NWC", "WIO", "NWC"), {"window_strides": (2,), "padding": "SAME"}),
    "2d grouped": (
        (2, 7, 6, 4),
        (3, 2, 2, 6),
        ("NHWC", "HWIO", "NHWC"),
        {"window_strides": (1, 2), "padding": ((1, 0), (2, 1)), "feature_group_count": 2},
    ),
    "depthwise": (
        (2, 6, 6, 4),
        (3, 3, 1, 8),
        ("NHWC", "HWIO", "NHWC"),
        {"window_strides": (1, 1), "padding": "VALID", "feature_group_count": 4},
    ),
    "channels first, dilated": (
        (2, 4, 8, 8),
        (5, 4, 3, 3),
        ("NCHW", "OIHW", "NCHW"),
        {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)},
    ),
    "transposed": (
        (2, 4, 4, 3),
        (3, 3, 3, 5),
        ("NHWC", "HWIO", "NHWC"),
        {"window_strides": (1, 1), "padding": ((2, 2), (2, 2)), "lhs_dilation": (2, 2)},
    ),
    "3d": (
        (1, 4, 5, 4, 2),
        (2, 3, 2, 2, 3),
        ("NDHWC", "DHWIO", "NDHWC"),
        {"window_strides": (1, 2, 1), "padding": "VALID"},
    ),
}


@pytest.mark.parametrize("name", SPATIAL_CONVS)
def test_every_convolution_hands_on_what_its_rule_says(name):
    """The conserving rules conserve, and a scale after the convolution is folded into it."""
    shape, kernel_shape, numbers, options = SPATIAL_CONVS[name]
    x = jax.random.normal(KEYS[0], shape)
    kernel = jax.random.normal(KEYS[1], kernel_shape)
    features = numbers[1].index("O")
    scale = jnp.linspace(-1.0, 2.0, kernel_shape[features])
    on_kernel = [1] * kernel.ndim
    on_kernel[features] = -1
    on_output = [1] * kernel.ndim
    on_output[numbers[2].index("C")] = -1

    def fn(x, kernel=kernel):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)

    for rule in (rp.ZPlus(), rp.Gamma(0.5), rp.Flat(), rp.WSquare(), rp.ZBox(-4.0, 4.0)):
        scaled = rp.explain(lambda x: fn(x) * scale.reshape(on_output), rule)(x)
        folded = rp.explain(lambda x: fn(x, kernel * scale.reshape(on_kernel)), rule)(x)
        np.testing.assert_allclose(scaled, folded, rtol=1e-9, atol=1e-11)
        if rule == rp.ZPlus():  # an output without positive contributions keeps its relevance
            continue
        covered = (fn(jnp.ones_like(x), jnp.ones_like(kernel)) > 0).astype(x.dtype)  # transposed convolutions leave gaps
        np.testing.assert_allclose(folded.sum(), (fn(x, kernel * scale.reshape(on_kernel)) * covered).sum(), rtol=1e-4)


DOTS = {
    "right": (lambda x, w: x @ w, (5, 4), (4, 3)),
    "left": (lambda x, w: w.T @ x.T, (5, 4), (4, 3)),
    "einsum": (lambda x, w: jnp.einsum("nd,df->nf", x, w), (5, 4), (4, 3)),
    "einsum, heads": (lambda x, w: jnp.einsum("ntd,dhk->nhtk", x, w), (2, 3, 4), (4, 2, 3)),
    "batched": (lambda x, w: jnp.einsum("gnd,gdf->gnf", x, w), (2, 3, 4), (2, 4, 3)),
    "two contracted": (lambda x, w: jnp.einsum("nab,abf->fn", x, w), (3, 2, 4), (2, 4, 3)),
    "vector": (lambda x, w: w.T @ x, (4,), (4, 3)),
}


@pytest.mark.parametrize("name", DOTS)
def test_every_layout_of_a_dense_layer(name):
    fn, x_shape, w_shape = DOTS[name]
    x, w = jax.random.normal(KEYS[2], x_shape), jax.random.normal(KEYS[3], w_shape)
    positive, negative = (lambda v: jnp.maximum(v, 0.0)), (lambda v: jnp.minimum(v, 0.0))
    z = fn(x, w)
    total = fn(positive(x), positive(w)) + fn(negative(x), negative(w))
    _, transpose = jax.vjp(lambda x: fn(positive(x), positive(w)) + fn(negative(x), negative(w)), x)
    expected = x * transpose(z / jnp.where(total == 0, 1.0, total))[0]
    assert layers(lambda x: fn(x, w), x) == [("dense", "dot_general")]
    np.testing.assert_allclose(rp.explain(lambda x: fn(x, w), rp.ZPlus(0.0))(x), expected, rtol=1e-9)


def test_reused_layers_and_parameters():
    def fn(x):
        for _ in range(3):
            x = jnp.tanh(x @ W[:3])
        return x

    relevance = rp.explain(fn, rp.Zero())(jnp.array([[0.1, 0.2, 0.3]]))
    np.testing.assert_allclose(relevance.sum(), fn(jnp.array([[0.1, 0.2, 0.3]])).sum(), rtol=1e-9)


# Activations.

JAX_NN = [
    "relu", "relu6", "sigmoid", "softplus", "sparse_plus", "sparse_sigmoid", "soft_sign", "silu", "log_sigmoid",
    "hard_sigmoid", "hard_swish", "hard_tanh", "hard_silu", "elu", "celu", "selu", "gelu", "leaky_relu", "mish",
    "squareplus", "tanh",
]  # fmt: skip
POINTS = jnp.array([-30.0, -3.0, -0.7, -1e-5, -1e-10, -1e-12, 0.0, 1e-12, 1e-10, 1e-5, 0.5, 2.0, 7.0, 30.0])
BY_HAND = {
    "relu": [lambda x: jnp.where(x > 0, x, 0.0), lambda x: (x + jnp.abs(x)) / 2, lambda x: x * (x > 0).astype(x.dtype)],
    "leaky_relu": [lambda x: jnp.where(x > 0, x, 0.01 * x), lambda x: jnp.maximum(x, 0.01 * x)],
    "silu": [lambda x: x / (1 + jnp.exp(-x)), lambda x: x * 0.5 * (1 + jnp.tanh(x / 2))],
    "softplus": [lambda x: jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))],
    "gelu": [lambda x: 0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)))],
    "elu": [lambda x: jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0.0)) - 1)],
    "mish": [lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(-jnp.abs(x))) + jnp.maximum(x, 0.0))],
    "hard_swish": [lambda x: x * jnp.clip(x + 3, 0, 6) / 6],
    "tanh": [lambda x: 2 / (1 + jnp.exp(-2 * x)) - 1],
}


@pytest.mark.parametrize("name", JAX_NN)
def test_an_activation_of_jax_nn_is_one_layer_that_hands_on_all_but_f_of_0(name):
    f = getattr(jax.nn, name)
    assert [kind for kind, _ in layers(f, POINTS)] == ["activation"]
    expected = f(POINTS) - f(jnp.zeros(()))
    np.testing.assert_allclose(rp.explain(f, None)(POINTS), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("name", "by_hand"), [(n, f) for n, fs in BY_HAND.items() for f in fs])
def test_rewriting_an_activation_by_hand_changes_nothing(name, by_hand):
    def net(f):
        return lambda x: f(x @ W + row(B, x)) @ W.T

    assert [kind for kind, _ in layers(net(by_hand), VECTORS)] == ["dense", "activation", "dense"]
    x = VECTORS.at[0].set(0.0)
    a = rp.explain(net(getattr(jax.nn, name)), rp.Gamma())(x)
    np.testing.assert_allclose(rp.explain(net(by_hand), rp.Gamma())(x), a, rtol=1e-6, atol=1e-12)


def test_activations_with_learned_shapes():
    def prelu(params, x):
        return jnp.where(x > 0, x, params * x)

    def swish(params, x):
        return x * jax.nn.sigmoid(params * x)

    def dyt(params, x):
        return params * jnp.tanh(0.5 * x) + params

    alpha = jnp.full_like(VECTORS, 0.3)
    for fn, absorbed in ((prelu, 0.0), (swish, 0.0), (dyt, alpha)):
        relevance = rp.explain(fn, None)(alpha, VECTORS)
        np.testing.assert_allclose(relevance, fn(alpha, VECTORS) - absorbed, rtol=1e-9)


ALPHA = jnp.array([0.1, -0.2, 0.3, 2.0, 0.5])
RAYS = {
    "relu": jax.nn.relu,
    "leaky relu": jax.nn.leaky_relu,
    "leaky relu with learned slopes": lambda x: jnp.where(x > 0, x, ALPHA * x),
    "absolute value": jnp.abs,
    "by the sign": lambda x: jnp.sign(x) * jnp.maximum(x, -2 * x) / 3,
    "a product with a step": lambda x: 2 * x * (x >= 0).astype(x.dtype),
    "a half": lambda x: (x + jnp.abs(x)).astype(jnp.float32).astype(x.dtype) / 2,
}
NO_RAYS = {
    "relu6": jax.nn.relu6,
    "a step that is not at 0": lambda x: jnp.where(x > 1, x, 0 * x),
    "a distance": lambda x: jnp.maximum(x, ALPHA),
    "rounding": lambda x: x.astype(jnp.int32).astype(x.dtype) + x,
    "the sign of what is rounded": lambda x: x * (x.astype(jnp.int32) != 1).astype(x.dtype),
    "a square": lambda x: x * jnp.abs(x),
}


@pytest.mark.parametrize("name", RAYS | NO_RAYS)
def test_an_activation_that_is_linear_along_rays_hands_on_its_value_as_any_other(name):
    f = (RAYS | NO_RAYS)[name]
    x = jnp.array([-3.0, -0.4, 0.0, 0.7, 1.2])
    (layer,) = (entry.layer for entry in rp.plan(f, None)(x) if entry.layer.kind == "activation")
    assert layer.homogeneous == (name in RAYS)
    relevance = rp.explain(f, None)(x)
    np.testing.assert_allclose(relevance, f(x) - f(jnp.zeros_like(x)), rtol=1e-6, atol=1e-12)


def test_an_activation_of_two_values_is_refused():
    with pytest.raises(rp.UnknownPrimitiveError, match=r"atan2.*test_layers.py.*nonlinear in 2.*register.*fallback"):
        rp.explain(lambda a, b: jnp.arctan2(a, b), None, argnums=(0, 1))(VECTORS, VECTORS + 1)


# Pools, merges, products.

MAP = jnp.abs(IMAGE)


def pool(x, init, op, stride=2):
    return lax.reduce_window(x, init, op, (1, 2, 2, 1), (1, stride, stride, 1), "SAME")


def test_max_pooling_winner_takes_all():
    x = jnp.array([1.0, 3.0, 2.0, 5.0]).reshape(1, 2, 2, 1)
    relevance = rp.explain(lambda x: pool(x, -jnp.inf, lax.max), None)(x)
    np.testing.assert_allclose(relevance.ravel(), [0.0, 0.0, 0.0, 5.0])


def test_max_pooling_in_proportion():
    x = jnp.array([1.0, 3.0, 2.0, 4.0]).reshape(1, 2, 2, 1)
    rules = {"max_pool": rp.ProportionalPool(0.0)}
    for fn in (lambda x: pool(x, -jnp.inf, lax.max), lambda x: x.max((1, 2))):
        np.testing.assert_allclose(rp.explain(fn, rules)(x).ravel(), [0.4, 1.2, 0.8, 1.6])
        np.testing.assert_allclose(jax.jit(rp.explain(fn, rules))(x).ravel(), [0.4, 1.2, 0.8, 1.6])


def test_average_and_sum_pooling_hand_on_in_proportion():
    for fn in (lambda x: pool(x, 0.0, lax.add) / 4, lambda x: x.mean((1, 2)), lambda x: x.sum((1, 2))):
        assert layers(fn, IMAGE) == [("sum_pool", layers(fn, IMAGE)[0][1])]
        np.testing.assert_allclose(rp.explain(fn, None)(IMAGE).sum(), fn(IMAGE).sum(), rtol=1e-10)


@pytest.mark.parametrize("p", [2, 3.0])
def test_lp_pooling_shares_by_powers(p):
    def fn(x):
        return pool(x**p, 0.0, lax.add) ** (1 / p)

    relevance = rp.explain(fn, None)(MAP)
    np.testing.assert_allclose(relevance.sum(), fn(MAP).sum(), rtol=1e-9)
    block = MAP[0, :2, :2, 0]
    np.testing.assert_allclose(relevance[0, :2, :2, 0], block**p / (block**p).sum() ** (1 - 1 / p), rtol=1e-9)


def test_concatenation_padding_slicing_and_gathering_move_relevance():
    def fn(x):
        y = jnp.concatenate([x, 2.0 * x], -1)
        y = jnp.pad(y, ((0, 0), (1, 1)))[:, ::-1]
        return jnp.take(y, jnp.array([0, 2, 2, 5]), axis=1)

    relevance = rp.explain(fn, None)(VECTORS)
    np.testing.assert_allclose(relevance.sum(), fn(VECTORS).sum(), rtol=1e-10)


def test_products_share_evenly_however_they_are_associated():
    a, b, c = (jax.random.normal(k, (3,)) for k in KEYS[:3])
    forms = (
        lambda a, b, c: (a * b) * c,
        lambda a, b, c: a * (b * c),
        lambda a, b, c: b * (c * a),
        lambda a, b, c: -(a * b * 2.0) * c * -0.5,
        lambda a, b, c: ((a * b).reshape(3, 1) * c.reshape(3, 1)).reshape(3),
    )
    for fn in forms:
        for relevance in rp.explain(fn, None, argnums=(0, 1, 2))(a, b, c):
            np.testing.assert_allclose(relevance, a * b * c / 3, rtol=1e-10)


def test_powers_in_a_product_count_as_often_as_they_are_factors():
    a, b = (jax.random.normal(k, (3,)) for k in KEYS[:2])
    forms = (lambda a, b: a * a * b, lambda a, b: a * b * a, lambda a, b: a**2 * b, lambda a, b: jnp.square(a) * b)
    for fn in forms:
        ra, rb = rp.explain(fn, None, argnums=(0, 1))(a, b)
        np.testing.assert_allclose(ra, 2 / 3 * a * a * b, rtol=1e-10)
        np.testing.assert_allclose(rb, 1 / 3 * a * a * b, rtol=1e-10)
    cubic = rp.explain(lambda a, b: a * a * a * b, None, argnums=(0, 1))(a, b)
    np.testing.assert_allclose(cubic[0], 3 / 4 * a**3 * b, rtol=1e-10)


def test_products_over_an_axis():
    x = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    np.testing.assert_allclose(rp.explain(lambda x: x.prod(1), None)(x), jnp.tile(x.prod(1)[:, None] / 3, (1, 3)))
    np.testing.assert_allclose(rp.explain(lambda x: jnp.cumprod(x, 1), None)(x).sum(), jnp.cumprod(x, 1).sum())


def test_a_matrix_product_of_two_explained_arrays_shares_evenly():
    a, b = jax.random.normal(KEYS[0], (3, 4)), jax.random.normal(KEYS[1], (4, 2))
    ra, rb = rp.explain(lambda a, b: a @ b, None, argnums=(0, 1))(a, b)
    np.testing.assert_allclose(ra.sum(), (a @ b).sum() / 2)
    np.testing.assert_allclose(rb.sum(), (a @ b).sum() / 2)


def test_layer_norm_holds_its_statistic_and_keeps_its_mean():
    gamma, beta = jnp.array([1.0, 2.0, 0.5, -1.0]), jnp.zeros(4)

    def norm(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * row(gamma, x) + row(beta, x)

    deviation = jnp.sqrt(((VECTORS - VECTORS.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + 1e-6)
    c = row(gamma, VECTORS) / deviation
    expected = VECTORS * (c - c.mean(-1, keepdims=True))
    np.testing.assert_allclose(rp.explain(norm, None)(VECTORS), expected, rtol=1e-9, atol=1e-12)


def test_softmax_is_its_vjp():
    x = VECTORS
    s = jax.nn.softmax(x)
    expected = x * (s - s * (s * 1.0).sum(-1, keepdims=True))
    np.testing.assert_allclose(rp.explain(jax.nn.softmax, None)(x), expected, atol=1e-12)
    by_hand = lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)  # noqa: E731
    picked = rp.explain(by_hand, None, target=1)(x)
    np.testing.assert_allclose(picked, rp.explain(jax.nn.softmax, None, target=1)(x), atol=1e-12)
    assert [kind for kind, _ in layers(by_hand, x)] == ["softmax"]


@pytest.mark.parametrize("rule", AFFINE_RULES, ids=str)
def test_a_factor_that_differs_between_examples_belongs_to_the_layer(rule):
    """Rows of a batch scaled by factors of both signs: each row as if its factor were in the weight."""
    factors = jnp.array([2.0, -1.0, 0.5, -3.0, 1.0])

    def fn(x):
        return (x @ W) * factors[:, None] + row(B, x)

    assert layers(fn, VECTORS) == [("dense", "dot_general")]
    relevance = rp.explain(fn, rule)(VECTORS)
    for i, factor in enumerate(factors):
        one = VECTORS[i : i + 1]
        expected = rp.explain(lambda x, q=factor: x @ (q * W) + row(B, x), rule)(one)
        np.testing.assert_allclose(relevance[i : i + 1], expected, rtol=1e-9, atol=1e-11)


def test_unused_outputs_of_a_body_cut_no_layer_and_deep_networks_are_planned():
    def body(x):
        h = x @ W
        return h, h * 2.0 * row(B, h) + row(B, h), jnp.linalg.cholesky(h.T @ h + jnp.eye(3))

    plain = rp.explain(lambda x: body(x)[1] @ W.T, rp.ZPlus())(VECTORS)
    np.testing.assert_allclose(rp.explain(lambda x: jax.checkpoint(body)(x)[1] @ W.T, rp.ZPlus())(VECTORS), plain)

    def deep(p, x):
        for _ in range(300):
            x = jax.nn.relu((x @ p - row(p[0], x)) * row(p[1], x))
        return jax.checkpoint(lambda x: x @ p)(x)

    assert len(rp.plan(deep, rp.Epsilon())(jnp.eye(4), VECTORS)) == 601


def test_relative_space_honours_the_rule_of_an_activation():
    """Flat above softplus: f(0) is absorbed; above relu: dead units hand on what they get."""
    w = jnp.ones((4, 1))
    soft = rp.explain(lambda x: jax.nn.softplus(x) @ w, rp.Flat())(VECTORS[:1])
    z = jax.nn.softplus(VECTORS[:1])
    np.testing.assert_allclose(soft, z.sum() / 4 * (z - jnp.log(2.0)) / z, rtol=1e-9)
    hard = rp.explain(lambda x: jax.nn.relu(x) @ w, rp.Flat())(VECTORS[:1])
    np.testing.assert_allclose(hard, jnp.full((1, 4), jax.nn.relu(VECTORS[:1]).sum() / 4), rtol=1e-9)
    with pytest.raises(rp.RuleError, match=r"GuidedBackprop.*modifies the gradient.*Flat"):
        rp.explain(lambda x: jax.nn.relu(x) @ w, [("dense", rp.Flat()), ("activation", rp.GuidedBackprop())])(VECTORS)
