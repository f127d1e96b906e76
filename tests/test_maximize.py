"""`relprop.maximize`: closed-form maximisers, laws of the loop, and what happens when something goes wrong."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import relprop as rp
from relprop.maximization import L2, Code, ForEach, Pixel, Several

RNG = np.random.default_rng(0)
PEAK = jnp.asarray(RNG.normal(size=5))
HESSIAN = jnp.diag(jnp.asarray([0.5, 1.0, 1.0, 2.0, 3.0]))
W = jnp.asarray(RNG.normal(size=(4, 5)))
SGD = optax.sgd(0.1)


def quadratic(x):
    return -0.5 * (x - PEAK) @ HESSIAN @ (x - PEAK)


def unit(x, i):
    """A saturating unit for each row of W."""
    return jnp.tanh(W[i] @ x)


def plus(i):
    return 1.0 + jnp.asarray(i, float)


def box(x):
    return optax.projections.projection_box(x, -1.0, 1.0)


def ascend(objective=quadratic, parametrisation=None, optimizer=SGD, steps=20, **options):
    start = jnp.zeros(5) if parametrisation is None else parametrisation
    return rp.maximize(objective, start, optimizer, steps, **options)


# Closed forms


@pytest.mark.parametrize("name", ["adam", "sgd", "lbfgs", "scheduled"])
def test_a_quadratic_reaches_its_maximiser(name):
    optimizer = {
        "adam": optax.adam(0.05),
        "sgd": optax.sgd(0.2),
        "lbfgs": optax.lbfgs(),
        "scheduled": optax.chain(optax.clip_by_global_norm(5.0), optax.adam(optax.cosine_decay_schedule(0.1, 600))),
    }[name]
    found = ascend(optimizer=optimizer, steps=30 if name == "lbfgs" else 600)
    assert_allclose(found.input, PEAK, atol=1e-4)
    assert_allclose(found.value, 0, atol=1e-6)


def test_the_default_optimiser_is_adam():
    assert_array_equal(rp.maximize(quadratic, jnp.zeros(5)).input, ascend(optimizer=optax.adam(0.05), steps=500).input)


def test_a_linear_objective_in_a_box_gives_the_signs_of_its_weights():
    found = ascend(lambda x: W[0] @ x, steps=200, projection=box)
    assert_allclose(found.input, np.sign(W[0]), atol=1e-12)


def test_l2_moves_the_maximiser_to_a_weighted_mean():
    # of -1/2 h (x - p)^2 - s (x - c)^2 it is (h p + 2 s c) / (h + 2 s)
    centre, strength, h = jnp.ones(5), 0.7, jnp.diag(HESSIAN)
    found = ascend(log_prior=L2(strength, centre), steps=300)
    assert_allclose(found.input, (h * PEAK + 2 * strength * centre) / (h + 2 * strength), atol=1e-10)
    assert_allclose(found.value, quadratic(found.input), rtol=1e-12)
    assert_allclose(found.log_prior, -strength * jnp.sum((found.input - centre) ** 2), rtol=1e-12)


def test_several_priors_are_added():
    both = ascend(log_prior=[L2(0.3), L2(0.4)])
    assert_allclose(both.input, ascend(log_prior=L2(0.7)).input, rtol=1e-12)


def test_a_code_is_optimised_instead_of_the_input():
    # x = A z with an invertible A: the same maximiser, and z = A^-1 x
    A = jnp.eye(5) + 0.1 * jnp.asarray(RNG.normal(size=(5, 5)))
    found = ascend(parametrisation=Code(lambda z: A @ z, 5), steps=800)
    assert_allclose(found.input, PEAK, atol=1e-6)
    assert_allclose(A @ found.code, found.input, rtol=1e-12)


def test_the_prior_and_the_bounds_of_a_code():
    # of z - s z^2 the maximiser is 1 / (2 s), and the bound where it is less
    found = ascend(jnp.sum, Code(lambda z: z, 3, prior=L2(0.25), low=-1.0, high=jnp.array([1.0, 3.0, 1.5])), steps=500)
    assert_allclose(found.code, [1, 2, 1.5], atol=1e-8)
    assert_allclose(found.log_prior, -0.25 * jnp.sum(found.code**2), rtol=1e-12)
    near = ascend(jnp.sum, Code(lambda z: z, jnp.zeros(3), prior=L2(0.25, jnp.ones(3))), steps=500)
    assert_allclose(near.code, 3 * jnp.ones(3), atol=1e-8)  # z - (z - 1)^2 / 4


def test_any_pytree_stands_for_itself():
    found = ascend(
        lambda x: -jnp.sum((x["a"] - 1) ** 2) - (x["b"] + 2) ** 2, {"a": jnp.zeros(2), "b": jnp.zeros(())}, steps=100
    )
    assert_allclose(found.input["a"], [1, 1], atol=1e-8)
    assert_allclose(found.input["b"], -2, atol=1e-8)


def test_any_object_with_init_and_decode_is_a_parametrisation():
    class Square:
        def init(self, key):
            return jax.random.uniform(key, (5,), minval=1.0, maxval=2.0)

        def decode(self, code):
            return code**2

    found = ascend(lambda x: -jnp.sum((x - 4.0) ** 2), Square(), optax.sgd(0.01), 300)
    assert_allclose(found.input, 4 * np.ones(5), atol=1e-6)


# The trajectory


def test_values_before_each_step():
    found = ascend(lambda x: -jnp.sum(x**2), jnp.ones(1), optax.sgd(0.25), steps=3, log_prior=L2(0.0), chunk=2)
    assert_allclose(found.trajectory, [-1, -0.25, -0.0625])  # each step halves x
    assert_allclose(found.value, -0.015625)
    assert found.steps == 3
    assert found.finite


def test_scores_are_values_and_priors():
    found = ascend(log_prior=L2(0.5), steps=10)
    assert_allclose(found.scores[0], quadratic(jnp.zeros(5)), rtol=1e-12)
    assert (found.scores < found.trajectory)[1:].all()
    assert (jnp.diff(found.scores) > 0).all()


@pytest.mark.parametrize("chunk", [1, 7, 10, 64])
def test_chunks_change_nothing(chunk):
    noise = lambda key, x: x + 0.1 * jax.random.normal(key, x.shape)  # noqa: E731
    run = functools.partial(ascend, transforms=[noise], steps=23, key=jax.random.key(3))
    one, other = run(chunk=23), run(chunk=chunk)
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-13), one, other)
    assert other.trajectory.shape == (23,)


def test_the_callback_sees_what_there_is_after_each_chunk_and_may_end_it():
    seen = []

    def callback(found):
        seen.append((int(found.steps), float(found.value), found.trajectory.shape))
        return len(seen) == 3

    found = ascend(steps=100, chunk=10, callback=callback)
    assert [steps for steps, *_ in seen] == [10, 20, 30]
    assert seen[0][2] == (10,)
    assert found.steps == 30
    assert float(found.value) == seen[-1][1]
    assert seen[0][1] < seen[1][1] < seen[2][1]


def test_an_interrupt_returns_what_there_is():
    def callback(found):
        if found.steps == 20:
            raise KeyboardInterrupt

    with pytest.warns(rp.StoppedWarning, match="interrupted after 20 of 100 steps"):
        found = ascend(steps=100, chunk=10, callback=callback)
    whole = ascend(steps=20)
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-13), found, whole)


def test_a_callback_may_return_anything_true():
    assert ascend(chunk=5, callback=lambda found: found.value > -10.0).steps == 5
    assert ascend(chunk=5, callback=lambda found: found.value > 10.0).steps == 20


def test_there_is_no_bar_without_a_terminal_or_tqdm(monkeypatch, capsys):  # not capfd: XLA writes there, too
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ascend(steps=2)
    monkeypatch.setattr("sys.stderr", None)
    ascend(steps=2)
    assert capsys.readouterr().err == ""


def test_a_bar_counts_the_steps(capfd):
    ascend(steps=30, progress=True, chunk=10)
    assert re.search(r"maximize.*30\.0/30\.0", capfd.readouterr().err)


# Many at once


def test_each_item_is_the_run_of_its_own():
    # start, prior, optimiser, transform and projection may differ, too
    options = {
        "parametrisation": lambda i: Pixel(0.1 * W[i], noise=0.1),
        "optimizer": lambda i: optax.sgd(0.1 * (plus(i))),
        "log_prior": lambda i: L2(0.01, W[i]),
        "projection": lambda i: lambda x: optax.projections.projection_box(x, -plus(i), 1.0),
    }
    items = jnp.arange(3)
    transform = lambda i: lambda key, x: x + 0.01 * (plus(i)) * jax.random.normal(key, x.shape)  # noqa: E731
    together = ascend(unit, each=items, transforms=[ForEach(transform)], **{k: ForEach(v) for k, v in options.items()})
    for i in range(3):
        made = {name: make(items[i]) for name, make in options.items()}
        alone = ascend(lambda x, i=i: unit(x, i), transforms=[transform(items[i])], **made)
        jax.tree.map(functools.partial(assert_allclose, rtol=1e-10), jax.tree.map(lambda a, i=i: a[i], together), alone)
    assert together.trajectory.shape == (3, 20)
    assert abs(together.input[0] - together.input[1]).max() > 0.1


def test_vmap_is_each():
    def one(i):
        return ascend(lambda x: unit(x, i), Pixel(jnp.zeros(5), 0.1), log_prior=L2(0.1 * (plus(i))))

    found = jax.jit(jax.vmap(one))(jnp.arange(4))
    prior = ForEach(lambda i: L2(0.1 * (plus(i))))
    jax.tree.map(
        functools.partial(assert_allclose, rtol=1e-10),
        found,
        ascend(unit, Pixel(jnp.zeros(5), 0.1), log_prior=prior, each=jnp.arange(4)),
    )


def test_vmap_over_keys_and_over_the_learning_rate():
    keys = jax.random.split(jax.random.key(0), 3)
    run = functools.partial(ascend, parametrisation=Pixel(jnp.zeros(5), 1.0))
    found = jax.vmap(lambda key: run(key=key))(keys)
    assert_allclose(found.input[1], run(key=keys[1]).input, rtol=1e-10)
    assert abs(found.input[0] - found.input[1]).max() > 1e-3
    rates = jax.vmap(lambda rate: ascend(optimizer=optax.sgd(rate)).value)(jnp.array([0.01, 0.1]))
    assert_allclose(rates[1], ascend().value, rtol=1e-10)
    assert rates[0] < rates[1]


def test_the_best_restart_is_returned():
    # two hills, the higher one to the right of 0
    def hills(x):
        return jnp.sum(jnp.exp(-((x + 2) ** 2)) + 2 * jnp.exp(-((x - 2) ** 2)))

    options = {"parametrisation": Pixel(jnp.zeros(1), 3.0), "steps": 200, "key": jax.random.key(5)}
    found = ascend(hills, **options, restarts=8)
    keys = jax.random.split(jax.random.key(5), 8)
    values = [float(ascend(hills, **options | {"key": key}).value) for key in keys]
    assert_allclose(found.value, max(values), rtol=1e-10)
    assert_allclose(found.input, [2], atol=1e-4)
    assert min(values) < 1.5
    assert found.trajectory.shape == (200,)


def test_restarts_of_each_item():
    one = lambda i: ascend(lambda x: unit(x, i), Pixel(jnp.zeros(5), 1.0), restarts=3)  # noqa: E731
    found = ascend(unit, Pixel(jnp.zeros(5), 1.0), restarts=3, each=jnp.arange(4))
    for i in range(4):
        jax.tree.map(functools.partial(assert_allclose, rtol=1e-10), jax.tree.map(lambda a, i=i: a[i], found), one(i))


def test_the_same_key_gives_the_same_result():
    run = functools.partial(ascend, parametrisation=Pixel(jnp.zeros(5), 1.0), restarts=2)
    jax.tree.map(assert_array_equal, run(key=jax.random.key(1)), run(key=jax.random.key(1)))
    assert abs(run(key=jax.random.key(1)).input - run(key=jax.random.key(2)).input).max() > 1e-4
    assert_array_equal(run().input, run(key=jax.random.key(0)).input)
    assert_array_equal(run().input, run(key=jax.random.PRNGKey(0)).input)


def test_transforms_have_new_keys_at_each_step_and_the_prior_does_not_see_them():
    shift = lambda key, x: x + jax.random.normal(key, ())  # noqa: E731
    seen = ascend(jnp.sum, jnp.zeros(1), optax.sgd(0.0), steps=50, transforms=[shift, shift], log_prior=L2(1.0))
    assert len(np.unique(np.asarray(seen.trajectory))) == 50
    assert 1 < np.var(seen.trajectory) < 4  # two independent unit normals
    assert_allclose(seen.scores, seen.trajectory, rtol=1e-12)
    assert_allclose(seen.value, 0, atol=1e-12)


def test_several_inputs_differ_under_diversity():
    def ring(x):  # best anywhere on the unit circle
        return -jnp.sum((jnp.sum(x**2, -1) - 1) ** 2)

    start = Several(Pixel(jnp.array([0.5, 0.0]), 0.01), 3)
    alike = ascend(ring, start, optax.sgd(0.05), 3000)
    apart = ascend(ring, start, optax.sgd(0.05), 3000, log_prior=rp.maximization.Diversity(0.5))
    assert alike.input.shape == (3, 2)

    def similarity(found):
        x = found.input / jnp.linalg.norm(found.input, axis=1, keepdims=True)
        return (x @ x.T)[jnp.triu_indices(3, 1)]

    assert similarity(alike).min() > 0.99
    assert_allclose(similarity(apart), [-0.5, -0.5, -0.5], atol=1e-3)  # three points, 120 degrees apart
    assert apart.value > -0.01


# What goes wrong


class Complex(rp.maximization.Parametrisation):
    def init(self, key):
        return jnp.zeros(2, complex)

    def decode(self, code):
        return code.real


def falls_off(x):
    return jnp.sum(jnp.where(x > 2.5, jnp.nan, x))


def test_what_is_not_finite_ends_the_run_at_the_last_finite_state():
    # 0, 1, 2, 3: the third step leads to where there is no value
    with pytest.warns(rp.StoppedWarning, match=r"not finite at step 3\. The last finite state.*learning rate"):
        found = ascend(falls_off, jnp.zeros(1), optax.sgd(1.0), steps=100)
    assert_array_equal(found.input, [2])
    assert (found.steps, found.value, found.finite) == (2, 2, False)
    assert_array_equal(found.trajectory, [0, 1, 2, np.nan])


def test_a_value_that_is_not_finite_after_the_last_step():
    with pytest.warns(rp.StoppedWarning, match=r"not finite at step 3"):
        found = ascend(falls_off, jnp.zeros(1), optax.sgd(1.0), steps=3)
    assert_array_equal(found.input, [2])


def test_what_is_not_finite_from_the_start():
    with pytest.warns(rp.StoppedWarning, match="not finite at the start"):
        found = ascend(lambda x: jnp.sum(x) * jnp.nan, jnp.ones(2))
    assert found.steps == 0
    assert_array_equal(found.input, [1, 1])


def test_a_gradient_that_is_not_finite_ends_the_run_too():
    with pytest.warns(rp.StoppedWarning, match="gradient is not finite at step 1"):
        found = ascend(lambda x: jnp.sum(jnp.sqrt(x)), jnp.zeros(2))
    assert_array_equal(found.input, [0, 0])


def test_other_items_go_on():
    run = functools.partial(ascend, lambda x, i: jnp.sum(jnp.where(i == 1, jnp.nan, -((x - 1.0) ** 2))), jnp.zeros(1))
    with pytest.warns(rp.StoppedWarning, match=r"start \(1 of 3 runs, the first is item 1\)"):
        found = run(steps=100, each=jnp.arange(3))
    assert_array_equal(found.steps, [100, 0, 100])
    assert_array_equal(found.finite, [True, False, True])
    assert_allclose(found.input[:, 0], [1, 0, 1], atol=1e-6)
    assert jnp.isnan(found.trajectory[1]).all()


def test_a_restart_that_is_not_finite_is_not_the_best():
    with pytest.warns(rp.StoppedWarning, match="restart"):
        found = ascend(falls_off, Pixel(jnp.zeros(1), 3.0), optax.sgd(1e-3), steps=3, restarts=16)
    assert found.finite
    assert 0 < found.value < 2.5


def test_of_restarts_that_all_stopped_the_best_finite_state_is_returned():
    run = functools.partial(ascend, falls_off, optimizer=optax.sgd(0.3))
    keys = jax.random.split(jax.random.key(0), 4)
    with pytest.warns(rp.StoppedWarning):
        alone = [run(parametrisation=Pixel(jnp.full(1, 2.0), 1.0), key=key).value for key in keys]
    with pytest.warns(rp.StoppedWarning, match=r"4 of 4 runs.*last finite state"):
        found = run(parametrisation=Pixel(jnp.full(1, 2.0), 1.0), key=jax.random.key(0), restarts=4)
    assert_allclose(found.value, np.nanmax(alone), rtol=1e-12)
    assert np.isnan(alone).any()


def test_an_interrupt_is_said_beside_what_is_not_finite():
    def callback(found):
        raise KeyboardInterrupt

    with pytest.warns(rp.StoppedWarning, match=r"interrupted after 5 of 20.*not finite"):
        ascend(lambda x, i: jnp.where(i == 0, jnp.nan, 1.0) * x.sum(), each=jnp.arange(2), chunk=5, callback=callback)


def test_nothing_is_nan_that_has_to_be_none():
    with jax.debug_nans(True):
        ascend(steps=23, chunk=10)


def test_under_jit_nothing_is_said_but_it_is_there_to_see():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = jax.jit(lambda start: ascend(falls_off, start, optax.sgd(1.0), 100))(jnp.zeros(1))
    assert (found.steps, found.value, found.finite) == (2, 2, False)
    assert found.trajectory.shape == (100,)
    assert jnp.isnan(found.trajectory[4:]).all()


ERRORS = {
    "a vector": (lambda: ascend(lambda x: W @ x), r"returns float64\[4\], but has to return one real number"),
    "an integer": (lambda: ascend(lambda x: jnp.argmax(x)), r"returns int64\[\]"),
    "a pair": (lambda: ascend(lambda x: (x[0], x[1])), r"\(float64\[\], float64\[\]\), but has to return one real number"),
    "no objective": (lambda: ascend(3.0), r"objective: 3\.0 is not a function"),
    "no optimiser": (lambda: ascend(optimizer=0.05), r"optimizer=0\.05 has to be an optax transformation"),
    "no prior": (lambda: ascend(log_prior=[L2(), 2.0]), r"log_prior: 2\.0 is not a function"),
    "integers": (lambda: ascend(parametrisation=jnp.arange(3)), r"holds int64.*has to be floating-point"),
    "nothing": (lambda: ascend(parametrisation={}), r"holds no arrays"),
    "a number as key": (lambda: ascend(key=3), r"key=3 is a number.*jax\.random\.key\(3\)"),
    "a tuple of one": (lambda: ascend(lambda x: (x.sum(),)), r"but has to return one real number"),
    "a callback that is no function": (lambda: ascend(callback=3), r"callback=3 is not a function"),
    "a callback that returns a vector": (
        lambda: ascend(callback=lambda found: found.input > 0),
        r"bool\[5\].*one truth value",
    ),
    "a complex code": (
        lambda: ascend(jnp.sum, Complex()),
        r"code is complex128\[2\], but has to be real",
    ),
    "no steps": (lambda: ascend(steps=0), r"steps=0 has to be an integer, 1 at least"),
    "steps that are no integer": (lambda: ascend(steps=1.5), r"steps=1\.5"),
    "no restarts": (lambda: ascend(restarts=0), r"restarts=0"),
    "no chunk": (lambda: ascend(chunk=0), r"chunk=0"),
    "items of different number": (
        lambda: ascend(unit, each=(jnp.arange(2), jnp.arange(3))),
        r"common first axis.*\(2,\).*\(3,\)",
    ),
    "no items": (lambda: ascend(unit, each=jnp.arange(0)), r"one item at least"),
    "ForEach without items": (lambda: ascend(log_prior=ForEach(L2)), r"give the items, each="),
    "a projection to another form": (
        lambda: ascend(projection=lambda x: x[:2]),
        r"float64\[2\].*float64\[5\].*keep its form",
    ),
    "a callback under jit": (
        lambda: jax.jit(lambda x: ascend(parametrisation=x, callback=print))(jnp.zeros(5)),
        r"callback.*under a transformation",
    ),
    "a centre of another shape": (
        lambda: ascend(log_prior=L2(1.0, jnp.ones(3))),
        r"centre has the shape \(3,\)|Incompatible",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_teach(name):
    call, message = ERRORS[name]
    with pytest.raises(rp.ArgumentError, match=message):
        call()


def test_an_error_of_the_objective_says_what_it_was_called_with():
    with pytest.raises(TypeError, match="contracting dimensions") as failed:
        ascend(lambda x, i: jnp.sum(x @ jnp.ones((4, 2))) + i, each=jnp.arange(2))
    assert "called the objective with float64[5] and the item int64[]" in "".join(failed.value.__notes__)
    with pytest.raises(TypeError) as failed:
        ascend(transforms=[lambda x: x])
    assert "called the transform with float64[5]" in "".join(failed.value.__notes__)
    crop = rp.maximization.transforms.crop(4)
    with pytest.raises(TypeError) as failed:  # the value at the end is of the whole image
        ascend(lambda x: x.reshape(-1) @ jnp.ones(16), jnp.zeros((6, 6, 1)), transforms=[crop])
    assert "without transforms, so it has to take that, too" in "".join(failed.value.__notes__)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="learning_rate"):
        ascend(learning_rate=0.1)


# What is compiled, and derivatives of it


def test_derivatives_of_the_maximiser():
    # of -sum (x - 1)^2 - s x^2 it is 1 / (1 + s), and its derivative -1 / (1 + s)^2
    def maximiser(s):
        return ascend(lambda x: -jnp.sum((x - 1) ** 2), jnp.zeros(1), steps=200, log_prior=L2(s)).input[0]

    assert_allclose(jax.grad(maximiser)(0.5), -1 / 1.5**2, rtol=1e-8)
    assert_allclose(jax.jvp(maximiser, (0.5,), (1.0,)), (1 / 1.5, -1 / 1.5**2), rtol=1e-8)


def hlo(count):
    weights = jnp.asarray(RNG.normal(size=(64, 64)), jnp.float32)

    def objective(x, i):
        return jax.nn.log_softmax(jnp.tanh(x @ weights) @ weights)[i]

    run = lambda items: ascend(objective, jnp.zeros(64, jnp.float32), steps=10, each=items)  # noqa: E731
    return jax.jit(run).lower(jnp.arange(count)).compile().as_text()


def test_the_compiled_loop_has_no_transfer_to_the_host():
    text = hlo(10)
    assert "while" in text
    assert not re.search(r"infeed|outfeed|\bsend\b|\brecv\b|callback|host_compute|MoveToHost", text)


def test_items_share_one_program():
    # as many products as for one item, only larger
    dots = lambda text: len(re.findall(r"\bdot\(|custom-call.*matmul|__onednn", text))  # noqa: E731
    assert dots(hlo(1)) == dots(hlo(10)) > 0


def test_what_the_objective_closes_over_is_no_constant():
    from relprop.jaxprs import hoisted

    weights = jnp.asarray(RNG.normal(size=(100, 5)))
    run, captured = hoisted(
        lambda x: jax.lax.scan(lambda c, _: (c + (weights @ c).sum(), None), x, length=2)[0], jnp.ones(5)
    )
    text = jax.jit(run).lower(captured, jnp.ones(5)).as_text()
    assert [c.shape for c in captured] == [(100, 5)]
    assert len(text) < 10_000
    assert 'dense<"0x' not in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_single_and_half_precision_are_kept(dtype):
    peak = PEAK.astype(dtype)
    found = ascend(lambda x: -jnp.sum((x - peak) ** 2), jnp.zeros(5, dtype), log_prior=L2(0.0), steps=50)
    assert found.input.dtype == found.value.dtype == found.trajectory.dtype == dtype
    assert_allclose(found.input.astype(float), peak.astype(float), atol=1e-4 if dtype == jnp.float32 else 2e-2)
