"""Batches are a pure function of (seed, dataset, sample number), uniform over all windows, complete in an epoch."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sets import TinySet

from lmcore.data.sampler import ROUNDS, Mixture, Sampler, get_batch, permute, quotas, words
from lmcore.data.stream import TokenStream
from lmcore.errors import Exit, LmError

torch = pytest.importorskip("torch")
MASK = 2**64 - 1

# ---------------------------------------------------------------------------------------- an independent Philox


def philox_block(counter: int, key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x64-10 as published (Salmon et al. 2011), in plain Python."""
    c = [(counter >> (64 * k)) & MASK for k in range(4)]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k0, p1 & MASK, (p0 >> 64) ^ c[3] ^ k1, p0 & MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return c[0], c[1], c[2], c[3]


def reference_word(purpose: str, seed: int, dataset_id: str, index: int) -> int:
    text = json.dumps(["lmshards/1", purpose, seed, dataset_id], separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    return philox_block(index // 4 + 1, key)[index % 4]


def reference_permute(index: int, size: int, keys: list[int]) -> int:
    bits = (size - 1).bit_length()
    high_bits, low_bits = bits // 2, bits - bits // 2

    def mix(x: int) -> int:
        x &= MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    while True:
        high, low = index >> low_bits, index & ((1 << low_bits) - 1)
        for number in range(6):
            if number % 2 == 0:
                high ^= mix(low + keys[number]) & ((1 << high_bits) - 1)
            else:
                low ^= mix(high + keys[number]) & ((1 << low_bits) - 1)
        index = high << low_bits | low
        if index < size:
            return index


@pytest.mark.parametrize("first", [0, 1, 3, 4, 1_000_003, 2**40 + 1])
def test_words_are_philox(first: int) -> None:
    expected = [reference_word("random", 7, "ab", first + k) for k in range(9)]
    assert words("random", 7, "ab", first, 9).tolist() == expected


def test_words_are_golden() -> None:
    """The law is an interface: a run of another version or NumPy continues with the same batches."""
    assert words("random", 0, "", 0, 3).tolist() == [reference_word("random", 0, "", k) for k in range(3)]
    assert words("random", 0, "", 0, 2).tolist() == [GOLDEN_0, GOLDEN_1]


GOLDEN_0, GOLDEN_1 = 703527170517282474, 17899869777525826228

# ---------------------------------------------------------------------------------------- permutation


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, MASK))
def test_permutation_of_any_size(size: int, seed: int) -> None:
    keys = words("permutation", seed, "", 0, ROUNDS)
    got = permute(np.arange(size), size, keys)
    assert np.array_equal(np.sort(got), np.arange(size))
    assert got[0] == reference_permute(0, size, keys.tolist())
    assert got[size // 2] == reference_permute(size // 2, size, keys.tolist())


def test_permutation_mixes_evenly() -> None:
    """First positions of many permutations of 50: chi-squared over 50 cells, 8,000 draws."""
    counts = np.zeros(50)
    for epoch in range(8000):
        counts[permute([0], 50, words("permutation", 1, "x", epoch * ROUNDS, ROUNDS))[0]] += 1
    chi = ((counts - 160) ** 2 / 160).sum()
    assert chi < 49 + 4 * np.sqrt(2 * 49)


def test_permutation_shows_no_order() -> None:
    got = permute(np.arange(100_003), 100_003, words("permutation", 3, "", 0, ROUNDS))
    assert abs(np.corrcoef(got, np.arange(len(got)))[0, 1]) < 0.01
    assert abs(np.corrcoef(got[1:], got[:-1])[0, 1]) < 0.01


# ---------------------------------------------------------------------------------------- one source


def array_sampler(n: int, t: int, **keywords: object) -> Sampler:
    stream = TokenStream.from_array(np.arange(n, dtype=np.uint32))
    return Sampler(stream, context_length=t, **({"seed": 1, "order": "epoch"} | keywords))  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "t"), [(10007, 64), (5000, 100), (65, 64), (2, 1), (129, 64), (128, 64)])
