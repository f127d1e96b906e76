"""Explain a dataset: batches from any loader, relevance to HDF5 or zarr, and whatever stops it, it goes on from there.

Needs h5py, zarr and tqdm, each where it is used: ``pip install "relprop[dataset]"``.
"""

import dataclasses
import json
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ArgumentError, NonFiniteRelevanceWarning, RelevanceLossError
from .loader import Batch, Batches, Loader
from .progress import bar
from .store import Store, open_store

__all__ = ["Batches", "Summary", "explain_dataset"]

LONGEST = 1 << 15  # bytes of text in an attribute: HDF5 has a limit
AHEAD = 2  # batches that are read before, and results that are written after, the one that is being explained


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `explain_dataset` did.

    Attributes:
        path: the store.
        examples: how many it holds.
        resumed: how many of these were there when the run began.
        non_finite: the positions in the store of examples whose relevance is NaN or infinite.
        seconds: how long the run took, with compilation.
    """

    path: Path
    examples: int
    resumed: int
    non_finite: tuple[int, ...]
    seconds: float


def explain_dataset(
    explain: Callable[..., Any],
    batches: Iterable[Any],
    out: str | Path,
    *,
    args: Sequence[Any] = (),
    labels: bool = False,
    run: Any = "",
    layout: str | None = None,
    sharding: Any = None,
    non_finite: Literal["raise", "warn"] = "raise",
    progress: bool | None = None,
    overwrite: bool = False,
) -> Summary:
    """Explain every batch and write relevance, prediction and label to one file, in the layout that ViRelAy reads.

    A call that was interrupted, by whatever, is made again with the same arguments: it goes on after the last batch that
    was stored, and the file is the same, bit for bit, as that of an undisturbed run (if the device computes the same
    numbers twice). `out` has its name only once it is complete; until then there is a folder `out.partial`. A call
    whose `out` is complete returns at once. Batches are read and padded in one thread and written in another.

    Args:
        explain: a function `(*args, x)` that returns the pair (value, relevance), such as
            `relprop.value_and_explain(fn, rules, target="top")`; it is compiled here. The value has the batch as its first
            axis, the relevance is one array with the batch as its first axis.
        batches: anything that iterates over batches: a `Batches`, a grain or tf.data dataset, a torch DataLoader, a list, a
            generator. A batch is x, or (x, label), or (x, label, index), or a mapping with the optional keys "label"
            and "index", of which the rest is x. All have the same number of examples, only the last may have fewer (it is
            padded). It has to come in the same order every time. What has `len` and `[number]` skips what is
            done, everything else is iterated over.
        out: where to, ending in `.h5` or `.hdf5` (one file, not compressed), or `.zarr` (a folder, compressed).
        args: arguments of `explain` before x, such as the parameters.
        labels: call `explain(*args, x, label)`, for explanations of the true class.
        run: what else tells this run from others, such as the text of the rules. It is stored, and compared on resumption,
            together with shapes, `args` and the first batch; numbers, strings, lists and mappings of these.
        layout: the order of the axes of relevance of rank 4, "NHWC" or "NCHW"; by default "NHWC". It is always written as
            NCHW, as ViRelAy has it. Relevance of other ranks is written as it is.
        sharding: a `jax.sharding.Sharding` for the batches. `args` stay where they are: put them on the same devices.
        non_finite: "raise" stops at the first batch with NaN or infinity in its relevance; what is before is stored. "warn"
            stores it and warns at the end.
        progress: show a bar with throughput and the time left; by default where standard error is a terminal.
        overwrite: begin anew, and delete what is there.

    Returns:
        A `Summary`. The store has these columns, one row for each example, in order: `attribution` (N, ...), in the dtype of
        the relevance, bfloat16 as float32; `prediction` (N, ...), the value; `label`, as given, or else the predicted class
        where predictions are (N, classes); `index`, if given.

    Raises:
        StoreError: the store belongs to another run, is damaged, in use, or cannot be written (disk full).
        RelevanceLossError: relevance is not finite.
        ArgumentError: `explain` or the batches are not as described.
        ImportError: h5py, zarr or tqdm is needed and not installed.

    Example:
        >>> import jax.numpy as jnp, numpy as np, relprop as rp, tempfile
        >>> explain = rp.value_and_explain(lambda w, x: x @ w, rp.Epsilon(), target="top")
        >>> batches = rp.dataset.Batches(np.ones((5, 3), np.float32), size=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rp.dataset.explain_dataset(explain, batches, folder + "/relevance.h5", args=(jnp.ones((3, 2)),)).examples
        5
    """
    if non_finite not in ("raise", "warn"):
        raise ArgumentError(f"non_finite={non_finite!r} is neither 'raise' nor 'warn'.")
    if not _plain(run):
        raise ArgumentError(f"run={run!r}: numbers, strings, lists and mappings, up to {LONGEST} bytes of JSON; try repr().")
    out, begun = Path(out), time.monotonic()
    loader = Loader(batches)
    compiled = _Explained(explain, args, labels, layout, sharding)
    first = loader.first
    identity = {
        "run": run,
        "size": loader.size,
        "columns": compiled.columns(first),
        "arguments": fingerprint(args),
        "first batch": fingerprint((first.x, first.label, first.index)),
    }
    store = open_store(out, identity, overwrite)
    resumed = store.rows
    try:
        if not store.complete:
            with bar(progress, out.name, loader.examples, "examples", "dataset", resumed) as show:
                _run(loader, compiled, store, non_finite, show)
            store.finish()
    finally:
        store.close()
    if store.non_finite:
        warnings.warn(
            f"The relevance of {len(store.non_finite)} of {store.rows} examples in {out} is not finite: "
            f"{_listed(store.non_finite)}.",
            NonFiniteRelevanceWarning,
            stacklevel=2,
        )
    return Summary(out, store.rows, resumed, tuple(store.non_finite), time.monotonic() - begun)


def _run(loader: "Loader", compiled: "_Explained", store: Store, non_finite: str, show: Callable[[int], Any]) -> None:
    """Read, explain and write, each while the others do."""

    def write(number: int, count: int, columns: dict[str, Any], bad: Any) -> None:
        if number != store.batches:
            return  # one before failed, which was reported
        found = [int(i) for i in np.flatnonzero(np.asarray(bad)[:count])]
        if found and non_finite == "raise":
            raise RelevanceLossError(
                f"The relevance of {_listed([store.rows + i for i in found])} is not finite: look at that input and at the "
                f"rules (`relprop.audit` names the layer). The {store.rows} examples before are safe in {store.partial}; "
                "non_finite='warn' goes on from there and reports such examples at the end."
            )
        store.write({name: np.asarray(column)[:count] for name, column in columns.items()}, found)
        show(count)

    source = loader.after(store.batches, store.rows)
    writes: deque[Future] = deque()
    with ThreadPoolExecutor(1, "relprop writer") as writer, ThreadPoolExecutor(1, "relprop loader") as reader:
        try:
            reads = deque(reader.submit(next, source, None) for _ in range(AHEAD))
            number = store.batches
            while (batch := reads.popleft().result()) is not None:
                reads.append(reader.submit(next, source, None))
                columns, bad = compiled(batch)
                writes.append(writer.submit(write, number, batch.count, columns, bad))
                number += 1
                while len(writes) > AHEAD:
                    writes.popleft().result()
            while writes:
                writes.popleft().result()
        finally:
            # What has been computed is still written; what is being read is not waited for longer than it takes.
            reader.shutdown(wait=False, cancel_futures=True)


class _Explained:
    """The compiled explanation of a batch: its columns, and which rows are not finite."""

    def __init__(self, explain: Callable[..., Any], args: Sequence[Any], labels: bool, layout: str | None, sharding: Any):
        if layout not in (None, "NHWC", "NCHW"):
            raise ArgumentError(f"layout={layout!r} is neither 'NHWC' nor 'NCHW'.")
        self.explain, self.labels, self.layout, self.sharding = explain, labels, layout, sharding
        # Once, and not for every batch; what is on devices stays where it is.
        self.args = jax.tree.map(lambda leaf: jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf, tuple(args))
        self.jitted = jax.jit(self._columns)

    def columns(self, batch: Batch) -> dict[str, dict[str, Any]]:
        """The shape of a row and the dtype of every column."""
        x, label = self._given(batch)
        shapes, _ = jax.eval_shape(self._columns, self.args, x, label)
        found = shapes | {name: array for name in ("label", "index") if (array := getattr(batch, name)) is not None}
        order = [name for name in ("attribution", "prediction", "label", "index") if name in found]
        return {name: {"shape": list(found[name].shape[1:]), "dtype": np.dtype(found[name].dtype).str} for name in order}

    def __call__(self, batch: Batch) -> tuple[dict[str, Any], Any]:
        x, label = jax.device_put(self._given(batch), self.sharding)
        columns, bad = self.jitted(self.args, x, label)
        for array in (*columns.values(), bad):
            array.copy_to_host_async()
        return columns | {n: a for n in ("label", "index") if (a := getattr(batch, n)) is not None}, bad

    def _given(self, batch: Batch) -> tuple[Any, Any]:
        if self.labels and batch.label is None:
            raise ArgumentError("labels=True explains the given labels, but the batches have none.")
        return batch.x, batch.label if self.labels else None

    def _columns(self, args, x, label):
        size = jax.tree.leaves(x)[0].shape[0]
        found = self.explain(*args, x) if label is None else self.explain(*args, x, label)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ArgumentError(
                "explain needs to return a pair (value, relevance), as relprop.value_and_explain(fn, rules) does, not "
                f"{type(found).__name__}."
            )
        value, relevance = found
        for name, array in (("value", value), ("relevance", relevance)):
            if not isinstance(array, jax.Array) or array.shape[:1] != (size,):
                raise ArgumentError(
                    f"explain: the {name} has to be one array with the {size} examples as its first axis, not "
                    f"{jax.tree.map(jnp.shape, array)}. For several inputs or outputs pick one, or concatenate them."
                )
        bad = ~jnp.isfinite(relevance).all(tuple(range(1, relevance.ndim)))
        if relevance.ndim == 4 and self.layout != "NCHW":
            relevance = jnp.moveaxis(relevance, -1, 1)
        columns = {"attribution": _storable(relevance), "prediction": _storable(value)}
        if value.ndim == 2:
            columns["label"] = jnp.argmax(value, -1).astype(jnp.int32)
        return columns, bad


def _storable(array):
    return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array


def fingerprint(tree: Any) -> int:
    """A checksum of the values of a pytree."""
    checksum = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        name = f"{jax.tree_util.keystr(path)} {getattr(leaf, 'dtype', '')} {np.shape(leaf)}"
        checksum = zlib.crc32(name.encode(), checksum)
        if hasattr(leaf, "dtype"):
            checksum = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, checksum)
        elif isinstance(leaf, bool | int | float | str):
            checksum = zlib.crc32(repr(leaf).encode(), checksum)
    return checksum


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    return f"example{'s' * (len(numbers) > 1)} {shown}" + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")


def _plain(run: Any) -> bool:
    """Whether what names a run is text, and not too long."""
    try:
        return len(json.dumps(run)) <= LONGEST
    except (TypeError, ValueError):
        return False
