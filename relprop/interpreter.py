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
from .jaxprs import REMAT, Constant, Equation, Value, read, scan_groups
from .layers import AffineView, LayerView
from .structure import AFFINE_KINDS, Call, Layer, Plain, Section
from .surrogate import from_relative, quotient, with_tangent


class Interpreter:
    """Evaluates sections under one assignment of rules.

    `rules` maps layer indices to rules, `needed` holds the values whose relative tangents are needed, `registered` maps
    primitive names to linearisations. `taps` maps layer indices to a pair of functions that see what goes in and out of
    the layer and may change it (an identity with a tangent of its own): the hook for ledgers.
    """

    def __init__(self, rules: Mapping[int, Any], needed: frozenset[Value], registered, taps=None):
        self.rules = rules
        self.needed = needed
        self.registered = registered
        self.taps = taps or {}

    def evaluate(self, section: Section, operands, relatives):
        """Values and relatives (None where not needed) of the outputs of `section`."""
        program = section.program
        env: dict[Value, Any] = dict(zip(program.inputs, operands, strict=True))
        rel: dict[Value, Any] = {
            v: r for v, r in zip(program.inputs, relatives, strict=True) if v in self.needed and r is not None
        }
        for eqn in section.free:
            env.update(zip(eqn.outputs, eqn.evaluate(*(read(env, v) for v in eqn.inputs)), strict=True))
        for step in section.steps:
            if isinstance(step, Layer):
                self._layer(step, env, rel)
            elif isinstance(step, Call):
                self._call(step, section, env, rel)
            else:
                self._plain(step, env, rel)
        return [read(env, v) for v in program.outputs], [self._relative(rel, env, v) for v in program.outputs]

    def _relative(self, rel, env, value: Value):
        """The relative of `value`: 0, without a tangent, where nothing explained is above it."""
        if value not in self.needed or isinstance(value, Constant):
            return None
        return rel[value] if value in rel else jnp.zeros_like(env[value])

    def _layer(self, layer: Layer, env, rel):
        rule = self.rules[layer.index]
        inputs = [read(env, v) for v in layer.live]
        tap_in, tap_out = self.taps.get(layer.index, (None, None))
        if tap_in is not None:
            inputs = tap_in(inputs)
        affine = layer.kind in AFFINE_KINDS
        view = (AffineView if affine else LayerView)(layer, env)
        value = view.evaluate(*inputs)

        def surrogate(*xs):
            z = view.evaluate(*xs)
            x = view.input(xs[0]) if affine else xs[0] if len(xs) == 1 else xs
            return self._checked(rule(view, x, z), layer, z)

        tangent = surrogate(*inputs)
        out = value if tangent is None else with_tangent(value, tangent)
        part = None
        if rule.is_relative:
            r = self._relative(rel, env, layer.live[0])
            if affine:
                x, r = view.input(inputs[0]), view.input(r, keep=prims.PURE_RESHAPE)
            else:
                x = inputs[0]
            part = rule.relative(view, x, value, r)
            from_r = from_relative(value, part)
            # Both parts count: the tangent of a sum whose value is that of the layer.
            out = from_r if tangent is None else with_tangent(value, tangent + from_r)
        if tap_out is not None:
            out = tap_out(out)
        env[layer.output] = out
        if layer.output in self.needed:
            handed = [self._relative(rel, env, v) for v in layer.live]
            rel[layer.output] = self._layer_relative(layer, surrogate if tangent is not None else None, inputs, handed, value, part)

    @staticmethod
    def _layer_relative(layer: Layer, surrogate, inputs, relatives, value, part):
        if layer.kind in ("activation", "norm") and part is None:
            return jnp.broadcast_to(relatives[0], value.shape).astype(value.dtype)
        if surrogate is None:
            return part
        directions = relatives if layer.kind == "max_pool" else [x * r for x, r in zip(inputs, relatives, strict=True)]
        _, tangent = jax.jvp(surrogate, tuple(inputs), tuple(directions))
        tangent = tangent if layer.kind == "max_pool" else quotient(tangent, value).astype(value.dtype)
        return tangent if part is None else tangent + part

    @staticmethod
    def _checked(surrogate, layer: Layer, z):
        if surrogate is None or (surrogate.shape == z.shape and surrogate.dtype == z.dtype):
            return surrogate
        raise RuleError(
            f"The rule of the layer {layer.address} at {layer.where} returned a surrogate of {surrogate.dtype}"
            f"{list(surrogate.shape)}; it must have the dtype and shape of the layer's output, {z.dtype}{list(z.shape)}."
        )

    def _plain(self, step: Plain, env, rel):
        for eqn in step.equations:
            operands = [read(env, v) for v in eqn.inputs]
            evaluate = self._evaluator(eqn)
            outputs = evaluate(*operands)
            env.update(zip(eqn.outputs, outputs, strict=True))
            if not any(v in self.needed for v in eqn.outputs):
                continue
            moving = [i for i, v in enumerate(eqn.inputs) if v in rel]
            if not moving:
                continue

            def of_moving(*xs, eqn=eqn, operands=operands, moving=moving, evaluate=evaluate):
                full = list(operands)
                for i, x in zip(moving, xs, strict=True):
                    full[i] = x
                return [out for out, v in zip(evaluate(*full), eqn.outputs, strict=True) if v.carries_relevance]

            xs = [operands[i] for i in moving]
            rs = [rel[eqn.inputs[i]] for i in moving]
            selects = eqn.name in prims.SELECTION
            directions = rs if selects else [x * r for x, r in zip(xs, rs, strict=True)]
            _, tangents = jax.jvp(of_moving, tuple(xs), tuple(directions))
            carrying = [v for v in eqn.outputs if v.carries_relevance]
            for v, tangent in zip(carrying, tangents, strict=True):
                rel[v] = tangent if selects else quotient(tangent, env[v]).astype(tangent.dtype)

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

    def _call(self, step: Call, section: Section, env, rel):
        eqn = step.equation
        operands = [read(env, v) for v in eqn.inputs]
        relatives = [rel.get(v) if v in self.needed else None for v in eqn.inputs]
        if eqn.name in REMAT:
            body = jax.checkpoint(
                self._body(step.bodies[0]), prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
            )
            outputs, out_relatives = body(operands, relatives)
        elif eqn.name == "cond":
            branches = [self._body(body) for body in step.bodies]
            outputs, out_relatives = lax.switch(operands[0], branches, operands[1:], relatives[1:])
        elif eqn.name == "scan":
            outputs, out_relatives = self._scan(eqn, step.bodies[0], operands), [None] * len(eqn.outputs)
        elif eqn.name == "shard_map":
            outputs, out_relatives = self._shard_map(eqn, step.bodies[0], operands, relatives)
        else:
            outputs, out_relatives = eqn.evaluate(*operands), [None] * len(eqn.outputs)
        env.update(zip(eqn.outputs, outputs, strict=True))
        rel.update((v, r) for v, r in zip(eqn.outputs, out_relatives, strict=True) if r is not None)

    def _body(self, body: Section):
        return lambda operands, relatives: self.evaluate(body, operands, relatives)

    def _shard_map(self, eqn: Equation, body: Section, operands, relatives):
        params = eqn.params
        given = [i for i, r in enumerate(relatives) if r is not None]
        wanted = [i for i, v in enumerate(body.program.outputs) if v in self.needed]

        def shard(xs, rs):
            full = dict(zip(given, rs, strict=True))
            outputs, out_relatives = self.evaluate(body, xs, [full.get(i) for i in range(len(xs))])
            return outputs, [out_relatives[i] for i in wanted]

        in_specs, out_specs = list(params["in_specs"]), list(params["out_specs"])
        outputs, found = jax.shard_map(
            shard,
            mesh=params["mesh"],
            in_specs=(in_specs, [in_specs[i] for i in given]),
            out_specs=(out_specs, [out_specs[i] for i in wanted]),
            axis_names=frozenset(params["newly_manual_axes"]),
            check_vma=params["check_vma"],
        )(operands, [relatives[i] for i in given])
        by_position = dict(zip(wanted, found, strict=True))
        return outputs, [by_position.get(i) for i in range(len(outputs))]

    def _scan(self, eqn: Equation, body: Section, operands):
        consts, carry = scan_groups(eqn.params)

        def step(carried, scanned):
            inputs = [*operands[:consts], *carried, *scanned]
            outputs, _ = self.evaluate(body, inputs, [None] * len(inputs))
            return outputs[:carry], outputs[carry:]

        params = eqn.params
        carried, stacked = lax.scan(
            step,
            operands[consts : consts + carry],
            operands[consts + carry :],
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carried, *stacked]


