"""Several presets trained alike and measured side by side.

    compare(["tiny-attention", "tiny-mamba"], out, data="shards/stdlib", budget=Budget(flops=1e13)) -> list of
    Contestant

Every preset is an ordinary run in its own directory under `out`, trained in a process of its own (so that peak memory
is its own), on the same data with the same seed. The budget makes them equal in one respect:

    tokens     the same number of tokens
    flops      the same number of operations, as the planner counts them: cheaper models see more tokens
    minutes    the same time on this machine, from the speed of a few steps measured beforehand

The length of the schedule follows the budget, so that every run ends with its learning rate down. A run that is
complete is not trained again: the same command continues an interrupted comparison.

What comes back: parameters, those active per token, operations, speed, memory, validation loss, and how fast one
sequence is continued when 2,048, 8,192 or 32,768 tokens lie behind it. Decoding is timed on a state of that length that
was not computed but filled in: its cost does not depend on what it holds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lmcore import storage
from lmcore.config import merge
from lmcore.errors import Exit, LmError
from lmcore.model.attention import KVCache
from lmcore.model.model import LanguageModel
from lmcore.model.plan import plan_model
from lmcore.model.state import DecodeState
from lmcore.progress import SILENT, Progress
from lmcore.training.config import RunConfig, read_preset

RESULTS = "compare.json"
PROBE_STEPS = 4
GRACE_S = 10
"""How long after the death of `lm compare` its training goes on before it is told to stop."""


@dataclass(frozen=True)
class Budget:
    """What every contestant gets; exactly one of the three, or none for each preset's own length."""

    tokens: int | None = None
    flops: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.tokens, self.flops, self.minutes) if value is not None]
        if len(given) > 1:
            raise LmError("A comparison has one budget: tokens, flops or minutes.")
        if any(value <= 0 for value in given):
            raise LmError("The budget of a comparison must be positive.")


@dataclass(frozen=True)
class Contestant:
    """What was found out about one preset."""

    name: str
    run: str
    parameters: int
    active: int
    """Parameters that one token meets."""
    flops_per_token: float
    """Operations of a training step per token."""
    tokens: int
    seconds: float
    """Of training, without validation and saving."""
    tokens_per_s: float
    peak_bytes: int
    loss: float | None
    """Validation, nats per token."""
    bits_per_byte: float | None
    decode: dict[int, float] = field(default_factory=dict)
    """Tokens per second of one sequence, by the tokens that lie behind it."""


def compare(
    presets: Sequence[str],
    out: str | Path,
    *,
    data: str | None = None,
    budget: Budget = Budget(),
    settings: Mapping[str, Any] | None = None,
    decode_lengths: Sequence[int] = (2048, 8192, 32_768),
    progress: Progress = SILENT,
) -> list[Contestant]:
    """Train and measure the presets (names or files); see the module. Writes compare.json into `out`."""
    out = Path(out)
    names = [read_preset(preset)[0] for preset in presets]
    if len(set(names)) != len(names):
        raise LmError(f"A preset is named twice: {', '.join(names)}.")
    typed = merge(settings or {}, {"data": {"train": data}} if data is not None else {})
    found: list[Contestant] = []
    for number, preset in enumerate(presets, 1):
        progress.note(f"{names[number - 1]} ({number} of {len(presets)})")
        contestant = _apart(_contest, preset, out, typed, budget, tuple(decode_lengths))
        found.append(contestant)
        score = contestant.bits_per_byte or contestant.loss
        unit = "bits/byte" if contestant.bits_per_byte is not None else "nats/token"
        if score is not None:
            progress.note(f"  {score:.4f} {unit} after {contestant.tokens:,} tokens, {contestant.seconds:.0f} s")
    storage.write_json(out / RESULTS, {"budget": asdict(budget), "contestants": [asdict(c) for c in found]})
    return found


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own, started anew, so that its peak memory is its own.

    When this process is killed, the other one ends as well: training saves and stops, as on a signal.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise LmError(
            f"the process that trains ended without a result (exit code {process.exitcode}).",
            hint="-9 is the system's answer to too little memory. The same command goes on where it stopped.",
            code=Exit.IO,
        ) from None
    finally:
        process.join()
    if error is not None:
        raise error
    return result


def _work(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_follow_parent, daemon=True).start()
    answer: tuple[Any, Exception | None]
    try:
        answer = (function(*arguments), None)
    except Exception as error:
        if not isinstance(error, LmError):
            error.add_note(traceback.format_exc())  # the traceback itself does not travel
        answer = (None, error)
    with contextlib.suppress(BrokenPipeError):
        sender.send(answer)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(GRACE_S)  # a signal to the whole group has come here too, and a second one would not let it save
        os.kill(os.getpid(), signal.SIGTERM)


