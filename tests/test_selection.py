"""Which rule holds where: selectors, composites, and the printed plan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import relprop as rp

PARAMS = {
    "stem": {"kernel": jnp.ones((3, 3, 1, 2)) / 9},
    "blocks": [{"kernel": jnp.ones((3, 3, 2, 2)) / 18}, {"kernel": jnp.ones((3, 3, 2, 2)) / 18}],
    "head": {"kernel": jnp.ones((2, 3))},
}
IMAGE = jnp.ones((1, 4, 4, 1))


def net(params, x):
    def conv(kernel, x):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = jax.nn.relu(conv(params["stem"]["kernel"], x))
    for i, block in enumerate(params["blocks"]):
        with jax.named_scope(f"block{i}"):
            x = x + jnp.tanh(conv(block["kernel"], x))
    return x.mean((1, 2)) @ params["head"]["kernel"]


# dense and conv: 0 stem, 2 block0, 5 block1, 9 head; activations 1, 3, 6; adds 4, 7; mean 8
def selected(selector):
    plan = rp.plan(net, [(selector, _Mark())])(PARAMS, IMAGE)
    return [entry.layer.index for entry in plan if isinstance(entry.rule, _Mark)]


@dataclasses.dataclass(frozen=True)
class _Mark(rp.Rule):
    kinds = ("affine", "scale", "activation", "add", "sum_pool", "max_pool")

    def __call__(self, layer, x, z):
        return z


@pytest.mark.parametrize(
    ("selector", "indices"),
    [
        ("conv", [0, 2, 5]),
        ("dense", [9]),
        ("affine", [0, 2, 5, 9]),
        ("activation", [1, 3, 6]),
        ("add", [4, 7]),
        ("tanh", [3, 6]),
        ("dot_general", [9]),
        (rp.kind("sum_pool"), [8]),
        (rp.primitive("max"), [1]),
        ("blocks/*/kernel", [2, 5]),
        (rp.path("stem"), [0]),
        (rp.path("blocks/1"), [5]),
        (rp.scope("block0"), [2, 3, 4]),
        (rp.scope("block*"), [2, 3, 4, 5, 6, 7]),
        (rp.first("affine"), [0]),
        (rp.last("affine"), [9]),
        (rp.first(rp.scope("block1")), [5]),
        (rp.last("conv") | "head/*", [5, 9]),
        (rp.kind("conv") & rp.scope("block0"), [2]),
        (rp.kind("affine") & ~rp.first("affine"), [2, 5, 9]),
        (lambda layer: layer.output_shape[-1] == 3, [9]),
        (rp.where(lambda layer: layer.index > 6, "late"), [7, 8, 9]),
    ],
    ids=lambda v: "predicate" if callable(v) and not isinstance(v, rp.selectors.Selector) else str(v),
)
def test_selectors(selector, indices):
    assert selected(selector) == indices


def test_first_and_last_mean_the_order_of_execution_not_of_registration():
    params = {"a_used_second": jnp.ones((2, 2)), "b_used_first": jnp.ones((3, 2))}

    def fn(params, x):
        return x @ params["b_used_first"] @ params["a_used_second"]

    plan = rp.plan(fn, [(rp.first(), rp.Flat()), ("affine", rp.Epsilon())])(params, jnp.ones((1, 3)))
    assert [(e.layer.path, type(e.rule).__name__) for e in plan] == [
        ("b_used_first", "Flat"),
        ("a_used_second", "Epsilon"),
    ]


def test_the_first_match_wins_in_every_form_of_rules():
    pairs = [("stem/*", rp.Flat()), ("conv", rp.Gamma()), ("affine", rp.Epsilon())]
    expected = ["Flat", "Gamma", "Gamma", "Epsilon"]
    for rules in (pairs, dict(pairs), rp.Composite(pairs), tuple(pairs), [*rp.Composite(pairs)]):
        plan = rp.plan(net, rules)(PARAMS, IMAGE)
        assert [type(e.rule).__name__ for e in plan if "affine" in e.layer.kinds] == expected


def test_a_bare_rule_is_for_all_affine_layers_and_the_rest_keeps_its_default():
    plan = rp.plan(net, rp.Gamma(0.1))(PARAMS, IMAGE)
    names = [type(entry.rule).__name__ for entry in plan]
    assert names == ["Gamma", "Identity", "Gamma", "Identity", "Zero", "Gamma", "Identity", "Zero", "Zero", "Gamma"]


def test_a_rule_in_front_of_a_preset():
    plan = rp.plan(net, [("add", rp.Norm()), *rp.presets.epsilon_plus()])(PARAMS, IMAGE)
    assert {type(e.rule).__name__ for e in plan if e.layer.kind == "add"} == {"Norm"}
    assert {type(e.rule).__name__ for e in plan if e.layer.kind == "conv"} == {"ZPlus"}


def test_unused_selectors_are_reported_by_plan_and_explain_but_not_those_of_presets():
    rules = [("batch*", rp.Gamma()), ("affine", rp.Epsilon())]
    message = r"path\('batch\*'\) of the rule Gamma\(\) matched no layer.*activation.*relprop.plan"
    with pytest.warns(rp.UnusedSelectorWarning, match=message):
        rp.plan(net, rules)(PARAMS, IMAGE)
    with pytest.warns(rp.UnusedSelectorWarning, match=message):
        rp.explain(net, rules)(PARAMS, IMAGE)
    rp.explain(lambda w, x: x @ w, rp.presets.epsilon_gamma_box(0.0, 1.0))(jnp.ones((2, 2)), jnp.ones((1, 2)))


def test_the_printed_plan():
    text = str(rp.plan(net, rp.presets.epsilon_plus_flat())(PARAMS, IMAGE))
    lines = text.splitlines()
    assert lines[0].split("  ")[0].strip() == "#"
    for column in ("address", "kind", "primitive", "in -> out", "rule", "source"):
        assert column in lines[0]
    assert "stem/kernel" in lines[2]
    assert "Flat()" in lines[2]
    assert "[1, 4, 4, 1] -> [1, 4, 4, 2]" in lines[2]
    assert "test_selection.py:" in lines[2]
    assert "relu" in lines[3]
    assert "block0" in lines[5]
    assert len(lines) == 12


def test_a_plan_is_a_sequence_of_entries():
    plan = rp.plan(net, rp.Epsilon())(PARAMS, IMAGE)
    assert len(plan) == 10
    assert plan[9].layer.path == "head/kernel"
    assert plan[0].layer.input_shapes == ((1, 4, 4, 1),)


def test_composites_print_what_they_hold():
    assert str(rp.presets.epsilon_plus()) == "Composite:\n  kind('conv'): ZPlus()\n  kind('affine'): Epsilon()"
    box = rp.presets.epsilon_gamma_box(np.zeros(3), 255.0, gamma=0.5)
    assert "ZBox(low=ndarray, high=255.0)" in str(box)
    assert "Gamma(gamma=0.5)" in str(box)
