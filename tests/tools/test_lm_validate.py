"""`lm validate` as a user meets it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_sets import TinySet, random_documents

Lm = Callable[..., Any]


def test_sound_set(lm: Lm, make_set: Callable[..., TinySet]) -> None:
    tiny = make_set()
    outcome = lm("validate", tiny.path)
    assert outcome.code == 0
    assert f"OK {len(tiny.manifest['shards'])} shards {len(tiny.stream):,} tokens" in outcome.out
    assert "tokens per document" in outcome.out
    assert "bytes per token" in outcome.out


def test_findings_exit_65_and_are_all_listed(lm: Lm, make_set: Callable[..., TinySet]) -> None:
    path = make_set().path
    os.truncate(path / "shard-00001.npy", 100)
    (path / "tokenizer.json").unlink()
    outcome = lm("validate", path)
    assert outcome.code == 65
    assert "error V012" in outcome.out
    assert "error V040" in outcome.out
    document = json.loads(lm("validate", path, "--json", "--quick").out)
    assert document["ok"] is False
    assert {(f["code"], f["severity"]) for f in document["findings"]} >= {("V012", "error"), ("V040", "error")}


def test_json_of_a_sound_set(lm: Lm, make_set: Callable[..., TinySet]) -> None:
    tiny = make_set()
    document = json.loads(lm("validate", tiny.path, "--json", "--deep").out)
    assert document["ok"] is True
    assert document["sets"][0]["n_tokens"] == len(tiny.stream)
    assert document["sets"][0]["statistics"]["decoded_documents"] == len(tiny.documents)


def test_explain(lm: Lm) -> None:
    outcome = lm("validate", "--explain", "v060")
    assert outcome.code == 0
    assert "two views share tokens" in outcome.out
    assert lm("validate", "--explain", "V00").code == 2


def test_usage(lm: Lm, tmp_path: Path) -> None:
    assert lm("validate").code == 2
    assert lm("validate", tmp_path / "nothing").code == 2
    assert lm("validate", tmp_path, "--quick", "--deep").code == 2


def test_hostile_text_does_not_reach_a_terminal_raw(make_set: Callable[..., TinySet]) -> None:
    from lmcore.data.validate import validate

    texts = [b"\x1b]0;owned\x07" * 20, *random_documents(1, 40, 300)]
    found = validate(make_set(documents=texts).path).sets[0].statistics
    from lmcore.tools import ui

    assert found is not None
    assert "\x1b" not in ui.plain(found.top_ids[0][2] + "".join(t for _, t in found.windows) + "\x1b")


def test_repair_makes_the_shard_again(lm: Lm, tmp_path: Path) -> None:
    pytest.importorskip("lmcore.data.repair")
    corpus = tmp_path / "corpus.jsonl"
    texts = random_documents(1, 300, 900)
    corpus.write_text("".join(json.dumps({"text": t.decode()}) + "\n" for t in texts))
    path = tmp_path / "set"
    made = lm("tokenize", corpus, "--tokenizer", "byte", "--out", path, "--shard-tokens", "32768", "-q")
    assert made.code == 0, made.err
    before = {p.name: p.read_bytes() for p in path.glob("*.npy")}
    assert len(before) > 4
    raw = bytearray(before["shard-00001.npy"])
    raw[5000] ^= 4
    (path / "shard-00001.npy").write_bytes(raw)
    (path / "shard-00002.docs.npy").unlink()
    assert lm("validate", path).code == 65
    outcome = lm("validate", path, "--repair")
    assert outcome.code == 0, outcome.out + outcome.err
    assert {p.name: p.read_bytes() for p in path.glob("*.npy")} == before
