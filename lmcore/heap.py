"""The memory of the process: what glibc and Arrow give back too early, and what oneDNN never gives back.

While text streams through, batches of a few megabytes come and go, a hundred per second. By default every one of them
is mapped anew, zeroed by the kernel page by page, and unmapped: by glibc, whose threshold for that starts low, and by
Arrow's own allocator, which gives memory back after milliseconds. That was a fifth of the time of `lm tokenize`. So
Arrow is told to use the one heap of the process, and that heap to keep more. Arrow reads its environment when it is
loaded, and its readers know no other way: whoever streams text calls `keep_freed_memory` before the import of what
imports Arrow, as `lm tokenize` does. A training step, too, asks for the same blocks as the one before.

oneDNN multiplies bf16 matrices on a CPU by code that it makes for each shape and keeps, with its scratch space, for the
last 1,024 shapes. Experts get another number of tokens at every batch, and texts have any length, so that is 1 to 3 GB
before anything is forgotten; `bound_kernel_cache` keeps 64.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED_BYTES = 32 << 20  # the largest value that glibc takes; larger blocks still go straight back
_KEPT_BYTES = 64 << 20  # at the top of each heap
_KEPT_SHAPES = 64


def keep_freed_memory() -> None:
    """Let freed blocks below 32 MiB be used again, in the whole process and from now on; by Arrow too, when it is not
    loaded yet and the user has not chosen otherwise.

    The thresholds are those that glibc reaches by itself after one block of 32 MiB was freed. Another C library is left
    alone.
    """
    if "pyarrow" not in sys.modules:
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def bound_kernel_cache() -> None:
    """Let oneDNN, and torch's own cache in front of it, keep the code of 64 shapes, unless the user chose otherwise.

    Works until the first product in bf16. A dense model needs about 40; 16 to 128 take the same time, with experts too
    (8 experts of width 192, ten steps: 555 MB instead of 1,279).
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KEPT_SHAPES))


def peak_resident_bytes() -> int:
    """The most main memory that this process held at any time.

    Not `ru_maxrss` where there is another way: Linux hands that of a process down to those that it starts.
    """
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
