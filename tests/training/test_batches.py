"""The loader gives exactly the sampler's rows, in lanes, and catches what is wrong with them on the host."""

import threading

import numpy as np
import pytest
import torch

from lmcore.errors import LmError
from lmcore.training.batches import Loader, Shape


class Numbers:
    """Row g is g, g + 1, ..."""

    def __init__(self, fail_at=None):
        self.fail_at = fail_at

    def batch(self, first, count):
        if self.fail_at is not None and first >= self.fail_at:
            raise LmError("the shard is gone", code=65)
        return (np.arange(first, first + count)[:, None] + np.arange(6)).astype(np.uint16)


def rows_of(batch):
    return torch.cat([m.inputs[:, 0] for m in batch.micro_batches]).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("shape", [Shape(16, 4, 2), Shape(16, 8, 1), Shape(16, 4, 4)])
def test_every_rank_count_sees_the_same_rows_in_the_same_lanes(ranks, shape):
    seen = {}
    for rank in range(ranks):
        with Loader(
            Numbers(), shape, vocab_size=10**6, step=3, sample=48, steps=6, rank=rank, world_size=ranks
        ) as loader:
            for batch in loader:
                for micro in batch.micro_batches:
                    seen.setdefault((batch.step, micro.lane), []).extend(micro.inputs[:, 0].tolist())
                    assert torch.equal(micro.targets, micro.inputs + 1)
                    assert micro.inputs.shape == (shape.micro, 5)
                    assert micro.inputs.dtype == torch.int64
    per_lane = shape.rows // shape.lanes
    for (step, lane), rows in seen.items():
        first = 48 + (step - 3) * 16 + lane * per_lane
        assert rows == list(range(first, first + per_lane))
    assert sorted({step for step, _ in seen}) == [3, 4, 5]


def test_an_id_beyond_the_vocabulary_is_an_error_and_not_a_crash():
    loader = Loader(Numbers(), Shape(4, 1, 4), vocab_size=20, step=0, sample=0, steps=9)
    with pytest.raises(LmError, match="token id 20; the vocabulary of the model ends at 19") as caught:
        list(loader)
    assert caught.value.code == 65
    loader.close()


def test_an_error_on_the_thread_comes_out_after_the_good_batches():
    loader = Loader(Numbers(fail_at=8), Shape(4, 1, 4), vocab_size=10**6, step=0, sample=0, steps=9)
    found = []
    with pytest.raises(LmError, match="gone"):
        found.extend(rows_of(batch) for batch in loader)
    loader.close()


def test_closing_ends_the_thread():
    loader = Loader(Numbers(), Shape(4, 1, 4), vocab_size=10**6, step=0, sample=0, steps=10**9)
    next(iter(loader))
    loader.close()
    assert not any(t.name == "loader" for t in threading.enumerate())
