"""Every model of the zoo is planned, explained, jitted, vmapped, stripped of its names, and audited."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import source_info_util
from zoo import ZOO

import relprop as rp
from relprop.jaxprs import REMAT, Environment, open_program, read, scan_groups

# The families of rules that every model is explained under, and those that its tags add.
FAMILIES = {
    "defaults": lambda: None,
    "by kind": lambda: [
        (rp.optional("conv"), rp.Gamma()),
        (rp.optional("affine"), rp.Epsilon()),
        (rp.optional("add"), rp.ResidualGamma()),
        (rp.optional("gate"), rp.SignalTakeAll(hold="gate")),
    ],
    "alpha beta": lambda: [(rp.optional("affine"), rp.AlphaBeta())],
}
TAGGED = {
    "attention": {"AttnLRP": lambda: rp.presets.attn_lrp(), "CP-LRP": lambda: rp.presets.cp_lrp()},
    "recurrent": {"LSTM": lambda: rp.presets.lstm()},
    "state space": {"Mamba": lambda: rp.presets.mamba()},
}
TOLERANCES = {"bfloat16": 0.05, "float32": 1e-5}
TOLERANCE = 1e-10  # in float64
# Most of the time would be spent on optimising programs that run for microseconds. Level 0 would halve it once more, but
# there XLA's CPU backend gives NaN for `instance_norm_nnx`, where level 1, the default and single operations do not.
COMPILER = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
# Left to `pytest -m slow`: the ones that take longest and whose mechanisms others have, too.
HEAVY = set(
    "stacked_lstm_linen bidirectional_linen conv_lstm_linen lstm_nnx lstm_equinox gru_equinox lstm_with_masked_steps "
    "mamba_by_associative_scan transformer_bfloat16 vision_transformer token_classifier_linen token_classifier_one_hot "
    "causal_decoder_linen multi_query_attention grouped_query_attention attention_is_causal attention_with_mask "
    "rotary_positions relative_position_bias kernel_attention unet_bilinear".split()
)
# A plain run takes every other of the rest, and `pytest -m slow` all that it leaves out.
LIGHT = set(list(ZOO)[::2]) - HEAVY
# Explained without jit in a plain run. Operation by operation, each is compiled on its own.
EAGER = ["mlp", "lstm_by_hand"]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is built, and what the tests ask of it."""

    fn: object
    params: object
    x: jax.Array
    target: object
    families: dict
    tolerance: float

    def explain(self, rules, fn=None):
        return rp.explain(fn or self.fn, rules, target=self.target)


@functools.cache
def subject(name):
    model = ZOO[name]
    fn, params, x = model.build()
    families = {family: rules() for family, rules in FAMILIES.items()}
    for tag in sorted(model.tags & TAGGED.keys()):
        families |= {family: rules() for family, rules in TAGGED[tag].items()}
    tolerance = next((value for tag, value in TOLERANCES.items() if tag in model.tags), TOLERANCE)
    return Subject(fn, params, x, model.target, families, tolerance)


@pytest.fixture
def promotion(name):
    """JAX's default promotion where the model's library needs it; strict promotion, as elsewhere, where it does not."""
    with contextlib.ExitStack() as stack:
        if ZOO[name].library != "jax" or "float32" in ZOO[name].tags:
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        yield


