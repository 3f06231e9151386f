"""What the data cost a step: rows per second of the loader thread, and how long a step waits for its batch.

usage: python benchmarks/loader.py SET [--context 1024] [--rows 32] [--steps 200] [--work-ms 20]
"""

from __future__ import annotations

import argparse
import time

from lmcore.data.sampler import Sampler
from lmcore.data.stream import TokenStream
from lmcore.training.batches import Loader, Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work-ms", type=float, default=20.0)
    a = parser.parse_args()
    stream = TokenStream.open(a.path)
    sampler = Sampler(stream, context_length=a.context, seed=1)
    shape = Shape(a.rows, 1, a.rows)
    for work in (0.0, a.work_ms / 1e3):
        waited = 0.0
        began = time.perf_counter()
        with Loader(sampler, shape, vocab_size=1 << 32, step=0, sample=0, steps=a.steps) as loader:
            batches = iter(loader)
            for _ in range(a.steps):
                asked = time.perf_counter()
                next(batches)
                waited += time.perf_counter() - asked
                if work:
                    time.sleep(work)
        seconds = time.perf_counter() - began
        tokens = a.steps * a.rows * a.context
        if work:
            print(
                f"beside steps of {a.work_ms:g} ms: waiting {1e6 * waited / a.steps:,.0f} us per step "
                f"({100 * waited / seconds:.2f} % of the time)"
            )
        else:
            print(
                f"reading alone: {tokens / seconds / 1e6:,.1f} M tokens/s, {1e6 * seconds / a.steps:,.0f} us per batch"
            )


if __name__ == "__main__":
    main()
