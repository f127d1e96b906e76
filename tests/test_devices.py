"""Many devices: the relevance is that of one device, and costs the communication of the gradient.

With `NamedSharding` XLA decides what devices tell one another, in collective operations. A rule needs no kind of them and
no more of them than the gradient, but where the contracted axis of a product is split, every product of the rule is summed
over devices: one array each forwards (weights split by rows) and backwards (by columns).
"""

import collections
import functools
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_models
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import relprop as rp

RANDOM = np.random.default_rng(0)
DATA, MODEL, BOTH = {"data": 8}, {"model": 4}, {"data": 2, "model": 4}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*?)\)")


def mesh_of(axes):
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def split(tree, mesh, specs):
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, specs)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape) / np.sqrt(np.prod(shape[:-1])))


def row(v):
    return v.reshape(1, -1)


def mlp(params, x, total=lambda z: z):
    """`total` sums over devices what is a part on each, in a `shard_map`."""
    x = jax.nn.relu(jnp.abs(x) @ params["up"] + row(params["b"]))
    x = jax.nn.relu(total(x @ params["down"]) * row(params["scale"]) + row(params["c"]))
    return x @ params["out"]


MLP = {
    "up": normal(16, 32),
    "b": normal(32),
    "down": normal(32, 16),
    "scale": normal(16),
    "c": normal(16),
    "out": normal(16, 8),
}
MLP_WHOLE = dict.fromkeys(MLP, P())
MLP_SPLIT = MLP_WHOLE | {"up": P(None, "model"), "b": P("model"), "down": P("model", None)}
ROWS = normal(8, 16)


def cnn(params, x):
    for kernel, bias in (("kernel1", "bias1"), ("kernel2", "bias2")):
        x = lax.conv_general_dilated(x, params[kernel], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + params[bias].reshape(1, 1, 1, -1))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(len(x), -1) @ params["out"]


CNN = {
    "kernel1": normal(3, 3, 3, 8),
    "bias1": normal(8),
    "kernel2": normal(3, 3, 8, 8),
    "bias2": normal(8),
    "out": normal(3 * 3 * 8, 8),
}
CNN_WHOLE = dict.fromkeys(CNN, P())
CNN_SPLIT = CNN_WHOLE | {"kernel1": P(None, None, None, "model"), "bias1": P("model"), "kernel2": P(None, None, "model")}
IMAGES = jnp.asarray(RANDOM.uniform(-1, 1, size=(8, 6, 6, 3)))

RULES = {
    "Epsilon": rp.Epsilon(),
    "ZPlus": rp.ZPlus(),
    "Gamma": rp.Gamma(),
    "AlphaBeta": rp.AlphaBeta(),
    "epsilon_plus_flat": rp.presets.epsilon_plus_flat(),
    "epsilon_alpha2_beta1_flat": rp.presets.epsilon_alpha2_beta1_flat(),
    "epsilon_gamma_box": rp.presets.epsilon_gamma_box(-1.0, 1.0),
    "attn_lrp": rp.presets.attn_lrp(),
}


def collectives(compiled):
    """How many collective operations of each kind a program has, and how many arrays they move."""
    found = COLLECTIVE.findall(compiled.as_text())
    arrays = collections.Counter[str]()
    for kind, operands in found:
        arrays[kind] += operands.count("%")
    return collections.Counter(kind for kind, _ in found), arrays


@functools.cache
def on_one_device(fn, rules):
    params, x = (MLP, ROWS) if fn is mlp else (CNN, IMAGES)
    return np.asarray(jax.jit(rp.explain(fn, RULES[rules], target=2))(params, x))


@functools.cache
def of_the_gradient(fn, form):
    params, x = placed(fn, form)
    gradient = jax.jit(jax.grad(lambda p, x: fn(p, x)[:, 2].sum(), argnums=1))
    return collectives(gradient.lower(params, x).compile())


