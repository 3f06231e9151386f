"""config.json of another program, read so that nothing in it is overlooked.

A family declares every key that may stand in its config.json, as one of

    read      a value that our model is made of: its kind, what its absence means in their class, the setting of ours
    fixed     a value that their mathematics depends on and of which we carry one (or a few)
    inert     a value that changes nothing that we compute, as long as it is of its kind

and nothing else: an unknown key, a value of another kind and a value that we do not carry are each refused by name.
"Equal or refused" rests on this table being complete, which the tests check against transformers' own classes.

Kinds are as strict as transformers' classes are (a whole number is no float there, true is no number), and bounded, so
that no value can ask for memory or time before the tensors were compared with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmcore.errors import Exit, LmError

MOST_LAYERS = 10_000
MOST_EXPERTS = 1 << 16
_MOST = 1 << 31
_LONGEST_SHOWN = 80
_SMALL = re.compile("[0-9]{1,9}")


class Kind(NamedTuple):
    """What a value may be."""

    holds: Callable[[Any], bool]
    says: str


def whole(low: int = 1, high: int = _MOST) -> Kind:
    """A whole number of a range."""
    return Kind(lambda v: type(v) is int and low <= v <= high, f"a whole number from {low:,} to {high:,}")


def number(low: float = 0.0, high: float = 1.0, *, whole_too: bool = False) -> Kind:
    """A finite number above `low`, at most `high`; written with a point unless `whole_too`."""

    def holds(value: Any) -> bool:
        sound = type(value) is float or (whole_too and type(value) is int)
        return sound and low < value <= high  # NaN is not

    return Kind(holds, f"a number above {low:g}, at most {high:g}" + ("" if whole_too else ", written with a point"))


def zero_or(kind: Kind) -> Kind:
    """0.0, too."""
    return Kind(lambda v: (type(v) is float and v == 0.0) or kind.holds(v), f"0.0 or {kind.says}")


def null_or(kind: Kind) -> Kind:
    """null, too."""
    return Kind(lambda v: v is None or kind.holds(v), f"null or {kind.says}")


def list_of(kind: Kind) -> Kind:
    """A list of one kind."""
    return Kind(lambda v: type(v) is list and all(map(kind.holds, v)), f"a list ({kind.says})")


FLAG = Kind(lambda v: type(v) is bool, "true or false")
TEXT = Kind(lambda v: type(v) is str, "a text")
OBJECT = Kind(lambda v: type(v) is dict, "an object")
COUNT = whole()
ANY_NUMBER = Kind(lambda v: type(v) in (int, float) and abs(v) <= _MOST, "a number")
TOKEN = whole(-1)  # -1 is how some say "none"
THETA = number(high=float(1 << 53), whole_too=True)
DTYPE = Kind(
    lambda v: v in ("float32", "bfloat16", "float16", "float64", None), "float32, bfloat16, float16 or float64"
)
LABELS = Kind(
    lambda v: type(v) is dict and all(_SMALL.fullmatch(str(k)) and type(x) is str for k, x in v.items()),
    "an object of texts by number",
)
LABEL_IDS = Kind(lambda v: type(v) is dict and all(type(x) is int for x in v.values()), "an object of numbers")


@dataclass(frozen=True)
class Key:
    """One key of config.json (see the module's docstring)."""

    kind: Kind | None
    default: Any = None
    """What its absence means in their class."""
    ours: str = ""
    """Dotted name of the setting of ours that is the same value, in both directions."""
    only: tuple[Any, ...] | None = None
    """The values that we carry, None when every value of its kind is."""
    written: bool = False
    """Whether an export writes the first of `only`."""


def read(kind: Kind, default: Any, ours: str = "") -> Key:
    """A key whose value our model is made of."""
    return Key(kind, default, ours)


def fixed(*only: Any, default: Any = ..., written: bool = True) -> Key:
    """A key of which we carry these values only; `default` when it is not the first of them."""
    return Key(None, only[0] if default is ... else default, only=only, written=written)


def inert(kind: Kind) -> Key:
    """A key that changes nothing."""
    return Key(kind)


def unless_set(*only: Any) -> Key:
    """A key that is not their class's, or of no use there, but means something elsewhere: only these values pass."""
    return Key(None, only[0], only=only)


COMMON: dict[str, Key] = {
    "model_type": inert(TEXT),
    "architectures": inert(null_or(list_of(TEXT))),
    "transformers_version": inert(null_or(TEXT)),
    "_name_or_path": inert(TEXT),
    "dtype": inert(DTYPE),
    "torch_dtype": inert(DTYPE),
    "use_cache": inert(FLAG),
    "bos_token_id": inert(null_or(TOKEN)),
    "eos_token_id": inert(
        Kind(lambda v: v is None or TOKEN.holds(v) or list_of(TOKEN).holds(v), "null, a token or a list of tokens")
    ),
    "pad_token_id": read(null_or(TOKEN), None),
    "initializer_range": read(number(), 0.02, "init_std"),
    "output_hidden_states": unless_set(False, None),
    "output_attentions": unless_set(False),
    "return_dict": unless_set(True),
    "chunk_size_feed_forward": unless_set(0),
    "is_encoder_decoder": unless_set(False),
    "id2label": inert(LABELS),
    "label2id": inert(LABEL_IDS),
    "problem_type": unless_set(None),
    "auto_map": unless_set({}),  # code of their own
    "quantization_config": unless_set(None),
    # What older versions wrote into every file.
    "add_cross_attention": unless_set(False),
    "bad_words_ids": unless_set(None),
    "cross_attention_hidden_size": unless_set(None),
    "decoder_start_token_id": unless_set(None),
    "finetuning_task": unless_set(None),
    "is_decoder": unless_set(False),
    "prefix": unless_set(None),
    "pruned_heads": unless_set({}),
    "sep_token_id": unless_set(None),
    "task_specific_params": unless_set(None),
    "tf_legacy_loss": unless_set(False),
    "tie_encoder_decoder": unless_set(False),
    "tokenizer_class": inert(null_or(TEXT)),
    "torchscript": unless_set(False),
    "use_bfloat16": unless_set(False),
    "_attn_implementation_autoset": inert(FLAG),
    # Marks of other programs.
    "transformers.js_config": inert(OBJECT),
    "unsloth_fixed": inert(FLAG),
    "unsloth_version": inert(TEXT),
}
"""Keys that every family's class has, or that stand in files of every family."""


class Reading(dict[str, Any]):
    """The values of a config.json by key, absent ones as their class has them, and what we cannot carry."""

    def __init__(self, hf: Mapping[str, Any], keys: Mapping[str, Key], where: str) -> None:
        super().__init__()
        self.where = where
        self.problems: list[str] = []
        self.unknown = [key for key in hf if key not in keys]
        for key, spec in keys.items():
            value = hf.get(key, spec.default)
            if spec.only is not None:
                if not any(_same(value, carried) for carried in spec.only):
                    self.refuse(key, value, "" if key in hf else "that is what its absence means")
            elif key in hf or spec.default is not None:
                assert spec.kind is not None
                if not spec.kind.holds(value):
                    raise self.wrong(key, value, spec.kind)
            self[key] = value

    def refuse(self, key: str, value: Any, why: str = "") -> None:
        """Remember a value that we cannot carry."""
        self.problems.append(f"{shown(key)}: {shown(value)}{f' ({why})' if why else ''}")

    def wrong(self, key: str, value: Any, kind: Kind) -> LmError:
        """The error for a value that no such model can have."""
        return LmError(
            f"{self.where}: {shown(key)} is {shown(value)}, but must be {kind.says}.",
            hint="Get the file again from where the model came from, or save the model with save_pretrained.",
            code=Exit.DATA,
        )

    def check(self, family: str) -> None:
        """LmError (2) that names every key and value that we cannot carry."""
        if self.problems:
            raise LmError(f"{self.where}: settings that our {family} models do not have: {_first(self.problems)}.")
        if self.unknown:
            raise LmError(
                f"{self.where}: {family} is not known to have these keys, and what they change is not known either: "
                f"{_first([shown(key) for key in self.unknown])}.",
                hint="If a key changes nothing that the model computes, take it out of config.json.",
            )


def _first(items: list[str], most: int = 10) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def _same(a: Any, b: Any) -> bool:
    """Equal and of one type, inside of lists, too: 0 is not false, 1 is not 1.0."""
    return bool(a == b) and repr(a) == repr(b)


def shown(value: Any) -> str:
    """A value of a foreign file for a sentence: plain characters, and not too many."""
    text = value if isinstance(value, str) else _json(value)
    text = text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _json(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError):  # a number of thousands of digits
        return f"a {type(value).__name__} that cannot be shown"


# ---------------------------------------------------------------------------------------- what several families share


def decoder(**class_defaults: Any) -> dict[str, Key]:
    """The keys of a decoder with attention. `class_defaults` are those in which their classes differ."""
    d = class_defaults
    heads = d["num_key_value_heads"]
    return COMMON | {
        "vocab_size": read(COUNT, d["vocab_size"], "vocab_size"),
        "hidden_size": read(COUNT, d["hidden_size"], "d_model"),
        "intermediate_size": read(COUNT, d["intermediate_size"], "d_ff"),
        "num_hidden_layers": read(whole(1, MOST_LAYERS), d["num_hidden_layers"], "num_layers"),
        "num_attention_heads": read(COUNT, d["num_attention_heads"], "num_heads"),
        "num_key_value_heads": read(null_or(COUNT) if d.get("null_heads") else COUNT, heads, "num_kv_heads"),
        "head_dim": read(null_or(COUNT) if d.get("null_head_dim") else COUNT, d.get("head_dim"), "head_dim"),
        "max_position_embeddings": read(COUNT, d["max_position_embeddings"], "context_length"),
        "rms_norm_eps": read(number(), 1e-6, "norm_eps"),
        "tie_word_embeddings": read(FLAG, False, "tie_embeddings"),
        "rope_theta": read(null_or(THETA), 10_000.0, "rope_theta"),
        "rope_scaling": read(null_or(OBJECT), None),
        "rope_parameters": read(null_or(OBJECT), None),
        "partial_rotary_factor": unless_set(1.0, 1),
        "hidden_act": fixed("silu", "swish"),
        "attention_bias": fixed(False),
        "attention_dropout": inert(ANY_NUMBER),
    }


def heads(reading: Reading) -> dict[str, Any]:
    """num_heads, num_kv_heads, head_dim and the angles of attention, as our settings."""
    count, width = reading["num_attention_heads"], reading["hidden_size"]
    size = reading["head_dim"] or width // count
    kv = reading["num_key_value_heads"] or count
    if size < 1 or size % 2:
        reading.refuse("head_dim", size, "rotary positions need pairs")
    if count % kv:
        reading.refuse("num_attention_heads", count, f"not a multiple of num_key_value_heads {kv}")
    return {"num_kv_heads": kv, "head_dim": size, "rope_theta": rope_theta(reading)}


def rope_theta(reading: Reading) -> float:
    """The base of the angles, which all turn at their plain rates: anything else is refused.

    transformers reads `rope_scaling or rope_parameters`, then the base and the share inside of it, then those on top.
    """
    name = "rope_scaling" if reading["rope_scaling"] else "rope_parameters"
    inside = reading[name] or {}
    for key, value in inside.items():
        if key not in ("rope_theta", "rope_type", "type", "partial_rotary_factor"):
            reading.refuse(f"{name}.{key}", value)
    kind = inside.get("rope_type", inside.get("type", "default"))
    if kind != "default" or inside.get("type", "default") != "default":
        reading.refuse("rope_type", kind if kind != "default" else inside["type"])
    share = inside.get("partial_rotary_factor", 1.0)
    if type(share) not in (int, float) or share != 1.0:
        reading.refuse("partial_rotary_factor", share)
    theta = inside.get("rope_theta", reading["rope_theta"])
    if not THETA.holds(theta):
        raise reading.wrong("rope_theta", theta, THETA)
    return float(theta)


def write_rope(theta: float, **more: Any) -> dict[str, Any]:
    """The keys of plain angles: on top, where readers before transformers 5 look, and where newer ones do."""
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta} | more, **more}


