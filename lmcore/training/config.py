"""The configuration of a run: four sections (`model`, `data`, `optim`, `train`), built from a preset and overrides.

    defaults < preset or YAML file < --set a.b=c < flags

A raw configuration is a nested dict until `complete` has looked at the data (the vocabulary comes from the tokenizer,
the validation set from the view beside the training set) and made a frozen `RunConfig` of it. That one is saved in the
run directory and in every checkpoint, without a None that the run would have to guess again.

Settings fall into three classes when a run is continued:

    identity    what the weights mean: architecture, data order, seed, kind of optimizer. Another value is another run.
    schedule    what the next step does: learning rates, batch, length, dtype. Changed only with --override, and
    recorded. free        how the work is done: device, micro-batch, evaluation, checkpoints, logging. May change at
    any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lmcore.config import Config, Count, build, merge, parse_yaml, read_yaml
from lmcore.errors import LmError
from lmcore.model.config import ModelConfig
from lmcore.model.plan import plan_model
from lmcore.optim.config import OptimConfig
from lmcore.optim.scale import scale

KeyClass = Literal["identity", "schedule", "free"]

# ---------------------------------------------------------------------------------------- data


class Source(Config):
    """One set of token shards and its share of the training samples."""

    path: str
    weight: float = Field(default=1.0, gt=0)


class DataConfig(Config):
    """What to train on."""

    train: tuple[Source, ...] = (Source(path="shards/stdlib"),)
    """Training sets: a path, or {path: weight, ...} for a mixture. Of a set that was split, its train/ view is
    taken."""
    val: tuple[str, ...] | None = None
    """Validation sets. None: the val/ view beside each training set; []: no validation."""
    order: Literal["epoch", "random"] = "epoch"
    """epoch: every token once per epoch in a keyed random order. random: independent uniform offsets (get_batch)."""
    verify: Literal["first-use", "full", "size"] = "first-use"
    """When the content of a shard is hashed: when it is first read, before the start, or never (links always)."""
    stream: str | None = None
    """A source of text (what `lm tokenize` takes) that is tokenized while training; no shards are needed."""
    tokenizer: str | None = None
    """Only with `stream`, and needed there: byte, a tokenizer.json or a Hub name."""
    text_column: str = "text"
    """Only with `stream`: the column or key that holds the text."""
    format: Literal["auto", "text", "jsonl", "parquet", "arrow"] = "auto"
    """Only with `stream`: what the files are, as `lm tokenize --format` says it."""
    separator: str | None = None
    """Only with `stream`: where text files fall into documents, as `lm tokenize --separator` says it."""

    @field_validator("train", mode="before")
    @classmethod
    def _several_spellings(cls, value: Any) -> Any:
        if isinstance(value, str):
            return ({"path": value},)
        if isinstance(value, Mapping) and "path" not in value:
            return tuple({"path": path, "weight": weight} for path, weight in value.items())
        if isinstance(value, Mapping):
            return (value,)
        if isinstance(value, list | tuple):
            return tuple({"path": item} if isinstance(item, str) else item for item in value)
        return value

    @field_validator("val", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            return () if value in ("none", "") else (value,)
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        paths = [source.path for source in self.train]
        if not paths:
            raise ValueError("train: at least one set is needed")
        if len(set(paths)) != len(paths):
            raise ValueError(f"train: {next(p for p in paths if paths.count(p) > 1)} is listed twice")
        return self


# ---------------------------------------------------------------------------------------- train


class EvalConfig(Config):
    """Validation during training. It never touches the state of the training."""

    every_steps: int = Field(default=250, ge=0)
    """Steps between validations; 0 means only at the end."""
    tokens: Count = Field(default=262_144, ge=1)
    """Tokens of the validation set to score, in windows spread evenly over it; at the end the same."""


class CheckpointConfig(Config):
    """When to save and what to keep."""

    every_steps: int = Field(default=250, ge=0)
    """Steps between checkpoints; 0 means only at the end and on a signal."""
    keep: int = Field(default=2, ge=1)
    """Newest verified checkpoints to keep."""
    keep_every: int | None = Field(default=None, ge=1)
    """Keep for good every checkpoint whose step is a multiple of this."""
    background: bool = True
    """Write on a thread while training goes on; the step only waits for a copy in memory."""
    space_check: bool = True
    """Refuse to start when the disk has no room for `keep` + 1 checkpoints."""


class LogConfig(Config):
    """What is reported. metrics.jsonl always holds every step."""

    every_steps: int = Field(default=10, ge=1)
    """Steps between lines on the console."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run directory."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (WANDB_MODE=offline works)."""


class GuardConfig(Config):
    """What happens when a step goes wrong."""

    bad_in_a_row: int = Field(default=3, ge=1)
    """Give up (exit 70) after this many steps in a row with a non-finite loss or gradient; none reaches the weights."""
    bad_in_1000: int = Field(default=10, ge=1)
    """Give up after this many such steps within 1,000."""
    on_spike: Literal["off", "warn", "skip", "rollback", "stop"] = "warn"
    """What to do when the loss jumps. rollback: back to an older checkpoint, then past the data of the spike."""
    spike_score: float = Field(default=6.0, gt=0)
    """A spike is this many robust standard deviations above the median of the last finite steps."""
    spike_window: int = Field(default=128, ge=16)
    """Steps that the median and the deviation are taken over."""
    rollback_steps: int = Field(default=100, ge=1)
    """Rollback goes at least this many steps back."""
    skip_steps: int = Field(default=200, ge=0)
    """Steps of data that a rollback leaves out."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Rollbacks before the run stops (exit 70)."""
    audit_every: int = Field(default=0, ge=0)
    """Compute every so many steps a second time and compare the bits, to notice a processor that miscalculates; costs
    the time of those steps, and needs deterministic algorithms. 0: only steps that go wrong are computed again."""


