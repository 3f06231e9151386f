"""Configuration as data: frozen pydantic models, YAML 1.2 scalars, overrides, and errors that name file, line and key.

Precedence: defaults in the model < preset or YAML file < `--set a.b=c` < flags. Every layer is a plain nested dict
until `build` turns the merged dict into a frozen model; so there is one place where a value is checked.

PyYAML follows YAML 1.1, where `1e-3` is text, `off` is a boolean and `010` is eight. The loader here resolves scalars
as YAML 1.2 does, refuses a key that appears twice, and can build no Python object.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic._internal._model_construction import ModelMetaclass

from lmcore.errors import Exit, LmError, from_os_error


class SettingError(LmError, ValueError):
    """Values that a configuration does not take. A ValueError too, so that pydantic reports one inside of another."""


class _Readable(ModelMetaclass):
    """`ModelConfig(d_model=-1)` in Python is answered as a file or a flag is: by an LmError that names the setting."""

    if not TYPE_CHECKING:  # the signature of the fields is what a type checker should see

        def __call__(cls, *args: Any, **values: Any) -> Any:
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise _readable(cls, error) from None


class Config(BaseModel, metaclass=_Readable):
    """Base of every configuration section: frozen, unknown keys refused, no NaN, help text from docstrings.

    Raises LmError (2) for values that do not fit.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, data: Any) -> Any:
        """Lax validation would read `lr: true` as 1.0."""
        if isinstance(data, Mapping):
            for key, value in data.items():
                field = cls.model_fields.get(key)
                if isinstance(value, bool) and field is not None and not _accepts_bool(field.annotation):
                    raise ValueError(f"{key}: a boolean is not accepted here (got {str(value).lower()})")
        return data


def _accepts_bool(annotation: Any) -> bool:
    if annotation is bool or annotation is Any:
        return True
    return any(_accepts_bool(argument) for argument in get_args(annotation))


_SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmbgt]?)", re.IGNORECASE)


def parse_count(value: Any) -> Any:
    """'10B' -> 10_000_000_000, '1.5M' -> 1_500_000, '32k' -> 32_000. Other values pass through unchanged."""
    if isinstance(value, str) and (match := _COUNT.fullmatch(value.strip())):
        try:
            number = Decimal(match[1].replace("_", "")) * _SUFFIXES.get(match[2].lower(), 1)
        except ArithmeticError:  # an exponent of many digits
            number = Decimal("inf")
        if number > 10**24:
            raise ValueError("the number is too large")
        if number != number.to_integral_value():
            raise ValueError(f"{value!r} is not a whole number")
        return int(number)
    return value


Count = Annotated[int, BeforeValidator(parse_count)]
"""A whole number that may be written with a suffix: 10B, 1.5M, 32k (powers of ten)."""

SYNONYMS: dict[str, str] = {
    "learning_rate": "lr",
    "max_lr": "lr",
    "batch": "batch_tokens",
    "block_size": "context_length",
    "seq_len": "context_length",
    "max_seq_len": "context_length",
    "max_seq_length": "context_length",
    "n_layer": "num_layers",
    "n_layers": "num_layers",
    "num_hidden_layers": "num_layers",
    "n_head": "num_heads",
    "n_heads": "num_heads",
    "num_attention_heads": "num_heads",
    "n_embd": "d_model",
    "hidden_size": "d_model",
    "model_dim": "d_model",
    "intermediate_size": "d_ff",
    "n_experts": "num_experts",
    "moe_top_k": "top_k",
    "dim": "d_model",
    "n_kv_heads": "num_kv_heads",
    "num_key_value_heads": "num_kv_heads",
    "batch_size": "micro_batch",
    "per_device_train_batch_size": "micro_batch",
    "gradient_accumulation_steps": "micro_batch",
    "global_batch_size": "batch_tokens",
    "grad_clip": "clip",
    "max_grad_norm": "clip",
    "wd": "weight_decay",
    "min_lr": "final_fraction",
    "lr_scheduler_type": "schedule",
    "max_iters": "steps",
    "max_steps": "steps",
    "total_tokens": "tokens",
    "warmup_iters": "warmup_steps",
    "eval_interval": "every_steps",
    "save_total_limit": "keep",
}
"""What people of other trainers type -> our leaf name; used only to suggest, never to accept silently."""
_SAME_WORD = {
    "val": "eval",
    "validate": "eval",
    "validation": "eval",
    "save": "checkpoint",
    "ckpt": "checkpoint",
    "logging": "log",
    "interval": "every",
    "freq": "every",
    "frequency": "every",
    "iters": "steps",
    "iterations": "steps",
}

