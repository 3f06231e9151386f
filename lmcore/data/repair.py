"""Make single shards of a finished set again, from its plan.

The journal says where every shard begins in the sources, so a damaged shard costs the time of one shard, not of the
set. What comes out must have the hash that the manifest names; if not, the sources are no longer what they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from lmcore import storage
from lmcore.data.documents import filter_lengths
from lmcore.data.encoder import Backend
from lmcore.data.manifest import PLAN, Manifest, ShardEntry, read_manifest
from lmcore.data.plan import Plan, read_plan
from lmcore.data.readers import read
from lmcore.data.shard import shard_name
from lmcore.data.tokenization import Selector, available_cores, encode_all, open_writer, plan_tokenizer
from lmcore.data.tokenizer import Tokenizer
from lmcore.data.writer import Committed, read_journal
from lmcore.errors import Exit, LmError
from lmcore.progress import SILENT, Progress


def retokenize(
    directory: str | Path,
    shards: Iterable[int],
    *,
    workers: int = 0,
    backend: Backend = "auto",
    progress: Progress = SILENT,
) -> None:
    """Write the shards with these numbers and their document indices again.

    Raises LmError: 65 when the set was not made by `lm tokenize` or its sources give other bytes now; 75 when another
    process writes to the set.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if not (directory / PLAN).is_file():
        raise LmError(
            f"{directory}: there is no plan.json, so the shards cannot be made again from their source.",
            hint="Restore them from a copy.",
            code=Exit.DATA,
        )
    with storage.lock_directory(directory, "lm validate --repair"):
        storage.sweep(directory)
        plan = read_plan(directory)
        tokenizer = plan_tokenizer(directory, plan)
        journal = read_journal(directory)
        if [line.entry for line in journal] != list(manifest.shards):
            raise LmError(
                f"{directory}: the journal does not tell where the shards of this set begin.",
                hint="Make the set again with lm tokenize; a merged set is repaired in the directories of its parts.",
                code=Exit.DATA,
            )
        for number in sorted(set(shards)):
            if not 0 <= number < len(manifest.shards):
                raise LmError(f"{directory}: there is no {shard_name(number)}.")
            progress.note(f"Making {shard_name(number)} again.")
            made = _make(directory, plan, tokenizer, journal, number, workers or available_cores(), backend, progress)
            _require_same(directory, manifest, number, made)


def _make(
    directory: Path,
    plan: Plan,
    tokenizer: Tokenizer,
    journal: list[Committed],
    number: int,
    workers: int,
    backend: Backend,
    progress: Progress,
) -> ShardEntry:
    request = plan.request
    writer = open_writer(request, tokenizer, directory, journal[:number], only=frozenset([number]))
    selector = Selector(request, directory, writer)
    start = writer.place if number else plan.start
    raw = read(
        plan.units,
        request.text_column,
        start=start,
        stop=plan.stop,
        on_bad=request.on_bad_doc,
        threads=workers,
    )
    with writer, contextlib.closing(raw):
        kept = (filter_lengths(batch, request.min_chars, request.max_chars) for batch in raw)
        _, batches = encode_all(kept, tokenizer, backend, workers, progress)
        with contextlib.closing(batches):
            for batch in batches:
                selection = selector(batch)
                writer.add(batch, selection.keep, selection.duplicates, last=selection.last)
                if selector.is_full or writer.begun > number:
                    break
        writer.finish(plan.stop)
    made = {line.entry.name: line.entry for line in writer.committed}
    if shard_name(number) not in made:
        raise _changed(directory, number)
    return made[shard_name(number)]


def _require_same(directory: Path, manifest: Manifest, number: int, made: ShardEntry) -> None:
    if made != manifest.shards[number]:
        raise _changed(directory, number)


def _changed(directory: Path, number: int) -> LmError:
    return LmError(
        f"{directory / shard_name(number)}.npy: its sources give other tokens now than when the set was made.",
        hint="Restore the sources or the shard, or make the set again.",
        code=Exit.DATA,
    )