def test_epoch_gives_every_token_once_as_a_target(n: int, t: int) -> None:
    sampler = array_sampler(n, t)
    assert sampler.n_windows == n // t
    for epoch in range(4):
        batch = sampler.batch(epoch * sampler.n_windows, sampler.n_windows)
        counts = np.bincount(batch[:, 1:].reshape(-1), minlength=n)
        assert counts.max() == 1
        assert int((counts == 0).sum()) == n % t
        np.testing.assert_array_equal((batch[:, :-1] + 1) % n, batch[:, 1:])  # a ring of consecutive tokens


def test_epochs_differ_in_phase_and_order() -> None:
    sampler = array_sampler(10_000, 64)
    k = sampler.n_windows
    a, b = sampler.starts(0, k), sampler.starts(k, k)
    assert a[0] % 64 != b[0] % 64 or a[1] % 64 != b[1] % 64
    assert not np.array_equal(a - a.min(), b - b.min())


def test_epoch_follows_the_written_law() -> None:
    sampler = array_sampler(1000, 7, seed=5)
    k, dataset = 1000 // 7, sampler.dataset_id
    for g in (0, 1, k - 1, k, 5 * k + 3):
        e, i = divmod(g, k)
        keys = [reference_word("permutation", 5, dataset, 6 * e + j) for j in range(6)]
        phase = reference_word("phase", 5, dataset, e) % 1000
        assert sampler.starts(g, 1)[0] == (phase + 7 * reference_permute(i, k, keys)) % 1000


def test_random_follows_the_written_law() -> None:
    sampler = array_sampler(1000, 7, seed=5, order="random")
    for g in (0, 1, 2, 3, 4, 10**9):
        assert sampler.starts(g, 1)[0] == reference_word("random", 5, sampler.dataset_id, g) % 993


def test_random_reaches_both_edges_and_every_start_equally() -> None:
    sampler = array_sampler(60, 10, order="random")
    starts = sampler.starts(0, 50_000)
    counts = np.bincount(starts, minlength=50)
    assert len(counts) == 50  # starts 0 .. 49: eleven tokens from 49 end with token 59
    chi = ((counts - 1000) ** 2 / 1000).sum()
    assert chi < 49 + 4 * np.sqrt(2 * 49)


@pytest.mark.parametrize("order", ["epoch", "random"])
def test_any_cut_of_the_sample_range_gives_the_same_samples(order: str) -> None:
    """Ranks, accumulation steps and restarts only cut the range differently."""
    whole = array_sampler(3000, 16, order=order).batch(0, 600)
    for size in (1, 7, 64, 200):
        parts = array_sampler(3000, 16, order=order)
        got = [parts.batch(first, min(size, 600 - first)) for first in range(0, 600, size)]
        np.testing.assert_array_equal(np.concatenate(got), whole)
    # Two ranks, read out of order.
    ranks = array_sampler(3000, 16, order=order)
    np.testing.assert_array_equal(ranks.batch(300, 300), whole[300:])
    np.testing.assert_array_equal(ranks.batch(0, 300), whole[:300])


def test_more_than_one_block_of_an_epoch() -> None:
    sampler = array_sampler(40_000, 1)
    whole = sampler.starts(0, 40_000)
    assert len(np.unique(whole)) == 40_000
    np.testing.assert_array_equal(array_sampler(40_000, 1).starts(16_000, 1000), whole[16_000:17_000])


def test_seed_dataset_and_order_change_the_samples() -> None:
    base = array_sampler(5000, 16).starts(0, 50)
    assert not np.array_equal(base, array_sampler(5000, 16, seed=2).starts(0, 50))
    assert not np.array_equal(base, array_sampler(5000, 16, order="random").starts(0, 50))
    other = Sampler(TokenStream.from_array(np.ones(5000, np.uint32)), context_length=16, seed=1)
    assert not np.array_equal(base, other.starts(0, 50))


