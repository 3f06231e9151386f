"""`lm compare`: several presets on the same data and budget, as a table and a plot. The work is in
lmcore/training/compare.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import ui

if TYPE_CHECKING:
    from lmcore.training.compare import Contestant

BUDGET, RUN = "Budget (one of them; default: each preset's own length)", "Runs"


def command(
    presets: Annotated[
        list[str], typer.Argument(metavar="PRESET...", help="Names of presets or YAML files.", show_default=False)
    ],
    tokens: Annotated[
        str | None, typer.Option(help="Tokens for each, such as 2M.", rich_help_panel=BUDGET, show_default=False)
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(help="Operations for each, such as 1e13.", rich_help_panel=BUDGET, show_default=False),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes of training for each, on this machine.", rich_help_panel=BUDGET, show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Shard set for all of them.", rich_help_panel=RUN, show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the runs.", rich_help_panel=RUN)] = Path(
        "runs/compare"
    ),
    settings: ui.Settings = None,
    decode: Annotated[
        str, typer.Option(help="Lengths at which generation is timed.", rich_help_panel=RUN)
    ] = "2048,8192,32768",
    json_output: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Train several presets alike and compare them.

    Every preset is an ordinary run under --out, in its own process, on the same data with the same seed. The same
    command continues an interrupted comparison. Besides the table there are compare.json, compare.md and, when
    matplotlib is installed, compare.png.

    Examples:

      lm compare tiny-attention tiny-mamba tiny-resonance --data shards/stdlib --tokens 1M

      lm compare tiny-attention tiny-moe --flops 2e13 --out runs/experts

      lm compare nano my-model.yaml --minutes 10
    """
    from lmcore.config import parse_count, parse_overrides
    from lmcore.errors import LmError
    from lmcore.training.compare import Budget, compare

    try:
        lengths = [int(part) for part in decode.split(",") if part.strip()]
        count = None if tokens is None else int(parse_count(tokens))
    except ValueError as error:
        raise LmError(f"--tokens and --decode are whole numbers ({error}).") from error
    with ui.progress(quiet) as progress:
        found = compare(
            presets,
            out,
            data=data,
            budget=Budget(tokens=count, flops=flops, minutes=minutes),
            settings=parse_overrides(settings or []),
            decode_lengths=lengths,
            progress=progress,
        )
        heads, rows = _heads(lengths), [_row(c, lengths) for c in found]
        _write_markdown(heads, rows, out / "compare.md")
        drawn = _draw(found, out / "compare.png")
        if drawn and not json_output:
            progress.note(f"plot: {out / 'compare.png'}")
    if json_output:
        from dataclasses import asdict

        ui.emit_json([asdict(contestant) for contestant in found])
        return
    ui.table(heads, rows, right=heads[1:])


def _heads(lengths: list[int]) -> list[str]:
    names = ["preset", "params", "active", "FLOPs/tok", "tokens", "tok/s", "memory", "loss", "bits/byte"]
    return names + [f"gen @{n:,}" for n in lengths]


def _write_markdown(heads: list[str], rows: list[list[str]], path: Path) -> None:
    """The table as people put it into a README."""
    from lmcore.storage import write_file

    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    write_file(path, "".join(f"| {' | '.join(line)} |\n" for line in lines).encode())


def _row(c: Contestant, lengths: list[int]) -> list[str]:
    from lmcore.storage import format_bytes

    return [
        c.name,
        ui.short_number(c.parameters),
        ui.short_number(c.active),
        ui.short_number(c.flops_per_token),
        ui.short_number(c.tokens),
        ui.short_number(c.tokens_per_s),
        format_bytes(c.peak_bytes),
        "-" if c.loss is None else f"{c.loss:.4f}",
        "-" if c.bits_per_byte is None else f"{c.bits_per_byte:.4f}",
        *(f"{c.decode[n]:,.0f}/s" for n in lengths),
    ]


def _draw(found: list[Contestant], path: Path) -> bool:
    """Bars of quality, speed, memory and generation; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, max(7.0, 0.8 * len(found))), layout="constrained")
    quality, speed, memory, generation = figure.subplots(2, 2).flat
    names = [c.name for c in found]
    scored = all(c.bits_per_byte is not None for c in found)
    scores = [(c.bits_per_byte if scored else c.loss) or 0.0 for c in found]
    quality.barh(names, scores)
    quality.set_xlim(0.95 * min(scores), 1.02 * max(scores))
    quality.set_title("validation, bits per byte" if scored else "validation, nats per token")
    speed.barh(names, [c.tokens_per_s for c in found])
    speed.set_title("training, tokens per second")
    memory.barh(names, [c.peak_bytes / 2**20 for c in found])
    memory.set_title("training, peak memory in MiB")
    colours = matplotlib.colormaps["tab20"]
    for number, c in enumerate(found):
        drawn = {"marker": "o", "label": c.name, "color": colours(number % colours.N)}
        generation.plot(list(c.decode), list(c.decode.values()), **drawn)
    generation.set_xscale("log", base=2)
    lengths = list(found[0].decode)
    generation.set_xticks(lengths, [f"{n:,}" for n in lengths])
    generation.set_ylim(bottom=0)
    generation.set_title("generation, tokens per second by context")
    generation.legend(fontsize=7)
    for axes in (quality, speed, memory):
        axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    return True
