"""Which windows are trained on: every batch is a pure function of (seed, dataset_id, sample index).

Nothing hides in an iterator, so there is no sampler state to save: a run at sample s continues at sample s, with any
number of ranks, accumulation steps, workers or restarts. With N tokens and context length T a window is T+1 tokens,
inputs and targets shifted by one.

    word(purpose, i)   64-bit word i of the Philox4x64-10 stream whose key is the first 16 bytes of
                       sha256(canonical JSON of ["lmshards/1", purpose, seed, dataset_id]), little-endian
    order "random"     start(g) = word("random", g) mod (N - T): i.i.d. uniform over all valid starts
    order "epoch"      K = N // T windows, e = g // K, start(g) = (phase_e + T * pi_e(g mod K)) mod N on the ring
                       phase_e = word("phase", e) mod N; pi_e = keyed permutation of 0..K-1

In one epoch every token is a target exactly once, except N mod T of them, which the phase chooses anew each time. pi_e
is a Feistel network over ceil(log2 K) bits with six rounds and cycle walking (Black and Rogaway 2002): a permutation in
O(1) memory. Only raw words are used: NumPy promises stable streams for bit generators, not for Generator methods
(NEP 19). docs/format.md states the law exactly enough for a second implementation.

    sampler = Sampler(TokenStream.open("shards/stdlib/train"), context_length=1024, seed=1)
    sampler.batch(step * batch_size, batch_size)                                      # (batch_size, 1025)

    get_batch(np.memmap("train.bin", np.uint16), 64, 1024, "cpu")                     # the classical function
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lmcore import storage
from lmcore.data.manifest import FORMAT
from lmcore.data.stream import TokenStream
from lmcore.errors import Exit, LmError

if TYPE_CHECKING:
    import torch

Order = Literal["epoch", "random"]
Words = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.int64]

ROUNDS = 6
MIX_BLOCK = 1 << 16  # samples over which a mixture keeps its weights exactly
MANY_EPOCHS = 4.0  # repeating data beyond this helps less and less (Muennighoff et al. 2023)
_BLOCK = 1 << 14  # permuted indices computed at a time


# ---------------------------------------------------------------------------------------- random words


def words(purpose: str, seed: int, dataset_id: str, first: int, count: int) -> Words:
    """Words first .. first+count-1 of one stream: (count,) uint64."""
    generator = np.random.Philox(key=_key(purpose, seed, dataset_id))
    generator.advance(first // 4)  # a block is four words
    raw: Words = generator.random_raw(first % 4 + count)
    return raw[first % 4 :]


@functools.lru_cache(1024)
def _key(purpose: str, seed: int, dataset_id: str) -> int:
    digest = hashlib.sha256(storage.canonical_json([FORMAT, purpose, seed, dataset_id])).digest()
    return int.from_bytes(digest[:16], "little")


def permute(index: npt.ArrayLike, size: int, keys: Words) -> Positions:
    """pi(index) for a permutation pi of 0..size-1 chosen by `keys` (ROUNDS words); vectorised.

    An alternating Feistel network on the halves of `bits` = ceil(log2 size) bits (low half the larger) is a bijection
    of 0..2^bits-1; values that fall outside are sent through it again until they are inside.
    """
    bits = (size - 1).bit_length()
    low_bits = np.uint64(bits - bits // 2)
    high_mask, low_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << int(low_bits)) - 1)
    value = np.array(index, np.uint64).reshape(-1)
    todo = np.arange(value.size)
    current = value
    while todo.size:
        high, low = current >> low_bits, current & low_mask
        for number in range(ROUNDS):
            if number % 2 == 0:
                high = high ^ (_mix(low + keys[number]) & high_mask)
            else:
                low = low ^ (_mix(high + keys[number]) & low_mask)
        current = (high << low_bits) | low
        value[todo] = current
        outside = current >= size
        todo, current = todo[outside], current[outside]
    return value.astype(np.int64)


def _mix(x: Words) -> Words:
    """The finalizer of splitmix64: every input bit reaches every output bit. Arithmetic is modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------------------------------- one source