def test_set_and_array_of_the_same_tokens_agree_on_windows(tiny_set: TinySet) -> None:
    sampler = Sampler(TokenStream.open(tiny_set.path), context_length=100, seed=3)
    n = len(tiny_set.stream)
    starts = sampler.starts(0, 500)
    np.testing.assert_array_equal(sampler.batch(0, 500), tiny_set.stream[(starts[:, None] + np.arange(101)) % n])
    assert sampler.dataset_id == tiny_set.manifest["dataset_id"]


def test_too_short_and_wrong_arguments() -> None:
    with pytest.raises(LmError, match=r"10 tokens are too few for a context length of 10 \(11 are needed\)") as caught:
        array_sampler(10, 10)
    assert caught.value.code == Exit.DATA
    assert array_sampler(11, 10).batch(0, 3).shape == (3, 11)
    with pytest.raises(LmError, match="choose epoch or random"):
        array_sampler(100, 10, order="sorted")
    with pytest.raises(LmError, match="at least 1"):
        array_sampler(100, 0)
    with pytest.raises(LmError, match="start at 0"):
        array_sampler(100, 10).starts(-1, 2)


# ---------------------------------------------------------------------------------------- mixtures


def mixture(*pairs: tuple[int, float], **keywords: object) -> Mixture:
    """Sources of given sizes and weights; source k holds the id k only."""
    streams = [(TokenStream.from_array(np.full(n, k, np.uint16)), w) for k, (n, w) in enumerate(pairs)]
    return Mixture(streams, **({"context_length": 8, "seed": 1} | keywords))  # type: ignore[arg-type]


def test_realised_ratios_are_the_weights() -> None:
    mix = mixture((500, 7), (600, 2), (700, 1))
    source, _ = mix.locate(0, 200_000)
    for number, weight in enumerate((0.7, 0.2, 0.1)):
        assert abs((source == number).mean() - weight) < 1e-3
        local = [(source[b : b + 1000] == number).mean() for b in range(0, 200_000, 1000)]
        assert abs(np.array(local) - weight).max() < 0.08  # well mixed inside a block, too
    batch = mix.batch(777, 300)
    np.testing.assert_array_equal(batch[:, 0], source[777:1077])


def test_shares_count_what_was_drawn() -> None:
    mix = mixture((500, 3), (6000, 1))
    for samples in (0, 1, 1000, 65_536, 100_000):
        source, _ = mix.locate(0, samples)
        for number, share in enumerate(mix.shares(samples)):
            assert share.samples == int((source == number).sum())
            assert share.epochs == pytest.approx(share.samples / mix.samplers[number].n_windows)
    said = mix.warnings(1000)
    assert len(said) == 1
    assert "array 0" in said[0]
    assert mix.warnings(10) == []


def test_each_source_keeps_its_own_order_whatever_is_mixed_with_it() -> None:
    """Sample k of a source is sample k of its own sampler: across block borders, other sources and weights."""
    a = TokenStream.from_array(np.arange(5000, dtype=np.uint16))
    b = TokenStream.from_array(np.arange(9000, dtype=np.uint16) + 20_000)
    alone = Sampler(a, context_length=8, seed=4)
    for weights in ((0.5, 0.5), (0.9, 0.1)):
        mix = Mixture([(a, weights[0]), (b, weights[1])], context_length=8, seed=4)
        batch = mix.batch(60_000, 10_000)
        source, inner = mix.locate(60_000, 10_000)
        mine = batch[source == 0]
        np.testing.assert_array_equal(np.diff(inner[source == 0]), 1)
        np.testing.assert_array_equal(mine, alone.batch(int(inner[source == 0][0]), len(mine)))


