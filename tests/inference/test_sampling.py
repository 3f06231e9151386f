"""The sampling steps equal the logits processors of transformers; a draw follows its distribution and is keyed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.config import build
from lmcore.errors import LmError
from lmcore.inference.sampling import SamplingConfig, Uniforms, distribution, draw, filtered, next_tokens


def logits(rows: int = 4, vocab: int = 1_000, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 5.0, "top_p": 0.999},  # needs more than the first 512 tokens
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 0.8},
    ],
)
def test_distribution_equals_transformers(settings: dict[str, float]) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    config = SamplingConfig(**settings)
    scores = logits()
    history = torch.randint(0, 1_000, (4, 30), generator=torch.Generator().manual_seed(1))
    steps = [processors.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)]
    steps.append(processors.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(processors.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(processors.TopPLogitsWarper(config.top_p))
    if config.min_p:
        steps.append(processors.MinPLogitsWarper(config.min_p))
    expected = processors.LogitsProcessorList(steps)(history, scores.clone()).softmax(-1)
    seen = torch.zeros(4, 1_000, dtype=torch.bool).scatter_(1, history, True)
    torch.testing.assert_close(distribution(scores, config, seen), expected, rtol=1e-4, atol=1e-7)


def test_greedy_takes_the_likeliest_token() -> None:
    scores = logits()
    for config in (SamplingConfig(temperature=0), SamplingConfig(temperature=3, top_k=1)):
        assert torch.equal(next_tokens(scores, config, []), scores.argmax(-1))
        assert torch.equal(distribution(scores, config).argmax(-1), scores.argmax(-1))
        assert distribution(scores, config).max() == 1
    seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argmax(-1, keepdim=True), True)
    penalised = next_tokens(scores.abs(), SamplingConfig(temperature=0, repetition_penalty=100.0), [], seen)
    assert not torch.equal(penalised, scores.abs().argmax(-1))


def test_a_tiny_temperature_does_not_overflow() -> None:
    scores = torch.tensor([[1e4, 1e4 - 1.0, -1e4]])
    assert torch.equal(distribution(scores, SamplingConfig(temperature=1e-30)), torch.tensor([[1.0, 0.0, 0.0]]))


def test_draw_follows_the_distribution() -> None:
    probabilities = torch.tensor([[0.5, 0.0, 0.2, 0.3]]).expand(20_000, -1)
    uniform = Uniforms(0, [1, 2, 3], 0)
    ids = draw(probabilities, [uniform(i) for i in range(20_000)])
    shares = torch.bincount(ids, minlength=4) / 20_000
    assert shares[1] == 0
    assert (shares - probabilities[0]).abs().max() < 4 * (0.25 / 20_000) ** 0.5  # four standard errors


def test_draw_never_takes_a_token_of_probability_zero() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    assert draw(probabilities, [0.0]).item() == 1
    assert draw(probabilities, [0.25]).item() == 3
    assert draw(probabilities, [1 - 2**-53]).item() == 3
    assert draw(probabilities, [1.0]).item() == 3  # beyond what Uniforms gives


def test_uniforms_are_a_pure_function_of_their_key() -> None:
    base = Uniforms(1, [5, 6], 0)
    assert base(3) == Uniforms(1, [5, 6], 0)(3)
    others = [Uniforms(2, [5, 6], 0)(3), Uniforms(1, [5, 7], 0)(3), Uniforms(1, [5, 6], 1)(3), base(4), base(3, use=1)]
    assert len({base(3), *others}) == 6
    values = torch.tensor([base(i) for i in range(10_000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean().item() - 0.5) < 4 * (1 / 12 / 10_000) ** 0.5


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}, {"max_tokens": 0}, {"repetition_penalty": 0}],
)
def test_nonsense_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(LmError, match=next(iter(settings))):
        build(SamplingConfig, settings)


TIED = st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, -1.0, 0.5]), min_size=2, max_size=24)


def kept(scores: torch.Tensor) -> set[int]:
    return set(torch.isfinite(scores[0]).nonzero().flatten().tolist())


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    values=TIED,
    top_k=st.integers(2, 12),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
)
def test_ties_are_kept_as_transformers_keeps_them(
    values: list[float], top_k: int, min_p: float, temperature: float
) -> None:
    """Rows full of equal logits, also all of them: the same set for top-k and min-p."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.tensor([values])
    steps = [processors.TemperatureLogitsWarper(temperature), processors.TopKLogitsWarper(top_k)]
    if min_p:
        steps.append(processors.MinPLogitsWarper(min_p))
    theirs = processors.LogitsProcessorList(steps)(torch.zeros(1, 1, dtype=torch.long), scores.clone())
    assert kept(filtered(scores, SamplingConfig(temperature=temperature, top_k=top_k, min_p=min_p))) == kept(theirs)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(values=TIED, top_p=st.sampled_from([1e-6, 0.1, 0.3, 0.5, 0.77, 0.99]), top_k=st.sampled_from([0, 2, 5]))
def test_top_p_keeps_what_transformers_keeps_and_what_is_as_likely(
    values: list[float], top_p: float, top_k: int
) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.tensor([values])
    steps = ([processors.TopKLogitsWarper(top_k)] if top_k else []) + [processors.TopPLogitsWarper(top_p)]
    theirs = kept(processors.LogitsProcessorList(steps)(torch.zeros(1, 1, dtype=torch.long), scores.clone()))
    ours = kept(filtered(scores, SamplingConfig(temperature=1.0, top_k=top_k, top_p=top_p)))
    border = min(values[k] for k in theirs)
    assert ours == theirs | {k for k, value in enumerate(values) if value == border}
    assert all(value in {values[k] for k in ours} or value < border for value in values)


def test_one_likeliest_token_is_greedy_whatever_else_is_asked() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    for more in ({}, {"top_p": 1e-9}, {"min_p": 1.0}, {"top_p": 1e-9, "min_p": 1.0, "temperature": 9.0}):
        config = SamplingConfig(top_k=1, **more)  # type: ignore[arg-type]
        assert next_tokens(scores, config, []).item() == 1
        assert distribution(scores, config).tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0]]
