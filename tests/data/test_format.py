"""docs/format.md is enough: a reader made from that page alone, with NumPy and json, reads what the library writes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sets import DOCUMENT, TinySet, blake8, npy_bytes, random_documents

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
M64 = 2**64 - 1


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def mix(x: int) -> int:
    x &= M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def word(purpose: str, seed: int, dataset: str, i: int) -> int:
    digest = hashlib.sha256(canonical(["lmshards/1", purpose, seed, dataset])).digest()
    k0, k1 = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    c = [i // 4 + 1, 0, 0, 0]
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k0, p1 & M64, (p0 >> 64) ^ c[3] ^ k1, p0 & M64]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & M64, (k1 + 0xBB67AE8584CAA73B) & M64
    return c[i % 4]


def permuted(j: int, size: int, keys: list[int]) -> int:
    bits = (size - 1).bit_length()
    half = bits // 2
    while True:
        high, low = j >> (bits - half), j % 2 ** (bits - half)
        for r in range(6):
            if r % 2 == 0:
                high ^= mix(low + keys[r]) % 2**half
            else:
                low ^= mix(high + keys[r]) % 2 ** (bits - half)
        j = high * 2 ** (bits - half) + low
        if j < size:
            return j


def start(order: str, g: int, seed: int, dataset: str, n: int, t: int) -> int:
    if order == "random":
        return word("random", seed, dataset, g) % (n - t)
    e, j = divmod(g, n // t)
    keys = [word("permutation", seed, dataset, 6 * e + r) for r in range(6)]
    return (word("phase", seed, dataset, e) % n + t * permuted(j, n // t, keys)) % n


class PageReader:
    """A set or view, read as the page says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = json.loads((path / "manifest.json").read_text())
        assert self.manifest["format"] == "lmshards/1"

    def file(self, name: str) -> Path:
        inside = self.path / name
        return inside if inside.exists() else self.path.parent / name

    def flat(self, number: int) -> np.ndarray:
        shard = self.manifest["shards"][number]
        raw = self.file(f"{shard['name']}.npy").read_bytes()
        assert len(raw) == shard["bytes"]
        assert hashlib.sha256(raw).hexdigest() == shard["sha256"]
        dtype = {"uint16": "<u2", "uint32": "<u4"}[self.manifest["dtype"]]
        header = (
            f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shard['rows']}, {self.manifest['seq_len']}), }}"
        )
        assert raw[10:128] == header.encode().ljust(117) + b"\n"
        return np.frombuffer(raw, dtype, offset=128)

    def stream(self) -> np.ndarray:
        flats = [self.flat(number) for number in range(len(self.manifest["shards"]))]
        return np.concatenate([flats[s][a:b] for s, a, b in self.manifest["segments"]])

    def dataset_id(self) -> str:
        m = self.manifest
        tokenizer = m["tokenizer"] and {k: m["tokenizer"][k] for k in ("sha256", "eos_id", "bos_id")}
        value = {k: m[k] for k in ("format", "dtype", "seq_len", "packing", "segments")} | {
            "tokenizer": tokenizer,
            "shards": [[s["name"], s["rows"], s["sha256"], s["docs_sha256"]] for s in m["shards"]],
        }
        return hashlib.sha256(canonical(value)).hexdigest()


@pytest.fixture
def tokenized(tmp_path: Path) -> tuple[Path, list[bytes]]:
    """Made by the library itself: JSON lines, several shards, views."""
    from lmcore.data.plan import TokenizeConfig
    from lmcore.data.split import split_set
    from lmcore.data.tokenization import tokenize

    texts = random_documents(5, 60, 900)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": t.decode()}) + "\n" for t in texts))
    config = TokenizeConfig(paths=(str(corpus),), tokenizer="byte", shard_tokens=8192)
    tokenize(config, tmp_path / "set")
    split_set(tmp_path / "set", {"val": 0.2, "test": 0.1}, salt=9)
    return tmp_path / "set", texts


def test_what_is_tokenized_reads_as_the_page_says(tokenized: tuple[Path, list[bytes]]) -> None:
    path, texts = tokenized
    reader = PageReader(path)
    assert len(reader.manifest["shards"]) > 2
    expected = [i for t in texts for i in (*t, 256)]
    assert reader.stream().tolist() == expected
    assert reader.dataset_id() == reader.manifest["dataset_id"]
    pad = reader.flat(len(reader.manifest["shards"]) - 1)[reader.manifest["shards"][-1]["n_tokens"] :]
    assert set(pad.tolist()) <= {256}
    # The index: every document once, in order, with hash and bytes.
    rows = []
    for shard in reader.manifest["shards"]:
        index = np.load(path / f"{shard['name']}.docs.npy")
        assert index.dtype == np.dtype(DOCUMENT)
        assert len(index) == shard["docs_records"]
        rows += index[1 if shard["first_doc_offset"] else 0 :].tolist()
    assert [r[2:] for r in rows] == [(k, blake8(t), len(t)) for k, t in enumerate(texts)]
    plan = json.loads((path / "plan.json").read_text())
    assert plan["units"][0]["path"].endswith("corpus.jsonl")
    journal = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    assert [line["shard"] for line in journal] == reader.manifest["shards"]
    tokenizer = json.loads((path / "tokenizer.json").read_text()) | {"truncation": None, "padding": None}
    assert hashlib.sha256(canonical(tokenizer)).hexdigest() == reader.manifest["tokenizer"]["sha256"]


