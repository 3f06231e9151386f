"""The batches of a run: which rows a rank reads at a step, prepared ahead on a thread and checked on the host.

A step consumes the samples first .. first + rows - 1 of the data order; lane j of S holds a contiguous range of them,
and a micro-batch is a contiguous range of a lane. What a row holds is a pure function of its sample number
(data/sampler.py), so nothing here needs saving. Token ids are compared with the vocabulary before they reach a device,
where an id out of range would be a crash without a name.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmcore.data.sampler import Mixture
from lmcore.errors import Exit, LmError


class Samples(Protocol):
    """Rows by sample number: lmcore.data's Sampler and Mixture, and the stream of an on-the-fly source."""

    def batch(self, first_sample: int, count: int) -> npt.NDArray[Any]:
        """(count, context_length + 1) token ids."""


@dataclass(frozen=True)
class Shape:
    """How the rows of a step are divided: `rows` = lanes x micro-batches per lane x `micro` rows."""

    rows: int
    lanes: int
    micro: int

    @property
    def micro_per_lane(self) -> int:
        return self.rows // self.lanes // self.micro

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step over all ranks."""
        return self.lanes * self.micro_per_lane


@dataclass(frozen=True)
class MicroBatch:
    """inputs, targets: (micro, T) int64 on the host. lane: which lane it belongs to; last: whether it ends the lane."""

    lane: int
    last: bool
    first_sample: int
    inputs: Tensor
    targets: Tensor
    membership: Tensor | None = None
    """(sources, micro) fp32 on the host: 1 where a row comes from a source of a mixture; None with one source."""


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one rank at one step."""

    step: int
    first_sample: int
    micro_batches: tuple[MicroBatch, ...]
    read_s: float
    """How long reading and checking took, on the thread."""
    source_rows: tuple[int, ...] = ()
    """Rows of the whole step, over all ranks, from each source of a mixture."""
    source_state: dict[str, Any] | None = None
    """Where a text source can start reading again to reach this step; a shortcut that decides nothing."""


class Loader:
    """Iterates over steps from (step, sample) on, with a thread that works ahead. Close it, or use it in a `with`."""

    def __init__(
        self,
        samples: Samples,
        shape: Shape,
        *,
        vocab_size: int,
        step: int,
        sample: int,
        steps: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        """steps: the run's last step + 1; nothing is read beyond it. pin: page-locked memory, for CUDA."""
        self._samples, self._shape, self._vocab_size = samples, shape, vocab_size
        share = shape.lanes // world_size
        self._lanes = range(rank * share, (rank + 1) * share)
        self._pin = pin
        self._mixture = samples if isinstance(samples, Mixture) else None
        self._queue: queue.Queue[StepBatch | BaseException | None] = queue.Queue(prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(step, sample, steps), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)  # make room for the thread to notice
            except queue.Empty:
                continue
        self._thread.join()

    # ------------------------------------------------------------------------------------ on the thread

    def _work(self, step: int, sample: int, steps: int) -> None:
        try:
            while step < steps and not self._closed.is_set():
                self._put(self._read(step, sample))
                step, sample = step + 1, sample + self._shape.rows
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: StepBatch | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _read(self, step: int, sample: int) -> StepBatch:
        began = time.monotonic()
        shape, batches = self._shape, []
        origin = self._mixture.locate(sample, shape.rows)[0] if self._mixture is not None else None  # (rows,)
        numbers = np.arange(len(self._mixture.samplers)) if self._mixture is not None else None
        for lane in self._lanes:
            for part in range(shape.micro_per_lane):
                first = sample + (lane * shape.micro_per_lane + part) * shape.micro
                tokens = self._samples.batch(first, shape.micro)  # (micro, T + 1)
                largest = int(tokens.max())
                if largest >= self._vocab_size:
                    raise LmError(
                        f"sample {first:,} of the training data holds the token id {largest:,}; the vocabulary of the "
                        f"model ends at {self._vocab_size - 1:,}.",
                        hint="Check the data with: lm validate shards/NAME",
                        code=Exit.DATA,
                    )
                wide = tokens.astype(np.int64)
                inputs = torch.from_numpy(np.ascontiguousarray(wide[:, :-1]))
                targets = torch.from_numpy(np.ascontiguousarray(wide[:, 1:]))
                if self._pin:
                    inputs, targets = inputs.pin_memory(), targets.pin_memory()
                membership = None
                if origin is not None and numbers is not None:
                    own = origin[first - sample : first - sample + shape.micro]
                    membership = torch.from_numpy((own[None] == numbers[:, None]).astype(np.float32))
                batches.append(MicroBatch(lane, part == shape.micro_per_lane - 1, first, inputs, targets, membership))
        rows = () if origin is None or numbers is None else tuple(np.bincount(origin, minlength=len(numbers)).tolist())
        state = getattr(self._samples, "state", None)
        read_s = time.monotonic() - began
        return StepBatch(step, sample, tuple(batches), read_s, rows, state() if state is not None else None)