def assert_close(got, want, tolerance, message):
    """Equal to within `tolerance` of the largest element."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, message
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max(), err_msg=message)


def stripped(fn, *args):
    """`fn` as a flat function of single operations: no `jit`, no `custom_jvp`, no scopes, no source lines."""
    program = open_program(jax.make_jaxpr(fn)(*args))
    shapes = jax.eval_shape(fn, *args)

    def flat(*args):
        outputs = run(program, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return flat


def run(program, operands):
    env = Environment({})
    env.update(zip(program.inputs, operands, strict=True))
    for eqn in program.equations:
        env.update(zip(eqn.outputs, emit(eqn, [read(env, v) for v in eqn.inputs]), strict=True))
    return [jnp.asarray(read(env, v), v.dtype) for v in program.outputs]


def emit(eqn, operands):
    """The outputs of an equation without its names; loops, branches and checkpoints around stripped bodies."""
    if eqn.name == "scan":
        body = open_program(eqn.params["jaxpr"])
        consts, carry = scan_groups(eqn.params)
        after = consts + carry

        def step(carried, scanned):
            outputs = run(body, [*operands[:consts], *carried, *scanned])
            return outputs[:carry], outputs[carry:]

        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        carried, stacked = lax.scan(step, operands[consts:after], operands[after:], **options)
        return [*carried, *stacked]
    if eqn.name == "cond":
        branches = [functools.partial(run, open_program(branch)) for branch in eqn.params["branches"]]
        return lax.switch(operands[0], [lambda *xs, branch=branch: branch(xs) for branch in branches], *operands[1:])
    if eqn.name in REMAT:
        body = open_program(eqn.params["jaxpr"])
        return jax.checkpoint(lambda *xs: run(body, xs), prevent_cse=eqn.params["prevent_cse"])(*operands)
    return dataclasses.replace(eqn, source=source_info_util.new_source_info()).evaluate(*operands)


def names_in(program):
    """The names of everything that `program` and its bodies call, and the scopes they are in."""
    bodies = [body for eqn in program.equations for body in bodies_of(eqn)]
    here = {text for eqn in program.equations for text in (eqn.name, eqn.scope, eqn.function) if text}
    return here.union(*map(names_in, bodies))


def bodies_of(eqn):
    jaxprs = [eqn.params["jaxpr"]] if eqn.name in {"scan", *REMAT} else eqn.params.get("branches", ())
    return map(open_program, jaxprs)


def study(subject, explained, closed, unnamed, vmapped):
    """Measures a model under families of rules, in one program: compiled once, and it shares the forward pass.

    `explained`, `closed`, `unnamed` and `vmapped` name the families whose relevance, audit, relevance of the stripped
    model and relevance under vmap are asked for.
    """
    fn, target, rules = subject.fn, subject.target, subject.families
    without_names = stripped(fn, subject.params, subject.x)

    def measure(params, x, xs):
        return {
            "relevance": {f: subject.explain(rules[f])(params, x) for f in explained},
            "audit": {f: rp.audit(fn, rules[f], target=target)(params, x) for f in closed},
            "without names": {f: subject.explain(rules[f], without_names)(params, x) for f in unnamed},
            "vmap": {f: jax.vmap(subject.explain(rules[f]), (None, 0))(params, xs) for f in vmapped},
        }

    return jax.jit(measure, compiler_options=COMPILER)


def check(subject, *families):
    """Relevance is finite, the audit closes, names do not matter, and vmap is a loop: for two inputs."""
    inputs = [subject.x, jnp.flip(subject.x, 0)]
    measure = study(subject, *families)
    measured = [measure(subject.params, x, jnp.stack(inputs)) for x in inputs]
    for found in measured:
        for family, relevance in found["relevance"].items():
            assert relevance.shape == subject.x.shape, family
            assert jnp.isfinite(relevance).all(), family
            assert jnp.abs(relevance).max() > 0, family
        for family, audit in found["audit"].items():
            assert_closes(audit, found["relevance"][family], subject.tolerance, family)
        for family, relevance in found["without names"].items():
            assert_close(relevance, found["relevance"][family], subject.tolerance, f"{family}: without names")
    for family, relevance in measured[0]["vmap"].items():
        looped = jnp.stack([found["relevance"][family] for found in measured])
        assert_close(relevance, looped, subject.tolerance, f"{family}: vmap")


def assert_closes(audit, relevance, tolerance, message):
    """What arrives at the input and what the layers absorb are the relevance of the output; causes stand where they can."""
    scale = tolerance * max(abs(float(audit.output)), *(abs(float(line.relevance_out)) for line in audit.lines))
    total = np.asarray(relevance, np.float64).sum()
    np.testing.assert_allclose(
        sum(audit.inputs.values()), total, rtol=0, atol=scale, err_msg=f"{message}: the audit's input"
    )
    np.testing.assert_allclose(audit.unaccounted, 0, atol=scale, err_msg=f"{message}: audit")
    for line in audit.lines:
        cause = {"softmax": "softmax", "attention": "softmax", "activation": "f(0)"}.get(line.kind)
        misplaced = [line.absorbed[c] for c in ("softmax", "f(0)", "fallback", "condition") if c != cause]
        np.testing.assert_allclose(misplaced, 0, atol=scale, err_msg=f"{message}: {line.name}")
        assert line.non_finite == 0, f"{message}: {line.name}"


def models(fast):
    """Parameters for every model of the zoo; those that are not `fast` are marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


