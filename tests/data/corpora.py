"""Small corpora and an independent, obvious tokenization of them, for the tests of the data path."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lmcore.data.manifest import read_manifest
from lmcore.data.tokenizer import Tokenizer

WORDS = (
    *("the of and to in model data token shard train river <|endoftext|> 3.14 \n\n don't").split(" "),
    *("na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f600").split(" "),
)


def texts(count: int, *, seed: int = 1, longest: int = 300) -> list[str]:
    """Random documents with everything that is awkward: other scripts, emoji, special-token text, one very long one."""
    chooser = random.Random(seed)
    made = [" ".join(chooser.choices(WORDS, k=chooser.randint(1, longest))) for _ in range(count)]
    if count > 3:
        made[count // 2] = " ".join(chooser.choices(WORDS, k=40 * longest))
    return made


def write_parquet(path: Path, values: Sequence[str | None], *, column: str = "text", group: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({column: pa.array(values, pa.string()), "id": pa.array(range(len(values)))})
    pq.write_table(table, path, row_group_size=group)
    return path


def write_jsonl(path: Path, values: Sequence[str], *, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": k, column: v}) + "\n" for k, v in enumerate(values)), encoding="utf-8")
    return path


def tokenizer(directory: Path, vocab_size: int = 400) -> Path:
    """A small trained tokenizer.json, so that a test does not train its own."""
    path = directory / "small" / "tokenizer.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Tokenizer.train(texts(50, seed=9), vocab_size).save(path)
    return path


def reference_ids(values: Sequence[str], made: Tokenizer) -> list[int]:
    """The stream of a set, the obvious way: one document after the other with the library that defines the ids."""
    stream: list[int] = []
    for value in values:
        stream += [*made.reference.encode(value, add_special_tokens=False).ids, made.eos_id]
    return stream


def reference_hash(value: str) -> int:
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")


def stream_of(directory: Path) -> npt.NDArray[np.uint32]:
    """The token stream of a set by plain NumPy, following the manifest's segments."""
    manifest = read_manifest(directory)
    flats = [np.load(directory / f"{shard.name}.npy").reshape(-1) for shard in manifest.shards]
    return np.concatenate([flats[shard][start:stop] for shard, start, stop in manifest.segments]).astype(np.uint32)


def documents_of(directory: Path) -> list[tuple[int, int, int, int]]:
    """(unit, row, hash, bytes) of every document in stream order, continued pieces left out."""
    manifest = read_manifest(directory)
    found: list[tuple[int, int, int, int]] = []
    for shard in manifest.shards:
        index = np.load(directory / f"{shard.name}.docs.npy")
        pieces = index[1:] if shard.first_doc_offset else index
        found += [tuple(int(record[key]) for key in ("unit", "row", "hash", "bytes")) for record in pieces]
    return found


def tree(directory: Path) -> dict[str, bytes]:
    """Everything in a set that must not depend on history: all files but the manifest's who and when, and the lock."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or path.name == ".lock":
            continue
        raw = path.read_bytes()
        if path.name == "manifest.json":
            kept = {k: v for k, v in json.loads(raw).items() if k not in ("created_by", "backend")}
            raw = json.dumps(kept, sort_keys=True).encode()
        files[path.relative_to(directory).as_posix()] = raw
    return files