class Sampler:
    """Windows of one stream in a fixed endless order."""

    def __init__(self, stream: TokenStream, *, context_length: int, seed: int, order: Order = "epoch") -> None:
        """context_length: T, the number of targets of a sample. Raises LmError (65) when the stream is too short."""
        if order not in ("epoch", "random"):
            raise LmError(f"order={order!r}: choose epoch or random.")
        self.stream, self.context_length, self.seed, self.order = stream, context_length, seed, order
        self.n_valid = valid_starts(stream.n_tokens, context_length, stream.path)
        self.n_windows = stream.n_tokens // context_length
        """Samples of an epoch, in either order: the stream's tokens divided by T."""
        self._epoch = -1
        self._phase = 0
        self._keys: Words = np.empty(0, np.uint64)
        self._blocks: dict[tuple[int, int], Positions] = {}

    @property
    def dataset_id(self) -> str:
        return self.stream.dataset_id

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stream.dtype

    def epoch_of(self, sample: int) -> float:
        """How often the data has been seen after `sample` samples: 1.5 is half-way through the second epoch."""
        return sample / self.n_windows

    def warnings(self, samples: int) -> list[str]:
        """A sentence when a run of `samples` samples repeats the data more than four times."""
        sentence = many_epochs(str(self.stream.path or "the array"), self.epoch_of(samples))
        return [sentence] if sentence else []

    def starts(self, first_sample: int, count: int) -> Positions:
        """Stream positions of samples first_sample .. first_sample+count-1: (count,) int64."""
        if first_sample < 0 or count < 0:
            raise LmError(f"samples {first_sample} + {count}: sample numbers start at 0.")
        if self.order == "random":
            raw = words("random", self.seed, self.dataset_id, first_sample, count)
            return (raw % np.uint64(self.n_valid)).astype(np.int64)
        result = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, index = divmod(first_sample + done, self.n_windows)
            part = self._epoch_starts(epoch, index)[: count - done]
            result[done : done + len(part)] = part
            done += len(part)
        return result

    def batch(self, first_sample: int, count: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """The windows of these samples: (count, T+1) in the stored dtype; `out` is filled when given."""
        starts = self.starts(first_sample, count)
        return self.stream.windows(starts, self.context_length + 1, out, wrap=self.order == "epoch")

    def _epoch_starts(self, epoch: int, index: int) -> Positions:
        """Starts of window numbers `index`.. of an epoch, up to the end of a block."""
        block = index // _BLOCK
        found = self._blocks.get((epoch, block))
        if found is None:
            n, t = self.stream.n_tokens, self.context_length
            keys = words("permutation", self.seed, self.dataset_id, epoch * ROUNDS, ROUNDS)
            phase = int(words("phase", self.seed, self.dataset_id, epoch, 1)[0]) % n
            numbers = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.n_windows))
            found = (phase + t * permute(numbers, self.n_windows, keys)) % n
            # Replaced whole, so that threads see a complete dictionary; two blocks cover a batch across a border.
            self._blocks = dict([*self._blocks.items()][-1:]) | {(epoch, block): found}
        return found[index - block * _BLOCK :]


def many_epochs(name: str, epochs: float) -> str:
    """What to say of a source that is seen so often; nothing when that is usual."""
    if epochs <= MANY_EPOCHS:
        return ""
    return (
        f"{name}: seen {epochs:.1f} times in this run; beyond about {MANY_EPOCHS:.0f} epochs repeated data helps less "
        "and less."
    )


def valid_starts(n_tokens: int, context_length: int, name: Any = None) -> int:
    """V = N - T, the number of windows of T+1 tokens; an LmError (65) with the numbers when there is none."""
    if context_length < 1:
        raise LmError(f"context_length={context_length}: at least 1.")
    if n_tokens <= context_length:
        raise LmError(
            f"{name or 'the data'}: {n_tokens:,} tokens are too few for a context length of {context_length:,}"
            f" ({context_length + 1:,} are needed).",
            hint=f"Use more data, or a context length of at most {max(n_tokens - 1, 1):,}.",
            code=Exit.DATA,
        )
    return n_tokens - context_length


