"""`lm generate`: let a trained model continue text. The work is in lmcore/inference/generate.py."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import ui

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lmcore.inference.generate import Completion
    from lmcore.inference.sampling import SamplingConfig
    from lmcore.training.checkpoint import LoadedModel

PROMPT, SAMPLING, RUN, OUTPUT = "Prompt", "Sampling", "Model and speed", "Output"


class OverflowChoice(enum.StrEnum):
    """What happens at the end of the context that the model was trained with."""

    slide = "slide"
    stop = "stop"
    extend = "extend"


class Precision(enum.StrEnum):
    """Number format of the weights."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


def command(
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Text to continue; may be given several times.", rich_help_panel=PROMPT),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            "-f",
            help="File with a prompt (- is stdin). JSON lines hold one per line: a text, or an object with 'prompt'.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", "-i", help="Ask for prompts, line by line.", rich_help_panel=PROMPT),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="Tokens per text at most.", rich_help_panel=SAMPLING)
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option("--temperature", "-t", min=0, help="0 takes the likeliest token.", rich_help_panel=SAMPLING),
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 = all.", rich_help_panel=SAMPLING)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, help="Draw from the fewest tokens that reach this sum.", rich_help_panel=SAMPLING),
    ] = 1.0,
    min_p: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Drop tokens less likely than this fraction of the likeliest.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 discourages tokens already used.", rich_help_panel=SAMPLING)
    ] = 1.0,
    control: Annotated[
        bool,
        typer.Option(
            "--control-tokens",
            help="The text of a control token in a prompt, such as <|im_start|>, is that token; otherwise it is text.",
            rich_help_panel=PROMPT,
        ),
    ] = False,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends a sample; may be given several times.", rich_help_panel=SAMPLING),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Texts per prompt.", rich_help_panel=SAMPLING)
    ] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same text.", rich_help_panel=SAMPLING)] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            "-c",
            help="Run, checkpoint, or directory of a transformers model; default: the run that was trained last.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    runs: Annotated[
        Path, typer.Option(envvar="LM_RUNS", help="Where runs are looked for.", rich_help_panel=RUN)
    ] = Path("runs"),
    overflow: Annotated[
        OverflowChoice,
        typer.Option(
            help="At the end of the trained context: slide to its last half, stop there, or extend beyond it.",
            rich_help_panel=RUN,
        ),
    ] = OverflowChoice.slide,
    batch: Annotated[int, typer.Option(min=1, help="Texts that decode together.", rich_help_panel=RUN)] = 16,
    speculate: Annotated[
        bool,
        typer.Option(
            "--speculate",
            help="One text at a time, with drafts of the model's multi-token heads; the text is the same.",
            rich_help_panel=RUN,
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(envvar="LM_DEVICE", help="auto, cpu, cuda or mps.", rich_help_panel=RUN)
    ] = "auto",
    precision: Annotated[
        Precision, typer.Option(help="auto = bf16 where the machine is fast at it, else fp32.", rich_help_panel=RUN)
    ] = Precision.auto,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=100,
            help="With --json: log-probability of each token and of this many alternatives.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    echo: Annotated[bool, typer.Option(help="Show the prompt before its text.", rich_help_panel=OUTPUT)] = True,
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Let a trained model continue text.

    Text appears as it arises. The same seed gives the same text, whatever else is generated with it.

    Examples:

        lm generate --prompt 'def fibonacci('

        lm generate -p 'import os' -p 'class Tree' -n 3 --temperature 1 --top-p 0.95 --json

        cat notes.txt | lm generate --file - --max-tokens 100 --stop '.'

        lm generate --interactive --checkpoint runs/nano
    """
    import sys

    from lmcore.errors import LmError
    from lmcore.inference.sampling import SamplingConfig
    from lmcore.training import checkpoint as checkpoints

    config = _build(
        SamplingConfig,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        samples=samples,
        seed=seed,
        logprobs=logprobs,
    )
    prompts = _prompts(prompt or [], file or [])
    ask = interactive or (not prompts and sys.stdin.isatty())
    if not prompts and not ask:
        prompts = _prompts([], ["-"])
    path = checkpoint or checkpoints.find_run(runs)
    loaded = _load(path, device, precision, quiet)
    if speculate and not loaded.model.mtp:
        raise LmError(
            f"{loaded.path}: this model has no multi-token heads to speculate with.",
            hint="Train one with: --set model.mtp.depths=1",
        )
    options: dict[str, Any] = {"overflow": overflow.value, "speculate": speculate, "control": control}
    if ask:
        _interact(loaded, config, options, echo)
    elif json:
        _as_json(loaded, prompts, config, options | {"batch_size": batch}, quiet)
    elif len(prompts) * samples == 1:
        _stream(loaded, prompts[0], config, options, echo)
    else:
        _in_turn(loaded, prompts, config, options | {"batch_size": batch}, echo, quiet)


# ---------------------------------------------------------------------------------------- prompts and model


def _prompts(given: Sequence[str], files: Sequence[str]) -> list[str]:
    """All prompts, those of --prompt first."""
    from lmcore.errors import Exit, LmError

    prompts = list(given)
    for name in files:
        raw = _read(name)
        if not _holds_lines(name, raw):
            prompts.append(_without_last_newline(_text(name, raw)))
            continue
        for number, value in _lines(name, raw):
            text = value.get("prompt") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise LmError(
                    f"{name}:{number}: expected a text or an object with 'prompt'.",
                    hint="A text that is JSON itself is given with --prompt, or in a file whose name ends in .txt.",
                    code=Exit.DATA,
                )
            prompts.append(text)
    return prompts


def _holds_lines(name: str, raw: bytes) -> bool:
    """Whether a file holds JSON lines: its name says so, or says nothing and its content does."""
    from lmcore.data.content import HEAD_BYTES, JSONL, content_of
    from lmcore.data.sources import format_of_name
    from lmcore.errors import Exit, LmError

    content = content_of(raw[:HEAD_BYTES], whole=len(raw) <= HEAD_BYTES)
    if content.kind.startswith("UTF-"):
        raise LmError(f"{name}: {content.kind}; prompts must be UTF-8.", code=Exit.DATA)
    named = format_of_name(name)
    return named[0] == "jsonl" if named is not None else content.kind == JSONL


def _lines(name: str, raw: bytes) -> Iterator[tuple[int, Any]]:
    from lmcore.data import json_lines
    from lmcore.data.readers import json_records
    from lmcore.errors import Exit, LmError

    if name != "-":
        yield from json_records(name)
        return
    try:
        yield from json_lines.records([raw])
    except json_lines.BadLine as error:
        raise LmError(f"{name}:{error}.", code=Exit.DATA) from None


def _read(name: str) -> bytes:
    import sys

    from lmcore.errors import from_os_error

    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise from_os_error(error, name, "read") from error


def _text(name: str, raw: bytes) -> str:
    from lmcore.errors import Exit, LmError

    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise LmError(f"{name}: not UTF-8 text (byte {error.start}).", code=Exit.DATA) from error


def _without_last_newline(text: str) -> str:
    """What `echo` and editors add to the end is not part of the prompt."""
    return text.removesuffix("\n").removesuffix("\r")


def _build(model: type[SamplingConfig], **values: Any) -> SamplingConfig:
    from lmcore.config import build

    return build(model, values)


def _load(path: Path, device: str, precision: Precision, quiet: bool) -> LoadedModel:
    from lmcore.inference.import_model import open_model
    from lmcore.training.device import resolve_device, resolve_dtype

    where = resolve_device(device)
    chosen, _ = resolve_dtype(precision.value, where)
    loaded = open_model(path, device=where, dtype=chosen, skipped=ui.say)
    if not quiet:
        ui.say(
            f"{loaded.path}, step {loaded.state.get('step', '?')}, {where.type}, {str(chosen).removeprefix('torch.')}"
        )
    return loaded


# ---------------------------------------------------------------------------------------- rendering


def _stream(loaded: LoadedModel, prompt: str, config: SamplingConfig, options: dict[str, Any], echo: bool) -> None:
    """One text, piece by piece."""
    from lmcore.inference.generate import generate

    for number, chunk in enumerate(generate(loaded, [prompt], config, **options)):
        if echo and number == 0:  # not before the prompt has been accepted
            ui.emit_piece(prompt)
        ui.emit_piece(chunk.text)
    ui.emit_piece("\n")


def _in_turn(
    loaded: LoadedModel,
    prompts: Sequence[str],
    config: SamplingConfig,
    options: dict[str, Any],
    echo: bool,
    quiet: bool,
) -> None:
    """Several texts: each is printed under a heading when all before it are printed."""
    from lmcore.inference.generate import Collector, generate

    collector = Collector()
    order = [(index, sample) for index in range(len(prompts)) for sample in range(config.samples)]
    printed = 0
    with ui.progress(quiet) as progress:
        for chunk in generate(loaded, prompts, config, progress=progress, **options):
            collector.add(chunk)
            while printed < len(order) and (text := collector.finished(*order[printed])) is not None:
                ui.emit(f"--- prompt {text.prompt + 1}, sample {text.sample + 1}")
                ui.emit((prompts[text.prompt] if echo else "") + text.text)
                printed += 1


def _as_json(
    loaded: LoadedModel,
    prompts: Sequence[str],
    config: SamplingConfig,
    options: dict[str, Any],
    quiet: bool,
) -> None:
    import time

    from lmcore.inference.generate import complete

    began = time.perf_counter()
    with ui.progress(quiet) as progress:
        texts = complete(loaded, prompts, config, progress=progress, **options)
    seconds = time.perf_counter() - began
    ui.emit_json(
        {
            "checkpoint": str(loaded.path),
            "sampling": config.model_dump(mode="json"),
            "texts": [_as_record(text, prompts, loaded) for text in texts],
            "tokens_per_second": round(sum(len(text.tokens) for text in texts) / max(seconds, 1e-9), 1),
        }
    )


def _as_record(text: Completion, prompts: Sequence[str], loaded: LoadedModel) -> dict[str, Any]:
    document: dict[str, Any] = {
        "prompt": prompts[text.prompt],
        "sample": text.sample,
        "text": text.text,
        "finish": text.finish,
        "tokens": text.tokens,
    }
    if text.logprobs:
        assert loaded.tokenizer is not None
        table = loaded.tokenizer.token_bytes()
        document["logprobs"] = [
            {
                "token": entry.token,
                "text": table[entry.token].decode("utf-8", errors="replace") if entry.token < len(table) else "",
                "logprob": entry.logprob,
                "top": [{"token": token, "logprob": value} for token, value in entry.top],
            }
            for entry in text.logprobs
        ]
    return document


def _interact(loaded: LoadedModel, config: SamplingConfig, options: dict[str, Any], echo: bool) -> None:
    """A loop of prompts; the end of input (Ctrl-D) leaves it. Ctrl-C ends a text, or the loop when no text runs."""
    import sys

    ui.say("One prompt per line; Ctrl-C ends a text, Ctrl-D the session.")
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            ui.say("")
            return
        try:
            _stream(loaded, _without_last_newline(line), config, options, echo)
        except KeyboardInterrupt:
            ui.emit()
