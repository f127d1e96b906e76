"""Explaining a dataset: what is written, what loaders may be, and that nothing that stops a run spoils its file."""

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from jax.sharding import NamedSharding, PartitionSpec

import relprop as rp
from relprop import store as stores
from relprop.dataset import Batches, explain_dataset

FORMATS = ("relevance.h5", "relevance.zarr")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(23, 4, 5, 3)).astype(np.float32)
LABELS = RNG.integers(0, 6, 23).astype(np.uint16)
WEIGHTS = RNG.normal(size=(60, 6)).astype(np.float32)


def network(w, x):
    return x.reshape(x.shape[0], -1) @ w


top = rp.value_and_explain(network, rp.Epsilon(), target="top")


def itself(x):
    """A cheap explanation: the relevance is the input, the value its sum over all but the first two axes."""
    return x.sum(tuple(range(2, x.ndim))), x


def contents(path):
    """The bytes of a file, or of every file in a folder."""
    if path.is_file():
        return path.read_bytes()
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def opened(path):
    """The columns of a complete store, as arrays."""
    group = h5py.File(path) if path.suffix == ".h5" else zarr.open_group(path, mode="r")
    return {name: group[name][...] for name in ("attribution", "prediction", "label", "index") if name in group}


class Stop(BaseException):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("name", FORMATS)
def test_a_store_holds_relevance_prediction_and_label_of_every_example_in_order(tmp_path, name):
    batches = Batches(IMAGES, LABELS, np.arange(100, 123), size=8)
    found = explain_dataset(top, batches, tmp_path / name, args=(WEIGHTS,))
    assert (found.examples, found.resumed, found.non_finite) == (23, 0, ())
    columns = opened(tmp_path / name)
    value, relevance = top(WEIGHTS, IMAGES)
    np.testing.assert_allclose(columns["attribution"], np.moveaxis(relevance, -1, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(columns["prediction"], value, rtol=1e-5)
    np.testing.assert_array_equal(columns["label"], LABELS)
    np.testing.assert_array_equal(columns["index"], np.arange(100, 123))
    assert [column.dtype for column in columns.values()] == [np.float32, np.float32, np.uint16, np.int64]
    assert sorted(os.listdir(tmp_path)) == [name]


def test_virelay_reads_the_file(tmp_path):
    """By what AttributionDatabase of ViRelAy 0.6.1 does with a file: h5py, no options, rows found by `index`."""
    batches = Batches(IMAGES, LABELS, np.arange(100, 123, dtype=np.uint32), size=8)
    explain_dataset(top, batches, tmp_path / "relevance.h5", args=(WEIGHTS,))
    with h5py.File(tmp_path / "relevance.h5", "r") as file:
        assert all(isinstance(file[key], h5py.Dataset) for key in ("attribution", "prediction", "label"))
        assert file["label"].dtype != bool  # which would mean several labels for each example
        assert 121 in file["index"]
        assert 99 not in file["index"]
        row = np.where(file["index"][:] == 121)[0][0].item()
        data, prediction, label = file["attribution"][row], file["prediction"][row], file["label"][row]
    assert isinstance(label, np.integer)
    assert label == LABELS[21]
    value, relevance = top(WEIGHTS, IMAGES)
    np.testing.assert_allclose(prediction, value[21], rtol=1e-5)
    assert np.argmin(data.shape) == 0  # ViRelAy takes this for channels first
    np.testing.assert_allclose(np.moveaxis(data, [0, 1, 2], [2, 0, 1]), relevance[21], rtol=1e-5, atol=1e-5)


class Tensor:
    """What torch and TensorFlow have instead of numpy arrays."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)


class Loader:
    """An iterable with a length, and nothing else, as torch's DataLoader."""

    def __len__(self):
        return 3

    def __iter__(self):
        return ([Tensor(IMAGES[i : i + 8]), Tensor(LABELS[i : i + 8])] for i in (0, 8, 16))


def reusing():
    """A loader that fills the same memory again and again."""
    memory = np.empty_like(IMAGES[:8])
    for start in (0, 8, 16):
        rows = IMAGES[start : start + 8]
        memory[: len(rows)] = rows
        yield memory[: len(rows)], LABELS[start : start + 8]
        memory[...] = np.nan


LOADERS = {
    "a generator of pairs": lambda: ((IMAGES[i : i + 8], LABELS[i : i + 8]) for i in (0, 8, 16)),
    "a list of mappings": lambda: [{"image": IMAGES[i : i + 8], "label": LABELS[i : i + 8]} for i in (0, 8, 16)],
    "arrays of jax": lambda: [(jnp.asarray(IMAGES[i : i + 8]), jnp.asarray(LABELS[i : i + 8])) for i in (0, 8, 16)],
    "a loader of tensors": Loader,
    "a loader that reuses its memory": reusing,
    "an empty batch at the end": lambda: (
        [(IMAGES[:8], LABELS[:8]), (IMAGES[8:16], LABELS[8:16]), (IMAGES[16:], LABELS[16:]), (IMAGES[:0], LABELS[:0])]
    ),
}


@pytest.mark.parametrize("form", LOADERS)
def test_whatever_iterates_is_a_loader(tmp_path, form):
    explain_dataset(itself, Batches(IMAGES, LABELS, size=8), tmp_path / "batches.h5")
    explain_dataset(itself, LOADERS[form](), tmp_path / "loader.h5")
    assert contents(tmp_path / "loader.h5") == contents(tmp_path / "batches.h5")


def test_all_batches_have_one_shape_and_one_compilation(tmp_path):
    traced = []

    def explain(x):
        traced.append(x.shape)
        return itself(x)

    explain_dataset(explain, Batches(IMAGES, size=8), tmp_path / "relevance.h5")
    assert set(traced) == {(8, 4, 5, 3)}
    assert len(traced) == 2  # for the shapes, and to compile


def test_without_labels_the_label_is_the_predicted_class(tmp_path):
    explain_dataset(top, [IMAGES], tmp_path / "relevance.h5", args=(WEIGHTS,))
    np.testing.assert_array_equal(opened(tmp_path / "relevance.h5")["label"], network(WEIGHTS, IMAGES).argmax(-1))


def test_labels_are_explained_where_asked_for(tmp_path):
    def explain(w, x, label):
        return rp.value_and_explain(network, rp.Epsilon(), target=label)(w, x)

    batches = Batches(IMAGES, LABELS.astype(int), size=8)
    explain_dataset(explain, batches, tmp_path / "relevance.h5", args=(WEIGHTS,), labels=True, layout="NCHW")
    expected = rp.explain(network, rp.Epsilon(), target=LABELS.astype(int))(WEIGHTS, IMAGES)
    np.testing.assert_allclose(opened(tmp_path / "relevance.h5")["attribution"], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(rp.ArgumentError, match="the batches have none"):
        explain_dataset(explain, [IMAGES], tmp_path / "other.h5", args=(WEIGHTS,), labels=True)


def test_other_shapes_and_types(tmp_path):
    """Inputs in a mapping, relevance of tokens, half precision, several labels for each example."""
    batch = {"tokens": np.arange(12).reshape(4, 3), "mask": np.ones((4, 3), bool), "label": np.eye(4, 5, dtype=bool)}

    def explain(x):
        relevance = jnp.where(x["mask"], x["tokens"], 0).astype(jnp.bfloat16)
        return relevance.sum(1), relevance

    explain_dataset(explain, [batch], tmp_path / "relevance.h5")
    columns = opened(tmp_path / "relevance.h5")
    np.testing.assert_array_equal(columns["attribution"], batch["tokens"])
    np.testing.assert_array_equal(columns["prediction"], batch["tokens"].sum(1))
    assert columns["label"].dtype == bool
    assert columns["attribution"].dtype == np.float32


def test_a_sharded_explanation_writes_the_same(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    assert len(jax.device_put(IMAGES[:8], sharding).sharding.device_set) == 8
    explain_dataset(itself, Batches(IMAGES, LABELS, size=8), tmp_path / "plain.h5")
    explain_dataset(itself, Batches(IMAGES, LABELS, size=8), tmp_path / "sharded.h5", sharding=sharding)
    assert contents(tmp_path / "sharded.h5") == contents(tmp_path / "plain.h5")


class Watched(Batches):
    """Batches that remember which of them were read, and stop at one."""

    def __init__(self, *arrays, stop=None, error=Stop, **options):
        super().__init__(*arrays, **options)
        self.read, self.stop, self.error = [], stop, error

    def __getitem__(self, number):
        if number == self.stop:
            raise self.error
        self.read.append(number)
        return super().__getitem__(number)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("name", FORMATS)
def test_a_stopped_run_goes_on_after_its_last_batch(tmp_path, name, error):
    out = tmp_path / name
    with pytest.raises(error):
        explain_dataset(itself, Watched(IMAGES, LABELS, size=4, stop=3, error=error), out)
    assert not out.exists()
    batches = Watched(IMAGES, LABELS, size=4)
    found = explain_dataset(itself, batches, out)
    assert (found.examples, found.resumed) == (23, 12)
    assert batches.read == [0, 3, 4, 5]  # the first to know the data by
    explain_dataset(itself, Batches(IMAGES, LABELS, size=4), tmp_path / f"undisturbed-{name}")
    assert contents(out) == contents(tmp_path / f"undisturbed-{name}")


def test_what_cannot_be_indexed_is_iterated_over_but_not_explained_again(tmp_path):
    def stream(stop=None):
        for number, start in enumerate(range(0, 23, 4)):
            if number == stop:
                raise Stop
            yield IMAGES[start : start + 4]

    explained = []

    def explain(x):
        jax.debug.callback(lambda x: explained.append(float(x[0, 0, 0, 0])), x)
        return itself(x)

    with pytest.raises(Stop):
        explain_dataset(itself, stream(stop=3), tmp_path / "relevance.h5")
    explain_dataset(explain, stream(), tmp_path / "relevance.h5")
    jax.effects_barrier()
    assert sorted(explained) == sorted(IMAGES[[12, 16, 20], 0, 0, 0].tolist())
    explain_dataset(itself, stream(), tmp_path / "undisturbed.h5")
    assert contents(tmp_path / "relevance.h5") == contents(tmp_path / "undisturbed.h5")


def test_a_complete_store_is_left_alone(tmp_path):
    out = tmp_path / "relevance.h5"
    explain_dataset(itself, Batches(IMAGES, size=8), out)
    before = out.stat()
    batches = Watched(IMAGES, size=8)
    found = explain_dataset(itself, batches, out)
    assert (found.examples, found.resumed) == (23, 23)
    assert batches.read == [0]
    assert out.stat() == before
    explain_dataset(itself, Batches(2 * IMAGES, size=8), out, overwrite=True)
    np.testing.assert_array_equal(opened(out)["attribution"], np.moveaxis(2 * IMAGES, -1, 1))
    before = contents(out)
    with pytest.raises(rp.ArgumentError):  # a call that cannot run deletes nothing
        explain_dataset(lambda x: x, Batches(IMAGES, size=8), out, overwrite=True)
    with pytest.raises(rp.ArgumentError):
        explain_dataset(itself, Batches(IMAGES, size=8), tmp_path, overwrite=True)
    assert contents(out) == before


DIFFERENT = {
    "the parameters": ({"args": (2 * WEIGHTS,)}, {}, "arguments was"),
    "the rules": ({"run": {"rules": "Gamma()"}}, {}, r"run/rules was Epsilon\(\), is Gamma\(\)"),
    "the size of a batch": ({}, {"size": 2}, "size was 4, is 2"),
    "the data": ({}, {"input": 2 * IMAGES}, "first batch was"),
    "the labels": ({}, {"label": LABELS[::-1]}, "first batch was"),
    "the columns": ({}, {"index": np.arange(23)}, "columns/index/shape was None"),
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("what", DIFFERENT)
def test_another_run_does_not_go_on_with_a_store(tmp_path, what, finished):
    given = {"args": (WEIGHTS,), "run": {"rules": "Epsilon()"}}
    arrays = {"input": IMAGES, "label": LABELS, "size": 4}
    out = tmp_path / "relevance.h5"
    if finished:
        explain_dataset(top, Batches(**arrays), out, **given)
    else:
        with pytest.raises(Stop):
            explain_dataset(top, Watched(IMAGES, LABELS, size=4, stop=3), out, **given)
    before = contents(tmp_path)
    others, others_arrays, message = DIFFERENT[what]
    with pytest.raises(rp.StoreError, match=f"belongs to another run: .*{message}.*overwrite"):
        explain_dataset(top, Batches(**(arrays | others_arrays)), out, **(given | others))
    assert contents(tmp_path) == before


def damage_data(partial):
    place = next(p for p in partial.rglob("*") if p.is_file() and p.name in ("attribution", "1.0.0.0"))
    data = bytearray(place.read_bytes())
    data[-5] ^= 1
    place.write_bytes(data)


def truncate_data(partial):
    place = next(p for p in partial.rglob("*") if p.is_file() and p.name in ("attribution", "1.0.0.0"))
    os.truncate(place, place.stat().st_size - 1)


def garble_journal(partial):
    place = partial / "journal"
    place.write_bytes(place.read_bytes().replace(b"rows", b"r", 1))


@pytest.mark.parametrize("damage", [damage_data, truncate_data, garble_journal])
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_store_is_an_error(tmp_path, name, damage):
    out = tmp_path / name
    with pytest.raises(Stop):
        explain_dataset(itself, Watched(IMAGES, LABELS, size=4, stop=3), out)
    damage(tmp_path / f"{name}.partial")
    with pytest.raises(rp.StoreError, match=r"is damaged: .*Delete that folder"):
        explain_dataset(itself, Batches(IMAGES, LABELS, size=4), out)
    assert explain_dataset(itself, Batches(IMAGES, LABELS, size=4), out, overwrite=True).resumed == 0


def test_a_complete_file_that_was_damaged_or_is_foreign_is_an_error(tmp_path):
    out = tmp_path / "relevance.h5"
    batches = Batches(IMAGES, LABELS, size=4)
    explain_dataset(itself, batches, out)
    os.truncate(out, out.stat().st_size - 1)
    with pytest.raises(rp.StoreError, match=r"cannot be read as HDF5 .*truncated"):
        explain_dataset(itself, batches, out)
    out.unlink()
    with h5py.File(out, "w") as file:
        file["attribution"] = IMAGES
    with pytest.raises(rp.StoreError, match="was not made by relprop"):
        explain_dataset(itself, batches, out)
    (tmp_path / "relevance.zarr").mkdir()
    with pytest.raises(rp.StoreError, match="cannot be read as zarr"):
        explain_dataset(itself, batches, tmp_path / "relevance.zarr")


@pytest.mark.parametrize(("name", "late"), [("relevance.h5", False), ("relevance.h5", True), ("relevance.zarr", False)])
def test_a_full_disk_is_reported_and_the_run_goes_on_once_there_is_room(tmp_path, monkeypatch, name, late):
    """Full in the middle of a run, or late, when HDF5 needs room for the head of the file."""
    out = tmp_path / name
    sync = stores._sync

    def full(file):
        stored = os.path.getsize(f"{out}.partial/journal")
        beyond = os.path.getsize(file.name) > stores.Hdf5Store.GAP + IMAGES.nbytes
        if (late and beyond) or (not late and stored > 700):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(stores, "_sync", full)
    with pytest.raises(rp.StoreError, match=r"No space left on device.* examples before are safe in .*make room"):
        explain_dataset(itself, Batches(IMAGES, LABELS, size=2), out)
    assert not out.exists()
    monkeypatch.undo()
    assert explain_dataset(itself, Batches(IMAGES, LABELS, size=2), out).resumed > 0
    explain_dataset(itself, Batches(IMAGES, LABELS, size=2), tmp_path / f"undisturbed-{name}")
    assert contents(out) == contents(tmp_path / f"undisturbed-{name}")


def test_relevance_that_is_not_finite_is_reported(tmp_path):
    images = IMAGES.copy()
    images[[9, 10, 22], 0, 0, 0] = np.nan, np.inf, np.nan
    out = tmp_path / "relevance.h5"
    with pytest.raises(rp.RelevanceLossError, match=r"examples 9, 10 is not finite.* 8 examples before are safe"):
        explain_dataset(itself, Batches(images, size=4), out)
    with pytest.warns(rp.NonFiniteRelevanceWarning, match=r"3 of 23 examples .*: examples 9, 10, 22"):
        found = explain_dataset(itself, Batches(images, size=4), out, non_finite="warn")
    assert (found.resumed, found.non_finite) == (8, (9, 10, 22))
    with h5py.File(out) as file:
        assert file["non_finite"][:].tolist() == [9, 10, 22]
    with pytest.warns(rp.NonFiniteRelevanceWarning, match="3 of 23"):  # again, for those who only look at the last call
        explain_dataset(itself, Batches(images, size=4), out)


def test_two_runs_do_not_write_one_store(tmp_path):
    def batches():
        yield IMAGES
        with pytest.raises(rp.StoreError, match="Another process is writing"):
            explain_dataset(itself, [IMAGES], tmp_path / "relevance.h5")
        tried.append(True)

    tried = []
    explain_dataset(itself, batches(), tmp_path / "relevance.h5")
    assert tried


WRONG = {
    "no batches": (itself, [], {}, "no batches.*generator"),
    "an empty first batch": (itself, [IMAGES[:0]], {}, "first batch is empty"),
    "a short batch in the middle": (itself, [IMAGES[:4], IMAGES[4:6], IMAGES[6:10]], {}, "Batch 1 has 2 .*only the last"),
    "a long batch": (itself, [IMAGES[:4], IMAGES[4:10]], {}, "Batch 1 has 6 examples, more than the 4"),
    "other lengths": (itself, [(IMAGES[:4], LABELS[:3])], {}, "one leading axis of one length"),
    "only labels": (itself, [{"label": LABELS}], {}, "besides 'label' and 'index' it needs the input"),
    "too many parts": (itself, [(IMAGES,) * 4], {}, "got 4 items"),
    "labels of another shape": (itself, [(IMAGES, LABELS), (IMAGES, np.eye(23))], {}, "Batch 1: label has the shape"),
    "relevance alone": (lambda x: x, [IMAGES], {}, r"pair \(value, relevance\)"),
    "a sum over the batch": (lambda x: (x.sum(), x), [IMAGES], {}, "value has to be one array with the 23 examples"),
    "several inputs": (lambda x: (x[:, 0], {"x": x}), [IMAGES], {}, "relevance has to be one array"),
    "a layout": (itself, [IMAGES], {"layout": "HWNC"}, "neither 'NHWC' nor 'NCHW'"),
    "what to do about NaN": (itself, [IMAGES], {"non_finite": "ignore"}, "neither 'raise' nor 'warn'"),
    "an object as the run": (itself, [IMAGES], {"run": rp.Epsilon()}, "try repr"),
    "a text without end": (itself, [IMAGES], {"run": "x" * 40000}, "up to 32768 bytes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_an_error(tmp_path, what):
    explain, batches, options, message = WRONG[what]
    with pytest.raises(rp.ArgumentError, match=message):
        explain_dataset(explain, batches, tmp_path / "relevance.h5", **options)
    assert not (tmp_path / "relevance.h5").exists()


def test_other_errors(tmp_path, monkeypatch):
    with pytest.raises(rp.ArgumentError, match=r"one of \.h5, \.hdf5, \.zarr"):
        explain_dataset(itself, [IMAGES], tmp_path / "relevance.npz")
    with pytest.raises(rp.ArgumentError, match=r"size=0 need arrays of one length"):
        Batches(IMAGES, size=0)
    with pytest.raises(Stop):
        explain_dataset(itself, Watched(IMAGES, size=4, stop=4), tmp_path / "relevance.h5")
    for shorter in (Batches(IMAGES[:8], size=4), (IMAGES[i : i + 4] for i in (0, 4))):
        with pytest.raises(rp.ArgumentError, match="gave 2 batches, but 4 are stored"):
            explain_dataset(itself, shorter, tmp_path / "relevance.h5")
    for name, out, options in (("h5py", "a.h5", {}), ("zarr", "a.zarr", {}), ("tqdm", "a.h5", {"progress": True})):
        with monkeypatch.context() as context:
            context.setitem(sys.modules, name, None)
            with pytest.raises(ImportError, match=rf"{name} is not installed.*pip install \"relprop\[dataset\]\""):
                explain_dataset(itself, [IMAGES], tmp_path / out, **options)


def test_the_bar_shows_throughput_and_the_time_left(tmp_path, capsys):
    with pytest.raises(Stop):
        explain_dataset(itself, Watched(IMAGES, size=4, stop=3), tmp_path / "relevance.h5", progress=True)
    explain_dataset(itself, Batches(IMAGES, size=4), tmp_path / "relevance.h5", progress=True)
    bar = capsys.readouterr().err.split("\r")
    assert "relevance.h5" in bar[-1]
    assert "23.0/23.0" in bar[-1]
    assert "examples/s" in bar[-1]
    assert any("12.0/23.0" in line for line in bar)  # where the second run begins


def test_batches_read_from_disk_what_is_asked_for(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    batches = Batches(np.load(tmp_path / "images.npy", mmap_mode="r"), size=8)
    assert isinstance(batches[1]["input"], np.memmap)
    assert [len(batch["input"]) for batch in batches] == [8, 8, 7]


IDENTITY = {"size": 3, "columns": {"attribution": {"shape": [2], "dtype": "<f4"}, "label": {"shape": [], "dtype": "<i4"}}}


def stored(path):
    """Write seven rows in three batches, from wherever the store is."""
    store = stores.open_store(path, IDENTITY)
    try:
        rows = np.arange(7)
        while not store.complete:
            here = rows[store.batches * 3 : store.batches * 3 + 3]
            if len(here) == 0:
                store.finish()
            else:
                columns = {"attribution": np.stack([here, -here], 1).astype(np.float32), "label": here.astype(np.int32)}
                store.write(columns, [0] if store.batches == 1 else [])
    finally:
        store.close()
    return store


@pytest.mark.parametrize("name", FORMATS)
def test_a_store_that_stops_at_any_step_ends_the_same(tmp_path, monkeypatch, name):
    """Before and after every call that makes something durable, and in the middle of those that write the journal."""
    steps, stop = 0, None

    def step():
        nonlocal steps
        steps += 1
        if steps == stop:
            raise Stop

    def around(function):
        def watched(*args, **kwargs):
            step()
            found = function(*args, **kwargs)
            step()
            return found

        return watched

    def halves(write):
        def watched(handle, data):
            write(handle, data[: len(data) // 2])
            step()
            return len(data) // 2 + write(handle, data[len(data) // 2 :])

        return watched

    assert stored(tmp_path / name).rows == 7
    undisturbed = contents(tmp_path / name)
    stores.remove(tmp_path / name)
    for function in ("fsync", "replace"):
        monkeypatch.setattr(os, function, around(getattr(os, function)))
    monkeypatch.setattr(os, "write", halves(os.write))
    monkeypatch.setattr(stores.shutil, "rmtree", around(stores.shutil.rmtree))
    stored(tmp_path / name)
    total, resumed = steps, set()
    assert total > 40
    for stop in range(1, total + 1):  # noqa: B007
        stores.remove(tmp_path / name)
        steps = 0
        with pytest.raises(Stop):
            stored(tmp_path / name)
        if (tmp_path / name).exists():
            assert contents(tmp_path / name) == undisturbed  # what has the name is complete
        steps = total  # beyond every stop
        store = stores.open_store(tmp_path / name, IDENTITY)
        resumed.add(store.rows)
        store.close()
        store = stored(tmp_path / name)
        assert contents(tmp_path / name) == undisturbed
        assert (store.rows, store.non_finite) == (7, [3])
        assert os.listdir(tmp_path) == [name]
    assert resumed == {0, 3, 6, 7}


CHILD = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
import relprop as rp

out, examples, size, wait = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])
side = int(sys.argv[5])
w1, w2 = (np.random.default_rng(n).normal(size=s).astype("f4") for n, s in ((0, (side**2 * 3, 16)), (1, (16, 10))))
fn = lambda w, x: jax.nn.relu(x.reshape(x.shape[0], -1) @ w[0]) @ w[1]

def batches():
    for start in range(0, examples, size):
        rng = np.random.default_rng(start)
        count = min(size, examples - start)
        time.sleep(wait)
        yield rng.normal(size=(count, side, side, 3)).astype("f4"), rng.integers(0, 10, count)

explain = rp.value_and_explain(fn, rp.Gamma(), target="top")
found = rp.dataset.explain_dataset(explain, batches(), out, args=((w1, w2),), run="Gamma()")
print(found.resumed)
"""


def killed(folder, name, examples, size, wait, side, kills, seed):
    """Run a child undisturbed, and another that is killed; the digests of both, and where the latter was each time."""

    def child(out):
        command = [sys.executable, "-c", CHILD, str(out), *map(str, (examples, size, wait, side))]
        path = os.pathsep.join([str(Path(rp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def digest(out):
        files = contents(out)
        files = {"": files} if isinstance(files, bytes) else files
        return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

    undisturbed = child(folder / f"undisturbed-{name}")
    chance, out = random.Random(seed), folder / name
    journal = folder / f"{name}.partial" / "journal"
    total = -(-examples // size)
    places = sorted(chance.randrange(total * 4 // 5) for _ in range(kills))
    for place in places:
        process = child(out)
        # Killed in the middle of whatever follows a batch that is chosen at random.
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") - 1 < place):
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, error
        assert not out.exists()
    last = child(out)
    found, error = last.communicate()
    assert last.returncode == 0, error
    assert int(found) >= places[-1] * size
    _, error = undisturbed.communicate()
    assert undisturbed.returncode == 0, error
    return digest(out), digest(folder / f"undisturbed-{name}")


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    found, undisturbed = killed(tmp_path, "relevance.h5", examples=2000, size=50, wait=0.02, side=8, kills=3, seed=0)
    assert found == undisturbed


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(("name", "examples"), [("relevance.h5", 100_000), ("relevance.zarr", 20_000)])
def test_a_run_of_100_000_images_killed_ten_times_ends_as_an_undisturbed_one(tmp_path, name, examples):
    found, undisturbed = killed(tmp_path, name, examples=examples, size=500, wait=0.005, side=16, kills=10, seed=1)
    assert found == undisturbed
