"""Gradients of every mechanism against numerical ones, in float64.

The whole objective, auxiliary losses included, as a function of all parameters of a tiny model. Directions are random
(gradcheck's fast mode), so one case costs a few forward passes however many parameters it has.
"""

from __future__ import annotations

import pytest
import torch
from test_laws import VOCAB, make

from lmcore.model.config import FEED_FORWARDS, MIXERS

TOKENS = torch.randint(0, VOCAB, (2, 10), generator=torch.Generator().manual_seed(4))


def check(*, main_only=False, only="", **changes):
    """main_only: of the main loss; only: of the parameters whose name contains this."""
    model = make(num_layers=1, **changes).train()
    names, values = zip(
        *((n, p.detach().clone().requires_grad_()) for n, p in model.named_parameters() if only in n), strict=True
    )

    def objective(*parameters):
        model.reset_load()  # the balance loss counts the load of a step so far
        losses = torch.func.functional_call(
            _Loss(model), {f"model.{n}": p for n, p in zip(names, parameters, strict=True)}, ()
        )
        return losses.main.sum if main_only else sum(t.weight * t.sum / t.count for t in losses.terms.values())

    inputs = tuple(values)
    unused = torch.autograd.grad(objective(*inputs), inputs, allow_unused=True)
    assert main_only or all(gradient is not None for gradient in unused)
    assert torch.autograd.gradcheck(objective, inputs, eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=True)


class _Loss(torch.nn.Module):
    """functional_call wants a module whose forward is the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return self.model.loss(TOKENS[:, :-1], TOKENS[:, 1:])


@pytest.mark.parametrize("ffn", list(FEED_FORWARDS))
@pytest.mark.parametrize("mixer", list(MIXERS))
def test_every_mixer_and_feed_forward(mixer, ffn):
    check(pattern=mixer, ffn=ffn, gate="elementwise")


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_experts(score, top_k):
    moe = {"score": score, "top_k": top_k, "num_shared": 1, "balance_weight": 0.5, "z_weight": 0.1}
    check(pattern="A", ffn="e", moe=moe)


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_depth_routing(mixer):
    # The predictor learns from a detached input on purpose, so its loss is checked for its own parameters alone.
    check(pattern=mixer, depth="m", mod={"capacity": 0.6}, main_only=True)
    check(pattern=mixer, depth="m", mod={"capacity": 0.6}, only="predictor")


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
@pytest.mark.parametrize("mixer", ["A", "M"])
def test_heads_ahead(kind, mixer):
    check(pattern=mixer, mtp={"depths": 2, "kind": kind, "weight": 0.7})
