"""The encoders: batches of documents -> flat token ids, fast and never trusted blindly.

    tokenizers   the reference: the library that defines the ids
    gigatoken    tens of times faster, same ids; takes Arrow buffers without a Python string per document
    bytes        for the `byte` tokenizer: the ids are the bytes

The fast encoder does what it is proven to do alike (fast_path.py): other tokenizers, and documents with characters for
which it is not proven, go to the reference. Beyond that `open_encoder` compares both on a torture list and on the first
documents of the corpus before anything is written; a difference means the reference does the work, and the user is
told. While the run goes on, one document in 4,096, chosen by its content hash, is encoded by both; a difference then
stops the run and names the document. The outcome is recorded in the manifest but is no part of the identity: the ids
are the same by construction.

Control tokens are removed from what gigatoken loads, because it would turn their text into their ids.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from lmcore.data import fast_path
from lmcore.data.documents import Documents, join
from lmcore.data.shard import Tokens, token_dtype
from lmcore.data.tokenizer import EOS, Tokenizer
from lmcore.errors import Exit, LmError

Backend = Literal["auto", "gigatoken", "tokenizers"]

AUDIT_EVERY = 4096
_AUDIT_BYTES = 1 << 20  # longer documents are left to the comparison at the start
_CHECK_DOCUMENTS, _CHECK_BYTES = 200, 256 << 10  # a quarter of a second by the reference for every megabyte
_CHUNK_BYTES = 1 << 20  # the reference takes about 150 bytes of memory per character
_MAX_COPIES = 4  # of gigatoken: each keeps a cache of its own, 70 to 130 MiB after 500 MB of text

TORTURE: tuple[str, ...] = (
    "",
    " ",
    "\n",
    "\x00",
    "a\x00b\x00\x00c",
    "a" * 5000,
    " " * 3000,
    "\n" * 1000 + "x",
    " \n \t \r\n  \u00a0\u3000 x",
    "ab " * 700,
    "0123456789" * 200 + " 3.14159, 1,000,000",
    "!?" * 400 + "...",
    "don't I'll we've they're he'd I'm it's DON'T \u2019s",
    "na\u00efve caf\u00e9 na\u0069\u0308ve cafe\u0301 \u0301\u0301" + "e\u0301" * 300,
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002\u4e2d\u6587\u5b57\u7b26\uff0c\ud55c\uad6d\uc5b4 " * 20,
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea" * 30,
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\ufeffbom \ufffd\ufffe\U0010ffff \u2028\u2029\x85\x1c\x0b\x0c",
    f"{EOS}{EOS} a {EOS}b",
    "<s></s><pad><|im_start|>user<|im_end|><bos><eos>[CLS][SEP]",
    "def f(x):\n\treturn {'a': [1, 2]}  # \u00e9\n\n\nclass A:\n    pass\n" * 20,
    "http://example.org/a?b=c&d=%20 <a href='x'>y</a> $x^2$ \\alpha",
    "CamelCaseWords snake_case_words SHOUTING mIxEd 1st 2nd",
)
"""Texts on which tokenizers tend to disagree."""


class Encoder(Protocol):
    """Texts in one buffer -> (ids, offsets): text k has ids[offsets[k]:offsets[k + 1]]. Safe to call from threads."""

    name: str

    def __call__(
        self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]: ...


@dataclass
class Record:
    """What is known about the encoder of a run; `to_json` goes into the manifest."""

    name: str
    version: str
    verified_documents: int = 0
    audited_documents: int = 0
    fallback: str = ""
    """Why the fast encoder was not used, and how fast the reference is."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "name": self.name,
            "version": self.version,
            "verified_documents": self.verified_documents,
            "audited_documents": self.audited_documents,
            "mismatches": 0,
        }
        return record | ({"fallback": self.fallback} if self.fallback else {})


@dataclass(frozen=True)
class Encoded:
    """A batch of documents as tokens, each ended by EOS; the other columns as in Documents."""

    ids: Tokens
    offsets: npt.NDArray[np.int64]  # (n + 1,)
    hashes: npt.NDArray[np.uint64]  # (n,) blake2b-8 of the text
    sizes: npt.NDArray[np.int64]  # (n,) bytes of the text
    documents: Documents


