"""How long a checkpoint keeps the training waiting: written in the background, written in place, and torch.save.

usage: python benchmarks/checkpoint.py [--mib 256] [--rounds 5] [--out DIR]

torch.save writes a pickle without fsync; the other two are durable and hashed (see lmcore/training/checkpoint.py).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lmcore.training.checkpoint import Snapshot
from lmcore.training.writer import CheckpointWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=None)
    a = parser.parse_args()
    each = a.mib * (1 << 20) // 4 // 3
    tensors = [torch.randn(each) for _ in range(3)]
    found: dict[str, list[float]] = {
        "background, stall": [],
        "background, until durable": [],
        "in place": [],
        "torch.save": [],
    }
    with tempfile.TemporaryDirectory(dir=a.out) as folder:
        writers = {
            kind: CheckpointWriter(Path(folder) / kind, keep=1, keep_every=None, background=kind == "background")
            for kind in ("background", "in place")
        }
        for step in range(1, a.rounds + 1):
            snapshot = Snapshot(step, {"w": tensors[0]}, {"m": tensors[1], "v": tensors[2]}, {"step": step}, b"", None)
            began = time.perf_counter()
            writers["background"].save(snapshot)
            found["background, stall"].append(time.perf_counter() - began)
            writers["background"].wait()
            found["background, until durable"].append(time.perf_counter() - began)
            began = time.perf_counter()
            writers["in place"].save(snapshot)
            found["in place"].append(time.perf_counter() - began)
            began = time.perf_counter()
            torch.save(dict(enumerate(tensors)), Path(folder) / "x.pt")
            found["torch.save"].append(time.perf_counter() - began)
    print(f"{a.mib} MiB of tensors, {a.rounds} rounds, medians")
    for name, times in found.items():
        print(f"{name:26} {1e3 * statistics.median(times):8.0f} ms")


if __name__ == "__main__":
    main()
