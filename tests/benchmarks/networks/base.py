"""What a benchmark knows of a network."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, the input that is explained, and the presets that fit it.

    Attributes:
        name: of the network.
        family: "convolutional", "transformer" or "recurrent": what peers can rebuild it.
        fn: `fn(params, x)`, logits (batch, classes).
        params: a tree of numpy arrays, float32.
        x: (batch, ...), float32.
        target: the explained class of each example, int32.
        presets: a function without arguments for each name, that makes the rules.
        about: sizes or layers, as the peers of the family read them.
    """

    name: str
    family: str
    fn: Callable[[Any, Any], Any]
    params: Any
    x: np.ndarray
    target: np.ndarray
    presets: Mapping[str, Callable[[], Any]]
    about: Any

    @property
    def shape(self):
        return " x ".join(map(str, self.x.shape))


def normal(rng, *shape, scale=1.0):
    return rng.standard_normal(shape, np.float32) * np.float32(scale)


def dense(rng, inputs, outputs, gain=1.0, bias=True):
    """Weights of a dense layer: outputs of the size of the inputs for a gain of 1."""
    made = {"kernel": normal(rng, inputs, outputs, scale=gain / inputs**0.5)}
    return made | ({"bias": normal(rng, outputs, scale=0.1)} if bias else {})


def targets(rng, batch, classes):
    return rng.integers(0, classes, batch).astype(np.int32)
