"""The same command again says that it was done and ends with 0; other inputs are refused; a kill leaves no trace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sets import TinySet

ROOT = Path(__file__).parents[2]
Lm = Callable[..., Any]
TINY = (
    "model: {d_model: 32, num_layers: 1, num_heads: 2, d_ff: 64, context_length: 32}\n"
    "train: {steps: 2, batch_tokens: 128, dtype: fp32, compile: false, threads: 1, device: cpu, seed: %d}\n"
)


@pytest.fixture
def here(tmp_path: Path, make_set: Callable[..., TinySet], monkeypatch: pytest.MonkeyPatch, lm: Lm) -> Path:
    monkeypatch.chdir(tmp_path)
    make_set("set")
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / f"{name}.yaml").write_text(TINY % seed)
        assert lm("train", f"runs/{name}", "-p", f"{name}.yaml", "-d", "set", "-q").code == 0
    np.save(tmp_path / "tokens.npy", np.arange(4096, dtype=np.uint16).reshape(2, 2048) % 256)
    np.arange(50_000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    return tmp_path


def everything(place: Path) -> dict[str, tuple[int, bytes]]:
    files = [place] if place.is_file() else [p for p in sorted(place.rglob("*")) if p.is_file()]
    return {str(p): (p.stat().st_ino, p.read_bytes()) for p in files}


CASES = {
    "import": (("import", "tokens.npy", "--out", "x"), ("--seq-len", "64"), "seq_len"),
    "import a bare file": (("import", "tokens.bin", "--width", "2", "--out", "x"), ("--seq-len", "64"), "seq_len"),
    "export a folder": (("export", "runs/a", "--out", "x"), ("--dtype", "bf16"), "dtype"),
    "export a file": (("export", "runs/a", "--format", "safetensors", "--out", "x"), ("--dtype", "bf16"), "dtype"),
    "import a model": (("import-model", "exported", "--out", "x"), (), ""),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_command_says_that_it_is_done(lm: Lm, here: Path, case: str) -> None:
    command, other, differing = CASES[case]
    assert lm("export", "runs/a", "--out", "exported").code == 0
    assert lm("export", "runs/b", "--out", "exported-b").code == 0
    first = lm(*command)
    assert first.code == 0, first.err
    before = everything(here / "x")
    again = lm(*command)
    assert again.code == 0, again.err
    assert "was done before; nothing was changed" in again.err
    assert everything(here / "x") == before
    changed = (*command, *other) if other else ("import-model", "exported-b", "--out", "x")
    refused = lm(*changed)
    assert refused.code == 73
    assert f"made with other inputs: {differing}" in refused.err
    if command[0] == "export":
        assert lm("export", "runs/b", *command[2:]).code == 73
        assert "--force" in refused.err
        assert lm(*changed, "--force").code == 0
    elif command[0] == "import":
        with open(here / command[1], "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\1")
        refused = lm(*command)
        assert refused.code == 73
        assert "inputs was" in refused.err
    if command[0] == "import-model":
        assert everything(here / "x") == before


def test_what_is_no_export_is_never_replaced(lm: Lm, here: Path) -> None:
    before = everything(here / "runs")
    for out in ("runs/a", "runs/b/config.yaml"):
        form = ("--format", "safetensors") if out.endswith("yaml") else ()
        assert lm("export", "runs/a", "--out", out, *form, "--force").code == 73
    assert everything(here / "runs") == before


@pytest.mark.parametrize("command", [CASES["import a bare file"][0], CASES["export a folder"][0]])
def test_a_killed_command_leaves_nothing_after_the_next_one(lm: Lm, here: Path, command: tuple[str, ...]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    left: list[Path] = []
    np.arange(30_000_000, dtype=np.uint16).tofile(here / "tokens.bin")
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-m", "lmcore", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        while process.poll() is None and not (left := list(here.glob(".tmp-*"))):
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = list(here.glob(".tmp-*"))
        if left and not (here / "x").exists():
            break
        shutil.rmtree(here / "x", ignore_errors=True)
    assert left
    other = here / f".tmp-1-01234567-{'y'}"
    other.mkdir()  # of another name: not ours to judge
    assert lm(*command).code == 0
    assert list(here.glob(".tmp-*")) == [other]


def test_what_a_living_writer_holds_is_left_alone(tmp_path: Path) -> None:
    from lmcore import storage

    with storage.commit_directory(tmp_path / "x") as first:
        with storage.commit_directory(tmp_path / "x") as second:
            assert first.is_dir()
            assert second != first
        shutil.rmtree(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
