"""`lm tokenize` as a function: sources -> documents -> tokens -> one committed shard set.

    plan        resolve the source, train or load the tokenizer, freeze both            (plan.py, sources.py, hub.py)
    read        pieces of units, ahead, in order                                        (readers.py)
    encode      in parallel, in order                                                   (encoder.py)
    select      exact duplicates and limits, in plan order                              (here)
    write       one writer, one shard after the other, journal, manifest                (writer.py)

The bytes depend on the plan alone: not on workers, encoder, batch sizes or the history of kills. An interrupted call is
continued by the same call. Views of a set (`lm split`) and checking it (`lm validate`) live elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcore import interrupt, storage
from lmcore.data import separators
from lmcore.data.content import HEAD_BYTES
from lmcore.data.documents import Documents, filter_lengths
from lmcore.data.encoder import Backend, Encoded, EncodingStage, open_encoder
from lmcore.data.manifest import MANIFEST, PLAN, TOKENIZER, Manifest, make_manifest, read_manifest, write_manifest
from lmcore.data.pipeline import map_in_order
from lmcore.data.plan import (
    Plan,
    TokenizeConfig,
    estimated_bytes,
    make_plan,
    read_plan,
    refuse_changed_units,
    refuse_other_request,
    write_plan,
)
from lmcore.data.readers import OnBad, Place, beginning, check_columns, read
from lmcore.data.shard import token_dtype
from lmcore.data.sources import Reading, Source, Unit, kind_of_stream, resolve, shown
from lmcore.data.tokenizer import EOS, Tokenizer
from lmcore.data.writer import Committed, SetWriter, recover
from lmcore.errors import Exit, LmError
from lmcore.heap import keep_freed_memory
from lmcore.progress import SILENT, Progress

TRAINING_BYTES = 64 << 20
"""Text that `train:N` learns from: all of a small corpus, evenly spread units of a large one."""
_IN_FLIGHT_BYTES = 64 << 20  # text of batches that are being encoded or wait for the writer
_SPOOL = "stdin"
_LOOKED_AT, _LOOK_BYTES = 32, 1 << 20  # text files, and bytes of each, in which marks between documents are looked for


@dataclass(frozen=True)
class TokenizeReport:
    """What a call of `tokenize` did."""

    path: Path
    dataset_id: str
    n_tokens: int
    n_docs: int
    n_bytes: int
    n_shards: int
    dropped: dict[str, int]
    tokenizer: str
    vocab_size: int
    backend: str
    seconds: float
    already_finished: bool = False
    resumed_shards: int = 0
    """Shards that an earlier, interrupted call had committed."""
    bytes_read: int = 0
    """Bytes of text encoded by this call."""
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        seconds = max(self.seconds, 1e-9)
        return {
            "path": str(self.path),
            "dataset_id": self.dataset_id,
            "n_tokens": self.n_tokens,
            "n_docs": self.n_docs,
            "n_bytes": self.n_bytes,
            "n_shards": self.n_shards,
            "dropped": self.dropped,
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "backend": self.backend,
            "seconds": round(self.seconds, 3),
            "mb_per_s": round(self.bytes_read / 1e6 / seconds, 2),
            "already_finished": self.already_finished,
            "resumed_shards": self.resumed_shards,
        }


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the shard under way was finished first. `number` is the signal."""

    def __init__(self, number: int, shards: int) -> None:
        super().__init__(f"interrupted after {shards} committed shards")
        self.number, self.shards = number, shards


# ---------------------------------------------------------------------------------------- the call


