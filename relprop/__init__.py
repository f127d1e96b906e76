"""relprop: layer-wise relevance propagation as a JAX function transformation."""

from . import concepts, dataset, maximization, plot, pool, presets, text
from .audit import audit
from .composite import Composite
from .conditions import condition, start
from .errors import (
    ArgumentError,
    NonFiniteRelevanceWarning,
    NotDifferentiableError,
    RelevanceLossError,
    RelpropError,
    RuleError,
    StoppedWarning,
    StoreError,
    TargetError,
    UnknownPrimitiveError,
    UnusedSelectorWarning,
)
from .maximization.ascent import Maximum, maximize
from .plan import Plan
from .registry import register
from .relevances import LayerRelevance, relevances
from .report import Audit
from .rules.activation import Deconvnet, Gradient, GuidedBackprop, Identity, Pass, Stop
from .rules.affine import AlphaBeta, Epsilon, Gamma, Zero, ZPlus
from .rules.base import Graded, RelevanceRule, Rule
from .rules.merge import Norm, ProportionalPool, ResidualGamma
from .rules.normalisation import Frozen, LocalResponse, Temperature
from .rules.product import SignalTakeAll, Uniform
from .rules.relative import Flat, WSquare, ZBox
from .second_order import Similarity, bilrp, walks
from .selectors import first, kind, last, optional, path, primitive, scope, until, where
from .surrogate import scale_tangent, stabilize, with_tangent
from .targets import explain_targets
from .transform import explain, plan, value_and_explain, vjp
from .windows import relevant_pattern, sliding_window, translated

__version__ = "0.1.0"
__all__ = [
    "AlphaBeta",
    "ArgumentError",
    "Audit",
    "Composite",
    "Deconvnet",
    "Epsilon",
    "Flat",
    "Frozen",
    "Gamma",
    "Graded",
    "Gradient",
    "GuidedBackprop",
    "Identity",
    "LayerRelevance",
    "LocalResponse",
    "Maximum",
    "NonFiniteRelevanceWarning",
    "Norm",
    "NotDifferentiableError",
    "Pass",
    "Plan",
    "ProportionalPool",
    "RelevanceLossError",
    "RelevanceRule",
    "RelpropError",
    "ResidualGamma",
    "Rule",
    "RuleError",
    "SignalTakeAll",
    "Similarity",
    "Stop",
    "StoppedWarning",
    "StoreError",
    "TargetError",
    "Temperature",
    "Uniform",
    "UnknownPrimitiveError",
    "UnusedSelectorWarning",
    "WSquare",
    "ZBox",
    "ZPlus",
    "Zero",
    "audit",
    "bilrp",
    "concepts",
    "condition",
    "dataset",
    "explain",
    "explain_targets",
    "first",
    "kind",
    "last",
    "maximization",
    "maximize",
    "optional",
    "path",
    "plan",
    "plot",
    "pool",
    "presets",
    "primitive",
    "register",
    "relevances",
    "relevant_pattern",
    "scale_tangent",
    "scope",
    "sliding_window",
    "stabilize",
    "start",
    "text",
    "translated",
    "until",
    "value_and_explain",
    "vjp",
    "walks",
    "where",
    "with_tangent",
]
