"""How fast text becomes shards: ours against the bare encoder, a plain writer on `tokenizers`, datatrove and dolma.

    python benchmarks/tokenize_text.py --make-corpus CORPUS_DIR --trees TEXTS SITE_PACKAGES
    python benchmarks/tokenize_text.py --corpus CORPUS_DIR --repeats 3
    ... --datatrove /path/to/venv/bin/python --dolma /path/to/venv/bin/dolma

TEXTS is any folder of documentation and code. For the figures in docs/benchmarks.md it held these Debian 12 packages,
each `apt-get download NAME` and `dpkg-deb -x NAME_*.deb TEXTS/NAME`, and of the kernel's tar file the folders
Documentation, kernel, mm, fs, net, lib and arch/x86 (834 MB of text, three quarters of it prose, in a dozen languages):

    acl2-books-source anarchism bible-kjv-text cppreference-doc-en-html debian-faq debian-handbook debian-policy
    debian-reference-{de,en,es,fr,ja,zh-cn} developers-reference dict-{foldoc,gcide,jargon,wn} emacs-common erlang-doc
    fortunes gimp-help-{de,en} git-doc gnucash-docs libreoffice-help-{de,en-us,es,fr,ja,ru,zh-cn} lilypond-doc-html
    linux-doc-6.1 linux-source-6.1 manpages manpages-{de,dev,fr,ru} maxima-doc nodejs-doc octave-doc openjdk-17-doc
    perl-doc postgresql-doc-15 python-django-doc python-scipy-doc python3.11-doc qtbase5-doc-html rust-doc sagemath-doc

    bare       the parquet text already in memory -> ids in memory, gigatoken and nothing else: the ceiling
    bare_pool, bare_shared                                          two other ways of calling it
    ours       lm tokenize: read parquet, encode, index, hash, write, fsync, manifest; verified and audited
    plain      what most people write: tokenizers.encode_batch per 1,000 rows, np.save; on a part of the corpus
    datatrove  its DocumentTokenizer pipeline on the same parquet; dolma: `dolma tokens` on JSONL.gz

gigatoken can be called in three ways: a loaded tokenizer for every thread (bare), one whose own threads share batches
of --pool-mib (bare_pool), one that all threads call in turn (bare_shared: it has a lock). "of bare" is against the
fastest of them.

Every case runs in a process of its own with a cold encoder; cases are interleaved over the repeats and medians are
reported. Throughput counts UTF-8 bytes of text. A process measures itself from after its imports to its last fsync; for
the peers the whole command counts. The slow cases take a share of the corpus (--share), for they scale linearly. On a
machine with other work, "(CPU)" is the column to read: text per second of processor time, all threads (not for
datatrove, whose workers do not report theirs).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

PROSE = (".html", ".htm", ".txt", ".rst", ".md", ".pod", ".texi", ".dict")
CODE = (".py", ".c", ".h", ".lisp", ".el")
CODE_SHARE = 0.25
PAGE_CHARS = 4000

BARE = ("bare", "bare_pool", "bare_shared")
CASES = (*BARE, "ours", "plain", "datatrove", "dolma")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder of parquet files with a column 'text'")
    parser.add_argument("--make-corpus", type=Path, help="make such a folder from the texts in --trees")
    parser.add_argument("--trees", type=Path, nargs="+", help="folders with documentation and code")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; trained on the corpus if absent")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pool-mib", type=int, default=16, help="batches of the case bare_pool")
    parser.add_argument("--share", type=float, default=0.1, help="part of the corpus for the slow cases")
    parser.add_argument("--datatrove", help="python of an environment with datatrove")
    parser.add_argument("--dolma", help="the dolma command")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_corpus:
        make_corpus(options.make_corpus, options.trees)
    elif options.case:
        print(json.dumps(globals()[f"run_{options.case}"](options)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=options.corpus.parent))
    try:
        options.tokenizer = options.tokenizer or train(options.corpus, scratch, options.vocab_size)
        small = scratch / "share"
        take_share(options.corpus, small, options.share)
        cases = [c for c in CASES if c not in ("datatrove", "dolma") or getattr(options, c)]
        results: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        for _ in range(options.repeats):
            for case in cases:
                corpus = options.corpus if case in (*BARE, "ours") else small
                out = scratch / case
                command = [
                    *[sys.executable, __file__, "--case", case, "--corpus", corpus, "--tokenizer", options.tokenizer],
                    *["--workers", options.workers, "--pool-mib", options.pool_mib, "--out", out],
                    *(["--datatrove", options.datatrove] if options.datatrove else []),
                    *(["--dolma", options.dolma] if options.dolma else []),
                ]
                done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
                results[case].append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(out, ignore_errors=True)
        report(results, options)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def report(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    speed = {case: statistics.median(r["bytes"] / r["seconds"] / 1e6 for r in runs) for case, runs in results.items()}
    print(f"{options.workers} workers, {options.repeats} repeats, medians; MB = 10^6 bytes of UTF-8 text")
    cpu = {case: statistics.median(r["bytes"] / r["cpu_seconds"] / 1e6 for r in runs) for case, runs in results.items()}
    ceiling, frugal = (max(rate[case] for case in BARE) for rate in (speed, cpu))
    print(f"{'case':11} {'MB':>7} {'MB/s':>8} {'Mtok/s':>8} {'of bare':>8} {'(CPU)':>8} {'cores':>6} {'peak MiB':>9}")
    for case, runs in results.items():
        size = runs[0]["bytes"] / 1e6
        tokens = statistics.median(r["tokens"] / r["seconds"] / 1e6 for r in runs)
        peak = statistics.median(r["peak_mib"] for r in runs)
        cores = statistics.median(r["cpu_seconds"] / r["seconds"] for r in runs)
        wall, processor = speed[case] / ceiling, cpu[case] / frugal
        row = f"{case:11} {size:7.1f} {speed[case]:8.1f} {tokens:8.2f} {wall:8.1%} {processor:8.1%}"
        print(f"{row} {cores:6.2f} {peak:9.0f}")


# ---------------------------------------------------------------------------------------- corpus


def make_corpus(folder: Path, trees: list[Path]) -> None:
    """Parquet files (zstd, groups of 1,000 rows, as on the Hub) of the prose in some trees and a quarter of code:
    HTML without its markup, long texts cut at a blank line, equal pages once, the order shuffled."""
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq

    pages: dict[str, list[str]] = {"prose": [], "code": []}
    seen: set[bytes] = set()
    for tree in trees:
        for path in sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()):
            kind, text = text_of(path)
            for page in cut(text):
                digest = hashlib.sha256(page.encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    pages[kind].append(page)
    shuffle = random.Random(0).shuffle
    shuffle(pages["code"])
    room = sum(map(len, pages["prose"])) * CODE_SHARE / (1 - CODE_SHARE) or float("inf")
    for page in pages["code"]:
        room -= len(page)
        if room > 0:
            pages["prose"].append(page)
    texts = pages["prose"]
    shuffle(texts)
    folder.mkdir(parents=True, exist_ok=True)
    each = len(texts) // 8 + 1
    for number in range(8):
        table = pa.table({"text": texts[number * each : (number + 1) * each]})
        pq.write_table(table, folder / f"part-{number}.parquet", compression="zstd", row_group_size=1000)
    print(f"{len(texts):,} documents, {sum(len(t.encode()) for t in texts) / 1e6:.1f} MB in {folder}")


def text_of(path: Path) -> tuple[str, str]:
    """("prose" or "code", text); "" for what is neither."""
    name = path.name.removesuffix(".gz").removesuffix(".dz")
    suffix = Path(name).suffix
    man = path.parent.name.startswith("man") and path.suffix == ".gz"
    if not man and suffix not in (*PROSE, *CODE):
        return "prose", ""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
        text = raw.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return "prose", ""
    if suffix in (".html", ".htm"):
        text = html.unescape(
            re.sub(r"<[^>]*>", "", re.sub(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->", "", text))
        )
    return "code" if suffix in CODE else "prose", re.sub(r"\n\s*\n", "\n\n", text).strip()


def cut(text: str) -> Iterator[str]:
    """Pages of a text: as long as those of the web are on average, each ending before a blank line."""
    begin = 0
    while begin < len(text):
        end = text.find("\n\n", begin + PAGE_CHARS)
        end = len(text) if end < 0 else end
        yield text[begin:end]
        begin = end + 2


def train(corpus: Path, scratch: Path, vocab_size: int) -> Path:
    from lmcore.data.tokenizer import Tokenizer

    texts = [text for batch in batches(corpus) for text in batch.to_pylist()]
    path = scratch / "tokenizer" / "tokenizer.json"
    path.parent.mkdir()
    Tokenizer.train(texts[:6000], vocab_size).save(path)
    return path


def take_share(corpus: Path, small: Path, share: float) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    small.mkdir()
    texts = [text for batch in batches(corpus) for text in batch.to_pylist()]
    texts = texts[: int(len(texts) * share)]
    pq.write_table(pa.table({"text": texts}), small / "a.parquet", compression="zstd", row_group_size=1000)


def batches(corpus: Path) -> list:  # type: ignore[type-arg]
    import pyarrow.parquet as pq

    return [c for p in sorted(corpus.glob("*.parquet")) for c in pq.read_table(p, columns=["text"]).column(0).chunks]


class Meter:
    """Wall time, processor time of this process and its children, and peak memory, from its making on."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._processor()

    @staticmethod
    def _processor() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    def stop(self, size: int, tokens: int) -> dict[str, float]:
        from lmcore.heap import peak_resident_bytes

        peak = peak_resident_bytes() / 2**20
        seconds, cpu = time.perf_counter() - self._wall, self._processor() - self._cpu
        return {"bytes": size, "tokens": tokens, "seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak}


# ---------------------------------------------------------------------------------------- cases


def run_bare(options: argparse.Namespace) -> dict[str, float]:
    """Every thread with a tokenizer of its own, on the batches as they are read; the ids are thrown away."""
    return run_encoder(options, copies=options.workers)


def run_bare_shared(options: argparse.Namespace) -> dict[str, float]:
    return run_encoder(options, copies=1)


def run_encoder(options: argparse.Namespace, *, copies: int) -> dict[str, float]:
    from concurrent.futures import ThreadPoolExecutor

    encode, held = open_bare(options, copies)
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda _: encode(held[0].data, held[0].offsets[:2]), range(64)))  # loads the copies
        meter = Meter()
        tokens = sum(pool.map(lambda batch: len(encode(batch.data, batch.offsets)[0]), held))
        return meter.stop(sum(batch.n_bytes for batch in held), tokens)


