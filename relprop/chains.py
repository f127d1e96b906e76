"""Groups of equations around one core: affine layers with their chains, pools with their scale."""

import math

from . import primitives as prims
from .axes import dims_back, dims_forward, weight_dims
from .jaxprs import Equation, Value
from .structure import Layer


def affine_layer(core: Equation, flow, facts, taken) -> Layer | None:
    """A mixing primitive with one live operand, and the elementwise affine chain before and after it.

    Bias, batch norm on either side, layer scale, casts and input normalisation become part of the layer in this way. So
    does the sum over devices that completes a product in a `shard_map`: before it there is only a part of the layer.
    """
    live = flow.live_operands(core)
    if core.name not in prims.MIXING or len(live) != 1 or not core.outputs[0].carries_relevance:
        return None
    operand = live[0]
    if core.inputs.count(operand) != 1 or (core.name == "ragged_dot_general" and operand is not core.inputs[0]):
        return None
    weight = next(v for v in core.inputs if v is not operand)
    pre = _chain_before(operand, flow, facts, taken)
    sums = _sums_after(core, flow, taken)
    post = _chain_after((core, *sums)[-1], flow, facts, taken)
    source = flow.live_operands(pre[0])[0] if pre else operand
    output = (core, *sums, *post)[-1].outputs[0]
    kind = prims.MIXING[core.name]
    path = facts.origin(weight)
    rescaled = any(not _keeps_sign(e, flow, facts) for e in pre)
    return Layer(
        kind,
        (*pre, core, *sums, *post),
        (source,),
        output,
        core,
        tuple(pre),
        tuple(post),
        path,
        device_sums=tuple(sums),
        frozen=(weight,),
        nonnegative=facts.is_nonnegative(source) and not rescaled,
        shift_dims=_shift_dims(pre, flow, facts),
        foldable=_factor_dims(post, flow, facts) <= weight_dims(core, weight)[0],
    )


def sum_pool_layer(core: Equation, flow, facts, taken) -> Layer | None:
    """A sum, windowed or plain, and the division by a count that makes a mean of it."""
    live = flow.live_operands(core)
    if core.name not in prims.SUM_POOL or not live:
        return None
    post, value = [], core.outputs[0]
    while (eqn := flow.sole_consumer(value)) is not None and eqn not in taken and is_chain_link(eqn, value, flow):
        counts = eqn.name in ("mul", "div") and not parametric(eqn, flow, facts)
        if not counts and eqn.name not in prims.PURE_RESHAPE:
            break
        post.append(eqn)
        value = eqn.outputs[0]
    while post and post[-1].name not in prims.SCALES:
        post.pop()
    output = (post[-1] if post else core).outputs[0]
    return Layer("sum_pool", (core, *post), tuple(live), output, core, post=tuple(post))


def is_chain_link(eqn: Equation, value: Value, flow, others_may_depend: bool = False) -> bool:
    """Whether `eqn` is affine and elementwise in `value`, its one operand that is not free, or a pure reshape of it."""
    if eqn.inputs.count(value) != 1 or len(eqn.outputs) != 1 or not eqn.outputs[0].carries_relevance:
        return False
    if not others_may_depend and any(v in flow.dependent for v in eqn.inputs if v is not value):
        return False
    shape = eqn.outputs[0].shape
    if eqn.name in prims.PURE_RESHAPE:
        return math.prod(shape) == math.prod(value.shape)
    if eqn.name == "div" and eqn.inputs[0] is not value:
        return False
    return eqn.name in prims.LINEAR and shape == value.shape


def parametric(eqn: Equation, flow, facts) -> bool:
    """Whether an affine equation brings in an array or an argument, rather than numbers written in the code.

    `BatchNorm` is parametric; the `x + 3` of a hard sigmoid is not, and belongs to the activation beside it.
    """
    return any(v not in flow.dependent and not facts.is_literal(v) for v in eqn.inputs)