class EncodingStage:
    """Documents -> Encoded: hash, encode, audit, append EOS. Safe to call from threads."""

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder, record: Record) -> None:
        self.tokenizer, self.encoder, self.record = tokenizer, encoder, record
        self.dtype = token_dtype(tokenizer.max_id)
        self.reference = ReferenceEncoder(tokenizer)

    def __call__(self, batch: Documents) -> Encoded:
        hashes = content_hashes(batch.data, batch.offsets)
        ids, offsets = self.encoder(batch.data, batch.offsets)
        if self.encoder.name == "gigatoken":
            self._audit(batch, hashes, ids, offsets)
        flat = append_eos(ids, offsets, self.tokenizer.eos_id, self.dtype)
        with_eos = offsets + np.arange(len(offsets))
        return Encoded(flat, with_eos, hashes, np.diff(batch.offsets), batch)

    def _audit(
        self, batch: Documents, hashes: npt.NDArray[np.uint64], ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64]
    ) -> None:
        for index in np.flatnonzero(hashes % np.uint64(AUDIT_EVERY) == 0):
            text = batch.text(int(index))
            if len(text) > _AUDIT_BYTES:
                continue
            expected, _ = self.reference(*join([text]))
            if not np.array_equal(expected, ids[offsets[index] : offsets[index + 1]]):
                raise LmError(
                    f"gigatoken and tokenizers disagree on the document in row {int(batch.rows[index])} of unit "
                    f"{int(batch.units[index])} of the plan.",
                    hint="Delete the set and tokenize with: --backend tokenizers",
                    code=Exit.DATA,
                )
            with self.record.lock:
                self.record.audited_documents += 1