def placed(fn, form):
    """Parameters and input of a network, with the batch, the weights or both split."""
    mesh = mesh_of({"data": DATA, "tensor": MODEL, "both": BOTH}[form])
    whole, parts, params, x = (MLP_WHOLE, MLP_SPLIT, MLP, ROWS) if fn is mlp else (CNN_WHOLE, CNN_SPLIT, CNN, IMAGES)
    specs = whole if form == "data" else parts
    return split(params, mesh, specs), split(x, mesh, P() if form == "tensor" else P("data"))


def explained(fn, rules, form):
    """Whether the relevance is that of one device; the collectives."""
    params, x = placed(fn, form)
    compiled = jax.jit(rp.explain(fn, RULES[rules], target=2)).lower(params, x).compile()
    relevance = compiled(params, x)
    want = on_one_device(fn, rules)
    np.testing.assert_allclose(relevance, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())
    assert relevance.sharding.is_equivalent_to(x.sharding, x.ndim)
    return collectives(compiled)


@pytest.mark.parametrize(
    ("fn", "rules"),
    [
        (mlp, "Epsilon"),
        (mlp, "AlphaBeta"),
        (mlp, "epsilon_plus_flat"),
        (cnn, "epsilon_alpha2_beta1_flat"),
        (cnn, "epsilon_gamma_box"),
    ],
)
def test_where_the_batch_is_split_devices_tell_one_another_what_they_do_for_the_gradient(fn, rules):
    assert explained(fn, rules, "data") == of_the_gradient(fn, "data")
    if fn is mlp:
        assert not any(of_the_gradient(fn, "data"))


PRODUCTS = {"Epsilon": 2, "attn_lrp": 2, "ZPlus": 3, "Gamma": 3, "AlphaBeta": 4}  # with weights, of a layer; see rules


@pytest.mark.parametrize("rules", PRODUCTS)
def test_where_weights_are_split_every_product_of_a_rule_is_summed_in_the_collectives_of_the_gradient(rules):
    operations, arrays = explained(mlp, rules, "tensor")
    assert operations == of_the_gradient(mlp, "tensor")[0] == {"all-reduce": 2}
    assert of_the_gradient(mlp, "tensor")[1] == {"all-reduce": 2}
    assert arrays == {"all-reduce": PRODUCTS[rules]}


@pytest.mark.parametrize("rules", ["epsilon_plus_flat", "epsilon_gamma_box"])
def test_channels_of_convolutions_may_be_split(rules):
    operations, arrays = explained(cnn, rules, "tensor")
    assert operations == of_the_gradient(cnn, "tensor")[0] == {"all-reduce": 2}
    assert arrays["all-reduce"] <= 4  # two products forwards; one backwards with Flat, two with ZBox


@pytest.mark.parametrize(("fn", "rules"), [(mlp, "AlphaBeta"), (cnn, "epsilon_alpha2_beta1_flat")])
def test_batch_and_weights_may_be_split_together(fn, rules):
    operations, _ = explained(fn, rules, "both")
    assert operations == of_the_gradient(fn, "both")[0]


def test_attention_heads_may_be_split():
    params, images = transformer_models.init("vit"), transformer_models.sample("vit")
    vit, mesh = transformer_models.NETWORKS["vit"], mesh_of(BOTH)

    def spec(path, leaf):
        name = jax.tree_util.keystr(path)
        if any(part in name for part in ("query", "key", "value", "up")):
            return P(None, "model") if leaf.ndim == 2 else P("model")
        return P("model", None) if leaf.ndim == 2 and ("output" in name or "down" in name) else P()

    on_devices = split(params, mesh, jax.tree_util.tree_map_with_path(spec, params)), split(images, mesh, P("data"))
    explain = jax.jit(rp.explain(vit, RULES["attn_lrp"], target=2))
    compiled = explain.lower(*on_devices).compile()
    np.testing.assert_allclose(compiled(*on_devices), explain(params, images), rtol=1e-12, atol=1e-14)
    gradient = jax.jit(jax.grad(lambda p, x: vit(p, x)[:, 2].sum(), argnums=1))
    assert collectives(compiled) == collectives(gradient.lower(*on_devices).compile())


