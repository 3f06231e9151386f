"""Tiny shard sets, built directly from the format's description and not by the code that tokenizes."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DOCUMENT = [("start", "<u4"), ("unit", "<u4"), ("row", "<u4"), ("hash", "<u8"), ("bytes", "<u4")]
FOLDED = ("name", "rows", "sha256", "docs_sha256")


@dataclass(frozen=True)
class TinySet:
    """A set on disk and what it must mean."""

    path: Path
    stream: np.ndarray
    """The true tokens, pad excluded."""
    documents: list[bytes]
    """Texts in order."""
    ids: list[list[int]]
    """Token ids of each document, EOS included."""

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "manifest.json").read_text())  # type: ignore[no-any-return]


def npy_bytes(array: np.ndarray) -> bytes:
    """An NPY v1.0 file whose header is padded to a multiple of 128 bytes (NumPy itself pads to 64)."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    raw = file.getvalue()
    length = 10 + int.from_bytes(raw[8:10], "little")
    text = raw[10:length].rstrip()
    total = -(-(10 + len(text) + 1) // 128) * 128
    return raw[:8] + (total - 10).to_bytes(2, "little") + text.ljust(total - 11) + b"\n" + raw[length:]


def blake8(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def identity(manifest: dict[str, Any]) -> str:
    tokenizer = manifest["tokenizer"]
    value = {
        "format": "lmshards/1",
        "tokenizer": {k: tokenizer[k] for k in ("sha256", "eos_id", "bos_id")} if tokenizer else None,
        "dtype": manifest["dtype"],
        "seq_len": manifest["seq_len"],
        "packing": "stream",
        "shards": [[s[k] for k in FOLDED] for s in manifest["shards"]],
        "segments": manifest["segments"],
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_set(
    path: Path, documents: Sequence[bytes], *, seq_len: int = 2048, rows: int = 2, dtype: str = "<u2", eos: int = 256
) -> TinySet:
    """Byte-level tokens (id = byte, EOS 256), `rows` rows of `seq_len` per shard."""
    from lmcore.data.tokenizer import Tokenizer

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.byte()
    tokenizer.save(path / "tokenizer.json")
    ids = [[*document, eos] for document in documents]
    stream = np.concatenate([np.array(i, dtype) for i in ids]) if ids else np.empty(0, dtype)
    starts = np.cumsum([0, *(len(i) for i in ids)])
    size = seq_len * rows
    shards, segments = [], []
    for number, begin in enumerate(range(0, len(stream), size)):
        end = min(begin + size, len(stream))
        real = stream[begin:end]
        shard_rows = -(-len(real) // seq_len)
        flat = np.concatenate([real, np.full(shard_rows * seq_len - len(real), eos, dtype)])
        records = [
            (max(s - begin, 0), 0, d, blake8(documents[d]), 0 if s < begin else len(documents[d]))
            for d, (s, e) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
            if s < end and e > begin
        ]
        name = f"shard-{number:05d}"
        data = npy_bytes(flat.reshape(shard_rows, seq_len))
        index = npy_bytes(np.array(records, DOCUMENT))
        (path / f"{name}.npy").write_bytes(data)
        (path / f"{name}.docs.npy").write_bytes(index)
        first = int(np.searchsorted(starts, begin, "right")) - 1
        shards.append(
            {
                "name": name,
                "rows": shard_rows,
                "n_tokens": len(real),
                "n_docs": int(np.sum((starts[:-1] >= begin) & (starts[:-1] < end))),
                "max_id": int(real.max()),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "docs_sha256": hashlib.sha256(index).hexdigest(),
                "docs_records": len(records),
                "first_doc_offset": begin - int(starts[first]),
            }
        )
        segments.append([number, 0, len(real)])
    manifest: dict[str, Any] = {
        "format": "lmshards/1",
        "kind": "set",
        "tokenizer": tokenizer.entry().model_dump(mode="json"),
        "dtype": np.dtype(dtype).name,
        "seq_len": seq_len,
        "packing": "stream",
        "shards": shards,
        "segments": segments,
        "n_tokens": len(stream),
        "n_docs": len(documents),
        "n_bytes": sum(map(len, documents)),
        "source": {"kind": "test"},
    }
    write_manifest(path, manifest)
    return TinySet(path, stream, list(documents), ids)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the identity that belongs to it, whatever it says."""
    manifest = manifest | {"dataset_id": identity(manifest)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def random_documents(seed: int, count: int, longest: int) -> list[bytes]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest, count)
    return [generator.integers(32, 127, n).astype(np.uint8).tobytes() for n in lengths.tolist()]
