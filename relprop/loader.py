"""Batches of one size, padded, out of anything that iterates."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .errors import ArgumentError


class Batches(Sequence):
    """Arrays cut into batches of `size` along their first axis, the last one shorter: an input for `explain_dataset`.

    Arrays may be `np.memmap`s: a batch is read when it is asked for, and those that a resumed run has are not.

    Example:
        >>> import numpy as np, relprop as rp
        >>> batches = rp.dataset.Batches(np.arange(5), label=np.arange(5) % 2, size=2)
        >>> len(batches), batches[2]
        (3, {'input': array([4]), 'label': array([0])})
    """

    def __init__(self, input: Any, label: Any = None, index: Any = None, *, size: int = 64):  # noqa: A002
        given = {"input": input, "label": label, "index": index}
        self.arrays = {name: array for name, array in given.items() if array is not None}
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1 or size < 1:
            raise ArgumentError(f"Batches of size={size} need arrays of one length, at least 1 each, got {lengths}.")
        self.size, self.examples = size, lengths["input"]

    def __len__(self) -> int:
        return -(-self.examples // self.size)

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        here = slice(number * self.size, (number + 1) * self.size)
        return {name: array[here] for name, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arrays on the host, all of `size` rows, of which `count` are examples and the others copies of the last."""

    x: Any
    label: Any
    index: Any
    count: int


class Loader:
    """Batches of one size out of whatever iterates."""

    def __init__(self, batches: Any):
        self.batches = batches
        self.indexed = hasattr(batches, "__len__") and hasattr(batches, "__getitem__")
        self.size = 0
        self._given = iter(()) if self.indexed else iter(batches)
        given = (batches[0] if len(batches) else None) if self.indexed else next(self._given, None)
        if given is None:
            raise ArgumentError(
                "There are no batches. A generator can be iterated over once only: make a new one for each call."
            )
        self.first = self._batch(given, 0)
        self.size = self.first.count
        if not self.size:
            raise ArgumentError("The first batch is empty: its number of examples is that of every batch but the last.")

    @property
    def examples(self) -> int | None:
        """How many there are, as far as can be told before the last batch."""
        known = getattr(self.batches, "examples", None)
        if known is None and hasattr(self.batches, "__len__"):
            try:
                known = len(self.batches) * self.size
            except TypeError:  # a torch DataLoader over a stream, a tf.data dataset of unknown length
                known = None
        return known

    def after(self, done: int, examples: int) -> Iterator[Batch]:
        """The batches from number `done` on, which are those after so many examples."""
        last = examples - (done - 1) * self.size if done else self.size
        for number, given in self._numbered(done):
            batch = self.first if number == 0 else self._batch(given, number)
            if batch.count and last < self.size:
                raise ArgumentError(
                    f"Batch {number - 1} has {last} examples, but the first has {self.size}: only the last batch may be "
                    "shorter. Let the loader make batches of one size."
                )
            last = batch.count
            if batch.count:
                yield batch

    def _numbered(self, done: int) -> Iterator[tuple[int, Any]]:
        if self.indexed:
            if len(self.batches) < done:
                raise self._ended(len(self.batches), done)
            yield from ((number, self.batches[number]) for number in range(done, len(self.batches)))
            return
        if done == 0:
            yield 0, None
        number = 1
        for given in self._given:
            if number >= done:
                yield number, given
            number += 1
        if number < done:
            raise self._ended(number, done)

    def _ended(self, number: int, done: int) -> ArgumentError:
        return ArgumentError(f"The loader gave {number} batches, but {done} are stored already: it is not the same data.")

    def _batch(self, given: Any, number: int) -> Batch:
        x, label, index = _parts(given)
        # A copy, since loaders may use their memory again.
        leaves = {"x": jax.tree.map(_array, x), "label": label, "index": index}
        leaves = {name: leaf if name == "x" or leaf is None else _array(leaf) for name, leaf in leaves.items()}
        counts = {leaf.shape[:1] for leaf in jax.tree.leaves(leaves)}
        if len(counts) != 1 or counts == {()}:
            raise ArgumentError(
                f"Batch {number}: all arrays need one leading axis of one length, the examples; theirs are "
                f"{jax.tree.map(np.shape, leaves)}."
            )
        ((count,),) = counts
        if self.size and count > self.size:
            raise ArgumentError(f"Batch {number} has {count} examples, more than the {self.size} of the first.")
        if 0 < count < self.size:
            rows = np.minimum(np.arange(self.size), count - 1)
            leaves = {**leaves, "x": jax.tree.map(lambda leaf: leaf[rows], leaves["x"])}
            leaves |= {name: leaves[name][rows] for name in ("label", "index") if leaves[name] is not None}
        return Batch(**leaves, count=count)


def _parts(batch: Any) -> tuple[Any, Any, Any]:
    """(x, label, index) of what a loader gives."""
    if isinstance(batch, Mapping):
        rest = {key: value for key, value in batch.items() if key not in ("label", "index")}
        if not rest:
            raise ArgumentError(f"A batch has the keys {list(batch)}: besides 'label' and 'index' it needs the input.")
        x = next(iter(rest.values())) if len(rest) == 1 else rest
        return x, batch.get("label"), batch.get("index")
    if isinstance(batch, tuple | list):
        if not 1 <= len(batch) <= 3:
            raise ArgumentError(f"A batch is x, (x, label) or (x, label, index), got {len(batch)} items.")
        x, label, index = (*batch, None, None)[:3]
        return x, label, index
    return batch, None, None


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)