C = TypeVar("C", bound=BaseModel)
_MOST_ERRORS, _LONGEST_VALUE = 20, 120
_MOST_YAML_BYTES = 1 << 20


# ---------------------------------------------------------------------------------------- YAML 1.2


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and unique keys."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which the loader above would read as something else."""


_NUMBERS = [
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
]
_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _NUMBERS:
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first))
    _Dumper.add_implicit_resolver(_tag, _pattern, list(_first))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    if text.lstrip("+-") in (".inf", ".nan"):
        return float(text.replace(".", ""))
    number = float(text)
    return int(number) if "e" in text and "." not in text and number.is_integer() and "-" not in text else number


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))  # 010 is ten, as in YAML 1.2


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' appears twice (lines {seen[key]} and {line})", key_node.start_mark
            )
        seen[key] = line
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


_LONE_DASH = re.compile(r"(?m)^([ \t]*[A-Za-z_]\w*:[ \t]+)-([ \t]*(?:#.*)?)$")
"""A value that is nothing but a dash: the letter of a layer without a feed-forward, and not a list of one nothing."""


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text; `source` names it in errors."""
    try:
        return yaml.load(_LONE_DASH.sub(r'\1"-"\2', text), Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        raise LmError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or error}).") from error
    except (ValueError, RecursionError) as error:
        raise LmError(f"{source}: not valid YAML ({error}).") from error


def dump_yaml(value: Any) -> str:
    """YAML text that `parse_yaml` and any YAML 1.2 parser read back as the same value."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=None))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping (an empty file is an empty mapping)."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_YAML_BYTES + 1)
        text = raw.decode()
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    except UnicodeDecodeError as error:
        raise LmError(f"{path}: not UTF-8 text.") from error
    if len(raw) > _MOST_YAML_BYTES:
        raise LmError(f"{path}: larger than {_MOST_YAML_BYTES >> 20} MiB, which is no configuration.")
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise LmError(f"{path}: a mapping of settings is expected, not a {type(value).__name__}.")
    return value


