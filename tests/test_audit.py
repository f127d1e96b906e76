"""Where relevance goes: every line of an audit by hand, and that no relevance is created or lost unseen."""

import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from loops import stacked

import relprop as rp

QUICK = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
KEYS = jax.random.split(jax.random.key(4), 6)


def compiled(fn):
    return jax.jit(fn, compiler_options=QUICK)


def quick_audit(fn, rules, **options):
    """As `rp.audit`, in one program: operation by operation, every one of them is compiled."""
    return compiled(rp.audit(fn, rules, **options))


def line(audit, kind, number=0):
    """The line of the `number`-th layer of a kind."""
    return [line for line in audit if line.kind == kind][number]


def assert_line(found, out, into, rtol=1e-12, **absorbed):
    """What reaches a layer, what it hands on, and all that it keeps, by cause; `f0` stands for f(0)."""
    expected = dict.fromkeys(found.absorbed, 0.0) | {cause.replace("f0", "f(0)"): v for cause, v in absorbed.items()}
    np.testing.assert_allclose([found.relevance_out, found.relevance_in], [out, into], rtol=rtol, atol=1e-14)
    for cause, value in expected.items():
        np.testing.assert_allclose(found.absorbed[cause], value, rtol=rtol, atol=1e-14, err_msg=cause)


# Lines by hand.

W, X = jnp.array([[1.0], [2.0]]), jnp.array([1.0, 2.0])  # x W = 5


def dense(params, x):
    return (x @ params["w"] + params["b"])[0]


WITH_BIAS = {"w": W, "b": jnp.array([4.0])}  # x W + b = 9


def test_a_dense_layer_shares_among_inputs_bias_and_stabiliser():
    audit = quick_audit(dense, rp.Epsilon(1.0))(WITH_BIAS, X)
    # The relevance 9 is shared over x W + b + epsilon = 5 + 4 + 1.
    assert_line(line(audit, "dense"), 9.0, 9 * 5 / 10, bias=9 * 4 / 10, epsilon=9 * 1 / 10)
    np.testing.assert_allclose(audit.output, 9.0)
    np.testing.assert_allclose(audit.inputs["x"], 4.5)
    np.testing.assert_allclose(audit.absorbed["bias"], 3.6)
    np.testing.assert_allclose(line(audit, "dense").lost, 4.5)
    np.testing.assert_allclose(line(audit, "dense").largest, 2 * 9 / 10)  # of the coefficients 0.9 and 1.8


def test_a_negative_bias_gives_relevance():
    audit = quick_audit(dense, rp.Zero())(WITH_BIAS | {"b": jnp.array([-3.0])}, X)
    assert_line(line(audit, "dense"), 2.0, 5.0, bias=-3.0)


def test_a_bias_that_is_ignored_or_distributed_keeps_nothing():
    for rule in (rp.Epsilon(1.0, bias="ignore"), rp.Zero(bias="ignore"), rp.Zero(bias="distribute")):
        audit = quick_audit(dense, rule)(WITH_BIAS, X)
        epsilon = 9 * 1 / 6 if getattr(rule, "epsilon", 0) else 0.0  # over x W + epsilon = 5 + 1
        assert_line(line(audit, "dense"), 9.0, 9 - epsilon, epsilon=epsilon)


def test_gamma_counts_a_positive_bias_more_often():
    audit = quick_audit(dense, rp.Gamma(1.0, epsilon=0.0))(WITH_BIAS | {"w": jnp.array([[1.0], [-1.0]])}, X)
    # z = 1 - 2 + 4 = 3; with positive parts twice 2 - 2 + 8 = 8.
    assert_line(line(audit, "dense"), 3.0, 0.0, bias=3.0)


def test_alpha_beta_has_nothing_for_beta_where_nothing_is_negative():
    audit = quick_audit(dense, rp.AlphaBeta(2.0, 1.0, epsilon=0.0))({"w": W, "b": jnp.zeros(1)}, X)
    assert_line(line(audit, "dense"), 5.0, 10.0, rule=-5.0)
    audit = quick_audit(dense, rp.AlphaBeta(2.0, 1.0, epsilon=0.0))(WITH_BIAS, X)
    assert_line(line(audit, "dense"), 9.0, 10.0, bias=8.0, rule=-9.0)  # 18 over 5 + 4, and nothing takes the -9


