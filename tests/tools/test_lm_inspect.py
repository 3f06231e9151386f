"""`lm inspect` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sets import TinySet

Lm = Callable[..., Any]


@pytest.fixture
def traced(lm: Lm, tmp_path: Path) -> Path:
    """A set made by lm tokenize, with a source that can be read again."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for k in range(30):
        (corpus / f"{k:02d}.txt").write_text(f"This is text number {k}. " * (k + 3))
    made = lm("tokenize", corpus, "--tokenizer", "byte", "--out", tmp_path / "set", "-q")
    assert made.code == 0, made.err
    return tmp_path / "set"


def test_token_to_document_and_back(lm: Lm, traced: Path) -> None:
    (entry,) = json.loads(lm("inspect", traced, "--token", "5000", "--length", "20", "--json").out)
    (document, *_) = entry["documents"]
    assert document["source_matches"] is True
    text = Path(document["source"]).read_text()
    place = document["token_in_document"]
    assert entry["text"].startswith(text[place : place + 5])
    back = json.loads(lm("inspect", traced, "--hash", document["hash"], "--json").out)
    assert back[0]["start"] == document["start"]
    by_text = json.loads(lm("inspect", traced, "--text", f"@{document['source']}", "--json").out)
    assert by_text[0]["start"] == document["start"]
    name = Path(document["source"]).name
    by_source = json.loads(lm("inspect", traced, "--source", name, "--full-text", "--json").out)
    assert by_source[0]["documents"][0]["text"] == text


def test_a_changed_source_is_noticed(lm: Lm, traced: Path) -> None:
    (entry,) = json.loads(lm("inspect", traced, "--token", "0", "--json").out)
    Path(entry["documents"][0]["source"]).write_text("something else")
    (entry,) = json.loads(lm("inspect", traced, "--token", "0", "--json").out)
    assert entry["documents"][0]["source_matches"] is not True
    Path(entry["documents"][0]["source"]).unlink()
    assert "not at hand" in lm("inspect", traced).out


def test_table(lm: Lm, traced: Path) -> None:
    outcome = lm("inspect", traced, "--token", "100")
    assert outcome.code == 0
    assert "same text" in outcome.out


def test_errors(lm: Lm, make_set: Callable[..., TinySet], tmp_path: Path) -> None:
    path = make_set().path
    for arguments, code, sentence in [
        ((path, "--token", "99999999"), 2, "the stream has tokens"),
        ((path, "--token", "1", "--hash", "00"), 2, "choose one of"),
        ((path, "--row", "1"), 2, "--row belongs to --step"),
        ((path, "--text", "not there"), 65, "not in the stream"),
        ((path, "--hash", "zz"), 2, "content hash"),
        ((path, "--step", "3"), 2, "no run of lm train"),
        ((tmp_path / "nothing",), 2, "no such shard set"),
    ]:
        outcome = lm("inspect", *arguments)
        assert (outcome.code, outcome.out) == (code, ""), outcome.err
        assert sentence in outcome.err


@pytest.mark.slow
def test_rows_of_a_step_are_what_was_trained_on(lm: Lm, traced: Path, tmp_path: Path) -> None:
    """The windows shown for a step are the sampler's, found from the run directory alone."""
    from lmcore.data.sampler import Sampler
    from lmcore.data.stream import TokenStream

    assert lm("split", traced, "--val-fraction", "0.1", "-q").code == 0
    run = tmp_path / "run"
    trained = lm(
        "train", run, "--data", traced, "--steps", "3", "--set", "model.d_model=16", "--set",
        "model.num_layers=1", "--set", "model.num_heads=2", "--set", "model.context_length=32", "--set",
        "train.batch_tokens=128", "--set", "train.device=cpu", "--set", "train.dtype=fp32", "-q",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    entries = json.loads(lm("inspect", run, "--step", "2", "--length", "33", "--json").out)
    assert len(entries) == 4
    config = json.loads(json.dumps(__import__("yaml").safe_load((run / "config.yaml").read_text())))
    sampler = Sampler(TokenStream.open(traced / "train"), context_length=32, seed=config["train"]["seed"])
    np.testing.assert_array_equal([e["ids"] for e in entries], sampler.batch(4, 4))
    assert lm("inspect", run, "--step", "99").code == 2
    assert lm("inspect", run, "--step", "1", "--row", "4").code == 2
