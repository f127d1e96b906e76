"""A zoo of small networks in linen, nnx, equinox and plain JAX, of every family that rules exist for.

`ZOO[name].build()` gives `(fn, params, x)`. Sizes are tiny, numbers float64, parameters drawn by numpy.
"""

from . import experts, perceptrons, recurrent, transformers, vision
from .base import ZOO, Model

__all__ = ["ZOO", "Model", "experts", "perceptrons", "recurrent", "transformers", "vision"]
