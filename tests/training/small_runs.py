"""Tiny runs: a model of a few thousand parameters on a few thousand tokens, so that a step takes milliseconds."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcore.config import dump_yaml, merge, parse_overrides
from lmcore.training.launch import Launch, prepare
from lmcore.training.loop import RunResult, train
from lmcore.training.observe import Silent
from lmcore.training.rundir import read_metrics

ROOT = Path(__file__).parents[2]
TINY = {
    "model": {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "context_length": 32},
    "optim": {"optimizer": "muon", "warmup_steps": 4},
    "train": {
        "steps": 12,
        "batch_tokens": 256,
        "dtype": "fp32",
        "compile": False,
        "device": "cpu",
        "eval": {"every_steps": 6, "tokens": 512},
        "checkpoint": {"every_steps": 4, "background": False, "space_check": False},
    },
}


class Crash(Exception):
    """Stands for a process that ends without a word."""


class Watch(Silent):
    """Keeps what a run says, and can crash it or act at a step."""

    def __init__(self, at: dict[int, Callable[[], None]] | None = None) -> None:
        self.at = at or {}
        self.said: list[str] = []
        self.steps: list[int] = []

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record["step"])
        if record["step"] in self.at:
            self.at[record["step"]]()

    def note(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        self.said.append(f"warning: {message}")


def crash() -> None:
    raise Crash


def hashes(run: Path) -> dict[str, str]:
    """sha256 of weights and of optimizer state in the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = json.loads((newest / "COMMIT.json").read_text())["files"]
    return {"step": newest.name, **{n: files[n]["sha256"] for n in ("model.safetensors", "optimizer.safetensors")}}


def curve(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    return [{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in read_metrics(run)]


class Lab:
    """Prepares and runs tiny runs on one tiny set."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.data = root, data

    def prepare(self, name: str, *settings: str, resume: bool = False, override: tuple[str, ...] = ()) -> Launch:
        preset = merge(TINY, {"data": {"train": str(self.data)}})
        typed, overrides = parse_overrides(settings), parse_overrides(override)
        if resume:
            return prepare(self.root / name, typed=typed, overrides=overrides, resume=True)
        return prepare(self.root / name, preset=preset, typed=typed, overrides=overrides)

    def run(self, name: str, *settings: str, watch: Watch | None = None, **keywords: Any) -> RunResult:
        return train(self.prepare(name, *settings, **keywords), observer=watch or Watch())

    def preset(self, changes: dict[str, Any] | None = None) -> Path:
        """A YAML file with the tiny configuration on the tiny set, for `lm train --preset`."""
        self.root.mkdir(exist_ok=True)
        file = self.root / "tiny.yaml"
        file.write_text(dump_yaml(merge(TINY, {"data": {"train": str(self.data)}}, changes or {})))
        return file

    def start_ranks(self, count: int, name: str, *settings: str) -> list[subprocess.Popen[str]]:
        """The ranks of a run as processes, as a launcher without supervision would start them."""
        return self.start_machines([{"arguments": (str(self.root / name),)}] * count, *settings)

    def start_machines(self, places: Sequence[Mapping[str, Any]], *settings: str) -> list[subprocess.Popen[str]]:
        """The same with `arguments` for each rank alone, and with the program of its `home`/code if it has one."""
        typed = itertools.chain.from_iterable(("--set", setting) for setting in settings)
        shared = ["--preset", str(self.preset()), *typed]
        port = str(random.SystemRandom().randrange(20_000, 60_000))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(places))}
        started = []
        for rank, place in enumerate(places):
            code = place.get("home", ROOT) / "code"
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(code if code.is_dir() else ROOT),
                **(meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if len(places) > 1 else {}),
            }
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "lmcore", "train", *shared, *place["arguments"]],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                    cwd=code if code.is_dir() else None,
                )
            )
        return started

    def run_ranks(self, count: int, name: str, *settings: str) -> None:
        """Start ranks and wait until all have finished well."""
        for rank in self.start_ranks(count, name, *settings):
            _, said = rank.communicate(timeout=300)
            assert rank.returncode == 0, said

    def wait_for_step(self, name: str, step: int, ranks: list[subprocess.Popen[str]]) -> None:
        """Until the log of a run that is under way has so many lines."""
        log = self.root / name / "metrics.jsonl"
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and all(rank.poll() is None for rank in ranks):
            if log.is_file() and log.read_bytes().count(b"\n") >= step:
                return
            time.sleep(0.01)
        for rank in ranks:
            rank.kill()
        raise AssertionError([rank.communicate() for rank in ranks])
