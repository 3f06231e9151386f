"""`lm train`: start a run, or continue it with the same command. The work is in lmcore/training."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import ui

if TYPE_CHECKING:
    from lmcore.training.launch import Launch
    from lmcore.training.loop import RunResult

RUN, DATA, SIZE, MACHINE, SHOW = "Run", "Data", "Length and size", "Machine", "Look before running"


class Precision(enum.StrEnum):
    """Type of the arithmetic."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def command(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="Run directory; default: runs/ and the name of the preset, with --resume the run trained last.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            "--config",
            "-p",
            help="Name of a preset (see --list-presets) or a YAML file.",
            rich_help_panel=RUN,
        ),
    ] = "nano",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run directory, the same as RUN.", rich_help_panel=RUN, show_default=False),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue an existing run with its own configuration, from its newest good checkpoint.",
            rich_help_panel=RUN,
        ),
    ] = False,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from",
            metavar="RUN",
            help="Begin a new run with the weights of a run, a checkpoint or an imported model; its architecture is "
            "taken too.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    settings: ui.Settings = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="KEY=VALUE",
            help="Change the course of an existing run (learning rate, length, batch); it is recorded.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            metavar="SET[=WEIGHT]",
            help="Shard set to train on; several with weights make a mixture: -d web=0.7 -d code=0.3.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    val: Annotated[
        list[str] | None,
        typer.Option(
            "--val",
            help="Validation set; default: the val/ view beside the training set. 'none' for none.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(
            "--stream",
            metavar="SOURCE",
            help="Train on text without shards: a file, folder or dataset as for lm tokenize, tokenized on the way.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="With --stream: byte, a tokenizer.json or a Hub name.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", help="Optimizer steps, such as 2000 or 10k.", rich_help_panel=SIZE, show_default=False),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", help="Length in tokens instead: 500M, 10B.", rich_help_panel=SIZE, show_default=False),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(
            "--hours",
            help="Length of a new run in time: what fits into it at the usual utilisation of this machine.",
            rich_help_panel=SIZE,
            show_default=False,
        ),
    ] = None,
    batch_tokens: Annotated[
        str | None,
        typer.Option(
            "--batch-tokens",
            help="Tokens per optimizer step, over all ranks and micro-batches.",
            rich_help_panel=SIZE,
            show_default=False,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate of the matrices.", rich_help_panel=SIZE, show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Weights, data order, dropout.", rich_help_panel=SIZE, show_default=False),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cpu, cuda, cuda:N, mps or auto.", rich_help_panel=MACHINE, show_default=False),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(
            "--dtype",
            help="Arithmetic; auto takes bf16 where the machine is fast at it.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile; default: where it pays.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            "--max-minutes",
            help="Save and leave with status 75 before this time is over (after one step at least).",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard events.", rich_help_panel=MACHINE)
    ] = False,
    wandb: Annotated[
        str | None,
        typer.Option(
            "--wandb",
            metavar="PROJECT",
            help="Also log to Weights & Biases.",
            rich_help_panel=MACHINE,
            show_default=False,
        ),
    ] = None,
    list_presets: Annotated[
        bool, typer.Option("--list-presets", help="List the presets and leave.", rich_help_panel=SHOW)
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration and leave.", rich_help_panel=SHOW)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print parameters, memory, time and disk of the run and leave.", rich_help_panel=SHOW
        ),
    ] = False,
    verify_resume: Annotated[
        bool,
        typer.Option(
            "--verify-resume",
            help="Check for this configuration that a killed and resumed run gives the same bits, and leave.",
            rich_help_panel=SHOW,
        ),
    ] = False,
    json: ui.Json = False,
    quiet: ui.Quiet = False,
) -> None:
    """Train a model, or continue a run: after any interruption the same command goes on where it was.

    Settings come from the preset, then --set, then the flags; the resolved configuration is saved in the run directory.
    Ctrl-C finishes the step, saves and leaves; a second one leaves at once. Nothing is ever lost by a kill.

    Exit status: 0 done, 70 diverged, 75 saved after SIGUSR1 or --max-minutes (run the same command again), 130 and 143
    saved after SIGINT or SIGTERM.

    Examples:

        lm train                                              the nano preset on shards/stdlib, into runs/nano

        lm train --preset gpt2-124m --data shards/web --tokens 2.5B

        lm train --preset small --hours 8                     as many tokens as fit into a night

        lm train runs/code --init-from runs/nano --data shards/code --steps 200

        lm train --resume                                     go on with the run trained last

        lm train --resume runs/nano --override train.steps=800

        torchrun --nproc-per-node 4 -m lmcore train --preset small
    """
    if list_presets:
        return _list_presets(json)
    from lmcore.config import merge, parse_overrides
    from lmcore.errors import LmError

    if stream is not None:
        from lmcore.heap import keep_freed_memory

        keep_freed_memory()  # before Arrow is loaded
    if run is not None and out is not None:
        raise LmError(f"the run directory is given twice: {run} and --out {out}.")
    flags = _flags(
        init_from=init_from,
        data=data,
        val=val,
        stream=stream,
        tokenizer=tokenizer,
        steps=steps,
        tokens=tokens,
        batch_tokens=batch_tokens,
        lr=lr,
        seed=seed,
        device=device,
        dtype=dtype.value if dtype is not None else None,
        compile=compile_,
        max_minutes=max_minutes,
        tensorboard=tensorboard or None,
        wandb=wandb,
    )
    typed = merge(parse_overrides(settings or []), flags)
    look = print_config or dry_run or verify_resume
    launch = _launch(run or out, preset, typed, parse_overrides(override or []), resume, look, hours)
    if print_config:
        return _print_config(launch, json)
    if dry_run:
        return _dry_run(launch, json)
    if verify_resume:
        return _verify_resume(launch, json, quiet)
    from lmcore.training.loop import train

    from .live import watch

    with watch(quiet=quiet) as observer:
        result = train(launch, observer=observer)
    _leave(result, json)