def _is_nonlinear(eqn: Equation | None, flow) -> bool:
    """Whether there is an equation, and it is elementwise and not affine: a part of an activation."""
    return eqn is not None and eqn.name in prims.ELEMENTWISE and not is_linear_here(eqn, flow)


def is_linear_here(eqn: Equation, flow) -> bool:
    """Whether an elementwise equation is affine in its one live operand; others may depend on the input.

    A mask that knows nothing of the input is: what it drops, JAX's own VJP drops, even where its coefficient is NaN.
    """
    live = flow.live_operands(eqn)
    if eqn.name == "select_n" and len(live) == 1 and eqn.inputs[0] not in flow.dependent:
        return eqn.outputs[0].shape == live[0].shape
    return len(live) == 1 and is_chain_link(eqn, live[0], flow, others_may_depend=True)


def _chain_before(value: Value, flow, facts, taken) -> list[Equation]:
    chain: list[Equation] = []
    while (eqn := facts.producer.get(value)) is not None and eqn not in taken:
        source = _live_input(eqn, flow)
        if source is None or not is_chain_link(eqn, source, flow):
            break
        chain.insert(0, eqn)
        value = source
    after_activation = _is_nonlinear(facts.producer.get(value), flow)
    while chain and (chain[0].name in prims.PURE_RESHAPE or (after_activation and not parametric(chain[0], flow, facts))):
        chain.pop(0)
    return chain


def _chain_after(core: Equation, flow, facts, taken) -> list[Equation]:
    chain: list[Equation] = []
    value = core.outputs[0]
    while (eqn := flow.sole_consumer(value)) is not None and eqn not in taken and is_chain_link(eqn, value, flow):
        chain.append(eqn)
        value = eqn.outputs[0]
    before_activation = _is_nonlinear(eqn, flow)
    while chain and (chain[-1].name in prims.PURE_RESHAPE or (before_activation and not parametric(chain[-1], flow, facts))):
        chain.pop()
    return chain


def _sums_after(core: Equation, flow, taken) -> list[Equation]:
    sums: list[Equation] = []
    value = core.outputs[0]
    while (eqn := flow.sole_consumer(value)) is not None and eqn not in taken:
        if eqn.name not in prims.DEVICE_SUMS or len(eqn.inputs) != 1:
            break
        sums.append(eqn)
        value = eqn.outputs[0]
    return sums


def _keeps_sign(link: Equation, flow, facts) -> bool:
    """Whether a link of a chain multiplies by nothing that could be negative (shifts go into the bias)."""
    if link.name in ("mul", "div"):
        return all(facts.is_nonnegative(v) for v in link.inputs if v not in flow.dependent)
    return link.name != "neg" and not (link.name == "sub" and link.inputs[1] in flow.dependent)


def _shift_dims(pre, flow, facts) -> frozenset[int]:
    """The dimensions of the core's operand along which the shift that a chain brings in may vary."""
    dims: frozenset[int] = frozenset()
    for eqn in pre:
        if eqn.name in prims.PURE_RESHAPE:
            dims = dims_forward(eqn, dims)
        else:
            dims |= _free_dims(eqn, flow, facts)
    return dims


def _free_dims(eqn: Equation, flow, facts) -> frozenset[int]:
    return frozenset().union(*(facts.varying(v) for v in eqn.inputs if v not in flow.dependent))


def _live_input(eqn: Equation, flow) -> Value | None:
    live = flow.live_operands(eqn)
    return live[0] if len(live) == 1 and eqn.inputs.count(live[0]) == 1 else None


def _factor_dims(post, flow, facts) -> frozenset[int]:
    """The dimensions of the core's output along which the factor that follows it may vary."""
    dims: frozenset[int] = frozenset()
    for eqn in reversed(post):
        if eqn.name in prims.PURE_RESHAPE:
            dims = dims_back(eqn, dims)
        elif eqn.name in prims.SCALES:
            dims |= _free_dims(eqn, flow, facts)
    return dims