class TrainConfig(Config):
    """How to train."""

    steps: Count | None = Field(default=None, ge=1)
    """Optimizer steps of the whole run. None, and no `tokens` either: 12 tokens per parameter."""
    tokens: Count | None = Field(default=None, ge=1)
    """Length of the run in tokens, instead of `steps`."""
    batch_tokens: Count | None = Field(default=None, ge=1)
    """Tokens per optimizer step over all ranks and micro-batches: rows of context_length tokens. None: by the scaling
    rules, from the size of the model and the length of the run."""
    micro_batch: int | Literal["auto"] = "auto"
    """Rows per forward pass; a matter of memory only. auto: as many as fit comfortably."""
    init_from: str | None = None
    """Run or checkpoint (also an imported model) whose weights a new run begins with. The architecture comes from it;
    the data must have been made by its tokenizer."""
    seed: int = Field(default=1337, ge=0, lt=1 << 63)
    """Starts the weights, the data order and dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:N, mps; auto takes what is there."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the arithmetic; weights and optimizer stay fp32. auto: bf16 where the machine is fast at it, else
    fp32."""
    tf32: bool = True
    """Let fp32 matrix products use TF32 on GPUs that have it."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile. auto: on CUDA; on a CPU when the run is long enough to win back the time it takes."""
    flash_attention: Literal["torch", "fa4"] = "torch"
    """Kernels of attention on CUDA: those of torch, or FlashAttention-4 (`pip install flash-attn-4`, Hopper and
    Blackwell), which is faster where sums have a fixed order (deterministic)."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass instead of keeping them: less memory, more time, the same numbers."""
    reduce: Literal["auto", "exact", "fast"] = "auto"
    """exact: gradients are summed in an order that does not depend on the number of ranks, so 1, 2 and 4 ranks give the
    same bits. fast: in the order that costs least. auto: exact on CPU, fast on GPU."""
    shard: Literal["none", "full"] = "none"
    """full: the weights and gradients are divided between the ranks too (FSDP2, block by block), for models that do not
    fit one device; needs reduce=fast, runs without torch.compile, and gives the losses of none within rounding."""
    lanes: int | Literal["auto"] = "auto"
    """Parts of a batch whose gradients are summed as a binary tree (exact only): a power of two, at least the number of
    ranks. auto: the largest up to 4 (or the number of ranks) that divides the rows of a step."""
    deterministic: bool | Literal["auto"] = "auto"
    """Use deterministic algorithms only, so that a run that is continued gives the same bits. auto: on CPU and CUDA.
    On a GPU its attention costs 7 to 9 % of a step of a dense model of 124M or 1B, less with flash_attention=fa4."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; None leaves the choice to torch. Part of bit-exactness."""
    prefetch: int = Field(default=2, ge=1, le=64)
    """Batches prepared ahead on a thread."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Save and leave (exit 75) before this much time is over."""
    dist_timeout_s: float = Field(default=120.0, gt=0)
    """Several processes: how many seconds one waits in a step for another that hangs before all leave (exit 74)."""
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens both give the length of the run; give one of them")
        return self

    @property
    def checkpoint_every(self) -> int:
        """Every how many layers activations are recomputed (LanguageModel.checkpoint_every); 0: none."""
        return {"none": 0, "selective": 2, "full": 1}[self.activation_checkpointing]

    @model_validator(mode="after")
    def _audits_compare_bits(self) -> Self:
        if self.guard.audit_every and self.deterministic is False:
            raise ValueError("guard.audit_every compares bits; leave deterministic at auto or set it to true")
        return self

    @field_validator("micro_batch", "lanes")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("lanes")
    @classmethod
    def _power_of_two(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value & (value - 1):
            raise ValueError("must be a power of two")
        return value


# ---------------------------------------------------------------------------------------- the whole


class RunConfig(Config):
    """The configuration of a run."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.batch_tokens is None:
            return self
        rows, rest = divmod(self.train.batch_tokens, self.model.context_length)
        if rest or not rows:
            below, above = max(rows, 1) * self.model.context_length, (rows + 1) * self.model.context_length
            near = f"{below:,}" if below == above else f"{below:,} or {above:,}"
            raise ValueError(
                f"train.batch_tokens: {self.train.batch_tokens:,} is not a whole number of rows of "
                f"model.context_length = {self.model.context_length:,}; the nearest are {near}"
            )
        return self

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step, of a completed configuration."""
        assert self.train.batch_tokens is not None
        return self.train.batch_tokens

    @property
    def rows(self) -> int:
        """Rows (windows of context_length tokens) of one optimizer step, of a completed configuration."""
        return self.batch_tokens // self.model.context_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, of a completed configuration."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return math.ceil(self.train.tokens / self.batch_tokens)

    def to_yaml(self) -> str:
        """The configuration as YAML that `read_run_config` reads back as the same value."""
        from lmcore.config import dump_yaml

        return dump_yaml(self.model_dump(mode="json"))


def read_run_config(path: str | Path) -> RunConfig:
    """Read a resolved configuration, such as the config.yaml of a run or a checkpoint."""
    return build(RunConfig, read_yaml(path), source=str(path))


def complete(raw: Mapping[str, Any], *, vocab_size: int, train: Sequence[Source], val: Iterable[str]) -> RunConfig:
    """A raw nested dict and what the data say -> the frozen configuration.

    vocab_size: of the tokenizer of the data; a different `model.vocab_size` in `raw` must not be smaller.
    """
    given = raw.get("model", {}).get("vocab_size") if isinstance(raw.get("model"), Mapping) else None
    if isinstance(given, int) and given < vocab_size:
        raise LmError(
            f"model.vocab_size = {given:,} is too small for the data, whose tokenizer has {vocab_size:,} entries.",
            hint="Leave model.vocab_size out: it is taken from the data.",
        )
    filled = merge(
        raw,
        {
            "model": {} if given is not None else {"vocab_size": vocab_size},
            "data": {"val": list(val)} | ({"train": [source.model_dump() for source in train]} if train else {}),
        },
    )
    return settled(build(RunConfig, filled))


def settled(config: RunConfig) -> RunConfig:
    """The configuration with batch, length and optimizer settings decided: nothing that depends on them is None."""
    train, optim = config.train, config.optim
    if train.batch_tokens is None or (train.steps is None and train.tokens is None):
        # The size dial (lmcore/optim/scale.py): what was not given follows from the model and what was given.
        size = plan_model(config.model).scaling_parameters
        tokens, batch = train.tokens, train.batch_tokens
        if train.steps is not None:
            dial = scale(parameters=size, context_length=config.model.context_length)
            tokens = train.steps * (batch or dial.batch_tokens)
        dial = scale(parameters=size, context_length=config.model.context_length, tokens=tokens, batch_tokens=batch)
        train = train.model_copy(update={"batch_tokens": dial.batch_tokens, "steps": train.steps or dial.steps})
        optim = dial.optim(optim)
    elif train.steps is None:
        assert train.tokens is not None
        train = train.model_copy(update={"steps": math.ceil(train.tokens / train.batch_tokens)})
    steps = train.steps
    assert steps is not None
    train = train.model_copy(update={"tokens": None})
    return config.model_copy(update={"train": train, "optim": optim.resolved(steps)})


# ---------------------------------------------------------------------------------------- presets


def preset_names() -> list[tuple[str, str]]:
    """(name, one-line description) of every preset: the first comment line of its file."""
    found: list[tuple[str, str]] = []
    for entry in sorted(resources.files("lmcore.presets").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").partition("\n")[0]
            found.append((entry.name.removesuffix(".yaml"), first.lstrip("# ").strip()))
    return found


def read_preset(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """(short name, raw configuration) of a preset by name or of a YAML file by path."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.name == "config.yaml" and (path.parent / "checkpoints").is_dir():
            return path.parent.name, read_yaml(path)
        return path.stem, read_yaml(path)
    entry = resources.files("lmcore.presets") / f"{name_or_path}.yaml"
    if not entry.is_file():
        import difflib

        names = [name for name, _ in preset_names()]
        near = difflib.get_close_matches(name_or_path, names, 1)
        raise LmError(
            f"{name_or_path}: no preset of this name{f'; did you mean {near[0]}?' if near else '.'}",
            hint="See them with: lm train --list-presets. A file needs the ending .yaml.",
        )
    raw = parse_yaml(entry.read_text(encoding="utf-8"), f"preset {name_or_path}")
    return name_or_path, raw if isinstance(raw, dict) else {}


# ---------------------------------------------------------------------------------------- continuing a run

# data.train is free because paths mean nothing: what was read is compared by dataset_id and weight (rundir.py).
_IDENTITY = ("model", "data.order", "data.stream", "data.tokenizer", "optim.optimizer", "train.seed", "train.init_from")
_SCHEDULE = ("optim", "model.dropout", "train.steps", "train.tokens", "train.batch_tokens", "train.dtype")


def key_class(key: str) -> KeyClass:
    """The class of a dotted setting when a run is continued; the longest listed prefix decides."""
    best: tuple[int, KeyClass] = (0, "free")
    for prefixes, name in ((_IDENTITY, "identity"), (_SCHEDULE, "schedule")):
        for prefix in prefixes:
            if (key == prefix or key.startswith(prefix + ".")) and len(prefix) > best[0]:
                best = (len(prefix), name)  # type: ignore[assignment]
    return best[1]


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any, KeyClass]]:
    """(key, old value, new value, class) of every setting that differs, in the order of the schema."""
    before, after = flatten(old), flatten(new)
    return [
        (key, before.get(key), after.get(key), key_class(key)) for key in before if before.get(key) != after.get(key)
    ]


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> plain value for every leaf."""
    result: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Config):
            result |= flatten(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = (
                [item.model_dump() if isinstance(item, Config) else item for item in value]
                if isinstance(value, tuple)
                else value
            )
    return result
