"""One flat token stream over the shards of a set or view: what training, evaluation and inspection read.

The stream is the concatenation of the manifest's segments [shard, start, stop). With the lengths summed up,
c = [0, stop_0 - start_0, ...] and N = c[-1], the token at position p lies in segment `searchsorted(c, p, 'right') - 1`.
A window may cross rows, shards and segments.

Opening checks every shard's size and header; content is hashed according to `verify`:

    first-use  a shard is hashed before its first token is used (links always are)
    full       all shards are hashed at open
    size       plain files are trusted by size and header

Reading is `preadv` on kept descriptors into the caller's array: no page is mapped, so a shard that is cut while in use
is an error and not a SIGBUS, and the memory of a long run stays flat. Streams may be shared by threads, inherited by
forks and pickled into other processes.

    stream = TokenStream.open("shards/stdlib/train")
    stream.windows(np.array([0, 5000]), 1025)            # (2, 1025) uint16

Left out: which windows to read (sampler.py), which document a token belongs to (provenance.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lmcore.data import shard as shards
from lmcore.data.manifest import TOKENIZER, Manifest, ShardEntry, read_manifest
from lmcore.errors import Exit, LmError, from_os_error

Verify = Literal["first-use", "full", "size"]

_MAX_OPEN = 512  # descriptors kept per stream, fewer where the process may not have many


class TokenStream:
    """N tokens, addressed 0 .. N-1. Make one with `open` (a set or view) or `from_array`."""

    dtype: np.dtype[Any]
    """Stored dtype: '<u2' or '<u4' for shards, the array's own for arrays."""
    manifest: Manifest | None
    """None for arrays."""
    path: Path | None
    """Directory of the set or view; None for arrays."""

    def __init__(self, path: Path | None, manifest: Manifest | None, array: npt.NDArray[Any] | None, verify: Verify):
        self.path, self.manifest, self._array, self._verify = path, manifest, array, verify
        if manifest is not None:
            segments = np.asarray(manifest.segments, np.int64).reshape(-1, 3)
            self.dtype = np.dtype("<u2" if manifest.dtype == "uint16" else "<u4")
        else:
            assert array is not None
            segments = np.array([[0, 0, array.size]], np.int64)
            self.dtype = array.dtype
        self._shard, self._start = segments[:, 0].copy(), segments[:, 1].copy()
        self._ends = np.concatenate(
            [np.zeros(1, np.int64), np.cumsum(segments[:, 2] - segments[:, 1])]
        )  # (segments+1,)
        # Position p of a segment is token p + shift of its shard.
        self._shift = self._start - self._ends[:-1]
        self._n = int(self._ends[-1])
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[int, shards.ShardFile] = OrderedDict()
        self._directory = shards.open_directory(self.path) if self.path is not None else -1

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """close: bound here, since at the interpreter's exit the module may be gone first."""
        if getattr(self, "_directory", -1) >= 0:
            close(self._directory)

    # ------------------------------------------------------------------------------------ making one

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: Verify = "first-use") -> TokenStream:
        """Open a set or view directory. Raises LmError (65) naming the first file that is not as listed."""
        if verify not in ("first-use", "full", "size"):
            raise LmError(f"verify={verify!r}: choose first-use, full or size.")
        path = Path(path)
        stream = cls(path, read_manifest(path), None, verify)
        assert stream.manifest is not None
        for index in range(len(stream.manifest.shards)):
            stream._file(index)
        if verify == "full":
            with ThreadPoolExecutor() as pool:  # hashing runs outside the interpreter lock
                for _ in pool.map(stream._verify_shard, range(len(stream.manifest.shards))):
                    pass
        return stream

    @classmethod
    def from_array(cls, array: npt.NDArray[Any]) -> TokenStream:
        """A stream over an integer array or memmap; more than one dimension is read in C order."""
        array = np.asarray(array)  # a plain view: indexing np.memmap itself is several times slower
        if array.dtype.kind not in "ui":
            raise LmError(f"tokens must be integers; the array holds {array.dtype}.", code=Exit.DATA)
        if array.size == 0:
            raise LmError("the array holds no token.", code=Exit.DATA)
        return cls(None, None, array.reshape(-1), "size")

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_known": dict(shards._VERIFIED)}
        for name in ("_lock", "_files", "_directory"):
            state.pop(name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        shards._VERIFIED.update(state.pop("_known"))  # what the parent has hashed need not be hashed again
        self.__dict__.update(state)
        self._prepare()

    # ------------------------------------------------------------------------------------ facts

    @property
    def n_tokens(self) -> int:
        """Tokens of the stream, pads excluded."""
        return self._n

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        return f"TokenStream({str(self.path) if self.path else 'array'}, {self.n_tokens:,} tokens, {self.dtype})"

    @functools.cached_property
    def dataset_id(self) -> str:
        """Identity of the tokens: the manifest's, or for an array the sha256 over its dtype and content."""
        if self.manifest is not None:
            return self.manifest.dataset_id
        assert self._array is not None
        digest = hashlib.sha256(f"array {self.dtype.str} ".encode())
        for start in range(0, self._array.size, 1 << 22):
            digest.update(np.ascontiguousarray(self._array[start : start + (1 << 22)]).view(np.uint8).data)
        return digest.hexdigest()

    @functools.cached_property
    def max_id(self) -> int:
        """The largest id that can occur: over the shards that the stream uses (exact for arrays)."""
        if self.manifest is not None:
            return max(self.manifest.shards[int(i)].max_id for i in np.unique(self._shard))
        assert self._array is not None
        return int(self._array.max())

    @property
    def tokenizer_path(self) -> Path | None:
        """The copy of tokenizer.json beside the shards (a view's lies in its set); None when there is none."""
        if self.path is None:
            return None
        places = [self.path / TOKENIZER] + ([self.path.resolve().parent / TOKENIZER] if self._is_view else [])
        return next((p for p in places if p.is_file()), None)

    def require_vocabulary(self, vocab_size: int) -> None:
        """Refuse (65) tokens that a model of `vocab_size` cannot embed; the shard is named."""
        if self.max_id < vocab_size:
            return
        where = "the array"
        if self.manifest is not None:
            entry = next(e for e in self.manifest.shards if e.max_id == self.max_id)
            where = f"{self.path}/{entry.name}.npy"
        raise LmError(
            f"{where}: holds the token id {self.max_id:,}, the model's vocabulary has {vocab_size:,}.",
            hint="Train with the tokenizer that made the shards, or set model.vocab_size above the largest id.",
            code=Exit.DATA,
        )

    # ------------------------------------------------------------------------------------ reading

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens start .. stop-1 as a new 1-D array in the stored dtype."""
        tokens: npt.NDArray[Any] = self.windows(np.array([start]), stop - start)[0]
        return tokens

    def locate(self, position: int) -> tuple[int, int]:
        """(shard number in the manifest, flat offset in the shard) of a stream position."""
        segment = int(np.searchsorted(self._ends, position, "right")) - 1
        return int(self._shard[segment]), int(self._start[segment]) + position - int(self._ends[segment])

    def windows(
        self, starts: npt.ArrayLike, length: int, out: npt.NDArray[Any] | None = None, *, wrap: bool = False
    ) -> npt.NDArray[Any]:
        """`length` tokens from each position: (len(starts), length) in the stored dtype.

        out: a C-contiguous array of that shape and dtype to fill (pinned memory, say).
        wrap: let a window that runs over the end go on at the beginning (the stream as a ring; length <= N).
        Raises LmError (2) when a window leaves the stream.
        """
        begin = np.asarray(starts, np.int64)
        n = self.n_tokens
        low, high = (int(begin.min()), int(begin.max())) if begin.size else (0, 0)
        if begin.size and (
            low < 0 or length < 0 or length > n or high >= n + (length == 0)
            if wrap
            else low < 0 or length < 0 or high + length > n
        ):
            raise LmError(
                f"the window of {length:,} tokens at {high:,} leaves the stream of {n:,} tokens"
                f" (smallest start {low:,})."
            )
        if out is None:
            out = np.empty((len(begin), length), self.dtype)
        elif out.shape != (len(begin), length) or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(f"out must be a C-contiguous {self.dtype} array of shape ({len(begin)}, {length})")
        if length == 0 or not begin.size:
            return out
        if high + length > n:  # a wrapped window is two: one up to the end, one from the beginning
            place = np.arange(len(begin), dtype=np.int64) * length
            count = np.full(len(begin), length, np.int64)
            over = np.flatnonzero(begin + length > n)
            first = n - begin[over]
            count[over] = first
            begin = np.concatenate([begin, np.zeros(over.size, np.int64)])
            place = np.concatenate([place, place[over] + first])
            count = np.concatenate([count, length - first])
            self._copy(begin, count, place, out)
        elif self._array is not None or (segment := self._segments_of(begin, length)) is None:
            place = np.arange(len(begin), dtype=np.int64) * length
            self._copy(begin, np.full(len(begin), length, np.int64), place, out)
        else:  # as nearly always in a set: every window lies inside of one segment
            width = length * self.dtype.itemsize
            rows = range(0, len(begin) * width, width)
            self._read_pieces(begin, segment, rows, range(width, width + len(begin) * width, width), out)
        return out

    def _segments_of(self, begin: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64] | None:
        """The segment of each window, None when one of them runs over the end of its segment."""
        segment: npt.NDArray[np.int64] = self._ends.searchsorted(begin, "right") - 1
        return None if (begin + length > self._ends[segment + 1]).any() else segment

    def _copy(
        self,
        begin: npt.NDArray[np.int64],
        count: npt.NDArray[np.int64],
        place: npt.NDArray[np.int64],
        out: npt.NDArray[Any],
    ) -> None:
        """Fill `out` (seen flat) from `place` on with `count` tokens from `begin` on."""
        if self._array is not None:
            self._copy_array(begin, count, place, out.reshape(-1))
        else:
            self._copy_shards(begin, count, place, out)

    def _copy_array(self, begin: Any, count: Any, place: Any, out: npt.NDArray[Any]) -> None:
        source = self._array
        assert source is not None
        for b, c, p in zip(begin.tolist(), count.tolist(), place.tolist(), strict=True):
            out[p : p + c] = source[b : b + c]

    def _copy_shards(
        self,
        begin: npt.NDArray[np.int64],
        count: npt.NDArray[np.int64],
        place: npt.NDArray[np.int64],
        out: npt.NDArray[Any],
    ) -> None:
        """Cut every window at segment borders, then read piece by piece."""
        end = begin + count
        first = self._ends.searchsorted(begin, "right") - 1
        pieces = self._ends.searchsorted(end, "left") - first
        window = np.repeat(np.arange(len(begin)), pieces)
        segment = first[window] + (np.arange(len(window)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
        low = np.maximum(begin[window], self._ends[segment])
        place = (place[window] + low - begin[window]) * self.dtype.itemsize
        stop = place + (np.minimum(end[window], self._ends[segment + 1]) - low) * self.dtype.itemsize
        self._read_pieces(low, segment, place.tolist(), stop.tolist(), out)

    def _read_pieces(
        self,
        begin: npt.NDArray[np.int64],
        segment: npt.NDArray[np.int64],
        place: Sequence[int],
        stop: Sequence[int],
        out: npt.NDArray[Any],
    ) -> None:
        """Fill the bytes place .. stop-1 of `out` with the tokens of a segment from `begin` on, for each piece."""
        offset = (begin + self._shift[segment]) * self.dtype.itemsize + shards.HEADER_BYTES
        buffer = memoryview(out.reshape(-1).view(np.uint8).data)
        files: dict[int, shards.ShardFile] = {}
        limit = _most_open()
        preadv = os.preadv
        for shard, at, to, past in zip(self._shard[segment].tolist(), offset.tolist(), place, stop, strict=True):
            file = files.get(shard)
            if file is None:
                if len(files) >= limit:
                    files.clear()
                file = files[shard] = self._file(shard, use=True)
            view = buffer[to:past]
            if preadv(file.descriptor, (view,), at) != past - to:
                with _in(self.path):
                    file.read_into(view, at)  # a short read: go on, or say where the file ends

    @property
    def _is_view(self) -> bool:
        return self.manifest is not None and self.manifest.kind == "view"

    def _verify_shard(self, index: int) -> None:
        assert self.manifest is not None
        file = self._file(index)
        with _in(self.path):
            file.verify(self.manifest.shards[index].sha256)

    def _file(self, index: int, *, use: bool = False) -> shards.ShardFile:
        """The kept descriptor of a shard. `use`: its tokens are about to be read, so its content must be known."""
        assert self.manifest is not None
        entry: ShardEntry = self.manifest.shards[index]
        with self._lock:
            file = self._files.get(index)
            if file is None:
                with _in(self.path):
                    file = self._open_shard(entry)
                    file.require_header(shards.npy_header(self.dtype, (entry.rows, self.manifest.seq_len)))
                self._files[index] = file
                if len(self._files) > _most_open():
                    self._files.popitem(last=False)  # closes when no thread reads it any more
            if use and (file.linked or self._verify != "size") and not shards.is_known(file, entry.sha256):
                with _in(self.path):
                    file.verify(entry.sha256)
        return file

    def _open_shard(self, entry: ShardEntry) -> shards.ShardFile:
        for last in (False, True):
            try:
                return shards.ShardFile(self._directory, f"{entry.name}.npy", entry.bytes, parent=self._is_view)
            except OSError as error:  # out of descriptors: other streams of the process hold them
                if last:
                    raise from_os_error(error, f"{entry.name}.npy", "read") from error
                self._files.clear()
        raise AssertionError("unreachable")


def _most_open() -> int:
    """Descriptors that one stream may keep: several streams share what the process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN if soft == resource.RLIM_INFINITY else max(1, min(_MAX_OPEN, soft // 8))


@contextlib.contextmanager
def _in(path: Path | None) -> Any:
    """Put the directory before the file name of an error."""
    try:
        yield
    except LmError as error:
        raise LmError(f"{path}/{error.message}", hint=error.hint, code=error.code) from None
