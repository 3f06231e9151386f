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
from lmcore.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for megabytes in range(1, 31):
    bytes(bytearray(megabytes << 20))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


CHOSEN = ("MALLOC_", "ARROW_", "ONEDNN_", "LRU_")
"""What a user may have chosen in the environment."""


def run(code: str, *arguments: str, **environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(CHOSEN)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_blocks_are_used_again() -> None:
    assert int(run(FAULTS, "kept")) < 0.5 * int(run(FAULTS, "default"))


POOL = """
import sys
from lmcore.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import lmcore.data.readers, pyarrow
print(pyarrow.default_memory_pool().backend_name)
"""


def test_arrow_uses_the_heap_of_the_process_unless_the_user_chose() -> None:
    assert run(POOL, "kept") == "system"
    assert run(POOL, "kept", ARROW_DEFAULT_MEMORY_POOL="mimalloc") == "mimalloc"
    assert run(POOL, "default") == run("import pyarrow; print(pyarrow.default_memory_pool().backend_name)")


SHAPES = """
import sys
import torch
from lmcore.heap import bound_kernel_cache
if sys.argv[1] == "bounded":
    bound_kernel_cache()
torch.set_num_threads(1)
weight = torch.randn(2048, 512).bfloat16()
for rows in range(1, 400):
    torch.nn.functional.linear(torch.zeros(rows, 512, dtype=torch.bfloat16), weight)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")
def test_products_of_ever_other_shapes_do_not_fill_the_memory() -> None:
    from lmcore.training.device import cpu_bf16

    if not cpu_bf16():
        pytest.skip("this CPU has no bf16: oneDNN makes no code for it")
    assert int(run(SHAPES, "bounded")) < int(run(SHAPES, "default")) - 50