@pytest.mark.parametrize("name", models(LIGHT))
def test_model(name, promotion):
    s = subject(name)
    plan = rp.plan(s.fn, s.families["by kind"], target=s.target)(s.params, s.x)
    assert len(plan) > 0
    assert len(str(plan).splitlines()) >= len(plan) + 2  # a header, a rule, a line per layer
    vmapped = [] if "no vmap" in ZOO[name].tags else ["by kind"]
    check(s, ["by kind"], ["by kind"], ["by kind"], vmapped)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_model_under_the_other_families(name, promotion):
    """Relevance and audit; that names do not matter to recognition has been seen under the first family."""
    s = subject(name)
    rest = [family for family in s.families if family != "by kind"]
    check(s, rest, rest, [], [])


@pytest.mark.parametrize(
    "name", [*EAGER, *(pytest.param(n, marks=pytest.mark.slow) for n in list(ZOO)[::4] if n not in EAGER)]
)
def test_jit_changes_nothing(name, promotion):
    s = subject(name)
    explain = s.explain(s.families["by kind"])
    assert_close(jax.jit(explain)(s.params, s.x), explain(s.params, s.x), s.tolerance, "jit")


@pytest.mark.parametrize("name", ["encoder_linen", "lstm_linen", "scan_over_layers", "switched_branch"])
def test_a_stripped_model_has_no_names(name, promotion):
    """Of the module's attributes, of functions under jit or of scopes nothing is left; loops and branches are there."""
    s = subject(name)
    before, after = (
        names_in(open_program(jax.make_jaxpr(fn)(s.params, s.x)))
        for fn in (s.fn, stripped(s.fn, s.params, s.x))
    )  # fmt: skip
    primitives = {name for name in before if name in after}
    assert before > after
    assert {"scan", "cond", *REMAT} & primitives == {"scan", "cond", *REMAT} & before
    assert not any("/" in name or name in ("softmax", "sigmoid", "relu", "gelu") for name in after)


# Models that compute the same function of the same parameters, each in its own way.
TWINS = [
    ("encoder_by_hand", "hand_written_softmax"),
    ("encoder_by_hand", "heads_by_vmap"),
    ("causal_decoder", "attention_is_causal"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), TWINS)
def test_relevance_does_not_depend_on_how_a_model_is_written(one, other, default_promotion):
    one, other = subject(one), subject(other)

    @functools.partial(jax.jit, compiler_options=COMPILER)
    def both(params, x):
        return {f: [s.explain(rules)(params, x) for s in (one, other)] for f, rules in one.families.items()}

    for family, (a, b) in both(one.params, one.x).items():
        assert_close(a, b, max(one.tolerance, other.tolerance), family)


def test_relevance_of_tokens_does_not_depend_on_how_they_are_embedded(default_promotion):
    """Under rules without a stabiliser: the product with one-hot rows is an affine layer, the gather is not."""
    gather, one_hot = subject("token_classifier_gather"), subject("token_classifier_one_hot")
    a, b = (jax.jit(s.explain(None), compiler_options=COMPILER)(gather.params, gather.x) for s in (gather, one_hot))
    assert_close(a, b, TOLERANCE, "embedding")


def test_the_zoo_covers_every_library_and_kind_of_layer():
    assert {model.library for model in ZOO.values()} == {"jax", "linen", "nnx", "equinox"}
