"""Conditional relevances equal zennit-crp's (concept relevance propagation, Achtibat et al. 2023).

A condition of crp names layers and the channels that are kept there; all of them hold together, and a list of conditions is
a list of explanations. Here both are masks of ones and zeros. crp's `exclude_parallel` is `exclusive`.
See golden/README.md for how the values were made.
"""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from golden import load

import relprop as rp

PRESETS = {"plus": rp.presets.epsilon_plus, "alpha2_beta1": rp.presets.epsilon_alpha2_beta1}
NETWORKS = {"plain": networks.vgg_max, "residual": networks.resnet}
NORM = [(rp.optional("add"), rp.Norm(1e-6)), (rp.optional("sum_pool"), rp.Norm(1e-6))]  # as zennit has it at sums


class Network:
    """A network under a preset: its golden values, the arrays that they belong to, and explanations of it."""

    def __init__(self, name, preset):
        stored = load(f"crp_{name}")
        self.fn, self.rules = NETWORKS[name], [*NORM, *PRESETS[preset]()]
        self.x, self.target, self.start = jnp.asarray(stored["x"]), int(stored["target"]), stored.get("start")
        self.params = {f"layer{i}": {} for i in (1, 2, 3)} if name == "residual" else {}
        self.golden = {}
        for key, value in stored.items():
            if key.startswith("params/"):
                _, *path, leaf = key.split("/")
                functools.reduce(lambda node, step: node.setdefault(step, {}), path, self.params)[leaf] = value
            elif key.startswith(f"{preset}/"):
                self.golden[key.removeprefix(f"{preset}/")] = value

    def explain(self, *conditions, target=None, x=None):
        explain = rp.explain(self.fn, self.rules, target=target, conditions=conditions)
        return explain(self.params, self.x[:1] if x is None else x)

    def relevances(self, at, *conditions):
        return rp.relevances(self.fn, self.rules, at=at, target=self.target, conditions=conditions)(self.params, self.x[:1])


def networks_of(name):
    return pytest.fixture(params=PRESETS, scope="module")(lambda request: Network(name, request.param))


plain, residual = networks_of("plain"), networks_of("residual")


def keep(size, *channels):
    """The mask that leaves these channels of `size`."""
    return np.isin(np.arange(size), channels).astype(float)


def neurons(side, size, **channels):
    """The mask that leaves single neurons of channels, which crp numbers row by row."""
    mask = np.zeros((side * side, size))
    for channel, numbers in channels.items():
        mask[numbers, int(channel.removeprefix("channel"))] = 1
    return mask.reshape(side, side, size)


def assert_equal(relevance, expected):
    assert relevance.shape == expected.shape
    assert np.linalg.norm(relevance - expected) / np.linalg.norm(expected) < 1e-9


# A chain of layers: what is kept, by layer. All cases are one program, where other layers are masked with ones.

LAYERS = {f"conv{i}": rp.path(f"conv{i}") for i in (1, 2, 3, 4)} | {
    "dense1": rp.path("dense1"),
    "relu1": rp.first("activation"),
}
SHAPES = {
    "conv1": (8, 8, 4),
    "relu1": (8, 8, 4),
    "conv2": (8, 8, 5),
    "conv3": (4, 4, 6),
    "conv4": (2, 2, 6),
    "dense1": (10,),
}
TWO = {"conv4": keep(6, 0, 2, 4), "conv2": keep(5, 1, 3)}
CASES = {
    "channel": {"conv3": keep(6, 2)},
    "channels": {"conv3": keep(6, 1, 3, 5)},
    "first_conv": {"conv1": keep(4, 0, 2)},
    "first_relu": {"relu1": keep(4, 0, 2)},
    "two_layers": TWO,
    "three_layers": TWO | {"dense1": keep(10, 0, 2, 4, 5, 9)},
    "neuron": {"conv3": neurons(4, 6, channel2=[0, 3, 10], channel3=[4, 5])},
    "paired": {"conv3": np.stack([keep(6, 0), keep(6, 1, 4)])[:, None, None]},  # of two examples
}
CLASSES, CHANNELS = range(5), range(5)