# ---------------------------------------------------------------------------------------- parsing


def _flags(**given: Any) -> dict[str, Any]:
    """Flags -> nested settings; what was not given is left out."""
    from lmcore.errors import LmError

    places = {
        "init_from": "train.init_from",
        "stream": "data.stream",
        "tokenizer": "data.tokenizer",
        "steps": "train.steps",
        "tokens": "train.tokens",
        "batch_tokens": "train.batch_tokens",
        "lr": "optim.lr",
        "seed": "train.seed",
        "device": "train.device",
        "dtype": "train.dtype",
        "compile": "train.compile",
        "max_minutes": "train.max_minutes",
        "tensorboard": "train.log.tensorboard",
        "wandb": "train.log.wandb",
    }
    from lmcore.config import merge

    nested: dict[str, Any] = {}
    for name, key in places.items():
        if given[name] is not None:
            value: Any = given[name]
            for part in reversed(key.split(".")):
                value = {part: value}
            nested = merge(nested, value)
    if given["steps"] is not None and given["tokens"] is not None:
        raise LmError("--steps and --tokens both give the length of the run; give one of them.")
    # A length on the command line replaces the one of the preset, whichever way that is written.
    if given["tokens"] is not None:
        nested["train"]["steps"] = None
    if given["steps"] is not None:
        nested["train"]["tokens"] = None
    data: dict[str, Any] = {}
    if given["data"]:
        data["train"] = [_source(text) for text in given["data"]]
    if given["val"]:
        data["val"] = [] if given["val"] == ["none"] else given["val"]
    return merge(nested, {"data": data}) if data else nested


def _source(text: str) -> dict[str, Any]:
    """'shards/web=0.7' -> path and weight; a path may hold an equals sign itself."""
    path, equals, weight = text.rpartition("=")
    if equals and path and not Path(text).exists():
        try:
            return {"path": path, "weight": float(weight)}
        except ValueError:
            pass
    return {"path": text}


def _launch(
    run_dir: Path | None,
    preset: str,
    typed: dict[str, Any],
    overrides: dict[str, Any],
    resume: bool,
    look: bool,
    hours: float | None,
) -> Launch:
    from lmcore.training import checkpoint
    from lmcore.training.config import read_preset
    from lmcore.training.launch import prepare

    if resume:
        if run_dir is None:
            run_dir = checkpoint.find_run("runs")
            ui.say(f"resuming {run_dir}")
        elif checkpoint.step_of(run_dir) is not None and run_dir.parent.name == checkpoint.CHECKPOINTS:
            run_dir = _run_of_checkpoint(run_dir)
        return prepare(run_dir, typed=typed, overrides=overrides, resume=True, hours=hours)
    name, raw = read_preset(preset)
    return prepare(run_dir or Path("runs") / name, preset=raw, typed=typed, overrides=overrides, look=look, hours=hours)


def _run_of_checkpoint(path: Path) -> Path:
    """A checkpoint given to --resume means its run, if it is the newest; going back would lose the newer ones."""
    from lmcore.errors import LmError
    from lmcore.training import checkpoint

    run = path.parent.parent
    newest = checkpoint.newest(run)
    if newest is not None and newest.resolve() != path.resolve():
        raise LmError(
            f"{path} is not the newest checkpoint of {run}, which is {newest.name}; a run goes on from its newest one.",
            hint=f"To go back, move the newer checkpoints out of {path.parent} first.",
        )
    return run


