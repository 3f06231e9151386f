"""The README.md of an exported model: Hugging Face front matter and what a reader must know before using the model.

Everything in it comes from the checkpoint, the manifests of the training data and the run's log; nothing is typed by
hand and nothing is claimed that was not recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcore.training.checkpoint import LoadedModel

_CURVE_POINTS = 12


def model_card(
    loaded: LoadedModel, record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], *, parameters: int
) -> str:
    """Markdown text. record: what `export.provenance` returned; metrics: lines of metrics.jsonl."""
    config = loaded.model.config
    layers = "".join(f"{layer.mixer}{layer.ffn}" for layer in config.layers)
    facts = [
        ("Parameters", f"{parameters:,}"),
        ("Architecture", f"{record['family']}, {config.num_layers} layers, width {config.d_model} ({layers})"),
        ("Heads", f"{config.num_heads} query, {config.num_kv_heads} key/value, size {config.head_dim}"),
        ("Context length", f"{config.context_length:,} tokens"),
        ("Vocabulary", f"{config.vocab_size:,} tokens"),
        ("Number format", str(record["dtype"])),
        ("Training steps", _number(record.get("step"))),
        ("Training tokens", _number(record.get("tokens"))),
    ]
    if len(record["checkpoints"]) > 1:
        steps = ", ".join(str(source["step"]) for source in record["checkpoints"])
        facts.append(("Weights", f"mean of the checkpoints of steps {steps}"))
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- lmshards\n---\n",
        "# A language model trained with lmshards\n",
        "A base model: it continues text. It was not tuned to follow instructions, and it can write anything that its "
        "training data made likely.\n",
        _table(["", ""], facts),
        "## Training data\n",
        _data(record),
        "## Results\n",
        _results(metrics, loaded),
        "## Use\n",
        "```python\nfrom transformers import pipeline\n\n"
        'write = pipeline("text-generation", model=".")\n'
        'print(write("Once upon a time", max_new_tokens=50)[0]["generated_text"])\n```\n',
        "Score it on benchmarks with the Language Model Evaluation Harness (run in this directory):\n",
        '```sh\npip install "lm_eval[hf]"\n'
        "lm_eval --model hf --model_args pretrained=.,dtype=float32 --tasks hellaswag,arc_easy --batch_size 8\n```\n",
        "## Configuration\n",
        "<details><summary>Resolved configuration of the training run</summary>\n",
        f"```yaml\n{loaded.config.to_yaml().rstrip()}\n```\n",
        "</details>\n",
        "`lmshards.json` holds the same facts for programs; `lm info` verifies it.\n",
    ]
    return "\n".join(parts)


def _data(record: Mapping[str, Any]) -> str:
    rows = []
    for source in record["data"]:
        rows.append(
            (
                str(source.get("path")),
                _number(source.get("tokens")),
                _number(source.get("documents")),
                f"{source.get('weight', 1.0):g}",
                _origin(source.get("source")),
                f"`{str(source.get('dataset_id'))[:16]}`",
            )
        )
    if not rows:
        return "Not recorded.\n"
    return _table(["set", "tokens", "documents", "weight", "source", "dataset_id"], rows)


def _origin(source: Any) -> str:
    """One phrase about where a set's text came from."""
    if not isinstance(source, Mapping):
        return "not recorded"
    known = [
        f"{key}: {source[key]}"
        for key in ("kind", "dataset", "repo", "repository", "revision", "commit", "config", "split", "python")
        if source.get(key) and not isinstance(source[key], dict | list)
    ]
    return "; ".join(known) or "not recorded"


def _results(metrics: Sequence[Mapping[str, Any]], loaded: LoadedModel) -> str:
    validation = loaded.state.get("validation") or {}
    text = ""
    if validation.get("loss") is not None:
        bits = validation.get("bits_per_byte")
        text += f"Validation loss {validation['loss']:.4f} nats per token"
        text += f", {bits:.4f} bits per byte" if bits is not None else ""
        text += f" on {', '.join(loaded.config.data.val or ('the validation set',))}.\n"
    curve = [r for r in metrics if r.get("kind") == "val" and isinstance(r.get("loss"), float)]
    if len(curve) > _CURVE_POINTS:
        curve = [curve[i * (len(curve) - 1) // (_CURVE_POINTS - 1)] for i in range(_CURVE_POINTS)]
    if curve:
        rows = [
            (f"{r['step']:,}", f"{r['loss']:.4f}", f"{r['bits_per_byte']:.4f}" if r.get("bits_per_byte") else "")
            for r in curve
        ]
        text += "\n" + _table(["step", "validation loss", "bits per byte"], rows)
    return text or "Not recorded.\n"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "not recorded"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what comes from files cannot break out of its cell."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines) + "\n"


def _cell(value: str) -> str:
    quoted = json.dumps(value, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    return quoted.replace("|", "\\|").replace("<", "&lt;")
