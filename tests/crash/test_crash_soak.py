"""Whole commands, killed with SIGKILL at random moments again and again, end where an undisturbed one ends.

No proof (crash_enum.py is), but nothing here is arranged: real processes, real threads, the real command line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crash_writers import _sets_without_dates, make_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


def lm(*arguments: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "lmcore", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


def finish(*arguments: object) -> None:
    """Run to the end."""
    process = lm(*arguments)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said.decode(errors="replace")


def kill_again_and_again(log: Path, lines: int, kills: int, seed: int, *arguments: object) -> int:
    """Start the command and kill it and its children a moment after up to `lines` more lines of its log, up to `kills`
    times; then let it finish. Returns the kills that hit."""
    rng = random.Random(seed)
    hits = 0
    for _ in range(kills):
        process = lm(*arguments)
        wanted = _lines(log) + rng.randint(0, lines)
        while process.poll() is None and _lines(log) < wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            hits += 1
        process.communicate()
        if process.returncode == 0:
            break
    finish(*arguments)
    return hits


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = make_corpus(tmp_path / "corpus")
    text = "".join(json.dumps({"text": f"line {i} of the soak test " * 30}) + "\n" for i in range(6000))
    (folder / "long.jsonl").write_text(text)
    return folder


def test_a_tokenizer_run_killed_many_times_makes_the_same_set(tmp_path: Path, corpus: Path) -> None:
    command = ["tokenize", corpus, "--tokenizer", "train:400", "--shard-tokens", "20480", "--quiet", "--out"]
    finish(*command, tmp_path / "whole")
    hits = kill_again_and_again(tmp_path / "killed" / "journal.jsonl", 2, 12, 1, *command, tmp_path / "killed")
    assert hits >= 3
    assert _sets_without_dates(tmp_path / "killed") == _sets_without_dates(tmp_path / "whole")
    finish("validate", tmp_path / "killed")


def test_a_training_run_killed_many_times_ends_with_the_same_weights(tmp_path: Path, corpus: Path) -> None:
    finish("tokenize", corpus, "--tokenizer", "byte", "--quiet", "--out", tmp_path / "set")
    finish("split", tmp_path / "set", "--val-fraction", "0.1")
    settings = [
        *("model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.context_length=64"),
        *("train.steps=60", "train.batch_tokens=512", "train.checkpoint.every_steps=5", "train.eval.every_steps=20"),
        "train.eval.tokens=2048",
    ]
    options = ["--preset", "nano", "--data", tmp_path / "set", *(x for s in settings for x in ("--set", s)), "--quiet"]
    finish("train", tmp_path / "whole", *options)
    log = tmp_path / "killed" / "metrics.jsonl"
    hits = kill_again_and_again(log, 12, 10, 2, "train", tmp_path / "killed", *options)
    assert hits >= 3

    def last(run: str, name: str) -> bytes:
        return max((tmp_path / run / "checkpoints").glob("step-*")).joinpath(name).read_bytes()

    for name in ("model.safetensors", "optimizer.safetensors"):
        assert last("killed", name) == last("whole", name), name
    leftovers = [p.name for p in (tmp_path / "killed").rglob(".*") if p.name != ".lock"]
    assert not leftovers
