"""Time of a full `lm validate` against hashing the same shards alone, from the page cache.

    python benchmarks/validate.py --gib 1 --repeats 5 --workers 2

A set of text-like ids is written once; then the three are run in turn and the medians are compared. All hash every
byte; validate also looks at every id, every document end and every header. `hashlib` is the bare sha256 of Python over
a buffer in memory, on as many threads as validate has workers: the limit of any check that proves the content.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lmcore.data.manifest import make_manifest, write_manifest
from lmcore.data.rewrite import LENGTHS, write_shards
from lmcore.data.tokenizer import Tokenizer
from lmcore.data.validate import validate


def make(folder: Path, n_tokens: int) -> Path:
    """A set of byte tokens in documents of about 1,000."""
    generator = np.random.default_rng(0)
    tokenizer = Tokenizer.byte()
    tokenizer.save(folder / "tokenizer.json")
    lengths = generator.integers(200, 1800, n_tokens // 1000 + 1)
    ends = np.cumsum(lengths)
    lengths, ends = lengths[ends <= n_tokens], ends[ends <= n_tokens]
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog and runs away ", np.uint8)

    def blocks() -> object:
        for start in range(0, int(ends[-1]), 1 << 24):
            stop = min(start + (1 << 24), int(ends[-1]))
            block = text[generator.integers(0, len(text), stop - start)].astype(np.uint16)
            low, high = np.searchsorted(ends, [start + 1, stop + 1])
            block[ends[low:high] - 1 - start] = tokenizer.eos_id
            yield block

    documents = np.zeros(len(lengths), LENGTHS)
    documents["length"], documents["row"], documents["bytes"] = lengths, np.arange(len(lengths)), lengths - 1
    documents["hash"] = generator.integers(0, 2**63, len(lengths))
    entries = write_shards(
        folder,
        blocks(),  # type: ignore[arg-type]
        dtype=np.dtype("<u2"),
        seq_len=2048,
        pad_id=tokenizer.eos_id,
        documents=documents,
    )
    write_manifest(
        folder,
        make_manifest(
            tokenizer=tokenizer.entry(),
            dtype="uint16",
            seq_len=2048,
            shards=tuple(entries),
            segments=tuple((k, 0, e.n_tokens) for k, e in enumerate(entries)),
            n_tokens=sum(e.n_tokens for e in entries),
            n_docs=len(documents),
            n_bytes=int(documents["bytes"].sum()),
            source={"document_hash": "tokens"},
        ),
    )
    return folder


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds; those of child processes are not counted."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder), int(options.gib * 2**29))
        files = sorted(str(p) for p in path.glob("shard-*.npy") if ".docs" not in p.name)
        size = sum(Path(f).stat().st_size for f in files)

        def ours() -> None:
            report = validate(path, workers=options.workers)
            assert report.ok, report.findings

        buffer = bytes(1 << 20)

        def bare(part: int) -> None:
            digest = hashlib.sha256()
            for _ in range(size // options.workers >> 20):
                digest.update(buffer)

        def hashing() -> None:
            with ThreadPoolExecutor(options.workers) as pool:
                list(pool.map(bare, range(options.workers)))

        times: dict[str, list[tuple[float, float]]] = {"lm validate": [], "hashlib": [], "sha256sum": []}
        for _ in range(options.repeats):
            times["lm validate"].append(seconds(ours))
            times["hashlib"].append(seconds(hashing))
            times["sha256sum"].append(
                seconds(lambda: subprocess.run(["sha256sum", *files], check=True, capture_output=True))
            )
        rates = {name: size / statistics.median(wall for wall, _ in values) / 1e9 for name, values in times.items()}
        frugal = {
            name: size / statistics.median(processor for _, processor in times[name]) / 1e9
            for name in ("lm validate", "hashlib")
        }
    print(
        json.dumps(
            {
                "bytes": size,
                "workers": options.workers,
                "GB/s": {name: round(rate, 3) for name, rate in rates.items()},
                "GB per processor second": {name: round(rate, 3) for name, rate in frugal.items()},
                "validate / hashlib": round(rates["lm validate"] / rates["hashlib"], 3),
                "validate / sha256sum": round(rates["lm validate"] / rates["sha256sum"], 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
