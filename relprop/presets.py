"""Composites by name. For convolutional and dense networks names and contents are zennit's where zennit has them.

`epsilon` (default 1e-6) is in the units of each layer's output, `low` and `high` in those of the input.
"""

from typing import Any

from .composite import Composite, as_composite
from .errors import RuleError
from .rules.activation import Deconvnet, GuidedBackprop
from .rules.affine import AlphaBeta, Epsilon, Gamma, Zero, ZPlus
from .rules.base import Graded
from .rules.merge import Norm, ProportionalPool, ResidualGamma
from .rules.product import SignalTakeAll
from .rules.relative import Flat, WSquare, ZBox
from .selectors import Selector, first, kind, optional, until, where


def _composite(*pairs: tuple[Any, Any]) -> Composite:
    return Composite([(optional(selector), rule) for selector, rule in pairs])


def epsilon_plus(epsilon=1e-6) -> Composite:
    """ZPlus for convolutions, Epsilon for dense layers. Kohlbrenner et al. 2020 ("LRP-CMP")."""
    return _composite(("conv", ZPlus(epsilon)), ("affine", Epsilon(epsilon)))


def epsilon_plus_flat(epsilon=1e-6) -> Composite:
    """As `epsilon_plus`, with Flat for the first affine layer in order of execution. Kohlbrenner et al. 2020."""
    return _composite((first("affine"), Flat()), *epsilon_plus(epsilon))


def epsilon_alpha2_beta1(epsilon=1e-6) -> Composite:
    """AlphaBeta(2, 1) for convolutions, Epsilon for dense layers. Kohlbrenner et al. 2020."""
    return _composite(("conv", AlphaBeta(2.0, 1.0, epsilon)), ("affine", Epsilon(epsilon)))


def epsilon_alpha2_beta1_flat(epsilon=1e-6) -> Composite:
    """As `epsilon_alpha2_beta1`, with Flat for the first affine layer in order of execution. Kohlbrenner et al. 2020."""
    return _composite((first("affine"), Flat()), *epsilon_alpha2_beta1(epsilon))


def epsilon_gamma_box(low, high, gamma=0.25, epsilon=1e-6) -> Composite:
    """ZBox for the first convolution, Gamma for the others, Epsilon for dense layers. Montavon et al. 2019.

    `low` and `high` bound the input of the first convolution: see `ZBox`.
    """
    return _composite(
        (first("conv"), ZBox(low, high, epsilon)), ("conv", Gamma(gamma, epsilon)), ("affine", Epsilon(epsilon))
    )


def deep_taylor(low=None, high=None, epsilon=1e-6) -> Composite:
    """Deep Taylor decomposition. Montavon et al. 2017.

    ZBox for the first affine layer where the input lies in the box from `low` to `high` (pixels), WSquare without
    bounds (real-valued input); ZPlus above; max pooling in proportion. Made for relu networks without positive biases.
    """
    if (low is None) != (high is None):
        raise RuleError(f"deep_taylor takes both bounds of the input or none, got low={low} and high={high}.")
    start = WSquare() if low is None and high is None else ZBox(low, high, epsilon)
    return _composite((first("affine"), start), ("affine", ZPlus(epsilon)), ("max_pool", ProportionalPool(epsilon)))


def excitation_backprop(epsilon=1e-6) -> Composite:
    """ZPlus for every affine layer. Zhang et al. 2016."""
    return _composite(("affine", ZPlus(epsilon)))


def guided_backprop() -> Composite:
    """Guided backpropagation: positive coefficients at active units only. Springenberg et al. 2015.

    Relevance is input times the guided gradient; `explain(..., coefficients=True)` returns the guided gradient itself.
    """
    return _composite(("activation", GuidedBackprop()))


def deconvnet() -> Composite:
    """Deconvolution: the activation function is applied to the coefficient. Zeiler and Fergus 2014.

    Relevance is input times the deconvnet signal; `explain(..., coefficients=True)` returns the signal itself.
    """
    return _composite(("activation", Deconvnet()))


def flat_until(selector: Any, rules: Any) -> Composite:
    """`rules`, with Flat at every layer with weights up to `selector`: the depth to which relevance is decomposed.

    Below that layer relevance is spread over what each unit sees, whatever the input there: a picture as coarse as the
    layer is, without its noise (Bach et al. 2016, "Controlling explanatory heatmap resolution and semantics").

    Example:
        >>> import relprop as rp
        >>> rp.presets.flat_until("params/Conv_1/kernel", rp.presets.epsilon_plus())
        Composite:
          (until(path('params/Conv_1/kernel')) & kind('affine')): Flat()
          kind('conv'): ZPlus()
          kind('affine'): Epsilon()
    """
    return Composite([(until(selector) & kind("affine"), Flat()), *as_composite(rules)])


