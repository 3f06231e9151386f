"""`lm split` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tiny_sets import TinySet

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
