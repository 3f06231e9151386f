"""Peak memory of training steps against the plan: presets at reduced size, each in a process of its own.

    python benchmarks/memory.py [--only WORD] [--steps 4] [--dtype fp32]

The architecture, optimizer and activation checkpointing of a preset are kept; width, depth and context are cut so that
a step takes seconds. Measured is the largest resident size of the whole process (VmHWM) after some steps of the real
trainer (lanes, accumulation, optimizer); planned is the total of `lm plan`, without the copy for a checkpoint, which is
not written here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

SMALL = {"d_model": 512, "num_layers": 6, "num_heads": 8, "num_kv_heads": 0, "head_dim": 0, "d_ff": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense, Muon": ("gpt2-124m", {"model": {"context_length": 512}}),
    "dense, AdamW": ("random-offsets", {"model": {"context_length": 512}}),
    "dense, recomputing every second layer": ("large", {"model": {"context_length": 512}}),
    "dense, recomputing every layer": (
        "large",
        {"model": {"context_length": 512}, "train": {"activation_checkpointing": "full"}},
    ),
    "dense, vocabulary of 50,304": ("gpt2-124m", {"model": {"context_length": 512, "vocab_size": 50_304}}),
    "windows": ("local-global-680m", {"model": {"context_length": 1024, "window": 256, "num_kv_heads": 4}}),
    "resonance, AdamW": ("resonance-32k-small", {"model": {"context_length": 1024}}),
    "Mamba and attention": ("hybrid-830m", {"model": {"context_length": 512, "num_kv_heads": 4}}),
    "8 experts in every second layer": ("fineweb-moe", {"model": {"context_length": 512}}),
    "16 experts, gate, 8-bit AdamW": (
        "gated-moe-1.7b",
        {"model": {"context_length": 512, "num_kv_heads": 4, "moe": {"num_experts": 16, "d_expert": 256}}},
    ),
    "everything": (
        "moe-depth-5b",
        {"model": {"context_length": 512, "num_kv_heads": 4, "moe": {"num_experts": 8, "d_expert": 512}}},
    ),
}


def configuration(case: str, dtype: str) -> dict[str, Any]:
    from lmcore.config import merge
    from lmcore.training.config import read_preset

    preset, changes = CASES[case]
    _, raw = read_preset(preset)
    length = changes["model"]["context_length"]
    raw["train"] = {k: v for k, v in raw.get("train", {}).items() if k in ("activation_checkpointing", "reduce")}
    run = {"steps": 100, "batch_tokens": 4 * length, "micro_batch": 2, "lanes": 2, "dtype": dtype, "device": "cpu"}
    run |= {"checkpoint": {"background": False}, "reduce": "exact"}
    return merge(raw, {"model": SMALL | {"vocab_size": 8192}, "train": run, "data": {"train": "none"}}, changes)


def measure(case: str, dtype: str, steps: int) -> dict[str, float]:
    """In this process: planned and measured bytes."""
    import torch

    from lmcore.heap import bound_kernel_cache, keep_freed_memory
    from lmcore.model.model import LanguageModel
    from lmcore.optim.optimizer import build_optimizer
    from lmcore.training.batches import MicroBatch, Shape, StepBatch
    from lmcore.training.device import DTYPES, numerics, peak_memory
    from lmcore.training.guards import LossScale
    from lmcore.training.parallel import World
    from lmcore.training.plan import Target, draft, meta_optimizer, plan_memory
    from lmcore.training.step import Stepper

    bound_kernel_cache()
    keep_freed_memory()  # as the trainer does
    config = draft(configuration(case, dtype)).config
    model = LanguageModel(config.model).train()
    model.compute_dtype = None if dtype == "fp32" else DTYPES[dtype]
    model.checkpoint_every = config.train.checkpoint_every
    optimizer = build_optimizer(model.parameter_table(), config.optim, total_steps=config.total_steps)
    shape = Shape(4, 2, 2)
    stepper = Stepper(model, optimizer, World(), shape, seed=1, exact=True, scale=LossScale(False))
    length = config.model.context_length
    generator = torch.Generator().manual_seed(0)
    with numerics(deterministic=True, tf32=False, threads=1):
        for step in range(steps):
            tokens = torch.randint(0, config.model.vocab_size, (4, length + 1), generator=generator)
            x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            micro = tuple(MicroBatch(lane, True, 0, x[2 * lane :][:2], y[2 * lane :][:2]) for lane in range(2))
            stepper.gradients(StepBatch(step, 0, micro, 0.0))
            stepper.update(step, config.optim.clip)
    measured = peak_memory(torch.device("cpu"))
    target = Target("cpu", "cpu", dtype, 1e11, 1 << 40, "")
    plan = plan_memory(config, target, meta_optimizer(config)[0])
    return {"measured": measured, "planned": plan.total, **{f"plan {k}": v for k, v in plan.parts.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--parts", action="store_true", help="print the parts of each plan")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a.one, a.dtype, a.steps)))
        return
    print(f"{'':40} {'planned':>8} {'measured':>8}  ratio   (MB, {a.dtype})")
    for case in CASES:
        if a.only not in case:
            continue
        command = [sys.executable, __file__, "--one", case, "--dtype", a.dtype, "--steps", str(a.steps)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        planned, measured = found["planned"] / 1e6, found["measured"] / 1e6
        print(f"{case:40} {planned:8.0f} {measured:8.0f}   {planned / measured:.2f}", flush=True)
        if a.parts:
            print("   ", {k[5:]: round(v / 1e6) for k, v in found.items() if k.startswith("plan ")})


if __name__ == "__main__":
    main()