def run_bare_pool(options: argparse.Namespace) -> dict[str, float]:
    """One tokenizer, which spreads every batch over threads of its own."""
    import awkward
    import numpy as np
    from awkward.contents import ListOffsetArray, NumpyArray
    from awkward.index import Index64

    encode, held = open_bare(options, 1)
    backend = encode._idle.get()
    limit, size = options.pool_mib << 20, sum(batch.n_bytes for batch in held)
    texts, group = [], []
    for number, batch in enumerate(held):
        group.append(batch)
        if sum(b.n_bytes for b in group) >= limit or number == len(held) - 1:
            lengths = np.concatenate([np.diff(b.offsets) for b in group])
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            data = NumpyArray(np.concatenate([b.data for b in group]), parameters={"__array__": "char"})
            texts.append(awkward.Array(ListOffsetArray(Index64(offsets), data, parameters={"__array__": "string"})))
            group = []
    meter = Meter()
    tokens = sum(len(backend.encode_batch(batch, parallel=True).layout.content) for batch in texts)
    return meter.stop(size, tokens)


def open_bare(options: argparse.Namespace, copies: int) -> tuple:  # type: ignore[type-arg]
    """(encoder, the corpus in memory)"""
    from lmcore.heap import keep_freed_memory

    keep_freed_memory()  # as ours has it
    from lmcore.data.encoder import GigatokenEncoder
    from lmcore.data.readers import read
    from lmcore.data.sources import resolve
    from lmcore.data.tokenizer import Tokenizer

    encode = GigatokenEncoder(Tokenizer.from_file(options.tokenizer), copies=copies)
    return encode, list(read(resolve(None, [str(options.corpus)]).units, "text"))


