"""Views hold whole documents by content, share nothing, lose nothing, and copy no token."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sets import TinySet, blake8, random_documents, write_set

from lmcore.data.manifest import read_manifest
from lmcore.data.split import split_key, split_set
from lmcore.data.stream import TokenStream
from lmcore.errors import Exit, LmError

EOS = 256


def documents(seed: int = 7, count: int = 80) -> list[bytes]:
    """Short documents, duplicates, and one that is longer than two shards."""
    texts = random_documents(seed, count, 700)
    texts[20] = bytes(np.random.default_rng(3).integers(97, 123, 10_000).astype(np.uint8))
    texts[30], texts[70] = texts[5], texts[5]
    return texts


def texts_of(view: Path) -> list[bytes]:
    stream = TokenStream.open(view)
    tokens = stream.read(0, len(stream))
    parts = np.split(tokens, np.flatnonzero(tokens == EOS) + 1)
    assert not len(parts[-1])
    return [bytes(part[:-1].astype(np.uint8)) for part in parts[:-1]]


def reference_key(text: bytes, salt: int) -> int:
    mask = 2**64 - 1
    x = ((blake8(text) ^ salt) + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@pytest.mark.parametrize("salt", [0, 5])
@pytest.mark.parametrize("materialize", [False, True])
def test_a_view_is_the_stream_of_its_documents(make_set: Callable[..., TinySet], salt: int, materialize: bool) -> None:
    tiny = make_set(documents=documents())
    report = split_set(tiny.path, {"val": 0.2, "test": 0.1}, salt=salt, materialize=materialize)
    limits = {"val": (0, 0.2), "test": (0.2, 0.3), "train": (0.3, 1)}
    for view in report.views:
        low, high = (int(x * 2**64) for x in limits[view.name])
        expected = [t for t in tiny.documents if low <= reference_key(t, salt) < high]
        assert texts_of(view.path) == expected
        assert (view.n_docs, view.n_bytes) == (len(expected), sum(map(len, expected)))
    assert report.leakage == "none"
    assert sum(view.n_tokens for view in report.views) == len(tiny.stream)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    texts=st.lists(st.binary(max_size=3000), min_size=4, max_size=25),
    fraction=st.floats(0.05, 0.9),
    rows=st.integers(1, 3),
    by=st.sampled_from(["document", "shard", "rows"]),
)
def test_views_partition_the_tokens(
    tmp_path_factory: pytest.TempPathFactory, texts: list[bytes], fraction: float, rows: int, by: str
) -> None:
    tiny = write_set(tmp_path_factory.mktemp("s") / "set", texts, rows=rows)
    try:
        report = split_set(tiny.path, {"val": fraction}, by=by, min_tokens=1)  # type: ignore[arg-type]
    except LmError:  # nothing would be on one side
        assert not (tiny.path / "val").exists()
        return
    seen = np.zeros(len(tiny.stream), int)
    starts = np.cumsum([0, *(s["n_tokens"] for s in tiny.manifest["shards"])])
    number = {s["name"]: k for k, s in enumerate(tiny.manifest["shards"])}
    for view in report.views:
        manifest = read_manifest(view.path)
        where = [
            np.arange(starts[number[manifest.shards[s].name]] + a, starts[number[manifest.shards[s].name]] + b)
            for s, a, b in manifest.segments
        ]
        seen[np.concatenate(where)] += 1
        stream = TokenStream.open(view.path)
        np.testing.assert_array_equal(stream.read(0, len(stream)), tiny.stream[np.concatenate(where)])
    assert np.all(seen == 1)


def test_a_smaller_fraction_lies_inside_the_larger_one(make_set: Callable[..., TinySet]) -> None:
    tiny = make_set(documents=documents())
    split_set(tiny.path, {"val": 0.4})
    large = texts_of(tiny.path / "val")
    split_set(tiny.path, {"val": 0.1}, replace=True)
    small = texts_of(tiny.path / "val")
    assert small
    assert set(small) < set(large)


def test_documents_keep_their_side_when_data_is_added(make_set: Callable[..., TinySet]) -> None:
    texts = documents()
    before, after = make_set("before", documents=texts[:50]), make_set("after", documents=documents(8) + texts)
    split_set(before.path, {"val": 0.3})
    split_set(after.path, {"val": 0.3})
    assert set(texts_of(before.path / "val")) <= set(texts_of(after.path / "val"))
    assert set(texts_of(before.path / "train")) <= set(texts_of(after.path / "train"))


def test_planted_duplicates_never_leak(make_set: Callable[..., TinySet]) -> None:
    texts = random_documents(1, 100, 300)
    tiny = make_set(documents=[t for pair in zip(texts, texts, strict=True) for t in pair])
    split_set(tiny.path, {"val": 0.3})
    assert not set(texts_of(tiny.path / "val")) & set(texts_of(tiny.path / "train"))


@pytest.mark.parametrize("count", [1, 5, 30])
def test_a_number_of_documents(make_set: Callable[..., TinySet], count: int) -> None:
    tiny = make_set(documents=documents())
    split_set(tiny.path, documents={"val": count}, min_tokens=1)
    expected = sorted({*tiny.documents}, key=lambda t: reference_key(t, 0))[:count]
    assert set(texts_of(tiny.path / "val")) == set(expected)
    with pytest.raises(LmError, match="distinct"):
        split_set(tiny.path, documents={"val": 78})


@pytest.mark.parametrize(
    "keywords", [{}, {"link": "hardlink"}, {"link": "copy"}, {"link": "none"}, {"materialize": True}]
)
def test_the_second_run_changes_nothing(make_set: Callable[..., TinySet], keywords: dict[str, object]) -> None:
    tiny = make_set(documents=documents())
    first = split_set(tiny.path, {"val": 0.2}, **keywords)  # type: ignore[arg-type]
    inodes = {p: os.lstat(p).st_ino for p in tiny.path.rglob("*")}
    second = split_set(tiny.path, {"val": 0.2}, **keywords)  # type: ignore[arg-type]
    assert all(v.changed for v in first.views)
    assert not any(v.changed for v in second.views)
    assert inodes == {p: os.lstat(p).st_ino for p in tiny.path.rglob("*")}
    assert [v.dataset_id for v in first.views] == [v.dataset_id for v in second.views]
    assert len(texts_of(tiny.path / "val")) == second.views[0].n_docs


def test_no_token_is_copied_and_links_are_relative(make_set: Callable[..., TinySet], tmp_path: Path) -> None:
    tiny = make_set(documents=documents())
    split_set(tiny.path, {"val": 0.2})
    for file in (tiny.path / "val").glob("*.npy"):
        assert os.readlink(file) == f"../{file.name}"
    os.rename(tiny.path, tmp_path / "moved")
    assert texts_of(tmp_path / "moved" / "val")


def test_a_new_split_replaces_the_old_one_with_all_its_views(make_set: Callable[..., TinySet]) -> None:
    tiny = make_set(documents=documents())
    split_set(tiny.path, {"val": 0.2, "test": 0.2})
    (tiny.path / "mine").mkdir()
    report = split_set(tiny.path, {"val": 0.3}, replace=True)
    assert report.removed == ["test"]
    assert sorted(p.name for p in tiny.path.iterdir() if p.is_dir()) == ["mine", "train", "val"]


def test_what_is_not_a_view_is_left_alone(make_set: Callable[..., TinySet]) -> None:
    tiny = make_set(documents=documents())
    (tiny.path / "val").mkdir()
    (tiny.path / "val" / "thesis.txt").write_text("years of work")
    with pytest.raises(LmError, match="was not made by lm split") as caught:
        split_set(tiny.path, {"val": 0.2})
    assert caught.value.code == Exit.CANNOT_CREATE
    assert (tiny.path / "val" / "thesis.txt").exists()


def test_a_broken_view_is_made_again(make_set: Callable[..., TinySet]) -> None:
    tiny = make_set(documents=documents())
    split_set(tiny.path, {"val": 0.2})
    next((tiny.path / "val").glob("shard-*[0-9].npy")).unlink()
    # A missing link of a view is found in the set itself, so break it for good.
    (tiny.path / "val" / "manifest.json").write_text("{")
    report = split_set(tiny.path, {"val": 0.2})
    assert [v.name for v in report.views if v.changed] == ["val"]
    assert texts_of(tiny.path / "val")


# ---------------------------------------------------------------------------------------- shard, rows


def without_index(tiny: TinySet) -> TinySet:
    from tiny_sets import write_manifest

    manifest = tiny.manifest
    for shard in manifest["shards"]:
        (tiny.path / f"{shard['name']}.docs.npy").unlink()
        shard.update(docs_sha256=None, docs_records=0, first_doc_offset=0, n_docs=0)
    write_manifest(tiny.path, manifest | {"n_docs": 0, "n_bytes": 0})
    return tiny


def test_by_shard_keeps_documents_whole(make_set: Callable[..., TinySet]) -> None:
    tiny = make_set(documents=documents(), rows=1)
    report = split_set(tiny.path, {"val": 0.3}, by="shard")
    both = texts_of(tiny.path / "val") + texts_of(tiny.path / "train")
    assert sorted(both) == sorted(tiny.documents)
    common = set(texts_of(tiny.path / "val")) & set(texts_of(tiny.path / "train"))
    assert report.common_documents == len(common)
    assert report.leakage == ("documents" if common else "none")


def test_by_shard_reports_common_documents(make_set: Callable[..., TinySet]) -> None:
    texts = random_documents(2, 40, 600)
    tiny = make_set(documents=texts + texts, rows=1)
    report = split_set(tiny.path, {"val": 0.4}, by="shard")
    common = set(texts_of(tiny.path / "val")) & set(texts_of(tiny.path / "train"))
    assert common
    assert report.common_documents == len(common)
    assert report.leakage == "documents"
    assert read_manifest(tiny.path / "val").split["common_documents"] == len(common)  # type: ignore[index]


def test_foreign_sets_are_split_by_shard_and_said_to_be_unverifiable(make_set: Callable[..., TinySet]) -> None:
    tiny = without_index(make_set(documents=documents(), rows=1))
    report = split_set(tiny.path, {"val": 0.1})
    assert (report.by, report.leakage, report.common_documents) == ("shard", "unverifiable", None)
    manifest = read_manifest(tiny.path / "val")
    assert manifest.split is not None
    assert manifest.split["plain_readable"] is True
    with pytest.raises(LmError, match="no document index"):
        split_set(tiny.path, by="document")


def test_one_foreign_shard_is_split_by_rows(make_set: Callable[..., TinySet]) -> None:
    tiny = without_index(make_set(documents=documents(), rows=100))
    assert split_set(tiny.path, {"val": 0.3}).by == "rows"
    with pytest.raises(LmError, match="one shard"):
        split_set(tiny.path, by="shard")


def test_equal_rows_are_on_one_side(make_set: Callable[..., TinySet]) -> None:
    row = random_documents(4, 1, 10)[0]
    text = (row * 3000)[: 2048 * 40 - 1]
    tiny = make_set(documents=[text, *random_documents(6, 30, 4000)], rows=100)
    split_set(tiny.path, {"val": 0.4}, by="rows")
    rows: list[set[bytes]] = []
    for name in ("val", "train"):
        manifest = read_manifest(tiny.path / name)
        flat = np.load(tiny.path / "shard-00000.npy")
        rows.append({flat[r].tobytes() for _, a, b in manifest.segments for r in range(a // 2048, -(-b // 2048))})
    assert not rows[0] & rows[1]


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fractions", "counts", "sentence"),
    [
        ({"val": 0.0}, None, "between 0 and 1"),
        ({"val": 1.5}, None, "between 0 and 1"),
        ({"val": 0.6, "test": 0.4}, None, "nothing would be left"),
        ({"val": 0.1, "train": 0.5}, None, "must add up to 1"),
        ({"../x": 0.1}, None, "cannot name a view"),
        ({"val": 0.1}, {"val": 3}, "not both"),
        (None, {"train": 3}, "not for train"),
        (None, {"val": 0}, "at least one"),
        ({"train": 1 - 1e-12}, None, "name a view"),
    ],
)
def test_impossible_wishes(
    tiny_set: TinySet, fractions: dict[str, float] | None, counts: dict[str, int] | None, sentence: str
) -> None:
    with pytest.raises(LmError, match=sentence) as caught:
        split_set(tiny_set.path, fractions, documents=counts)
    assert caught.value.code == Exit.USAGE


def test_a_view_too_short_to_be_of_use_is_refused(tiny_set: TinySet) -> None:
    with pytest.raises(LmError, match=r"the view val would hold [\d,]+ tokens \(\d+ documents\); 9,000") as caught:
        split_set(tiny_set.path, {"val": 0.05}, min_tokens=9000)
    assert caught.value.code == Exit.DATA
    assert not (tiny_set.path / "train").exists()


def test_a_view_is_not_split_again(make_set: Callable[..., TinySet]) -> None:
    tiny = make_set(documents=documents())
    split_set(tiny.path, {"val": 0.2})
    with pytest.raises(LmError, match="a view already"):
        split_set(tiny.path / "train")


def test_a_damaged_index_is_refused(tiny_set: TinySet) -> None:
    file = tiny_set.path / "shard-00001.docs.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(LmError, match=r"shard-00001\.docs\.npy"):
        split_set(tiny_set.path)
    assert not (tiny_set.path / "val").exists()


def test_keys_are_uniform() -> None:
    keys = split_key(np.arange(200_000, dtype=np.uint64))
    for fraction in (0.01, 0.1, 0.5):
        share = float((keys < np.uint64(int(fraction * 2**64))).mean())
        assert abs(share - fraction) < 5 * (fraction * (1 - fraction) / 200_000) ** 0.5


def test_manifest_says_how_it_was_made(make_set: Callable[..., TinySet]) -> None:
    tiny = make_set(documents=documents())
    split_set(tiny.path, {"val": 0.2}, salt=3)
    split = json.loads((tiny.path / "val" / "manifest.json").read_text())["split"]
    assert split["parent"] == tiny.manifest["dataset_id"]
    assert (split["by"], split["salt"], split["view"], split["leakage"]) == ("document", 3, "val", "none")
    assert split["plain_readable"] is False
