"""`lm tokenize`: text from anywhere to one verified shard set."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import ui

if TYPE_CHECKING:
    from lmcore.data.forecast import Forecast
    from lmcore.data.plan import TokenizeConfig
    from lmcore.data.tokenization import TokenizeReport

SOURCE, TOKENS, LIMITS, RUN = "Source", "Tokens and shards", "Selection", "Run"


class BackendChoice(StrEnum):
    auto = "auto"
    gigatoken = "gigatoken"
    tokenizers = "tokenizers"


class Executor(StrEnum):
    local = "local"
    ray = "ray"


class FileFormat(StrEnum):
    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    arrow = "arrow"


class OnBad(StrEnum):
    stop = "stop"
    skip = "skip"
    repair = "repair"


def command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders, globs or URLs: .txt .md .py .jsonl .parquet .arrow (.gz .zst); - is stdin."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="stdlib, fineweb, fineweb-edu, openwebtext, dolma, or org/name[:config][@revision] on the Hub.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    text_column: Annotated[
        str,
        typer.Option(
            help="Column of parquet files and key of JSONL lines with the text; a.b leads into a struct.",
            rich_help_panel=SOURCE,
        ),
    ] = "text",
    format: Annotated[
        FileFormat,
        typer.Option(
            help="What the files are; auto looks into them, then at their names, and refuses what neither tells.",
            rich_help_panel=SOURCE,
        ),
    ] = FileFormat.auto,
    separator: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Where text files fall into documents: auto (lines of <|endoftext|>, </s>, the EOS of the "
            "tokenizer or a form feed), or a text such as '\\n\\n\\n'. Default: each file is one document.",
            rich_help_panel=SOURCE,
            show_default=False,
        ),
    ] = None,
    on_bad_doc: Annotated[
        OnBad,
        typer.Option(
            help="Records that cannot be read: stop, skip (and count), or repair UTF-8.", rich_help_panel=SOURCE
        ),
    ] = OnBad.stop,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="train:N (byte-level BPE on this corpus), byte, a tokenizer.json, or a model on the Hub.",
            rich_help_panel=TOKENS,
        ),
    ] = "train:8192",
    seq_len: Annotated[
        int,
        typer.Option(help="Tokens per row, 2048 to 32768; any context length can be trained.", rich_help_panel=TOKENS),
    ] = 2048,
    shard_tokens: Annotated[
        str, typer.Option(help="Tokens per shard, such as 64M.", rich_help_panel=TOKENS)
    ] = "67108864",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory of the set.", show_default="shards/NAME", rich_help_panel=TOKENS),
    ] = None,
    min_chars: Annotated[int, typer.Option(help="Drop shorter documents.", rich_help_panel=LIMITS)] = 1,
    max_chars: Annotated[str | None, typer.Option(help="Drop longer documents.", rich_help_panel=LIMITS)] = None,
    dedup: Annotated[bool, typer.Option("--dedup", help="Drop exact duplicates.", rich_help_panel=LIMITS)] = False,
    max_documents: Annotated[
        str | None, typer.Option(help="Stop after this many documents.", rich_help_panel=LIMITS)
    ] = None,
    max_tokens: Annotated[
        str | None,
        typer.Option(help="Stop after the document that reaches this many, such as 10B.", rich_help_panel=LIMITS),
    ] = None,
    shuffle_units: Annotated[
        int | None, typer.Option(metavar="SEED", help="Shuffle the order of the files.", rich_help_panel=LIMITS)
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Make only part I of N (join them with lm merge); large parquet and JSONL files are cut.",
            rich_help_panel=RUN,
        ),
    ] = None,
    executor: Annotated[
        Executor, typer.Option(help="Where parts run: here, or --part all/N on a Ray cluster.", rich_help_panel=RUN)
    ] = Executor.local,
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Threads; the bytes do not depend on it.", show_default="one per core", rich_help_panel=RUN
        ),
    ] = 0,
    backend: Annotated[
        BackendChoice,
        typer.Option(help="Encoder; auto takes the fast one if it gives the same ids.", rich_help_panel=RUN),
    ] = BackendChoice.auto,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell rows, bytes, tokens and time; write nothing.", rich_help_panel=RUN)
    ] = False,
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Turn text into a verified shard set. Killed at any moment, the same command continues where it was.

    Examples:

        lm tokenize --dataset stdlib

        lm tokenize corpus/ --tokenizer train:32768 --out shards/corpus

        lm tokenize data.jsonl.zst --text-column content --tokenizer gpt2

        lm tokenize --dataset fineweb-edu:sample-10BT --tokenizer gpt2 --max-tokens 1B

        zcat pages.jsonl.gz | lm tokenize - --out shards/pages

        lm tokenize stories.txt --separator auto --tokenizer gpt2
    """
    import sys

    from lmcore.config import build
    from lmcore.heap import keep_freed_memory

    keep_freed_memory()  # before Arrow is loaded
    from lmcore.data.forecast import forecast
    from lmcore.data.plan import TokenizeConfig
    from lmcore.data.tokenization import Interrupted, available_cores, tokenize
    from lmcore.errors import LmError

    number, parts = _part(part)
    if (executor is Executor.ray) != (number == 0):
        raise LmError("--executor ray runs all parts: use it with --part all/N, such as --part all/8.")
    config = build(
        TokenizeConfig,
        {
            "dataset": dataset,
            "paths": tuple(paths or ()),
            "text_column": text_column,
            "format": format.value,
            "separator": separator,
            "tokenizer": tokenizer,
            "seq_len": seq_len,
            "shard_tokens": shard_tokens,
            "min_chars": min_chars,
            "max_chars": max_chars,
            "dedup": dedup,
            "max_documents": max_documents,
            "max_tokens": max_tokens,
            "shuffle_units": shuffle_units,
            "on_bad_doc": on_bad_doc.value,
            "part": number or None,
            "parts": parts if number else None,
        },
    )
    target = out or _default_out(config)
    if executor is Executor.ray:
        from lmcore.data.ray_executor import tokenize_on_ray

        assert parts is not None
        with ui.progress(quiet) as progress:
            merged = tokenize_on_ray(
                config, target, parts, workers=workers or 1, backend=backend.value, progress=progress
            )
        facts = {"path": str(target), "dataset_id": merged.dataset_id, "n_tokens": merged.n_tokens, "parts": parts}
        if json:
            ui.emit_json(facts)
        else:
            ui.table(("merged set", ""), list(facts.items()))
        return
    with ui.progress(quiet) as progress:
        if dry_run:
            told = forecast(config, target, workers=workers or available_cores(), backend=backend.value)
        else:
            try:
                report = tokenize(
                    config,
                    target,
                    workers=workers,
                    backend=backend.value,
                    progress=progress,
                    stdin=sys.stdin.buffer.read,
                )
            except Interrupted as interrupted:
                ui.say(
                    f"Stopped after {interrupted.shards} committed shards. Run the same command again to continue:\n"
                    f"  {_command_line()}"
                )
                ui.die_by_signal(interrupted.number)
                return
    if dry_run:
        for note in told.notes:
            ui.say(f"note: {note}")
        if json:
            ui.emit_json(told.to_json())
        else:
            _show_forecast(told)
    elif json:
        ui.emit_json(report.to_json())
    else:
        _show(report)


