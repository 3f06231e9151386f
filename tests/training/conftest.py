"""Fixtures of the training tests; what they are made of lies in small_runs.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import Lab


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def lab(tmp_path: Path, make_set: Callable[..., Any]) -> Lab:
    from lmcore.data.split import split_set

    made = make_set("data")
    split_set(made.path, fractions={"val": 0.2})
    return Lab(tmp_path / "runs", made.path)