def test_stabilisers_of_rules_that_do_not_read_the_input():
    w, x = jnp.array([3.0, -1.0]), jnp.array([1.0, 0.5])  # x w = 2.5

    def of(rule):
        return line(quick_audit(lambda x: x @ w, rule)(x), "dense")

    assert_line(of(rp.ZBox(0.0, 1.0, epsilon=1.0)), 2.5, 2.5 * 3.5 / 4.5, epsilon=2.5 / 4.5)  # x w - 1 * w- = 3.5
    assert_line(of(rp.WSquare(2.0)), 2.5, 2.5 * 10 / 12, epsilon=2.5 * 2 / 12)  # w^2 sums to 10
    assert_line(of(rp.Flat()), 2.5, 2.5)


def test_stabilisers_of_sums_and_pools():
    def summed(x, y):
        return jnp.sum(x + y)

    rules = [("add", rp.Norm(1.0)), ("sum_pool", rp.Norm(3.0))]
    audit = quick_audit(summed, rules, argnums=(0, 1))(jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0]))
    assert_line(line(audit, "sum_pool"), 12.0, 12 * 12 / 15, epsilon=12 * 3 / 15)
    # Of 9.6, a third reaches 1 + 3 and two thirds reach 2 + 6.
    assert_line(line(audit, "add"), 9.6, 3.2 * 4 / 5 + 6.4 * 8 / 9, epsilon=3.2 / 5 + 6.4 / 9)
    audit = quick_audit(jnp.max, {"max_pool": rp.ProportionalPool(1.0)})(jnp.array([1.0, 3.0]))
    assert_line(line(audit, "max_pool"), 3.0, 3 * 4 / 5, epsilon=3 / 5)


def test_an_activation_that_is_not_zero_at_zero_keeps_its_value_there():
    audit = quick_audit(lambda params, x: jax.nn.softplus(dense(params, x)), rp.Zero())(WITH_BIAS, X)
    y = np.log1p(np.exp(9.0))
    assert_line(line(audit, "activation"), y, y - np.log(2), f0=np.log(2))
    assert_line(line(audit, "dense"), y - np.log(2), (y - np.log(2)) * 5 / 9, bias=(y - np.log(2)) * 4 / 9)


def test_the_defect_of_a_softmax():
    x = np.log([1.0, 2.0, 5.0])  # the softmax is 1/8, 2/8, 5/8
    audit = quick_audit(jax.nn.softmax, None, target=0)(jnp.asarray(x))
    mean = 2 / 8 * np.log(2) + 5 / 8 * np.log(5)
    assert_line(line(audit, "softmax"), 1 / 8, 1 / 8 * (0 - mean), softmax=1 / 8 * (1 + mean))


def test_what_stands_beside_an_explained_value_is_frozen():
    def fn(x):
        return jnp.concatenate([x, jnp.array([3.0, -1.0])]) @ jnp.array([1.0, 2.0, 4.0, 5.0])

    audit = quick_audit(fn, None)(X)
    assert_line(line(audit, "concatenate"), 12.0, 5.0, frozen=7.0)  # 1 + 4, and 12 - 5
    assert_line(line(audit, "dense"), 12.0, 12.0)


def test_a_derivative_in_place_of_a_rule():
    def fn(x):
        return lax.cumlogsumexp(x)[-1]

    x = jnp.log(jnp.array([1.0, 3.0, 4.0]))
    expected = 3 / 8 * np.log(3) + 4 / 8 * np.log(4)
    audit = quick_audit(fn, None, fallback="gradient")(x)
    assert_line(line(audit, "cumlogsumexp"), np.log(8), expected, fallback=np.log(8) - expected)


def test_what_a_rule_does_not_hand_on():
    def fn(params, x):
        return jnp.square(dense(params, x))

    audit = quick_audit(fn, [("activation", rp.Stop())])(WITH_BIAS, X)
    assert_line(line(audit, "activation"), 81.0, 0.0, rule=81.0)
    assert_line(line(audit, "dense"), 0.0, 0.0)
    audit = quick_audit(fn, [("activation", rp.Gradient())])(WITH_BIAS, X)
    assert_line(line(audit, "activation"), 81.0, 162.0, rule=-81.0)  # f'(x) x = 2 x^2


def test_a_relevance_function_keeps_what_it_does_not_return():
    audit = quick_audit(dense, lambda layer, x, z, R: jnp.ones_like(x) * R / 4)(WITH_BIAS, X)
    assert_line(line(audit, "dense"), 9.0, 4.5, rule=4.5)