def _part(text: str | None) -> tuple[int | None, int | None]:
    """'2/8' -> (2, 8); 'all/8' -> (0, 8)."""
    from lmcore.errors import LmError

    if text is None:
        return None, None
    number, slash, parts = text.partition("/")
    number = "0" if number == "all" else number
    if not (slash and number.isdigit() and parts.isdigit() and int(parts)):
        raise LmError(f"--part {text}: expected I/N, such as --part 1/8.")
    return int(number), int(parts)


def _default_out(config: TokenizeConfig) -> Path:
    """shards/NAME, where NAME tells the source (and the part)."""
    import re

    if config.dataset is not None:
        name = config.dataset.rsplit("@", 1)[0].rsplit("/", 1)[-1].replace(":", "-")
    elif config.paths == ("-",):
        name = "stdin"
    else:
        name = re.split(r"[*?\[]", config.paths[0])[0].rstrip("/").rsplit("/", 1)[-1]
        name = re.sub(
            r"(\.(jsonl|ndjson|json|parquet|arrow|txt|text|md|rst|py|gz|zst))+$", "", name, flags=re.IGNORECASE
        )
        name = name or Path(config.paths[0]).expanduser().absolute().parent.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "corpus"
    suffix = f"-part-{config.part:03d}-of-{config.parts:03d}" if config.parts else ""
    return Path("shards") / f"{name}{suffix}"


def _command_line() -> str:
    import shlex
    import sys

    return shlex.join(["lm", *sys.argv[1:]])


def _show(report: TokenizeReport) -> None:
    from lmcore.errors import quoted
    from lmcore.storage import format_bytes

    if report.already_finished:
        ui.emit(f"{report.path}: finished already, nothing to do.")
    rows = [
        ("tokens", f"{report.n_tokens:,}"),
        ("documents", f"{report.n_docs:,}"),
        ("text", format_bytes(report.n_bytes)),
        ("bytes per token", f"{report.n_bytes / report.n_tokens:.2f}"),
        ("shards", f"{report.n_shards:,}"),
        ("tokenizer", f"{report.tokenizer} ({report.vocab_size:,} ids)"),
        ("encoder", report.backend),
    ]
    if report.dropped:
        rows.append(("dropped", ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())))
    if not report.already_finished:
        speed = report.bytes_read / 1e6 / max(report.seconds, 1e-9)
        rows.append(("time", f"{report.seconds:.1f} s ({speed:.1f} MB/s)"))
    rows.append(("dataset_id", report.dataset_id))
    ui.table(("shard set", str(report.path)), rows)
    then = f", then lm split {quoted(report.path)}" if report.n_docs > 1 else ""
    ui.say(f"Next: lm validate {quoted(report.path)}{then}")


def _show_forecast(forecast: Forecast) -> None:
    from lmcore.storage import format_bytes

    about = "" if forecast.exact_records else "about "
    ui.table(
        ("forecast", ""),
        [
            ("files", f"{forecast.files:,} ({format_bytes(forecast.stored_bytes)} stored)"),
            ("records", f"{about}{forecast.records:,}"),
            ("text", f"about {format_bytes(forecast.text_bytes)}"),
            ("tokens", f"about {ui.short_number(forecast.tokens)}"),
            ("shards", f"about {forecast.shards:,} ({format_bytes(forecast.shard_bytes)})"),
            ("free disk", format_bytes(forecast.free_bytes)),
            ("time", f"about {forecast.seconds:,.0f} s with {forecast.workers} workers ({forecast.backend})"),
        ],
    )
