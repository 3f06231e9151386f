"""Self-speculation against plain decoding, on a trained model with heads ahead.

    python benchmarks/speculate.py runs/compare/tiny-ahead --data shards/stdlib/val [--texts 8] [--tokens 128]

Prompts of 64 tokens from the data, one text at a time, greedy and sampled (temperature 0.8, top-p 0.95). The two take
turns; medians over the texts of tokens per second of processor time (one thread). Accepted: drafts that stood, of
those made. Checks that both wrote the same texts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from lmcore.data.stream import TokenStream
from lmcore.inference import generate
from lmcore.inference.sampling import SamplingConfig
from lmcore.inference.speculate import Speculator
from lmcore.training.checkpoint import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(options.run)
    stream = TokenStream.open(options.data)
    starts = range(0, len(stream) - 64, max(1, (len(stream) - 64) // options.texts))
    prompts = [stream.read(start, start + 64).tolist() for start in starts][: options.texts]
    made: list[Speculator] = []

    class Counted(Speculator):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            made.append(self)

    generate.Speculator = Counted
    for label, temperature, top_p in (("greedy", 0.0, 1.0), ("sampled", 0.8, 0.95)):
        config = SamplingConfig(max_tokens=options.tokens, temperature=temperature, top_p=top_p, ignore_eos=True)
        speeds: dict[bool, list[float]] = {False: [], True: []}
        same = 0
        made.clear()
        for prompt in prompts:
            texts = []
            for speculate in (False, True):
                began = time.process_time()
                texts.append(generate.complete(loaded, [prompt], config, speculate=speculate)[0].tokens)
                speeds[speculate].append(options.tokens / (time.process_time() - began))
            same += texts[0] == texts[1]
        plain, drafted = (statistics.median(values) for values in speeds.values())
        accepted = sum(s.accepted for s in made) / sum(s.drafted for s in made)
        passes = sum(s.passes for s in made) / (options.tokens * len(prompts))
        print(
            f"{label:8s} plain {plain:6.0f} tok/s  speculative {drafted:6.0f} tok/s  ratio {drafted / plain:.2f}  "
            f"accepted {100 * accepted:.0f} %  passes per token {passes:.2f}  same texts {same} of {len(prompts)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
