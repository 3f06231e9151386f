"""`lm tokenize --dry-run`: what a tokenization will read, write and take, from footers and a small sample.

Nothing is written. Up to 4 MB of text are read and encoded; sizes are scaled from them, so they are estimates, except
where the files themselves tell (rows of parquet files on this machine, number of text files).
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmcore.data.documents import filter_lengths
from lmcore.data.encoder import Backend, open_encoder
from lmcore.data.plan import Plan, TokenizeConfig, estimated_bytes
from lmcore.data.readers import check_columns, parquet_metadata, read
from lmcore.data.sources import resolve
from lmcore.data.tokenization import divided_plan, known_tokenizer
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import Exit, LmError
from lmcore.progress import Notes

_SAMPLE_BYTES = 4_000_000
_TYPICAL_COMPRESSION = 3.0  # where a sample cannot tell how much of a compressed file it is


@dataclass(frozen=True)
class Forecast:
    """What `tokenize` would do."""

    files: int
    stored_bytes: int
    records: int
    exact_records: bool
    text_bytes: int
    tokens: int
    shards: int
    shard_bytes: int
    free_bytes: int
    seconds: float
    workers: int
    backend: str
    notes: tuple[str, ...] = ()
    """What is left out or was seen, as the tokenization would say it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def forecast(config: TokenizeConfig, out: str | Path, *, workers: int, backend: Backend = "auto") -> Forecast:
    """Estimate a tokenization without writing anything. Raises what `tokenize` would raise about its source."""
    if config.paths == ("-",):
        raise LmError("--dry-run: standard input can be read only once.", hint="Save it to a file first.")
    source = resolve(config.dataset, config.paths, reading=config.reading)
    told = Notes(source.notes)
    check_columns(source.units, config.text_column)
    known = known_tokenizer(config)
    plan = divided_plan(config, source, known, told)
    units = plan.own_units
    sample = []
    size = records = 0
    began = time.monotonic()
    with contextlib.closing(
        read(
            plan.units,
            config.text_column,
            start=plan.start,
            stop=plan.stop,
            on_bad="skip",
            threads=1,
        )
    ) as batches:
        for batch in batches:
            records += max(batch.n_records, len(batch))
            batch = filter_lengths(batch, config.min_chars, config.max_chars)
            if len(batch):
                sample.append(batch)
                size += batch.n_bytes
            if size >= _SAMPLE_BYTES:
                break
    if not sample:
        raise LmError("No text to tokenize: every record is dropped or empty.", code=Exit.DATA)
    reading = time.monotonic() - began
    texts = (b.text(k)[:100_000].decode("utf-8", "ignore") for b in sample for k in range(len(b)))
    tokenizer = known or Tokenizer.train(texts, int(config.tokenizer.partition(":")[2]))
    stage = open_encoder(tokenizer, backend, sample[0])
    began = time.monotonic()
    tokens = sum(len(stage(batch).ids) for batch in sample)
    encoding = time.monotonic() - began

    stored = estimated_bytes(plan)
    text_bytes = _text_bytes(plan, size) if size >= _SAMPLE_BYTES else size
    scale = max(1.0, text_bytes / size)
    counted = _count_records(plan)
    total_records = counted if counted is not None else (round(records * scale))
    share = min(
        1.0,
        (config.max_tokens or float("inf")) / max(1, tokens * scale),
        (config.max_documents or float("inf")) / max(1, total_records),
    )
    all_tokens = round(tokens * scale * share)
    shard_tokens = config.rows_per_shard * config.seq_len
    return Forecast(
        files=len(units),
        stored_bytes=stored,
        records=total_records,
        exact_records=counted is not None,
        text_bytes=round(text_bytes * share),
        tokens=all_tokens,
        shards=-(-all_tokens // shard_tokens),
        shard_bytes=all_tokens * stage.dtype.itemsize,
        free_bytes=_free(Path(out)),
        seconds=round(scale * share * max(reading, encoding / workers) + 1.0, 1),
        workers=workers,
        backend=stage.record.name,
        notes=tuple(told.said),
    )


def _text_bytes(plan: Plan, sampled: int) -> float:
    """Bytes of text behind the plan."""
    total = 0.0
    for unit in plan.own_units:
        if unit.format == "parquet" or unit.compression:
            total += max(unit.size, 0) * _TYPICAL_COMPRESSION
        else:
            total += max(unit.size, 0)
    return max(total, sampled)


def _count_records(plan: Plan) -> int | None:
    """The exact number of records when files on this machine tell it."""
    total = 0
    for unit in plan.own_units:
        if unit.format in ("text", "python") and not unit.separators:
            total += 1
        elif unit.format == "parquet" and not unit.is_remote:
            total += parquet_metadata(unit).num_rows
        else:
            return None
    return total


def _free(path: Path) -> int:
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