def test_an_input_normalisation_is_a_bias_of_the_layer():
    mean, std = jnp.array([1.0, 2.0]), jnp.array([2.0, 4.0])

    def fn(w, x):
        x = (x - mean.reshape(1, 1, 1, 2)) / std.reshape(1, 1, 1, 2)
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    w, x = jnp.array([4.0, -8.0]).reshape(1, 1, 2, 1), jnp.array([3.0, 7.0]).reshape(1, 1, 1, 2)
    audit = quick_audit(fn, rp.Zero())(w, x)
    # w (x - mean) / std = 4 - 10, where the raw pixels are 6 - 14 and the means -2 + 4.
    assert_line(line(audit, "conv"), -6.0, -8.0, bias=2.0)


def test_below_a_rule_that_does_not_read_the_input():
    lower, bias, upper = jnp.array([[1.0, 3.0], [1.0, -2.0]]), jnp.array([1.0, 2.0]), jnp.array([[2.0], [5.0]])

    def fn(params, x):
        return (jax.nn.relu(x @ params["lower"] + params["bias"]) @ params["upper"])[0]

    params = {"lower": lower, "bias": bias, "upper": upper}
    audit = quick_audit(fn, [(rp.path("upper"), rp.Flat()), ("dense", rp.Epsilon(1.0))])(params, X)
    # Preactivations 3 + 1 and -1 + 2, output 13, half of it to either, whatever their weight.
    assert_line(line(audit, "dense", 1), 13.0, 13.0)
    assert_line(line(audit, "activation"), 13.0, 13.0)
    expected = {"bias": 6.5 * (1 / 5 + 2 / 2), "epsilon": 6.5 * (1 / 5 + 1 / 2)}
    assert_line(line(audit, "dense"), 13.0, 6.5 * (3 / 5 - 1 / 2), **expected)


def test_conditions_keep_what_they_leave_out():
    def fn(params, x):
        return (x @ params["up"]) @ params["down"]

    params = {"up": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "down": jnp.array([1.0, 1.0])}
    masked = rp.condition(rp.path("up"), jnp.array([0.0, 1.0]))
    audit = quick_audit(fn, None, conditions=masked)(params, X)
    assert_line(line(audit, "dense", 0), 5.0, 4.0, condition=1.0)  # channels 1 and 4
    begun = rp.start(rp.path("up"), jnp.array([0.0, 3.0]))
    audit = quick_audit(fn, None, conditions=[masked, begun])(params, X)
    assert_line(line(audit, "dense", 0), 12.0, 12.0)
    assert_line(line(audit, "dense", 1), 0.0, 0.0)
    np.testing.assert_allclose(audit.output, 12.0)  # of what is explained, and that is where relevance starts


def test_what_goes_past_an_exclusive_condition_is_kept_where_the_branches_meet():
    def fn(params, x):
        return jnp.sum(x @ params + x)

    w = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    audit = quick_audit(fn, None, conditions=rp.condition("dense", jnp.array([1.0, 0.0]), exclusive=True))(w, X)
    assert_line(line(audit, "add"), 8.0, 5.0, condition=3.0)
    assert_line(line(audit, "dense"), 5.0, 1.0, condition=4.0)


# Everything sums to the output.

COMPOSITES = {
    "zero": rp.Zero(),
    "epsilon": rp.Epsilon(0.1),
    "gamma": rp.Gamma(),
    "alphabeta": rp.AlphaBeta(),
    "ignoring biases": rp.ZPlus(bias="ignore"),
    "distributing biases": rp.Epsilon(0.1, bias="distribute"),
    "not reading the input": [
        (rp.first("affine"), rp.WSquare(0.01)),
        (rp.last("affine"), rp.Flat()),
        ("affine", rp.Gamma()),
    ],
    "norm at sums": [
        ("affine", rp.Gamma()),
        (rp.optional("add"), rp.Norm(0.1)),
        (rp.optional("sum_pool"), rp.Norm(0.1)),
    ],
    "residual gamma": [("affine", rp.Epsilon()), (rp.optional("add"), rp.ResidualGamma())],
    "proportional pooling": [("affine", rp.ZPlus()), (rp.optional("max_pool"), rp.ProportionalPool())],
    "gradient": [(rp.where(lambda layer: True, "all"), rp.Gradient())],
}


def audits(network, composites, *args, **options):
    """The audits under each of `composites`, in one program."""

    def all_of_them(*args):
        return {name: rp.audit(network, COMPOSITES[name], target="top", **options)(*args) for name in composites}

    return compiled(all_of_them)(*args)