def _contest(
    preset: str, out: Path, typed: Mapping[str, Any], budget: Budget, decode_lengths: tuple[int, ...]
) -> Contestant:
    """One preset, in its own process."""
    from lmcore.training import rundir
    from lmcore.training.checkpoint import load_model
    from lmcore.training.launch import prepare
    from lmcore.training.loop import train

    name, raw = read_preset(preset)
    run_dir = out / name
    steps = _steps(preset, raw, run_dir, typed, budget)
    length = {} if steps is None else {"train": {"steps": steps, "tokens": None}}
    launch = prepare(run_dir, preset=raw, typed=merge(typed, length))
    result = train(launch)
    if result.reason in ("signal", "time"):
        raise LmError(f"{run_dir}: stopped before its end.", hint="Run the same command again to go on.")
    lines = [line for line in rundir.read_metrics(run_dir) if line.get("kind") == "train"]
    seconds = sum(line["time"]["step_s"] for line in lines)
    config = launch.config
    plan = plan_model(config.model)
    loaded = load_model(run_dir)
    return Contestant(
        name=name,
        run=str(run_dir),
        parameters=plan.parameters,
        active=plan.active,
        flops_per_token=plan.train_flops,
        tokens=result.step * config.batch_tokens,
        seconds=seconds,
        tokens_per_s=_median([line["time"]["tokens_per_s"] for line in lines]),
        peak_bytes=max((line["time"].get("peak_bytes") or 0 for line in lines), default=0),
        loss=result.validation.get("loss"),
        bits_per_byte=result.validation.get("bits_per_byte"),
        decode={n: decode_speed(loaded.model, n) for n in decode_lengths},
    )


def _steps(preset: str, raw: Mapping[str, Any], run_dir: Path, typed: Mapping[str, Any], budget: Budget) -> int | None:
    """Steps that the budget buys; None = the preset's own length."""
    from lmcore.training import rundir
    from lmcore.training.launch import prepare
    from lmcore.training.loop import train

    if budget == Budget():
        return None
    if budget.minutes is not None and (run_dir / rundir.CONFIG).is_file():
        return _known_steps(run_dir)  # measured when the run began
    probe = merge(
        typed,
        {"train": {"steps": PROBE_STEPS, "tokens": None, "eval": {"tokens": 1}, "checkpoint": {"every_steps": 0}}},
    )
    config = prepare(run_dir.with_name(f".probe-{run_dir.name}"), preset=raw, typed=probe).config
    if budget.minutes is None:
        per_step = config.batch_tokens
        wanted = float(budget.tokens or (budget.flops or 0) / plan_model(config.model).train_flops)
        return max(1, round(wanted / per_step))
    folder = run_dir.with_name(f".probe-{run_dir.name}")
    train(prepare(folder, preset=raw, typed=probe))
    lines = [line for line in rundir.read_metrics(folder) if line.get("kind") == "train"]
    seconds: float = min(line["time"]["step_s"] for line in lines)
    storage.delete_directory(folder)
    return max(1, round(60 * budget.minutes / seconds))


def _known_steps(run_dir: Path) -> int:
    from lmcore.training.config import read_run_config
    from lmcore.training.rundir import CONFIG

    config: RunConfig = read_run_config(run_dir / CONFIG)
    return config.total_steps


@torch.no_grad()
def decode_speed(model: LanguageModel, length: int, *, seconds: float = 0.5) -> float:
    """Tokens per second when one sequence is continued after `length` tokens (median of single steps)."""
    training = model.training
    model.eval()
    state = filled_state(model, length, room=4096)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.embedding.weight.device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 8 or (time.perf_counter() - began < seconds and len(times) < 2000):
        before = time.perf_counter()
        token = model(token, state=state)[:, -1:].argmax(-1)
        token.item()
        times.append(time.perf_counter() - before)
    model.train(training)
    return 1 / _median(times[2:])


def filled_state(model: LanguageModel, length: int, *, room: int) -> DecodeState:
    """A state as if `length` tokens had been read, with room for more; what it remembers is arbitrary."""
    state = model.init_state(1, length + room)
    for i, layer in enumerate(state.layers):
        if isinstance(layer, KVCache):
            layer.k.normal_()
            layer.v.normal_()
            state.layers[i] = _filled(layer, length)
    state.length = length
    return state


def _filled(cache: KVCache, length: int) -> KVCache:
    used = min(length, cache.slots)
    if cache.positions is None:
        return replace(cache, used=used)
    slot = torch.arange(cache.slots + 1, device=cache.k.device)
    last = length - 1 - (length - 1 - slot) % cache.slots  # the newest position that a ring holds in each slot
    positions = torch.where((slot < cache.slots) & (last >= 0), last, -1).to(torch.int32)
    lengths = torch.full((cache.k.shape[0],), length, device=cache.k.device)
    return replace(cache, used=used, positions=positions.expand(cache.k.shape[0], -1), lengths=lengths)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else float("nan")
