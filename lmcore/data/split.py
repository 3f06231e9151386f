"""Hold-out without copying: views `train/`, `val/`, ... of a shard set that select token segments of its shards.

    DIR/val/manifest.json        own identity; the segments [shard, start, stop) of the held-out documents
    DIR/val/shard-00000.npy      relative link to ../shard-00000.npy (or a hard link, a copy, nothing)

By document (the default) the side is a function of the document's content alone:

    key = splitmix64(hash xor salt)        view i holds the keys of [2^64 * (f_1 + .. + f_i-1), 2^64 * (f_1 + .. + f_i))

so a document keeps its side when data is added, exact duplicates are on one side, a smaller fraction is inside the
larger one, and no document can be on two sides. What is left is `train`. Documents leave with their EOS: a view's
stream equals, token for token, the stream that tokenizing only its documents would give.

Sets without a document index (adopted data) are split by whole shards, or by rows when there is one shard only; then
nobody can say whether a document lies on both sides, and the manifest says so.

Left out: reading views (stream.py), finding faults in them (validate.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lmcore import storage
from lmcore.data import shard as shards
from lmcore.data.manifest import (
    MANIFEST,
    PLAN,
    TOKENIZER,
    Manifest,
    ShardEntry,
    created_by,
    make_manifest,
    merge_segments,
    read_manifest,
)
from lmcore.data.rewrite import LENGTHS, write_shards
from lmcore.data.stream import TokenStream
from lmcore.errors import Exit, LmError, from_os_error, quoted
from lmcore.progress import SILENT, Progress

By = Literal["auto", "document", "shard", "rows"]
Link = Literal["symlink", "hardlink", "copy", "none"]
Segment = tuple[int, int, int]
Keys = npt.NDArray[np.uint64]

MAX_SEGMENTS = 2_000_000  # about 45 MB of manifest, read in two seconds
REST = "train"
MIN_TOKENS = 257  # a view must hold one window of the smallest context that anybody trains


@dataclass(frozen=True)
class ViewReport:
    """One view as written (or found as it should be)."""

    name: str
    path: Path
    n_tokens: int
    n_docs: int
    n_bytes: int
    share: float
    """Tokens of the view over tokens of the set."""
    dataset_id: str
    changed: bool
    """False when the view on disk was already this one."""


@dataclass
class SplitReport:
    """What `split_set` did."""

    path: Path
    by: str
    views: list[ViewReport]
    leakage: str
    """"none" (proven by content hashes), "documents" (some lie on two sides) or "unverifiable" (no document index)."""
    common_documents: int | None
    """Documents on more than one side; None when it cannot be known."""
    removed: list[str] = field(default_factory=list)
    """Views of an earlier split that would overlap and were removed."""
    warnings: list[str] = field(default_factory=list)


def split_set(
    path: str | os.PathLike[str],
    fractions: Mapping[str, float] | None = None,
    *,
    by: By = "auto",
    documents: Mapping[str, int] | None = None,
    salt: int = 0,
    link: Link = "symlink",
    materialize: bool = False,
    min_tokens: int = MIN_TOKENS,
    progress: Progress = SILENT,
) -> SplitReport:
    """Make the views `fractions` (by share of documents) or `documents` (by number of distinct documents), and `train`
    with the rest, inside the set's directory. The same call again changes nothing.

    by: "auto" takes documents when the set has an index, else shards, else rows. materialize: write the view's tokens
    into shards of its own, for readers that know nothing of segments.
    Raises LmError: 2 for impossible fractions, 65 when a view would be empty or too short, 75 when the set is in use.
    """
    path = Path(path)
    parent = read_manifest(path)
    if parent.kind == "view":
        raise LmError(
            f"{path}: this is a view already.", hint=f"Split the set: lm split {quoted(path.resolve().parent)}"
        )
    rule = _Rule(dict(fractions or {}), dict(documents or {}), salt)
    chosen = _choose(parent, by, path)
    if chosen != "document" and rule.documents:
        raise LmError(f"{path}: a number of documents can be held out by document only, not by {chosen}.")
    with storage.lock_directory(path, "lm split"):
        storage.sweep(path)
        plan = _BY[chosen](path, parent, rule, progress)
        _require_useful(path, rule, plan, min_tokens, materialize)
        report = SplitReport(path, chosen, [], _leakage(plan.common), plan.common)
        if chosen == "document" and link != "none" and not materialize:
            report.warnings.append(
                "a view's shards hold documents of every side; only its manifest says which tokens belong to it. "
                "For readers that do not know manifests, use --materialize."
            )
        _write_views(path, parent, plan, rule, chosen, link, materialize, report, progress)
    return report


# ---------------------------------------------------------------------------------------- the rule


@dataclass(frozen=True)
class _Rule:
    fractions: dict[str, float]
    documents: dict[str, int]
    salt: int

    def __post_init__(self) -> None:
        if not self.fractions and not self.documents:
            self.fractions["val"] = 0.01
        if self.fractions and self.documents:
            raise LmError("give fractions or numbers of documents, not both.")
        for name in (*self.fractions, *self.documents):
            if not name.isidentifier() or not name.isascii():
                raise LmError(f"{name!r} cannot name a view: letters, digits and _ only.")
        for name, value in self.fractions.items():
            if not 0 < value < 1:
                raise LmError(f"{name}={value}: a fraction lies between 0 and 1.")
        for name, count in self.documents.items():
            if count < 1 or name == REST:
                raise LmError(f"{name}={count}: hold out at least one document, and not for {REST}.")
        total = sum(self.fractions.values())
        if REST in self.fractions:
            if abs(total - 1) > 1e-9:
                raise LmError(f"the fractions add up to {total:g}; with {REST} among them they must add up to 1.")
            del self.fractions[REST]
        elif total >= 1:
            raise LmError(f"the fractions add up to {total:g}; nothing would be left for {REST}.")
        if not self.fractions and not self.documents:
            raise LmError(f"name a view to hold out besides {REST}.")

    @property
    def names(self) -> list[str]:
        """Held-out views in the order of their key intervals; `train` last."""
        return [*self.fractions, *self.documents, REST]

    def borders(self) -> Keys:
        """Upper ends (exclusive) of the key intervals of the held-out views."""
        shares = np.cumsum(list(self.fractions.values()))
        return np.array([min(int(share * 2.0**64), 2**64 - 1) for share in shares.tolist()], np.uint64)

    def record(self) -> dict[str, Any]:
        return {"fractions": self.fractions, "documents": self.documents, "salt": self.salt}


def split_key(hashes: npt.NDArray[np.uint64], salt: int = 0) -> Keys:
    """splitmix64(hash xor salt): uniform over 64 bits, a function of the content alone."""
    x = (hashes ^ np.uint64(salt)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass
class _Plan:
    """Segments and counts of each view, in the order of the rule's names."""

    segments: list[list[Segment]]
    n_docs: list[int]
    n_bytes: list[int]
    common: int | None


