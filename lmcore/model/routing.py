"""Sending tokens to experts: the router, the dispatch and the grouped product that mixtures and routed Mamba share.

    s = softmax(x W_r)  or  sigmoid(x W_r)                 scores, in fp32 or better; W_r: (E, D)
    chosen = topk(s + b),   w = s[chosen]                  the bias b selects, it never weighs
    w <- w / sum(w)  (when k > 1),   w <- scale * w

Keeping the experts busy (E experts, c_e tokens sent to e, f_e = c_e / sum c, P_e = mean share of score):
    bias       b_e += u sign(mean(c) - c_e) after each step, minus its mean     arXiv:2408.15664; no gradient is touched
    balance    E sum_e f_e P_e: 1 when uniform, E when one expert takes all    Switch, arXiv:2101.03961
    z          mean(logsumexp(x W_r)^2): keeps logits small                      ST-MoE, arXiv:2202.08906

c and f count a whole step: f is what has been seen of the step so far (over micro-batches, and over devices when the
caller sums them), because balance inside every micro-batch is a much harder demand that hurts (arXiv:2501.11873). What
a router counted is returned as `RouterStats`; the model adds it up, so recomputed blocks cannot count twice.

Shapes: N tokens, D width, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmcore.model.layers import wide
from lmcore.model.parameters import Owner, Role, fill_normal


class RouterStats(NamedTuple):
    """What one router saw in one forward pass."""

    counts: Tensor
    """(E,) int64: tokens sent to each expert."""
    shares: Tensor
    """(E,) sum over tokens of the scores, each token's normalised to 1; carries the gradient of the balance loss."""
    z: Tensor
    """Sum over tokens of logsumexp(logits)^2."""


