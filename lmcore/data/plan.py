"""plan.json: the inputs and options of a shard set, frozen before the first token is written.

The bytes of a set are a function of its plan alone. The plan holds what the user asked for (`request`), what it was
resolved to (`units`: the files in order, pinned), and the tokenizer's identity. The same command finds the plan and
continues; another request is refused with the differences. It is written after tokenizer.json, so that a plan always
has its tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from lmcore import storage
from lmcore.config import Config, build
from lmcore.config import Count as Number
from lmcore.data.manifest import PLAN, TOKENIZER
from lmcore.data.readers import Place, pieces, rows_before
from lmcore.data.separators import parse as parse_separator
from lmcore.data.shard import MAX_SEQ_LEN, MIN_SEQ_LEN
from lmcore.data.sources import FormatChoice, Reading, Source, Unit, shown, total_size
from lmcore.errors import Exit, LmError
from lmcore.records import Count, Recorded, read_record

PLAN_FORMAT = "lmshards-plan/1"
_MAX_PLAN_BYTES = 2 << 30


class TokenizeConfig(Config):
    """What decides the bytes of a shard set. How fast they are made (workers, encoder) is not in here."""

    dataset: str | None = None
    """stdlib, a name of the registry, or a dataset on the Hub: org/name[:config][@revision]."""
    paths: tuple[str, ...] = ()
    """Files, folders, globs, URLs, or - for standard input."""
    text_column: str = "text"
    """Column of parquet files and key of JSONL lines that holds the text; a dotted name leads into a struct."""
    format: FormatChoice = "auto"
    """What the files are; auto: by their content and their names."""
    separator: str | None = None
    """Where text files fall into documents (separators.py): auto, or a text; None: each is one document."""
    tokenizer: str = "train:8192"
    """train:N, byte, a tokenizer.json (or its folder), or the name of a model on the Hub."""
    seq_len: int = Field(default=2048, ge=MIN_SEQ_LEN, le=MAX_SEQ_LEN)
    """Tokens per row of a shard. Any context length can be trained from any seq_len."""
    shard_tokens: Number = Field(default=1 << 26, ge=MIN_SEQ_LEN, le=1 << 31)
    """Tokens per shard, rounded down to whole rows."""
    min_chars: int = Field(default=1, ge=1)
    """Shorter documents are dropped."""
    max_chars: Number | None = Field(default=None, ge=1)
    """Longer documents are dropped."""
    dedup: bool = False
    """Drop documents whose text was seen before, by content hash."""
    max_documents: Number | None = Field(default=None, ge=1)
    """Stop after this many documents."""
    max_tokens: Number | None = Field(default=None, ge=1)
    """Stop after the document that reaches this many tokens."""
    shuffle_units: int | None = None
    """Seed for the order of the files; None keeps the order of their names."""
    on_bad_doc: Literal["stop", "skip", "repair"] = "stop"
    """What to do with a record that cannot be read."""
    part: int | None = Field(default=None, ge=1)
    """Number of this part, from 1."""
    parts: int | None = Field(default=None, ge=1)
    """Number of parts of the plan, each a shard set of its own (lm merge joins them). Files stay whole when there are
    enough of them; else parquet is cut at row groups and plain JSONL every 8 MiB."""

    @model_validator(mode="after")
    def _whole(self) -> TokenizeConfig:
        if self.separator is not None:
            parse_separator(self.separator)
        if (self.dataset is None) == (not self.paths):
            raise ValueError("name either files or a dataset: lm tokenize PATH..., or lm tokenize --dataset NAME")
        if self.paths.count("-") and len(self.paths) > 1:
            raise ValueError("standard input (-) cannot be joined with other files")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars ({self.max_chars:,}) is below min_chars ({self.min_chars:,})")
        if self.shard_tokens < self.seq_len:
            raise ValueError(f"shard_tokens ({self.shard_tokens:,}) is below seq_len ({self.seq_len:,})")
        if (self.part is None) != (self.parts is None) or (self.part or 0) > (self.parts or 0):
            raise ValueError(f"part must be I/N with I from 1 to N, such as 1/8 (got {self.part}/{self.parts})")
        if self.parts is not None and (self.max_documents or self.max_tokens or self.dedup or "-" in self.paths):
            raise ValueError(
                "parts cannot be combined with dedup, max_documents, max_tokens or standard input: a part knows "
                "nothing of the documents of the others"
            )
        return self

    @property
    def reading(self) -> Reading:
        """How files are to be read."""
        return Reading(self.format, self.text_column)

    @property
    def rows_per_shard(self) -> int:
        return self.shard_tokens // self.seq_len


@dataclass(frozen=True)
class Plan:
    """The content of plan.json."""

    request: TokenizeConfig
    source: dict[str, Any]
    units: tuple[Unit, ...]
    tokenizer_name: str
    tokenizer_sha256: str
    start: Place
    stop: Place
    """This set tokenizes what lies from `start` to before `stop`: all units, or one part."""

    @property
    def own_units(self) -> tuple[Unit, ...]:
        """The units of which this set holds something."""
        return self.units[self.start.unit : self.stop.unit + (self.stop.piece > 0)]

    def to_json(self) -> dict[str, Any]:
        # Written only where a part begins or ends inside of a file.
        inside = {
            "first_piece": self.start.piece,
            "first_row": self.start.base,
            "stop_piece": self.stop.piece,
            "stop_row": self.stop.base,
        }
        return {
            "format": PLAN_FORMAT,
            "request": self.request.model_dump(mode="json"),
            "source": self.source,
            "tokenizer_name": self.tokenizer_name,
            "tokenizer_sha256": self.tokenizer_sha256,
            "first_unit": self.start.unit,
            "stop_unit": self.stop.unit,
            "units": [unit.to_json() for unit in self.units],
        } | {key: number for key, number in inside.items() if number}


def make_plan(request: TokenizeConfig, source: Source, marks: tuple[str, ...] = ()) -> Plan:
    """Order the units (shuffled by a seed if asked) and cut out this part. marks: where text files fall into documents
    (separators.py). The tokenizer is filled in later."""
    units = order_units(source.units, request.shuffle_units)
    if marks:
        units = tuple(replace(unit, separators=marks) if unit.format == "text" else unit for unit in units)
    start, stop = part_range(units, request.part, request.parts)
    return Plan(request, source.description, units, "", "", start, stop)


def order_units(units: Sequence[Unit], seed: int | None) -> tuple[Unit, ...]:
    """The units in plan order: as resolved, or permuted by raw words of a counter-based generator."""
    if seed is None or len(units) < 2:
        return tuple(units)
    keys = np.random.Philox(key=[seed & (2**64 - 1), 0]).random_raw(len(units))
    return tuple(units[index] for index in np.argsort(keys, kind="stable"))


def part_range(units: Sequence[Unit], part: int | None, parts: int | None) -> tuple[Place, Place]:
    """Where part i of n begins and ends: neighbours, balanced by size, so that the parts one after the other are the
    whole plan in order. Files stay whole where there are enough of them; else they are cut at the row groups of parquet
    and at ranges of 8 MiB of plain JSONL."""
    if part is None or parts is None:
        return Place(0), Place(len(units))
    if parts <= len(units):
        cuts = _balanced([max(unit.size, 1) for unit in units], parts)
        return Place(cuts[part - 1]), Place(cuts[part])
    all_pieces = [(number, k, size) for number, unit in enumerate(units) for k, size in enumerate(pieces(unit))]
    if parts > len(all_pieces):
        raise LmError(
            f"--part {part}/{parts}: the corpus ({len(units):,} files) can be cut into at most {len(all_pieces):,} "
            "parts: at files, at row groups of parquet, and every 8 MiB of JSONL that is not compressed.",
            hint=f"Use at most {len(all_pieces):,} parts.",
        )
    cuts = _balanced([max(size, 1) for _, _, size in all_pieces], parts)
    places = []
    for cut in cuts[part - 1 : part + 1]:
        unit, piece, _ = all_pieces[cut] if cut < len(all_pieces) else (len(units), 0, 0)
        places.append(Place(unit, piece, rows_before(units[unit], piece) if piece else 0))
    return places[0], places[1]


def _balanced(sizes: Sequence[int], parts: int) -> list[int]:
    """Borders 0 = c_0 < c_1 < .. < c_parts = len(sizes) of runs of about equal sums."""
    summed = np.cumsum(sizes)
    cuts = [0]
    for number in range(1, parts):
        ideal = int(np.searchsorted(summed, summed[-1] * number / parts)) + 1
        cuts.append(min(max(ideal, cuts[-1] + 1), len(sizes) - (parts - number)))
    return [*cuts, len(sizes)]


def write_plan(directory: Path, plan: Plan) -> None:
    """Make the plan durable; from here on the set can be continued by the same command."""
    storage.write_file(directory / PLAN, storage.canonical_json(plan.to_json()) + b"\n")


def read_plan(directory: str | Path) -> Plan:
    """The plan of a shard set. Raises LmError (65) when there is none or it is not ours."""
    path = Path(directory) / PLAN
    try:
        record = read_record(_Record, path, limit=_MAX_PLAN_BYTES)
    except LmError as error:
        raise error if error.code is not Exit.DATA else _not_ours(error.message.removesuffix(".")) from None
    if record.format != PLAN_FORMAT:
        raise _not_ours(f"{path}: the format is {record.format[:60]!r}; this version reads {PLAN_FORMAT}")
    try:
        plan = Plan(
            request=build(TokenizeConfig, record.request),
            source=record.source,
            units=tuple(Unit.from_json(unit) for unit in record.units),
            tokenizer_name=record.tokenizer_name,
            tokenizer_sha256=record.tokenizer_sha256,
            start=Place(record.first_unit, record.first_piece, record.first_row),
            stop=Place(record.stop_unit, record.stop_piece, record.stop_row),
        )
    except LmError as error:
        raise _not_ours(f"{path}: request: {error.message.splitlines()[0].removesuffix('.')}") from None
    except ValueError as error:
        raise _not_ours(f"{path}: {error}") from None
    last = len(plan.units)
    if not plan.start.unit <= plan.stop.unit <= last or (plan.stop.piece and plan.stop.unit == last):
        raise _not_ours(f"{path}: units {plan.start.unit:,} to {plan.stop.unit:,} of {last:,}")
    return plan


class _Record(Recorded):
    """plan.json; units are checked by `Unit.from_json`, the request by TokenizeConfig."""

    format: str
    request: dict[str, Any]
    source: dict[str, Any]
    units: list[dict[str, Any]]
    tokenizer_name: str
    tokenizer_sha256: str
    first_unit: Count
    first_piece: Count = 0
    first_row: Count = 0
    stop_unit: Count
    stop_piece: Count = 0
    stop_row: Count = 0


def _not_ours(what: str) -> LmError:
    return LmError(
        f"{what}.",
        hint="Restore the file, or make the set again with lm tokenize; a finished set can be trained on without it.",
        code=Exit.DATA,
    )


def refuse_other_request(directory: Path, old: TokenizeConfig, new: TokenizeConfig) -> None:
    """Raise LmError (2) with the differences when the set was begun with other options."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    changes = [
        f"{_flag(key)}: {_value(before[key])} in the set, {_value(after[key])} now" for key in different(old, new)
    ]
    if changes:
        raise LmError(
            f"{directory}: this shard set was begun with other options ({'; '.join(changes)}).",
            hint="Use the same options to continue it, or another directory: --out PATH",
        )


