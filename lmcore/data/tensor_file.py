"""Ids in a `.pt` file, found by a child process that may neither run code from it nor take the machine with it.

torch.load(weights_only=True) refuses to run what a file says, but its reader is still a parser of hostile bytes: a file
can ask for more memory than there is, or for ever. So the reading is done by a child under RLIMIT_AS and RLIMIT_CPU;
this process never parses the file. The child answers with one line of JSON per file: where in the file the ids lie
(torch stores a tensor as it is, so they can be mapped in place), or that it wrote them out as a plain array, or what is
wrong. When it dies, the file that it was reading is to blame, and another child reads the others.

Run as a script this file is the child; it imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_MEMORY_FREE = 512 << 20  # beside what torch itself takes
_MEMORY_PER_BYTE = 4  # a tensor, its storage, and copies of them
_CPU_FREE_S, _CPU_BYTES_PER_S = 30, 50_000_000


@dataclass(frozen=True)
class TensorIds:
    """The ids of one file: little-endian integers from byte `offset` of `path` on."""

    path: Path
    """The .pt file itself, or a temporary copy of its ids."""
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Refused:
    """Why a file gives no ids; `code` is the finding."""

    code: str
    message: str


def find_ids(paths: Sequence[Path]) -> dict[Path, TensorIds | Refused]:
    """The ids of every file, or why it has none."""
    found: dict[Path, TensorIds | Refused] = {}
    left = [*paths]
    while left:
        answers, said = _ask(left)
        for path, answer in zip(left, answers, strict=False):
            found[path] = (
                Refused(answer["code"], answer["message"])
                if "code" in answer
                else TensorIds(Path(answer["path"]), answer["dtype"], tuple(answer["shape"]), answer["offset"])
            )
        left = left[len(answers) :]
        if left:  # the child died while it read the first of them
            found[left[0]] = Refused("V206", f"reading it was stopped: {said}")
            left = left[1:]
    return found


def _ask(paths: Sequence[Path]) -> tuple[list[dict[str, Any]], str]:
    """(answers of one child for as many files as it lived for, how it died)."""
    copies = _copies()
    command = [sys.executable, "-P", __file__, copies, *(os.path.abspath(path) for path in paths)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # every thread reserves memory
    child = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    answers = [json.loads(line) for line in child.stdout.decode().splitlines()]
    if child.returncode < 0:
        return answers, f"it takes more time or memory than its size allows (signal {-child.returncode})"
    return answers, child.stderr.decode(errors="replace").strip().rpartition("\n")[2][:160] or "the reader died"


_FOLDER: list[tempfile.TemporaryDirectory[str]] = []


def _copies() -> str:
    """A folder for arrays that cannot be mapped in place; it goes with this process."""
    if not _FOLDER:
        _FOLDER.append(tempfile.TemporaryDirectory(prefix="lm-tensors-"))
    return _FOLDER[0].name


def new_copy() -> IO[bytes]:
    """An open temporary file for ids that cannot be mapped where they are; it goes with this process."""
    return tempfile.NamedTemporaryFile(dir=_copies(), delete=False)


# ---------------------------------------------------------------------------------------- the child


def _child(copies: str, paths: Sequence[str]) -> None:
    import torch

    for number, path in enumerate(paths):
        _limit(os.path.getsize(path))
        try:
            answer = _find(torch, path, os.path.join(copies, f"{os.getpid()}-{number}"))
        except MemoryError:
            answer = {"code": "V206", "message": "reading it takes more memory than its size allows"}
        print(json.dumps(answer), flush=True)


def _limit(size: int) -> None:
    """Memory and time from here on, by the size of the file; time alone where /proc does not say what is used."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    limits = {resource.RLIMIT_CPU: int(spent.ru_utime + spent.ru_stime) + _CPU_FREE_S + size // _CPU_BYTES_PER_S}
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = used + _MEMORY_FREE + _MEMORY_PER_BYTE * size
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _find(torch: Any, path: str, copy: str) -> dict[str, Any]:
    import numpy as np

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        return {"code": "V206", "message": _reason(error)}
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        tensors = [v for v in value if isinstance(v, torch.Tensor)]
        if len(tensors) != 1:
            return {"code": "V204", "message": f"holds {len(tensors)} tensors; one is expected"}
        value = tensors[0]
    if not isinstance(value, torch.Tensor):
        return {"code": "V204", "message": f"holds a {type(value).__name__}, not a tensor"}
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool or value.is_quantized:
        return {"code": "V204", "message": f"holds {value.dtype}, not integers"}
    if value.dim() not in (1, 2) or value.numel() == 0:
        return {"code": "V204", "message": f"the shape {tuple(value.shape)} is neither (N,) nor (N, T)"}
    if value.layout != torch.strided or value.device.type != "cpu":
        return {"code": "V204", "message": f"holds a {value.layout} tensor on {value.device}, not a plain one"}
    # An expanded tensor is a few bytes that pretend to be many; writing it out is bounded like reading it.
    if value.numel() * value.element_size() > _MEMORY_PER_BYTE * os.path.getsize(path) + _MEMORY_FREE:
        return {"code": "V206", "message": "its tensor is many times larger than the file"}
    array = value.numpy()
    answer = {"dtype": array.dtype.str, "shape": list(array.shape)}
    offset = _place(path, array) if value.is_contiguous() else None
    if offset is not None:
        return answer | {"path": path, "offset": offset}
    np.ascontiguousarray(array).tofile(copy)
    return answer | {"path": copy, "offset": 0}


def _place(path: str, array: Any) -> int | None:
    """Where in a zip file these very bytes are stored plain; None when they are not."""
    import numpy as np

    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < array.nbytes:
                continue
            file.seek(entry.header_offset + 26)
            name, extra = int.from_bytes(file.read(2), "little"), int.from_bytes(file.read(2), "little")
            offset = entry.header_offset + 30 + name + extra
            if offset + array.nbytes > os.path.getsize(path):
                continue
            stored = np.memmap(path, array.dtype, "r", offset, array.shape)
            if np.array_equal(stored, array):
                return offset
    return None


def _reason(error: Exception) -> str:
    """One line; torch's own advice (to load with weights_only=False) is the last thing to do here."""
    text = " ".join(str(error).split())
    for mark in ("Unsupported global: GLOBAL ", "unsupported GLOBAL "):
        if mark in text:
            return f"cannot be read without running code that it names ({text.partition(mark)[2].split()[0]:.80})"
    if "weights_only" in text or "Weights only" in text:
        return "cannot be read without running code that it names"
    return f"cannot be read as tensors ({text[:120] or type(error).__name__})"


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2:])