def tokenize(
    config: TokenizeConfig,
    out: str | Path,
    *,
    workers: int = 0,
    backend: Backend = "auto",
    progress: Progress = SILENT,
    stdin: Callable[[int], bytes] | None = None,
) -> TokenizeReport:
    """Make the shard set that `config` describes in the directory `out`, or finish it.

    workers: threads that read and encode; 0 = one per available core. stdin: read(n) of standard input when it is the
    source. Raises LmError, and `Interrupted` after a signal.
    """
    began = time.monotonic()
    keep_freed_memory()
    out = Path(out)
    workers = workers or available_cores()
    finished = _finished(out, config, began)
    if finished is not None:
        return finished
    source = None
    if not (out / PLAN).exists() and config.paths != ("-",):
        source = resolve(config.dataset, config.paths, reading=config.reading)  # fails before `out` is made
        check_columns(source.units, config.text_column)
    with storage.lock_directory(out, "lm tokenize"):
        finished = _finished(out, config, began)  # another process may have finished it meanwhile
        if finished is not None:
            return finished
        if (out / PLAN).exists():
            plan, tokenizer = resume_plan(out, config)
        else:
            plan, tokenizer = _new_plan(out, config, source, workers, progress, stdin)
        committed = recover(out, plan.stop)
        if committed:
            progress.note(f"Continuing after {len(committed)} committed shards.")
        stage, writer, bytes_read = _run(out, plan, tokenizer, committed, workers, backend, progress)
        manifest = _manifest(plan, tokenizer, writer, stage)
        write_manifest(out, manifest)
        return _report(out, manifest, plan, began, resumed=len(committed), bytes_read=bytes_read)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finished(out: Path, config: TokenizeConfig, began: float) -> TokenizeReport | None:
    """The report of a set that is complete already; LmError when it is not the one that was asked for."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    if not (out / PLAN).is_file():
        raise LmError(
            f"{out}: there is a shard set here that lm tokenize did not make.",
            hint="Choose another directory: --out PATH",
        )
    plan = read_plan(out)
    refuse_other_request(out, plan.request, config)
    _refuse_changed_source(out, plan, config)
    storage.fsync_directory(out)  # whoever wrote the manifest may have died before it was durable
    return _report(out, manifest, plan, began, finished=True)


def _report(
    out: Path,
    manifest: Manifest,
    plan: Plan,
    began: float,
    *,
    finished: bool = False,
    resumed: int = 0,
    bytes_read: int = 0,
) -> TokenizeReport:
    tokenizer = manifest.tokenizer
    return TokenizeReport(
        path=out,
        dataset_id=manifest.dataset_id,
        n_tokens=manifest.n_tokens,
        n_docs=manifest.n_docs,
        n_bytes=manifest.n_bytes,
        n_shards=len(manifest.shards),
        dropped=dict(manifest.filters.get("dropped", {})),
        tokenizer=tokenizer.name if tokenizer else "",
        vocab_size=tokenizer.vocab_size if tokenizer else 0,
        backend=str(manifest.backend.get("name", "")),
        seconds=time.monotonic() - began,
        already_finished=finished,
        resumed_shards=resumed,
        bytes_read=bytes_read,
    )


# ---------------------------------------------------------------------------------------- plan


def _new_plan(
    out: Path,
    config: TokenizeConfig,
    source: Source | None,
    workers: int,
    progress: Progress,
    stdin: Callable[[int], bytes] | None,
) -> tuple[Plan, Tokenizer]:
    strangers = [
        p.name for p in out.iterdir() if p.name != ".lock" and not p.name.startswith((storage.TEMPORARY, _SPOOL))
    ]
    if strangers and TOKENIZER not in strangers:
        raise LmError(
            f"{out}: the directory is not empty ({', '.join(sorted(strangers)[:3])}).",
            hint="Choose another directory: --out PATH",
            code=Exit.CANNOT_CREATE,
        )
    storage.sweep(out)
    if source is None:
        spool = _spool_stdin(out, config.reading, stdin) if config.paths == ("-",) else None
        source = resolve(config.dataset, config.paths, spool=spool, reading=config.reading)
        check_columns(source.units, config.text_column)
    for note in source.notes:
        progress.note(note)
    known = known_tokenizer(config)
    plan = divided_plan(config, source, known, progress)
    tokenizer = known or _train_tokenizer(config, plan, workers, progress)
    tokenizer.save(out / TOKENIZER)
    plan = dataclasses.replace(plan, tokenizer_name=tokenizer.name, tokenizer_sha256=tokenizer.sha256)
    write_plan(out, plan)
    return plan, tokenizer


def freeze_plan(
    directory: Path, config: TokenizeConfig, *, workers: int = 0, progress: Progress = SILENT
) -> tuple[Plan, Tokenizer]:
    """Resolve the source, train or load the tokenizer, and keep both in an empty directory."""
    source = resolve(config.dataset, config.paths, reading=config.reading)
    check_columns(source.units, config.text_column)
    return _new_plan(directory, config, source, workers or available_cores(), progress, None)


def resume_plan(directory: Path, config: TokenizeConfig) -> tuple[Plan, Tokenizer]:
    """The plan and the tokenizer that were frozen in a directory; LmError when they are not those of `config`."""
    plan = read_plan(directory)
    refuse_other_request(directory, plan.request, config)
    _refuse_changed_source(directory, plan, config)
    return plan, plan_tokenizer(directory, plan)


def plan_tokenizer(directory: Path, plan: Plan) -> Tokenizer:
    """The tokenizer beside a plan, checked against it (65)."""
    tokenizer = Tokenizer.from_file(directory / TOKENIZER, name=plan.tokenizer_name)
    if tokenizer.sha256 != plan.tokenizer_sha256:
        raise LmError(
            f"{directory / TOKENIZER}: not the tokenizer of the plan; the file was changed.",
            hint="Restore it, or delete the set and run lm tokenize again.",
            code=Exit.DATA,
        )
    return tokenizer


def _refuse_changed_source(out: Path, plan: Plan, config: TokenizeConfig) -> None:
    """Files on this machine can be compared at no cost; what lies on the Hub is pinned by its commit."""
    if config.paths and config.paths != ("-",) and not any("://" in path for path in config.paths):
        try:
            found = resolve(None, config.paths, reading=config.reading)
        except LmError as error:
            if (out / MANIFEST).is_file():
                return  # a finished set does not need its source any more
            raise error
        refuse_changed_units(out, plan.units, found.units)


def known_tokenizer(config: TokenizeConfig) -> Tokenizer | None:
    """The tokenizer of a request, None for one that is to be trained."""
    return None if config.tokenizer.partition(":")[0] == "train" else Tokenizer.load(config.tokenizer)


def divided_plan(config: TokenizeConfig, source: Source, tokenizer: Tokenizer | None, progress: Progress) -> Plan:
    """The plan of a source, its text files divided where `--separator` says. Without it, marks between documents that
    are seen are told. tokenizer: whose EOS is one of the marks; None for one that is still to be trained."""
    texts = [unit for unit in source.units if unit.format == "text"]
    if not texts:
        if config.separator is not None:
            progress.warn(f"--separator {config.separator} divides files of text, and there are none.")
        return make_plan(config, source)
    eos = tokenizer.eos if tokenizer is not None else EOS
    for note in _marks_told(config, texts, eos):
        progress.warn(note)
    return make_plan(config, source, separators.marks(config.separator, eos))


def _marks_told(config: TokenizeConfig, texts: Sequence[Unit], eos: str) -> Iterator[str]:
    """What to say of marks at the beginnings of text files: some, spread evenly, where there are many."""
    local = [unit for unit in texts if not unit.is_remote]
    looked = [local[len(local) * k // _LOOKED_AT] for k in range(_LOOKED_AT)] if len(local) > _LOOKED_AT else local
    wanted = None if config.separator is None else separators.marks(config.separator, eos)
    for unit in looked:
        head, whole = beginning(unit, _LOOK_BYTES)
        where = shown(unit.path) if whole else f"the first {len(head) / 1e6:.1f} MB of {shown(unit.path)}"
        if wanted is not None:
            if separators.spans(head, [separators.Mark.of(mark) for mark in wanted], 0, len(head)):
                return
            continue
        for seen in separators.look(head, eos)[:1]:
            value = separators.AUTO if seen.lines else separators.option(seen.mark)
            name = separators.option(seen.mark).strip("'")
            count = f"{seen.lines:,} lines that are" if seen.lines else f"{seen.anywhere:,} times"
            yield (
                f"{where}: holds {count} {name}, as between documents; it is read as one document. To divide it there: "
                f"--separator {value} (when training on text: --set data.separator={value})"
            )
            return
    if wanted is not None and looked:
        yield f"{where}: no separator was seen there (--separator {config.separator}); it is read as one document."


def _spool_stdin(out: Path, reading: Reading, stdin: Callable[[int], bytes] | None) -> Path:
    """Copy standard input into the set: it is read twice (tokenizer, tokens) and must survive a crash. Its name says
    what its beginning shows it to be."""
    existing = [p for p in out.iterdir() if p.name.startswith(_SPOOL + ".")]
    if existing:
        return existing[0]  # copied whole by an earlier call
    if stdin is None:
        raise LmError("-: no standard input to read.")
    head = b""
    while len(head) <= HEAD_BYTES and (more := stdin(1 << 16)):
        head += more
    form, compression = kind_of_stream(head, reading)

    def chunks() -> Iterator[bytes]:
        yield head
        while more := stdin(1 << 20):
            yield more

    endings = {"text": ".txt", "jsonl": ".jsonl", "parquet": ".parquet", "arrow": ".arrow"}
    packed = {"gzip": ".gz", "zstd": ".zst"}
    path = out / f"{_SPOOL}{endings[form]}{packed.get(compression, '')}"
    storage.write_file(path, chunks())
    return path


def _train_tokenizer(config: TokenizeConfig, plan: Plan, workers: int, progress: Progress) -> Tokenizer:
    size = config.tokenizer.partition(":")[2]
    if not size.isdigit():
        raise LmError(f"--tokenizer {config.tokenizer}: expected train:N, such as train:8192.")
    progress.start("training the tokenizer", None, "bytes")
    texts = training_texts(plan.units, config.text_column, config.on_bad_doc, workers, progress)
    try:
        return Tokenizer.train(texts, int(size))
    finally:
        progress.finish()


def training_texts(
    units: tuple[Unit, ...], column: str, on_bad: OnBad, workers: int, progress: Progress = SILENT
) -> Iterator[str]:
    """The texts a tokenizer is trained on: the whole corpus, or the beginnings of up to 64 evenly spread units."""
    total = sum(max(unit.size, 0) for unit in units)
    known = all(unit.size >= 0 and not unit.compression and unit.format != "parquet" for unit in units)
    chosen = list(range(len(units)))
    if not (known and total <= TRAINING_BYTES) and len(units) > 64:
        chosen = [len(units) * k // 64 for k in range(64)]
    share = TRAINING_BYTES if len(chosen) == len(units) else TRAINING_BYTES // len(chosen)
    groups = [(0, len(units))] if len(chosen) == len(units) else [(k, k + 1) for k in chosen]
    for first, stop in groups:
        taken = 0
        with contextlib.closing(
            read(units, column, start=Place(first), stop=Place(stop), on_bad=on_bad, threads=workers)
        ) as batches:
            for batch in batches:
                for index in range(len(batch)):
                    text = batch.text(index)[: share - taken]
                    taken += len(text)
                    progress.advance(len(text))
                    yield text.decode("utf-8", "ignore")
                    if taken >= share:
                        break
                if taken >= share:
                    break


# ---------------------------------------------------------------------------------------- the run


def _run(
    out: Path,
    plan: Plan,
    tokenizer: Tokenizer,
    committed: list[Committed],
    workers: int,
    backend: Backend,
    progress: Progress,
) -> tuple[EncodingStage, SetWriter, int]:
    """Tokenize what is not committed yet; returns the encoder, the writer and the bytes of text that were encoded."""
    request = plan.request
    writer = open_writer(request, tokenizer, out, committed)
    start = writer.place if committed else plan.start
    selector = Selector(request, out, writer)
    end = plan.stop
    with writer, _Signals() as signals:
        raw = read(
            plan.units,
            request.text_column,
            start=start,
            stop=plan.stop,
            on_bad=request.on_bad_doc,
            threads=workers,
        )
        with contextlib.closing(raw):
            filtered = (filter_lengths(batch, request.min_chars, request.max_chars) for batch in raw)
            stage, batches = encode_all(filtered, tokenizer, backend, workers, progress)
            progress.start("tokenizing", _known_bytes(plan), "bytes")
            bytes_read = 0
            with contextlib.closing(batches):
                for batch in batches if not selector.is_full else ():
                    bytes_read += batch.documents.n_bytes
                    progress.advance(batch.documents.n_bytes)
                    begun = writer.begun
                    selection = selector(batch)
                    writer.add(batch, selection.keep, selection.duplicates, last=selection.last)
                    if selector.is_full:
                        break
                    if signals.number and writer.begun > begun:
                        writer.wait()
                        raise Interrupted(signals.number, len(writer.committed))
        writer.finish(end)
        progress.finish()
    if not writer.committed:
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(writer.dropped.items())) or "no records"
        (out / PLAN).unlink()
        (out / TOKENIZER).unlink()
        raise LmError(
            f"No text to tokenize: every record was dropped or empty ({told}).",
            hint="Make fewer parts, so that each of them holds text." if request.parts else "",
            code=Exit.DATA,
        )
    return stage, writer, bytes_read


def open_writer(
    request: TokenizeConfig,
    tokenizer: Tokenizer,
    directory: Path,
    committed: list[Committed],
    *,
    only: frozenset[int] | None = None,
) -> SetWriter:
    """The writer of a set as its options and its tokenizer determine it, standing after the committed shards."""
    return SetWriter(
        directory,
        dtype=token_dtype(tokenizer.max_id),
        seq_len=request.seq_len,
        rows=request.rows_per_shard,
        eos_id=tokenizer.eos_id,
        committed=committed,
        only=only,
    )


def _known_bytes(plan: Plan) -> float | None:
    """Bytes of text behind a plan when the files tell."""
    units = plan.own_units
    plain = all(unit.format in ("text", "python") and not unit.compression and unit.size >= 0 for unit in units)
    return float(estimated_bytes(plan)) if plain else None


def encode_all(
    batches: Iterator[Documents], tokenizer: Tokenizer, backend: Backend, workers: int, progress: Progress
) -> tuple[EncodingStage, Generator[Encoded]]:
    """(stage, encoded batches in order): the encoder is verified on the first documents before anything comes out."""
    first = next(batches, None)
    stage = open_encoder(tokenizer, backend, first, threads=workers)
    if stage.record.fallback and backend == "auto":
        progress.warn(f"tokenizers does the work instead of gigatoken: {stage.record.fallback}.")

    def everything() -> Iterator[Documents]:
        if first is not None:
            yield first
        yield from batches

    return stage, map_in_order(
        stage, everything(), threads=workers, weight=lambda batch: batch.n_bytes, limit=_IN_FLIGHT_BYTES
    )


@dataclass(frozen=True)
class Selection:
    """Masks over the documents of a batch."""

    keep: npt.NDArray[np.bool_]
    duplicates: npt.NDArray[np.bool_]
    last: tuple[int, int] | None
    """(unit, row) of the last document when a limit was reached in this batch."""


class Selector:
    """Which documents are kept, in plan order: exact duplicates, --max-documents, --max-tokens."""

    def __init__(self, request: TokenizeConfig, out: Path, writer: SetWriter) -> None:
        self._max_documents, self._max_tokens = request.max_documents, request.max_tokens
        self._writer = writer
        self.documents = sum(line.entry.n_docs for line in writer.committed)
        self.tokens = sum(line.entry.n_tokens for line in writer.committed)
        self._seen = HashSet() if request.dedup else None
        if self._seen is not None:
            for line in writer.committed:
                self._seen.add(np.load(out / f"{line.entry.name}.docs.npy", allow_pickle=False)["hash"])

    @property
    def is_full(self) -> bool:
        """Whether a limit is reached: nothing more will be kept."""
        return bool(
            (self._max_documents and self.documents >= self._max_documents)
            or (self._max_tokens and self.tokens >= self._max_tokens)
        )

    def __call__(self, batch: Encoded) -> Selection:
        """What to keep of a batch. Documents before the cursor of a continued run were decided already; the one at the
        cursor is completed whatever the limits say."""
        documents = batch.documents
        count = len(documents)
        decided = self._writer.settled_before(documents.units, documents.rows)
        at_cursor = self._writer.at_cursor(documents.units, documents.rows)
        fresh = ~decided & ~at_cursor
        keep, duplicates = ~decided, np.zeros(count, bool)
        if self._seen is not None:
            duplicates[fresh] = ~self._seen.add(batch.hashes[fresh])
            keep &= ~duplicates
        last: tuple[int, int] | None = None
        if self._max_documents or self._max_tokens:
            counted = keep & fresh
            lengths = np.where(keep, np.diff(batch.offsets), 0)
            lengths[at_cursor] -= min(self._writer.cursor_token, int(lengths[at_cursor].sum()))
            documents_before = self.documents + np.cumsum(counted) - counted
            tokens_before = self.tokens + np.cumsum(lengths) - lengths
            allowed = at_cursor.copy()
            allowed |= (documents_before < (self._max_documents or count + self.documents)) & (
                tokens_before < (self._max_tokens or int(lengths.sum()) + self.tokens + 1)
            )
            keep &= allowed
            self.documents += int((keep & fresh).sum())
            self.tokens += int(lengths[keep].sum())
            kept = np.flatnonzero(keep)
            if self.is_full:  # what comes behind the last document is not looked at
                last = (int(documents.units[kept[-1]]), int(documents.rows[kept[-1]])) if len(kept) else (-1, -1)
        return Selection(keep, duplicates, last)


class HashSet:
    """A growing set of 64-bit hashes in sorted arrays of doubling size: 8 bytes per hash, no Python object each."""

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []

    def add(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Add hashes; True for those that were not there before (the first of several equal ones)."""
        new = np.zeros(len(hashes), bool)
        unique, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(unique), bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            known |= run[at] == unique
        new[first[~known]] = True
        run = unique[~known]
        if len(run):
            while self._runs and len(self._runs[-1]) < 2 * len(run):
                run = np.concatenate([self._runs.pop(), run])
                run.sort(kind="stable")
            self._runs.append(run)
        return new


