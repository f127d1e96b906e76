"""Relevances that RelevancePropagation.jl and iNNvestigate store in their own tests: see golden/README.md.

Both computed in float32, relprop computes in float64; the difference is to be float32's.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import relprop as rp

GOLDEN = pathlib.Path(__file__).parent / "golden"


def load(name):
    """All arrays of a file, in float64."""
    with np.load(GOLDEN / name) as stored:
        return {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in stored.items()}


def assert_close(relevance, expected):
    np.testing.assert_allclose(relevance, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def on_layers(rule):
    """The rule on affine layers and, where it is made for them, on factors that stand alone."""
    kinds = ("affine", "scale") if isinstance(rule, rp.Zero | rp.Epsilon) else ("affine",)
    return [(rp.optional(kind), rule) for kind in kinds]


def pool(x, initial, combine, window):
    return lax.reduce_window(x, initial, combine, window, window, "VALID")


# RelevancePropagation.jl. The relevance of the output is the output. Its layers are NCHW, as Flux has them.

JULIA = load("julia_rules.npz")


def julia_dense(params, x):
    return x @ params["dense.W"].T + params["dense.b"][None]


def julia_dense_identity(params, x):
    """`Matrix(I, 3, 4)` and no bias: the fourth input is read, with weight 0."""
    return x @ jnp.eye(4, 3)


def julia_scale(params, x):
    return x * params["scale.w"][None] + params["scale.b"][None]


def julia_scale_identity(params, x):
    return x * jnp.ones((1, 4))


def julia_conv(params, x):
    y = lax.conv(x, params["conv.W_oihw_crosscorr"], (1, 1), "VALID")
    return y + params["conv.b"][None, :, None, None]


def rectified(layer):
    return lambda params, x: nn.relu(layer(params, x))


JULIA_LAYERS = {
    "Dense_identity": ("dense.x", julia_dense_identity),
    "Dense_relu": ("dense.x", rectified(julia_dense)),
    "Scale_identity": ("scale.x", julia_scale_identity),
    "Scale_relu": ("scale.x", rectified(julia_scale)),
    "Conv": ("conv.x_nchw", julia_conv),
    "Conv_relu": ("conv.x_nchw", rectified(julia_conv)),
    "MaxPool": ("conv.x_nchw", lambda _, x: pool(x, -jnp.inf, lax.max, (1, 1, 3, 3))),
    "MeanPool": ("conv.x_nchw", lambda _, x: pool(x, 0.0, lax.add, (1, 1, 3, 3)) / 9),
    "GlobalMaxPool": ("conv.x_nchw", lambda _, x: x.max((2, 3))),
    "GlobalMeanPool": ("conv.x_nchw", lambda _, x: x.mean((2, 3))),
    "flatten": ("conv.x_nchw", lambda _, x: x.reshape(2, -1)),
    "Dropout": ("conv.x_nchw", lambda _, x: x),  # as it is at inference
}
# The stabiliser is 1e-9 wherever the rule has none of its own.
JULIA_RULES = {
    "ZeroRule": on_layers(rp.Zero()),
    "EpsilonRule": [*on_layers(rp.Epsilon(1e-6)), (rp.optional("sum_pool"), rp.Norm(1e-6))],
    "AlphaBetaRule": on_layers(rp.AlphaBeta(2.0, 1.0, epsilon=1e-9)),
    "ZPlusRule": on_layers(rp.ZPlus(epsilon=1e-9)),
    "GeneralizedGammaRule": on_layers(rp.Gamma(0.25, epsilon=1e-9)),
    "ZBoxRule": on_layers(rp.ZBox(0.0, 1.0, epsilon=1e-9)),
    "WSquareRule": on_layers(rp.WSquare()),
    "FlatRule": on_layers(rp.Flat()),
}
JULIA_LEFT_OUT = {
    # Gamma without the branch for negative outputs: another rule, for x >= 0 only; these inputs are signed.
    "GammaRule": "*",
    # A rule for layer norms, stored for other layers only, where it is ZeroRule.
    "LayerNormRule": "*",
    # Its stabiliser also shrinks the winner's share. relprop's winner takes all, as it does in ZeroRule.
    "EpsilonRule": ("MaxPool", "GlobalMaxPool"),
    # For a factor that stands alone relprop has Zero and Epsilon: with a single contribution per output,
    # other rules have nothing to weigh up but the bias.
    **dict.fromkeys(("AlphaBetaRule", "ZPlusRule", "GeneralizedGammaRule"), ("Scale_identity", "Scale_relu")),
    **dict.fromkeys(("FlatRule", "WSquareRule"), ("Scale_relu",)),
    # The convolution is compared where float32 allows it, by the test below.
    "ZBoxRule": ("Scale_relu", "Conv"),
}


def julia_cases():
    for name in JULIA:
        kind, *rest = name.split(".")
        if kind == "R":
            rule, layer = rest
            left_out = JULIA_LEFT_OUT.get(rule, ())
            if left_out != "*" and layer not in left_out:
                yield rule, layer


@functools.cache
def julia_relevances(layer):
    """The relevance by every rule, compiled at once."""
    x, function = JULIA_LAYERS[layer]
    params = {name: array for name, array in JULIA.items() if not name.startswith("R.")}
    rules = [rule for rule, stored in julia_cases() if stored == layer] + ["ZBoxRule"] * (layer == "Conv")
    explain = jax.jit(lambda params, x: {r: rp.explain(function, JULIA_RULES[r])(params, x) for r in rules})
    return explain(params, JULIA[x])


@pytest.mark.parametrize(("rule", "layer"), list(julia_cases()))
def test_relevance_propagation_jl(rule, layer):
    assert_close(julia_relevances(layer)[rule], JULIA[f"R.{rule}.{layer}"])


def test_relevance_propagation_jl_where_float32_suffices():
    """In z^B of the convolution some denominators cancel, as the inputs are not between the bounds.

    The worst is 0.030 where its terms add up to 20.1; what is stored differs by 1.7e-5 at the inputs of that
    output. Compared are inputs that take no part in a denominator more than 50 times less than its terms.
    """
    kernel, x = JULIA["conv.W_oihw_crosscorr"], JULIA["conv.x_nchw"]

    def conv(kernel, x):
        return lax.conv(x, kernel, (1, 1), "VALID")

    below, ones = np.minimum(kernel, 0), np.ones_like(x)
    denominators = conv(kernel, x) - conv(below, ones)
    terms = conv(abs(kernel), abs(x)) - conv(below, ones)
    _, reads = jax.vjp(lambda x: conv(jnp.ones_like(kernel), x), x)
    safe = np.where(reads(jnp.where(terms > 50 * abs(denominators), 1.0, 0.0))[0] == 0, 1.0, 0.0)
    assert safe.mean() > 0.5
    assert_close(julia_relevances("Conv")["ZBoxRule"] * safe, JULIA["R.ZBoxRule.Conv"] * safe)


# iNNvestigate. The largest output of an example is explained; the inputs are not negative, the biases 0.

INNVESTIGATE = load("innvestigate_layers.npz")
X = INNVESTIGATE["input"]


def innvestigate_conv(kernel, x):
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


INNVESTIGATE_LAYERS = {
    "Dense": lambda kernel, x: x @ kernel,
    "Dense_relu": lambda kernel, x: nn.relu(x @ kernel),
    "Conv2D": innvestigate_conv,
    "Conv2D_relu": rectified(innvestigate_conv),
    "AveragePooling2D": lambda _, x: pool(x, 0.0, lax.add, (1, 2, 2, 1)) / 4,
    "MaxPooling2D": lambda _, x: pool(x, -jnp.inf, lax.max, (1, 2, 2, 1)),
}
# Its alpha-beta rules divide without a stabiliser, except by an exact 0: some denominators here are 1e-3.
UNSTABILISED = 1e-15
INNVESTIGATE_RULES = {
    "InputTimesGradient": on_layers(rp.Zero()),
    "LRPZ": on_layers(rp.Zero()),
    "LRPZIgnoreBias": on_layers(rp.Zero(bias="ignore")),
    "LRPZ_Flat_input_layer_rule": on_layers(rp.Flat()),
    "LRPZ_boxed_input_layer_rule": on_layers(rp.ZBox(-10.0, 10.0, epsilon=UNSTABILISED)),
    "LRPEpsilon": on_layers(rp.Epsilon(1e-7)),
    "LRPEpsilonIgnoreBias": on_layers(rp.Epsilon(1e-7, bias="ignore")),
    "LRPZPlus": on_layers(rp.ZPlus(epsilon=UNSTABILISED)),
    "LRPZPlusFast": on_layers(rp.ZPlus(epsilon=UNSTABILISED, bias="ignore")),
    "LRPAlpha1Beta0": on_layers(rp.AlphaBeta(1.0, 0.0, epsilon=UNSTABILISED)),
    "LRPAlpha1Beta0IgnoreBias": on_layers(rp.AlphaBeta(1.0, 0.0, epsilon=UNSTABILISED, bias="ignore")),
    "LRPAlpha2Beta1": on_layers(rp.AlphaBeta(2.0, 1.0, epsilon=UNSTABILISED)),
    "LRPAlpha2Beta1IgnoreBias": on_layers(rp.AlphaBeta(2.0, 1.0, epsilon=UNSTABILISED, bias="ignore")),
    "LRPFlat": on_layers(rp.Flat()),
    "LRPWSquare": on_layers(rp.WSquare()),
    "DeepTaylor": on_layers(rp.ZPlus(epsilon=UNSTABILISED, bias="ignore")),
    "BoundedDeepTaylor": on_layers(rp.ZBox(-128.0, 128.0, epsilon=UNSTABILISED)),
    # Like relprop's presets, but for the 0.1.
    "LRPSequentialPresetA": [
        (rp.optional("conv"), rp.ZPlus(epsilon=UNSTABILISED)),
        (rp.optional("dense"), rp.Epsilon(0.1)),
    ],
    "LRPSequentialPresetB": [
        (rp.optional("conv"), rp.AlphaBeta(2.0, 1.0, epsilon=UNSTABILISED)),
        (rp.optional("dense"), rp.Epsilon(0.1)),
    ],
    "LRPSequentialPresetAFlat": rp.presets.epsilon_plus_flat(),
    "LRPSequentialPresetBFlat": rp.presets.epsilon_alpha2_beta1_flat(),
}
INNVESTIGATE_LEFT_OUT = {
    # R / 4 to every input of a window, whatever its value: the gradient. Deep Taylor decomposition hands
    # it on in proportion to the values (Montavon et al. 2017), as do relprop and the LRP analysers here.
    ("DeepTaylor", "AveragePooling2D"),
    ("BoundedDeepTaylor", "AveragePooling2D"),
}


def innvestigate_stored(analyzer, layer):
    row = list(INNVESTIGATE["analyzers"]).index(analyzer)
    kernels = INNVESTIGATE.get(f"{layer}/weights")
    return None if kernels is None else kernels[row], INNVESTIGATE[f"{layer}/attribution"][row]


def flattened(layer):
    function = INNVESTIGATE_LAYERS[layer]
    return lambda kernel, x: function(kernel, x).reshape(x.shape[0], -1)


@functools.cache
def innvestigate_relevances(layer):
    """The relevance by every analyser, compiled at once."""
    function = flattened(layer)
    kernels = {analyzer: innvestigate_stored(analyzer, layer)[0] for analyzer in INNVESTIGATE_RULES}
    explain = jax.jit(
        lambda kernels, x: {
            analyzer: rp.explain(function, rules, target="top")(kernels[analyzer], x)
            for analyzer, rules in INNVESTIGATE_RULES.items()
        }
    )
    return explain(kernels, X)


@pytest.mark.parametrize("layer", INNVESTIGATE_LAYERS)
@pytest.mark.parametrize("analyzer", INNVESTIGATE_RULES)
def test_innvestigate(analyzer, layer):
    if (analyzer, layer) in INNVESTIGATE_LEFT_OUT:
        pytest.skip("iNNvestigate's deep Taylor passes the gradient through average pooling")
    assert_close(innvestigate_relevances(layer)[analyzer], innvestigate_stored(analyzer, layer)[1])


# The gradients among its analysers. relprop's relevance is the input (nowhere 0) times what they return.
# All but Gradient start from the value of the output instead of 1.

INNVESTIGATE_GRADIENTS = {
    "Gradient": ("activation", rp.Gradient()),
    "GuidedBackprop": ("activation", rp.GuidedBackprop()),
    "Deconvnet": ("activation", rp.Deconvnet()),
}


@pytest.mark.parametrize("layer", INNVESTIGATE_LAYERS)
@pytest.mark.parametrize("analyzer", INNVESTIGATE_GRADIENTS)
def test_innvestigate_gradients(analyzer, layer):
    kernel, attribution = innvestigate_stored(analyzer, layer)
    function = flattened(layer)
    selector, rule = INNVESTIGATE_GRADIENTS[analyzer]
    relevance = rp.explain(function, [(rp.optional(selector), rule)], target="top")(kernel, X)
    if analyzer != "Gradient":
        relevance = relevance * function(kernel, X).max(1).reshape(-1, 1, 1, 1)
    assert_close(relevance, X * attribution)
