"""One way to call a command as a user does: through `main`, with its exit code, stdout and stderr."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """lm("split", path, "--json") runs the command in this process and returns what a user would have seen."""

    def run(*arguments: object, stdin: str | bytes = "") -> Outcome:
        from lmcore.tools.cli import main

        raw = stdin.encode() if isinstance(stdin, str) else stdin
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("NO_COLOR", "1")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
            try:
                main([str(argument) for argument in arguments])
                code = 0
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def lm_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same in a process of its own: for signals, pipes, exit statuses and time."""

    def run(*arguments: object, timeout: float = 120, **keywords: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.update(keywords.pop("env", {}))  # type: ignore[call-overload]
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            [sys.executable, "-m", "lmcore", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
            **keywords,
        )

    return run
