"""How much memory a training pass needs, found by running it without data.

The real model runs forward and backward on fake tensors: shapes and lifetimes without numbers, so that a 10-billion
parameter model is examined in seconds on a laptop. Every storage that comes into being is counted until it dies. No
formula for activations has to follow the code of the layers.

What this cannot see is the allocator (its gaps and caches), scratch space inside kernels, and torch.compile, which
fuses and so needs less. Attention is counted as the fused kernel that CPUs and GPUs use for these shapes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmcore.model import routing
from lmcore.model.config import ModelConfig
from lmcore.model.loss import chunk_for, head_cross_entropy
from lmcore.model.model import LanguageModel


@dataclass(frozen=True)
class PassMemory:
    """Bytes beside weights and gradients."""

    kept: int
    """Held at the end of the forward pass for the backward pass."""
    peak: int
    """The most at any time of the two passes, `kept` included."""


def trace_pass(
    config: ModelConfig,
    *,
    rows: int,
    length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    checkpoint_every: int = 0,
    chunk: int | None = None,
) -> PassMemory:
    """Memory of the forward and backward pass of a micro-batch of (rows, length) tokens, computing in `dtype`.

    device_type: whose limits the loss goes by when it decides whether to work in chunks. checkpoint_every: as in
    LanguageModel: recompute every n-th block in the backward pass. chunk: tokens per chunk of the loss instead of what
    the device's limit gives (0: all logits at once), so that a shorter pass can stand for a longer one.
    """
    length = config.context_length if length is None else length
    real, routing.grouped_linear = routing.grouped_linear, _grouped_linear
    try:
        return _trace(config, rows, length, dtype, device_type, checkpoint_every, chunk)
    finally:
        routing.grouped_linear = real


def _trace(
    config: ModelConfig,
    rows: int,
    length: int,
    dtype: torch.dtype,
    device_type: str,
    checkpoint_every: int,
    chunk: int | None,
) -> PassMemory:
    with FakeTensorMode(), _Storages() as storages:
        model = LanguageModel(config).train()
        model.compute_dtype = dtype
        model.checkpoint_every = checkpoint_every

        def head_loss(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            size = chunk_for(targets.numel(), config.padded_vocab, device_type) if chunk is None else chunk
            return head_cross_entropy(model.norm(hidden), model.head_weight, targets, config.vocab_size, chunk=size)

        model._head_loss = head_loss  # type: ignore[method-assign]
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        base = storages.live
        storages.peak = base
        loss = model.loss(tokens, tokens).objective()
        kept = storages.live - base
        loss.backward()
        return PassMemory(kept, storages.peak - base)


def _grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Stands in for the products of experts, which go by counts that fake tensors do not have."""
    return _Grouped.apply(x, weight.to(x.dtype))  # type: ignore[no-any-return,no-untyped-call]


class _Grouped(torch.autograd.Function):
    """The shapes of a grouped product and of its gradients, and what it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(x.shape[0], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Storages(TorchDispatchMode):
    """Sums the bytes of all storages alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
