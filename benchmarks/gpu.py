"""Training on one GPU: model FLOPs utilisation, tokens per second and peak memory, against a plain script and the plan.

    python benchmarks/gpu.py [--only WORD] [--steps 5] [--parts]

Every case is a process of its own: it builds the model, compiles, warms up, and takes steps of the real trainer
(Stepper: accumulation, norms, clipping, Muon, the loss on the host) on random tokens. Reported are the medians of the
steps after the first two. Utilisation counts the exact operations of forward and backward (`lm plan`), not those of
the optimizer, against the dense bf16 peak of the data sheet. The plain script is the usual one: bf16 autocast, fused
attention, torch.compile of the whole model, fused AdamW, any order of sums; ours is deterministic. The matrix product
is the limit that the chip reaches alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

VOCABULARY = 50_257
WIDE = {"model": {"d_model": 1024, "num_layers": 24, "num_heads": 16}}
SHORT = {"train": {"batch_tokens": 131_072, "activation_checkpointing": "none"}}
LONG = {"train": {"batch_tokens": 524_288, "activation_checkpointing": "none"}}
CASES: dict[str, dict[str, Any]] = {
    "124M": {"preset": "gpt2-124m", "micro": 64},
    "124M, FlashAttention-4": {"preset": "gpt2-124m", "micro": 64, "flash": "fa4"},
    "124M, plain script": {"preset": "gpt2-124m", "micro": 32, "plain": True},
    "124M, AdamW": {"preset": "gpt2-124m", "micro": 64, "change": {"optim": {"optimizer": "adamw"}}},
    "124M, any order of sums": {"preset": "gpt2-124m", "micro": 64, "free": True},
    "124M, eager": {"preset": "gpt2-124m", "micro": 64, "eager": True},
    "350M": {"preset": "gpt2-124m", "micro": 64, "change": {**WIDE, **SHORT}},
    "350M, FlashAttention-4": {"preset": "gpt2-124m", "micro": 64, "flash": "fa4", "change": {**WIDE, **LONG}},
    "350M, plain script": {"preset": "gpt2-124m", "micro": 32, "plain": True, "change": {**WIDE, **SHORT}},
    "1B": {"preset": "xl", "micro": 16, "change": SHORT},
    "1B, FlashAttention-4": {"preset": "xl", "micro": 16, "flash": "fa4", "change": LONG},
    "1B, plain script": {"preset": "xl", "micro": 8, "plain": True, "change": SHORT},
    "1B, recomputing every second": {
        "preset": "xl",
        "micro": 16,
        "change": {"train": {"batch_tokens": 131_072, "activation_checkpointing": "selective"}},
    },
    "8 experts in every second layer": {"preset": "fineweb-moe", "micro": 16, "change": SHORT},
    "Mamba and attention": {"preset": "hybrid-830m", "micro": 8, "change": SHORT},
}
COMMON = {"model": {"vocab_size": VOCABULARY}, "train": {"steps": 1000, "tokens": None, "dtype": "bf16"}}


def measure(case: dict[str, Any], steps: int, parts: bool, planned: bool) -> dict[str, Any]:
    """One case, in this process."""
    import torch

    from lmcore.config import merge
    from lmcore.model.plan import known_device, measure_peak, plan_model
    from lmcore.training.config import read_preset
    from lmcore.training.device import device_name, flash_attention, numerics
    from lmcore.training.plan import draft, find_target, meta_optimizer, plan_memory

    device = torch.device("cuda", 0)
    name = device_name(device)
    _, raw = read_preset(case["preset"])
    micro = {"train": {"micro_batch": case["micro"], "compile": not case.get("eager")}}
    config = draft(merge(raw, COMMON, case.get("change", {}), micro)).config
    plan = plan_model(config.model)
    peak = known_device(name)
    times, split = [], []
    with (
        numerics(deterministic=not (case.get("free") or case.get("plain")), tf32=False, threads=None),
        flash_attention(case.get("flash", "torch"), device, config.model.head_dim),
    ):
        began = time.perf_counter()
        step = plain(config, case["micro"]) if case.get("plain") else ours(config, case)
        step()
        first = time.perf_counter() - began
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            began = time.perf_counter()
            split.append(step())
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        same = None if case.get("plain") else step.repeats()  # type: ignore[attr-defined]
        if parts:
            _profile(step)
    seconds = statistics.median(times)
    tokens = config.batch_tokens / seconds
    memory: dict[str, int] = {}
    if planned:
        memory = plan_memory(config, find_target("cuda", "bf16"), meta_optimizer(config)[0]).parts
    return {
        "device": name,
        "ms": seconds * 1e3,
        "tokens_per_s": tokens,
        "mfu": tokens * plan.train_flops / peak.peak_flops if peak else None,
        "parameters": plan.parameters,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "planned_gb": sum(size for part, size in memory.items() if part not in ("program", "allocator")) / 1e9,
        "optimizer_ms": 1e3 * statistics.median(s for s in split) if split[0] else None,
        "first_s": first,
        "same": same,
        "matmul_tflops": measure_peak(device, torch.bfloat16) / 1e12,
    }


def ours(config: Any, case: dict[str, Any]) -> Callable[[], float]:
    """A step of the trainer; returns the seconds of its update, measured to its end on the device."""
    import torch
    from step import require_finite

    from lmcore.model.model import LanguageModel
    from lmcore.optim.optimizer import build_optimizer
    from lmcore.training.batches import MicroBatch, Shape, StepBatch
    from lmcore.training.compilation import compile_step
    from lmcore.training.guards import LossScale
    from lmcore.training.parallel import World
    from lmcore.training.step import Stepper

    world = World(device=torch.device("cuda", 0))
    with torch.device("meta"):  # drawing a billion weights on the CPU takes longer than the measurement
        model = LanguageModel(config.model)
    model.to_empty(device="cuda")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.02) if p.ndim > 1 else p.fill_(1.0)
        for b in model.buffers():
            b.zero_()
    model.compute_dtype = torch.bfloat16
    model.train()
    model.checkpoint_every = config.train.checkpoint_every
    optimizer = build_optimizer(model.parameter_table(), config.optim, total_steps=1000)
    shape = Shape(config.rows, 1, case["micro"])
    stepper = Stepper(model, optimizer, world, shape, seed=1, exact=False, scale=LossScale(False))
    length = config.model.context_length
    tokens = torch.randint(0, VOCABULARY, (config.rows, length + 1))
    x, y = (t.contiguous().pin_memory() for t in (tokens[:, :-1], tokens[:, 1:]))
    pairs = list(zip(x.split(case["micro"]), y.split(case["micro"]), strict=True))
    batch = StepBatch(0, 0, tuple(MicroBatch(0, i == len(pairs) - 1, 0, a, b) for i, (a, b) in enumerate(pairs)), 0.0)
    if config.train.compile:
        _, problem = compile_step(stepper, batch)
        assert not problem, problem
    number = iter(range(1000))

    def step() -> float:
        at = next(number)
        numbers = stepper.gradients(batch)
        require_finite(numbers.loss, numbers.grad_norm)
        began = time.perf_counter()
        stepper.update(at, config.optim.clip)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def repeats() -> bool:
        """Whether the gradients of a step have the same bits when they are computed again."""
        stepper.gradients(batch)
        once = [g.clone() for g in stepper.held_gradients() if g is not None]
        stepper.gradients(batch)
        again = [g for g in stepper.held_gradients() if g is not None]
        return all(torch.equal(a, b) for a, b in zip(once, again, strict=True))

    step.repeats = repeats  # type: ignore[attr-defined]
    return step


def plain(config: Any, micro: int) -> Callable[[], float]:
    """The usual script."""
    import torch
    from step import Plain, require_finite

    m = config.model
    with torch.device("cuda"):
        model = Plain(m.padded_vocab, m.d_model, m.num_layers, m.num_heads, m.d_ff, m.context_length)
    run = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, VOCABULARY, (config.rows, m.context_length + 1))
    x, y = (t.contiguous().pin_memory() for t in (tokens[:, :-1], tokens[:, 1:]))
    rows = list(zip(x.split(micro), y.split(micro), strict=True))

    def step() -> float:
        for a, b in rows:
            with torch.autocast("cuda", torch.bfloat16):
                loss = run(a.cuda(non_blocking=True), b.cuda(non_blocking=True)) / len(rows)
            loss.backward()
        require_finite(loss.item())
        began = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    return step


def _profile(step: Callable[[], float]) -> None:
    """Where the time on the device goes, to stderr."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
    print(
        found.key_averages().table(sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=70),
        file=sys.stderr,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases of these names, separated by ;")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--parts", action="store_true", help="profile one more step of each case")
    parser.add_argument("--no-plan", action="store_true", help="leave out the planned memory, which takes seconds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(CASES[a.one], a.steps, a.parts, not a.no_plan)))
        return
    wanted = [word for word in a.only.split(";") if word]
    print(
        f"{'':31} {'ms/step':>8} {'tokens/s':>10} {'MFU':>6} {'optimizer':>9} {'GB':>6} {'planned':>8} {'first':>7}",
        flush=True,
    )
    for case in CASES:
        if wanted and case not in wanted:
            continue
        command = [sys.executable, __file__, "--one", case, "--steps", str(a.steps), *(["--parts"] if a.parts else [])]
        command += ["--no-plan"] if a.no_plan else []
        process = subprocess.run(command, capture_output=True, text=True)
        if a.parts or process.returncode:
            print(process.stderr[-9000:])
        if process.returncode:
            print(f"{case:31} failed", flush=True)
            continue
        f = json.loads(process.stdout.splitlines()[-1])
        print(
            f"{case:31} {f['ms']:8.1f} {f['tokens_per_s']:10,.0f} {100 * (f['mfu'] or 0):5.1f}% "
            f"{f['optimizer_ms'] or 0:6.1f} ms {f['peak_gb']:6.1f} {f['planned_gb']:8.1f} {f['first_s']:5.0f} s   "
            f"{ {True: 'same bits', False: 'other bits', None: ''}[f['same']]:10} "
            f"{f['device']}, {f['parameters'] / 1e6:.0f}M, a product reaches {f['matmul_tflops']:.0f} TFLOP/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
