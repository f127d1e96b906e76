"""What can be asked of `explain`, `value_and_explain`, `vjp` and `plan`, and the transformations that they live under."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import relprop as rp

KEYS = jax.random.split(jax.random.key(0), 6)
PARAMS = {
    "hidden": {"w": jax.random.normal(KEYS[0], (6, 8)), "b": jax.random.normal(KEYS[1], (8,))},
    "out": {"w": jax.random.normal(KEYS[2], (8, 4)), "b": jax.random.normal(KEYS[3], (4,))},
}
X = jax.random.normal(KEYS[4], (5, 6))


def dense(layer, x):
    y = x @ layer["w"]
    return y + layer["b"].reshape((1,) * (y.ndim - 1) + (-1,))


def mlp(params, x):
    return dense(params["out"], jax.nn.relu(dense(params["hidden"], x)))


def equal(a, b, rtol=1e-12):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=rtol, atol=1e-13)


GAMMA = rp.Gamma(0.3)


# What is explained.


def test_the_last_argument_is_explained_by_default():
    equal(rp.explain(mlp, GAMMA)(PARAMS, X), rp.explain(mlp, GAMMA, argnums=1)(PARAMS, X))


def test_several_arguments_are_explained_at_once():
    def fn(a, b, c):
        return a * 2.0 - b + jnp.sum(c)

    a, b, c = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.array([5.0])
    ra, rc = rp.explain(fn, None, argnums=(0, 2))(a, b, c)
    equal(ra, 2 * a)
    equal(rc, 2 * c)  # added to both outputs
    (rb,) = rp.explain(fn, None, argnums=(-2,))(a, b, c)
    equal(rb, -b)


def test_pytrees_in_and_out():
    def fn(batch):
        return {"sum": batch["a"] + batch["b"][0], "scaled": 3.0 * batch["a"]}

    batch = {"a": jnp.array([1.0, 2.0]), "b": [jnp.array([4.0, 5.0])]}
    relevance = rp.explain(fn, None)(batch)
    equal(relevance, {"a": 4 * batch["a"], "b": batch["b"]})


def test_explained_parameters_do_not_change_the_relevance_of_the_input():
    both = rp.explain(mlp, GAMMA, argnums=(0, 1))(PARAMS, X)
    equal(both[1], rp.explain(mlp, GAMMA)(PARAMS, X))
    equal(both[0], rp.explain(mlp, GAMMA, argnums=0)(PARAMS, X))


def test_biases_receive_what_they_absorb():
    params, x = rp.explain(mlp, rp.Zero(), argnums=(0, 1))(PARAMS, X)
    biases = params["hidden"]["b"].sum() + params["out"]["b"].sum()
    equal(x.sum() + biases, mlp(PARAMS, X).sum())


def test_the_relevance_of_a_weight_is_what_flows_through_it():
    params = rp.explain(mlp, rp.Epsilon(1e-9), argnums=0)(PARAMS, X)
    logits = mlp(PARAMS, X)
    equal(params["out"]["w"].sum() + params["out"]["b"].sum(), logits.sum(), rtol=1e-6)


def test_parameters_may_be_named():
    w, x = jnp.array([[2.0], [3.0]]), jnp.array([1.0, 1.0])
    as_data = rp.explain(lambda w, x: x @ w, None, argnums=(0, 1))(w, x)
    equal(as_data, (w / 2, jnp.array([1.0, 1.5])))  # a product of two explained arrays: half to each
    as_weight = rp.explain(lambda w, x: x @ w, None, argnums=(0, 1), parameters=0)(w, x)
    equal(as_weight, (w, jnp.array([2.0, 3.0])))


@pytest.mark.parametrize("target", [2, -1, np.int32(2)])
def test_target_as_an_int(target):
    relevance = rp.explain(mlp, GAMMA, target=target)(PARAMS, X)
    equal(relevance, rp.explain(lambda p, x: mlp(p, x)[:, int(target)], GAMMA)(PARAMS, X))


def test_target_as_an_array_of_ints():
    target = jnp.array([0, 3, 1, -1, 2])
    relevance = rp.explain(mlp, GAMMA, target=target)(PARAMS, X)
    for i, t in enumerate(target):
        equal(relevance[i], rp.explain(mlp, GAMMA, target=t)(PARAMS, X)[i])


def test_target_top_is_the_predicted_class():
    top = mlp(PARAMS, X).argmax(-1)
    equal(rp.explain(mlp, GAMMA, target="top")(PARAMS, X), rp.explain(mlp, GAMMA, target=top)(PARAMS, X))


def test_target_as_a_function_of_the_output():
    relevance = rp.explain(mlp, GAMMA, target=lambda y: y[:, 0] - y[:, 1])(PARAMS, X)
    parts = [rp.explain(mlp, GAMMA, target=t)(PARAMS, X) for t in (0, 1)]
    equal(relevance, parts[0] - parts[1])


def test_without_a_target_every_output_is_explained():
    total = sum(rp.explain(mlp, GAMMA, target=t)(PARAMS, X) for t in range(4))
    equal(rp.explain(mlp, GAMMA)(PARAMS, X), total)


def test_has_aux_as_in_jax_grad():
    def with_aux(params, x):
        return mlp(params, x), {"mean": x.mean(), "label": jnp.arange(3)}

    relevance, aux = rp.explain(with_aux, GAMMA, has_aux=True)(PARAMS, X)
    equal(relevance, rp.explain(mlp, GAMMA)(PARAMS, X))
    equal(aux["mean"], X.mean())
    (value, aux), again = rp.value_and_explain(with_aux, GAMMA, has_aux=True)(PARAMS, X)
    equal(value, mlp(PARAMS, X))
    equal(again, relevance)
    assert aux["label"].dtype == jnp.arange(3).dtype


def test_value_and_explain_returns_the_function_s_own_value():
    value, _ = rp.value_and_explain(mlp, GAMMA, target=lambda y: y[:, 0])(PARAMS, X)
    equal(value, mlp(PARAMS, X))


def test_vjp_takes_any_relevance_of_the_output():
    value, pullback = rp.vjp(mlp, GAMMA, PARAMS, X)
    one_hot = jax.nn.one_hot(jnp.full(5, 2), 4) * value
    equal(pullback(one_hot), rp.explain(mlp, GAMMA, target=2)(PARAMS, X))
    equal(pullback(3 * value), 3 * rp.explain(mlp, GAMMA)(PARAMS, X))


def test_keyword_arguments_and_flags_reach_the_function():
    def fn(params, x, scale, double=False, bias=None):
        y = dense(params["out"], dense(params["hidden"], x)) * scale
        return (2.0 * y if double else y) + (0.0 if bias is None else bias)

    plain = rp.explain(fn, None, argnums=1)(PARAMS, X, 1.0)
    equal(rp.explain(fn, None, argnums=1)(PARAMS, X, 1.0, double=True, bias=jnp.ones((5, 4))), 2 * plain)
    equal(rp.explain(fn, None, argnums=1)(PARAMS, X, 2.0, False), 2 * plain)


def test_coefficients_are_the_factor_of_the_input():
    c = rp.explain(mlp, GAMMA, coefficients=True)(PARAMS, X)
    equal(c * X, rp.explain(mlp, GAMMA)(PARAMS, X))


# Transformations.

EXPLAIN = rp.explain(mlp, GAMMA, target=1)


def test_jit():
    equal(jax.jit(EXPLAIN)(PARAMS, X), EXPLAIN(PARAMS, X))


def test_vmap_over_examples():
    equal(jax.vmap(EXPLAIN, (None, 0))(PARAMS, X), EXPLAIN(PARAMS, X))


def test_vmap_over_targets():
    every = jax.vmap(lambda t: rp.explain(mlp, GAMMA, target=t)(PARAMS, X))(jnp.arange(4))
    for t in range(4):
        equal(every[t], rp.explain(mlp, GAMMA, target=t)(PARAMS, X))


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        (rp.Gamma, [0.0, 0.1, 10.0]),
        (rp.Epsilon, [1e-9, 0.1, 1.0]),
        (lambda beta: rp.AlphaBeta(1 + beta, beta), [0.0, 0.5, 2.0]),
    ],
    ids=["gamma", "epsilon", "beta"],
)
def test_vmap_over_a_hyper_parameter(rule, values):
    swept = jax.jit(jax.vmap(lambda v: rp.explain(mlp, rule(v))(PARAMS, X)))(jnp.array(values))
    for value, relevance in zip(values, swept, strict=True):
        equal(relevance, rp.explain(mlp, rule(value))(PARAMS, X), rtol=1e-9)


def test_vmap_over_models():
    stacked = jax.tree.map(lambda a: jnp.stack([a, -0.5 * a]), PARAMS)
    both = jax.vmap(EXPLAIN, (0, None))(stacked, X)
    equal(both[1], EXPLAIN(jax.tree.map(lambda a: -0.5 * a, PARAMS), X))


def test_a_vmapped_model_is_explained_as_the_batched_one():
    def single(params, x):
        return mlp(params, x[None])[0]

    batched = jax.vmap(single, (None, 0))
    for rule in (GAMMA, rp.AlphaBeta(), rp.Flat(), rp.WSquare(), rp.ZBox(-3.0, 3.0)):
        equal(rp.explain(batched, rule)(PARAMS, X), rp.explain(mlp, rule)(PARAMS, X))


def central_difference(f, x, direction, step=1e-5):
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


@pytest.mark.parametrize("rule", [rp.Epsilon(0.1), GAMMA, rp.AlphaBeta(2.0, 1.0), rp.ZBox(-3.0, 3.0)], ids=str)
def test_grad_jvp_and_jacobians_of_an_explanation_see_its_true_dependence(rule):
    def smooth(params, x):
        return dense(params["out"], jnp.tanh(dense(params["hidden"], x)))

    weigh = jax.random.normal(KEYS[5], X.shape)

    def score(x):
        return (weigh * rp.explain(smooth, rule, target=1)(PARAMS, x)).sum()

    x, direction = X[:1], jnp.cos(jnp.arange(6.0))[None]
    weigh = weigh[:1]
    expected = central_difference(score, x, direction)
    np.testing.assert_allclose((jax.grad(score)(x) * direction).sum(), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(score, (x,), (direction,))[1], expected, rtol=1e-5)
    jacobian = jax.jacrev(rp.explain(smooth, rule, target=1), argnums=1)(PARAMS, x)
    forward = jax.jacfwd(rp.explain(smooth, rule, target=1), argnums=1)(PARAMS, x)
    equal(jacobian, forward, rtol=1e-9)
    np.testing.assert_allclose(jnp.einsum("ij,ijkl,kl->", weigh, jacobian, direction), expected, rtol=1e-5)


def test_grad_with_respect_to_parameters_and_hyper_parameters():
    def score(w, gamma):
        params = {**PARAMS, "hidden": {**PARAMS["hidden"], "w": w}}
        return (rp.explain(mlp, rp.Gamma(gamma), target=0)(params, X) ** 2).sum()

    w, gamma = PARAMS["hidden"]["w"], jnp.asarray(0.3)
    dw, dgamma = jax.grad(score, (0, 1))(w, gamma)
    np.testing.assert_allclose(
        (dw * jnp.sin(w)).sum(), central_difference(lambda w: score(w, gamma), w, jnp.sin(w), 1e-6), rtol=1e-5
    )
    np.testing.assert_allclose(dgamma, central_difference(lambda g: score(w, g), gamma, jnp.ones(()), 1e-5), rtol=1e-5)


def test_inside_and_outside_of_checkpoint():
    plain = EXPLAIN(PARAMS, X)
    equal(jax.checkpoint(EXPLAIN)(PARAMS, X), plain)
    equal(rp.explain(jax.checkpoint(mlp), GAMMA, target=1)(PARAMS, X), plain)
    equal(jax.grad(lambda x: jax.checkpoint(EXPLAIN)(PARAMS, x).sum())(X), jax.grad(lambda x: EXPLAIN(PARAMS, x).sum())(X))


def test_donated_input():
    expected = EXPLAIN(PARAMS, X)
    equal(jax.jit(EXPLAIN, donate_argnums=1)(PARAMS, X + 0.0), expected)


def test_sharded_input_and_parameters():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    x = jnp.concatenate([X, X[:3]])
    expected = EXPLAIN(PARAMS, x)
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    params = {
        "hidden": {"w": put(PARAMS["hidden"]["w"], None, "model"), "b": put(PARAMS["hidden"]["b"], "model")},
        "out": {"w": put(PARAMS["out"]["w"], "model", None), "b": put(PARAMS["out"]["b"])},
    }
    relevance = jax.jit(EXPLAIN)(params, put(x, "data", None))
    equal(relevance, expected)
    assert relevance.sharding.spec[0] == "data"


def test_closed_over_arrays_of_every_sort():
    expected = EXPLAIN(PARAMS, X)
    as_numpy = jax.tree.map(np.asarray, PARAMS)
    equal(rp.explain(lambda x: mlp(PARAMS, x), GAMMA, target=1)(X), expected)
    equal(rp.explain(lambda x: mlp(as_numpy, x), GAMMA, target=1)(X), expected)
    traced = jax.jit(lambda params, x: rp.explain(lambda x: mlp(params, x), GAMMA, target=1)(x))
    equal(traced(PARAMS, X), expected)
    gradient = jax.grad(lambda params: rp.explain(lambda x: mlp(params, x), GAMMA, target=1)(X).sum())(PARAMS)
    equal(gradient, jax.grad(lambda params: EXPLAIN(params, X).sum())(PARAMS))


def test_what_a_function_closes_over_is_read_at_every_call():
    scale = {"value": jnp.ones(())}
    explain = rp.explain(lambda x: x * scale["value"], None)
    equal(explain(X), X)
    scale["value"] = 2 * jnp.ones(())
    equal(explain(X), 2 * X)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1), (jnp.float16, 0.02)],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("rule", [rp.Epsilon(), GAMMA, rp.AlphaBeta(), rp.Flat(), rp.ZBox(-3.0, 3.0)], ids=str)
def test_narrow_dtypes_keep_their_dtype_and_agree(dtype, tolerance, rule):
    params, x = jax.tree.map(lambda a: a.astype(dtype), (PARAMS, X))
    wide_params, wide_x = jax.tree.map(lambda a: a.astype(jnp.float64), (params, x))
    rules = [(rp.first(), rule), ("affine", rp.Gamma())]
    relevance = rp.explain(mlp, rules, target=1)(params, x)
    expected = rp.explain(mlp, rules, target=1)(wide_params, wide_x)
    assert relevance.dtype == dtype
    error = np.linalg.norm(np.asarray(relevance, np.float64) - expected) / np.linalg.norm(expected)
    assert error < tolerance


def test_an_empty_batch_has_empty_relevance():
    for rule in (rp.Epsilon(), rp.Gamma(), rp.AlphaBeta(), rp.Flat(), rp.WSquare(), rp.ZBox(-1.0, 1.0)):
        assert rp.explain(mlp, rule)(PARAMS, X[:0]).shape == (0, 6)


def test_plan_computes_nothing_and_takes_shapes():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (PARAMS, X))
    plan = rp.plan(mlp, GAMMA)(*shapes)
    assert [entry.layer.path for entry in plan if entry.layer.kind == "dense"] == ["hidden/w", "out/w"]