def _choose(parent: Manifest, by: By, path: Path) -> Literal["document", "shard", "rows"]:
    indexed = all(entry.docs_sha256 is not None for entry in parent.shards)
    if by == "auto":
        return "document" if indexed else ("shard" if len(parent.shards) > 1 else "rows")
    if by == "document" and not indexed:
        raise LmError(
            f"{path}: this set has no document index, so it cannot be split by document.",
            hint="Use --by shard, or --by rows; whether documents lie on both sides cannot be known then.",
            code=Exit.DATA,
        )
    if by == "shard" and len(parent.shards) < 2:
        raise LmError(f"{path}: one shard cannot be split by shard.", hint="Use --by document or --by rows.")
    return by


def indexes(path: Path, manifest: Manifest, progress: Progress) -> Iterator[tuple[int, ShardEntry, Any]]:
    """(number, entry, document index) of each shard, verified."""
    directory = shards.open_directory(path)
    progress.start("document index", len(manifest.shards), "shards")
    try:
        for number, entry in enumerate(manifest.shards):
            try:
                yield number, entry, shards.sound_documents(directory, entry, parent=manifest.kind == "view")
            except LmError as error:
                raise LmError(f"{path}/{error.message}", hint=error.hint, code=error.code) from None
            progress.advance(1)
    finally:
        progress.finish()
        os.close(directory)


def piece_ends(documents: Any, entry: ShardEntry) -> npt.NDArray[np.int64]:
    """Where each piece of the index ends in its shard: at the next start, the last one at the end of the tokens."""
    return np.append(documents["start"][1:].astype(np.int64), entry.n_tokens)


