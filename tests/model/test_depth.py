"""Mixture-of-Depths: capacity one is the plain block, the router's choice leaks, the predictor's does not."""

from __future__ import annotations

import math

import pytest
import torch

from lmcore.model.config import FEED_FORWARDS, MIXERS, ModelConfig
from lmcore.model.depth import DepthRouted
from lmcore.model.model import LanguageModel

TOKENS = torch.randint(0, 61, (3, 40), generator=torch.Generator().manual_seed(0))


def make(depth="m", **changes):
    config = ModelConfig(
        **{"vocab_size": 61, "d_model": 32, "num_layers": 2, "num_heads": 4, "depth": depth, **changes}
    )
    model = LanguageModel(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)
    return model


@pytest.mark.parametrize("ffn", list(FEED_FORWARDS))
@pytest.mark.parametrize("pattern", list(MIXERS))
def test_capacity_one_and_gain_one_is_the_plain_block(pattern, ffn):
    options = {"pattern": pattern, "ffn": ffn, "window": 7, "mamba": {"head_dim": 8, "d_state": 8, "num_experts": 3}}
    plain = make("-", **options)
    routed = make("m", **options, mod={"capacity": 1.0})
    with torch.no_grad():
        for block, other in zip(plain.blocks, routed.blocks, strict=True):
            other.block.load_state_dict(block.state_dict())
            other.router.weight.zero_()
        for name in ("embedding", "norm"):
            getattr(routed, name).load_state_dict(getattr(plain, name).state_dict())
    routed.set_depth_mode("topk")
    torch.testing.assert_close(routed(TOKENS), plain(TOKENS), atol=1e-13, rtol=0)


def test_top_k_over_the_sequence_sees_the_future_and_the_predictor_does_not():
    model = make(mod={"capacity": 0.5})
    with torch.no_grad():
        for block in model.blocks:
            block.predictor_out.weight.mul_(8)
    changed = TOKENS.clone()
    changed[:, 20:] = (changed[:, 20:] + 5) % 61
    moved = {}
    for mode in ("topk", "causal"):
        model.set_depth_mode(mode)
        moved[mode] = (model(changed)[:, :20] - model(TOKENS)[:, :20]).abs().max().item()
    assert moved["topk"] > 1e-3
    assert moved["causal"] < 1e-13
    model.set_depth_mode("auto")
    model.eval()
    assert torch.equal(model(TOKENS), model.eval()(TOKENS))
    model.set_depth_mode("causal")
    assert torch.equal(model(TOKENS), model.eval()(TOKENS))


def test_only_the_chosen_tokens_change_and_the_gain_weighs_them():
    model = make(num_layers=1, mod={"capacity": 0.3})
    block = model.blocks[0]
    assert isinstance(block, DepthRouted)
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    from lmcore.model.rotary import Positions

    where = Positions.make(torch.arange(10)[None], head_dim=8, theta=1e4, dtype=x.dtype, ragged=False)
    y, _, stats = block.train()(x, where)
    logits = block.router(x)[..., 0]
    for row in range(2):
        chosen = sorted(logits[row].topk(3).indices.tolist())
        inside = x[row : row + 1, chosen]
        at = Positions.make(torch.tensor([chosen]), head_dim=8, theta=1e4, dtype=x.dtype, ragged=True)
        direct = block.block(inside, at)[0][0]
        for t in range(10):
            expected = x[row, t]
            if t in chosen:
                gain = 2 / (1 + math.exp(-logits[row, t].item()))
                expected = expected + gain * (direct[chosen.index(t)] - expected)
            torch.testing.assert_close(y[row, t], expected, atol=1e-13, rtol=0)
    assert stats[-1].tokens == 20


def test_the_predictor_learns_the_choice_without_touching_the_rest():
    model = make(mod={"capacity": 0.25, "predictor_weight": 1.0})
    losses = model.train().loss(TOKENS[:, :-1], TOKENS[:, 1:])
    term = losses.terms["mod"]
    assert term.weight == 2.0  # the sum over two layers
    gradients = torch.autograd.grad(term.sum, list(model.parameters()), allow_unused=True)
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert (gradient is not None) == ("predictor" in name), name
    predictors = [p for name, p in model.named_parameters() if "predictor" in name]
    optimizer = torch.optim.AdamW(predictors, lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        losses = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
        losses.terms["mod"].sum.backward()
        optimizer.step()
    assert losses.metrics["mod/agreement"] > 0.95


def test_the_router_learns_through_the_output():
    model = make().train()
    model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).main.sum.backward()
    assert all(block.router.weight.grad.abs().max() > 1e-6 for block in model.blocks)


def test_skipped_tokens_never_enter_the_cache():
    model = make(num_layers=1).eval()
    state = model.init_state(3, 64)
    model(TOKENS, state=state)
    block, cache = model.blocks[0], state.layers[0]
    chosen = block.predict(model.embedding(TOKENS)) > 0
    assert 0 < chosen.sum() < chosen.numel()
    assert cache.lengths.tolist() == chosen.sum(1).tolist()
    for row in range(3):
        stored = cache.positions[row][cache.positions[row] >= 0].tolist()
        assert stored == chosen[row].nonzero()[:, 0].tolist()


def test_of_equal_tokens_the_earlier_ones_are_chosen():
    """Before any mixer every copy of a token has the same logit; which of them enters must not depend on the device."""
    model = make(num_layers=1, mod={"capacity": 0.25}).train()
    seen = []
    model.blocks[0].block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].index))
    model(torch.full((2, 40), 7))
    assert torch.equal(seen[0], torch.arange(10).expand(2, -1))