def test_targets_may_be_split():
    params, x = split((MLP, ROWS), mesh_of(BOTH), (MLP_WHOLE, P("data")))
    classes = split(jnp.arange(8), mesh_of(BOTH), P("model"))
    rules = RULES["AlphaBeta"]
    of_all = jax.jit(lambda p, x, t: jax.vmap(lambda t: rp.explain(mlp, rules, target=t)(p, x))(t))
    many = of_all(params, x, classes)
    assert many.sharding.is_equivalent_to(NamedSharding(mesh_of(BOTH), P("model", "data")), 3)
    np.testing.assert_allclose(many[2], on_one_device(mlp, "AlphaBeta"), rtol=1e-12, atol=1e-14)
    assert not any(collectives(of_all.lower(params, x, classes).compile()))
    in_chunks = jax.jit(rp.explain_targets(mlp, rules, batch_size=4))(params, x)
    np.testing.assert_allclose(in_chunks, many, rtol=1e-12, atol=1e-14)


# shard_map: the function, or its explanation, runs on every device with its own part.


@pytest.mark.parametrize("rules", ["AlphaBeta", "epsilon_plus_flat"])
def test_shard_map_over_the_batch(rules):
    over_batch = {"mesh": mesh_of(DATA), "in_specs": (P(), P("data")), "out_specs": P("data")}
    inside = jax.shard_map(rp.explain(mlp, RULES[rules], target=2), **over_batch)
    around = rp.explain(jax.shard_map(mlp, **over_batch), RULES[rules], target=2)
    for explain in (inside, around):
        np.testing.assert_allclose(jax.jit(explain)(MLP, ROWS), on_one_device(mlp, rules), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rules", ["Gamma", "AlphaBeta", "epsilon_plus_flat"])
def test_in_a_shard_map_a_product_and_its_sum_over_devices_are_one_layer(rules):
    of_shards = functools.partial(mlp, total=lambda z: lax.psum(z, "model"))
    mapped = {"mesh": mesh_of(BOTH), "in_specs": (MLP_SPLIT, P("data")), "out_specs": P("data")}
    explain = rp.explain(jax.shard_map(of_shards, **mapped), RULES[rules], target=2)
    np.testing.assert_allclose(jax.jit(explain)(MLP, ROWS), on_one_device(mlp, rules), rtol=1e-12, atol=1e-14)
    if rules == "AlphaBeta":
        inside = jax.shard_map(rp.explain(of_shards, RULES[rules], target=2), **mapped)
        unchecked = rp.explain(jax.shard_map(of_shards, **mapped, check_vma=False), RULES[rules], target=2)
        for explain in (inside, unchecked):
            np.testing.assert_allclose(jax.jit(explain)(MLP, ROWS), on_one_device(mlp, rules), rtol=1e-12, atol=1e-14)


# Two processes.


def in_two_processes():
    """The outputs of the two, and whether both came to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(pathlib.Path(__file__).with_name("two_processes.py")), str(port)]
    workers = [
        subprocess.Popen([*command, number], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for number in "01"
    ]
    try:
        reports = [worker.communicate(timeout=90)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return reports, all(worker.returncode == 0 for worker in workers)


def test_two_processes_share_batch_or_weights():
    reports, ended = in_two_processes()
    if not ended:  # another program may have taken the port that was free
        reports, ended = in_two_processes()
    assert ended, reports
    for number, report in enumerate(reports):
        assert f"of 2 processes: {number}" in report.splitlines(), report
        errors = {line.split()[1]: float(line.split()[2]) for line in report.splitlines() if line.startswith("error ")}
        assert errors.keys() == {"batch", "weights"}, report
        assert max(errors.values()) < 1e-12, report
