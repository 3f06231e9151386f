"""Experts: one grouped matrix product against a loop over the experts, forward and backward.

    python benchmarks/experts.py [--device cuda] [--tokens 64 1024 8192] [--threads 1]

Each line is one pair of products of a SwiGLU expert (w13 and w2) on tokens of random routing, top-2. The two ways
take turns; medians of both (on a CPU: of processor time) and their ratio (below 1: grouped is faster). The rule that
follows from it is `grouped_linear` in lmcore/model/routing.py.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcore.model.routing import dispatch, grouped, looped

SHAPES = [(192, 256, 8), (512, 256, 16), (1024, 512, 64)]
"""(width, width of an expert, experts)"""


def expert_pass(product, x: Tensor, w13: Tensor, w2: Tensor, counts: Tensor) -> Tensor:
    a, b = product(x, w13, counts).chunk(2, -1)
    return product(F.silu(a) * b, w2, counts)


def seconds(product, inputs: tuple[Tensor, ...], *, train: bool) -> float:
    clock = time.perf_counter if inputs[0].is_cuda else time.process_time  # of the processor: other work counts less
    for tensor in inputs[:3]:
        tensor.grad = None
    began = clock()
    with torch.set_grad_enabled(train):
        y = expert_pass(product, *inputs)
        if train:
            y.backward(torch.ones_like(y))
    if y.is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024, 4096])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, top-2, milliseconds")
    print(f"{'dtype':9s} {'d x f x E':16s} {'tokens':>6s}   {'forward':^26s}   {'forward and backward':^26s}")
    for name in options.dtypes:
        dtype = getattr(torch, name)
        for width, inner, experts in SHAPES:
            for tokens in options.tokens:
                torch.manual_seed(0)
                ids = torch.rand(tokens, experts, device=options.device).topk(2).indices
                plan = dispatch(ids, experts)
                x = plan.spread(torch.randn(tokens, width, device=options.device, dtype=dtype)).requires_grad_()
                w13 = torch.randn(experts, 2 * inner, width, device=options.device, dtype=dtype).requires_grad_()
                w2 = torch.randn(experts, width, inner, device=options.device, dtype=dtype).requires_grad_()
                inputs, cells = (x, w13, w2, plan.counts), []
                for train in (False, True):
                    taken: dict[object, list[float]] = {grouped: [], looped: []}
                    for turn in range(options.repeats + 2):
                        for product, times in taken.items():
                            used = seconds(product, inputs, train=train)
                            if turn >= 2:
                                times.append(1e3 * used)
                    one, other = (statistics.median(times) for times in taken.values())
                    cells.append(f"{one:8.2f} {other:8.2f} {one / other:7.2f}")
                print(f"{name:9s} {f'{width} x {inner} x {experts}':16s} {tokens:6d}   {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