LAYER_LETTERS = {"full_attention": "A", "sliding_attention": "W"}


def windows(reading: Reading, window: int | None) -> dict[str, Any]:
    """pattern and window of families that say per layer, or from which layer on, a window acts."""
    layers, kinds = reading["num_hidden_layers"], reading["layer_types"]
    if kinds is None:
        first = reading["max_window_layers"] if window is not None else layers
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    letters = layer_letters(reading, "layer_types", kinds, LAYER_LETTERS)
    if "W" in letters and window is None:
        reading.refuse("sliding_window", window, "layers with a window, and no window")
    return {"pattern": period(letters), "window": window if "W" in letters else 0}


def write_windows(letters: str, window: int) -> dict[str, Any]:
    """layer_types, and the window where there is one."""
    names = {letter: name for name, letter in LAYER_LETTERS.items()}
    return {
        "layer_types": [names[letter] for letter in letters],
        "sliding_window": window if "W" in letters else None,
        "max_window_layers": 0 if "W" in letters else len(letters),
    }


def layer_letters(reading: Reading, key: str, kinds: list[str], letters: Mapping[str, str]) -> str:
    """One letter of ours per layer."""
    layers = reading["num_hidden_layers"]
    if len(kinds) != layers:
        reading.refuse(key, f"{len(kinds)} layers", f"num_hidden_layers says {layers}")
    for kind in dict.fromkeys(kinds):
        if kind not in letters:
            reading.refuse(key, kind)
    return "".join(letters.get(kind, "A") for kind in kinds[:layers])