def lstm(epsilon=1e-3, accumulator=0.0) -> Composite:
    """Recurrent networks: gates take nothing, activations pass relevance, sums are proportional. Arras et al. 2017, 2019.

    Epsilon for layers with weights; `x W + h U + b` of a cell is one such layer, however it is written. `accumulator` is
    the stabiliser of other sums, `f c + i g`: 0 shares in exact proportion, Arras' code has `epsilon` there, too.
    """
    exact = isinstance(accumulator, int | float) and accumulator == 0  # it may be a tracer
    parts = where(lambda layer: layer.preactivation == "part", "parts of preactivations")
    totals = where(lambda layer: layer.preactivation == "total", "preactivations")
    return _composite(
        (parts, Zero()),
        (totals & kind("add"), Norm(epsilon)),
        ("add", Zero() if exact else Norm(accumulator)),
        (kind("affine") | totals, Epsilon(epsilon)),
        ("gate", SignalTakeAll()),
    )


def attn_lrp(epsilon=1e-6) -> Composite:
    """Transformers: Epsilon for layers with weights, half to each factor of a product. Achtibat et al. 2024 (AttnLRP).

    Statistics of norms are held constant and a softmax has its derivative, as is the default everywhere.
    """
    return _composite(("affine", Epsilon(epsilon)))


def cp_lrp(epsilon=1e-6) -> Composite:
    """Transformers, so that relevance is conserved: attention weights are held constant, values take all. Ali et al. 2022.

    In a gated feed-forward network `act(g) * u` the activated operand is held, as in LXT.
    """
    held = SignalTakeAll(("gate", "activated"))
    return _composite(("affine", Epsilon(epsilon)), (kind("product") | kind("attention"), held))


def res_lrp(gamma=1.0, epsilon=1e-6) -> Composite:
    """`attn_lrp` with `ResidualGamma` where a residual branch meets its skip connection. Berend et al. 2026."""
    residual = where(lambda layer: layer.kind == "add" and "skip" in layer.roles, "residual")
    return _composite((residual, ResidualGamma(gamma)), *attn_lrp(epsilon))


def attn_lrp_vit(gamma_conv=0.25, gamma_dense=0.05, epsilon=1e-6) -> Composite:
    """Vision transformers: Gamma for the patches' convolution and the feed-forward layers. Achtibat et al. 2024.

    Feed-forward layers are the dense layers right before and right after an activation, as in `act(x W) V`.
    """

    def beside_activations(layers):
        activations = [layer for layer in layers if layer.kind == "activation"]
        before, after = {layer.live[0] for layer in activations}, {layer.output for layer in activations}
        return [layer.kind == "dense" and (layer.output in before or layer.live[0] in after) for layer in layers]

    feed_forward = Selector(beside_activations, "feed-forward")
    return _composite(("conv", Gamma(gamma_conv, epsilon)), (feed_forward, Gamma(gamma_dense, epsilon)), *attn_lrp(epsilon))


def mamba(epsilon=1e-6) -> Composite:
    """Selective state spaces: what modulates the input (A, B, C and the step, computed from it) is held. Jafari et al. 2024.

    The output gate `y * silu(z)` shares by halves, SiLU passes relevance, statistics of norms are held (MambaLRP).
    """
    return _composite(("affine", Epsilon(epsilon)), ("product", SignalTakeAll(("gate", "modulator"))))


def gnn(gamma=3.0, layers: Any = None, epsilon=1e-6) -> Composite:
    """Graph networks: Gamma for layers with weights, from `gamma` at the first down to 0 at the last. Schnake et al. 2022.

    `layers` selects the layers with weights. By default these are convolutions and products with a matrix on the right,
    `h @ w`; an adjacency matrix stands on the left, `a @ h`, and shares in proportion.
    """

    def multiplies_features(layer):
        return "affine" in layer.kinds and (layer.primitive != "dot_general" or layer.frozen[0] is layer.core.inputs[1])

    weights = where(multiplies_features, "weights") if layers is None else layers
    return _composite((weights, Graded(lambda depth: Gamma(gamma * (1 - depth), epsilon))))