class Router(Owner):
    """Chooses top_k of num_experts for each token."""

    bias: Tensor
    step_load: Tensor
    seen_load: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        normalize: bool = False,
        scale: float = 1.0,
        bias_rate: float = 0.0,
        weights: Mapping[str, float],
    ) -> None:
        """weights: loss terms to report (names ending in "balance" or "z") and their weights."""
        super().__init__()
        self.num_experts, self.top_k, self.score = num_experts, top_k, score
        self.normalize, self.scale, self.bias_rate = normalize, scale, bias_rate
        self.weights = dict(weights)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("step_load", torch.zeros(num_experts, dtype=torch.long), persistent=False)
        self.register_buffer("seen_load", torch.zeros(num_experts, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, RouterStats]:
        """x: (N, D) -> weights (N, k) in fp32 or better, expert ids (N, k), statistics."""
        acc = wide(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # autocast would cast the product back to 16 bits
            logits = F.linear(x.to(acc), self.weight.to(acc))
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        ids = (scores.detach() + self.bias).topk(self.top_k, -1).indices
        weights = scores.gather(-1, ids)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        shares = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
        stats = RouterStats(count(ids, self.num_experts), shares.sum(0), logits.logsumexp(-1).square().sum())
        return weights * self.scale, ids, stats

    def terms(self, stats: RouterStats, load: Tensor) -> dict[str, tuple[Tensor, Tensor, float]]:
        """(sum, count of tokens, weight) of each loss term; load: (E,) tokens served in the step so far, all
        devices."""
        fractions = load.to(stats.shares.dtype) / load.sum()
        balance = self.num_experts * (fractions * stats.shares).sum()
        tokens = stats.counts.sum() // self.top_k
        return {name: (stats.z if name == "z" else balance, tokens, weight) for name, weight in self.weights.items()}

    def add_load(self, counts: Tensor) -> None:
        """Account for the tokens of one micro-batch."""
        self.step_load += counts
        self.seen_load += counts

    def update_bias(self) -> None:
        """Nudge the selection bias towards the experts that served too few tokens in this step; start a new one."""
        if self.bias_rate:
            load = self.step_load.to(self.bias.dtype)
            delta = self.bias_rate * (load.mean() - load).sign()
            self.bias += delta - delta.mean()
        self.step_load.zero_()
        self.seen_load.zero_()

    def own_parameters(self) -> Iterator[tuple[str, Role, tuple[int, ...], bool]]:
        yield "weight", Role.ROUTER, (), True

    def reset(self, generator: torch.Generator, std: float) -> None:
        fill_normal(self.weight, std, generator)
        for buffer in (self.bias, self.step_load, self.seen_load):
            buffer.zero_()


class ExpertLinear(Owner):
    """One linear map per expert. weight: (E, out, in)."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, *, splits: tuple[int, ...] = (), scale: float = 1.0
    ) -> None:
        super().__init__()
        assert not splits or sum(splits) == out_features
        self.splits, self.scale = splits, scale
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x: Tensor, plan: Dispatch) -> Tensor:
        """x: (N k, in), sorted by expert -> (N k, out)."""
        return grouped_linear(x, self.weight, plan.counts)

    def own_parameters(self) -> Iterator[tuple[str, Role, tuple[int, ...], bool]]:
        yield "weight", Role.EXPERT, self.splits, True

    def reset(self, generator: torch.Generator, std: float) -> None:
        fill_normal(self.weight, std * self.scale, generator)


class Dispatch(NamedTuple):
    """How N tokens with k choices each become N k rows sorted by expert."""

    order: Tensor
    """(N k,) which choice (token * k + j) each sorted row is."""
    inverse: Tensor
    """(N k,) where each choice went."""
    counts: Tensor
    """(E,) rows of each expert."""
    top_k: int

    def spread(self, x: Tensor) -> Tensor:
        """(N, D) -> (N k, D): the rows that the experts read."""
        return x[self.order // self.top_k]

    def collect(self, y: Tensor, weights: Tensor) -> Tensor:
        """(N k, D) and weights (N, k) -> (N, D): each token's weighted sum; a gather, so the order of sums is fixed."""
        y = y[self.inverse].unflatten(0, (-1, self.top_k))
        if self.top_k == 1:
            return y[:, 0] * weights.to(y.dtype)
        return (y * weights.to(y.dtype)[..., None]).sum(1)


def dispatch(ids: Tensor, num_experts: int) -> Dispatch:
    """ids: (N, k) expert of each choice."""
    order = ids.flatten().argsort(stable=True)
    return Dispatch(order, order.argsort(), count(ids, num_experts), ids.shape[1])


def count(ids: Tensor, num_experts: int) -> Tensor:
    """(E,) int64: how often each expert is chosen (a fixed shape, unlike bincount, so it compiles)."""
    ids = ids.flatten()
    return torch.zeros(num_experts, dtype=torch.long, device=ids.device).scatter_add(0, ids, torch.ones_like(ids))


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows of x times the matrix of their expert. x: (M, in) sorted by expert; weight: (E, out, in); counts: (E,).

    `grouped` where it applies (16- and 32-bit floats, rows of a multiple of 16 bytes), else `looped`. Measured
    (benchmarks/experts.py, AMD EPYC with AVX2, fp32, one thread, 1 to 4,096 tokens, 8 to 64 experts): forward and
    backward 0.45 to 1.05 of the loop's time, forward 0.83 to 1.15; and the counts need not come to the host.
    """
    weight = weight.to(x.dtype)
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if aligned and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.shape[0]:
        return grouped(x, weight, counts)
    return looped(x, weight, counts)


def grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One call for all experts; the counts stay on the device."""
    return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0).to(torch.int32))


def looped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The definition: one product for each expert that has work."""
    sizes: list[int] = counts.tolist()
    parts = zip(x.split(sizes), weight.unbind(0), sizes, strict=True)
    made = [F.linear(rows, matrix) for rows, matrix, size in parts if size]
    return torch.cat(made) if made else x @ weight[0].mT