def test_views_read_as_the_page_says(tokenized: tuple[Path, list[bytes]]) -> None:
    path, texts = tokenized
    parent = PageReader(path)
    low = 0
    for name, high in (("val", int(0.2 * 2**64)), ("test", int((0.2 + 0.1) * 2**64)), ("train", 2**64)):
        reader = PageReader(path / name)
        kept = [t for t in texts if low <= mix((blake8(t) ^ 9) + 0x9E3779B97F4A7C15) < high]
        assert reader.stream().tolist() == [i for t in kept for i in (*t, 256)]
        assert reader.dataset_id() == reader.manifest["dataset_id"]
        assert reader.manifest["split"]["parent"] == parent.manifest["dataset_id"]
        low = high


@pytest.mark.parametrize("order", ["epoch", "random"])
def test_samples_are_what_the_page_says(tokenized: tuple[Path, list[bytes]], order: str) -> None:
    from lmcore.data.sampler import Sampler
    from lmcore.data.stream import TokenStream

    path, _ = tokenized
    reader = PageReader(path / "train")
    tokens, t = reader.stream(), 100
    sampler = Sampler(TokenStream.open(path / "train"), context_length=t, seed=3, order=order)  # type: ignore[arg-type]
    for g in (0, 1, 100, 1000, 12345):
        s = start(order, g, 3, reader.dataset_id(), len(tokens), t)
        np.testing.assert_array_equal(sampler.batch(g, 1)[0], tokens[(s + np.arange(t + 1)) % len(tokens)])


def test_mixtures_are_what_the_page_says(make_set: Callable[..., TinySet]) -> None:
    from lmcore.data.sampler import Mixture
    from lmcore.data.stream import TokenStream

    streams = [TokenStream.open(make_set(n, documents=random_documents(k, 20, 500)).path) for k, n in enumerate("ab")]
    mixture = Mixture([(streams[0], 0.7), (streams[1], 0.3)], context_length=16, seed=2)
    quota = [45875, 19661]  # 45,875.2 and 19,660.8
    keys = [word("mixture", 2, "", 6 + r) for r in range(6)]  # block 1
    taken = [quota[0], quota[1]]
    source, inner = mixture.locate(65_536, 200)
    for j in range(200):
        k = 0 if permuted(j, 65_536, keys) < quota[0] else 1
        assert (source[j], inner[j]) == (k, taken[k])
        taken[k] += 1


def test_the_example_of_the_page() -> None:
    texts = [b"Hello", b"World!"]
    flat = np.array([*texts[0], 256, *texts[1], 256, 256, 256, 256], "<u2").reshape(2, 8)
    assert " ".join(map(str, flat[0])) + " | " + " ".join(map(str, flat[1])) in PAGE
    records = np.array([(0, 0, 0, blake8(texts[0]), 5), (6, 0, 1, blake8(texts[1]), 6)], DOCUMENT)
    value = json.loads(re.search(r"```json\n(.*?)\n```", PAGE, re.S)[1])  # type: ignore[index]
    assert value["shards"][0][2] == hashlib.sha256(npy_bytes(flat)).hexdigest()
    assert value["shards"][0][3] == hashlib.sha256(npy_bytes(records)).hexdigest()
    dataset = hashlib.sha256(canonical(value)).hexdigest()
    assert f"dataset_id = {dataset}" in PAGE
    for text in texts:
        assert f"`{blake8(text):016x}`" in PAGE
    for order in ("epoch", "random"):
        starts = ", ".join(str(start(order, g, 1, dataset, 13, 2)) for g in range(6))
        assert f"{starts} in order `{order}`" in re.sub(r"\s+", " ", PAGE)


def test_every_field_of_the_manifest_is_on_the_page() -> None:
    from lmcore.data.manifest import Manifest, ShardEntry, TokenizerEntry

    for model in (Manifest, ShardEntry, TokenizerEntry):
        for name in model.model_fields:
            assert f"`{name}`" in PAGE, name
