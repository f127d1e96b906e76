"""Composites by name, for convolutional and dense networks. Names and contents are zennit's where zennit has them.

`epsilon` (default 1e-6) is in the units of each layer's output, `low` and `high` in those of the input.
"""

from typing import Any

from .composite import Composite
from .errors import RuleError
from .rules.activation import Deconvnet, GuidedBackprop
from .rules.affine import AlphaBeta, Epsilon, Gamma, ZPlus
from .rules.merge import ProportionalPool
from .rules.relative import Flat, WSquare, ZBox
from .selectors import first, optional


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