def assert_closes(audit, rtol, message=""):
    """Of the audit and of every line."""
    scale = rtol * max(abs(float(audit.output)), *(abs(float(line.relevance_out)) for line in audit))
    arrives, kept = sum(audit.inputs.values()), sum(line.lost for line in audit)
    np.testing.assert_allclose(arrives + kept, audit.output, rtol=0, atol=scale, err_msg=message)
    np.testing.assert_allclose(audit.unaccounted, 0, atol=scale, err_msg=message)
    for line in audit:
        np.testing.assert_allclose(
            line.relevance_in + line.lost, line.relevance_out, rtol=0, atol=scale, err_msg=f"{message}: {line.name}"
        )


QUICKLY = {
    "dense_tanh": [
        "zero",
        "epsilon",
        "gamma",
        "ignoring biases",
        "distributing biases",
        "not reading the input",
        "gradient",
    ],
    "conv_mixed_2d": ["alphabeta", "not reading the input"],
    "vgg_max": ["proportional pooling"],
    "vgg_avg": ["norm at sums"],
}


@pytest.mark.parametrize("name", QUICKLY)
@pytest.mark.parametrize("composites", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_networks_close(name, composites):
    composites = COMPOSITES if composites == "all" else QUICKLY[name]
    for composite, audit in audits(networks.NETWORKS[name], composites, networks.init(name), networks.sample(name)).items():
        assert_closes(audit, 1e-12, composite)
        causes = {cause for cause, total in audit.absorbed.items() if abs(total) > 1e-10}
        if composite in ("zero", "epsilon", "gamma", "norm at sums"):
            assert causes == {"bias"} if composite == "zero" else {"bias", "epsilon"}, composite
        if composite.endswith("biases"):
            assert "bias" not in causes, composite


@networks.requires("resnet20/weights.npz")
@networks.requires("cifar10/cifar10_test_jpeg_2000.npz")
def test_resnet20_closes_and_keeps_nothing_but_in_affine_layers():
    params, (x, _) = networks.load_resnet(), networks.cifar10(slice(0, 2))
    for composite, audit in audits(networks.resnet20, ["residual gamma"], params, x).items():
        assert_closes(audit, 1e-10, composite)
        for line in audit:
            if line.kind not in ("conv", "dense"):
                np.testing.assert_allclose(line.lost, 0.0, atol=1e-9 * abs(float(line.relevance_out)) + 1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)])
def test_narrow_dtypes_close_within_their_rounding(dtype, rtol):
    params, x = jax.tree.map(lambda a: a.astype(dtype), (networks.init("dense_tanh"), networks.sample("dense_tanh")))
    (audit,) = audits(networks.dense_tanh, ["gamma"], params, x).values()
    assert_closes(audit, rtol)
    assert all(v.dtype == jnp.float64 for v in jax.tree.leaves(audit))  # sums are not narrow


def test_biases_receive_what_the_bias_column_says():
    """The relevance of a bias parameter, when it is asked for, is what its layer keeps for it, layer by layer."""
    network, params, x = networks.conv_1d, networks.init("conv_1d"), networks.sample("conv_1d")
    asked = audits(network, ["zero", "epsilon"], params, x, argnums=(0, 1))
    alone = audits(network, ["zero", "epsilon"], params, x)
    for composite, audit in asked.items():
        explain = rp.explain(network, COMPOSITES[composite], target="top", argnums=(0, 1))
        for_params, for_x = compiled(explain)(params, x)
        for line in audit:
            if line.kind in ("conv", "dense"):
                layer = line.address.removesuffix("/kernel")
                np.testing.assert_allclose(line.absorbed["bias"], for_params[layer]["bias"].sum(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(audit.inputs["x"], for_x.sum(), rtol=1e-12)
        biases = sum(relevance["bias"].sum() for relevance in for_params.values())
        np.testing.assert_allclose(audit.absorbed["bias"], biases, rtol=1e-10)
        np.testing.assert_allclose(for_x.sum() + biases + audit.absorbed["epsilon"], audit.output, rtol=1e-10)
        assert audit.parameters["conv1/bias"] == pytest.approx(float(for_params["conv1"]["bias"].sum()), rel=1e-10)
        # Asking for parameters changes nothing on the way to the input.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), audit.lines, alone[composite].lines
        )
        assert alone[composite].parameters == {}


# Transformations.

LOOP = (jax.random.normal(KEYS[0], (3, 4, 4)), jax.random.normal(KEYS[1], (3, 4)))
BATCH = jax.random.normal(KEYS[2], (2, 4))
RULES = [("affine", rp.Gamma(0.5, epsilon=0.1)), (rp.optional("add"), rp.Norm(0.1))]
# Coefficients above the middle layer, relatives below it.
RELATIVE = [(rp.last("dense"), rp.Epsilon(0.1)), (rp.first("dense"), rp.Epsilon(0.1)), ("dense", rp.Flat())]


LAYERS = {
    "first": jnp.array([[1.0, 2.0], [0.5, -1.0]]),
    "second": jnp.array([[1.0, 0.5], [-1.0, 2.0]]),
    "third": jnp.ones(2),
}


def small(params, x):
    x = jnp.tanh(x @ params["first"])
    return jnp.tanh(x @ params["second"]) @ params["third"]


def block(w, b, x):
    return jax.nn.softplus(x @ w + b.reshape((1,) * (x.ndim - 1) + (-1,)))


unrolled, scanned, nested = stacked(block)


def assert_same(found, expected, rtol=1e-12):
    """To within `rtol` of the largest number."""
    scale = max(np.abs(v).max(initial=0) for v in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale), found, expected)


