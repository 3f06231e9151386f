"""Self-speculation: the multi-token heads guess, and the model checks several guesses in one pass.

A pass reads the last token and the drafts t'_1 .. t'_n together and gives the model's own logits at each of these
places. The token at a place is drawn from them exactly as without speculation, with the random number that belongs to
the place (sampling.py). As long as it equals the draft, the next place is valid too; so a pass settles 1 to n + 1
tokens. The drafts are drawn with the same random numbers, which makes them agree with the model far more often than
independent draws would. Greedy or sampled, the rule by which a token follows from the logits is that of plain decoding,
so in exact arithmetic the text is the same, token for token. What differs is rounding: several places are computed at
once, which sums products in another order. In fp32 that changes hardly a text; in bf16 logits move by about 1 %, and
now and then a draw that falls near the border of two tokens goes to the other one. The text goes on from there as
another sample of the same model.

Attention caches forget refused drafts by getting shorter; states of a fixed size go back to a snapshot and read the
settled tokens again (`LanguageModel.keep_prefix`), which costs a second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lmcore.inference.decode import Decoder
from lmcore.model.model import LanguageModel
from lmcore.model.mtp import Drafter

Draw = Callable[[Tensor, int], Tensor]
"""draw(logits (1, V), number of tokens before) -> id (1,)."""


class Speculator:
    """One text. `settle` yields the logits of place after place until a draft is refused."""

    def __init__(self, model: LanguageModel, decoder: Decoder, draw: Draw) -> None:
        self.model, self.decoder, self.draw = model, decoder, draw
        self.depths = len(model.mtp)
        self.passes = 0
        self.drafted = 0
        self.accepted = 0

    def start(self, context: Sequence[int], read: Sequence[int], capacity: int, piece: int) -> None:
        """Read all tokens but the last one. read: the part of `context[:-1]` that the cache starts from."""
        device = self.model.embedding.weight.device
        room = capacity + self.depths + 1
        self.state = self.model.init_state(1, room)
        self.drafter = Drafter(self.model, 1, room, logits=self.decoder.logits, heads=self.decoder.ahead)
        self.position = len(read)
        tokens = torch.tensor([[*read, context[-1]]], device=device)
        for begin in range(0, len(read), piece):
            end = min(begin + piece, len(read))
            hidden = self.decoder.read(tokens[:, begin:end], self.state)
            self.drafter.commit(hidden, tokens[:, begin + 1 : end + 1])

    def settle(self, context: list[int], most: int) -> Iterator[Tensor]:
        """Yields logits (1, V); after each, the caller appends the token that it draws to `context`, or stops.

        most: places that may still be read (the room in the cache).
        """
        device = self.model.embedding.weight.device
        drafts: list[int] = []
        known = len(context)
        count = min(self.depths, most - 1)
        if self.position > 0 and count > 0:
            place = iter(range(known, known + self.depths))
            proposed = self.drafter.propose(lambda logits: self.draw(logits, next(place)))
            drafts = [int(token) for token in proposed[0, :count]]
        tokens = torch.tensor([[context[-1], *drafts]], device=device)
        before = self.state.snapshot()
        hidden = self.decoder.read(tokens, self.state)  # (1, 1 + n, D)
        logits = self.decoder.logits(hidden[0])
        self.passes += 1
        self.drafted += len(drafts)
        settled = 0
        for index in range(len(drafts) + 1):
            yield logits[index : index + 1]
            settled += 1
            if index < len(drafts) and context[-1] != drafts[index]:
                break
        self.accepted += settled - 1
        if settled < tokens.shape[1]:
            self.model.keep_prefix(self.state, before, tokens, torch.tensor([settled], device=device))
        self.position += settled
        self.drafter.commit(hidden[:, :settled], torch.tensor([context[known : known + settled]], device=device))
