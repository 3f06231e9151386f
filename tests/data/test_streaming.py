"""Training without shards obeys the law of the sampler: a batch depends on its index alone, wherever reading began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import pytest

from lmcore.data import readers
from lmcore.data.plan import TokenizeConfig
from lmcore.data.streaming import TextStream
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import LmError

TEXTS = corpora.texts(120)
LENGTH, WINDOW = 32, 16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    corpora.write_parquet(root / "in" / "a.parquet", TEXTS[:70], group=10)
    corpora.write_jsonl(root / "in" / "b.jsonl", TEXTS[70:])
    corpora.tokenizer(root)
    return root


def stream(source: Path, directory: Path, **options: Any) -> TextStream:
    config = TokenizeConfig(paths=(str(source / "in"),), tokenizer=str(source / "small"))
    return TextStream.open(config, directory, **{"context_length": LENGTH, "window": WINDOW, "seed": 5, **options})


def flat(source: Path) -> list[int]:
    return corpora.reference_ids(TEXTS, Tokenizer.from_file(source / "small"))


def test_every_token_is_a_target_once_per_epoch(source: Path, tmp_path: Path) -> None:
    tokens = flat(source)
    endless = np.array([*tokens, *tokens, *tokens])
    count = len(tokens) // LENGTH // WINDOW * WINDOW + 2 * WINDOW  # into the second epoch
    with stream(source, tmp_path / "run") as made:
        rows = made.batch(0, count)
    for block in range(count // WINDOW):
        expected = {
            tuple(endless[k * LENGTH : k * LENGTH + LENGTH + 1]) for k in range(block * WINDOW, block * WINDOW + WINDOW)
        }
        got = [tuple(int(token) for token in row) for row in rows[block * WINDOW : block * WINDOW + WINDOW]]
        assert set(got) == expected
    assert made.epoch == 1


def test_samples_are_shuffled_by_the_seed(source: Path, tmp_path: Path) -> None:
    with stream(source, tmp_path / "run") as one, stream(source, tmp_path / "run", seed=6) as two:
        a, b = one.batch(0, WINDOW), two.batch(0, WINDOW)
    assert not np.array_equal(a, b)
    assert np.array_equal(np.sort(a[:, 0]), np.sort(b[:, 0]))


def test_a_batch_depends_on_its_index_alone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stream(source, tmp_path / "run") as made:
        whole = made.batch(0, 400)
        states = {}
        for first in (0, 7, 90, 230, 395):
            assert np.array_equal(made.batch(first, 5), whole[first : first + 5]), "skipping and going back"
            states[first] = json.loads(json.dumps(made.state()))
    monkeypatch.setattr(readers, "BATCH_BYTES", 700)
    for first, state in states.items():
        with stream(source, tmp_path / "run", workers=3) as again:
            again.load_state(state)
            assert np.array_equal(again.batch(first, 400 - first), whole[first:])
    with stream(source, tmp_path / "run") as rank:  # every second sample, as one of two ranks
        assert np.array_equal(np.concatenate([rank.batch(k, 1) for k in range(1, 60, 2)]), whole[1:60:2])


def test_state_starts_reading_near_the_sample(source: Path, tmp_path: Path) -> None:
    with stream(source, tmp_path / "run") as made:
        made.batch(300, 1)
        state = made.state()
    assert state["block"] == 300 // WINDOW
    assert (state["unit"], state["piece"]) > (0, 0)
    assert len(json.dumps(state)) < 200


def test_source_is_frozen_in_the_run(source: Path, tmp_path: Path) -> None:
    with stream(source, tmp_path / "run") as made:
        identity = made.dataset_id
    assert {"plan.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    with stream(source, tmp_path / "run") as again:
        assert again.dataset_id == identity
        assert again.throughput()["tokens"] == 0
        again.batch(0, 4)
        assert again.throughput()["tokens_per_s"] > 0
        assert again.backend == "gigatoken"
    with pytest.raises(LmError, match="--min-chars: 1 in the set, 5 now"):
        TextStream.open(
            TokenizeConfig(paths=(str(source / "in"),), tokenizer=str(source / "small"), min_chars=5),
            tmp_path / "run",
            context_length=LENGTH,
        )


def test_what_a_stream_cannot_do_is_said(source: Path, tmp_path: Path) -> None:
    config = TokenizeConfig(paths=(str(source / "in"),), tokenizer="byte", dedup=True)
    with pytest.raises(LmError, match="cannot drop duplicates"):
        TextStream.open(config, tmp_path / "a", context_length=8)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    config = TokenizeConfig(paths=(str(tmp_path / "empty.jsonl"),), tokenizer="byte")
    with TextStream.open(config, tmp_path / "b", context_length=8) as made, pytest.raises(LmError, match="No text"):
        made.batch(0, 1)
    with pytest.raises(LmError, match="state of a text stream: nonsense"):
        made.load_state({"nonsense": 1})