def first_pieces(documents: Any, entry: ShardEntry) -> npt.NDArray[np.bool_]:
    """Which records begin a document: all, except the first one of a shard that goes on from the shard before."""
    begins = np.ones(len(documents), np.bool_)
    if len(documents) and entry.first_doc_offset:
        begins[0] = False
    return begins


# ---------------------------------------------------------------------------------------- by document, shard, row


def _by_document(path: Path, parent: Manifest, rule: _Rule, progress: Progress) -> _Plan:
    borders = _borders_for_counts(path, parent, rule, progress) if rule.documents else rule.borders()
    count = len(rule.names)
    plan = _Plan([[] for _ in range(count)], [0] * count, [0] * count, 0)
    for number, entry, documents in indexes(path, parent, progress):
        view = np.searchsorted(borders, split_key(documents["hash"], rule.salt), "right")  # equal keys, equal view
        begins = first_pieces(documents, entry)
        starts, ends = documents["start"].astype(np.int64), piece_ends(documents, entry)
        runs = np.flatnonzero(np.append(True, view[1:] != view[:-1])) if len(view) else np.empty(0, np.int64)
        run_stops = np.append(runs[1:], len(view)) - 1
        for first, last in zip(runs.tolist(), run_stops.tolist(), strict=True):
            plan.segments[view[first]].append((number, int(starts[first]), int(ends[last])))
        plan.n_docs = (plan.n_docs + np.bincount(view[begins], minlength=count)).tolist()
        sizes = np.bincount(view, weights=documents["bytes"].astype(np.float64), minlength=count)
        plan.n_bytes = (plan.n_bytes + sizes.astype(np.int64)).tolist()
    return plan


def _borders_for_counts(path: Path, parent: Manifest, rule: _Rule, progress: Progress) -> Keys:
    """Key intervals that hold exactly the asked numbers of distinct documents: the smallest keys."""
    wanted = sum(rule.documents.values())
    smallest = np.empty(0, np.uint64)
    for _, _, documents in indexes(path, parent, progress):
        keys = np.concatenate([smallest, split_key(documents["hash"], rule.salt)])
        smallest = np.unique(keys)[: wanted + 1]
    if len(smallest) <= wanted:
        raise LmError(
            f"{path}: {wanted:,} documents to hold out, but the set has {len(smallest):,} distinct ones.",
            hint="Hold out fewer, or use --by rows.",
            code=Exit.DATA,
        )
    borders: Keys = smallest[np.cumsum(list(rule.documents.values()))]
    return borders


def _by_shard(path: Path, parent: Manifest, rule: _Rule, progress: Progress) -> _Plan:
    """Whole shards by the hash of their content; a document goes with the shard where it starts."""
    count, n = len(rule.names), len(parent.shards)
    keys = split_key(np.array([int(e.sha256[:16], 16) for e in parent.shards], np.uint64), rule.salt)
    distinct = np.unique(keys)
    sizes = [max(1, round(share * n)) for share in rule.fractions.values()]
    if sum(sizes) >= len(distinct):
        raise LmError(
            f"{path}: {sum(sizes)} of {len(distinct)} distinct shards would be held out, none left for {REST}.",
            hint="Hold out less, or use --by document or --by rows.",
            code=Exit.DATA,
        )
    view = np.searchsorted(distinct[np.cumsum(sizes)], keys, "right")
    plan = _Plan([[] for _ in range(count)], [0] * count, [0] * count, None)
    if any(entry.docs_sha256 is None for entry in parent.shards):
        for number, entry in enumerate(parent.shards):
            plan.segments[view[number]].append((number, 0, entry.n_tokens))
        return plan
    owner = int(view[0])
    hashes: list[list[Keys]] = [[] for _ in range(count)]
    for number, entry, documents in indexes(path, parent, progress):
        begins, ends = first_pieces(documents, entry), piece_ends(documents, entry)
        here = int(view[number])
        carried = int(ends[0]) if len(begins) and not begins[0] else 0
        plan.segments[owner].append((number, 0, carried))
        plan.segments[here].append((number, carried, entry.n_tokens))
        plan.n_docs[here] += int(begins.sum())
        plan.n_bytes[here] += int(documents["bytes"].astype(np.int64).sum())
        hashes[here].append(np.unique(documents["hash"][begins]))
        if begins.any():
            owner = here  # otherwise the whole shard belongs to one long document
    plan.segments = [merge_segments(segments) for segments in plan.segments]
    plan.common = _common([np.concatenate(h) if h else np.empty(0, np.uint64) for h in hashes])
    return plan


