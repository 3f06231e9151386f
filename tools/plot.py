"""`lm plot`: the curves of one or several runs, in the terminal and as a PNG or SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import ui

PICTURE = "Picture"

PANELS = (
    ("loss", "training loss (nats per token)"),
    ("val", "validation"),
    ("lr", "learning rate"),
    ("tokens_per_s", "tokens per second"),
)


def command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...", help="Run directories; default: the run that was trained last.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File to draw into, .png or .svg (needs matplotlib); default: the terminal only.",
            rich_help_panel=PICTURE,
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        str, typer.Option("--by", help="Horizontal axis: step, tokens or time.", rich_help_panel=PICTURE)
    ] = "step",
    smooth: Annotated[
        float, typer.Option("--smooth", min=0, max=0.999, help="Smoothing of the loss.", rich_help_panel=PICTURE)
    ] = 0.9,
    json: ui.Json = False,
) -> None:
    """Draw loss, validation, learning rate and speed of runs from their metrics.jsonl; runs may still be going on.

    Examples:

        lm plot

        lm plot runs/nano runs/small --by tokens --out curves.svg
    """
    from lmcore.errors import LmError
    from lmcore.training import checkpoint

    if by not in ("step", "tokens", "time"):
        raise LmError(f"--by {by}: choose step, tokens or time.")
    chosen = runs or [checkpoint.find_run("runs")]
    series = {str(run): read(run) for run in chosen}
    if out is not None:
        draw(series, out, by=by, smooth=smooth)
    if json:
        ui.emit_json({run: summary(found) for run, found in series.items()})
        return
    from rich.console import Console

    for line in terminal(series, by=by, smooth=smooth, width=min(Console().width, 100)):
        ui.emit(line)
    if out is not None:
        ui.emit(f"written: {out}")


Series = dict[str, list[float]]


def read(run: Path) -> Series:
    """step, tokens, time, loss, lr, tokens_per_s of a run, and val_step, val (bits per byte, else loss)."""
    from lmcore.errors import LmError
    from lmcore.training.rundir import METRICS, read_metrics

    lines = read_metrics(run)
    found: Series = {key: [] for key in ("step", "tokens", "time", "loss", "lr", "tokens_per_s")}
    val: Series = {key: [] for key in ("val_step", "val_tokens", "val_time", "val", "val_loss")}
    elapsed = 0.0
    for line in lines:
        if line.get("kind") == "val":
            val["val_step"].append(line["step"])
            val["val_tokens"].append(found["tokens"][-1] if found["tokens"] else 0)
            val["val_time"].append(elapsed)
            val["val"].append(line.get("bits_per_byte") or line["loss"])
            val["val_loss"].append(line["loss"])
        elif line.get("loss") is not None:
            elapsed += line["time"]["step_s"]
            for key, value in (
                ("step", line["step"]),
                ("tokens", line["tokens"]),
                ("time", elapsed / 60),
                ("loss", line["loss"]),
                ("lr", line["lr"]),
                ("tokens_per_s", line["time"]["tokens_per_s"]),
            ):
                found[key].append(value)
    if not found["step"]:
        raise LmError(f"{run / METRICS}: no steps to draw.", hint="Is this the directory of a run?")
    return found | val


def summary(found: Series) -> dict[str, Any]:
    """The figures of a run for programs."""
    speeds = sorted(found["tokens_per_s"])
    return {
        "steps": int(found["step"][-1]),
        "tokens": int(found["tokens"][-1]),
        "loss": found["loss"][-1],
        "validation": found["val"][-1] if found["val"] else None,
        "best_validation": min(found["val"]) if found["val"] else None,
        "tokens_per_s": speeds[len(speeds) // 2],
        "minutes": found["time"][-1],
    }


def smoothed(values: list[float], factor: float) -> list[float]:
    """Exponential average without the bias of its beginning."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total = factor * total + (1 - factor) * value
        weight = factor * weight + (1 - factor)
        result.append(total / weight)
    return result


def terminal(series: dict[str, Series], *, by: str, smooth: float, width: int, height: int = 12) -> list[str]:
    """The loss curves as lines of text, one letter per run, and a line of figures for each."""
    marks = "abcdefghijklmnopqrstuvwxyz"
    curves = {run: (found[by], smoothed(found["loss"], smooth)) for run, found in series.items()}
    low = min(min(ys) for _, ys in curves.values())
    # The first steps are far above the rest and would flatten everything.
    high = max(sorted(ys)[int(0.98 * (len(ys) - 1))] for _, ys in curves.values())
    left, right = min(xs[0] for xs, _ in curves.values()), max(xs[-1] for xs, _ in curves.values())
    columns = max(20, width - 12)
    grid = [[" "] * columns for _ in range(height)]
    for mark, (xs, ys) in zip(marks * len(curves), curves.values(), strict=False):
        for x, y in zip(xs, ys, strict=True):
            column = round((columns - 1) * (x - left) / ((right - left) or 1))
            row = round((height - 1) * (high - min(y, high)) / ((high - low) or 1))
            grid[row][column] = mark if len(curves) > 1 else "*"
    lines = [f"training loss by {by}"]
    for number, cells in enumerate(grid):
        value = high - (high - low) * number / (height - 1)
        lines.append(f"{value:9.3f} |{''.join(cells).rstrip()}")
    lines.append(f"{'':10}+{'-' * columns}")
    lines.append(f"{'':11}{ui.short_number(left):<{columns - 8}}{ui.short_number(right):>8}")
    for mark, (run, found) in zip(marks * len(series), series.items(), strict=False):
        figures = summary(found)
        val = f", validation {figures['validation']:.4f}" if figures["validation"] is not None else ""
        lines.append(
            f"{mark + ' ' if len(series) > 1 else ''}{run}: step {figures['steps']:,}, loss {curves[run][1][-1]:.4f}"
            f"{val}, {ui.short_number(figures['tokens_per_s'])} tokens/s"
        )
    return lines


def draw(series: dict[str, Series], out: Path, *, by: str, smooth: float) -> None:
    """Write the picture."""
    import io

    from lmcore import storage
    from lmcore.errors import LmError

    if out.suffix not in (".png", ".svg"):
        raise LmError(f"{out}: the picture must end in .png or .svg.")
    try:
        import matplotlib
    except ImportError:
        raise LmError("drawing needs matplotlib.", hint="Install it with: pip install 'lmshards[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for (key, title), ax in zip(PANELS, axes, strict=True):
        for run, found in series.items():
            if key == "val":
                ax.plot(found["val_step" if by == "step" else f"val_{by}"], found["val"], marker="o", label=run)
            elif key == "loss":
                ax.plot(found[by], smoothed(found["loss"], smooth), label=run)
            else:
                ax.plot(found[by], found[key], label=run)
        unit = {"step": "step", "tokens": "tokens", "time": "minutes"}[by]
        ax.set(title=title + (" (bits per byte)" if key == "val" else ""), xlabel=unit)
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=by != "time"))
        ax.ticklabel_format(axis="y", useOffset=False)
    next(iter(figure.axes)).legend(fontsize="small")
    buffer = io.BytesIO()
    metadata = {"Date": None} if out.suffix == ".svg" else {"Software": None}  # the same curves give the same bytes
    figure.savefig(buffer, format=out.suffix[1:], dpi=120, metadata=metadata)
    storage.write_file(out, buffer.getvalue())
