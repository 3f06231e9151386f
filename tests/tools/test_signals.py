"""A signal at any moment, from the entry of the program to its last line: one sentence, and 130 or 143."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_sets import write_set

ROOT = Path(__file__).parents[2]
DONE = {"train": {0, -signal.SIGINT, -signal.SIGTERM}, "tokenize": {0, -signal.SIGINT, -signal.SIGTERM}}
"""These finish what they are at and save: the process then ends by the signal itself."""


def start(here: Path, *arguments: str, program: tuple[str, ...] = ("-m", "lmcore"), **keywords) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        **keywords,
    )


def wait_for_the_entry(process: subprocess.Popen) -> None:
    """Until Python has begun with our first line: before it nobody can answer (Linux: the mask of caught signals)."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        mask = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt")).split()[1]
        if int(mask, 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("signals")
    write_set(here / "set", [b"some words to train on " * 20] * 300)
    (here / "texts").mkdir()
    for number in range(40):
        (here / "texts" / f"{number}.txt").write_text(f"{number} words " * 2000)
    (here / "tiny.yaml").write_text(
        "model: {d_model: 16, num_layers: 1, num_heads: 2, d_ff: 32, context_length: 32}\n"
        "train: {steps: 3, batch_tokens: 128, dtype: fp32, compile: false, threads: 1, device: cpu}\n"
    )
    done = start(here, "train", "runs/a", "-p", "tiny.yaml", "-d", "set", "-q").communicate(timeout=100)
    assert (here / "runs" / "a" / "checkpoints").is_dir(), done
    return here


COMMANDS = [
    ("--help",),
    ("validate", "set", "--deep"),
    ("tokenize", "texts", "--tokenizer", "byte", "--out", "{new}"),
    ("train", "{new}", "-p", "tiny.yaml", "-d", "set"),
    ("eval", "runs/a", "--data", "set", "--allow-overlap"),
    ("generate", "-c", "runs/a", "-p", "x", "-m", "100000"),
    ("plan", "nano"),
    ("export", "runs/a", "--format", "safetensors", "--out", "{new}.safetensors"),
]


def check(here: Path, command: tuple[str, ...], number: int, delay: float) -> None:
    new = f"new-{random.randrange(10**12)}"
    process = start(here, *(word.format(new=new) for word in command))
    wait_for_the_entry(process)
    time.sleep(delay)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode in {128 + number} | DONE.get(command[0], {0}), (process.returncode, said)
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    if process.returncode == 128 + number:
        ours = f"stopped by {signal.Signals(number).name}; nothing that was committed is lost.\n"
        assert said.count("stopped by") == 1
        assert said.endswith(ours)
    assert not [p.name for p in here.rglob(".tmp-*")] or process.returncode < 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("command", [COMMANDS[1], COMMANDS[3]], ids=lambda command: command[0])
def test_a_signal_during_the_imports(here: Path, command: tuple[str, ...], number: int) -> None:
    for delay in (0.0, 0.1, 0.5):
        check(here, command, number, delay)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_signal_at_any_moment(here: Path, command: tuple[str, ...]) -> None:
    delays = random.Random(7)
    for turn in range(12):
        check(here, command, (signal.SIGINT, signal.SIGTERM)[turn % 2], delays.uniform(0, 2))


def test_a_signal_while_the_main_thread_is_out_of_reach(tmp_path: Path) -> None:
    """Inside of a library that does not come back to Python for long."""
    script = (
        "import hashlib, lmcore.interrupt as i\n"
        "i.install()\n"
        "print(flush=True)\n"
        "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)\n"
    )
    process = start(tmp_path, script, program=("-c",))
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143
    assert said.count("stopped by SIGTERM") == 1


def test_the_console_script_is_this_entry() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lm": "lmcore.__main__:main"}
