"""Tokens per second of generation, against `transformers` generate with the same exported weights.

    python benchmarks/generate.py                            # the default sizes, batch 1 and 16, fp32 on the CPU
    python benchmarks/generate.py --threads 1 --tokens 64 --repeats 7

The two take turns, so that a busy machine slows both; medians and their ratio are printed. Greedy, the prompt has 32
tokens, no text ends early. transformers runs with its default cache and with the static one; the faster one counts.
`--clock cpu` with one thread counts processor time, which a busy machine distorts less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lmcore.data.tokenizer import Tokenizer
from lmcore.inference import families
from lmcore.inference.generate import complete
from lmcore.inference.sampling import SamplingConfig
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.training import tensors
from lmcore.training.checkpoint import LoadedModel, model_tensors
from lmcore.training.config import RunConfig, TrainConfig

SIZES: dict[str, dict[str, int]] = {
    "nano": {"d_model": 256, "num_layers": 6, "num_heads": 4, "num_kv_heads": 4, "vocab_size": 8_192},
    "small": {"d_model": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 8_192},
    "base": {"d_model": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 4, "vocab_size": 50_257},
}
PROMPT_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["nano", "small"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for size in arguments.sizes:
        for batch in arguments.batches:
            results.append(measure(size, batch, arguments))
            if not arguments.json:
                r = results[-1]
                print(
                    f"{size:6} {r['parameters'] / 1e6:6.1f}M  batch {batch:3}  ours {r['ours']:8.0f} tok/s  "
                    f"transformers {r['transformers']:8.0f} tok/s ({r['cache']} cache)  ratio {r['ratio']:.2f}",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps({"torch": torch.__version__, "threads": arguments.threads, "results": results}, indent=1))


def measure(size: str, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over interleaved repeats."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    config = ModelConfig(context_length=2_048, **SIZES[size])
    model = LanguageModel(config).to(dtype).eval()
    run = RunConfig(model=config, train=TrainConfig(batch_tokens=config.context_length))
    loaded = LoadedModel(model, Tokenizer.byte(), run, {}, Path("."))
    other = exported(model, dtype)
    prompt = torch.randint(0, 256, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    sampling = SamplingConfig(max_tokens=arguments.tokens, temperature=0, ignore_eos=True)

    def ours() -> list[list[int]]:
        return [text.tokens for text in complete(loaded, prompt.tolist(), sampling, batch_size=batch)]

    def theirs(**options: Any) -> list[list[int]]:
        out = other.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=arguments.tokens,
            min_new_tokens=arguments.tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return [list(row) for row in out[:, PROMPT_TOKENS:].tolist()]

    candidates: dict[str, Callable[[], list[list[int]]]] = {
        "ours": ours,
        "default": theirs,
        "static": lambda: theirs(cache_implementation="static", disable_compile=True),
    }
    if arguments.dtype == "fp32":
        same = [a == b for a, b in zip(ours(), theirs(), strict=True)]
        assert sum(same) >= 0.8 * len(same), "the two do not write the same texts"
    times: dict[str, list[float]] = {name: [] for name in candidates}
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
    for repeat in range(arguments.repeats + 1):
        for name, candidate in candidates.items():
            began = clock()
            candidate()
            if repeat:  # the first round warms up
                times[name].append(clock() - began)
    tokens = batch * arguments.tokens
    speed = {name: tokens / statistics.median(values) for name, values in times.items()}
    cache = max(("default", "static"), key=lambda name: speed[name])
    return {
        "size": size,
        "batch": batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ours": speed["ours"],
        "transformers": speed[cache],
        "cache": cache,
        "ratio": speed["ours"] / speed[cache],
    }


def exported(model: LanguageModel, dtype: torch.dtype) -> Any:
    """The same weights in transformers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        family = families.choose(model.config)
        Path(folder, "config.json").write_text(json.dumps(families.to_hf_config(model.config, family)))
        chunks, _ = tensors.tensor_chunks(families.to_hf_tensors(model_tensors(model), model.config, family))
        Path(folder, "model.safetensors").write_bytes(b"".join(bytes(chunk) for chunk in chunks))
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


if __name__ == "__main__":
    main()
