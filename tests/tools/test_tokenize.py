"""`lm tokenize` as a user meets it: what it prints, where it puts things, and the exit code of every mistake."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmcore.data.manifest import read_manifest

Lm = Callable[..., Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_text_files_become_a_set_named_after_them(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "novels").mkdir()
    for number in range(3):
        (tmp_path / "novels" / f"{number}.txt").write_text(f"story number {number}. " * 50)
    done = lm("tokenize", "novels", "--tokenizer", "byte")
    assert done.code == 0, done.err
    manifest = read_manifest(tmp_path / "shards" / "novels")
    assert manifest.n_docs == 3
    assert f"{manifest.n_tokens:,}" in done.out
    assert manifest.dataset_id in done.out
    assert "lm validate shards/novels" in done.err
    flat = np.load(tmp_path / "shards/novels/shard-00000.npy").reshape(-1)[: manifest.n_tokens]
    assert bytes(flat[flat != 256].astype(np.uint8)).decode() == "".join(f"story number {n}. " * 50 for n in range(3))


def test_json_is_one_document(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    done = lm("tokenize", "a.txt", "--tokenizer", "byte", "--json")
    report = json.loads(done.out)
    assert report["n_tokens"] == 6
    assert report["path"] == "shards/a"
    assert report["already_finished"] is False
    again = lm("tokenize", "a.txt", "--tokenizer", "byte", "--json")
    assert again.code == 0
    assert json.loads(again.out)["already_finished"] is True
    assert json.loads(again.out)["dataset_id"] == report["dataset_id"]


def test_finished_set_is_said_to_be_finished(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    lm("tokenize", "a.txt", "--tokenizer", "byte", "-q")
    done = lm("tokenize", "a.txt", "--tokenizer", "byte")
    assert done.code == 0
    assert "finished already" in done.out


def test_standard_input(lm: Lm, tmp_path: Path) -> None:
    done = lm("tokenize", "-", "--tokenizer", "byte", "--json", stdin='{"body": "one"}\n{"body": "two"}\n')
    assert (done.code, "stdin.jsonl:1: no 'text' here; it has body" in done.err) == (65, True), done.err
    done = lm(
        "tokenize", "-", "--text-column", "body", "--tokenizer", "byte", "--out", "x", "--json",
        stdin='{"body": "one"}\n{"body": "two"}\n',
    )  # fmt: skip
    assert json.loads(done.out)["n_docs"] == 2


def test_dry_run_writes_nothing_and_comes_close(lm: Lm, tmp_path: Path) -> None:
    values = [f"the {k} and the other {k * 7}. " * 20 for k in range(500)]
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    told = json.loads(lm("tokenize", "a.parquet", "--tokenizer", "byte", "--dry-run", "--json").out)
    assert sorted(os.listdir(tmp_path)) == ["a.parquet"]
    made = json.loads(lm("tokenize", "a.parquet", "--tokenizer", "byte", "--json").out)
    assert told["records"] == 500
    assert told["exact_records"] is True
    assert told["tokens"] == made["n_tokens"]
    assert told["text_bytes"] == made["n_bytes"]
    assert "forecast" in lm("tokenize", "a.parquet", "--tokenizer", "train:300", "--dry-run", "--out", "y").out


def write_jsonl(path: Path, *lines: str) -> str:
    path.write_text("".join(line + "\n" for line in lines))
    return path.name


@pytest.mark.parametrize(
    ("make", "arguments", "code", "message"),
    [
        (lambda p: None, [], 2, "name either files or a dataset"),
        (lambda p: None, ["nowhere.txt"], 2, "nowhere.txt: no such file or directory"),
        (lambda p: None, ["--dataset", "wikitext"], 2, "not a known dataset; known are stdlib, fineweb-edu"),
        (lambda p: (p / "a.csv").write_text("x"), ["a.csv"], 2, "this is a .csv file, which is not read here"),
        (lambda p: (p / "a.txt").write_text("x"), ["a.txt", "--seq-len", "100"], 2, "seq_len"),
        (lambda p: (p / "a.txt").write_text("x"), ["a.txt", "--tokenizer", "train:many"], 2, "train:N"),
        (lambda p: (p / "a.txt").write_text("x"), ["a.txt", "--tokenizer", "./t.json"], 2, "no such tokenizer file"),
        (lambda p: (p / "a.txt").write_text("x"), ["a.txt", "--part", "3"], 2, "expected I/N"),
        (lambda p: (p / "a.txt").write_text("x"), ["a.txt", "--part", "1/2"], 2, "at most 1 parts"),
        (lambda p: (p / "a.txt").write_text("x"), ["a.txt", "--max-tokens", "many"], 2, "max_tokens"),
        (lambda p: (p / "a.txt").write_text(""), ["a.txt"], 65, "No text to tokenize"),
        (lambda p: (p / "d").mkdir(), ["d"], 65, "no text here"),
        (lambda p: (p / "a.txt").write_bytes(b"caf\xe9"), ["a.txt"], 65, "a.txt: not UTF-8 text (byte 3)"),
        (
            lambda p: write_jsonl(p / "a.jsonl", '{"text": "x"}', '{"text": "y"'),
            ["a.jsonl"],
            65,
            "a.jsonl:2: not valid JSON",
        ),
        (
            lambda p: write_jsonl(p / "a.jsonl", '{"body": "x"}'),
            ["a.jsonl"],
            65,
            "a.jsonl:1: no 'text' here; it has body",
        ),
        (
            lambda p: pq.write_table(pa.table({"body": ["x"], "n": [1]}), p / "a.parquet"),
            ["a.parquet"],
            2,
            "no column 'text'; it has body, n",
        ),
        (lambda p: (p / "a.parquet").write_bytes(b"nonsense"), ["a.parquet"], 65, "not a readable parquet file"),
        (
            lambda p: (p / "a.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:-100]),
            ["a.txt.gz"],
            65,
            "broken gzip data",
        ),
        (
            lambda p: [(p / "a.txt").write_text("x"), (p / "out").write_text("a file")],
            ["a.txt", "--out", "out"],
            73,
            "out",
        ),
        (
            lambda p: [(p / "a.txt").write_text("x"), (p / "out").mkdir(), (p / "out" / "mine").write_text("")],
            ["a.txt", "--out", "out"],
            73,
            "not empty",
        ),
    ],
)
def test_every_mistake_is_one_sentence(
    lm: Lm, tmp_path: Path, make: Callable[[Path], object], arguments: list[str], code: int, message: str
) -> None:
    make(tmp_path)
    done = lm("tokenize", *arguments, "-q")
    assert done.code == code, done.err
    assert message in done.err
    assert done.out == ""
    assert "Traceback" not in done.err


def test_other_options_are_refused_with_a_difference(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    lm("tokenize", "a.txt", "--tokenizer", "byte", "-q")
    done = lm("tokenize", "a.txt", "--tokenizer", "train:300", "-q")
    assert done.code == 2
    assert "--tokenizer: byte in the set, train:300 now" in done.err
    assert "--out PATH" in done.err


def test_broken_records_can_be_counted(lm: Lm, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", '{"text": "x"}', "broken", '{"text": null}', '{"text": ""}')
    done = lm("tokenize", "a.jsonl", "--tokenizer", "byte", "--on-bad-doc", "skip", "--json")
    assert json.loads(done.out)["dropped"] == {"bad_json": 1, "empty": 1, "no_text": 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_read_only_and_full_disks(lm: Lm, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello " * 100_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = lm("tokenize", "a.txt", "--tokenizer", "byte", "--out", disk / "set", "-q")
        assert done.code == 74, done.err
        assert "disk is full" in done.err
        assert not [p for p in (disk / "set").iterdir() if p.name.startswith(".tmp-")]
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert lm("tokenize", "a.txt", "--tokenizer", "byte", "--out", disk / "set", "-q").code == 0
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = lm("tokenize", "a.txt", "--tokenizer", "byte", "--out", disk / "other", "-q")
        assert done.code == 73, done.err
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_shard_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "t").mkdir()
    for k in range(400):
        (tmp_path / "t" / f"{k:03}.txt").write_text(f"file {k} " * 2000)
    command = ["tokenize", "t", "--tokenizer", "byte", "--shard-tokens", "8192", "--out", "set"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lmcore", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "set/journal.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -number, err
    assert "Run the same command again to continue" in err
    assert "--shard-tokens 8192" in err
    assert not (tmp_path / "set/manifest.json").exists()
    assert [p for p in (tmp_path / "set").iterdir() if p.name.startswith(".tmp-")] == []


def test_stdlib_from_a_fresh_directory(lm: Lm, tmp_path: Path) -> None:
    done = lm("tokenize", "--dataset", "stdlib", "--max-documents", "40", "--tokenizer", "train:512", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["path"] == "shards/stdlib"
    assert report["n_docs"] == 40
    assert report["vocab_size"] == 512
    assert read_manifest(tmp_path / "shards/stdlib").source["kind"] == "stdlib"
