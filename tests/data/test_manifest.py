"""The manifest is read strictly, and its identity covers what defines the tokens and nothing else."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sets import TinySet, identity, write_manifest

from lmcore.data.manifest import make_manifest, merge_segments, read_manifest
from lmcore.data.manifest import write_manifest as write
from lmcore.errors import Exit, LmError


def test_round_trip(tiny_set: TinySet, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_set.path)
    write(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.dataset_id == identity(tiny_set.manifest)


IDENTITY: dict[str, Any] = {
    "dtype": lambda m: m.update(dtype="uint32"),
    "seq_len": lambda m: m.update(seq_len=1024, shards=[s | {"rows": s["rows"] * 2} for s in m["shards"]]),
    "tokenizer": lambda m: m["tokenizer"].update(sha256="1" * 64),
    "eos": lambda m: m["tokenizer"].update(eos_id=1),
    "shard content": lambda m: m["shards"][0].update(sha256="1" * 64),
    "index content": lambda m: m["shards"][0].update(docs_sha256="1" * 64),
    "shard name": lambda m: m["shards"][0].update(name="other"),
    "segments": lambda m: (m["segments"].pop(), m.update(n_tokens=sum(b - a for _, a, b in m["segments"]))),
}
NOT_IDENTITY: dict[str, Any] = {
    "created_by": lambda m: m.update(created_by={"host": "h", "time": "t"}),
    "source": lambda m: m.update(source={"kind": "other"}),
    "backend": lambda m: m.update(backend={"name": "x"}),
    "split": lambda m: m.update(split={"by": "shard"}),
    "kind": lambda m: m.update(kind="view"),
    "tokenizer name": lambda m: m["tokenizer"].update(name="other"),
}


@pytest.mark.parametrize("what", [*IDENTITY, *NOT_IDENTITY])
def test_what_the_identity_covers(tiny_set: TinySet, what: str) -> None:
    manifest = tiny_set.manifest
    before = manifest["dataset_id"]
    (IDENTITY | NOT_IDENTITY)[what](manifest)
    write_manifest(tiny_set.path, manifest)
    assert (read_manifest(tiny_set.path).dataset_id != before) == (what in IDENTITY)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.update(n_tokens=m["n_tokens"] + 1), "the segments hold"),
        (lambda m: m.update(segments=[[99, 0, 1]], n_tokens=1), "lies outside its shard"),
        (lambda m: m.update(segments=[[0, 5, 5]], n_tokens=1), "lies outside its shard"),
        (lambda m: m.update(segments=[[0, -1, 5]], n_tokens=6), "lies outside its shard"),
        (lambda m: m.update(shards=[m["shards"][0], m["shards"][0]]), "twice|outside"),
        (lambda m: m["shards"][0].update(n_tokens=10**9), "more tokens than rows"),
        (lambda m: m.update(seq_len=True), "seq_len"),
        (lambda m: m.update(shards=[]), "shards"),
        (lambda m: m["shards"][0].update(sha256="x"), "sha256"),
    ],
)
def test_contradictions_are_refused(tiny_set: TinySet, change: Any, sentence: str) -> None:
    manifest = tiny_set.manifest
    change(manifest)
    write_manifest(tiny_set.path, manifest)
    with pytest.raises(LmError, match=sentence) as caught:
        read_manifest(tiny_set.path)
    assert caught.value.code == Exit.DATA
    assert "manifest.json" in caught.value.message


def test_an_edited_manifest_is_noticed(tiny_set: TinySet) -> None:
    manifest = tiny_set.manifest
    manifest["tokenizer"]["eos_id"] = 7
    (tiny_set.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LmError, match="was edited"):
        read_manifest(tiny_set.path)


def test_a_link_is_no_manifest(tiny_set: TinySet, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").symlink_to(tiny_set.path / "manifest.json")
    with pytest.raises(LmError):
        read_manifest(tmp_path / "other")


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50), st.integers(0, 20)), max_size=30))
def test_merging_segments_keeps_the_stream(raw: list[tuple[int, int, int]]) -> None:
    segments = [(shard, start, start + length) for shard, start, length in raw]
    stream = [(shard, k) for shard, start, stop in segments for k in range(start, stop)]
    merged = merge_segments(segments)
    assert [(shard, k) for shard, start, stop in merged for k in range(start, stop)] == stream
    assert all(stop > start for _, start, stop in merged)
    assert not any(a[0] == b[0] and a[2] == b[1] for a, b in itertools.pairwise(merged))


def test_made_manifests_carry_their_identity(tiny_set: TinySet) -> None:
    fields = read_manifest(tiny_set.path).model_dump(mode="json", exclude={"dataset_id"})
    assert make_manifest(**fields).dataset_id == tiny_set.manifest["dataset_id"]
