"""The sum of the gradients over ranks: torch's all_reduce of one flat copy, and ours in buckets, fast and exact.

    python benchmarks/exchange.py [--preset gpt2-124m] [--ranks 2] [--repeats 7]

The ranks are processes of this machine that talk through gloo, one thread each. The ways take turns; a round is the
time of the slowest rank, copies included. `exact` makes the order of the sums the same on any number of ranks, `fast`
leaves it to all_reduce. Prints medians, ratios to the flat copy, and by how much the peak of a rank's memory grows in
the way's first round, the smallest first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any


def rank(number: int, size: int, shapes: list[tuple[int, ...]], repeats: int, port: int, results: Any) -> None:
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(number), "WORLD_SIZE": str(size)}
    import torch
    import torch.distributed as dist

    from lmcore.training.device import peak_memory
    from lmcore.training.lanes import LaneSum
    from lmcore.training.parallel import joined

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    with joined(cpu) as world:

        def ours(exact: bool) -> None:
            lanes = LaneSum(parameters, world, exact=exact)
            lanes.begin()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            lanes.end_lane(torch.zeros(1, dtype=torch.float64))
            lanes.finish()

        def flat() -> None:
            whole = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(whole)
            pieces = whole.split([gradient.numel() for gradient in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view(gradient.shape))

        ways = {"ours, fast": lambda: ours(False), "ours, exact": lambda: ours(True), "one flat all_reduce": flat}
        times: dict[str, list[float]] = {name: [] for name in ways}
        grown: dict[str, float] = {}
        for turn in range(repeats + 1):  # the first one connects the ranks
            for name, way in ways.items():
                before = peak_memory(cpu)
                dist.barrier()
                began = time.perf_counter()
                way()
                dist.barrier()
                if turn:
                    times[name].append(time.perf_counter() - began)
                else:
                    grown[name] = (peak_memory(cpu) - before) / 2**20
                for gradient in gradients:
                    gradient.mul_(1 / size)  # or the numbers grow without end
    if number == 0:
        results.put((times, grown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    import random

    import torch
    import torch.multiprocessing as mp

    from lmcore.model.model import LanguageModel
    from lmcore.training.config import read_preset
    from lmcore.training.plan import draft

    _, raw = read_preset(options.preset)
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in LanguageModel(draft(raw).config.model).parameters()]
    size = sum(torch.Size(shape).numel() for shape in shapes)
    what = f"{size:,} gradients in {len(shapes)} tensors"
    print(f"torch {torch.__version__}, {options.ranks} ranks, {options.preset}: {what}")
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    port = random.SystemRandom().randrange(20_000, 60_000)
    arguments = (options.ranks, shapes, options.repeats, port, results)
    mp.start_processes(rank, args=arguments, nprocs=options.ranks, start_method="spawn")
    times, grown = results.get()
    base = statistics.median(times["one flat all_reduce"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:20s} {1000 * median:7.0f} ms ({base / median:4.2f}x)  peak + {grown[name]:5.0f} MB")


if __name__ == "__main__":
    main()
