"""The output head with its loss: all logits at once, in chunks, and torch's own fused function, in time and memory.

    python benchmarks/loss.py [--tokens 2048] [--width 256] [--vocab 50304] [--repeats 5]

Every mode runs forward and backward in a process of its own (peak memory is per process); repeats are interleaved, so
that other work on the machine slows all modes alike, and time is that of the processor (one thread). Prints medians,
ratios and the error against float64.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def measure(mode: str, dtype_name: str, tokens: int, width: int, vocab: int) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    from lmcore.model.loss import head_cross_entropy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * 0.02).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))

    def loss() -> torch.Tensor:
        if mode == "all logits":
            return head_cross_entropy(hidden, weight, targets, vocab, chunk=0)[0]
        if mode == "chunks":
            return head_cross_entropy(hidden, weight, targets, vocab)[0]
        return F.linear_cross_entropy(hidden, weight.to(dtype), targets, reduction="sum")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = loss()
    total.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        truth = head_cross_entropy(hidden.double(), weight.double(), targets, vocab, chunk=256)[0]
    began = time.process_time()
    loss().backward()
    seconds = time.process_time() - began
    return {"seconds": seconds, "mb": (peak - before) / 1024, "error": abs(total.item() - truth.item()) / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("MODE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = (options.tokens, options.width, options.vocab)
    if options.one:
        print(json.dumps(measure(options.one[0], options.one[1], *size)))
        return

    import torch
    import torch.nn.functional as F

    modes = ["all logits", "chunks"] + (["torch"] if hasattr(F, "linear_cross_entropy") else [])
    print(f"torch {torch.__version__}, 1 thread, {size[0]} tokens x {size[1]} x {size[2]} ids")
    for dtype in ("float32", "bfloat16"):
        found: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
        for _ in range(options.repeats):
            for mode in modes:
                command = [sys.executable, __file__, "--one", mode, dtype]
                command += [f"--tokens={size[0]}", f"--width={size[1]}", f"--vocab={size[2]}"]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[mode].append(json.loads(done.stdout))
        base = statistics.median(r["seconds"] for r in found["all logits"])
        for mode in modes:
            seconds = statistics.median(r["seconds"] for r in found[mode])
            memory = statistics.median(r["mb"] for r in found[mode])
            error = max(r["error"] for r in found[mode])
            print(
                f"{dtype:9s} {mode:11s} {1000 * seconds:7.0f} ms ({base / seconds:4.2f}x)  +{memory:6.0f} MB  "
                f"loss error {error:.1e} nats/token"
            )


if __name__ == "__main__":
    main()