def totals(audit):
    """What does not depend on how a function is written."""
    return audit.output, audit.inputs, audit.absorbed


def test_jit_changes_nothing():
    eager = rp.audit(small, LOSSY)(LAYERS, X)
    assert_same(jax.jit(rp.audit(small, LOSSY))(LAYERS, X), eager)
    assert_same(totals(jax.jit(jax.jit(rp.audit(jax.jit(small), LOSSY)))(LAYERS, X)), totals(eager))


def test_a_batch_is_a_loop_over_examples():
    def of(batch, target=1, **options):
        return rp.audit(unrolled, RULES, target=target, **options)(LOOP, batch)

    @compiled
    def found(batch):
        looped = jax.tree.map(lambda *values: jnp.stack(values), *(of(x) for x in batch))
        options = [jax.vmap(of)(batch), of(batch, batched=True), of(batch, jnp.array([1, 1]), batched=True)]
        return looped, options, of(batch)

    looped, options, whole = found(BATCH)
    for option in options:
        assert_same(option, looped)
    assert_same(totals(whole), jax.tree.map(lambda v: v.sum(0), totals(looped)))


def test_a_batch_prints_means_and_its_worst_example():
    def fn(w, x):
        return x @ w + 3.0

    audit = quick_audit(fn, rp.Epsilon(0.0), batched=True)(jnp.array([1.0]), jnp.array([[1.0], [7.0]]))
    assert audit.output.tolist() == [4.0, 10.0]
    assert audit.absorbed["bias"].tolist() == [3.0, 3.0]
    audit = quick_audit(fn, rp.Epsilon(2.0), batched=True)(jnp.array([1.0]), jnp.array([[1.0], [7.0]]))
    assert re.search(r"relevance of the output +7 +\(means over 2 examples; ", repr(audit))
    (row,) = (row for row in repr(audit).splitlines() if "dense" in row)
    # Of 4, 1/6 of it goes to x; of 10, 7/12.
    assert f"{(4 / 6 + 70 / 12) / 2:.4g}" in row
    assert f"{50 / 12:.4g} [1]" in row


def test_a_batch_must_have_one_length():
    for x in (jnp.float64(1.0), (jnp.ones((2, 3)), jnp.ones((3, 3)))):
        with pytest.raises(rp.ArgumentError, match="one leading axis of one length"):
            rp.audit(lambda x: jax.tree.map(jnp.sum, x), None, batched=True)(x)


@pytest.mark.parametrize("rules", [RULES, rp.Flat()], ids=["coefficients", "relative"])
def test_a_loop_is_its_steps(rules):
    @compiled
    def found(batch):
        ways = [(scanned, True), (scanned, False), (unrolled, False)]
        return [rp.audit(fn, rules, target=1, by_step=by_step)(LOOP, batch) for fn, by_step in ways]

    by_step, summed, reference = found(BATCH)
    assert_same(totals(by_step), totals(reference))
    assert_same(totals(summed), totals(reference))
    for kind in ("dense", "activation"):
        (found,) = [line for line in by_step if line.kind == kind]
        (total,) = [line for line in summed if line.kind == kind]
        expected = [line for line in reference if line.kind == kind]
        assert found.steps == (3,)
        assert total.steps == ()
        numbers = [(line.relevance_out, line.relevance_in, line.absorbed, line.largest) for line in expected]
        stacked = jax.tree.map(lambda *v: jnp.stack(v), *numbers)
        assert_same((found.relevance_out, found.relevance_in, found.absorbed, found.largest), stacked)
        assert_same(found.summed(), total)
        np.testing.assert_allclose(total.largest, max(line.largest for line in expected))


