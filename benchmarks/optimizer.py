"""Muon: time of a step against torch.optim.Muon and AdamW, and steps to the same loss on real text.

    python benchmarks/optimizer.py            step times (about a minute)
    python benchmarks/optimizer.py --train    also trains small models on the standard library's source (some minutes)

Times are medians of interleaved repeats and given as ratios, so that a busy machine changes both sides alike. The
matrices are those of a 12-layer, 384-wide model: fused qkv and feed-forward weights, of which ours are split and
theirs are not (torch.optim.Muon cannot), so ours does more and smaller products.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.optim.config import OptimConfig
from lmcore.optim.muon import Muon
from lmcore.optim.optimizer import build_optimizer


def step_times(layers: int, width: int, repeats: int, device: str) -> None:
    shapes = [(3 * width, width), (width, width), (2 * 8 * width // 3, width), (width, 8 * width // 3)] * layers
    splits = [(width,) * 3, (), (8 * width // 3,) * 2, ()] * layers

    def parameters() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        made = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]
        for p in made:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        return made

    def ours(**options: object) -> Callable[[], object]:
        groups = [{"params": [p], "splits": s} for p, s in zip(parameters(), splits, strict=True)]
        by_split: dict[object, list[torch.Tensor]] = {}
        for group in groups:
            by_split.setdefault(group["splits"], []).extend(group["params"])
        merged = [{"params": params, "splits": split} for split, params in by_split.items()]
        return Muon(merged, lr=1e-3, **options).step  # type: ignore[arg-type]

    contestants: dict[str, Callable[[], object]] = {
        "ours, Polar Express": ours(),
        "ours, Newton-Schulz": ours(method="newton-schulz"),
        "ours, NorMuon, cautious": ours(normuon=True, cautious=True, weight_decay=0.1),
        "ours, fp32 (Gram form)": ours(dtype=torch.float32),
        "torch.optim.Muon": torch.optim.Muon(parameters(), lr=1e-3).step,
        "AdamW, fused": torch.optim.AdamW(parameters(), fused=True).step,
        "AdamW, torch's default": torch.optim.AdamW(parameters()).step,
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    reference = statistics.median(times["torch.optim.Muon"])
    count = sum(a * b for a, b in shapes)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{count:,} parameters, {where}, median of {repeats}; 1.00 = torch.optim.Muon")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"  {name:26} {median * 1e3:9.1f} ms   {median / reference:5.2f}")


def corpus(size: int) -> torch.Tensor:
    """Source text of the standard library as bytes; the last tenth is for validation."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    raw = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:size]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()


def train(text: torch.Tensor, steps: int, rows: int, length: int, **options: object) -> list[float]:
    """Validation losses every 20 steps."""
    config = ModelConfig(vocab_size=256, d_model=128, num_layers=4, num_heads=4, context_length=length)
    model = LanguageModel(config).train()
    split = len(text) * 9 // 10
    optimizer = build_optimizer(model.parameter_table(), OptimConfig(**options), total_steps=steps)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    held_out = torch.randint(split, len(text) - length - 1, (32,), generator=generator).tolist()
    losses = []
    for step in range(steps):
        starts = torch.randint(0, split - length - 1, (rows,), generator=generator).tolist()
        window = torch.stack([text[s : s + length + 1] for s in starts])
        model.loss(window[:, :-1], window[:, 1:]).objective().backward()
        optimizer.step(step)
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            model.eval()
            with torch.no_grad():
                window = torch.stack([text[s : s + length + 1] for s in held_out])
                losses.append(float(model.loss(window[:, :-1], window[:, 1:]).objective()))
            model.train()
    return losses


def compare_training(steps: int) -> None:
    text = corpus(4_000_000)
    runs: dict[str, dict[str, object]] = {
        "muon (defaults)": {"optimizer": "muon"},
        "muon, decay 0": {"optimizer": "muon", "weight_decay": 0.0},
        "muon, size rules": {"optimizer": "muon", "lr": 0.0025, "embedding_lr": 0.0375, "head_lr": 0.001,
                             "scalar_lr": 0.0019, "weight_decay": 7.0},
        "muon, normuon": {"optimizer": "muon", "normuon": True},
        "adamw, lr 1e-3": {"optimizer": "adamw", "lr": 1e-3},
        "adamw, lr 3e-3": {"optimizer": "adamw", "lr": 3e-3},
        "adamw, lr 6e-3": {"optimizer": "adamw", "lr": 6e-3},
    }  # fmt: skip
    curves = {}
    for name, options in runs.items():
        start = time.perf_counter()
        curves[name] = train(text, steps, 8, 128, **options)
        shown = ", ".join(f"{loss:.3f}" for loss in curves[name][:: max(1, len(curves[name]) // 6)])
        print(f"  {name:20} final {curves[name][-1]:.4f}   ({shown})   {time.perf_counter() - start:.0f} s", flush=True)
    best = min((curve[-1], name) for name, curve in curves.items() if name.startswith("adamw"))
    for name, curve in curves.items():
        if name.startswith("muon"):
            reached = next((20 * (i + 1) for i, loss in enumerate(curve) if loss <= best[0]), None)
            share = f"{reached} steps = {reached / steps:.2f}" if reached else "not reached"
            print(f"  {name}: the final loss of {best[1]} ({best[0]:.4f}) after {share}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    step_times(arguments.layers, arguments.width, arguments.repeats, arguments.device)
    if arguments.train:
        compare_training(arguments.steps)
