"""Freed memory is used again while text streams through (heap.py): counted in page faults of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Blocks that grow: each is above the threshold that glibc has adapted to so far, so each is mapped anew by default.
FAULTS = """
import resource, sys
from lmcore.data.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for megabytes in range(1, 31):
    bytes(bytearray(megabytes << 20))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "ARROW_"))}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_blocks_are_used_again() -> None:
    assert int(run(FAULTS, "kept")) < 0.5 * int(run(FAULTS, "default"))


POOL = """
import sys
from lmcore.data.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import lmcore.data.readers, pyarrow
print(pyarrow.default_memory_pool().backend_name)
"""


def test_arrow_uses_the_heap_of_the_process_unless_the_user_chose() -> None:
    assert run(POOL, "kept") == "system"
    assert run(POOL, "kept", ARROW_DEFAULT_MEMORY_POOL="mimalloc") == "mimalloc"
    assert run(POOL, "default") == run("import pyarrow; print(pyarrow.default_memory_pool().backend_name)")
