"""The output head with its loss: all logits at once, in chunks, and torch's own fused function, in time and memory.

    python benchmarks/loss.py [--tokens 2048] [--width 256] [--vocab 50304] [--repeats 5]

Every mode runs forward and backward in a process of its own (peak memory is per process); repeats are interleaved, so
that other work on the machine slows all modes alike, and time is that of the processor (one thread). Prints medians,
ratios and the error against float64. --device cuda: time of the device, and also both ways compiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def measure(mode: str, dtype_name: str, tokens: int, width: int, vocab: int, device: str) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    from lmcore.model.loss import head_cross_entropy
    from lmcore.training.device import peak_memory

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    hidden = torch.randn(tokens, width).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * 0.02).to(device).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,)).to(device)

    def loss() -> torch.Tensor:
        if mode == "all logits":
            return head_cross_entropy(hidden, weight, targets, vocab, chunk=0)[0]
        if mode == "chunks":
            return head_cross_entropy(hidden, weight, targets, vocab)[0]
        if mode == "compiled":
            return head_cross_entropy(hidden, weight, targets, vocab, fused=True)[0]
        if mode == "all compiled":
            return everything(hidden, weight.to(dtype), targets)
        return F.linear_cross_entropy(hidden, weight.to(dtype), targets, reduction="sum")

    @torch.compile(dynamic=False)
    def everything(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, w).float(), y, reduction="sum")

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    before = peak_memory(torch.device(device))
    total = loss()
    total.backward()
    peak = peak_memory(torch.device(device))
    with torch.no_grad():
        truth = head_cross_entropy(hidden.double(), weight.double(), targets, vocab, chunk=256)[0]
    began, turns = now(), 1 if device == "cpu" else 10
    for _ in range(turns):
        loss().backward()
    seconds = (now() - began) / turns
    return {"seconds": seconds, "mb": (peak - before) / 2**20, "error": abs(total.item() - truth.item()) / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--one", nargs=2, metavar=("MODE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = (options.tokens, options.width, options.vocab)
    if options.one:
        print(json.dumps(measure(options.one[0], options.one[1], *size, options.device)))
        return

    import torch
    import torch.nn.functional as F

    modes = ["all logits", "chunks"] + (["torch"] if hasattr(F, "linear_cross_entropy") else [])
    if options.device == "cuda":
        modes += ["all compiled", "compiled"]
    where = torch.cuda.get_device_name() if options.device == "cuda" else "1 thread"
    print(f"torch {torch.__version__}, {where}, {size[0]} tokens x {size[1]} x {size[2]} ids")
    for dtype in ("float32", "bfloat16") if options.device == "cpu" else ("bfloat16",):
        found: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
        for _ in range(options.repeats):
            for mode in modes:
                command = [sys.executable, __file__, "--one", mode, dtype]
                command += [
                    f"--tokens={size[0]}",
                    f"--width={size[1]}",
                    f"--vocab={size[2]}",
                    f"--device={options.device}",
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[mode].append(json.loads(done.stdout))
        base = statistics.median(r["seconds"] for r in found["all logits"])
        for mode in modes:
            seconds = statistics.median(r["seconds"] for r in found[mode])
            memory = statistics.median(r["mb"] for r in found[mode])
            error = max(r["error"] for r in found[mode])
            print(
                f"{dtype:9s} {mode:12s} {1000 * seconds:7.1f} ms ({base / seconds:4.2f}x)  +{memory:6.0f} MB  "
                f"loss error {error:.1e} nats/token"
            )


if __name__ == "__main__":
    main()
