"""Evaluation equals a token-by-token sum in float64; its errors are those of a resampled set of documents."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizer_zoo as zoo
import torch

from lmcore.data.stream import TokenStream
from lmcore.data.text_bytes import text_bytes
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import LmError
from lmcore.inference.evaluate import difference, evaluate, evaluate_model, token_losses
from lmcore.inference.overlap import document_hashes, find_overlaps, refuse_overlap
from tests.inference.tiny import documents, make_run, make_set, small_config, small_loaded, small_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "set", documents())


def slow_losses(model: torch.nn.Module, tokens: np.ndarray, context: int, stride: int) -> np.ndarray:
    """-log p of every token but the first, one forward pass per token, by the rule in the docstring of evaluate.py."""
    losses = []
    n = len(tokens)
    for target in range(1, n):
        window = max(0, math.ceil((target - context) / stride))  # index of the window that counts this target
        start = min(window * stride, max(n - 1 - context, 0))
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None, start:target].astype(np.int64)))[0, -1]
        losses.append(-logits.log_softmax(-1)[int(tokens[target])].item())
    return np.array(losses)


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 8), (17, 5), (500, 500), (10_000, 10_000)])
def test_every_token_once_in_the_right_context(context: int, stride: int) -> None:
    loaded = small_loaded()
    tokens = np.array(
        [*Tokenizer.byte().encode("h\u00e9llo "), 256, *Tokenizer.byte().encode("w\u00f6rld, " * 9), 256, 7]
    )
    found = evaluate(loaded, TokenStream.from_array(tokens), context_length=context, stride=stride, batch_tokens=70)
    reference = slow_losses(loaded.model, tokens, context, stride)
    assert found.tokens == len(tokens) - 1
    assert found.loss == pytest.approx(reference.mean(), abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(reference.mean()), rel=1e-5)
    raw = (
        len(("h\u00e9llo " + "w\u00f6rld, " * 9).encode()) - 1 + 1
    )  # without the first token's byte, with the last token's
    assert found.bytes == raw
    assert found.bits_per_byte == pytest.approx(reference.sum() / math.log(2) / raw, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_weights_change_rounding_only(dtype: torch.dtype, tolerance: float, data: Path) -> None:
    stream = TokenStream.open(data / "val")
    found, exact = evaluate(small_loaded(dtype), stream), evaluate(small_loaded(torch.float64), stream)
    assert found.loss == pytest.approx(exact.loss, abs=tolerance)
    assert found.loss != exact.loss


def test_loss_by_position_is_the_mean_at_those_positions() -> None:
    loaded = small_loaded()
    tokens = np.random.default_rng(0).integers(0, 256, 32 * 5 + 1)
    found = evaluate(loaded, TokenStream.from_array(tokens))
    windows = np.stack([tokens[32 * i : 32 * i + 33] for i in range(5)])
    losses = token_losses(loaded.model, torch.from_numpy(windows)).numpy()
    assert [(b.start, b.stop) for b in found.by_position] == [(0, 16), (16, 32)]
    for bucket in found.by_position:
        part = losses[:, bucket.start : bucket.stop]
        assert bucket.loss == pytest.approx(part.mean(), abs=1e-6)
        assert bucket.stderr == pytest.approx(part.mean(1).std(ddof=1) / math.sqrt(5), rel=1e-4)
    assert sum(bucket.tokens for bucket in found.by_position) == found.tokens


def test_standard_error_is_that_of_resampled_documents(data: Path) -> None:
    loaded = small_loaded()
    found = evaluate(loaded, TokenStream.open(data))
    assert found.unit == "documents"
    assert found.units == 24
    generator = np.random.default_rng(0)
    draws = [found.sums[generator.integers(0, 24, 24)].sum(0) for _ in range(4_000)]
    assert found.loss_stderr == pytest.approx(np.std([s[0] / s[1] for s in draws]), rel=0.15)
    assert found.bits_per_byte_stderr == pytest.approx(np.std([s[0] / s[2] for s in draws]) / math.log(2), rel=0.15)


def bytes_of(tokenizer: Tokenizer, stream: TokenStream) -> float:
    counter = text_bytes(stream, tokenizer)
    assert counter is not None
    return float(counter.count(stream.read(0, len(stream)), np.arange(len(stream))).sum())


def test_bytes_are_those_of_the_text(data: Path) -> None:
    """Characters of several bytes are split between tokens of the byte tokenizer; the sum is still exact."""
    tokenizer = Tokenizer.train(documents(), 300)
    text = "".join(documents(3))
    assert bytes_of(tokenizer, TokenStream.from_array(np.array(tokenizer.encode(text)))) == len(text.encode())
    assert bytes_of(tokenizer, TokenStream.from_array(np.array([tokenizer.eos_id, tokenizer.eos_id]))) == 0


@pytest.mark.parametrize("name", zoo.ALL)
def test_bits_per_byte_divide_by_the_bytes_of_the_text_whatever_the_tokenizer(name: str, tmp_path: Path) -> None:
    """Also where the ids do not add up to the text: lower case, a blank in front, unknown words."""
    tokenizer = zoo.tokenizer(name)
    texts = [*(text for text in zoo.HARD if text), *documents(6)]
    path = make_set(tmp_path / "set", texts, tokenizer, held_out=5)
    for place, some in ((path, texts), (path / "val", texts[-5:]), (path / "train", texts[:-5])):
        right = sum(len(text.encode()) for text in some)
        stream = TokenStream.open(place)
        assert bytes_of(tokenizer, stream) == pytest.approx(right, abs=1e-6)
    loaded = small_loaded()
    model = small_model(small_config(tokenizer.vocab_size))
    found = evaluate(dataclasses.replace(loaded, model=model, tokenizer=tokenizer), TokenStream.open(path / "val"))
    first = len(texts[-5].encode()) / max(1, len(tokenizer.encode(texts[-5]))) if not tokenizer.lossless else None
    right = sum(len(text.encode()) for text in texts[-5:])
    lost = first if first is not None else len(tokenizer.token_bytes()[tokenizer.encode(texts[-5])[0]])
    assert found.bytes == pytest.approx(right - lost, abs=1)  # the very first token is no target
    assert found.bits_per_byte == pytest.approx(found.loss * found.tokens / math.log(2) / (right - lost), rel=1e-3)


def test_bits_per_byte_are_unknown_where_the_bytes_are(data: Path) -> None:
    """Ids without an index, of a tokenizer whose ids do not add up to the text."""
    tokenizer = zoo.tokenizer("byte level, lower case")
    stream = TokenStream.from_array(np.array(tokenizer.encode("the river and the stone")))
    assert text_bytes(stream, tokenizer) is None
    loaded = dataclasses.replace(
        small_loaded(), model=small_model(small_config(tokenizer.vocab_size)), tokenizer=tokenizer
    )
    assert evaluate(loaded, stream).bits_per_byte is None


def test_batch_size_does_not_matter_and_training_mode_survives(data: Path) -> None:
    loaded = small_loaded(dropout=0.5)
    stream = TokenStream.open(data / "val")
    loaded.model.train()
    a = evaluate(loaded, stream, batch_tokens=1)
    b = evaluate(loaded, stream, batch_tokens=10_000)
    assert loaded.model.training
    np.testing.assert_allclose(a.sums, b.sums, rtol=1e-6)
    assert a.loss == evaluate(loaded, stream, batch_tokens=1).loss  # deterministic to the last bit


def test_a_part_is_spread_evenly(data: Path) -> None:
    loaded = small_loaded()
    stream = TokenStream.open(data)
    part = evaluate_model(loaded.model, stream, context_length=32, max_tokens=320)
    assert part.tokens in range(256, 321)
    assert part.units == 10
    assert part.bits_per_byte is None
    whole = evaluate(loaded, stream)
    assert abs(part.loss - whole.loss) < 6 * (part.loss_stderr or 0)


def test_paired_difference_is_exact_and_sharper_than_the_two_errors(data: Path) -> None:
    stream = TokenStream.open(data)
    a = small_loaded()
    b = dataclasses.replace(a, model=small_loaded().model)
    with torch.no_grad():
        b.model.norm.weight.mul_(0.98)  # nearly the same model
    first, second = evaluate(a, stream), evaluate(b, stream)
    found = difference(first, second)
    assert found.loss == pytest.approx(second.loss - first.loss, abs=1e-9)
    assert found.bits_per_byte == pytest.approx(second.bits_per_byte - first.bits_per_byte, abs=1e-9)
    assert found.loss_stderr < 0.2 * first.loss_stderr
    with pytest.raises(ValueError, match="different data"):
        difference(first, evaluate(b, TokenStream.open(data / "val")))


def test_data_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    other = make_set(tmp_path / "other", documents(), Tokenizer.train(documents(), 300))
    with pytest.raises(LmError, match=r"trained with the tokenizer byte .* made with bpe-") as refused:
        evaluate(small_loaded(), TokenStream.open(other))
    assert refused.value.code == 65
    with pytest.raises(LmError, match="token id 400") as refused:
        evaluate(small_loaded(), TokenStream.from_array(np.array([1, 2, 400])))
    assert refused.value.code == 65


def test_too_short_data_and_a_broken_model_are_refused() -> None:
    loaded = small_loaded()
    with pytest.raises(LmError, match="too few"):
        evaluate(loaded, TokenStream.from_array(np.array([1])))
    with torch.no_grad():
        loaded.model.norm.weight.fill_(torch.nan)
    with pytest.raises(LmError, match="no finite") as refused:
        evaluate(loaded, TokenStream.from_array(np.arange(100)))
    assert refused.value.code == 70


def test_overlap_is_found_by_content(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data)
    from lmcore.training.checkpoint import load_model

    state = load_model(run, device="cpu").state
    train, val = document_hashes(data / "train"), document_hashes(data / "val")
    assert train is not None
    assert val is not None
    assert (len(train), len(val), len(np.intersect1d(train, val))) == (16, 8, 0)
    assert find_overlaps(state, data / "val") == ([], [])
    foreign = make_set(tmp_path / "foreign", [*documents(5, seed=9), documents()[3]])
    overlaps, unknown = find_overlaps(state, foreign)
    assert [(o.shared, o.documents) for o in overlaps] == [(1, 6)]
    assert unknown == []
    for directory in (data / "train", data, foreign):
        with pytest.raises(LmError, match="documents are in the training data") as refused:
            refuse_overlap(state, directory)
        assert refused.value.code == 65
    state["sources"] = [{"path": str(tmp_path / "gone"), "dataset_id": "0" * 64}]
    assert refuse_overlap(state, foreign) == [f"{tmp_path}/gone: the training data are not here"]
