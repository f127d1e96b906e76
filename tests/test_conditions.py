"""Conditions on the way of relevance: masks add up, compose, and share the pass forward; starts explain the lower half."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from loops import stacked

import relprop as rp

KEYS = jax.random.split(jax.random.key(7), 8)
QUICK = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}


def compiled(fn):
    return jax.jit(fn, compiler_options=QUICK)


def assert_equal(found, expected, rtol=1e-10):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max(initial=0))


# A convolutional network with a residual block, under rules with and without a relative part.

CHANNELS = 3
PARAMS = {
    "stem": jax.random.normal(KEYS[0], (3, 3, 2, CHANNELS)) / 3,
    "branch": jax.random.normal(KEYS[1], (3, 3, CHANNELS, CHANNELS)) / 3,
    "bias": jnp.array([0.3, -0.2, 0.1]),
    "head": jax.random.normal(KEYS[2], (CHANNELS, 4)),
}
X = jax.random.normal(KEYS[3], (2, 5, 5, 2))


def convolve(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def lower(params, x):
    return jax.nn.relu(convolve(x, params["stem"]))


def upper(params, h):
    h = h + jax.nn.relu(convolve(h, params["branch"]) + params["bias"].reshape(1, 1, 1, CHANNELS))
    return h.mean((1, 2)) @ params["head"]


def network(params, x):
    return upper(params, lower(params, x))


RULES = [("conv", rp.Gamma(0.5, epsilon=0.01)), ("dense", rp.Epsilon(0.1)), (rp.optional("add"), rp.ResidualGamma())]
RELATIVE = [(rp.path("head"), rp.Flat()), (rp.path("stem"), rp.WSquare()), *RULES]
of_rules = pytest.mark.parametrize("rules", [RULES, RELATIVE], ids=["coefficients", "relative"])
STEM, BRANCH, HEAD = rp.path("stem"), rp.path("branch"), rp.path("head")


def explain(*conditions, rules=RULES, fn=network, target=1, params=PARAMS, x=X):
    return rp.explain(fn, rules, target=target, conditions=conditions)(params, x)


def every_channel(selector, size=CHANNELS, **options):
    """The relevance through each channel alone."""
    return jax.vmap(lambda mask: explain(rp.condition(selector, mask), **options))(jnp.eye(size))


@of_rules
def test_channels_add_up_to_the_whole(rules):
    found = compiled(lambda x: (every_channel(STEM, rules=rules, x=x), explain(rules=rules, x=x)))
    channels, whole = found(X)
    assert_equal(channels.sum(0), whole)
    assert np.abs(channels).min(0).max() > 1e-3  # and each of them has a part


@of_rules
def test_masks_of_several_layers_compose(rules):
    """A mask at each of two layers is linear in either, and two masks at one layer are their product."""
    a, b = jnp.array([1.0, 0.0, 2.0]), jnp.array([0.5, 3.0, 0.0])

    @compiled
    def found(a, b):
        one, other = rp.condition(STEM, a), rp.condition(HEAD, jnp.array([1.0, -1.0, 2.0, 0.0]))
        twice = [explain(one, rp.condition(STEM, b), rules=rules), explain(rp.condition(STEM, a * b), rules=rules)]
        parts = jnp.stack([a[i] * explain(rp.condition(STEM, jnp.eye(CHANNELS)[i]), other, rules=rules) for i in range(3)])
        return twice, [explain(one, other, rules=rules), explain(other, one, rules=rules), parts.sum(0)]

    (one, product), (both, swapped, parts) = found(a, b)
    assert_equal(one, product)
    assert_equal(both, swapped)
    assert_equal(both, parts)


def test_a_condition_holds_at_every_layer_that_matches():
    masks = jnp.array([1.0, 0.0, 1.0])
    both, each = rp.condition(STEM | BRANCH, masks), [rp.condition(STEM, masks), rp.condition(BRANCH, masks)]
    assert_equal(*compiled(lambda x: (explain(both, x=x), explain(*each, x=x)))(X))


def test_complete_projections_add_up():
    basis, _ = jnp.linalg.qr(jax.random.normal(KEYS[4], (CHANNELS, CHANNELS)))

    @compiled
    def found(basis):
        def along(direction):
            return explain(rp.condition(STEM, lambda a: (a @ direction)[..., None] * direction.reshape(1, 1, 1, CHANNELS)))

        return jax.vmap(along)(basis.T), explain(rp.condition(STEM, lambda a: a @ basis @ basis.T)), explain()

    parts, all_at_once, whole = found(basis)
    assert_equal(parts.sum(0), whole)
    assert_equal(all_at_once, whole)


def test_a_function_is_transposed():
    """The coefficient 1 of both outputs becomes m 1, where the mask is a -> a m."""
    x, m = jnp.array([2.0, 5.0]), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    found = rp.explain(lambda x: (x @ jnp.eye(2)).sum(), None, conditions=rp.condition("dense", lambda a: a @ m))(x)
    np.testing.assert_allclose(found, [2 * (1 + 2), 5 * (3 + 4)])


def test_a_diagonal_function_is_an_array():
    mask = jnp.array([1.0, 0.0, 2.0])
    found = explain(rp.condition(BRANCH, lambda a: a * mask.reshape(1, 1, 1, CHANNELS)))
    assert_equal(found, explain(rp.condition(BRANCH, mask)))


# Exclusive conditions.


@pytest.mark.parametrize("fn", [network, jax.checkpoint(network)], ids=["plain", "remat"])
@of_rules
def test_exclusive_is_the_difference_to_nothing(fn, rules):
    """The relevance that goes past a layer is what is left when nothing goes through it."""

    @compiled
    def found(mask):
        through, nothing = rp.condition(BRANCH, mask), rp.condition(BRANCH, 0.0)
        alone = explain(rp.condition(BRANCH, mask, exclusive=True), fn=fn, rules=rules)
        return alone, explain(through, fn=fn, rules=rules), explain(nothing, fn=fn, rules=rules)

    alone, through, past = found(jnp.array([1.0, 0.0, 1.0]))
    assert np.abs(past).max() > 1e-3
    assert_equal(alone, through - past)


def test_exclusive_by_two_branches():
    w = jax.random.normal(KEYS[5], (3, 4, 4))

    def fn(w, x):
        return (jnp.tanh(x @ w[0]) + jnp.tanh(x @ w[1]) + jnp.tanh(x @ w[2])).sum()

    x = jnp.array([[1.0, -1.0, 0.5, 2.0]])

    def masked(*masks):
        numbered = [rp.where(lambda layer, i=i: layer.kind == "dense" and layer.index == dense[i]) for i in range(3)]
        return rp.explain(fn, None, conditions=[rp.condition(s, m) for s, m in zip(numbered, masks, strict=True)])(w, x)

    dense = [entry.layer.index for entry in rp.plan(fn, None)(w, x) if entry.layer.kind == "dense"]
    first_two = rp.where(lambda layer: layer.kind == "dense" and layer.index in dense[:2])
    found = rp.explain(fn, None, conditions=rp.condition(first_two, jnp.eye(4)[1], exclusive=True))(w, x)
    assert_equal(found, masked(jnp.eye(4)[1], jnp.eye(4)[1], 0.0))


# Starts.


@of_rules
def test_a_start_explains_the_lower_half_with_its_seed(rules):
    seed = jax.random.normal(KEYS[6], (2, 5, 5, CHANNELS))

    @compiled
    def found(seed):
        inside = explain(rp.start(rp.first("activation"), seed), rules=rules, target=None)
        below = [(selector, rule) for selector, rule in rules if not {selector} & {"dense"}]
        below = [(rp.optional(selector), rule) for selector, rule in below]
        alone = rp.explain(lower, below, target=lambda h: (h * seed).sum())
        with_condition = explain(rp.start(rp.first("activation"), seed), rp.condition(STEM, MASK), rules=rules, target=None)
        alone_with_condition = rp.explain(
            lower, below, target=lambda h: (h * seed).sum(), conditions=rp.condition(STEM, MASK)
        )
        return inside, alone(PARAMS, X), with_condition, alone_with_condition(PARAMS, X)

    inside, alone, with_condition, alone_with_condition = found(seed)
    assert_equal(inside, alone)
    assert_equal(with_condition, alone_with_condition)
    assert np.abs(with_condition - inside).max() > 1e-3


MASK = jnp.array([1.0, 0.0, 2.0])


def test_starts_add_up():
    one, other = rp.start(STEM, MASK), rp.start(BRANCH, 0.5)
    found = compiled(lambda: [explain(*starts, target=None) for starts in ([one, other], [one], [other])])
    both, *alone = found()
    assert_equal(both, sum(alone))


def test_a_start_with_the_coefficient_that_a_layer_has_is_the_explanation():
    """Relevance that starts at the stem with the coefficients that arrive there, by both ways."""

    @compiled
    def found(x):
        (at,) = rp.relevances(network, RULES, at=rp.first("activation"), target=1)(PARAMS, x).values()
        return explain(rp.start(rp.first("activation"), at.coefficient), target=None, x=x), explain(x=x)

    assert_equal(*found(X))


def test_starts_in_value_and_explain():
    begun = rp.start(STEM, MASK)
    value, relevance = rp.value_and_explain(network, RULES, conditions=begun)(PARAMS, X)
    assert_equal(value, network(PARAMS, X))
    assert_equal(relevance, explain(begun, target=None))


# Loops.

STEPS = 3
LOOP = (jax.random.normal(KEYS[0], (STEPS, 4, 4)) / 2, jax.random.normal(KEYS[1], (STEPS, 4)))
BATCH = jax.random.normal(KEYS[2], (2, 4))
LOOP_RULES = {"coefficients": rp.Epsilon(0.1), "relative": rp.Flat()}
of_loops = pytest.mark.parametrize("rule", LOOP_RULES.values(), ids=LOOP_RULES)


def block(w, b, x):
    return jax.nn.silu(x @ w + b.reshape(1, 4))


unrolled, scanned, nested = stacked(block)


def numbered(*numbers):
    """The dense layers with these numbers, in an unrolled loop of dense layers and activations."""
    return rp.where(lambda layer: layer.kind == "dense" and layer.index // 2 in numbers)


def explain_loop(fn, rule, *conditions, **options):
    return rp.explain(fn, rule, conditions=conditions, **options)(LOOP, BATCH)


@of_loops
@pytest.mark.parametrize("make", [rp.condition, rp.start])
def test_a_loop_has_one_mask_for_all_steps_or_one_for_each(make, rule):
    masks = jax.random.normal(KEYS[3], (STEPS, 4))

    @compiled
    def found(masks):
        return [
            explain_loop(scanned, rule, make("dense", masks[0])),
            explain_loop(unrolled, rule, make("dense", masks[0])),
            explain_loop(scanned, rule, make("dense", masks, by_step=True)),
            explain_loop(unrolled, rule, *(make(numbered(i), masks[i]) for i in range(STEPS))),
        ]

    same, same_unrolled, by_step, by_step_unrolled = found(masks)
    assert_equal(same, same_unrolled)
    assert_equal(by_step, by_step_unrolled)


@of_loops
def test_nested_loops_have_an_axis_each(rule):
    masks = jax.random.normal(KEYS[3], (2, STEPS, 4))

    def written_out(params, x):
        return unrolled(params, unrolled(params, x))

    @compiled
    def found(masks):
        each = [rp.condition(numbered(STEPS * i + j), masks[i, j]) for i in range(2) for j in range(STEPS)]
        return explain_loop(nested, rule, rp.condition("dense", masks, by_step=True)), explain_loop(written_out, rule, *each)

    assert_equal(*found(masks))


@of_loops
def test_channels_of_one_step_add_up(rule):
    """The mask is that of one channel at the second step, and 1 at the others."""
    masks = jnp.ones((4, STEPS, 4)).at[:, 1].set(jnp.eye(4))

    @compiled
    def found(masks):
        each = jax.vmap(lambda mask: explain_loop(scanned, rule, rp.condition("dense", mask, by_step=True)))(masks)
        return each.sum(0), explain_loop(scanned, rule)

    assert_equal(*found(masks))


@pytest.mark.parametrize(
    "fn",
    [jax.checkpoint(unrolled), lambda p, x: lax.cond(x.sum() < 1e9, unrolled, lambda p, x: x, p, x)],
    ids=["remat", "cond"],
)
@of_loops
def test_calls_change_nothing(fn, rule):
    condition = rp.condition(numbered(1), jnp.eye(4)[2])
    found = compiled(lambda: (explain_loop(fn, rule, condition), explain_loop(unrolled, rule, condition)))
    assert_equal(*found())


def test_in_a_shard_map_every_device_has_the_mask():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    specs = (PartitionSpec(), PartitionSpec("data"))
    fn = jax.shard_map(unrolled, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"))
    condition = rp.condition(numbered(1), jnp.eye(4)[2])
    found = jax.jit(lambda: (explain_loop(fn, rp.Zero(), condition), explain_loop(unrolled, rp.Zero(), condition)))
    assert_equal(*found())


# Transformations.


def test_conditions_in_vjp():
    condition = rp.condition(numbered(1), jnp.array([1.0, 0.0, 2.0, 1.0]))
    value, pullback = rp.vjp(unrolled, rp.Epsilon(0.1), LOOP, BATCH, conditions=condition)
    assert_equal(value, unrolled(LOOP, BATCH))
    assert_equal(pullback(value), explain_loop(unrolled, rp.Epsilon(0.1), condition))


def test_every_channel_shares_the_pass_forward():
    """64 channels: the layer, what is below and what is above it are evaluated once; what is above is transposed once."""
    size, rows = 64, 5
    params = [jax.random.normal(key, (size, size)) for key in KEYS[:3]]
    middle = rp.where(lambda layer: layer.kind == "dense" and layer.index == 2)

    def fn(params, x):
        for w in params:
            x = jax.nn.relu(x @ w)
        return x.sum(1)

    def one(mask, x):
        return rp.explain(fn, rp.Epsilon(0.1), conditions=rp.condition(middle, mask))(params, x)

    x = jnp.ones((rows, size))
    channels = jax.jit(jax.vmap(one, (0, None)))
    products = products_of(channels.lower(jnp.eye(size), x))
    single = size * size * rows  # multiplications of one product
    # Forward three and the topmost backward once, the lower two backward for each of the channels.
    assert sorted(products) == [single] * 4 + [size * single] * 2


def products_of(lowered):
    """The number of multiplications of each matrix product in a program."""
    shapes = r"stablehlo\.dot_general .*\((tensor<[^>]*>), (tensor<[^>]*>)\) -> (tensor<[^>]*>)"
    found = []
    for line in lowered.as_text().splitlines():
        match = re.search(shapes, line)
        if match:
            sizes = [np.prod([int(n) for n in re.findall(r"(\d+)x", shape)]) for shape in match.groups()]
            contracted = re.search(r"contracting_dims = \[(\d)\]", line)
            left = [int(n) for n in re.findall(r"(\d+)x", match.group(1))]
            found.append(int(sizes[2]) * left[int(contracted.group(1))])
    return found


def test_derivatives_of_a_conditional_explanation():
    mask, direction = jnp.array([1.0, 0.5, 2.0]), jax.random.normal(KEYS[4], PARAMS["stem"].shape)

    def loss(stem, mask):
        condition = rp.condition(BRANCH, mask, exclusive=True)
        return (explain(condition, rp.condition(STEM, mask), params=PARAMS | {"stem": stem}) ** 2).sum()

    by_weight, by_mask = compiled(jax.grad(loss, (0, 1)))(PARAMS["stem"], mask)
    loss = compiled(loss)
    h = 1e-6
    slope = (loss(PARAMS["stem"] + h * direction, mask) - loss(PARAMS["stem"] - h * direction, mask)) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(by_weight, direction), slope, rtol=1e-6)
    slope = (loss(PARAMS["stem"], mask * (1 + h)) - loss(PARAMS["stem"], mask * (1 - h))) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(by_mask, mask), slope, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_masks_and_seeds_do_not_widen(dtype):
    params, x = jax.tree.map(lambda a: a.astype(dtype), (LOOP, BATCH))
    for mask in (jnp.eye(4)[0], np.array([True, False, False, False]), [1, 0, 0, 0]):
        for item in (rp.condition(numbered(1), mask), rp.start(numbered(1), mask)):
            assert rp.explain(unrolled, rp.Epsilon(0.1), conditions=item)(params, x).dtype == dtype


def test_an_empty_batch():
    found = rp.explain(unrolled, rp.Flat(), conditions=[rp.condition(numbered(1), jnp.eye(4)[0]), rp.start(numbered(2))])
    assert found(LOOP, BATCH[:0]).shape == (0, 4)


# Errors.


@pytest.mark.parametrize(
    ("fn", "conditions", "message"),
    [
        (
            unrolled,
            rp.condition("dense", jnp.ones(3)),
            r"mask has the shape \(3,\).*output \(2, 4\).*0 at .*Channels are usually",
        ),
        (unrolled, rp.start("dense", jnp.ones((2, 2, 4))), r"seed has the shape \(2, 2, 4\).*does not broadcast"),
        (scanned, rp.condition("dense", jnp.ones((2, 4)), by_step=True), r"one leading axis for each loop, \(3,\)"),
        (scanned, rp.condition("dense", 1.0, by_step=True), r"one leading axis for each loop, \(3,\)"),
        (scanned, rp.condition("dense", lambda a: a, by_step=True), "mask by step must be an array"),
        (
            unrolled,
            rp.condition("conv", 1.0),
            r"The condition at kind\('conv'\) matches no layer\. Layers here: 0, activation",
        ),
        (unrolled, rp.start(rp.path("no*"), 1.0), r"The start at path\('no\*'\) matches no layer"),
        (
            unrolled,
            rp.condition("dense", jnp.sum),
            r"mask function returned the shape \(\).*must return an array of the same",
        ),
        (
            scanned,
            rp.condition("dense", 1.0, exclusive=True),
            "inside of a `scan` it is not clear which branches are parallel",
        ),
        (unrolled, "dense", "made by `relprop.condition` and `relprop.start`, got"),
        (unrolled, ("dense", 1.0), "made by `relprop.condition` and `relprop.start`, got 'dense'"),
        (unrolled, {"dense": 1.0}, "made by `relprop.condition` and `relprop.start`, got 'dense'"),
    ],
    ids=range(12),
)
def test_conditions_that_do_not_fit(fn, conditions, message):
    with pytest.raises(rp.ArgumentError, match=message):
        rp.explain(fn, None, conditions=conditions)(LOOP, BATCH)


def test_a_function_cannot_stand_below_a_rule_that_does_not_read_the_input():
    with pytest.raises(rp.ArgumentError, match=r"function cannot stand at the layer 0 at .*a rule above it \(Flat"):
        explain_loop(unrolled, rp.Flat(), rp.condition(rp.first("dense"), lambda a: a))
    # At the topmost layer there is none above it.
    same = explain_loop(unrolled, rp.Flat(), rp.condition(rp.last("dense"), lambda a: a))
    assert_equal(same, explain_loop(unrolled, rp.Flat()))


def test_relevance_cannot_start_in_a_branch_or_on_a_device():
    def branch(params, x):
        return lax.cond(x.sum() > 0, unrolled, lambda params, x: x, params, x)

    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    mapped = jax.shard_map(unrolled, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    for fn, name in ((branch, "cond"), (mapped, "shard_map")):
        with pytest.raises(rp.ArgumentError, match=rf"cannot start at the layer .*`{name}`; it can inside of `scan`"):
            explain_loop(fn, None, rp.start("dense", 1.0))
        with pytest.raises(rp.ArgumentError, match=rf"exclusive=True at the layer .*inside of a `{name}`"):
            explain_loop(fn, None, rp.condition("dense", 1.0, exclusive=True))


def test_relevance_starts_in_one_way():
    with pytest.raises(rp.ArgumentError, match=r"target=1 and relprop\.start name two places"):
        explain_loop(unrolled, None, rp.start("dense", 1.0), target=1)
    with pytest.raises(rp.ArgumentError, match="vjp takes the relevance of the output"):
        rp.vjp(unrolled, None, LOOP, BATCH, conditions=rp.start("dense", 1.0))


def test_an_explained_output_past_an_exclusive_condition():
    def fn(params, x):
        return unrolled(params, x), 2.0 * x

    with pytest.raises(
        rp.ArgumentError, match=r"output float64\[2, 4\] does not depend on the layers 0.*Explain the others"
    ):
        explain_loop(fn, None, rp.condition(rp.first("dense"), 1.0, exclusive=True))
    condition = rp.condition(numbered(0), jnp.eye(4)[0], exclusive=True)
    alone = explain_loop(fn, None, condition, target=lambda out: out[0])
    assert_equal(alone, explain_loop(unrolled, None, rp.condition(numbered(0), jnp.eye(4)[0])))


def test_a_function_as_a_mask_below_a_relu_is_seen_by_gamma():
    """A projection gives coefficients to outputs that are negative, which a relu alone would not."""
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((1, (3, 4)), (2, (4, 2))))
    projection = jnp.full((4, 4), 0.25)
    mask = rp.condition(rp.path("a"), lambda h: h @ projection)

    def rectified(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    def read_twice(params, x):
        h = x @ params["a"]
        return jax.nn.relu(h) @ params["b"] + 0.0 * h.sum()

    params, x = {"a": a, "b": b}, jnp.array([1.0, -2.0, 3.0])
    found, general = (rp.explain(fn, rp.Gamma(1.0), conditions=mask)(params, x) for fn in (rectified, read_twice))
    np.testing.assert_allclose(found, general, rtol=1e-9)