def run_ours(options: argparse.Namespace) -> dict[str, float]:
    from lmcore.heap import keep_freed_memory

    keep_freed_memory()
    from lmcore.data.plan import TokenizeConfig
    from lmcore.data.tokenization import tokenize

    config = TokenizeConfig(paths=(str(options.corpus),), tokenizer=str(options.tokenizer))
    meter = Meter()
    done = tokenize(config, options.out, workers=options.workers)
    return meter.stop(done.n_bytes, done.n_tokens)


def run_plain(options: argparse.Namespace) -> dict[str, float]:
    """Row group after row group: to_pylist, encode_batch (parallel inside), extend, np.save per 64M tokens."""
    import numpy as np
    import pyarrow.parquet as pq
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(options.tokenizer))
    eos = made.token_to_id("<|endoftext|>")
    options.out.mkdir()
    size = 0
    meter = Meter()
    flat: list[int] = []
    for path in sorted(options.corpus.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=["text"]):
            texts = batch.column(0).to_pylist()
            size += sum(len(text.encode()) for text in texts)
            for encoding in made.encode_batch(texts, add_special_tokens=False):
                flat.extend(encoding.ids)
                flat.append(eos)
    np.save(options.out / "tokens.npy", np.array(flat, np.uint16))
    return meter.stop(size, len(flat))


DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer
corpus, tokenizer, out, workers = sys.argv[1:5]
if __name__ == "__main__":
    LocalPipelineExecutor(
        pipeline=[
            ParquetReader(corpus, glob_pattern="*.parquet", text_key="text"),
            DocumentTokenizer(output_folder=out, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>",
                              shuffle_documents=False, local_working_dir=None),
        ],
        tasks=int(workers), workers=int(workers), logging_dir=out + "/logs",
    ).run()
"""


def run_datatrove(options: argparse.Namespace) -> dict[str, float]:
    options.out.mkdir()
    split_files(options.corpus, options.out / "in", options.workers, jsonl=False)
    script = options.out / "pipeline.py"
    script.write_text(DATATROVE)
    command = [options.datatrove, script, options.out / "in", options.tokenizer, options.out / "ds", options.workers]
    return run_peer(options, [str(c) for c in command], options.out / "ds", "*.ds", 2)


def run_dolma(options: argparse.Namespace) -> dict[str, float]:
    options.out.mkdir()
    split_files(options.corpus, options.out / "in", options.workers, jsonl=True)
    definition = json.loads(options.tokenizer.read_text())  # dolma pins a `tokenizers` that knows the older form only
    definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]
    tokenizer = options.out / "tokenizer.json"
    tokenizer.write_text(json.dumps(definition))
    command = [
        *[
            options.dolma,
            "tokens",
            "--documents",
            f"{options.out}/in/*.json.gz",
            "--destination",
            options.out / "tokens",
        ],
        *[
            "--tokenizer.name_or_path",
            tokenizer,
            "--tokenizer.eos_token_id",
            "0",
            "--tokenizer.pad_token_id",
            "0",
        ],
        *["--processes", options.workers, "--dtype", "uint16", "--max_size", str(1 << 30)],
    ]
    return run_peer(options, [str(c) for c in command], options.out / "tokens", "*.npy", 2)


def split_files(corpus: Path, folder: Path, count: int, *, jsonl: bool) -> None:
    """As many files as workers: the peers give a file to a process."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    texts = [text for batch in batches(corpus) for text in batch.to_pylist()]
    for number in range(count):
        mine = texts[number::count]
        if jsonl:
            with gzip.open(folder / f"{number}.json.gz", "wt", encoding="utf-8", compresslevel=1) as file:
                for row, text in enumerate(mine):
                    file.write(json.dumps({"id": str(row), "text": text, "source": "x"}) + "\n")
        else:
            pq.write_table(pa.table({"text": mine}), folder / f"{number}.parquet", row_group_size=1000)


def run_peer(options: argparse.Namespace, command: list[str], out: Path, pattern: str, width: int) -> dict[str, float]:
    size = sum(len(text.encode()) for batch in batches(options.corpus) for text in batch.to_pylist())
    meter = Meter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    tokens = sum(path.stat().st_size for path in out.rglob(pattern)) // width
    return meter.stop(size, tokens)


if __name__ == "__main__":
    main()
