"""A tiny shard set with two views and a run directory, made by hand: what inference is tested on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmcore import storage
from lmcore.data.manifest import ShardEntry, make_manifest, write_manifest
from lmcore.data.shard import DOCUMENT, npy_chunks, shard_name
from lmcore.data.tokenizer import Tokenizer
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.training.checkpoint import LoadedModel, Snapshot, load_model, model_tensors, save
from lmcore.training.config import DataConfig, RunConfig, TrainConfig

SEQ_LEN = 64


def documents(count: int = 24, seed: int = 0) -> list[str]:
    """Short texts with structure that a small model could learn, some characters of several bytes among them."""
    generator = np.random.default_rng(seed)
    words = ["one", "two", "three", "caf\u00e9", "\u20ac", "def f(x):\n", "return x", "\U0001f600"]
    return [" ".join(generator.choice(words, size=generator.integers(5, 60))) for _ in range(count)]


def make_set(path: Path, texts: Sequence[str], tokenizer: Tokenizer | None = None, held_out: int = 8) -> Path:
    """A set of two shards, with the views train/ and val/ (the last `held_out` documents)."""
    tokenizer = tokenizer or Tokenizer.byte()
    path.mkdir(parents=True)
    encoded = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    flat = np.array([token for ids in encoded for token in ids], "<u2")
    begins = np.cumsum([0, *(len(ids) for ids in encoded)])
    hashes = [int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), "little") for t in texts]
    size = -(-len(flat) // 2 // SEQ_LEN) * SEQ_LEN
    entries = []
    for index, first in enumerate(range(0, len(flat), size)):
        part = flat[first : first + size]
        rows = -(-len(part) // SEQ_LEN)
        padded = np.full(rows * SEQ_LEN, tokenizer.eos_id, "<u2")
        padded[: len(part)] = part
        records = []
        for row, (text, begin, end) in enumerate(zip(texts, begins[:-1], begins[1:], strict=True)):
            if begin < first + len(part) and end > first:
                inside = begin >= first
                records.append((max(begin - first, 0), 0, row, hashes[row], len(text.encode()) if inside else 0))
        digest = storage.write_file(path / f"{shard_name(index)}.npy", npy_chunks(padded.reshape(rows, SEQ_LEN))[0])
        docs = storage.write_file(path / f"{shard_name(index)}.docs.npy", npy_chunks(np.array(records, DOCUMENT))[0])
        entries.append(
            ShardEntry(
                name=shard_name(index),
                rows=rows,
                n_tokens=len(part),
                n_docs=sum(record[4] > 0 for record in records),
                max_id=int(part.max()),
                bytes=digest.bytes,
                sha256=digest.sha256,
                docs_sha256=docs.sha256,
                docs_records=len(records),
                first_doc_offset=int(first - begins[np.searchsorted(begins, first, side="right") - 1]),
            )
        )
    tokenizer.save(path / "tokenizer.json")
    storage.write_json(path / "plan.json", {"files": ["made-by-hand.txt"]})

    def segments(begin: int, end: int) -> list[tuple[int, int, int]]:
        cuts = [(s, max(begin - s * size, 0), min(end - s * size, e.n_tokens)) for s, e in enumerate(entries)]
        return [cut for cut in cuts if cut[1] < cut[2]]

    boundary = int(begins[len(texts) - held_out])
    common: dict[str, Any] = {"tokenizer": tokenizer.entry(), "dtype": "uint16", "seq_len": SEQ_LEN, "shards": entries}
    for name, begin, end, some in [
        (".", 0, len(flat), list(texts)),
        ("train", 0, boundary, list(texts[: len(texts) - held_out])),
        ("val", boundary, len(flat), list(texts[len(texts) - held_out :])),
    ]:
        place = path / name
        place.mkdir(exist_ok=True)
        manifest = make_manifest(
            **common,
            kind="set" if name == "." else "view",
            segments=segments(begin, end),
            n_tokens=end - begin,
            n_docs=len(some),
            n_bytes=sum(len(text.encode()) for text in some),
            source={"kind": "files", "files": ["made-by-hand.txt"]},
        )
        if name != ".":
            for entry in entries:
                for ending in (".npy", ".docs.npy"):
                    os.symlink(f"../{entry.name}{ending}", place / f"{entry.name}{ending}")
            os.symlink("../tokenizer.json", place / "tokenizer.json")
        write_manifest(place, manifest)
    return path


def small_config(vocab_size: int, **settings: Any) -> ModelConfig:
    defaults: dict[str, Any] = {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "context_length": 32}
    return ModelConfig(vocab_size=vocab_size, **(defaults | settings))


def small_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A model whose random weights are large enough to have opinions."""
    model = LanguageModel(config)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.to(dtype).eval()


def small_loaded(dtype: torch.dtype = torch.float64, seed: int = 0, **settings: Any) -> LoadedModel:
    """A model with the byte tokenizer, as if it had been loaded."""
    tokenizer = Tokenizer.byte()
    config = small_config(tokenizer.vocab_size, **settings)
    run = RunConfig(model=config, train=TrainConfig(batch_tokens=config.context_length))
    return LoadedModel(small_model(config, seed, dtype), tokenizer, run, {"step": 0}, Path("nowhere"))


def make_run(path: Path, data: Path, seed: int = 0, step: int = 3, **settings: Any) -> Path:
    """A run directory with one checkpoint of random weights, said to be trained on data/train."""
    from lmcore.data.manifest import read_manifest

    tokenizer = Tokenizer.from_file(data / "tokenizer.json")
    model = small_model(small_config(tokenizer.vocab_size, **settings), seed, torch.float32)
    config = RunConfig(
        model=model.config,
        data=DataConfig.model_validate({"train": str(data / "train"), "val": (str(data / "val"),)}),
        train=TrainConfig(batch_tokens=model.config.context_length * 2, steps=step),
    )
    dataset_id = read_manifest(data / "train").dataset_id
    state = {
        "step": step,
        "tokens": step * config.train.batch_tokens,
        "samples": step * 2,
        "dataset_id": dataset_id,
        "sources": [{"path": str(data / "train"), "weight": 1.0, "dataset_id": dataset_id}],
        "tokenizer_sha256": tokenizer.sha256,
    }
    snapshot = Snapshot(step, model_tensors(model), {}, state, config.to_yaml().encode(), tokenizer.to_json())
    save(path / "checkpoints", snapshot)
    storage.write_file(path / "config.yaml", config.to_yaml().encode())
    storage.write_file(path / "tokenizer.json", tokenizer.to_json())
    return path


__all__ = ["documents", "load_model", "make_run", "make_set", "small_config", "small_loaded", "small_model"]
