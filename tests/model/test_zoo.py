"""Presets of the zoo: each builds, says its true size, and the tiny ones take a training step and generate."""

from __future__ import annotations

import math
import re

import pytest
import torch

from lmcore.config import build
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.optim.optimizer import build_optimizer
from lmcore.training.config import RunConfig, preset_names, read_preset

TINY = sorted(name for name, _ in preset_names() if name.startswith("tiny-"))
BIG = {
    "moe-depth-5b": 5_213_062_480,
    "gated-moe-1.7b": 1_730_317_312,
    "resonance-32k-small": 77_613_312,
    "resonance-32k-medium": 190_845_952,
    "resonance-32k-large": 596_610_560,
    "resonance-32k-xlarge": 1_217_054_720,
    "hybrid-830m": 831_754_272,
    "local-global-680m": 681_328_128,
}


@pytest.mark.parametrize("name", BIG)
def test_big_presets_have_the_size_that_their_first_line_says(name):
    _, raw = read_preset(name)
    config = build(RunConfig, {**raw, "model": {**raw["model"], "vocab_size": 50_257}})
    with torch.device("meta"):
        model = LanguageModel(config.model)
    count = sum(p.numel() for p in model.parameters())
    assert count == BIG[name]
    said = re.match(r"([0-9.]+)([MB]) parameters", dict(preset_names())[name])
    assert said, name
    assert float(said[1]) == pytest.approx(count / {"M": 1e6, "B": 1e9}[said[2]], rel=0.01)
    if config.model.context_length == 32_768:
        assert config.model.pattern == "F"


def narrow(config):
    """The same layers, experts, heads ahead and kernels in a width that trains in a second."""
    fields = config.model_dump() | {"vocab_size": 300, "context_length": 64, "rope_theta": 1e4}
    fields |= {"d_model": 96, "head_dim": 8, "d_ff": 96, "window": min(config.window, 16)}
    fields["moe"] |= {"d_expert": 16}
    fields["mamba"] |= {"d_state": 8, "head_dim": 16, "chunk_size": 16}
    fields["resonance"] |= {"num_kernels": config.num_heads}
    return ModelConfig(**fields)


@pytest.mark.parametrize("name", BIG)
def test_big_presets_train_in_a_narrow_version(name):
    _, raw = read_preset(name)
    config = build(RunConfig, {**raw, "model": {**raw["model"], "vocab_size": 300}})
    small = narrow(config.model)
    assert small.layers == config.model.layers
    model = LanguageModel(small).train()
    model.checkpoint_every = config.train.checkpoint_every
    table = model.parameter_table()
    optimizer = build_optimizer(table, config.optim, total_steps=10)
    tokens = torch.randint(0, 300, (2, 65), generator=torch.Generator().manual_seed(0))
    seen = []
    for step in range(2):
        losses = model.loss(tokens[:, :-1], tokens[:, 1:])
        losses.objective().backward()
        assert all(info.parameter.grad is not None and info.parameter.grad.isfinite().all() for info in table)
        optimizer.step(step)
        optimizer.zero_grad()
        model.after_step()
        seen.append(losses.main.sum.item())
    assert all(math.isfinite(loss) for loss in seen)
    if config.model.mtp.depths:
        assert config.model.mtp.depths == 3  # the next token and three further ones
        assert {"mtp_1", "mtp_2", "mtp_3"} <= losses.terms.keys()


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_take_a_step_and_generate(name):
    _, raw = read_preset(name)
    config = build(RunConfig, raw)
    model = LanguageModel(ModelConfig(**{**config.model.model_dump(), "vocab_size": 300, "context_length": 32}))
    tokens = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(0))
    model.train().loss(tokens[:, :-1], tokens[:, 1:]).objective().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.after_step()
    model.eval()
    with torch.no_grad():
        state = model.init_state(2, 40)
        whole = model(tokens)
        parts = torch.cat([model(chunk, state=state) for chunk in tokens.split([20, 1, 12], 1)], 1)
    assert (whole - parts).abs().max() < 1e-4


def test_the_tiny_family_differs_from_its_yardstick_in_the_architecture_alone():
    _, yardstick = read_preset("tiny-attention")
    for name in TINY:
        _, raw = read_preset(name)
        if name == "tiny-moe-depth":  # three times the operations per token: half the steps, for its two minutes
            assert raw["train"].pop("steps") == yardstick["train"]["steps"] // 2
            raw["train"]["steps"] = yardstick["train"]["steps"]
        assert {k: v for k, v in raw.items() if k != "model"} == {k: v for k, v in yardstick.items() if k != "model"}
        assert raw["model"].items() >= yardstick["model"].items()
