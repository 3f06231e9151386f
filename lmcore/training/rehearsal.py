"""A rehearsal of the worst: does a killed and continued run give the bits of an undisturbed one, with this
configuration?

Two short runs of the user's own configuration in a temporary directory, in processes of their own. One is left alone;
the other is killed (SIGKILL) in the middle, twice, and continued by the same command. Weights, optimizer state and the
log (without its clock) must be equal to the last bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcore.errors import Exit, LmError
from lmcore.progress import SILENT, Progress
from lmcore.training import checkpoint
from lmcore.training.config import RunConfig
from lmcore.training.rundir import METRICS, read_metrics

STEPS = 9
KILL_AFTER = (2, 6)
_PATIENCE_S = 1800


@dataclass(frozen=True)
class Rehearsal:
    """What came of it."""

    same: bool
    differs: tuple[str, ...]
    """Which of weights, optimizer state and log are not equal."""
    undisturbed: str
    """sha256 of the weights of the run that was left alone."""
    killed: str
    """sha256 of the weights of the run that was killed."""
    steps: int
    kills: int
    seconds: float


def rehearse(config: RunConfig, *, progress: Progress = SILENT) -> Rehearsal:
    """Run both and compare. Raises LmError when one of them does not come to its end."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lm-rehearsal-") as folder:
        root = Path(folder)
        preset = root / "rehearsal.yaml"
        preset.write_text(_short(config).to_yaml())
        progress.note(f"{STEPS} steps without a disturbance")
        _start(root / "whole", preset).check()
        for number, step in enumerate(KILL_AFTER, start=1):
            progress.note(f"the same, killed after step {step}")
            _start(root / "killed", preset).kill_after(step, number)
        progress.note("and continued to its end")
        _start(root / "killed", preset).check()
        whole, killed = (_files(root / name) for name in ("whole", "killed"))
        differs = [
            name
            for name, file in (("weights", checkpoint.MODEL), ("optimizer state", checkpoint.OPTIMIZER))
            if whole[file]["sha256"] != killed[file]["sha256"]
        ]
        if _log(root / "whole") != _log(root / "killed"):
            differs.append("log")
    return Rehearsal(
        not differs,
        tuple(differs),
        whole[checkpoint.MODEL]["sha256"],
        killed[checkpoint.MODEL]["sha256"],
        STEPS,
        len(KILL_AFTER),
        time.monotonic() - began,
    )


def _short(config: RunConfig) -> RunConfig:
    """The configuration with few steps and with every kind of event in them."""
    train, warmup = config.train, config.optim.warmup_steps or 0
    changes: dict[str, Any] = {
        "steps": STEPS,
        "tokens": None,
        "max_minutes": None,
        "eval": train.eval.model_copy(update={"every_steps": 4, "tokens": config.model.context_length * 4}),
        "checkpoint": train.checkpoint.model_copy(update={"every_steps": 4}),
        "log": train.log.model_copy(update={"tensorboard": False, "wandb": None}),
    }
    return config.model_copy(
        update={
            "train": train.model_copy(update=changes),
            "optim": config.optim.model_copy(update={"warmup_steps": min(warmup, 3)}),
        }
    )


class _start:
    """A run in a process of its own."""

    def __init__(self, run: Path, preset: Path) -> None:
        self._run = run
        command = [sys.executable, "-m", "lmcore", "train", str(run), "--preset", str(preset)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ.copy()
        )

    def check(self) -> None:
        _, said = self._process.communicate(timeout=_PATIENCE_S)
        if self._process.returncode:
            raise LmError(
                f"the rehearsal could not run: {said.strip().splitlines()[-1] if said.strip() else 'no message'}",
                code=Exit(self._process.returncode) if self._process.returncode in list(Exit) else Exit.BUG,
            )

    def kill_after(self, step: int, number: int) -> None:
        log = self._run / METRICS
        deadline = time.monotonic() + _PATIENCE_S
        while self._process.poll() is None and time.monotonic() < deadline:
            if log.is_file() and any(line.get("step", 0) >= step for line in read_metrics(self._run)):
                break
            time.sleep(0.01)
        else:
            self.check()
            raise LmError(f"the rehearsal ended before kill number {number} at step {step}.", code=Exit.BUG)
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


def _files(run: Path) -> dict[str, Any]:
    newest = checkpoint.newest(run)
    if newest is None:
        raise LmError(f"{run}: the rehearsal left no checkpoint.", code=Exit.BUG)
    files = checkpoint.verify(newest)["files"]
    assert isinstance(files, dict)
    return files


def _log(run: Path) -> list[str]:
    return [
        json.dumps({key: value for key, value in line.items() if key not in ("time", "seconds")}, sort_keys=True)
        for line in read_metrics(run)
    ]