# ---------------------------------------------------------------------------------------- looking


def _list_presets(json: bool) -> None:
    from lmcore.training.config import preset_names

    names = preset_names()
    if json:
        ui.emit_json([{"name": name, "description": text} for name, text in names])
        return
    ui.table(["preset", "what it is"], names)


def _print_config(launch: Launch, json: bool) -> None:
    if json:
        ui.emit_json(launch.config.model_dump(mode="json"))
    else:
        ui.emit(launch.config.to_yaml().rstrip("\n"))


def _dry_run(launch: Launch, json: bool) -> None:
    from lmcore.training.parallel import world_size
    from lmcore.training.plan import draft, find_target, plan_run

    config = launch.config
    target = find_target(config.train.device, config.train.dtype)
    plan = plan_run(draft(config.model_dump(mode="json")), target, devices=world_size())
    if json:
        ui.emit_json(plan.document())
        return
    from .plan import show

    show(plan)


def _verify_resume(launch: Launch, json: bool, quiet: bool) -> None:
    from lmcore.errors import Exit
    from lmcore.training.rehearsal import rehearse

    with ui.progress(quiet) as progress:
        found = rehearse(launch.config, progress=progress)
    if json:
        ui.emit_json(vars(found))
    else:
        ui.emit(f"undisturbed            {found.undisturbed}")
        ui.emit(f"killed {found.kills} times, resumed {found.killed}")
        if found.same:
            ui.emit(f"exact: weights, optimizer state and log of {found.steps} steps are equal ({found.seconds:.0f} s)")
        else:
            ui.emit(f"not exact: {', '.join(found.differs)} differ")
            ui.emit("try --no-compile, --set train.deterministic=true and a fixed --set train.threads=N")
    if not found.same:
        sys.exit(int(Exit.DATA))


# ---------------------------------------------------------------------------------------- leaving


def _leave(result: RunResult, json: bool) -> None:
    """Say how it ended and what comes next, and leave with the status that says the same."""
    import signal

    from lmcore.errors import Exit
    from lmcore.training.parallel import is_main

    if is_main():
        if json:
            ui.emit_json(_document(result))
        else:
            _tell(result)
    if result.reason == "signal" and result.signal in (signal.SIGINT, signal.SIGTERM):
        ui.die_by_signal(result.signal)
    if result.reason in ("signal", "time"):
        sys.exit(int(Exit.RETRY))


def _document(result: RunResult) -> dict[str, Any]:
    return {
        "run": str(result.run_dir),
        "reason": result.reason,
        "step": result.step,
        "total_steps": result.total_steps,
        "checkpoint": str(result.checkpoint) if result.checkpoint else None,
        "loss": result.loss,
        "validation": result.validation,
        "tokens_per_s": result.tokens_per_s,
        "seconds": result.seconds,
        "sources": [
            {"path": s.name, "weight": s.weight, "realised": s.realised, "epochs": s.epochs} for s in result.sources
        ],
    }


def _tell(result: RunResult) -> None:
    from lmcore.errors import quoted
    from lmcore.training.rundir import TOKENIZER

    found = result.validation
    quality = f"validation loss {found['loss']:.3f}" if found else ""
    if found.get("bits_per_byte") is not None:
        quality += f", {found['bits_per_byte']:.3f} bits per byte"
    if result.reason in ("finished", "nothing to do"):
        if result.reason == "finished":
            ui.emit(f"trained {result.total_steps:,} steps in {ui_duration(result.seconds)}: {result.run_dir}")
        else:
            ui.emit(f"{result.run_dir}: all {result.total_steps:,} steps are done, nothing to do")
        if quality:
            ui.emit(quality)
        for share in result.sources:
            ui.emit(
                f"  {share.name}: {100 * share.realised:.1f} % of the samples ({100 * share.weight:.1f} % asked for), "
                f"seen {share.epochs:.2f} times"
            )
        ui.emit("next:")
        run = quoted(result.run_dir)
        ui.emit(f"  lm eval {run}" + ("" if found else " --data PATH"))
        if (Path(result.run_dir) / TOKENIZER).is_file():
            ui.emit(f'  lm generate --checkpoint {run} --prompt "def main"')
        else:
            ui.emit("  (no text can be generated: the data came without a tokenizer)")
        return
    ui.emit(f"stopped at step {result.step:,} of {result.total_steps:,}, saved in {result.save_s:.1f} s")
    ui.emit(f"go on with: lm train --resume {quoted(result.run_dir)}")


def ui_duration(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
