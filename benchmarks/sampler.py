"""Batches per second: the sampler over shards against slicing a NumPy memmap, from the page cache.

    python benchmarks/sampler.py --batch 64 --context 1024

Three readers of the same tokens, run in turn, medians of the repeats:

    memmap    the classical loop: np.memmap slices at random offsets, stacked, converted to int64
    view      the same through .view(np.ndarray), and no conversion: the fastest that slicing gets
    set       Sampler.batch over a shard set (epoch and random order), windows in the stored dtype
    split     the same over a view with one segment per two documents
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmcore.data.manifest import make_manifest, write_manifest
from lmcore.data.rewrite import write_shards
from lmcore.data.sampler import Sampler
from lmcore.data.stream import TokenStream


def make(folder: Path, tokens: np.ndarray, document: int) -> tuple[Path, Path]:
    """The tokens as a set, and a view that leaves out every third stretch of `document` tokens."""
    entries = write_shards(folder, [tokens], dtype=tokens.dtype, seq_len=2048, pad_id=0, rows=8192)
    whole = [(k, 0, e.n_tokens) for k, e in enumerate(entries)]
    some = [
        (k, start, min(start + 2 * document, e.n_tokens))
        for k, e in enumerate(entries)
        for start in range(0, e.n_tokens, 3 * document)
    ]
    view = folder / "train"
    view.mkdir()
    for place, segments, kind in ((folder, whole, "set"), (view, some, "view")):
        manifest = make_manifest(
            kind=kind,
            dtype="uint16",
            seq_len=2048,
            shards=tuple(entries),
            segments=tuple(segments),
            n_tokens=sum(stop - start for _, start, stop in segments),
            n_docs=0,
            n_bytes=0,
        )
        write_manifest(place, manifest)
    for entry in entries:
        (view / f"{entry.name}.npy").symlink_to(f"../{entry.name}.npy")
    return folder, view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--document", type=int, default=1000, help="tokens per document of the view")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    b, t = options.batch, options.context
    tokens = np.random.default_rng(0).integers(0, 50_000, options.tokens).astype("<u2")
    with tempfile.TemporaryDirectory() as folder:
        whole, view = make(Path(folder), tokens, options.document)
        tokens.tofile(Path(folder) / "flat.bin")
        mapped = np.memmap(Path(folder) / "flat.bin", np.uint16, "r")
        plain = mapped.view(np.ndarray)
        generator = np.random.default_rng(1)
        streams = {"set": TokenStream.open(whole), "split": TokenStream.open(view)}

        def classical(_: int) -> None:
            starts = generator.integers(0, len(mapped) - t, b)
            np.stack([mapped[s : s + t + 1].astype(np.int64) for s in starts])

        def fastest(_: int) -> None:
            out = np.empty((b, t + 1), np.uint16)
            for row, s in enumerate(generator.integers(0, len(plain) - t, b).tolist()):
                out[row] = plain[s : s + t + 1]

        readers: dict[str, Callable[[int], object]] = {"memmap": classical, "view": fastest}
        for name, stream in streams.items():
            for order in ("random", "epoch"):
                sampler = Sampler(stream, context_length=t, seed=1, order=order)  # type: ignore[arg-type]
                readers[f"{name}, {order}"] = lambda step, s=sampler: s.batch(step * b, b)  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in readers}
        for repeat in range(options.repeats + 1):
            for name, read in readers.items():
                began = time.perf_counter()
                for step in range(options.batches):
                    read(repeat * options.batches + step)
                if repeat:  # the first round warms caches and verifies shards
                    times[name].append(time.perf_counter() - began)
        segments = {name: len(s.manifest.segments) for name, s in streams.items() if s.manifest}
    rates = {name: options.batches * b * t / statistics.median(values) / 1e6 for name, values in times.items()}
    print(
        json.dumps(
            {
                "batch": b,
                "context": t,
                "segments": segments,
                "million tokens/s": {name: round(rate) for name, rate in rates.items()},
                "against memmap slicing": {name: round(rate / rates["memmap"], 2) for name, rate in rates.items()},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