def test_nested_loops_have_an_axis_each():
    def written_out(params, x):
        return unrolled(params, unrolled(params, x))

    @compiled
    def all_ways(batch):
        options = [(nested, {}), (written_out, {}), (nested, {"batched": True})]
        return [rp.audit(fn, RULES, by_step=True, **more)(LOOP, batch) for fn, more in options]

    audited, reference, batched = all_ways(BATCH)
    assert_same(totals(audited), totals(reference))
    (found,) = [line for line in audited if line.kind == "dense"]
    assert found.steps == found.relevance_out.shape == (2, 3)
    expected = [line.relevance_out for line in reference if line.kind == "dense"]
    np.testing.assert_allclose(found.relevance_out.ravel(), expected, rtol=1e-12)
    assert line(batched, "dense").relevance_out.shape == (2, 2, 3)
    np.testing.assert_allclose(line(batched, "dense").relevance_out.sum(0), found.relevance_out, rtol=1e-10)


def as_cond(params, x):
    return lax.cond(x.sum() < 1e9, unrolled, lambda params, x: jnp.tanh(x), params, x)


def test_calls_change_nothing():
    fns = unrolled, jax.checkpoint(unrolled), as_cond
    expected, *found = compiled(lambda x: [rp.audit(f, RELATIVE, target=1)(LOOP, x) for f in fns])(BATCH)
    for audit in found:
        assert_same(totals(audit), totals(expected))


def test_a_branch_that_is_not_taken_has_lines_of_zeros():
    lines = compiled(rp.audit(as_cond, RULES))(LOOP, BATCH).lines
    idle = [line for line in lines if float(line.relevance_out) == 0]
    assert len(idle) == 1
    assert not any(np.any(v) for v in jax.tree.leaves(idle))