def sparse_keys(**class_defaults: Any) -> dict[str, Key]:
    """The keys of experts in the Qwen families."""
    d = class_defaults
    return {
        "num_experts": read(whole(1, MOST_EXPERTS), d["num_experts"], "moe.num_experts"),
        "num_experts_per_tok": read(COUNT, d["num_experts_per_tok"], "moe.top_k"),
        "moe_intermediate_size": read(COUNT, d["moe_intermediate_size"], "moe.d_expert"),
        "norm_topk_prob": read(FLAG, d["norm_topk_prob"], "moe.route_norm"),
        "router_aux_loss_coef": read(zero_or(number(high=1e6)), 0.001, "moe.balance_weight"),
        "output_router_logits": fixed(False, written=False),
        "decoder_sparse_step": read(COUNT, 1),
        "mlp_only_layers": read(null_or(list_of(whole(-_MOST))), None),
    }


def sparse_layers(reading: Reading) -> dict[str, Any]:
    """ffn of the Qwen families: experts in every k-th layer that is not listed as dense."""
    step, dense = reading["decoder_sparse_step"], frozenset(reading["mlp_only_layers"] or ())
    letters = "".join(
        "e" if i not in dense and (i + 1) % step == 0 else "d" for i in range(reading["num_hidden_layers"])
    )
    return experts(reading, letters)


