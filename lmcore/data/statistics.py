"""What kind of data a sound set holds: lengths, ids, decoded samples, what smells, and what it is good for.

Ids are counted on windows spread evenly over the stream (all of it when it is small), document lengths on the index.
Documents are chosen by content hash and decoded: for a byte-level tokenizer the bytes behind their tokens must hash to
what the source recorded, which no wrong tokenizer, order or index survives.

Left out: whether the files are sound (validate.py comes first).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcore.data.manifest import Manifest, read_manifest
from lmcore.data.provenance import StreamDocuments, content_hash
from lmcore.data.stream import TokenStream
from lmcore.errors import LmError, quoted
from lmcore.progress import Progress

Add = Callable[..., None]

SAMPLE_TOKENS = 1 << 20
"""Ids counted for entropy and top ids."""
ROW = 512
"""Tokens of the stretches that are compared with each other."""
_WINDOW = 8_192
_DECODED = 64  # documents decoded and hashed at the default level
_TOKENS_PER_PARAMETER = 20  # compute-optimal training (Hoffmann et al. 2022)
_MODELS = (10e6, 30e6, 124e6, 350e6, 774e6, 1.5e9, 3e9, 7e9, 13e9, 30e9, 70e9)
_NGRAM_BYTES = 50  # 13 tokens of usual text; counted in bytes so that a byte tokenizer is treated alike


@dataclass
class Statistics:
    """Figures about a stream; shares are between 0 and 1."""

    length_quantiles: dict[str, int] = field(default_factory=dict)
    """Tokens per document, EOS included, at these quantiles."""
    bytes_per_token: float | None = None
    eos_share: float | None = None
    entropy_bits: float = 0.0
    """Unigram entropy of the ids."""
    distinct_ids: int = 0
    sampled_tokens: int = 0
    top_ids: list[tuple[int, float, str]] = field(default_factory=list)
    """(id, share, text) of the most frequent ids."""
    windows: list[tuple[int, str]] = field(default_factory=list)
    """(position, decoded text) of three windows."""
    decoded_documents: int = 0
    """Documents whose text was proven to hash to the recorded content hash."""
    duplicate_documents: int | None = None
    seen_ngrams: dict[str, float] = field(default_factory=dict)
    """Share of the n-grams (about 50 bytes of text) of each held-out view that occur in train (deep only)."""
    advice: list[str] = field(default_factory=list)


def statistics(
    path: Path,
    manifest: Manifest,
    documents: dict[int, npt.NDArray[np.void]],
    tokenizer: Any,
    deep: bool,
    row_keys: npt.NDArray[np.uint64] | None,
    add: Add,
    progress: Progress,
) -> Statistics:
    """Statistics of a sound set or view; `add(code, where, message)` receives what smells.

    row_keys: a key of the beginning of every row of 512 tokens, from the pass over the bytes; None for views.
    """
    result = Statistics()
    stream = TokenStream.open(path, verify="size")
    sample = _sample(stream)
    _count_ids(path, manifest, sample, tokenizer, result, add)
    _rows(path, sample, bool(manifest.n_bytes) and manifest.n_bytes < 1.5 * manifest.n_tokens, add)
    if row_keys is not None:
        _equal_rows(path, stream, row_keys, add)
    if len(documents) == len(manifest.shards):
        index = StreamDocuments.build(path, manifest, documents)
        _documents(path, manifest, index, result, add)
        _decode(path, manifest, stream, index, tokenizer, deep, result, add, progress)
    if tokenizer is not None:
        eos = manifest.tokenizer.eos_id if manifest.tokenizer else None
        for share in (0.1, 0.5, 0.9):
            position = int(stream.n_tokens * share)
            ids = stream.read(position, min(position + 48, stream.n_tokens))
            text = tokenizer.decode([i for i in ids.tolist() if i != eos])
            result.windows.append((position, text))
    if deep and manifest.kind == "set":
        _ngrams(path, manifest, result, add, progress)
    result.advice = advice(manifest.n_tokens)
    if manifest.kind == "set" and manifest.split is None:
        split = (path / "val" / "manifest.json").is_file()
        result.advice.append(f"next: lm train --data {quoted(path)}" if split else f"next: lm split {quoted(path)}")
    if manifest.n_tokens <= 1024:
        add("V111", path, f"{manifest.n_tokens:,} tokens: contexts up to {manifest.n_tokens - 1:,} only")
    return result


def _sample(stream: TokenStream) -> npt.NDArray[Any]:
    """Windows spread evenly: (count, length); the whole stream when it is small."""
    n = stream.n_tokens
    length = min(_WINDOW, n)
    count = max(1, min(SAMPLE_TOKENS // length, n // length))
    starts = np.linspace(0, n - length, count).astype(np.int64)
    return stream.windows(starts, length)


def _count_ids(
    path: Path, manifest: Manifest, sample: npt.NDArray[Any], tokenizer: Any, s: Statistics, add: Add
) -> None:
    # Counting is several times faster than sorting, and ids of a sound set are small.
    table_of = np.bincount(sample.reshape(-1), minlength=1) if int(sample.max()) < 1 << 22 else None
    if table_of is not None:
        ids = np.flatnonzero(table_of)
        counts = table_of[ids]
    else:
        ids, counts = np.unique(sample, return_counts=True)
    share = counts / counts.sum()
    s.sampled_tokens, s.distinct_ids = int(counts.sum()), len(ids)
    s.entropy_bits = float(-(share * np.log2(share)).sum())
    table = tokenizer.token_bytes() if tokenizer is not None else []
    for k in np.argsort(-counts, kind="stable")[:10].tolist():
        number = int(ids[k])
        text = table[number].decode("utf-8", errors="replace") if number < len(table) else ""
        s.top_ids.append((number, float(share[k]), text))
    # An even spread over the vocabulary has entropy log2 V; a sample of n ids cannot show more than log2 n.
    vocab = manifest.tokenizer.vocab_size if manifest.tokenizer else int(ids.max()) + 1
    ceiling = np.log2(min(vocab, s.sampled_tokens))
    if s.sampled_tokens > 10_000 and vocab >= 256 and s.entropy_bits > 0.97 * ceiling:
        add("V104", path, f"entropy {s.entropy_bits:.2f} of at most {ceiling:.2f} bits per token")
    eos = manifest.tokenizer.eos_id if manifest.tokenizer else None
    if eos is not None:
        hit = np.flatnonzero(ids == eos)
        s.eos_share = float(share[hit[0]]) if len(hit) else 0.0
        if manifest.n_docs == 0 and s.eos_share == 0.0:
            add("V108", path, "no EOS in the sample and no document index")
        if s.eos_share > 0.1:
            add("V108", path, f"{100 * s.eos_share:.0f} % of the tokens are EOS")
    for number, fraction, text in s.top_ids[:1]:
        if fraction > 1 / 3:
            add("V105", path, f"id {number} ({text!r}) takes {100 * fraction:.0f} % of all tokens")


def _rows(path: Path, sample: npt.NDArray[Any], fine: bool, add: Add) -> None:
    """Rows of one id, and rows that repeat a short pattern, among at most 1,024 sampled stretches.

    fine: the ids are bytes or little more, where runs of blanks and rulers of dashes are usual.
    """
    repeats, rate = (128, 20) if fine else (32, 1000)
    width = min(512, sample.shape[1])
    rows = sample[:, : sample.shape[1] // width * width].reshape(-1, width)
    rows = rows[:: max(1, len(rows) // 1024)]
    half = width // 2
    # An id with more than half of the places holds the middle of the sorted row.
    middle = np.partition(rows, half, axis=1)[:, half : half + 1]
    dominated = np.count_nonzero(rows == middle, axis=1) > half
    if (count := int(dominated.sum())) > max(2, len(rows) // rate):
        add(
            "V103", path, f"in {100 * count / len(rows):.1f} % of sampled stretches of {width} tokens one id fills half"
        )
    periodic = np.zeros(len(rows), np.bool_)
    for period in range(1, 14):
        same = rows[:, period:] == rows[:, :-period]
        need = min(repeats * period, max(32 * period, width * 3 // 4))
        if need > same.shape[1]:
            continue
        run = np.cumsum(~same, axis=1, dtype=np.int16)  # constant over a run of equal pairs
        periodic |= (run[:, need - 1 :] == np.pad(run, ((0, 0), (1, 0)))[:, : run.shape[1] - need + 1]).any(axis=1)
    if (count := int((periodic & ~dominated).sum())) > max(2, len(rows) // 200):
        add("V107", path, f"{100 * count / len(rows):.1f} % of sampled stretches repeat a pattern of up to 13 ids")


def _equal_rows(path: Path, stream: TokenStream, keys: npt.NDArray[np.uint64], add: Add) -> None:
    """Rows whose beginnings are equal are suspects; what they hold decides."""
    plain = np.sort(keys)
    if not np.any(plain[1:] == plain[:-1]):
        return
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    twin = np.zeros(len(keys), np.bool_)
    twin[1:] = ordered[1:] == ordered[:-1]
    twin[:-1] |= twin[1:]
    suspects = np.sort(order[twin])
    share = max(1.0, len(suspects) / 20_000)
    starts = suspects[:20_000] * ROW
    starts = starts[starts + ROW <= stream.n_tokens]
    seen = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in stream.windows(starts, ROW)]
    repeated = int((len(seen) - len(set(seen))) * share)
    if repeated > max(5, len(keys) // 200):
        add("V102", path, f"about {repeated:,} of {len(keys):,} rows of {ROW} tokens repeat another row")


def _documents(path: Path, manifest: Manifest, index: StreamDocuments, s: Statistics, add: Add) -> None:
    if not len(index.lengths):
        return
    names = {"min": 0, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
    quantiles = np.percentile(index.lengths, [*names.values()], method="nearest")
    s.length_quantiles = {name: int(q) for name, q in zip(names, quantiles, strict=True)}
    hashes = index.hashes
    ordered = np.sort(hashes)
    s.duplicate_documents = int((ordered[1:] == ordered[:-1]).sum())
    if s.duplicate_documents > max(1, len(hashes) // 100):
        add("V109", path, f"{s.duplicate_documents:,} of {len(hashes):,} documents repeat another")
    text_tokens = manifest.n_tokens - manifest.n_docs
    if manifest.n_bytes and text_tokens > 0:
        s.bytes_per_token = manifest.n_bytes / text_tokens
        if not 0.9 <= s.bytes_per_token <= 12:
            add("V106", path, f"{s.bytes_per_token:.2f} bytes of text per token")


def _decode(
    path: Path,
    manifest: Manifest,
    stream: TokenStream,
    index: StreamDocuments,
    tokenizer: Any,
    deep: bool,
    s: Statistics,
    add: Add,
    progress: Progress,
) -> None:
    """Documents decoded and hashed: all of them (deep) or the 64 with the smallest content hashes.

    Where the tokenizer loses nothing, each must give its content hash. Elsewhere (lower case, a blank in front, unknown
    words) a text may come back changed, so those that do prove something and the others nothing.
    """
    if tokenizer is None or manifest.source.get("document_hash") == "tokens":
        return
    whole = np.flatnonzero(index.whole)
    if not deep:
        small = whole[index.lengths[whole] < 1_000_000]
        whole = small[np.argsort(index.hashes[small], kind="stable")[:_DECODED]]
    table = np.array([*tokenizer.token_bytes()], object)
    progress.start("decoding documents", len(whole), "documents")
    proven = 0
    first = ""
    for k in whole.tolist():
        begin, length = int(index.starts[k]), int(index.lengths[k])
        ids = stream.read(begin, begin + length)
        if manifest.tokenizer is not None and ids[-1] == manifest.tokenizer.eos_id:
            ids = ids[:-1]
        text = b"".join(table[ids].tolist()) if tokenizer.lossless else tokenizer.decode(ids).encode()
        wanted = int(index.hashes[k])
        if content_hash(text) == wanted or (not tokenizer.lossless and content_hash(text.removeprefix(b" ")) == wanted):
            proven += 1
        else:
            first = first or f"document {k:,} (token {begin:,})"
        progress.advance(1)
    progress.finish()
    s.decoded_documents, wrong = proven, len(whole) - proven
    if wrong and tokenizer.lossless:
        add("V024", path, f"{wrong:,} of {len(whole):,} documents do not decode to their content hash, first {first}")


def _ngrams(path: Path, manifest: Manifest, s: Statistics, add: Add, progress: Progress) -> None:
    """Share of the n-grams of each held-out view that occur in train: near-duplicates that hashes do not see."""
    views: dict[str, TokenStream] = {}
    for folder in sorted(path.iterdir()):
        try:
            found = read_manifest(folder)
            if found.split is not None and found.split.get("parent") == manifest.dataset_id:
                views[folder.name] = TokenStream.open(folder, verify="size")
        except LmError:
            continue
    train = views.pop("train", None)
    if train is None:
        return
    n = int(np.clip(round(_NGRAM_BYTES / (s.bytes_per_token or 4)), 13, 64))
    for name, held_out in views.items():
        grams = np.unique(_rolling(held_out.read(0, min(held_out.n_tokens, 10_000_000)), n))
        hit = np.zeros(len(grams), np.bool_)
        progress.start(f"{n}-grams of {name} in train", train.n_tokens, "tokens")
        for begin in range(0, train.n_tokens, 1 << 20):
            block = train.read(begin, min(begin + (1 << 20) + n - 1, train.n_tokens))
            grams_here = np.unique(_rolling(block, n))
            place = np.searchsorted(grams, grams_here)
            place[place == len(grams)] = 0
            hit[place[grams[place] == grams_here]] = True
            progress.advance(len(block))
        progress.finish()
        share = float(hit.mean()) if len(hit) else 0.0
        s.seen_ngrams[name] = share
        if share > 0.2:
            add("V110", path / name, f"{100 * share:.1f} % of its {n}-grams occur in train")


def _rolling(tokens: npt.NDArray[Any], n: int) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of every n-gram: polynomial modulo 2^64 over mixed ids."""
    mixed = tokens.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    count = max(len(mixed) - n + 1, 0)
    result = np.zeros(count, np.uint64)
    for k in range(n):
        result = result * np.uint64(0xBF58476D1CE4E5B9) + mixed[k : k + count]
    return result


def advice(n_tokens: int) -> list[str]:
    """What these tokens are enough for, in sentences."""
    best = n_tokens / _TOKENS_PER_PARAMETER
    fitting = [m for m in _MODELS if m <= best]
    size = _size(fitting[-1]) if fitting else _size(best)
    steps = n_tokens // (524_288 if n_tokens > 10**9 else 32_768)
    batch = "524,288" if n_tokens > 10**9 else "32,768"
    lines = [
        f"compute-optimal model ({_TOKENS_PER_PARAMETER} tokens per parameter, one epoch): about {_size(best)} "
        f"parameters" + (f"; up to {_size(4 * best)} with four epochs" if best < 1e9 else ""),
        f"one epoch = {max(steps, 1):,} steps of {batch} tokens",
        f"time of one epoch = {n_tokens:,} / (measured tokens per second); at 20,000 tokens/s "
        f"{_duration(n_tokens / 20_000)}, at 1M tokens/s {_duration(n_tokens / 1e6)}",
    ]
    if fitting:
        lines[0] += f" (a usual size: {size})"
    return lines


def _size(count: float) -> str:
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{suffix}"
    return f"{count:.0f}"


def _duration(seconds: float) -> str:
    for limit, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.0f} seconds"
