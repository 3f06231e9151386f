"""The size dial: the reference point maps to itself, the powers are those of the sources, the user's values stay."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.errors import LmError
from lmcore.optim.config import OptimConfig
from lmcore.optim.scale import scale

REFERENCE = {"parameters": 108_333_333, "context_length": 2048}


def test_the_reference_point_is_a_fixed_point():
    s = scale(**REFERENCE)
    assert (s.batch_tokens, s.lr_factor) == (524_288, 1.0)
    assert s.tokens == pytest.approx(1.3e9, rel=1e-3)
    config = s.optim(OptimConfig())
    assert (config.lr, config.embedding_lr, config.head_lr, config.scalar_lr) == (0.02, 0.3, 0.008, 0.015)
    assert config.weight_decay == pytest.approx(0.28, rel=1e-3)


def test_a_larger_model_gets_a_larger_batch_and_less_decay():
    """Nine times the tokens: batch 9^0.383 = 2.3 -> 2 times (a power of two), lr sqrt(2), decay sqrt(2) / 9."""
    s = scale(parameters=9 * 108_333_333, context_length=2048)
    assert s.batch_tokens == 1 << 20
    assert s.lr_factor == pytest.approx(math.sqrt(2))
    assert s.optim(OptimConfig()).weight_decay == pytest.approx(0.28 * math.sqrt(2) / 9, rel=1e-3)


@settings(derandomize=True, deadline=None)
@given(
    parameters=st.integers(10_000, 10**11),
    context=st.sampled_from((128, 1000, 2048, 32768)),
    tokens=st.one_of(st.none(), st.integers(10**6, 10**13)),
)
def test_laws(parameters, context, tokens):
    s = scale(parameters=parameters, context_length=context, tokens=tokens)
    wanted = tokens or 12 * parameters
    assert s.batch_tokens % context == 0
    assert s.tokens == s.steps * s.batch_tokens
    assert abs(s.tokens - wanted) <= max(s.batch_tokens, 0.5 * wanted if s.steps == 1 else 0)
    assert s.steps >= 500 * 0.99 or s.batch_tokens == context
    config = s.optim(OptimConfig())
    assert config.lr >= 0.02
    assert config.weight_decay <= 1
    if config.weight_decay < 1:  # the weights' memory 1 / (lr wd) is the same share of every run
        assert 1 / (config.lr * config.weight_decay) / s.steps == pytest.approx(1 / (0.0056 * 1.3e9 / 2**19), rel=1e-9)


def test_a_small_run_keeps_the_rates_of_the_reference():
    s = scale(parameters=10**6, context_length=512, tokens=8_000_000)
    config = s.optim(OptimConfig())
    assert (config.lr, config.embedding_lr) == (0.02, 0.3)
    assert s.steps >= 490
    tiny = scale(parameters=10**6, context_length=512, tokens=1_000_000, batch_tokens=65_536).optim(OptimConfig())
    assert (tiny.lr, tiny.weight_decay) == (0.02, 1.0)  # the rule alone would ask for a decay of 5.7


def test_what_the_user_set_stays():
    s = scale(parameters=10**7, context_length=1024)
    config = s.optim(OptimConfig(lr=0.5, weight_decay=0.25, head_lr=0.125))
    assert (config.lr, config.weight_decay, config.head_lr) == (0.5, 0.25, 0.125)
    assert config.scalar_lr == 0.015 * s.lr_factor
    assert scale(parameters=10**7, context_length=1024, batch_tokens=4096).batch_tokens == 4096


def test_adamw_scales_its_rate_and_keeps_its_decay():
    s = scale(parameters=10**7, context_length=1024)
    config = s.optim(OptimConfig(optimizer="adamw"))
    assert config.lr == config.embedding_lr == 1e-3 * s.lr_factor
    assert config.weight_decay == 0.1
    given_lr = s.optim(OptimConfig(optimizer="adamw", lr=0.5))
    assert given_lr.embedding_lr == given_lr.scalar_lr == given_lr.lr == 0.5


def test_less_than_a_row_is_refused():
    with pytest.raises(LmError, match="less than one row of 2,048"):
        scale(parameters=10**6, context_length=2048, tokens=1000)
