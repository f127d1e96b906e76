"""Evaluate a planned program with surrogates in the planned places. The rest is `jax.vjp`'s work.

Two environments go along: `env` holds values, whose cotangents are the coefficients `c`; `relatives` holds, for the
values that a rule like Flat needs them of, the perturbation `r` of `value * (1 + r)`, 0 everywhere, whose cotangents are
relevances. Calls are emitted again around their interpreted bodies.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import primitives as prims
from .errors import RuleError
from .jaxprs import REMAT, Constant, Environment, Equation, Value, manual_axes, read, scan_groups
from .layers import AffineView, LayerView
from .plan import Plan
from .structure import AFFINE_KINDS, Call, Layer, Plain, Section
from .surrogate import from_relative, quotient, reciprocal, scale_tangent, with_tangent
from .taps import Taps, marked


class Interpreter:
    """Evaluates sections under one assignment of rules.

    `plan` says which rule holds where, `registered` maps primitive names to linearisations. `taps` sees the relevance that
    passes, in and out of every layer and every plain equation, and may change it.
    """

    def __init__(self, plan: Plan, registered: Mapping[str, Any], taps: Taps):
        self.plan = plan
        self.rules = plan.rules
        self.needed = plan.needed
        self.registered = registered
        self.taps = taps

    def evaluate(self, section: Section, operands, relatives, asked=()):
        """The outputs of `section`, the relatives of those at the positions `asked`, and where relevance starts inside."""
        program = section.program
        env = Environment(section.producer)
        env.update(zip(program.inputs, operands, strict=True))
        rel: dict[Value, Any] = {
            v: r for v, r in zip(program.inputs, relatives, strict=True) if v in self.needed and r is not None
        }
        started: list[Any] = []
        for step in section.steps:
            if isinstance(step, Layer):
                self._layer(step, env, rel, started)
            elif isinstance(step, Call):
                self._call(step, env, rel, section.live, started)
            else:
                self._plain(step, env, rel, section.live)
        for eqn in section.effects:
            env.run(eqn)
        outputs = [jnp.asarray(read(env, v), v.dtype) if isinstance(v, Constant) else env[v] for v in program.outputs]
        return outputs, [rel.get(program.outputs[i], jnp.zeros_like(outputs[i])) for i in asked], started

    def _relative(self, rel, env, value: Value):
        """The relative of `value`: 0, without a tangent, where nothing explained is above it."""
        if value not in self.needed:
            return None
        return rel[value] if value in rel else jnp.zeros_like(env[value])

    def _layer(self, layer: Layer, env, rel, started):
        rule = self.rules[layer.index]
        needed = layer.output in self.needed
        inputs = [read(env, v) for v in layer.live]
        handed = [self._relative(rel, env, v) if needed or rule.is_relative else None for v in layer.live]
        inputs, handed = self.taps.into(layer, layer.live, inputs, handed)
        view = (AffineView if layer.kind in AFFINE_KINDS else LayerView)(layer, env)
        view.rectified = layer in self.plan.rectified and not self.taps.adds_relevance(layer)
        value = rule.value(view, view.input(inputs[0])) if view.kind in AFFINE_KINDS else None
        value = view.evaluate(*inputs) if value is None else value
        marks = self.taps.slot(layer, "marks")

        def surrogate(z, marks, *xs):
            marked_rule, seen, z = marked(marks, rule, view, z)
            return self._checked(marked_rule(seen, seen.input(xs[0]) if len(xs) == 1 else xs, z), layer, z)

        tangent = surrogate(value, marks, *inputs)
        out = value if tangent is None else with_tangent(value, tangent)
        part = None
        if rule.is_relative:
            marked_rule, _, _ = marked(marks, rule, view, value)
            r = view.input(handed[0], keep=prims.PURE_RESHAPE)
            part = marked_rule.relative(view, view.input(inputs[0]), value, r)
            from_r = from_relative(value, part)
            # Both parts count: the tangent of a sum whose value is that of the layer.
            out = from_r if tangent is None else with_tangent(value, tangent + from_r)
        passed = part
        if needed and tangent is not None:

            def again(marks, *xs):
                return surrogate(view.evaluate(*xs), marks, *xs)

            marked_inputs, marked_handed = [marks, *inputs], [self.taps.slot(layer, "mark relatives"), *handed]
            passed = self._passed(layer, rule, again, marked_inputs, marked_handed, value)
            passed = passed if part is None else passed + part
        (out,), (passed,) = self.taps.out(layer, [out], [passed if needed else None])
        started += self.taps.started(layer, out)
        env[layer.output] = out
        if needed:
            rel[layer.output] = passed

    @staticmethod
    def _passed(layer: Layer, rule, surrogate, inputs, relatives, value):
        """What a rule of coefficients makes of relatives: `J(x r) / z`, and `r` itself where elements are kept apart.

        The first of the inputs are the marks of the layer, if it has any.
        """
        if layer.kind == "scale":
            return jnp.broadcast_to(relatives[1], value.shape).astype(value.dtype)
        if layer.kind in ("activation", "norm"):  # a unit of 0 passes relevance on, too
            _, tangent = jax.jvp(surrogate, tuple(inputs), (jax.tree.map(jnp.zeros_like, inputs[0]), *inputs[1:]))
            r = jnp.broadcast_to(relatives[1], value.shape).astype(value.dtype)
            return scale_tangent(r, quotient(tangent, value, empty=1.0))
        selects = layer.kind == "max_pool" and rule.selects
        directions = relatives if selects else jax.tree.map(_direction, inputs, relatives)
        _, tangent = jax.jvp(surrogate, tuple(inputs), tuple(directions))
        return tangent if selects else scale_tangent(tangent, reciprocal(value))

    @staticmethod
    def _checked(surrogate, layer: Layer, z):
        if surrogate is None or (surrogate.shape == z.shape and surrogate.dtype == z.dtype):
            return surrogate
        raise RuleError(
            f"The rule of the layer {layer.address} at {layer.source} returned a surrogate of {surrogate.dtype}"
            f"{list(surrogate.shape)}; it must have the dtype and shape of the layer's output, {z.dtype}{list(z.shape)}."
        )

    def _plain(self, step: Plain, env, rel, live):
        for eqn in step.equations:
            operands, relatives = self._operands(eqn, env, rel, live)
            evaluate = self._evaluator(eqn)
            outputs = list(evaluate(*operands))
            needed = [v in self.needed for v in eqn.outputs]
            handed: list[Any] = [None for _ in outputs]
            moving = [i for i, r in enumerate(relatives) if r is not None]
            if any(needed) and moving:
                handed = self._handed(eqn, evaluate, operands, relatives, moving, outputs)
            outputs, handed = self.taps.out(eqn, outputs, handed)
            env.update(zip(eqn.outputs, outputs, strict=True))
            rel.update((v, r) for v, r in zip(eqn.outputs, handed, strict=True) if r is not None)

    def _operands(self, eqn: Equation, env, rel, live):
        """The operands of an equation and their relatives, where they have any."""
        operands, relatives = [read(env, v) for v in eqn.inputs], [rel.get(v) for v in eqn.inputs]
        on = [i for i, v in enumerate(eqn.inputs) if v in live]
        seen, handed = self.taps.into(
            eqn, [eqn.inputs[i] for i in on], [operands[i] for i in on], [relatives[i] for i in on]
        )
        for i, x, r in zip(on, seen, handed, strict=True):
            operands[i], relatives[i] = x, r
        return operands, relatives

    @staticmethod
    def _handed(eqn: Equation, evaluate, operands, relatives, moving, outputs):
        """The relatives of the outputs of a structural equation."""

        def of_moving(*xs):
            full = list(operands)
            for i, x in zip(moving, xs, strict=True):
                full[i] = x
            return [out for out, v in zip(evaluate(*full), eqn.outputs, strict=True) if v.carries_relevance]

        xs, rs = [operands[i] for i in moving], [relatives[i] for i in moving]
        selects = eqn.name in prims.SELECTION
        if len(moving) == 1 and eqn.name in prims.LINEAR:  # element by element, as at a scale
            (r,) = rs
            return [jnp.broadcast_to(r, out.shape).astype(out.dtype) for out in outputs]
        directions = rs if selects else [_direction(x, r) for x, r in zip(xs, rs, strict=True)]
        _, tangents = jax.jvp(of_moving, tuple(xs), tuple(directions))
        found = iter(tangents)
        handed: list[Any] = []
        for v, out in zip(eqn.outputs, outputs, strict=True):
            tangent = next(found) if v.carries_relevance else None
            handed.append(tangent if tangent is None or selects else scale_tangent(tangent, reciprocal(out)))
        return handed

    def _evaluator(self, eqn: Equation):
        custom = self.registered.get(eqn.name)
        if custom is None:
            return eqn.evaluate

        def evaluate(*operands):
            def bind(*xs):
                out = eqn.evaluate(*xs)
                return out if eqn.primitive.multiple_results else out[0]

            out = custom(bind, *operands)
            return tuple(out) if eqn.primitive.multiple_results else (out,)

        return evaluate

    def _call(self, step: Call, env, rel, live, started):
        eqn = step.equation
        operands, relatives = self._operands(eqn, env, rel, live)
        asked = [i for i, v in enumerate(eqn.outputs) if v in self.needed]
        found: list[Any] = []
        begun: list[Any] = []
        if eqn.name in REMAT:
            body = jax.checkpoint(
                self._body(step.bodies[0], asked), prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
            )
            outputs, found, begun = body(operands, relatives)
        elif eqn.name == "cond":
            branches = [self._body(body, asked) for body in step.bodies]
            outputs, found, _ = lax.switch(operands[0], branches, operands[1:], relatives[1:])
        elif eqn.name == "scan":
            outputs, found, begun = self._scan(eqn, step.bodies[0], operands, relatives, asked)
        else:
            outputs, found = self._shard_map(eqn, step.bodies[0], operands, relatives, asked)
        env.update(zip(eqn.outputs, outputs, strict=True))
        rel.update((eqn.outputs[i], r) for i, r in zip(asked, found, strict=True))
        started.extend(begun)

    def _body(self, body: Section, asked):
        return lambda operands, relatives: self.evaluate(body, operands, relatives, asked)

    def _shard_map(self, eqn: Equation, body: Section, operands, relatives, asked):
        params = eqn.params
        given = [i for i, r in enumerate(relatives) if r is not None]

        def shard(xs, rs):
            full = dict(zip(given, rs, strict=True))
            return self.evaluate(body, xs, [full.get(i) for i in range(len(xs))], asked)[:2]

        in_specs, out_specs = list(params["in_specs"]), list(params["out_specs"])
        return jax.shard_map(
            shard,
            mesh=params["mesh"],
            in_specs=(in_specs, [in_specs[i] for i in given]),
            out_specs=(out_specs, [out_specs[i] for i in asked]),
            axis_names=manual_axes(params),
            check_vma=params["check_vma"],
        )(operands, [relatives[i] for i in given])

    def _scan(self, eqn: Equation, body: Section, operands, relatives, asked):
        params, program = eqn.params, body.program
        consts, carry = scan_groups(params)
        # Relatives are carried where a step needs those of the step before; of the others there are none.
        loop = [i for i in range(carry) if program.outputs[i] in self.needed or program.inputs[consts + i] in self.needed]
        stacked = [i for i in asked if i >= carry]
        tapped = self.taps.scanned(body)

        def step(state, scanned):
            (carried, rel_carried), (xs, rel_xs, taps) = state, scanned
            at_step = Interpreter(self.plan, self.registered, self.taps.with_arrays(dict(zip(tapped, taps, strict=True))))
            rels = dict(zip(loop, rel_carried, strict=True))
            inputs = [*operands[:consts], *carried, *xs]
            given = [*relatives[:consts], *(rels.get(i) for i in range(carry)), *rel_xs]
            outputs, found, started = at_step.evaluate(body, inputs, given, [*loop, *stacked])
            return (outputs[:carry], found[: len(loop)]), (outputs[carry:], found[len(loop) :], started)

        start = operands[consts : consts + carry]
        rel_start = [jnp.zeros_like(start[i]) if relatives[consts + i] is None else relatives[consts + i] for i in loop]
        (carried, rel_carried), (ys, rel_ys, started) = lax.scan(
            step,
            (start, rel_start),
            (operands[consts + carry :], relatives[consts + carry :], list(tapped.values())),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        found = {**dict(zip(loop, rel_carried, strict=True)), **dict(zip(stacked, rel_ys, strict=True))}
        return [*carried, *ys], [found[i] for i in asked], started


def _direction(x, r):
    """The perturbation `x r`; what is infinite (a mask) cannot move."""
    return jnp.where(jnp.isinf(x), jnp.zeros_like(x), x) * r
