"""The errors and warnings of relprop. Each message says what was given, what was expected, where, and what to do."""


class RelpropError(Exception):
    """Base class of the errors that relprop raises on purpose."""


class UnknownPrimitiveError(RelpropError, NotImplementedError):
    """A live equation of the explained function has a primitive for which no linearisation is known."""


class NotDifferentiableError(RelpropError, TypeError):
    """Relevance would have to pass something that cannot be reversed: a `while` loop, or integers that select nothing."""


class RuleError(RelpropError, TypeError):
    """A rule was put where it has no meaning, or was given hyper-parameters that contradict one another."""


class TargetError(RelpropError, ValueError):
    """The `target` does not fit the output of the explained function."""


class ArgumentError(RelpropError, ValueError):
    """An argument of a relprop function has a wrong value, shape or type."""


class RelevanceLossError(RelpropError, ArithmeticError):
    """A layer keeps more relevance than is tolerated, or hands on what is not finite."""


class StoreError(RelpropError, OSError):
    """A store of relevance cannot be written, is damaged, or belongs to another run."""


class UnusedSelectorWarning(UserWarning):
    """A selector of the given rules matched no layer of the function."""


class NonFiniteRelevanceWarning(UserWarning):
    """The relevance holds NaN or infinity. Raised outside of `jit` only, where values can be looked at."""


class StoppedWarning(UserWarning):
    """A maximisation ended before its last step: it was interrupted, or a value was not finite."""
