"""Parts, merged: the stream of the whole plan, whoever made which part. And single shards made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import pytest

from lmcore.data.manifest import read_manifest
from lmcore.data.merge import merge
from lmcore.data.plan import TokenizeConfig, read_plan
from lmcore.data.repair import retokenize
from lmcore.data.tokenization import tokenize
from lmcore.errors import Exit, LmError

TEXTS = corpora.texts(150)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of seven files, the whole set of it, and its three parts."""
    root = tmp_path_factory.mktemp("parts")
    for number in range(7):
        corpora.write_jsonl(root / "in" / f"{number}.jsonl", TEXTS[number * 21 : number * 21 + 21])
    corpora.tokenizer(root)
    tokenize(config(root), root / "whole")
    for part in (1, 2, 3):
        tokenize(config(root, part=part, parts=3), root / f"part-{part}")
    return root


@pytest.fixture
def sets(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "sets")
    return tmp_path / "sets"


def config(root: Path, **changes: Any) -> TokenizeConfig:
    options = {"paths": (str(root / "in"),), "tokenizer": str(root / "small"), "shard_tokens": 4096}
    return TokenizeConfig(**{**options, **changes})


def test_merged_stream_is_the_whole_plan_s(sets: Path) -> None:
    made = merge([sets / "part-2", sets / "part-3", sets / "part-1"], sets / "merged")
    assert np.array_equal(corpora.stream_of(sets / "merged"), corpora.stream_of(sets / "whole"))
    assert corpora.documents_of(sets / "merged") == corpora.documents_of(sets / "whole")
    whole = read_manifest(sets / "whole")
    assert (made.n_tokens, made.n_docs, made.n_bytes) == (whole.n_tokens, whole.n_docs, whole.n_bytes)
    assert made.source == whole.source | {"parts": 3}
    assert read_plan(sets / "merged").units == read_plan(sets / "whole").units
    assert read_manifest(sets / "merged").dataset_id == made.dataset_id
    assert all(path.is_symlink() for path in (sets / "merged").glob("*.npy"))
    assert merge([sets / f"part-{k}" for k in (1, 2, 3)], sets / "merged") == read_manifest(sets / "merged")


def test_merged_set_moves_with_its_parts_and_reads_as_a_stream(sets: Path, tmp_path: Path) -> None:
    from lmcore.data.stream import TokenStream

    merge([sets / f"part-{k}" for k in (1, 2, 3)], sets / "merged")
    sets.rename(tmp_path / "elsewhere")
    stream = TokenStream.open(tmp_path / "elsewhere" / "merged")
    assert np.array_equal(stream.read(0, stream.n_tokens), corpora.stream_of(tmp_path / "elsewhere" / "whole"))


@pytest.mark.parametrize(
    ("change", "parts", "message"),
    [
        (lambda s: None, ["part-1", "part-3"], "1 of 3 parts are missing (2/3)"),
        (lambda s: None, ["whole"], "not a part of a plan"),
        (lambda s: shutil.copytree(s / "part-1", s / "copy"), ["part-1", "copy", "part-2", "part-3"], "there twice"),
        (lambda s: (s / "part-2" / "manifest.json").unlink(), ["part-1", "part-2", "part-3"], "is not finished"),
        (
            lambda s: tokenize(config(s, part=2, parts=3, min_chars=2), s / "other"),
            ["part-1", "other", "part-3"],
            "other options than",
        ),
        (lambda s: (s / "merged").mkdir() or (s / "merged" / "x").touch(), ["part-1", "part-2", "part-3"], "merged"),
    ],
)
def test_parts_that_do_not_belong_together(
    base: Path, sets: Path, change: Callable[[Path], object], parts: list[str], message: str
) -> None:
    shutil.rmtree(sets / "in")
    (sets / "in").symlink_to(base / "in")
    change(sets)
    with pytest.raises(LmError) as caught:
        merge([sets / part for part in parts], sets / "merged")
    assert message in caught.value.message


@pytest.mark.parametrize("options", [{}, {"dedup": True, "max_tokens": 20_000}], ids=["plain", "selected"])
def test_any_shard_can_be_made_again(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    out = tmp_path / "set"
    tokenize(config(base, **options), out)
    before = corpora.tree(out)
    count = len(read_manifest(out).shards)
    for number in (0, 1, count // 2, count - 1):
        for ending in (".npy", ".docs.npy"):
            (out / f"shard-{number:05d}{ending}").write_bytes(b"damaged")
        if options:
            retokenize(out, [number])
    if not options:
        retokenize(out, [0, 1, count // 2, count - 1])
    assert corpora.tree(out) == before


def test_repair_from_changed_sources_is_refused(sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    tokenize(config(sets), out)
    path = sets / "in" / "0.jsonl"
    path.write_bytes(path.read_bytes().replace(b"model", b"mudel").replace(b"data", b"dota"))
    with pytest.raises(LmError, match="give other tokens now") as caught:
        retokenize(out, [0])
    assert caught.value.code == Exit.DATA
    with pytest.raises(LmError, match="there is no shard-00999"):
        retokenize(out, [999])