def _by_rows(path: Path, parent: Manifest, rule: _Rule, progress: Progress) -> _Plan:
    """Rows by the hash of their bytes: the last resort for one foreign shard, or for one long document."""
    count, width = len(rule.names), parent.seq_len
    plan = _Plan([[] for _ in range(count)], [0] * count, [0] * count, None)
    stream = TokenStream.open(path)
    borders = rule.borders()
    progress.start("rows", parent.n_tokens, "tokens")
    position = 0
    for number, entry in enumerate(parent.shards):
        hashes = np.empty(-(-entry.n_tokens // width), np.uint64)
        for row in range(len(hashes)):
            begin = row * width
            tokens = stream.read(position + begin, position + min(begin + width, entry.n_tokens))
            hashes[row] = int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")
            progress.advance(len(tokens))
        position += entry.n_tokens
        for row, view in enumerate(np.searchsorted(borders, split_key(hashes, rule.salt), "right").tolist()):
            plan.segments[view].append((number, row * width, min((row + 1) * width, entry.n_tokens)))
    progress.finish()
    plan.segments = [merge_segments(segments) for segments in plan.segments]
    return plan


_BY = {"document": _by_document, "shard": _by_shard, "rows": _by_rows}


def _common(sides: list[npt.NDArray[np.uint64]]) -> int:
    """Documents whose hash is on more than one side."""
    values, counts = np.unique(np.concatenate([np.unique(side) for side in sides]), return_counts=True)
    return int((counts[: len(values)] > 1).sum())


def _leakage(common: int | None) -> str:
    return "unverifiable" if common is None else ("documents" if common else "none")


def _require_useful(path: Path, rule: _Rule, plan: _Plan, min_tokens: int, materialize: bool) -> None:
    for name, segments in zip(rule.names, plan.segments, strict=True):
        if len(segments) > MAX_SEGMENTS and not materialize:
            raise LmError(
                f"{path}: the view {name} would have {len(segments):,} segments; {MAX_SEGMENTS:,} are the limit.",
                hint="Hold out less, split by shard, or write the views' tokens with --materialize.",
            )
    for name, segments, n_docs in zip(rule.names, plan.segments, plan.n_docs, strict=True):
        tokens = sum(stop - start for _, start, stop in segments)
        if tokens < max(min_tokens, 1):
            raise LmError(
                f"{path}: the view {name} would hold {tokens:,} tokens ({n_docs:,} documents);"
                f" {max(min_tokens, 1):,} are the least that is of use.",
                hint="Hold out more (--val-fraction 0.1 or --val-docs 20), add data, or use --by rows. A text file is "
                "one document unless lm tokenize was told where it falls into several: --separator auto",
                code=Exit.DATA,
            )


# ---------------------------------------------------------------------------------------- writing


def _write_views(
    path: Path,
    parent: Manifest,
    plan: _Plan,
    rule: _Rule,
    by: str,
    link: Link,
    materialize: bool,
    report: SplitReport,
    progress: Progress,
) -> None:
    wanted: dict[str, Manifest] = {}
    for number, name in enumerate(rule.names):
        record = rule.record() | {
            "view": name,
            "by": by,
            "parent": parent.dataset_id,
            "leakage": report.leakage,
            "common_documents": plan.common,
            "link": "materialized" if materialize else link,
        }
        counts = {"n_docs": plan.n_docs[number], "n_bytes": plan.n_bytes[number]}
        wanted[name] = _view_manifest(parent, plan.segments[number], record, counts)
    stale = _stale_views(path, wanted, materialize)
    # Old views go before new ones come: a crash leaves a view missing, never two views that share documents.
    for name in stale:
        storage.delete_directory(path / name)
    report.removed = [name for name in stale if name not in wanted]
    storage.fsync_directory(path)  # a killed run may have renamed a view without making the name durable
    for name, manifest in wanted.items():
        changed = not (path / name / MANIFEST).is_file()
        if changed:
            if materialize:
                manifest = _materialize(path, name, parent, manifest, progress)
            else:
                _link_view(path, name, manifest, link)
        else:
            manifest = read_manifest(path / name)
        report.views.append(
            ViewReport(
                name,
                path / name,
                manifest.n_tokens,
                manifest.n_docs,
                manifest.n_bytes,
                manifest.n_tokens / parent.n_tokens,
                manifest.dataset_id,
                changed,
            )
        )
        if manifest.n_tokens <= parent.seq_len:
            report.warnings.append(
                f"{name} holds {manifest.n_tokens:,} tokens: enough for contexts up to {manifest.n_tokens - 1:,} only."
            )


def _view_manifest(
    parent: Manifest, segments: list[Segment], split: dict[str, Any], counts: dict[str, int]
) -> Manifest:
    """The manifest of a view lists only the shards that it uses, numbered anew."""
    used = sorted({shard for shard, _, _ in segments})
    number = {shard: k for k, shard in enumerate(used)}
    whole = all((start, stop) == (0, parent.shards[shard].n_tokens) for shard, start, stop in segments)
    return make_manifest(
        kind="view",
        tokenizer=parent.tokenizer,
        dtype=parent.dtype,
        seq_len=parent.seq_len,
        packing=parent.packing,
        shards=tuple(parent.shards[shard] for shard in used),
        segments=tuple((number[shard], start, stop) for shard, start, stop in segments),
        n_tokens=sum(stop - start for _, start, stop in segments),
        source=parent.source,
        filters=parent.filters,
        backend=parent.backend,
        split=split | {"plain_readable": whole},
        created_by=created_by("lm split"),
        **counts,
    )


def _stale_views(path: Path, wanted: Mapping[str, Manifest], materialize: bool) -> list[str]:
    """Names of the views on disk that are not the wanted ones: another split, another parent, broken links."""
    stale = []
    for folder in sorted(path.iterdir()):
        if folder.is_symlink() or not folder.is_dir() or not (folder / MANIFEST).is_file():
            if folder.name in wanted and os.path.lexists(folder):
                _refuse_to_replace(folder)
            continue
        try:
            found = read_manifest(folder)
        except LmError as error:
            if error.code is Exit.IO:  # a view that cannot be read now may be readable later, beside the new ones
                raise
            if folder.name in wanted:
                stale.append(folder.name)
            continue
        if found.split is None:
            if folder.name in wanted:
                _refuse_to_replace(folder)
            continue
        target = wanted.get(folder.name)
        same = target is not None and _same_view(folder, found, target, materialize)
        if not same:
            stale.append(folder.name)
    return stale


def _refuse_to_replace(folder: Path) -> None:
    raise LmError(
        f"{folder}: this is in the way and was not made by lm split, so it is left alone.",
        hint="Move it away, or give the view another name.",
        code=Exit.CANNOT_CREATE,
    )


def _same_view(folder: Path, found: Manifest, target: Manifest, materialize: bool) -> bool:
    assert target.split is not None
    if found.split != (target.split | {"plain_readable": True} if materialize else target.split):
        return False
    if not materialize and (found.dataset_id != target.dataset_id or found.shards != target.shards):
        return False
    try:
        TokenStream.open(folder, verify="size")
    except LmError:
        return False
    return True


def _link_view(path: Path, name: str, manifest: Manifest, link: Link) -> None:
    if link == "copy":
        storage.require_free_space(path, sum(e.bytes for e in manifest.shards), f"the copies of {name}")
    with storage.commit_directory(path / name) as temporary:
        names = [f"{e.name}.npy" for e in manifest.shards]
        names += [f"{e.name}.docs.npy" for e in manifest.shards if e.docs_sha256 is not None]
        names += [TOKENIZER] if (path / TOKENIZER).is_file() else []
        for file in names:
            try:
                if link == "symlink":
                    os.symlink(os.path.join(os.pardir, file), temporary / file)
                elif link == "hardlink":
                    os.link(path / file, temporary / file, follow_symlinks=True)
                elif link == "copy":
                    with open(path / file, "rb") as source:
                        storage.create_file(temporary / file, iter(lambda s=source: s.read(1 << 20), b""))  # type: ignore[misc]
            except OSError as error:
                raise from_os_error(error, path / name / file, f"make the {link} of") from error
        text = storage.canonical_json(manifest.model_dump(mode="json"))
        storage.create_file(temporary / MANIFEST, text + b"\n")


def _materialize(path: Path, name: str, parent: Manifest, view: Manifest, progress: Progress) -> Manifest:
    """Write the view's tokens into shards of their own, with a document index when the parent has one.

    The result is a set like any other; `split` still says where it came from.
    """
    assert view.split is not None
    dtype = np.dtype("<u2" if view.dtype == "uint16" else "<u4")
    storage.require_free_space(path, view.n_tokens * dtype.itemsize, f"the shards of {name}")
    of_parent = {entry.name: number for number, entry in enumerate(parent.shards)}
    segments = [(of_parent[view.shards[shard].name], start, stop) for shard, start, stop in view.segments]
    documents = None
    if all(entry.docs_sha256 is not None for entry in parent.shards):
        documents = _documents_of(path, parent, segments, progress)
    starts = np.cumsum([0, *(entry.n_tokens for entry in parent.shards)])
    stream = TokenStream.open(path)

    def blocks() -> Iterator[npt.NDArray[Any]]:
        progress.start(f"writing {name}", view.n_tokens, "tokens")
        for shard, start, stop in segments:
            for low in range(start, stop, 1 << 22):
                high = min(low + (1 << 22), stop)
                yield stream.read(int(starts[shard]) + low, int(starts[shard]) + high)
                progress.advance(high - low)
        progress.finish()

    with storage.commit_directory(path / name) as temporary:
        eos = parent.tokenizer.eos_id if parent.tokenizer else 0
        rows = max(entry.rows for entry in parent.shards)
        entries = write_shards(
            temporary, blocks(), dtype=dtype, seq_len=view.seq_len, pad_id=eos, documents=documents, rows=rows
        )
        for file in (TOKENIZER, PLAN):
            if (path / file).is_file():
                storage.create_file(temporary / file, (path / file).read_bytes())
        fields = view.model_dump(mode="json", exclude={"dataset_id", "kind", "shards", "segments", "split"})
        manifest = make_manifest(
            **fields,
            kind="set",
            shards=tuple(entries),
            segments=tuple((number, 0, entry.n_tokens) for number, entry in enumerate(entries)),
            split=view.split | {"plain_readable": True},
        )
        storage.create_file(temporary / MANIFEST, storage.canonical_json(manifest.model_dump(mode="json")) + b"\n")
    return manifest


def _documents_of(path: Path, parent: Manifest, segments: list[Segment], progress: Progress) -> npt.NDArray[np.void]:
    """`LENGTHS` records of the documents inside the segments; pieces of one document are joined again."""
    inside: dict[int, list[tuple[int, int]]] = {}
    for shard, start, stop in segments:
        inside.setdefault(shard, []).append((start, stop))
    parts: list[npt.NDArray[np.void]] = []
    for number, entry, documents in indexes(path, parent, progress):
        ranges = np.array(inside.get(number, []), np.int64).reshape(-1, 2)
        if not len(ranges):
            continue
        starts, ends = documents["start"].astype(np.int64), piece_ends(documents, entry)
        # A cut by rows may take a part of a document, several parts even: every overlap is a piece.
        first = np.searchsorted(ends, ranges[:, 0], "right")
        last = np.searchsorted(starts, ranges[:, 1], "left")
        count = last - first
        which = np.repeat(np.arange(len(ranges)), count)
        piece = first[which] + (np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count))
        low, high = np.maximum(starts[piece], ranges[which, 0]), np.minimum(ends[piece], ranges[which, 1])
        part = np.zeros(len(piece), LENGTHS)
        for column in ("unit", "row", "hash"):
            part[column] = documents[column][piece]
        part["length"] = high - low
        # A piece that starts inside its document counts no bytes, so that bytes are never counted twice.
        begins = first_pieces(documents, entry)[piece] & (low == starts[piece])
        part["bytes"] = np.where(begins, documents["bytes"][piece], 0)
        if parts and len(part) and not begins[0] and low[0] == 0 and _same_document(parts[-1][-1], part[0]):
            parts[-1]["length"][-1] += part["length"][0]
            part = part[1:]
        if len(part):
            parts.append(part)
    return np.concatenate(parts) if parts else np.empty(0, LENGTHS)


def _same_document(a: np.void, b: np.void) -> bool:
    return all(a[column] == b[column] for column in ("unit", "row", "hash"))