def test_one_source_is_its_sampler() -> None:
    stream = TokenStream.from_array(np.arange(5000, dtype=np.uint16))
    mix, alone = Mixture([(stream, 3.0)], context_length=8, seed=4), Sampler(stream, context_length=8, seed=4)
    np.testing.assert_array_equal(mix.batch(65_000, 2000), alone.batch(65_000, 2000))
    assert mix.dataset_id == alone.dataset_id
    assert mix.n_windows == alone.n_windows


def test_mixture_is_elastic_and_identified() -> None:
    whole = mixture((500, 1), (600, 2)).batch(0, 300)
    parts = mixture((500, 1), (600, 2))
    np.testing.assert_array_equal(np.concatenate([parts.batch(f, 50) for f in range(0, 300, 50)]), whole)
    ids = {mixture((500, 1), (600, w)).dataset_id for w in (1, 2, 3)}
    assert len(ids) == 3


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40))
def test_quotas_add_up_and_are_close(weights: list[float]) -> None:
    share = np.array(weights) / np.sum(weights)
    got = quotas(share, 65_536)
    assert got.sum() == 65_536
    assert got.min() >= 1
    assert np.abs(got - share * 65_536).max() <= len(weights) + 1


@pytest.mark.parametrize("weights", [(0.0, 1.0), (-1.0, 2.0), (float("nan"), 1.0)])
def test_weights_must_be_positive(weights: tuple[float, float]) -> None:
    with pytest.raises(LmError, match="positive"):
        mixture((500, weights[0]), (500, weights[1]))


# ---------------------------------------------------------------------------------------- get_batch


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64, np.int32, np.uint8, np.dtype(">u2")])
def test_get_batch_shifts_by_one(dtype: type) -> None:
    inputs, targets = get_batch(np.arange(100).astype(dtype), 32, 7, "cpu")
    assert inputs.shape == targets.shape == (32, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)
    assert inputs.is_contiguous()
    assert targets.is_contiguous()


def test_get_batch_reaches_every_start_equally() -> None:
    torch.manual_seed(0)
    firsts = torch.cat([get_batch(np.arange(100, dtype=np.uint16), 32, 7, "cpu")[0][:, 0] for _ in range(1000)])
    counts = torch.bincount(firsts, minlength=93)
    assert len(counts) == 93
    deviation = (32_000 / 93 * (92 / 93)) ** 0.5
    assert float((counts - 32_000 / 93).abs().max()) < 5 * deviation


def test_get_batch_is_reproducible(tiny_set: TinySet) -> None:
    stream = TokenStream.open(tiny_set.path)
    a, b = get_batch(stream, 4, 64, seed=9), get_batch(tiny_set.stream, 4, 64, seed=9)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], get_batch(stream, 4, 64, seed=10)[0])
    torch.manual_seed(5)
    first = get_batch(stream, 4, 64)
    torch.manual_seed(5)
    assert torch.equal(first[1], get_batch(stream, 4, 64)[1])


def test_get_batch_of_rows_and_of_too_little() -> None:
    inputs, targets = get_batch(np.arange(64, dtype=np.uint16).reshape(4, 16), 5, 63, "cpu")
    assert torch.equal(inputs[0], torch.arange(63))
    assert torch.equal(targets[4], torch.arange(1, 64))
    with pytest.raises(LmError, match="too few"):
        get_batch(np.arange(64, dtype=np.uint16), 5, 64, "cpu")
    with pytest.raises(LmError, match="at least 1"):
        get_batch(np.arange(64, dtype=np.uint16), 0, 8, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_get_batch_on_cuda() -> None:
    for dtype in (np.uint16, np.uint32, np.int64):
        data = np.arange(40_000, 65_000).astype(dtype)
        inputs, targets = get_batch(data, 8, 128, "cuda", seed=1)
        expected = get_batch(data, 8, 128, "cpu", seed=1)
        assert inputs.device.type == "cuda"
        assert torch.equal(inputs.cpu(), expected[0])
        assert torch.equal(targets.cpu(), expected[1])
