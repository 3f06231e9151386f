"""Validation during training: nats per token and bits per byte over fixed windows of the validation streams.

The windows lie side by side, so that every token but the first is predicted once; when a stream is longer than the
limit, whole windows are taken at even distances. The same windows every time, no random numbers, nothing of the
training's state touched. Bits per byte = sum of nats / ln 2 / bytes of text behind the predicted tokens. `lm eval` does
more (standard errors, loss by position); this is the part that a training run needs every few minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmcore.data.stream import TokenStream
from lmcore.data.text_bytes import TextBytes
from lmcore.model.model import LanguageModel
from lmcore.training.parallel import World


@dataclass(frozen=True)
class Validation:
    """The result on one stream."""

    loss: float
    bits_per_byte: float | None
    tokens: int
    topk_loss: float | None = None
    """Of depth routing that chooses as in training, which sees the future: to be read beside `loss`, never for it."""


def window_starts(n_tokens: int, length: int, max_tokens: int) -> npt.NDArray[np.int64]:
    """Starts of windows of `length` inputs that lie side by side; at most max_tokens / length of them, evenly
    spread."""
    starts = np.arange(0, n_tokens - length, length, dtype=np.int64)
    wanted = max(1, max_tokens // length)
    return starts if len(starts) <= wanted else starts[np.arange(wanted) * len(starts) // wanted]


@torch.no_grad()
def validate(
    model: LanguageModel,
    stream: TokenStream,
    *,
    world: World,
    max_tokens: int,
    batch_rows: int,
    text_bytes: TextBytes | None,
    stopped: Callable[[], bool] = lambda: False,
    together: bool = False,
) -> Validation | None:
    """Score the stream; None when `stopped` said so on the way. The ranks share the windows.

    A model with depth routing reads every window twice, for both losses. together: a forward pass needs all ranks
    (sharded weights), so all run equally many.
    """
    length = min(model.config.context_length, len(stream) - 1)
    windows = window_starts(len(stream), length, max_tokens)
    starts = windows[world.rank :: world.size]
    passes = -(-len(windows[:: world.size]) // batch_rows)  # of the rank with the most windows
    sums = torch.zeros(4, dtype=torch.float64)  # nats, tokens, bytes, nats in top-k mode
    routed = any(kind.depth == "m" for kind in model.config.layers)
    training = model.training
    model.eval()
    halted = False
    try:
        for first in range(0, (passes if together else -(-len(starts) // batch_rows)) * batch_rows, batch_rows):
            if world.maximum(int(stopped())) if together else stopped():
                halted = True
                break
            own = starts[first : first + batch_rows]
            counts = len(own) > 0
            tokens: npt.NDArray[Any] = stream.windows(own if counts else windows[:1], length + 1).astype(np.int64)
            batch = torch.from_numpy(tokens).to(world.device)
            inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
            term = model.loss(inputs, targets).main
            if routed:
                model.set_depth_mode("topk")
                chosen = model.loss(inputs, targets).main
                model.set_depth_mode("auto")
                sums[3] += float(chosen.sum) if counts else 0.0
            if not counts:
                continue
            sums[0] += float(term.sum)
            sums[1] += int(term.count)
            if text_bytes is not None:
                sums[2] += float(text_bytes.count(tokens[:, 1:], own[:, None] + np.arange(1, length + 1)).sum())
    finally:
        model.set_depth_mode("auto")
        model.train(training)
    if world.maximum(int(halted)):
        return None
    sums = sums.to(world.device) if world.size > 1 else sums
    world.sum_(sums)
    nats, count, size, routers = sums.tolist()
    if not count:
        return None
    bits = nats / math.log(2) / size if size else None
    return Validation(nats / count, bits, int(count), routers / count if routed else None)


SINK_TOKENS = 512
"""Tokens of the window that attention is looked at on."""


def attention_sinks(model: LanguageModel, stream: TokenStream) -> list[float]:
    """Share of attention that goes to the first position, per attention layer, on the first window of the stream.

    Near 1: the heads of a layer look at nothing in particular. Empty without attention. No state is touched.
    """
    length = min(model.config.context_length, len(stream) - 1, SINK_TOKENS)
    if length < 2:
        return []
    tokens = torch.from_numpy(stream.windows(np.zeros(1, dtype=np.int64), length).astype(np.int64))
    training = model.training
    model.eval()
    try:
        return [float(x) for x in model.attention_sinks(tokens.to(model.head_weight.device)).tolist()]
    finally:
        model.train(training)
