"""Half precision: ratios in float32 for bfloat16 functions, and products of the pass backwards in bfloat16 for float32 ones.

With `backward_dtype` a product rounds the coefficients that reach it, the weights, and the coefficients that it gives, each
by at most `u` of itself, the unit roundoff; values and denominators are those of the function. So where nothing cancels (z+,
a positive output) relevance is within `3 L u` after L products, element by element.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from jax import lax

import relprop as rp

U = float(jnp.finfo(jnp.bfloat16).eps) / 2
RANDOM = np.random.default_rng(0)
LAYERS = 3  # of `conv_1d`
WEIGHTS = jnp.asarray(RANDOM.normal(size=(3, 8, 8)) / np.sqrt(8))
ROWS = jnp.asarray(RANDOM.normal(size=(4, 8)))


def single(tree, dtype=jnp.float32):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


CONV = networks.init("conv_1d"), networks.sample("conv_1d")


def explain_conv(rules, **options):
    return jax.jit(rp.explain(networks.conv_1d, rules, target=2, **options))


def in_loop(weights, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def unrolled(weights, x):
    for w in weights:
        x = jnp.tanh(x @ w)
    return x


def distance(found, exact):
    found, exact = (np.asarray(v, np.float64).ravel() for v in (found, exact))
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def products(lowered):
    """How many convolutions and dots there are before XLA changes them, by the dtype of their operands."""
    operands = r"\(tensor<[^>]*x([a-z]+\d+)>, tensor<[^>]*x([a-z]+\d+)>\)"
    kinds = re.findall(rf"stablehlo\.(?:dot_general|convolution).* : {operands}", lowered.as_text())
    assert all(left == right for left, right in kinds)
    return collections.Counter(left for left, _ in kinds)


def compiled_products(lowered):
    return len(re.findall(r" = \S+ (?:convolution|dot)\(", lowered.compile().as_text()))


# A float32 function with the products of the pass backwards in bfloat16.


@pytest.mark.parametrize(
    ("rules", "forwards", "backwards"),
    [
        (rp.Epsilon(), 3, 3),
        (rp.presets.epsilon_alpha2_beta1(), 5, 5),  # 2 for the input of both signs, 2, and 1 with Epsilon
    ],
)
def test_products_forwards_stay_and_those_backwards_are_narrow(rules, forwards, backwards):
    plain, narrow = (explain_conv(rules, backward_dtype=d).lower(*single(CONV)) for d in (None, jnp.bfloat16))
    assert products(plain) == {"f32": forwards + backwards}
    assert products(narrow) == {"f32": forwards, "bf16": backwards}
    assert compiled_products(narrow) == compiled_products(plain)


def test_without_cancellation_every_element_is_within_three_roundings_for_each_product():
    params, x = CONV
    params = params | {"dense": jax.tree.map(jnp.abs, params["dense"])}  # a positive output, so coefficients are, too
    exact = explain_conv(rp.ZPlus())(params, x)
    found = explain_conv(rp.ZPlus(), backward_dtype=jnp.bfloat16)(*single((params, x)))
    assert found.dtype == jnp.float32
    error = jnp.abs(found.astype(jnp.float64) - exact)
    assert (error <= ((1 + U) ** (3 * LAYERS) - 1) * jnp.abs(exact) + 1e-6 * jnp.abs(exact).max()).all()
    assert (error > U / 4 * jnp.abs(exact)).any()  # it is not float32


@pytest.mark.parametrize(
    "rules",
    [
        rp.Epsilon(),
        rp.presets.epsilon_alpha2_beta1(),
        rp.presets.epsilon_gamma_box(*networks.bounds("conv_1d")),
    ],
    ids=["Epsilon", "epsilon_alpha2_beta1", "epsilon_gamma_box"],
)
def test_signed_rules_are_within_the_same_in_the_norm(rules):
    found = explain_conv(rules, backward_dtype=jnp.bfloat16)(*single(CONV))
    exact = explain_conv(rules)(*CONV)
    assert distance(found, exact) < 3 * LAYERS * U
    assert distance(explain_conv(rules)(*single(CONV)), exact) < 1e-5


@networks.requires("resnet20/weights.npz")
@pytest.mark.slow
def test_a_trained_residual_network_is_within_a_percent():
    params, (images, labels) = networks.load_resnet(), networks.cifar10(np.arange(4))
    rules = rp.presets.epsilon_alpha2_beta1()
    explain = jax.jit(rp.explain(networks.resnet, rules, target=jnp.asarray(labels)))
    narrow = jax.jit(rp.explain(networks.resnet, rules, target=jnp.asarray(labels), backward_dtype=jnp.bfloat16))
    assert distance(narrow(*single((params, images))), explain(params, images)) < 0.01


def test_the_value_is_that_of_the_function():
    value, _ = jax.jit(rp.value_and_explain(unrolled, rp.AlphaBeta(), backward_dtype=jnp.bfloat16))(*single((WEIGHTS, ROWS)))
    np.testing.assert_allclose(value, unrolled(WEIGHTS, ROWS), rtol=1e-5, atol=1e-6)


def test_products_in_loops_and_of_two_live_values_are_narrow():
    narrow = jax.jit(rp.explain(in_loop, rp.Epsilon(), backward_dtype=jnp.bfloat16))
    assert products(narrow.lower(*single((WEIGHTS, ROWS)))) == {"f32": 1, "bf16": 1}
    bilinear = jax.jit(rp.explain(lambda x: x @ x.T, rp.presets.attn_lrp(), backward_dtype=jnp.bfloat16))
    assert products(bilinear.lower(single(ROWS))) == {"bf16": 2}  # the output itself is not asked for
    found = narrow(*single((WEIGHTS, ROWS)))
    exact = jax.jit(rp.explain(unrolled, rp.Epsilon()))(WEIGHTS, ROWS)
    assert U / 4 < distance(found, exact) < 3 * 3 * U


def test_many_targets_are_those_of_a_loop():
    weights, x = single((WEIGHTS[:2], ROWS))
    explain = functools.partial(rp.explain, unrolled, rp.Epsilon(), backward_dtype=jnp.bfloat16)
    every = jax.jit(lambda w, x: jax.vmap(lambda t: explain(target=t)(w, x))(jnp.arange(8)))(weights, x)
    chunks = jax.jit(rp.explain_targets(unrolled, rp.Epsilon(), batch_size=4, backward_dtype=jnp.bfloat16))(weights, x)
    one = jax.jit(explain(target=3))(weights, x)
    # What is summed in another order may be rounded to the neighbour, in each of two products.
    np.testing.assert_allclose(every[3], one, rtol=4 * U, atol=4 * U * float(jnp.abs(one).max()))
    np.testing.assert_allclose(chunks, every, rtol=4 * U, atol=4 * U * float(jnp.abs(every).max()))


def test_derivatives_of_the_explanation_are_right_within_the_rounding():
    def loss(dtype, weights, x):
        return (rp.explain(unrolled, rp.Gamma(), target=2, backward_dtype=dtype)(weights, x) ** 2).sum()

    exact = jax.jit(jax.grad(functools.partial(loss, None)))(WEIGHTS, ROWS)
    found = jax.jit(jax.grad(functools.partial(loss, jnp.bfloat16)))(*single((WEIGHTS, ROWS)))
    # Three products on the way forwards and three backwards, each of which is differentiated.
    assert distance(found, exact) < 3 * 6 * 2 * U


def test_float64_functions_may_have_a_backward_pass_in_float32():
    found = jax.jit(rp.explain(unrolled, rp.Epsilon(), backward_dtype=jnp.float32))(WEIGHTS, ROWS)
    exact = jax.jit(rp.explain(unrolled, rp.Epsilon()))(WEIGHTS, ROWS)
    assert found.dtype == jnp.float64
    assert 1e-10 < distance(found, exact) < 3 * 3 * 2.0**-24


def test_what_is_no_wider_stays_as_it_is():
    weights, x = single((WEIGHTS, ROWS), jnp.bfloat16)
    programs = [jax.make_jaxpr(rp.explain(unrolled, rp.Gamma(), backward_dtype=d))(weights, x) for d in (None, jnp.bfloat16)]
    assert str(programs[0]) == str(programs[1])


def test_a_dtype_that_cannot_carry_relevance_is_refused():
    with pytest.raises(rp.ArgumentError, match=r"backward_dtype.*floating-point.*got .*int8"):
        rp.explain(unrolled, rp.Epsilon(), backward_dtype=jnp.int8)(WEIGHTS, ROWS)


def test_the_audit_shows_what_the_rounding_loses():
    args = single((jnp.abs(WEIGHTS), jnp.abs(ROWS)))  # nothing cancels
    audits = [jax.jit(rp.audit(unrolled, rp.Epsilon(), target=2, backward_dtype=d))(*args) for d in (None, jnp.bfloat16)]
    lost = [max(abs(float(line.lost)) for line in audit.lines) / float(audit.output) for audit in audits]
    assert lost[0] < 1e-5 < lost[1] < 3 * U


# A bfloat16 function.


def equations(jaxpr):
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


def network(params, x):
    """Of every kind of layer that divides in its rules, and none that divides itself."""
    x = x + jnp.tanh(x @ params[0] + params[0][:1])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME")
    return jnp.tanh(x @ params[1]).sum(-1)


AFFINE = [rp.Epsilon(), rp.Gamma(), rp.AlphaBeta(), rp.ZPlus(), rp.Pass(), rp.Flat(), rp.WSquare(), rp.ZBox(-4.0, 4.0)]
OTHERS = [("add", rp.Norm()), ("max_pool", rp.ProportionalPool()), ("sum_pool", rp.Norm())]


@pytest.mark.parametrize("rule", [*AFFINE, rp.Epsilon(bias="distribute")], ids=lambda rule: type(rule).__name__)
def test_every_denominator_of_a_rule_is_float32(rule):
    weights, x = single((WEIGHTS, ROWS), jnp.bfloat16)
    rules = [(rp.first("dense"), rule), *OTHERS, ("affine", rp.Epsilon())]
    program = jax.make_jaxpr(rp.explain(network, rules))(weights, x)
    divisions = [eqn for eqn in equations(program) if eqn.primitive.name == "div"]
    by_numbers = [eqn for eqn in divisions if isinstance(eqn.invars[1], jax.extend.core.Literal)]  # x / 2: exact
    dtypes = {eqn.outvars[0].aval.dtype for eqn in divisions if eqn not in by_numbers}
    assert dtypes == {jnp.dtype("float32")}


def normalised(params, x):
    x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 0.1)
    return jax.nn.softmax(x @ params[0], axis=-1) @ params[1]


@pytest.mark.parametrize("rules", [rp.presets.attn_lrp(), rp.presets.cp_lrp()], ids=["attn_lrp", "cp_lrp"])
def test_norms_and_softmax_of_a_bfloat16_function_are_right_within_its_rounding(rules):
    half = single((WEIGHTS, ROWS), jnp.bfloat16)
    explain = jax.jit(rp.explain(normalised, rules, target=2))
    found, exact = explain(*half).astype(jnp.float64), explain(*single(half, jnp.float64))
    # Of the 14 operations forwards and as many backwards each rounds once.
    assert distance(found, exact) < 28 * U