def write_sparse_layers(ffns: str) -> dict[str, Any]:
    """The same, by a list of the dense layers."""
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, letter in enumerate(ffns) if letter == "d"]}


def experts(reading: Reading, ffns: str, **settings: Any) -> dict[str, Any]:
    """ffn, and what their training of experts is in ours: a balance loss, no z-loss, no selection bias."""
    defaults: dict[str, Any] = {"bias_rate": 0.0, "z_weight": 0.0}
    if "e" not in ffns:
        return {"ffn": period(ffns)}
    return {"ffn": period(ffns)} | {f"moe.{name}": value for name, value in (defaults | settings).items()}


def require_choice(reading: Reading, total: str, *, most_norm: bool = True) -> None:
    """As many experts per token as there are, at most; and no norm of the only weight, which has no gradient."""
    chosen = reading["num_experts_per_tok"]
    if chosen > reading[total]:
        reading.refuse("num_experts_per_tok", chosen, f"{total} is {reading[total]}")
    if most_norm and chosen == 1 and reading["norm_topk_prob"]:
        reading.refuse("norm_topk_prob", True, "with one expert per token its weight is 1, and the router is untrained")


def period(letters: str) -> str:
    """'AMAM' -> 'AM': the shortest string that tiles to the same layers."""
    for length in range(1, len(letters)):
        if letters == (letters[:length] * (len(letters) // length + 1))[: len(letters)]:
            return letters[:length]
    return letters
