"""`lm split` as a user meets it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_sets import TinySet, random_documents

Lm = Callable[..., Any]


def test_table_and_second_run(lm: Lm, make_set: Callable[..., TinySet]) -> None:
    path = make_set().path
    first = lm("split", path, "--val-fraction", "0.2", "-q")
    assert first.code == 0
    assert "proven by content hashes" in first.out
    assert "written" in first.out
    assert "unchanged" in lm("split", path, "--val-fraction", "0.2").out


def test_json(lm: Lm, make_set: Callable[..., TinySet]) -> None:
    path = make_set().path
    outcome = lm("split", path, "--view", "val=0.2", "--view", "test=0.1", "--json")
    document = json.loads(outcome.out)
    assert [v["name"] for v in document["views"]] == ["val", "test", "train"]
    assert document["leakage"] == "none"
    assert abs(sum(v["share"] for v in document["views"]) - 1) < 1e-12


WAYS = {
    "a tenth": ("--val-fraction", "0.1"),
    "another fraction": ("--val-fraction", "0.2"),
    "a third view": ("--view", "val=0.2", "--view", "test=0.2"),
    "a number of documents": ("--val-docs", "7"),
    "another salt": ("--val-fraction", "0.2", "--salt", "3"),
    "rows": ("--val-fraction", "0.2", "--by", "rows", "--min-tokens", "1"),
    "materialized": ("--val-fraction", "0.2", "--materialize"),
}


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("first", WAYS)
def test_other_views_replace_nothing_unless_it_is_said(lm: Lm, make_set: Callable[..., TinySet], first: str) -> None:
    """Runs may rest on the views of the first command; the commands that the refusal names work as they are."""
    names = list(WAYS)
    for second in (names[names.index(first) - 1], names[(names.index(first) + 2) % len(names)]):
        path = make_set(f"{first} {second}", documents=random_documents(7, 200, 700)).path
        assert lm("split", path, *WAYS[first], "-q").code == 0
        before = files(path)
        refused = lm("split", path, *WAYS[second], "-q")
        assert (refused.code, refused.out) == (73, "")
        assert files(path) == before
        assert refused.err.count("error:") == 1
        keep, replace = refused.err.partition("To keep it: ")[2].split("To replace it: ")
        again = lm(*shlex.split(keep)[1:])
        assert again.code == 0, keep
        assert "written" not in again.out
        assert files(path) == before
        least = WAYS[second][-2:] if "--min-tokens" in WAYS[second] else ()
        done = lm(*shlex.split(replace)[1:], *least)
        assert done.code == 0, (replace, done.err)
        assert lm("split", path, *WAYS[second]).out.count("unchanged") >= 2


def test_the_same_tokens_in_another_form_are_no_replacement(lm: Lm, make_set: Callable[..., TinySet]) -> None:
    path = make_set().path
    assert lm("split", path, "--val-fraction", "0.2").code == 0
    assert "written" in lm("split", path, "--val-fraction", "0.2", "--link", "copy").out
    refused = lm("split", path)  # too little data for a hundredth, but that is not the point
    assert refused.code == 73
    assert "was made with --val-fraction 0.2 --link copy" in refused.err


def test_the_share_that_was_reached_is_said_and_refused_when_it_is_far_off(
    lm: Lm, make_set: Callable[..., TinySet]
) -> None:
    far = make_set("ten", documents=[bytes([97 + k]) * 3000 for k in range(10)])
    refused, nearly = set(), 0
    for salt in range(40):
        outcome = lm("split", far.path, "--val-fraction", "0.34", "--salt", salt, "--replace", "--json")
        if outcome.code == 0:
            held = json.loads(outcome.out)["views"][0]["n_docs"]
            assert 2 <= held <= 5
            nearly += f"val holds {held} of 10 documents ({10 * held}.0%); 34.0% was asked for" in str(outcome.out)
        else:
            assert outcome.code == 65
            assert "--val-docs" in outcome.err
            refused.add(outcome.err.partition("would hold ")[2].partition(" ")[0])
    assert nearly
    assert refused <= {"0", "1", "6", "7", "8", "9"}
    assert len(refused) > 1


def test_rows_are_held_out_as_near_as_can_be(lm: Lm, make_set: Callable[..., TinySet]) -> None:
    path = make_set("rows", documents=random_documents(3, 30, 1500), rows=4).path
    for fraction, held in ((0.34, 0.34), (0.1, 0.1), (0.5, 0.5)):
        views = json.loads(lm("split", path, "--by", "rows", "--val-fraction", fraction, "--replace", "--json").out)
        rows = -(-sum(view["n_tokens"] for view in views["views"]) // 2048)
        assert abs(views["views"][0]["share"] - held) < 1 / rows


def test_errors_are_sentences(lm: Lm, make_set: Callable[..., TinySet]) -> None:
    path = make_set().path
    for arguments, code, sentence in [
        ((path / "nothing",), 2, "no such shard set"),
        ((path, "--val-fraction", "1.5"), 2, "between 0 and 1"),
        ((path, "--view", "val"), 2, "NAME=FRACTION"),
        ((path, "--by", "chance"), 2, "choose auto, document, shard or rows"),
        ((path, "--link", "magic"), 2, "choose symlink"),
        ((path, "--val-docs", "100000"), 65, "distinct"),
        ((path, "--min-tokens", "1000000"), 65, "least that is of use"),
    ]:
        outcome = lm("split", *arguments)
        assert (outcome.code, outcome.out) == (code, "")
        assert sentence in outcome.err


def test_a_locked_set_is_refused(lm: Lm, make_set: Callable[..., TinySet]) -> None:
    from lmcore import storage

    path = make_set().path
    with storage.lock_directory(path, "lm tokenize"):
        outcome = lm("split", path, "--val-fraction", "0.2")
    assert outcome.code == 75
    assert "in use by lm tokenize" in outcome.err
