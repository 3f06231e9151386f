"""Fixtures for everybody: tiny shard sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_sets import TinySet, random_documents, write_set


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., TinySet]:
    """make_set("name", documents=..., rows=...) writes a set below the test's directory."""

    def make(name: str = "set", documents: Sequence[bytes] | None = None, **keywords: Any) -> TinySet:
        if documents is None:
            documents = random_documents(7, 60, 700)
        return write_set(tmp_path / name, documents, **keywords)

    return make


@pytest.fixture
def tiny_set(make_set: Callable[..., TinySet]) -> TinySet:
    """60 documents of up to 700 bytes in shards of two rows."""
    return make_set()