@pytest.fixture(scope="module")
def explained(plain):
    """Relevance of both examples by case, by class, and by channel of conv2."""
    cases = {case: (plain.target, kept) for case, kept in CASES.items()}
    cases |= {("class", i): (i, {}) for i in CLASSES}
    cases |= {("channel", i): (plain.target, {"conv2": keep(5, i)}) for i in CHANNELS}
    targets = np.array([target for target, _ in cases.values()])
    masks = {
        layer: np.stack([np.broadcast_to(kept.get(layer, 1.0), (2, *shape)) for _, kept in cases.values()])
        for layer, shape in SHAPES.items()
    }

    @jax.jit
    @jax.vmap
    def explain(target, masks):
        return plain.explain(*(rp.condition(LAYERS[name], masks[name]) for name in LAYERS), target=target, x=plain.x)

    return dict(zip(cases, np.asarray(explain(targets, masks)), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_conditions_at_layers(plain, explained, case):
    expected = plain.golden[case]
    assert_equal(explained[case][: len(expected)], expected)


def test_without_conditions_every_class_is_explained_with_its_logit(plain, explained):
    assert_equal(np.stack([explained["class", i][0] for i in CLASSES]), plain.golden["classes"])


def test_channels_add_up_to_the_whole(plain, explained):
    channels = np.stack([explained["channel", i][0] for i in CHANNELS])
    assert_equal(channels, plain.golden["every_channel"])
    assert_equal(channels.sum(0), plain.golden["classes"][plain.target])


STARTS = {  # a seed for each of three layers, and what conv2 keeps; where a layer is the start, crp's seed is 1
    "start": {"conv3": keep(6, 2)},
    "start_seed": {},
    "start_relu": {"relu5": keep(10, 0, 2, 4, 5, 9)},
    "start_then": {"conv4": keep(6, 2, 5), "conv2": keep(5, 1, 3)},
}


def test_relevance_that_starts_inside(plain):
    def stacked(layer, shape, default, **given):
        return np.stack([np.broadcast_to((kept | given).get(layer, default), shape) for kept in STARTS.values()])

    seeds = {"conv3": stacked("conv3", (4, 4, 6), 0.0), "conv4": stacked("conv4", (6,), 0.0)}
    seeds["conv3"][list(STARTS).index("start_seed")] = plain.start[0]
    seeds["relu5"] = stacked("relu5", (10,), 0.0)

    @jax.jit
    @jax.vmap
    def explain(seeds, kept):
        layers = LAYERS | {"relu5": rp.last("activation")}
        starts = [rp.start(layers[name], seed) for name, seed in seeds.items()]
        return plain.explain(*starts, rp.condition(LAYERS["conv2"], kept))

    for name, relevance in zip(STARTS, explain(seeds, stacked("conv2", (5,), 1.0)), strict=True):
        assert_equal(relevance, plain.golden[name])


def test_relevance_inside(plain):
    layers = ("conv1", "conv3", "dense1")
    at = rp.path("conv1") | rp.path("conv3") | rp.path("dense1")
    relevances = jax.jit(lambda mask: plain.relevances(at, rp.condition(LAYERS["conv4"], mask)))
    for case, mask in (("at", np.ones(6)), ("conditioned_at", keep(6, 0, 2, 4))):
        found = relevances(mask)
        assert found.keys() == {f"{layer}/kernel" for layer in layers}
        for layer in layers:
            assert_equal(found[f"{layer}/kernel"].relevance, plain.golden[f"{case}_{layer}"])


# Two residual blocks. Conditions are in the branches: conv2 of the first block, conv1 of the second. Relevance that goes by
# the shortcuts does not meet them. These run eagerly: they share their operations.

INNER, OUTER, SUM = rp.path("block0/conv2"), rp.path("block1/conv1"), rp.first("add")
INNER_MASK, OUTER_MASK = keep(4, 0, 1, 3), keep(4, 0, 2)
either = pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "parallel"])


def golden_of(residual, case, exclusive):
    return residual.golden[f"{case}_{'exclusive' if exclusive else 'parallel'}"]


def test_residual_network_without_conditions(residual):
    assert_equal(residual.explain(target=residual.target), residual.golden["none"])


@either
def test_condition_in_a_branch(residual, exclusive):
    found = residual.explain(rp.condition(INNER, INNER_MASK, exclusive=exclusive), target=residual.target)
    assert_equal(found, golden_of(residual, "one", exclusive))


@either
def test_conditions_in_two_branches(residual, exclusive):
    conditions = [rp.condition(at, mask, exclusive=exclusive) for at, mask in ((INNER, INNER_MASK), (OUTER, OUTER_MASK))]
    expected = golden_of(residual, "two", exclusive)
    assert_equal(residual.explain(*conditions, target=residual.target), expected)
    assert_equal(residual.explain(*conditions[::-1], target=residual.target), expected)


@either
def test_start_in_a_branch(residual, exclusive):
    condition = rp.condition(INNER, INNER_MASK, exclusive=exclusive)
    assert_equal(residual.explain(rp.start(OUTER, OUTER_MASK), condition), golden_of(residual, "start", exclusive))


@either
def test_nothing_is_parallel_to_a_sum(residual, exclusive):
    found = residual.explain(rp.condition(SUM, keep(4, 0, 2, 3), exclusive=exclusive), target=residual.target)
    assert_equal(found, golden_of(residual, "sum", exclusive))


def test_what_goes_by_the_shortcut_counts_for_every_channel_unless_it_is_excluded(residual):
    masks = [rp.condition(INNER, mask, exclusive=True) for mask in np.eye(4)]
    branch = np.concatenate([residual.explain(mask, target=residual.target) for mask in masks])
    assert_equal(branch, golden_of(residual, "every", True))
    shortcut = residual.explain(rp.condition(INNER, 0.0), target=residual.target)
    assert_equal(branch + shortcut, golden_of(residual, "every", False))
    assert_equal(branch.sum(0) + shortcut[0], residual.golden["none"][0])


def test_relevance_inside_residual_blocks(residual):
    for case, conditions in (("at", ()), ("conditioned_at", (rp.condition(OUTER, OUTER_MASK),))):
        found = residual.relevances(INNER | OUTER | SUM, *conditions)
        inner, outer = (found.pop(f"layer1/{name}/kernel") for name in ("block0/conv2", "block1/conv1"))
        (total,) = found.values()
        for layer, at in (("block0.conv2", inner), ("block1.conv1", outer), ("block0.sum", total)):
            assert_equal(at.relevance, residual.golden[f"{case}_{layer}"])