@pytest.mark.parametrize("devices", [1, 2])
def test_shard_map_adds_up_what_devices_measure(devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    specs = (PartitionSpec(), PartitionSpec("data"))
    fn = jax.shard_map(unrolled, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"))
    found, expected = compiled(lambda x: [rp.audit(f, RELATIVE, target=1)(LOOP, x) for f in (fn, unrolled)])(BATCH)
    assert_same(found.absorbed, expected.absorbed)
    for one, other in zip(found, expected, strict=True):
        assert_same(
            [one.relevance_out, one.relevance_in, one.largest], [other.relevance_out, other.relevance_in, other.largest]
        )


def test_tokens_are_inputs():
    def fn(params, tokens):
        return (params["rows"][tokens] + params["positions"]).sum()

    params = {"rows": jnp.array([[1.0, 2.0], [5.0, 7.0]]), "positions": jnp.array([[10.0, 20.0], [30.0, 40.0]])}
    audit = quick_audit(fn, None)(params, jnp.array([1, 0]))
    np.testing.assert_allclose(audit.inputs["tokens"], 15.0)
    np.testing.assert_allclose(audit.absorbed["bias"], 100.0)
    np.testing.assert_allclose(audit.unaccounted, 0.0)


def test_derivatives_of_an_audit_are_those_of_its_numbers():
    def lost(w):
        return rp.audit(unrolled, RULES, target=1)((w, LOOP[1]), BATCH).absorbed["bias"]

    direction = jax.random.normal(KEYS[3], LOOP[0].shape)

    @compiled
    def found(w, d):
        slope = (lost(w + 1e-6 * d) - lost(w - 1e-6 * d)) / 2e-6
        return slope, jnp.vdot(jax.grad(lost)(w), d), jax.jvp(lost, (w,), (d,))[1]

    slope, backward, forward = found(LOOP[0], direction)
    np.testing.assert_allclose([backward, forward], slope, rtol=1e-6)


def test_an_empty_batch_loses_nothing():
    audit = compiled(rp.audit(unrolled, RULES, target=1))(LOOP, BATCH[:0])
    assert not any(np.any(v) for v in jax.tree.leaves(audit))
    audit.check(0.0)
    batched = compiled(rp.audit(unrolled, RULES, target=1, batched=True))(LOOP, BATCH[:0])
    batched.check(0.0)
    assert batched.rows() == []
    assert "0 examples" in repr(batched)


def test_all_of_a_black_input_is_kept_by_biases():
    audit = quick_audit(dense, rp.Zero())(WITH_BIAS, jnp.zeros(2))
    assert_line(line(audit, "dense"), 4.0, 0.0, bias=4.0)


def test_an_infinite_mask_has_no_relevance():
    def attention(x):
        past = jnp.tril(jnp.ones((4, 4), bool))
        weights = jax.nn.softmax(x @ x.T + jnp.where(past, 0.0, -jnp.inf))
        return weights @ x

    audit = compiled(rp.audit(attention, None))(jax.random.normal(KEYS[4], (4, 3)))
    assert_closes(audit, 1e-12)
    audit.check(10.0)


# Checks.

LOSSY = [(rp.path("second"), rp.Epsilon(10.0)), ("dense", rp.Epsilon(0.0, bias="ignore"))]


def lossy(**options):
    return rp.audit(small, LOSSY, **options)(LAYERS, X)


def test_strict_names_the_lossy_layer_its_cause_and_what_to_do():
    with pytest.raises(rp.RelevanceLossError) as error:
        lossy(strict=True)
    message = str(error.value)
    assert re.search(r"dense second at .*test_audit\.py:\d+ \(small\) under Epsilon\(epsilon=10\.0\)", message)
    assert re.search(r"keeps \d+\.\d% of the output's relevance, more than 1\.0%: .*epsilon -?\d", message)
    assert "use a smaller epsilon" in message


def test_strict_is_content_within_its_tolerance():
    audit = lossy()
    share = abs(float(line(audit, "dense", 1).lost / audit.output))
    with pytest.raises(rp.RelevanceLossError):
        lossy(strict=True, tolerance=share * 0.99)
    assert_same(lossy(strict=True, tolerance=share * 1.01), audit)
    audit.check(share * 1.01)
    audit.check(1e-9, ignore=("epsilon", "bias"))
    with pytest.raises(rp.ArgumentError, match=r"ignore=\('biases',\): causes are bias, epsilon, f\(0\)"):
        audit.check(ignore=("biases",))


def test_strict_counts_causes_that_cancel():
    """A layer whose bias gives what its stabiliser takes does not conserve relevance."""
    with pytest.raises(rp.RelevanceLossError, match=r"keeps 40\.0%.*bias -0\.8, epsilon 0\.8"):
        rp.audit(lambda x: (x * 5.0 - 1.0) @ jnp.ones(1), rp.Epsilon(1.0), strict=True)(jnp.array([1.0]))


def test_strict_finds_the_worst_example_and_step():
    x = jnp.array([[1.0], [7.0]])
    with pytest.raises(rp.RelevanceLossError, match=r"keeps 75\.0% of the output's relevance \(index 0\).* bias 3"):
        rp.audit(lambda x: x @ jnp.ones(1) + 3.0, rp.Zero(), strict=True, batched=True)(x)
    params = (jnp.ones((3, 1, 1)), jnp.array([[0.0], [9.0], [0.0]]))
    with pytest.raises(rp.RelevanceLossError, match=r"keeps 90\.0% of the output's relevance \(index 1\).* bias 9"):
        rp.audit(
            lambda p, x: lax.scan(lambda x, wb: (x @ wb[0] + wb[1], None), x, p)[0], rp.Zero(), strict=True, by_step=True
        )(params, jnp.array([1.0]))


def test_strict_names_a_layer_that_stops():
    rules = [(rp.first("activation"), rp.Stop()), ("dense", rp.Zero())]
    with pytest.raises(rp.RelevanceLossError, match=r"activation at .*test_audit\.py:\d+ .*under Stop\(\).*choose another"):
        rp.audit(small, rules, strict=True)(LAYERS, X)


def test_values_are_not_known_under_transformations():
    audited = rp.audit(unrolled, RULES, strict=True)
    for transformed in (jax.jit(audited), jax.vmap(audited, (None, 0))):
        with pytest.raises(rp.ArgumentError, match=r"without strict=True, and call `check\(\)`"):
            transformed(LOOP, BATCH)
    # Also where what is traced is closed over, and where the audit is looked at inside of a transformation.
    looks = {
        "strict": lambda params: rp.audit(lambda x: unrolled(params, x), RULES, strict=True)(BATCH),
        "check": lambda params: rp.audit(unrolled, RULES)(params, BATCH).check(),
        "rows": lambda params: rp.audit(unrolled, RULES)(params, BATCH).rows(),
    }
    for look in looks.values():
        with pytest.raises(rp.ArgumentError, match="values"):
            jax.jit(look)(LOOP)


def test_the_first_layer_on_the_way_that_is_not_finite_is_named():
    rules = [(rp.path("second"), lambda layer, x, z, R: jnp.full_like(x, jnp.nan)), ("dense", rp.Zero())]
    audit = quick_audit(small, rules)(LAYERS, X)
    with pytest.raises(rp.RelevanceLossError, match=r"dense second at .*not finite \(2 elements\)"):
        audit.check(1e9)
    assert [int(line.non_finite) > 0 for line in audit] == [True, True, True, False, False]
    rows = repr(audit).splitlines()
    assert "nan" in repr(audit)
    assert any("second" in row and " 2 " in row for row in rows)


def test_a_function_that_is_not_finite_itself_is_said_to_be():
    audit = quick_audit(small, rp.Zero())(LAYERS, jnp.array([jnp.nan, 1.0]))
    with pytest.raises(rp.RelevanceLossError, match=r"output .*not finite"):
        audit.check()
    assert "kept: fallback" not in repr(audit)  # nothing here falls back


# Forms.


def test_an_audit_is_a_pytree():
    audit = lossy()
    leaves, form = jax.tree.flatten(audit)
    assert_same(jax.tree.unflatten(form, leaves), audit)
    doubled = jax.tree.map(lambda v: 2 * v, audit)
    assert [line.address for line in doubled] == [line.address for line in audit]
    np.testing.assert_allclose(doubled.absorbed["epsilon"], 2 * audit.absorbed["epsilon"])
    assert len(audit) == len(audit.lines) == 5


def test_rows_are_numbers_and_strings():
    rows = lossy().rows()
    assert [row["address"] for row in rows] == ["first", "-", "second", "-", "third"]
    assert all(type(value) in (int, float, str) for row in rows for value in row.values())
    row = rows[2]
    assert row["out"] == pytest.approx(row["in"] + row["lost"])
    assert row["rule"] == "Epsilon(epsilon=10.0)"
    batched = compiled(rp.audit(scanned, rp.Zero(), batched=True, by_step=True))(LOOP, BATCH).rows()
    dense = [(row["example"], row["step"]) for row in batched if row["kind"] == "dense"]
    assert dense == [(example, step) for example in range(2) for step in range(3)]


def test_to_frame():
    pytest.importorskip("pandas")
    audit = lossy()
    frame = audit.to_frame()
    assert frame.set_index("address").loc["second", "kept: epsilon"] == float(line(audit, "dense", 1).absorbed["epsilon"])
    assert len(frame) == len(audit)


def test_the_table_is_sorted_by_what_is_lost():
    audit = lossy()
    text = repr(audit)
    assert re.search(rf"relevance of the output +{float(audit.output):.5g}\n", text)
    assert re.search(rf"  arrives at x +{float(audit.inputs['x']):.5g}\n", text)
    assert re.search(rf"  kept: epsilon +{float(audit.absorbed['epsilon']):.5g}\n", text)
    assert "kept: softmax" not in text
    header, _, first, *_ = text.split("\n\n")[1].splitlines()
    assert re.split(r"\s{2,}", header)[1:7] == ["address", "kind", "rule", "out", "in", "lost"]
    assert first.split()[1] == "second"


def test_what_keeps_nothing_but_rounding_follows_in_order_of_execution():
    rules = [(rp.path("second"), rp.Epsilon(10.0)), ("dense", rp.Zero())]
    table = repr(quick_audit(small, rules)(LAYERS, X)).split("\n\n")[1].splitlines()[2:]
    assert [row.split()[0] for row in table] == ["2", "0", "1", "3", "4"]


def test_a_traced_audit_says_so():
    seen = []
    jax.make_jaxpr(lambda x: seen.append(repr(rp.audit(unrolled, RULES)(LOOP, x))))(BATCH)
    assert seen == ["Audit of 6 lines, traced: its numbers are known once the function has run."]
    shapes = jax.eval_shape(rp.audit(unrolled, RULES), LOOP, BATCH)
    assert repr(shapes).startswith("Audit of 6 lines")
