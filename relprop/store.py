"""Stores of relevance, HDF5 or zarr, that a run may be killed over at any moment.

A store in progress is a folder `NAME.partial` beside the file or folder NAME that it becomes. A journal in it has a line for
each batch, which is written once the batch is on disk. What comes after the last line does not count, so nothing that
is half written is ever read. NAME itself is made by a rename, when everything is there.
"""

import abc
import errno
import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .errors import ArgumentError, StoreError
from .progress import require

FORMAT = 1
IDENTITY = "relprop"  # the attribute of a complete store that says which run made it


class Store(abc.ABC):
    """Columns of a fixed number of rows for each batch; the last batch may have fewer.

    Args:
        path: of the complete store.
        identity: what makes a run the same run: numbers, strings, lists and mappings of these. Its entry "columns" has the
            shape of one row and the dtype of each column by name, "size" the rows of a batch.

    Attributes:
        batches, rows: how many are safely stored.
        non_finite: which rows have relevance that is not finite.
        complete: whether the store has its final name.

    Raises:
        StoreError: the store belongs to another run, is damaged, or is being written by another process.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        self.size: int = self.identity["size"]
        self.columns = {
            name: (tuple(column["shape"]), np.dtype(column["dtype"])) for name, column in self.identity["columns"].items()
        }
        self.batches, self.rows = 0, 0
        self.non_finite: list[int] = []
        self.complete = path.exists()
        if self.complete:
            # A run that was killed between the rename and this leaves its empty folder.
            attributes = self._attributes()
            self._compare(json.loads(attributes.get(IDENTITY, "{}")), path)
            shutil.rmtree(self.partial, ignore_errors=True)
            self.rows, self.non_finite = int(attributes["examples"]), [int(i) for i in attributes["non_finite"]]
            self.batches = math.ceil(self.rows / self.size)
            return
        self.partial.mkdir(parents=True, exist_ok=True)
        self._journal = os.open(self.partial / "journal", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock()
            self._recover()
        except BaseException:
            self.close()
            raise

    def write(self, rows: Mapping[str, np.ndarray], non_finite: list[int]) -> None:
        """Store the next batch; it counts once this returns. `non_finite` are indices of its rows."""
        try:
            self._write(rows, non_finite)
        except OSError as error:
            raise self._unwritable(error) from error

    def _write(self, rows, non_finite):
        count = len(next(iter(rows.values())))
        checksum = 0
        for name in self.columns:
            shape, dtype = self.columns[name]
            array = np.ascontiguousarray(rows[name], dtype)
            if array.shape != (count, *shape):
                raise ArgumentError(
                    f"Batch {self.batches}: {name} has the shape {array.shape}, but in the first batch a row had {shape}."
                )
            data = self._encode(name, array)
            checksum = zlib.crc32(data, checksum)
            place, offset = self._place(name, self.batches)
            there = place.exists()
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "r+b" if there else "xb") as file:
                file.seek(offset)
                file.write(data)
                _sync(file)
            if not there:
                _sync_folder(place.parent)
                _sync_folder(place.parent.parent)
        found = [self.rows + i for i in non_finite]
        self._append({"rows": count, "checksum": checksum, "non_finite": found})
        self.batches, self.rows = self.batches + 1, self.rows + count
        self.non_finite += found

    def finish(self) -> None:
        """Give the store its name. Nothing may be written after this."""
        try:
            self._finish()
        except (OSError, RuntimeError) as error:  # h5py has both for a full disk
            raise error if isinstance(error, StoreError) else self._unwritable(error) from error

    def _finish(self):
        self._assemble({IDENTITY: json.dumps(self.identity), "examples": self.rows, "non_finite": self.non_finite})
        _sync_folder(self.partial)
        os.replace(self._assembled, self.path)
        _sync_folder(self.path.parent)
        self.complete = True
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def close(self) -> None:
        """Let go of the journal. What is stored remains, and the next run goes on from there."""
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    _journal = -1

    @property
    @abc.abstractmethod
    def _assembled(self) -> Path:
        """What is renamed when it is complete."""

    @abc.abstractmethod
    def _place(self, name: str, batch: int) -> tuple[Path, int]:
        """The file, and the offset in it, that a batch of a column is written to."""

    @abc.abstractmethod
    def _encode(self, name: str, array: np.ndarray) -> Any:
        """The bytes of a batch of a column."""

    @abc.abstractmethod
    def _discard(self) -> None:
        """Remove what is beyond the last batch that counts."""

    @abc.abstractmethod
    def _assemble(self, attributes: Mapping[str, Any]) -> None:
        """Make a store of the format out of the batches, in place."""

    @abc.abstractmethod
    def _attributes(self) -> Mapping[str, Any]:
        """The attributes of the complete store."""

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: two runs that write the same store are not told apart
            return
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # a file system without locks
            raise StoreError(f"Another process is writing {self.path}: wait for it, or write elsewhere.") from None

    def _recover(self) -> None:
        """Read the journal, check what it promises, and remove what it does not."""
        text = (self.partial / "journal").read_bytes()
        end = text.rfind(b"\n") + 1  # a last line without its end was being written
        os.ftruncate(self._journal, end)
        os.lseek(self._journal, end, os.SEEK_SET)
        try:
            lines = [json.loads(line) for line in text[:end].splitlines()]
            head, entries = (lines[0], lines[1:]) if lines else (None, [])
            checksums = [(int(e["rows"]), int(e["checksum"]), [int(i) for i in e["non_finite"]]) for e in entries]
        except (ValueError, KeyError, TypeError):
            raise self._damaged(f"its journal, {self.partial / 'journal'}, cannot be read") from None
        if head is None:
            self._append(self.identity)
            _sync_folder(self.partial)
            _sync_folder(self.partial.parent)
        else:
            self._compare(head, self.partial)
        for rows, checksum, non_finite in checksums:
            if self.rows % self.size or self._checksum(self.batches, rows) != checksum:
                raise self._damaged(f"batch {self.batches} is not what was written")
            self.batches, self.rows = self.batches + 1, self.rows + rows
            self.non_finite += non_finite
        self._discard()

    def _checksum(self, batch: int, rows: int) -> int:
        checksum = 0
        for name in self.columns:
            place, offset = self._place(name, batch)
            try:
                with open(place, "rb") as file:
                    file.seek(offset)
                    checksum = zlib.crc32(file.read(self._length(name, rows)), checksum)
            except FileNotFoundError:
                return -1
        return checksum

    def _length(self, name: str, rows: int) -> int:
        """How many bytes a batch of a column has; -1 for all of its file."""
        return -1

    def _unwritable(self, error: Exception) -> StoreError:
        return StoreError(
            f"{self.path} cannot be written: {error}. The {self.rows} examples before are safe in {self.partial}: see to "
            "the cause (make room), and the same call goes on from there."
        )

    def _damaged(self, what: str) -> StoreError:
        return StoreError(
            f"The unfinished store {self.partial} is damaged: {what}. Something besides relprop changed it, or the disk is "
            "faulty. Delete that folder (or overwrite it) to begin anew."
        )

    def _compare(self, found: Mapping[str, Any], where: Path) -> None:
        if found == self.identity:
            return
        if not found:
            raise StoreError(f"{where} exists and was not made by relprop.dataset: write elsewhere, or overwrite it.")
        ours, theirs = dict(_leaves(self.identity)), dict(_leaves(found))
        names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        differences = "; ".join(f"{name} was {theirs.get(name)}, is {ours.get(name)}" for name in names)
        raise StoreError(
            f"{where} belongs to another run: {differences}. Run with what it was begun with, write elsewhere, or overwrite "
            "it."
        )

    def _append(self, entry: Any) -> None:
        data = json.dumps(entry).encode() + b"\n"
        while data:
            data = data[os.write(self._journal, data) :]
        os.fsync(self._journal)


class Hdf5Store(Store):
    """One HDF5 file with a contiguous dataset for each column, as ViRelAy reads it.

    The largest column, `attribution`, is written where it stays, behind a gap for the head of the file. The head and the
    other columns, which are kept beside until then, come last: before, the file has no signature and nothing opens it.
    """

    suffixes = (".h5", ".hdf5")
    FIRST = "attribution"
    # A block for metadata and its alignment: then the first dataset begins at the same place however many rows it has.
    BLOCK, ALIGNMENT = 16384, 4096
    GAP = BLOCK + ALIGNMENT

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.h5py = require("h5py", "writing HDF5", "dataset")
        super().__init__(path, identity)

    @property
    def _assembled(self) -> Path:
        return self.partial / self.FIRST

    def _place(self, name, batch):
        start = self.GAP if name == self.FIRST else 0
        return self.partial / name, start + batch * self._length(name, self.size)

    def _length(self, name, rows):
        shape, dtype = self.columns[name]
        return rows * math.prod(shape) * dtype.itemsize

    def _encode(self, name, array):
        return array.reshape(-1).view(np.uint8).data

    def _discard(self):
        for name in self.columns:
            place, start = self._place(name, 0)
            if place.exists():
                os.truncate(place, start + self._length(name, self.rows))

    def _assemble(self, attributes):
        with open(self._assembled, "r+b") as data:
            end = self.GAP + self._length(self.FIRST, self.rows)
            around = _Around(data, self.GAP, end)
            options = {"alignment_threshold": 1, "alignment_interval": self.ALIGNMENT, "meta_block_size": self.BLOCK}
            with self.h5py.File(around, "w", libver=("earliest", "v108"), **options) as file:
                if self._create(file, self.FIRST).id.get_offset() != self.GAP:
                    raise StoreError(f"HDF5 {self.h5py.version.hdf5_version} lays out files in another way.")
                for name in self.columns:
                    if name != self.FIRST:
                        self._fill(self._create(file, name), name)
                for name, value in attributes.items():
                    # Attributes have a size limit; a dataset has not.
                    if isinstance(value, list):
                        file.create_dataset(name, data=np.asarray(value, np.int64), track_times=False)
                    else:
                        file.attrs[name] = value
            around.finish()

    def _create(self, file, name):
        """A dataset whose space is there at once, and is not filled."""
        shape, dtype = self.columns[name]
        h5d = self.h5py.h5d
        options = self.h5py.h5p.create(self.h5py.h5p.DATASET_CREATE)
        options.set_layout(h5d.CONTIGUOUS)
        options.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        options.set_fill_time(h5d.FILL_TIME_NEVER)
        options.set_obj_track_times(False)
        space = self.h5py.h5s.create_simple((self.rows, *shape))
        kind = self.h5py.h5t.py_create(dtype, logical=True)
        return self.h5py.Dataset(h5d.create(file.id, name.encode(), kind, space, options))

    def _fill(self, dataset, name):
        shape, dtype = self.columns[name]
        with open(self.partial / name, "rb") as file:
            for start in range(0, self.rows, self.size):
                count = min(self.size, self.rows - start)
                piece = np.frombuffer(file.read(self._length(name, count)), dtype)
                dataset[start : start + count] = piece.reshape(count, *shape)

    def _attributes(self):
        try:
            with self.h5py.File(self.path, "r") as file:
                return {**file.attrs, "non_finite": file["non_finite"][:]} if IDENTITY in file.attrs else {}
        except (OSError, KeyError) as error:
            raise StoreError(
                f"{self.path} exists and cannot be read as HDF5 ({error}): move it away, or overwrite it."
            ) from None


class _Around(io.RawIOBase):
    """What HDF5 writes a file to whose middle, from `start` to `end`, is there already.

    What comes before is kept in memory, and written when everything else is on disk. Errors are kept as well, for `finish`
    to raise: HDF5 does not survive a disk that is full.
    """

    def __init__(self, file: Any, start: int, end: int):
        self.file, self.start, self.end = file, start, end
        self.head, self.position, self.size = bytearray(start), 0, 0
        self.error: OSError | None = None

    def finish(self) -> None:
        if self.error is not None:
            raise self.error
        self.file.truncate(self.size)
        _sync(self.file)
        self.file.seek(0)
        self.file.write(self.head)
        _sync(self.file)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def truncate(self, size: int | None = None) -> int:
        self.size = self.position if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        data, place = memoryview(data).cast("B"), self.position
        before = data[: max(0, self.start - place)]
        self.head[place : place + len(before)] = before
        if len(before) < len(data) and self.error is None:
            try:
                if place < self.end:
                    raise StoreError("HDF5 wrote over the relevance.")
                self.file.seek(place)
                self.file.write(data)
            except OSError as error:
                self.error = error
        self.position += len(data)
        self.size = max(self.size, self.position)
        return len(data)

    def readinto(self, buffer: Any) -> int:
        view, place = memoryview(buffer).cast("B"), self.position
        before = self.head[place : place + len(view)]
        view[: len(before)] = before
        self.file.seek(max(place, self.start))
        found = self.file.read(len(view) - len(before))
        view[len(before) : len(before) + len(found)] = found
        self.position += len(before) + len(found)
        return len(before) + len(found)


class ZarrStore(Store):
    """A zarr group (format 3) with an array for each column: one chunk for each batch, compressed by zarr's default.

    Chunks are files that are written whole; the metadata that make a zarr group of them come last.
    """

    suffixes = (".zarr",)

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self.zarr = require("zarr", "writing zarr", "dataset")
        super().__init__(path, identity)

    @property
    def _assembled(self) -> Path:
        return self.partial / "store"

    def _place(self, name, batch):
        return self.partial / "store" / name / ".".join([str(batch), *("0" for _ in self.columns[name][0])]), 0

    def _encode(self, name, array):
        # zarr compresses one chunk in memory; the file is written here, to know when it is on disk.
        shape, _ = self.columns[name]
        chunk = np.zeros((self.size, *shape), array.dtype)
        chunk[: len(array)] = array
        memory: dict[str, Any] = {}
        self._create(self.zarr.storage.MemoryStore(memory), name, self.size)[:] = chunk
        (place,) = (key for key in memory if not key.endswith("zarr.json"))
        return memory[place].to_bytes()

    def _create(self, store, name, rows):
        shape, dtype = self.columns[name]
        return self.zarr.create_array(
            store,
            name=name,
            shape=(rows, *shape),
            chunks=(self.size, *(max(1, n) for n in shape)),
            dtype=dtype,
            fill_value=0,
            zarr_format=3,
            chunk_key_encoding={"name": "v2", "separator": "."},
            config={"write_empty_chunks": True},
        )

    def _discard(self):
        kept = {self._place(name, batch)[0] for name in self.columns for batch in range(self.batches)}
        for file in (self.partial / "store").rglob("*"):
            if file.is_file() and file not in kept:
                file.unlink()

    def _assemble(self, attributes):
        # zarr works in threads of its own, which outlive an interrupt: it gets memory, and the files are written here.
        memory: dict[str, Any] = {}
        self.zarr.create_group(self.zarr.storage.MemoryStore(memory), attributes=dict(attributes))
        for name in self.columns:
            self._create(self.zarr.storage.MemoryStore(memory), name, self.rows)
        for key, data in memory.items():
            place = self.partial / "store" / key
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "wb") as file:
                file.write(data.to_bytes())
                _sync(file)
            _sync_folder(place.parent)

    def _attributes(self):
        try:
            return dict(self.zarr.open_group(self.path, mode="r").attrs)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.path} exists and cannot be read as zarr ({error}): move it away, or overwrite it."
            ) from None


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What is in mappings of mappings, by its path."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}/{key}" if name else key)
    else:
        yield name, tree


def open_store(path: Path, identity: Mapping[str, Any], overwrite: bool = False) -> Store:
    """The store that the suffix of a path asks for; with `overwrite`, what is there is removed before."""
    for kind in (Hdf5Store, ZarrStore):
        if path.suffix in kind.suffixes:
            if overwrite:
                remove(path)
            return kind(path, identity)
    known = ", ".join([*Hdf5Store.suffixes, *ZarrStore.suffixes])
    raise ArgumentError(f"out={str(path)!r}: the suffix says what is written, one of {known}.")


def remove(path: Path) -> None:
    """Remove a store, complete or not, if it is there."""
    for found in (path, path.with_name(path.name + ".partial")):
        if found.is_dir():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a loss of power."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