def open_encoder(
    tokenizer: Tokenizer, backend: Backend = "auto", first: Documents | None = None, *, threads: int = 1
) -> EncodingStage:
    """The encoder of a run, compared with the reference on the torture list and on the first documents.

    threads: how many will call the stage at once. Half of them may be inside gigatoken, since reading, hashing and
    writing take the other half of the time. Raises LmError (2) when `backend` is "gigatoken" and it cannot be used;
    "auto" falls back and says why in `stage.record.fallback`.
    """
    if tokenizer.sha256 == Tokenizer.byte().sha256:
        return EncodingStage(tokenizer, BytesEncoder(), Record("bytes", "1"))
    why = ""
    if backend != "tokenizers":
        try:
            fast = GigatokenEncoder(tokenizer, copies=min(max(1, threads // 2), _MAX_COPIES))
            return EncodingStage(
                tokenizer, fast, Record("gigatoken", _version("gigatoken"), verify(tokenizer, fast, first))
            )
        except Mismatch as error:
            why = f"{error}; tokenizers gives about {_speed(tokenizer, first):.1f} MB/s on one core"
        if backend == "gigatoken":
            raise LmError(f"gigatoken cannot be used: {why}.", hint="Use: --backend auto")
    record = Record("tokenizers", _version("tokenizers"), fallback=why)
    return EncodingStage(tokenizer, ReferenceEncoder(tokenizer), record)


class Mismatch(Exception):
    """The fast encoder is absent, cannot load this tokenizer, or gives other ids."""


def _speed(tokenizer: Tokenizer, first: Documents | None) -> float:
    """Megabytes per second of the reference on the beginning of the corpus."""
    texts = (
        [first.text(k)[:_CHECK_BYTES] for k in range(min(len(first), _CHECK_DOCUMENTS))] if first is not None else []
    )
    data, offsets = join(
        [text.decode("utf-8", "ignore").encode() for text in texts] or [b"the river and the stone " * 99]
    )
    stop = max(1, int(np.searchsorted(offsets, _CHECK_BYTES, "right")) - 1)
    began = time.perf_counter()
    ReferenceEncoder(tokenizer)(data, offsets[: stop + 1])
    return float(offsets[stop]) / 1e6 / max(time.perf_counter() - began, 1e-9) / min(os.cpu_count() or 1, stop)


def verify(tokenizer: Tokenizer, fast: Encoder, first: Documents | None) -> int:
    """Compare with the reference; returns the number of documents, raises Mismatch at the first difference."""
    texts = [text.encode() for text in TORTURE]
    size = 0
    for index in range(min(len(first), _CHECK_DOCUMENTS) if first is not None else 0):
        assert first is not None
        texts.append(first.text(index)[:_CHECK_BYTES].decode("utf-8", "ignore").encode())
        size += len(texts[-1])
        if size > _CHECK_BYTES:
            break
    data, offsets = join(texts)
    expected, expected_offsets = ReferenceEncoder(tokenizer)(data, offsets)
    try:
        ids, id_offsets = fast(data, offsets)
    except Exception as error:  # whatever a foreign library raises, the reference goes on
        raise Mismatch(f"it fails on the test documents ({error})") from error
    if np.array_equal(expected_offsets, id_offsets) and np.array_equal(expected, ids):
        return len(texts)
    for index, text in enumerate(texts):
        a, b = ids[id_offsets[index] : id_offsets[index + 1]], slice(*expected_offsets[index : index + 2])
        if not np.array_equal(a, expected[b]):
            raise Mismatch(f"its ids differ from those of tokenizers on {text[:40].decode('utf-8', 'replace')!r}")
    raise AssertionError("unreachable")


# ---------------------------------------------------------------------------------------- encoders


class ReferenceEncoder:
    """`tokenizers`. A long document is encoded in chunks cut where the ids cannot depend on it."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._plain = tokenizer.plain

    @functools.cached_property
    def _may_cut(self) -> bool:
        return _cuts_are_safe(self._tokenizer)

    def __call__(
        self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        texts: list[str] = []
        owners: list[int] = []
        for index in range(len(offsets) - 1):
            raw = data[offsets[index] : offsets[index + 1]].tobytes()
            pieces = cut_at_words(raw) if len(raw) > _CHUNK_BYTES and self._may_cut else [raw]
            texts.extend(piece.decode() for piece in pieces)
            owners.extend([index] * len(pieces))
        parts: list[npt.NDArray[np.uint32]] = []
        lengths = np.zeros(len(offsets) - 1, np.int64)
        at = 0
        while at < len(texts):  # a bounded share at a time: an Encoding is many times larger than its text
            end, size = at, 0
            while end < len(texts) and (end == at or size + len(texts[end]) <= 4 * _CHUNK_BYTES):
                size += len(texts[end])
                end += 1
            for index, encoding in enumerate(
                self._plain.encode_batch_fast(texts[at:end], add_special_tokens=False), at
            ):
                ids = np.array(encoding.ids, np.uint32)
                parts.append(ids)
                lengths[owners[index]] += len(ids)
            at = end
        id_offsets = np.zeros(len(offsets), np.int64)
        np.cumsum(lengths, out=id_offsets[1:])
        return (np.concatenate(parts) if parts else np.zeros(0, np.uint32)), id_offsets


class GigatokenEncoder:
    """`gigatoken` on the calling threads, fed with Arrow's layout through awkward arrays. Documents with characters for
    which it is not proven go to the reference. Raises Mismatch when it is not proven for the tokenizer, when the
    package is absent, or when it refuses the tokenizer.

    One loaded tokenizer of gigatoken encodes one batch at a time (a lock inside; the interpreter's lock is released).
    `copies` of it are loaded, each when it is first needed, so that as many threads can encode at once.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, *, copies: int = 1) -> None:
        definition = copy.copy(tokenizer.plain_definition or tokenizer.definition)
        added = definition.get("added_tokens") or ()
        definition["added_tokens"] = [
            token for token in added if tokenizer.plain.token_to_id(token["content"]) not in tokenizer.control_ids
        ]
        definition["post_processor"] = None
        if reason := fast_path.why_not(definition):
            raise Mismatch(f"it is not used for {reason}")
        self._unproven, self._reference = fast_path.unproven_characters(definition), ReferenceEncoder(tokenizer)
        try:
            import awkward
            from awkward.contents import ListOffsetArray, NumpyArray
            from awkward.index import Index64
            from gigatoken.gigatoken_rs import load_hf_json

            self._load = functools.partial(load_hf_json, json.dumps(definition))
            self._idle: queue.LifoQueue[Any] = queue.LifoQueue()  # the one used last has the warmest cache
            self._idle.put(self._load())
        except ImportError as error:
            raise Mismatch(f"it is not installed ({error})") from error
        except Exception as error:  # whatever a foreign library raises, the reference goes on
            raise Mismatch(f"it cannot load this tokenizer ({error})") from error
        self._lock, self._unloaded = threading.Lock(), copies - 1
        self._array, self._list, self._flat, self._index = awkward.Array, ListOffsetArray, NumpyArray, Index64

    def __call__(
        self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        if len(offsets) == 1:
            return np.zeros(0, np.uint32), np.zeros(1, np.int64)
        characters = self._flat(data, parameters={"__array__": "char"})
        texts = self._list(self._index(np.ascontiguousarray(offsets)), characters, parameters={"__array__": "string"})
        backend = self._take()
        try:
            layout = backend.encode_batch(self._array(texts), parallel=False).layout
        finally:
            self._idle.put(backend)
        ids, id_offsets = np.asarray(layout.content.data), np.asarray(layout.offsets.data)
        if self._unproven is None or not len(rows := self._unproven.documents(data, offsets)):
            return ids, id_offsets
        own, own_offsets = self._reference(
            *join([data[a:b].tobytes() for a, b in zip(offsets[rows], offsets[rows + 1], strict=True)])
        )
        parts: list[npt.NDArray[np.uint32]] = []
        lengths, at = np.diff(id_offsets), 0
        lengths[rows] = np.diff(own_offsets)
        for k, row in enumerate(rows):
            parts += [ids[id_offsets[at] : id_offsets[row]], own[own_offsets[k] : own_offsets[k + 1]]]
            at = row + 1
        parts.append(ids[id_offsets[at] :])
        return np.concatenate(parts), np.concatenate([[0], np.cumsum(lengths)])

    def _take(self) -> Any:
        """A loaded tokenizer that no other thread uses; waits when all copies are in use."""
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._lock:
            load = self._unloaded > 0
            self._unloaded -= load
        return self._load() if load else self._idle.get()


class BytesEncoder:
    """The ids of the `byte` tokenizer are the bytes themselves."""

    name = "bytes"

    def __call__(
        self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        return data[offsets[0] : offsets[-1]], offsets - offsets[0]


# ---------------------------------------------------------------------------------------- parts


def content_hashes(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """blake2b-8 of every text, little-endian: the identity of a document."""
    view = np.ascontiguousarray(data).data
    cuts = offsets.tolist()
    blake2b = hashlib.blake2b
    raw = b"".join([blake2b(view[a:b], digest_size=8).digest() for a, b in itertools.pairwise(cuts)])
    return np.frombuffer(raw, "<u8")


def append_eos(
    ids: npt.NDArray[Any], offsets: npt.NDArray[np.int64], eos_id: int, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    """The same ids with one EOS behind every document, in the dtype of the shards."""
    count = len(offsets) - 1
    out = np.empty(len(ids) + count, dtype)
    if not count:
        return out
    # Converted at once and copied as bytes, document by document: half the time of slices of arrays.
    source, target = ids.astype(dtype).view(np.uint8).data, out.view(np.uint8).data
    gap, step = 0, dtype.itemsize
    for a, b in itertools.pairwise((offsets * step).tolist()):
        target[a + gap : b + gap] = source[a:b]
        gap += step
    out[offsets[1:] + np.arange(count)] = eos_id
    return out


def cut_at_words(raw: bytes, size: int = _CHUNK_BYTES) -> list[bytes]:
    """Pieces of about `size` bytes, cut only before a single space between two ASCII letters. The word patterns of the
    known byte-level tokenizers begin a new word there, whatever surrounds it. Text without such a place stays whole."""
    pieces: list[bytes] = []
    begin = 0
    while len(raw) - begin > size:
        at = begin + size
        while (at := raw.find(b" ", at, len(raw) - 1)) > 0 and not (
            raw[at - 1 : at].isalpha() and raw[at + 1 : at + 2].isalpha()
        ):
            at += 1
        if at < 0:
            break
        pieces.append(raw[begin:at])
        begin = at
    pieces.append(raw[begin:])
    return pieces


def _cuts_are_safe(tokenizer: Tokenizer) -> bool:
    """Whether cutting changes no id, tried on the torture list joined by words."""
    if not tokenizer.lossless:
        return False
    text = " and then ".join(text for text in TORTURE if text).encode()
    pieces = [piece.decode() for piece in cut_at_words(text, 50)]
    whole = tokenizer.plain.encode(text.decode(), add_special_tokens=False).ids
    cut = tokenizer.plain.encode_batch_fast(pieces, add_special_tokens=False)
    return len(pieces) > 10 and list(whole) == [number for encoding in cut for number in encoding.ids]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
