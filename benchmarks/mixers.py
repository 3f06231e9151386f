"""Training time and memory of every mixer from 2,048 to 32,768 tokens of context.

    python benchmarks/mixers.py --plot docs/mixers.png
    python benchmarks/mixers.py --layers 16 --lengths 32768 --recompute --mixers AWMRF --memory     a whole step at 32k

One sequence, forward and backward of mixer blocks without feed-forwards, each (mixer, length) in a process of its own
so that peak memory is its own. Time is that of the processor (one thread), which other work on the machine hardly
changes. The slope is the exponent of time in length: 1 is linear, 2 quadratic. Planned memory is what `lm plan` says
for activations, temporary tensors and the allocator.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time

NAMES = {"A": "attention", "W": "window 1024", "M": "Mamba-2", "R": "routed Mamba", "F": "resonance"}


def measure(
    letter: str, length: int, width: int, layers: int, repeats: int, recompute: bool, dtype: str
) -> dict[str, float]:
    import torch

    from lmcore.model.config import ModelConfig
    from lmcore.model.model import LanguageModel
    from lmcore.training.config import RunConfig, TrainConfig
    from lmcore.training.device import DTYPES, peak_memory
    from lmcore.training.plan import Target, meta_optimizer, plan_memory

    config = ModelConfig(
        vocab_size=256,
        d_model=width,
        num_layers=layers,
        num_heads=max(1, width // 32),
        pattern=letter,
        ffn="-",
        window=1024,
        context_length=length,
        rope_theta=1e6,
        mamba={"head_dim": 32, "d_state": 32},
    )
    torch.set_num_threads(1)
    model = LanguageModel(config)
    model.compute_dtype = DTYPES[dtype]
    model.checkpoint_every = int(recompute)
    tokens = torch.randint(0, 256, (1, length + 1))
    model.loss(tokens[:, :64], tokens[:, 1:65]).objective().backward()  # libraries load what they need, gradients exist
    before = peak_memory(torch.device("cpu"))
    times = []
    for _ in range(repeats + (repeats > 1)):
        began = time.process_time()
        model.loss(tokens[:, :-1], tokens[:, 1:]).objective().backward()
        times.append(time.process_time() - began)
    peak = peak_memory(torch.device("cpu"))
    train = TrainConfig(steps=1, batch_tokens=length, activation_checkpointing="full" if recompute else "none")
    run = RunConfig(model=config, train=train)
    parts = plan_memory(run, Target("cpu", "cpu", dtype, None, None, ""), meta_optimizer(run)[0]).parts
    planned = sum(parts.get(name, 0) for name in ("activations", "temporary", "allocator"))
    return {
        "seconds": statistics.median(times[repeats > 1 :]),
        "mb": (peak - before) / 2**20,
        "planned_mb": planned / 2**20,
    }


def run(command: list[str], changes: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **changes})
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16_384, 32_768])
    parser.add_argument("--mixers", default="AWMF")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--recompute", action="store_true", help="recompute every block in the backward pass")
    parser.add_argument("--memory", action="store_true", help="memory only: the time is that of the slower allocator")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--plot", help="file for the plot, .png or .svg")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--one", nargs=2, metavar=("MIXER", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        letter, length = options.one
        size = (options.width, options.layers, options.repeats, options.recompute, options.dtype)
        print(json.dumps(measure(letter, int(length), *size)))
        return

    import torch

    print(f"torch {torch.__version__}, {options.dtype}, 1 thread, width {options.width}, {options.layers} layers")
    found: dict[str, dict[int, dict[str, float]]] = {letter: {} for letter in options.mixers}
    for length in options.lengths:
        for letter in options.mixers:
            command = [sys.executable, __file__, "--one", letter, str(length), f"--width={options.width}"]
            command += [f"--layers={options.layers}", f"--repeats={options.repeats}", f"--dtype={options.dtype}"]
            command += ["--recompute"] if options.recompute else []
            # Time and memory apart: glibc keeps freed blocks below 32 MB in a fragmented heap (3x at width 64); with a
            # small threshold it returns them, which costs time.
            tight = run(command, {"MALLOC_MMAP_THRESHOLD_": "262144"})
            result = tight if options.memory else run(command, {})
            result |= {"mb": tight["mb"], "planned_mb": tight["planned_mb"]}
            found[letter][length] = result
            rate = length / result["seconds"]
            print(
                f"{NAMES.get(letter, letter):12s} {length:6d} tokens  {result['seconds']:8.3f} s  {rate:9,.0f} tok/s  "
                f"+{result['mb']:6.0f} MB (planned {result['planned_mb']:.0f})",
                flush=True,
            )
    for letter, results in found.items():
        if len(results) > 1:
            first, last = min(results), max(results)
            ratio = results[last]["seconds"] / results[first]["seconds"]
            print(
                f"{NAMES.get(letter, letter):12s} time grows with length^{math.log(ratio) / math.log(last / first):.2f}"
            )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({NAMES.get(k, k): v for k, v in found.items()}, file, indent=1)
    if options.plot:
        plot(found, options.plot)


def plot(found: dict[str, dict[int, dict[str, float]]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for letter, results in found.items():
        lengths = sorted(results)
        speed.loglog(
            lengths, [results[n]["seconds"] for n in lengths], marker="o", base=2, label=NAMES.get(letter, letter)
        )
        memory.loglog(lengths, [results[n]["mb"] for n in lengths], marker="o", base=2, label=NAMES.get(letter, letter))
    speed.set_title("forward and backward, processor seconds")
    memory.set_title("memory above the start, MB")
    for axes in (speed, memory):
        axes.set_xlabel("tokens of context")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