# ---------------------------------------------------------------------------------------- manifest


def _manifest(plan: Plan, tokenizer: Tokenizer, writer: SetWriter, stage: EncodingStage) -> Manifest:
    entries = [line.entry for line in writer.committed]
    request = plan.request
    units = plan.own_units
    limits = {key: getattr(request, key) for key in ("min_chars", "max_chars", "dedup", "max_documents", "max_tokens")}
    source = dict(plan.source)
    source |= {"files": len(units), "stored_bytes": estimated_bytes(plan), "text_column": request.text_column}
    if request.parts is not None:
        source |= {"part": request.part, "parts": request.parts}
    return make_manifest(
        tokenizer=tokenizer.entry(),
        dtype=token_dtype(tokenizer.max_id).name,
        seq_len=request.seq_len,
        shards=tuple(entries),
        segments=tuple((index, 0, entry.n_tokens) for index, entry in enumerate(entries)),
        n_tokens=sum(entry.n_tokens for entry in entries),
        n_docs=sum(entry.n_docs for entry in entries),
        n_bytes=sum(line.n_bytes for line in writer.committed),
        source=source,
        filters=limits | {"dropped": dict(sorted(writer.dropped.items()))},
        backend=stage.record.to_json(),
        created_by=created_by(),
    )


def created_by() -> dict[str, Any]:
    """Who made a set, and when: for people, never part of the identity."""
    try:
        number = version("lmshards")
    except PackageNotFoundError:
        number = "unknown"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"name": "lmshards", "version": number, "host": socket.gethostname(), "time": now}


# ---------------------------------------------------------------------------------------- signals


class _Signals:
    """The first SIGINT or SIGTERM is remembered, the second ends the program at once (which is safe, too). Only the
    main thread of a program can listen; elsewhere signals keep their meaning."""

    number = 0

    def __enter__(self) -> _Signals:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: object) -> None:
        interrupt.answered()
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