# ---------------------------------------------------------------------------------------- layers


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings, later ones win; an empty section (None) changes nothing."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping):
                below = result.get(key)
                result[key] = merge(below if isinstance(below, Mapping) else {}, value)
            elif not (value is None and isinstance(result.get(key), dict)):
                result[key] = value
    return result


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """['optim.lr=3e-4', 'train.steps=10'] -> nested dict; values are read as YAML."""
    result: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not key or not all(key.split(".")):
            raise LmError(f"--set {assignment}: expected KEY=VALUE, such as --set optim.lr=3e-4.")
        if not text.strip():
            raise LmError(
                f"--set {assignment}: no value is given; is a variable of the shell empty?",
                hint=f"For the default leave it out, or write --set {key}=null.",
            )
        nested: Any = "-" if text.strip() == "-" else parse_yaml(text, f"--set {key}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def build(model: type[C], data: Mapping[str, Any], *, source: str | None = None) -> C:
    """Validate a merged dict into a frozen model. Errors are reported at once, with lines when `source` is a file."""
    cleaned = _drop_empty_sections(model, data)
    try:
        return model.model_validate(cleaned)
    except ValidationError as error:
        raise _readable(model, error, source) from None


def _readable(model: type[BaseModel], error: ValidationError, source: str | None = None) -> SettingError:
    """One sentence per fault, with the line when `source` is a file."""
    lines = _line_numbers(source) if source and Path(source).is_file() else {}
    sentences = []
    items = error.errors()
    for item in items[:_MOST_ERRORS]:
        location = tuple(str(part) for part in item["loc"])
        line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
        prefix = f"{source}:{line}: " if line else (f"{source}: " if source else "")
        sentences.append(prefix + _sentence(model, location, item))
    if len(items) > _MOST_ERRORS:
        sentences.append(f"... and {len(items) - _MOST_ERRORS} more.")
    return SettingError("\n".join(sentences), code=Exit.USAGE)


def same_name(given: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `given` is, by letters and digits alone: 'rtx4090' is 'RTX 4090'."""
    wanted = _letters(given)
    return next((name for name in names if name == given), None) or next(
        (name for name in names if wanted and _letters(name) == wanted), None
    )


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """'; did you mean gpt2-124m?' for the nearest of `names`, the end of a sentence when none is near."""
    by_letters = {_letters(name): name for name in names}
    near = difflib.get_close_matches(_letters(given), by_letters, 1, 0.6)
    return f"; did you mean {by_letters[near[0]]}?" if near else "."


def _letters(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def require_sections(model: type[BaseModel], data: Mapping[str, Any], prefix: str = "") -> None:
    """LmError when something else stands where a section is expected, for readers of dicts that are not built yet."""
    for key, value in data.items():
        inner = model.model_fields[key].annotation if key in model.model_fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel) and value is not None:
            if not isinstance(value, Mapping):
                raise LmError(f"{prefix}{key}: a section with settings is expected (got {_brief(repr(value))}).")
            require_sections(inner, value, f"{prefix}{key}.")


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted setting names of a config model, in order."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        names.extend(leaves(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"])
    return names


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _drop_empty_sections(model: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """`optim:` without content arrives as None and means an empty section, unless the field itself accepts None."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        field = model.model_fields.get(key)
        inner = _section(field.annotation) if field else None
        if inner is not None and value is None and field is not None and type(None) not in get_args(field.annotation):
            value = {}
        result[key] = _drop_empty_sections(inner, value) if inner and isinstance(value, Mapping) else value
    return result


def _sentence(model: type[BaseModel], location: tuple[str, ...], item: Mapping[str, Any]) -> str:
    name = _brief(".".join(location))
    if item["type"] == "extra_forbidden":
        return f"{name} is not a setting.{_suggest(model, name)}"
    if item["type"] == "missing":
        return f"{name} is missing."
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message[:1].isupper() and message[1:2].islower() else message
    value = item.get("input")
    shown = "" if isinstance(value, Mapping | BaseModel) else f" (got {_brief(repr(value))})"
    return f"{name + ': ' if name else ''}{message}{shown}."


def _brief(text: str) -> str:
    """A hostile file must not fill the screen."""
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _suggest(model: type[BaseModel], name: str) -> str:
    names = leaves(model)
    section, _, leaf = name.rpartition(".")
    by_leaf: dict[str, list[str]] = {}
    for known in names:
        by_leaf.setdefault(known.rpartition(".")[2], []).append(known)
    # A section is a name too: `evl:` under train.
    places = dict.fromkeys([*names, *(known.rpartition(".")[0] for known in names), *model.model_fields])
    siblings = {known.rpartition(".")[2]: known for known in places if known.rpartition(".")[0] == section}
    # Leaves are compared, for what a section has in common with itself says nothing; but two letters are too few.
    candidates = (
        by_leaf.get(leaf)
        or by_leaf.get(SYNONYMS.get(leaf, ""))
        or [siblings[near] for near in difflib.get_close_matches(leaf, siblings, 1, 0.75)]
        or sorted((known for known in names if _words(leaf) <= _words(known)), key=lambda known: len(_words(known)))
        or by_leaf.get(next(iter(difflib.get_close_matches(leaf, by_leaf, 1, 0.7)), ""))
        or [siblings[near] for near in difflib.get_close_matches(leaf, siblings, 1, 0.6)]
        or difflib.get_close_matches(name, siblings.values(), 1, 0.85)
    )
    return f" Did you mean {candidates[0]}?" if candidates else ""


def _words(name: str) -> set[str]:
    """log_every and train.log.every_steps have their words in common, whatever stands between them."""
    return {_SAME_WORD.get(word, word) for word in re.split(r"[._]", name)}


def _line_numbers(path: str) -> dict[tuple[str, ...], int]:
    """(key path) -> line in the YAML file."""
    result: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, prefix: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                result[(*prefix, key.value)] = key.start_mark.line + 1
                walk(value, (*prefix, key.value))

    try:
        walk(yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=_Loader), ())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return result