def different(old: TokenizeConfig, new: TokenizeConfig) -> list[str]:
    """Options that ask for different things. Spellings of one path (txt, txt/, ./txt) ask for the same."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return [key for key in before if _meant(key, before[key]) != _meant(key, after[key])]


def _meant(key: str, value: Any) -> Any:
    if key == "paths":
        return [path if path == "-" or "://" in path else _absolute(path) for path in value]
    if key == "tokenizer" and os.path.exists(os.path.expanduser(value)):
        path = _absolute(value)
        return os.path.join(path, TOKENIZER) if os.path.isdir(path) else path
    return value


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def refuse_changed_units(directory: Path, old: Sequence[Unit], new: Sequence[Unit]) -> None:
    """Raise LmError (65) when the files behind a local source are no longer those of the plan."""
    before, after = ({unit.path: (unit.size, unit.fingerprint) for unit in units} for units in (old, new))
    changes = [
        *(f"+{shown(path)}" for path in after if path not in before),
        *(f"-{shown(path)}" for path in before if path not in after),
        *(f"~{shown(path)}" for path in before if path in after and before[path] != after[path]),
    ]
    if changes:
        more = f" and {len(changes) - 3:,} more" if len(changes) > 3 else ""
        raise LmError(
            f"{directory}: the source has changed since this set was begun ({', '.join(changes[:3])}{more}).",
            hint="Restore the files, or tokenize into another directory: --out PATH",
            code=Exit.DATA,
        )


def estimated_bytes(plan: Plan) -> int:
    """Stored bytes of the units of this set; of a part that was cut out of files, its share of them."""
    whole = total_size(plan.own_units)
    return whole // (plan.request.parts or 1) if plan.start.piece or plan.stop.piece else whole


def _flag(key: str) -> str:
    return {"paths": "the files", "parts": "--part"}.get(key, "--" + key.replace("_", "-"))


def _value(value: Any) -> str:
    if value is None:
        return "not given"
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