# ---------------------------------------------------------------------------------------- several sources


@dataclass(frozen=True)
class SourceShare:
    """What a mixture takes from one source."""

    name: str
    weight: float
    """As asked for, normalised to a sum of 1."""
    realised: float
    """Share of the samples actually drawn."""
    samples: int
    epochs: float
    """How often the source has been seen."""


class Mixture:
    """Samples of several sources in the proportion of their weights, by the same law.

    Every block of 65,536 samples holds each source exactly round(65,536 * weight) times (at least once), in an order
    permuted per block, so the realised ratios are the weights and not a draw. The k-th sample taken from a source is
    sample k of that source's own `Sampler`: adding a source or changing weights reshuffles none of them.
    """

    def __init__(
        self,
        sources: Sequence[tuple[TokenStream, float]],
        *,
        context_length: int,
        seed: int,
        order: Order = "epoch",
        names: Sequence[str] | None = None,
    ) -> None:
        if not sources:
            raise LmError("a mixture needs at least one source.")
        weights = np.array([weight for _, weight in sources], np.float64)
        if not np.all(np.isfinite(weights)) or np.any(weights <= 0):
            raise LmError(f"mixture weights must be positive numbers, got {weights.tolist()}.")
        self.samplers = [Sampler(s, context_length=context_length, seed=seed, order=order) for s, _ in sources]
        self.names = (
            list(names) if names is not None else [str(s.path or f"array {i}") for i, (s, _) in enumerate(sources)]
        )
        self.weights = weights / weights.sum()
        self.context_length, self.seed, self.order = context_length, seed, order
        self.quotas = quotas(self.weights, MIX_BLOCK)
        self.dtype: np.dtype[Any] = np.result_type(*(s.dtype for s in self.samplers))
        self._bounds = np.cumsum(self.quotas)
        self._block: tuple[int, npt.NDArray[np.int64], Positions] | None = None

    @property
    def dataset_id(self) -> str:
        """The source's own when there is one; else sha256 over [[dataset_id, quota], ...] in the given order."""
        if len(self.samplers) == 1:
            return self.samplers[0].dataset_id
        parts = [[s.dataset_id, int(q)] for s, q in zip(self.samplers, self.quotas, strict=True)]
        return hashlib.sha256(storage.canonical_json([FORMAT, "mixture", parts])).hexdigest()

    @property
    def n_windows(self) -> int:
        """Samples until the first source has been seen once."""
        return min(int(s.n_windows * MIX_BLOCK / q) for s, q in zip(self.samplers, self.quotas, strict=True))

    def epoch_of(self, sample: int) -> float:
        """Epochs of the source that has been seen most often."""
        return max(share.epochs for share in self.shares(sample))

    def locate(self, first_sample: int, count: int) -> tuple[npt.NDArray[np.int64], Positions]:
        """(source number, sample number inside that source) of each sample."""
        source, inner = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            block, index = divmod(first_sample + done, MIX_BLOCK)
            part = min(count - done, MIX_BLOCK - index)
            of_block, rank = self._draw(block)
            chosen = of_block[index : index + part]
            source[done : done + part] = chosen
            inner[done : done + part] = block * self.quotas[chosen] + rank[index : index + part]
            done += part
        return source, inner

    def batch(self, first_sample: int, count: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """(count, T+1) windows; the dtype is the widest of the sources."""
        if out is None:
            out = np.empty((count, self.context_length + 1), self.dtype)
        source, inner = self.locate(first_sample, count)
        for number in np.unique(source):
            rows = np.flatnonzero(source == number)
            out[rows] = self.samplers[number].batch(int(inner[rows[0]]), len(rows))  # inner runs on without gaps
        return out

    def shares(self, samples: int) -> list[SourceShare]:
        """Realised ratios and epochs per source after `samples` samples."""
        block, index = divmod(samples, MIX_BLOCK)
        taken = block * self.quotas
        if index:
            taken = taken + np.bincount(self._draw(block)[0][:index], minlength=len(self.samplers))
        return [
            SourceShare(name, float(w), float(k) / samples if samples else 0.0, int(k), s.epoch_of(int(k)))
            for name, w, k, s in zip(self.names, self.weights, taken, self.samplers, strict=True)
        ]

    def warnings(self, samples: int) -> list[str]:
        """A sentence for each source that a run of `samples` samples repeats more than four times."""
        told = [many_epochs(share.name, share.epochs) for share in self.shares(samples)]
        return [sentence for sentence in told if sentence]

    def _draw(self, block: int) -> tuple[npt.NDArray[np.int64], Positions]:
        """(source of each sample of the block, its rank among the block's samples of that source)."""
        if self._block is not None and self._block[0] == block:
            return self._block[1], self._block[2]
        keys = words("mixture", self.seed, "", block * ROUNDS, ROUNDS)
        source = np.searchsorted(self._bounds, permute(np.arange(MIX_BLOCK), MIX_BLOCK, keys), "right")
        rank = np.empty(MIX_BLOCK, np.int64)
        for number, quota in enumerate(self.quotas):
            rank[source == number] = np.arange(quota)
        self._block = (block, source, rank)
        return source, rank


def quotas(weights: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Whole numbers that sum to `total`, proportional to the weights (largest remainder), each at least 1."""
    if len(weights) > total:
        raise LmError(f"a mixture of {len(weights):,} sources is too fine; {total:,} is the limit.")
    exact = weights * total
    whole = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (missing := total - int(whole.sum())) != 0:
        step = 1 if missing > 0 else -1
        gap = np.where((whole + step) >= 1, (exact - whole) * step, -np.inf)
        whole[int(np.argmax(gap))] += step
    return whole


# ---------------------------------------------------------------------------------------- the classical function


def get_batch(
    data: TokenStream | npt.NDArray[Any],
    batch_size: int,
    context_length: int,
    device: str | torch.device = "cpu",
    *,
    seed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random batch for next-token prediction: (inputs, targets), each (batch_size, context_length) int64 on `device`.

    data: integer tokens as a 1-D array or memmap (more dimensions are read in C order) or a TokenStream. Every valid
    start is equally likely; targets[i, t] is the token after inputs[i, t]. seed: None draws from torch's global
    generator, so torch.manual_seed repeats a run; a number (the step, say) makes the batch a function of it alone.
    Raises LmError (65) when the data is too short.
    """
    import torch

    stream = data if isinstance(data, TokenStream) else TokenStream.from_array(data)
    if batch_size < 1:
        raise LmError(f"batch_size={batch_size}: at least 1.")
    n_valid = valid_starts(stream.n_tokens, context_length, stream.path)
    if seed is None:
        starts = torch.randint(n_valid, (batch_size,)).numpy()
    else:
        starts = (words("random", seed, "", 0, batch_size) % np.uint64(n_valid)).astype(np.int64)
    return to_device(stream.windows(starts, context_length + 1), device)


def to_device(windows: npt.NDArray[Any], device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T+1) windows -> (inputs, targets), int64 (B, T) on `device`.

    The small stored dtype crosses to a GPU, from pinned memory and without waiting, and is widened there: a quarter of
    the bytes of int64. Unsigned ids travel as signed numbers of the same width, which every device knows, and get their
    value back by a mask.
    """
    import torch

    device = torch.device(device)
    signed, mask = _CARRIERS.get(windows.dtype.str, (None, 0))
    tensor = torch.from_numpy(windows.view(signed) if signed else windows.astype(np.int64))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True)
    parts = []
    for part in (tensor[:, :-1], tensor[:, 1:]):
        wide = part.to(torch.int64).contiguous()
        parts.append(wide.bitwise_and_(mask) if mask else wide)
    return parts[0], parts[1]


_CARRIERS = {"<u2": ("<i2", 0xFFFF), "<u4": ("<i4", 0xFFFF_FFFF)}
