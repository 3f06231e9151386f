"""`lm merge` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Lm = Callable[..., Any]


def test_parts_become_one_set(lm: Lm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / "in" / f"{number}.txt").write_text(f"text {number} " * 100)
    for part in (1, 2):
        done = lm("tokenize", "in", "--tokenizer", "byte", "--part", f"{part}/2", "--json")
        assert json.loads(done.out)["path"] == f"shards/in-part-00{part}-of-002"
    missing = lm("merge", "shards/in-part-001-of-002")
    assert missing.code == 2
    assert "1 of 2 parts are missing (2/2)" in missing.err
    done = lm("merge", "shards/in-part-002-of-002", "shards/in-part-001-of-002", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["path"] == "shards/in"
    assert json.loads(done.out)["n_docs"] == 5
    assert "lm validate shards/in" in lm("merge", "shards/in-part-001-of-002", "shards/in-part-002-of-002").err
    quiet = lm("merge", "-q", "shards/in-part-001-of-002", "shards/in-part-002-of-002", "--out", "shards/other")
    assert (quiet.code, quiet.err, "merged set" in quiet.out) == (0, "", True)
    assert lm("validate", "shards/in").code == 0
    refused = lm("tokenize", "in", "--tokenizer", "byte", "--executor", "ray")
    assert (refused.code, "--part all/N" in refused.err) == (2, True)
