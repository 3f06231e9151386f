"""Tokens per second of a training step against the plain way: one PyTorch script in fp32, eager and compiled.

usage: python benchmarks/step.py [--preset nano] [--rounds 7] [--threads N]

The plain way is what the small GPT trainers do on a CPU: fp32, scaled_dot_product_attention, torch.optim.AdamW,
clipping, `loss.item()` at each step; the same shapes (width, layers, heads, feed-forward, vocabulary, batch, context).
Rounds of all candidates are interleaved and medians are compared, so that a busy machine hits all alike. The last line
gives the share of the step that is neither forward, backward nor optimizer.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.config import build, merge
from lmcore.model.model import LanguageModel
from lmcore.optim.optimizer import build_optimizer
from lmcore.training.batches import MicroBatch, Shape, StepBatch
from lmcore.training.compilation import compile_step
from lmcore.training.config import RunConfig, read_preset, settled
from lmcore.training.device import DTYPES, numerics
from lmcore.training.guards import LossScale
from lmcore.training.parallel import World
from lmcore.training.resolve import resolve
from lmcore.training.step import Stepper


class PlainBlock(nn.Module):
    """Pre-norm attention and SwiGLU, written the usual way."""

    def __init__(self, d: int, heads: int, ff: int) -> None:
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.w13, self.w2 = nn.Linear(d, 2 * ff, bias=False), nn.Linear(ff, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (h.view(b, t, self.heads, -1).transpose(1, 2) for h in self.qkv(self.n1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        gate, up = self.w13(self.n2(x)).chunk(2, -1)
        return x + self.w2(F.silu(gate) * up)


class Plain(nn.Module):
    """The plain model with learned positions and a tied head."""

    def __init__(self, vocab: int, d: int, layers: int, heads: int, ff: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList(PlainBlock(d, heads, ff) for _ in range(layers))
        self.norm = nn.RMSNorm(d)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(F.linear(self.norm(h), self.tokens.weight).flatten(0, 1), y.flatten())


def require_finite(*numbers: float) -> None:
    """A step that computes nothing has no time."""
    if not all(map(math.isfinite, numbers)):
        raise SystemExit(f"wrong: a step gives {numbers}, so its time means nothing")


def plain(config: RunConfig, rows: list[tuple[Tensor, Tensor]], compiled: bool) -> Callable[[], None]:
    m = config.model
    model = Plain(m.padded_vocab, m.d_model, m.num_layers, m.num_heads, m.d_ff, m.context_length)
    run = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        for x, y in rows:
            loss = run(x, y) / len(rows)
            loss.backward()
            require_finite(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(
    config: RunConfig, rows: list[tuple[Tensor, Tensor]], compiled: bool, dtype: str, parts: list[tuple[float, ...]]
) -> Callable[[], None]:
    model = LanguageModel(config.model)
    model.compute_dtype = None if dtype == "fp32" else DTYPES[dtype]
    optimizer = build_optimizer(model.parameter_table(), config.optim, total_steps=config.total_steps)
    lanes = config.train.lanes
    assert isinstance(lanes, int)
    shape = Shape(config.rows, lanes, config.rows // lanes)
    stepper = Stepper(model, optimizer, World(), shape, seed=1, exact=True, scale=LossScale(False))
    x, y = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])
    micro = tuple(
        MicroBatch(lane, True, 0, a, b) for lane, (a, b) in enumerate(zip(x.chunk(lanes), y.chunk(lanes), strict=True))
    )
    if compiled:
        _, problem = compile_step(stepper, StepBatch(0, 0, micro, 0.0))
        if problem:
            raise SystemExit(f"wrong: {problem}")
    number = iter(range(10**9))

    def step() -> None:
        began = time.perf_counter()
        s = next(number) % config.total_steps
        numbers = stepper.gradients(StepBatch(s, 0, micro, 0.0))
        require_finite(numbers.loss, numbers.grad_norm)
        stepper.update(s, config.optim.clip)
        parts.append((time.perf_counter() - began, stepper.times.gradients, stepper.times.optimizer))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    _, raw = read_preset(a.preset)
    config = settled(build(RunConfig, merge(raw, {"model": {"vocab_size": 8192}})))
    config = resolve(config, torch.device("cpu"))
    fast = config.train.dtype  # what the machine is fast at: bf16, or fp32
    generator = np.random.default_rng(0)
    tokens = torch.from_numpy(generator.integers(0, 8192, (config.rows, config.model.context_length + 1)))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    micro = max(1, config.rows // 2)
    rows = list(zip(x.split(micro), y.split(micro), strict=True))
    parts: list[tuple[float, ...]] = []
    adamw = config.model_copy(update={"optim": config.optim.model_copy(update={"optimizer": "adamw"}).resolved(100)})
    candidates = {
        "plain fp32": plain(config, rows, False),
        "ours fp32, AdamW": ours(adamw, rows, False, "fp32", []),
        f"ours {fast}, Muon": ours(config, rows, False, fast, parts),
    }
    if fast != "fp32":
        candidates[f"ours {fast}, AdamW"] = ours(adamw, rows, False, fast, [])
    if not a.no_compile:
        candidates |= {
            "plain fp32 compiled": plain(config, rows, True),
            f"ours {fast} compiled, AdamW": ours(adamw, rows, True, fast, []),
            f"ours {fast} compiled, Muon": ours(config, rows, True, fast, []),
        }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with numerics(deterministic=True, tf32=False, threads=a.threads):
        for turn in range(a.rounds + 2):
            for name, step in candidates.items():
                began = time.perf_counter()
                step()
                if turn > 1:
                    times[name].append(time.perf_counter() - began)
    base = statistics.median(times["plain fp32"])
    print(f"{a.preset}: {config.batch_tokens:,} tokens per step, {a.threads} threads, {a.rounds} rounds")
    for name, found in times.items():
        middle = statistics.median(found)
        print(
            f"{name:26} {middle * 1e3:9.0f} ms  {config.batch_tokens / middle:9,.0f} tokens/s  {base / middle:5.2f} x"
        )
    overhead = statistics.median((t - g - o) / t for t, g, o in parts[2:])
    print(f"outside of gradients and optimizer: {100 * overhead:.2f} % of the step")


if __name__ == "__main__":
    main()
