"""Generation equals a loop of full forward passes; a text does not depend on its neighbours; limits hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from lmcore.errors import LmError
from lmcore.inference.generate import complete, generate
from lmcore.inference.sampling import SamplingConfig, Uniforms, distribution, draw
from lmcore.inference.speculate import Speculator
from lmcore.training.checkpoint import LoadedModel
from tests.inference.tiny import small_loaded

PROMPTS = ["hello", "def f(x):", "", "a b c d" * 3, "z" * 100]
LAYERS = [
    {"pattern": "A"},
    {"pattern": "AWMF", "window": 16, "num_layers": 4, "mamba": {"d_state": 16, "head_dim": 16}},
]


def reference(loaded: LoadedModel, prompt: Sequence[int], config: SamplingConfig, sample: int = 0) -> list[int]:
    """The obvious way: read the whole text again for every token; no cache, no batch. For texts within the context."""
    context, uniform = list(prompt), Uniforms(config.seed, prompt, sample)
    for _ in range(config.max_tokens):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([context]))[:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, context] = True
        context.append(draw(distribution(logits, config, seen), [uniform(len(context))]).item())
    return context[len(prompt) :]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.2}])
def test_equals_full_forward_passes(layers: dict[str, object], settings: dict[str, float]) -> None:
    loaded = small_loaded(context_length=128, **layers)
    config = SamplingConfig(max_tokens=20, ignore_eos=True, samples=2, **settings)
    texts = complete(loaded, PROMPTS, config)
    assert [(t.prompt, t.sample) for t in texts] == [(p, s) for p in range(5) for s in range(2)]
    assert loaded.tokenizer is not None
    for text in texts:
        prompt = loaded.tokenizer.encode(PROMPTS[text.prompt]) or [loaded.tokenizer.eos_id]
        assert text.tokens == reference(loaded, prompt, config, text.sample)
        assert text.finish == "length"


@pytest.mark.parametrize(("layers", "batch_size"), [(LAYERS[0], 3), (LAYERS[0], 16), (LAYERS[1], 4)])
def test_a_text_does_not_depend_on_its_neighbours(layers: dict[str, object], batch_size: int) -> None:
    """Different lengths, texts that end early, more prompts than rows, contexts that overflow."""
    loaded = small_loaded(context_length=48, **layers)
    config = SamplingConfig(max_tokens=80, temperature=1.0, samples=2)
    alone = [text for prompt in PROMPTS for text in complete(loaded, [prompt], config, batch_size=1)]
    together = complete(loaded, PROMPTS, config, batch_size=batch_size)
    assert [text.tokens for text in together] == [text.tokens for text in alone]
    assert len({text.finish for text in alone}) == 2  # some ended by EOS, some by length
    backwards = complete(loaded, PROMPTS[::-1], config, batch_size=batch_size)
    assert sorted(t.tokens for t in backwards) == sorted(t.tokens for t in alone)


def test_samples_and_seeds_differ() -> None:
    loaded = small_loaded()
    texts = [
        complete(loaded, ["x"], SamplingConfig(max_tokens=8, seed=seed, samples=2, temperature=1)) for seed in (0, 1, 0)
    ]
    assert len({tuple(text.tokens) for two in texts for text in two}) == 4
    assert [t.tokens for t in texts[0]] == [t.tokens for t in texts[2]]


def test_eos_ends_a_text_and_can_be_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = small_loaded()
    always = torch.nn.functional.one_hot(torch.tensor([256]), 257).double()
    monkeypatch.setattr("lmcore.inference.decode.Decoder.__call__", lambda decoder, tokens, state: always)
    config = SamplingConfig(max_tokens=5, temperature=0)
    (text,) = complete(loaded, ["abc"], config)
    assert (text.tokens, text.text, text.finish) == ([256], "", "eos")
    (text,) = complete(loaded, ["abc"], config.model_copy(update={"ignore_eos": True}))
    assert (text.tokens, text.text, text.finish) == ([256] * 5, "", "length")


def test_stop_text_ends_a_text() -> None:
    loaded = small_loaded()
    config = SamplingConfig(max_tokens=40, temperature=1, ignore_eos=True)
    (whole,) = complete(loaded, ["abc"], config)
    stop = whole.text[5:7]
    (cut,) = complete(loaded, ["abc"], config.model_copy(update={"stop": (stop,)}))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish == "stop"
    assert cut.tokens == whole.tokens[: len(cut.tokens)]


def test_chunks_add_up_to_the_text() -> None:
    loaded = small_loaded()
    assert loaded.tokenizer is not None
    config = SamplingConfig(max_tokens=60, temperature=1)
    chunks = list(generate(loaded, ["abc"], config))
    table = loaded.tokenizer.token_bytes()
    raw = b"".join(table[token] for chunk in chunks for token in chunk.tokens)
    text = "".join(chunk.text for chunk in chunks)
    assert raw.decode("utf-8", errors="replace").startswith(text)
    assert [chunk.finish is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_logprobs_are_those_of_the_model() -> None:
    loaded = small_loaded()
    assert loaded.tokenizer is not None
    config = SamplingConfig(max_tokens=6, temperature=0.3, top_k=5, logprobs=3, ignore_eos=True)
    (text,) = complete(loaded, ["abc"], config)
    tokens = torch.tensor([loaded.tokenizer.encode("abc") + text.tokens])
    with torch.no_grad():
        expected = loaded.model(tokens).log_softmax(-1)[0, 2:-1]
    for entry, row, token in zip(text.logprobs, expected, text.tokens, strict=True):
        assert entry.token == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-5)
        assert [pair[0] for pair in entry.top] == row.topk(3).indices.tolist()


def test_sliding_goes_on_from_the_last_half_of_the_context() -> None:
    loaded = small_loaded(context_length=16)
    assert loaded.tokenizer is not None
    config = SamplingConfig(max_tokens=30, temperature=0, ignore_eos=True)
    (text,) = complete(loaded, ["abcd"], config)
    context = loaded.tokenizer.encode("abcd")
    window = list(context)
    for token in text.tokens:
        if len(window) > 16:  # the cache is full: keep the tokens of its last half, and the one not read yet
            window = window[-9:]
        with torch.no_grad():
            assert token == loaded.model(torch.tensor([window]))[0, -1].argmax().item()
        window.append(token)


def test_stopping_at_the_context_and_extending_beyond_it() -> None:
    loaded = small_loaded(context_length=16)
    config = SamplingConfig(max_tokens=30, temperature=0, ignore_eos=True)
    (text,) = complete(loaded, ["abcd"], config, overflow="stop")
    assert (len(text.tokens), text.finish) == (12, "context")
    (longer,) = complete(loaded, ["abcd"], config, overflow="extend")
    assert longer.tokens == reference(loaded, [97, 98, 99, 100], config)
    with pytest.raises(LmError, match="20 tokens, the model was trained with a context of 16"):
        complete(loaded, ["a" * 20], config, overflow="stop")


def test_a_long_prompt_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = small_loaded(context_length=128)
    config = SamplingConfig(max_tokens=5, temperature=0, ignore_eos=True)
    (whole,) = complete(loaded, ["ab" * 40], config)
    monkeypatch.setattr("lmcore.inference.generate.PREFILL_TOKENS", 7)
    (pieces,) = complete(loaded, ["ab" * 40], config)
    assert pieces.tokens == whole.tokens


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
@pytest.mark.parametrize(
    "layers",
    [{}, {"pattern": "AM", "mamba": {"d_state": 16, "head_dim": 16}}, {"pattern": "AW", "window": 8}],
)
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9, "repetition_penalty": 1.1}])
def test_speculation_writes_the_same_text(
    kind: str, layers: dict[str, object], settings: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token, past the end of the context and with a prompt of one token; drafts are really accepted."""
    loaded = small_loaded(context_length=32, mtp={"depths": 2, "kind": kind}, **layers)
    with torch.no_grad():  # heads that agree with the trunk now and then: small changes of its last hidden state
        for head in loaded.model.mtp:
            for parameter in head.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(0.05)
            if kind == "sequential":
                head.project.weight[:, :32] = torch.eye(32)
    seen: list[Speculator] = []
    real = Speculator.__init__
    monkeypatch.setattr(Speculator, "__init__", lambda self, *a: (seen.append(self), real(self, *a))[1])
    config = SamplingConfig(max_tokens=50, ignore_eos=True, logprobs=1, **settings)
    for prompt in ("hello", "", "x" * 40):
        (plain,) = complete(loaded, [prompt], config)
        (fast,) = complete(loaded, [prompt], config, speculate=True)
        assert fast.tokens == plain.tokens
        assert fast.text == plain.text
        assert [e.logprob for e in fast.logprobs] == pytest.approx([e.logprob for e in plain.logprobs])
    assert sum(s.drafted for s in seen) > 50
    assert sum(s.accepted for s in seen) > 0
    assert sum(s.passes for s in seen) < 150


def test_refusals() -> None:
    loaded = small_loaded()
    with pytest.raises(LmError, match="has no tokenizer"):
        complete(dataclasses.replace(loaded, tokenizer=None), ["x"])
    with pytest.raises(LmError, match="token id 999"):
        complete(loaded, [[1, 999]])
    with torch.no_grad():
        loaded.model.norm.weight.fill_(torch.nan)
    with pytest.raises(LmError, match="no finite logits") as refused:
        complete(loaded, ["x"])
    assert refused.value.code == 70
