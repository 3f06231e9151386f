"""The training loop.

    train(launch)            start or continue the run that launch.prepare decided on; returns why it ended

One pass of the loop is one step (step.py) between two polls of the signals: batch from the loader thread, gradients,
the guard's verdict, update, log; then validation and checkpoint at their intervals. A run ends when its steps are
done, when a signal or the clock says so (after saving), or when it has diverged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lmcore import storage
from lmcore.data.sampler import Mixture, SourceShare
from lmcore.data.streaming import StreamPlace, TextStream
from lmcore.errors import Exit, LmError
from lmcore.heap import bound_kernel_cache, keep_freed_memory
from lmcore.model.model import LanguageModel
from lmcore.model.plan import known_device, measure_peak, plan_model
from lmcore.optim.optimizer import Optimizer, build_optimizer
from lmcore.optim.sharding import Ranks
from lmcore.training import checkpoint, parallel, rundir, signals
from lmcore.training import device as machine
from lmcore.training.audit import Audit, audit
from lmcore.training.batches import Loader, Shape, StepBatch
from lmcore.training.checkpoint import Snapshot
from lmcore.training.compilation import compile_step, run_eagerly
from lmcore.training.config import RunConfig
from lmcore.training.data import SOURCE, RunData, open_data, refuse_changed_data
from lmcore.training.guards import Guard, LossScale
from lmcore.training.launch import Launch, run_facts
from lmcore.training.memory import out_of_memory
from lmcore.training.observe import SILENT, Observer, RunInfo
from lmcore.training.parallel import World
from lmcore.training.resolve import resolve
from lmcore.training.state import RunState, read_state
from lmcore.training.step import StepNumbers, Stepper
from lmcore.training.tensors import read_tensors
from lmcore.training.tracking import Trackers
from lmcore.training.validation import attention_sinks, validate
from lmcore.training.writer import CheckpointWriter

Reason = Literal["finished", "nothing to do", "signal", "time"]


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run_dir: Path
    reason: Reason
    step: int
    total_steps: int
    checkpoint: Path | None
    signal: int = 0
    """Number of the signal that ended the run."""
    loss: float | None = None
    """Mean training loss of the last steps, nats per token."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Last validation: loss, bits_per_byte, and per source when there are several."""
    tokens_per_s: float | None = None
    seconds: float = 0.0
    save_s: float = 0.0
    sources: tuple[SourceShare, ...] = ()
    """What a mixture took from each source: realised ratios and epochs."""


def train(launch: Launch, *, observer: Observer = SILENT) -> RunResult:
    """Run until the end, a signal or the time limit. Raises LmError (70) when the run diverges, 75 when it is
    locked."""
    config = launch.config
    with parallel.agreeing() as facts:
        facts |= run_facts(launch)
        device = machine.resolve_device(config.train.device)
    bound_kernel_cache()
    keep_freed_memory()  # a step asks for the same blocks as the one before: pages mapped anew cost a tenth of it
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(parallel.joined(device, timeout_s=config.train.dist_timeout_s))
        told = observer if world.main else SILENT
        stop = signals.Stop(config.train.max_minutes, told=told.note, echoed=parallel.launched())
        stack.enter_context(signals.caught(stop))
        deterministic = config.train.deterministic
        if deterministic == "auto" and config.train.guard.audit_every:
            deterministic = True
        stack.enter_context(
            machine.numerics(
                deterministic=world.device.type in ("cpu", "cuda") if deterministic == "auto" else deterministic,
                tf32=config.train.tf32,
                threads=config.train.threads,
            )
        )
        with parallel.agreeing() as facts:
            kernels = machine.flash_attention(config.train.flash_attention, world.device, config.model.head_dim)
            stack.enter_context(kernels)
            config = _resolved(launch, world)
            facts |= {key: f"has train.{key} = {getattr(config.train, key)}" for key in _DECIDED}
        with parallel.agreeing():
            run = stack.enter_context(rundir.opened(launch.run_dir, lock=world.main))
        with out_of_memory(config):
            return _Run(launch, config, run, world, stop, told).go()


_DECIDED = ("dtype", "reduce", "lanes", "compile")
"""What "auto" means depends on the machine, and must be the same on all."""


def _resolved(launch: Launch, world: World) -> RunConfig:
    recorded = {"train.micro_batch", "train.reduce", "train.compile"} if launch.exists else set()
    recorded -= {key for key, _, _ in launch.changes}
    return resolve(launch.config, world.device, world.size, recorded=frozenset(recorded))


# ---------------------------------------------------------------------------------------- one run


class _Run:
    """The parts of a run and its position. Lives as long as `train`."""

    def __init__(
        self,
        launch: Launch,
        config: RunConfig,
        run: rundir.RunDirectory,
        world: World,
        stop: signals.Stop,
        observer: Observer,
    ) -> None:
        self.launch, self.run, self.world, self.stop, self.observer = launch, run, world, stop, observer
        _, self.dtype_reason = machine.resolve_dtype(launch.config.train.dtype, world.device)
        if launch.config.train.micro_batch == "auto" and world.size > 1:
            # Cards of different sizes hold different numbers of rows, and all ranks must make the same passes.
            assert isinstance(config.train.micro_batch, int)
            rows = -world.maximum(-config.train.micro_batch)
            config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": rows})})
        self.config = config
        train = config.train
        assert isinstance(train.lanes, int)
        assert isinstance(train.micro_batch, int)
        self.sharded = train.shard == "full" and world.size > 1
        self.total = config.total_steps
        self.step, self.sample = 0, 0
        self.rollbacks = 0
        self.guard = Guard(train.guard)
        self.scale = LossScale(train.dtype == "fp16")
        self.shape = Shape(config.rows, train.lanes, train.micro_batch)
        self.eager = not train.compile
        """Whether steps run without the compiler: asked for, or because it was found wrong."""
        self.validation: dict[str, Any] = {}
        self.validated_at = -1
        self._submitted = -1
        self._save_stall_s = 0.0
        self._source_state: dict[str, Any] | None = None
        self.data: RunData
        self.model: LanguageModel
        self.optimizer: Optimizer
        self.stepper: Stepper
        self.writer: CheckpointWriter
        self.trackers = Trackers()
        self._recent: list[tuple[float, float]] = []  # (loss, tokens per second) of the last steps
        self._began = time.monotonic()

    # ------------------------------------------------------------------------------------ life of a run

    def go(self) -> RunResult:
        saved = self._saved_state()
        if saved is not None and saved.step >= self.total and not self._unvalidated(saved):
            self.step = saved.step
            self.validation = saved.results
            return self._result("nothing to do", self.launch.checkpoint)
        self.data = self._open_data(saved)
        self._build()
        with parallel.agreeing():
            if saved is not None:
                self._restore(saved)
            elif self.launch.weights is not None:
                checkpoint.load_weights(self.model, self.launch.weights / checkpoint.MODEL)
        self._find_peak()
        with parallel.agreeing():
            if self.world.main:
                self._open_run(saved)
        self.trackers = Trackers.make(self.config, self.run.path, self.observer.warn) if self.world.main else Trackers()
        keep = self.config.train.checkpoint
        self.writer = CheckpointWriter(
            self.run.checkpoints,
            keep=keep.keep,
            keep_every=keep.keep_every,
            background=keep.background,
            before_commit=self.run.flush,
            known=() if self.launch.checkpoint is None else (self.step,),
        )
        self.observer.started(self._info())
        self.world.settle()
        try:
            return self._loop()
        finally:
            try:
                self.writer.wait()
            finally:
                self.writer.close()
            self.trackers.close()
            if isinstance(self.data.samples, TextStream):
                self.data.samples.close()

    def _unvalidated(self, saved: RunState) -> bool:
        """Whether the run was interrupted between its last step and the end of its last validation."""
        return bool(self.launch.sets.val) and not saved.validated

    def _open_data(self, saved: RunState | None) -> RunData:
        """The main rank first: a text source is frozen by whoever opens it first, and freed when the ranks disagree."""
        frozen = (self.run.path / SOURCE).is_dir()
        try:
            with parallel.agreeing():
                if self.world.main:
                    data = open_data(self.config, self.launch.sets, self.run.path)
            with parallel.agreeing() as facts:
                if not self.world.main:
                    data = open_data(self.config, self.launch.sets, self.run.path)
                facts["data"] = f"has the training data {data.identity['dataset_id'][:12]}"
        except LmError:
            if not frozen and (self.run.path / SOURCE).is_dir():
                storage.delete_directory(self.run.path / SOURCE)
            raise
        if saved is not None:
            refuse_changed_data(saved, data.identity, str(self.launch.run_dir))
            if isinstance(data.samples, TextStream) and saved.source_state is not None:
                data.samples.load_state(saved.source_state)
        return data

    def _build(self) -> None:
        config, train = self.config, self.config.train
        if self.launch.checkpoint is not None:
            checkpoint.require_size(config.model, self.launch.checkpoint)
        self.model = LanguageModel(config.model, seed=train.seed)
        if self.sharded:
            parallel.shard_model(self.model, self.world)
        else:
            self.model.to(self.world.device)
        compute = machine.DTYPES[train.dtype]
        self.model.compute_dtype = None if compute is torch.float32 else compute
        self.model.checkpoint_every = train.checkpoint_every
        self.model.train()
        self._train_flops = plan_model(config.model).train_flops
        self.optimizer = build_optimizer(
            self.model.parameter_table(),
            config.optim,
            total_steps=self.total,
            ranks=Ranks(self.world.rank, self.world.size, self.sharded, self.world.timeout_s),
        )
        self.stepper = Stepper(
            self.model,
            self.optimizer,
            self.world,
            self.shape,
            seed=train.seed,
            exact=train.reduce == "exact",
            scale=self.scale,
            sources=len(self.data.samples.samplers) if isinstance(self.data.samples, Mixture) else 0,
            sharded=self.sharded,
        )

    def _find_peak(self) -> None:
        """What the device can do, for the MFU: from its data sheet, or on a CPU by a measurement of a moment."""
        device = self.world.device
        self.peak_flops, self.peak_source = 0.0, ""
        if device.type == "cuda":
            known = known_device(machine.device_name(device))
            if known is not None and self.config.train.dtype != "fp32":
                self.peak_flops, self.peak_source = known.peak_flops, known.source
        elif device.type == "cpu" and self.world.main:
            dtype = machine.DTYPES[self.config.train.dtype]
            self.peak_flops, self.peak_source = measure_peak(device, dtype), "measured"

    def _open_run(self, saved: RunState | None) -> None:
        """Write the directory of a new run, or cut the log of a continued one. The disk must have room first."""
        keep = self.config.train.checkpoint
        weights = checkpoint.model_tensors(self.model).values()
        size = sum(t.numel() * t.element_size() for t in weights) + self.optimizer.state_bytes()
        if keep.space_check:
            have = sum(1 for _ in checkpoint.steps_on_disk(self.run.checkpoints))
            storage.require_free_space(
                self.run.path, max(1, keep.keep + 1 - have) * size, f"{keep.keep + 1} checkpoints of this model"
            )
        if not self.launch.exists:
            # The event first: config.yaml makes the directory a run, which then knows how it began.
            self.run.event("start", config="config.yaml", fingerprint=self._fingerprint(), **self.launch.origin)
            self.run.create(self.config, self.launch.sets.tokenizer)
        else:
            storage.make_directory(self.run.checkpoints)
            self.run.cut_metrics(self.step)
            self.run.event(
                "resume",
                step=self.step,
                changes=[{"setting": k, "before": b, "after": a} for k, b, a in self.launch.changes],
                fingerprint=self._fingerprint(),
            )
        for note in (*self.launch.notes, *self.data.notes):
            self.observer.note(note)
        for key, was, value in self.launch.changes:
            self.observer.note(f"changed from here on: {key} was {was}, is {value}")
        if not isinstance(self.data.samples, TextStream):
            for sentence in self.data.samples.warnings(self.total * self.shape.rows):
                self.observer.warn(sentence)
        if saved is not None:
            before, now = saved.fingerprint, self._fingerprint()
            differing = [f"{k} was {before.get(k)}, is {now[k]}" for k in now if before.get(k) != now[k]]
            if differing:
                self.observer.warn(f"the run continues, but not bit for bit as it would have: {'; '.join(differing)}.")

    def _loop(self) -> RunResult:
        train = self.config.train
        # A limit that is over before the first step does not count: repeating the command must come to an end.
        reason = self.stop.reason() if self.stop.number else ""
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(_thaw_garbage)
            loader = cleanup.enter_context(self._loader())
            batches = iter(loader)
            if not reason and train.compile and not self.eager and self.step < self.total:
                first = next(batches)
                self._compile(first)
                batches = _chained(first, batches)
            while self.step < self.total and not reason:
                batch, waited = _timed_next(batches)
                outcome = self._one_step(batch, waited)
                if outcome == "rollback":
                    loader.close()
                    self._roll_back(batch)
                    loader = cleanup.enter_context(self._loader())
                    batches = iter(loader)
                    continue
                if self.step == self._first + 1:
                    _freeze_garbage()
                reason = self._after_step(outcome == "stop")
        if not reason:
            self._validate()
            if self.data.val and self.validated_at < self.step:
                reason = self.stop.reason() or "signal"
        failure = self._save(wait=True, replace=self._first == self.total)  # only its validation was missing
        if failure is not None:
            raise LmError(
                f"the last checkpoint could not be saved: {failure.message}", hint=failure.hint, code=failure.code
            )
        if self.world.main:
            kind = "finish" if not reason else "stop"
            self.run.event(kind, step=self.step, **({"reason": reason, "signal": self.stop.number} if reason else {}))
        saved = self.writer.saved
        path = saved[1] if saved is not None else self.run.checkpoints / checkpoint.step_name(self.step)
        return self._result("finished" if not reason else reason, path)  # type: ignore[arg-type]

    # ------------------------------------------------------------------------------------ one step

    def _one_step(self, batch: StepBatch, waited: float) -> Literal["go", "stop", "rollback"]:
        """Gradients, verdict, update, log. The step counts also when its update was left out."""
        began = time.perf_counter()
        numbers = self.stepper.gradients(batch, stop=bool(self.stop.reason()))
        looked = self._audit(batch, numbers)
        if looked is not None:
            numbers = looked.numbers
        # Only the backward pass is scaled: a loss that is not finite is no matter of the scale.
        explained = math.isfinite(numbers.loss) and self.scale.update(numbers.finite)
        verdict = "overflow" if explained else self.guard.judge(self.step, numbers.loss, numbers.grad_norm)
        action = self._decide(verdict, batch, numbers, looked)
        if action == "rollback":
            return "rollback"
        if action == "update":
            self.stepper.update(self.step, self.config.optim.clip)
        else:
            self.model.reset_load()  # the experts' load of a step that did not happen
        seconds = time.perf_counter() - began
        self.step += 1
        self.sample = batch.first_sample + self.shape.rows
        self._source_state = batch.source_state
        self._log(numbers, batch, seconds + waited, waited, skipped=action != "update")
        return "stop" if numbers.stop else "go"

    def _audit(self, batch: StepBatch, numbers: StepNumbers) -> Audit | None:
        """A second look at a step that went wrong, or whose turn it is; None when there is no need."""
        every = self.guard.config.audit_every
        due = every > 0 and (self.step + 1) % every == 0
        # fp16: a scale to be lowered
        overflow = self.scale.scale > 1.0 and math.isfinite(numbers.loss) and not numbers.finite
        if not due and (overflow or not self.guard.looks_wrong(numbers.loss, numbers.grad_norm)):
            return None
        looked = audit(self.stepper, batch, numbers)
        if looked.verdict == "same":
            return looked if self.eager else self._audit_compiler(batch, looked)
        self._event("audit", step=self.step + 1, first_sample=batch.first_sample, verdict=looked.verdict)
        what = f"{self._where(batch)}: computed again from the same weights and data, {looked.differing} results differ"
        if looked.verdict == "unreliable":
            raise LmError(
                f"{what} each time: this machine miscalculates ({machine.device_name(self.world.device)}). Nothing of "
                "the step reached the weights.",
                hint=f"Go on from the last checkpoint on other hardware: lm train --resume {self.run.path}",
                code=Exit.DIVERGED,
            )
        self.observer.warn(
            f"{what}, and a third time agreed with one of the two: HARDWARE, TRANSIENT. The step goes on with what was "
            f"computed twice; watch this machine ({machine.device_name(self.world.device)})."
        )
        return looked

    def _audit_compiler(self, batch: StepBatch, looked: Audit) -> Audit:
        """A step that comes out wrong twice in the same way may be the compiler's doing: it is computed without it."""
        if not self.guard.looks_wrong(looked.numbers.loss, looked.numbers.grad_norm):
            return looked
        self.model.reset_load()
        forward, self.stepper.forward = self.stepper.forward, self.stepper.eager_forward
        with self._uncompiled():
            numbers = self.stepper.gradients(batch, stop=looked.numbers.stop)
        self.stepper.forward = forward
        if not self.guard.looks_wrong(numbers.loss, numbers.grad_norm):
            run_eagerly(self.stepper)
            self._leave_compiler(
                f"{self._where(batch)} has the loss {looked.numbers.loss:.4g} and the gradient norm "
                f"{looked.numbers.grad_norm:.4g} compiled, {numbers.loss:.4g} and {numbers.grad_norm:.4g} without"
            )
        return dataclasses.replace(looked, numbers=numbers)

    def _where(self, batch: StepBatch) -> str:
        return f"step {self.step + 1}, samples {batch.first_sample:,} to {batch.first_sample + self.shape.rows - 1:,}"

    def _decide(
        self, verdict: str, batch: StepBatch, numbers: StepNumbers, looked: Audit | None
    ) -> Literal["update", "skip", "rollback"]:
        """What to do about a step, and the words for it."""
        where = self._where(batch)
        cause = " Computed again it is the same: the data or the model, not the hardware." if looked is not None else ""
        if verdict == "ok":
            return "update"
        if verdict == "overflow":
            self.observer.note(
                f"{where}: fp16 gradients overflow; no update, the loss scale is {self.scale.scale:g} now."
            )
            return "skip"
        if verdict in ("bad", "diverged"):
            self._event("bad step", step=self.step + 1, first_sample=batch.first_sample, loss=repr(numbers.loss))
            if verdict == "diverged":
                raise LmError(
                    f"the run has diverged: {where} is one too many with a loss or gradient that is not finite "
                    f"(train.guard: {self.guard.config.bad_in_a_row} in a row or {self.guard.config.bad_in_1000} in "
                    f"1,000). None of them reached the weights.{cause}",
                    hint=f"Lower the learning rate: lm train --resume {self.run.path} --override optim.lr=...",
                    code=Exit.DIVERGED,
                )
            self.observer.warn(f"{where}: the loss or a gradient is not finite; the update is left out.{cause}")
            return "skip"
        what = f"{where}: the loss {numbers.loss:.3f} is a spike (z = {self.guard.score(numbers.loss):.1f})"
        on = self.guard.config.on_spike
        self._event("spike", step=self.step + 1, first_sample=batch.first_sample, loss=numbers.loss, action=on)
        if on == "skip":
            self.observer.warn(f"{what}; the update is left out.{cause}")
            return "skip"
        if on == "rollback" and self.rollbacks < self.guard.config.max_rollbacks:
            self.observer.warn(f"{what}; rolling back.{cause}")
            return "rollback"
        if on in ("stop", "rollback"):
            raise LmError(
                f"{what}; the run stops (train.guard.on_spike = {on}, {self.rollbacks} rollbacks so far).{cause}",
                hint=f"Look at the data of these samples, then: lm train --resume {self.run.path}",
                code=Exit.DIVERGED,
            )
        self.observer.warn(f"{what}.{cause}")
        return "update"

    def _after_step(self, stop: bool) -> str:
        """Validation and checkpoint when they are due; the reason to leave, "" to go on."""
        train = self.config.train
        reason = ""
        if stop or (self.world.size == 1 and self.stop.reason()):
            reason = self.stop.reason() or "signal"
        last = self.step >= self.total
        if not reason and not last and train.eval.every_steps and self.step % train.eval.every_steps == 0:
            self._validate()
            if self.world.size == 1:
                reason = self.stop.reason()
        every = train.checkpoint.every_steps
        if not reason and not last and every and self.step % every == 0:
            failure = self._save(wait=False)
            if failure is not None:
                self.observer.warn(f"a checkpoint could not be saved, training goes on: {failure}")
        return reason

    # ------------------------------------------------------------------------------------ parts

    def _loader(self) -> Loader:
        self._first = self.step
        return Loader(
            self.data.samples,
            self.shape,
            vocab_size=self.config.model.vocab_size,
            step=self.step,
            sample=self.sample,
            steps=self.total,
            rank=self.world.rank,
            world_size=self.world.size,
            prefetch=self.config.train.prefetch,
            pin=self.world.device.type == "cuda",
        )

    def _compile(self, batch: StepBatch) -> None:
        self.observer.phase("compiling")
        with self.world.patiently():
            seconds, problem = compile_step(self.stepper, batch)
        self.observer.phase("")
        if problem:
            self._leave_compiler(problem)
        else:
            self.observer.note(f"compiled in {seconds:.1f} s")

    def _leave_compiler(self, problem: str) -> None:
        """Go on eagerly, also after a restart: a continued run must compute what an uninterrupted one does."""
        self.eager = True
        self.observer.warn(f"the run goes on without compiling: {problem}.")
        self._event("not compiled", step=self.step, problem=problem)

    def _uncompiled(self) -> contextlib.AbstractContextManager[object]:
        """Other shapes than those of a step run without the compiler, which is loaded only for a run that compiles."""
        return torch.compiler.set_stance("force_eager") if self.config.train.compile else contextlib.nullcontext()

    def _validate(self) -> None:
        if self.validated_at == self.step or not self.data.val:
            return
        self.observer.phase("validating")
        began = time.perf_counter()
        results = {}
        for name, stream in self.data.val.items():
            with self._uncompiled():
                found = validate(
                    self.model,
                    stream,
                    world=self.world,
                    max_tokens=self.config.train.eval.tokens,
                    batch_rows=self.shape.micro,
                    text_bytes=self.data.text_bytes.get(name),
                    stopped=lambda: bool(self.stop.number),
                    together=self.sharded,
                )
            if found is None:
                self.observer.phase("")
                return
            results[name] = found
        tokens = sum(v.tokens for v in results.values())
        record: dict[str, Any] = {
            "step": self.step,
            "kind": "val",
            "loss": sum(v.loss * v.tokens for v in results.values()) / tokens,
            "tokens": tokens,
        }
        if all(v.bits_per_byte is not None for v in results.values()):
            # Pooled over the sources: bits and bytes are summed, not averaged.
            size = sum(v.loss * v.tokens / math.log(2) / v.bits_per_byte for v in results.values() if v.bits_per_byte)
            record["bits_per_byte"] = sum(v.loss * v.tokens for v in results.values()) / math.log(2) / size
        if all(v.topk_loss is not None for v in results.values()):
            record["topk_loss"] = sum((v.topk_loss or 0.0) * v.tokens for v in results.values()) / tokens
        if len(results) > 1:
            record["sources"] = {n: {"loss": v.loss, "bits_per_byte": v.bits_per_byte} for n, v in results.items()}
        self.validation = {key: record[key] for key in ("loss", "bits_per_byte", "sources") if key in record}
        self.validated_at = self.step
        sinks: list[float] = []
        if self.world.main or self.sharded:
            with self._uncompiled():
                sinks = attention_sinks(self.model, next(iter(self.data.val.values())))
        if self.world.main:
            if sinks:
                record["metrics"] = {"attention/sink": sinks}
            record = _finite(record) | {"seconds": time.perf_counter() - began}
            self.run.log(record)
            self.trackers.log(record)
            self.observer.validated(record)
        self.observer.phase("")
        gc.collect()

    def _log(self, numbers: StepNumbers, batch: StepBatch, seconds: float, waited: float, *, skipped: bool) -> None:
        tokens_per_s = self.config.batch_tokens / seconds
        self._recent = [*self._recent[-19:], (numbers.loss, tokens_per_s)]
        if not self.world.main:
            return
        length = self.config.model.context_length
        record: dict[str, Any] = {
            "step": self.step,
            "kind": "train",
            "tokens": self.sample * length,
            "loss": numbers.loss,
            "grad_norm": numbers.grad_norm,
            "lr": self.optimizer.lr(self.step - 1),
            "grad_norms": numbers.group_norms,
        }
        if numbers.terms:
            record["terms"] = numbers.terms
        metrics = numbers.metrics | self.stepper.utilisation
        if metrics:
            record["metrics"] = metrics
        if isinstance(self.data.samples, Mixture):
            taken = self.data.samples.shares(self.sample)
            record["shares"] = {share.name: share.realised for share in taken}
            record["epochs"] = {share.name: share.epochs for share in taken}
            record["sources"] = {
                name: {"loss": total / (rows * length), "tokens": rows * length}
                for name, total, rows in zip(self.data.samples.names, numbers.sources, batch.source_rows, strict=True)
                if rows  # a small step may hold no row of a rare source
            }
        if not isinstance(self.data.samples, TextStream):  # nobody knows how long a text is before its end
            record["epoch"] = self.data.samples.epoch_of(self.sample)
        if self.scale.enabled:
            record["loss_scale"] = self.scale.scale
        if skipped:
            record["skipped"] = True
        record["time"] = {
            "step_s": seconds,
            "tokens_per_s": tokens_per_s,
            "data_wait_s": waited,
            "save_stall_s": self._save_stall_s,
            "mfu": self._train_flops * tokens_per_s / (self.peak_flops * self.world.size) if self.peak_flops else None,
            "read_s": batch.read_s,
            "gradients_s": self.stepper.times.gradients,
            "optimizer_s": self.stepper.times.optimizer,
            "peak_bytes": machine.peak_memory(self.world.device),
        }
        if isinstance(self.data.samples, TextStream):
            told = self.data.samples.throughput()
            record["time"]["text"] = {key: told[key] for key in ("tokens_per_s", "text_mb_per_s", "wait_s")}
        self._save_stall_s = 0.0
        record = _finite(record)
        self.run.log(record)
        self.trackers.log(record)
        self.observer.step(record)

    def _event(self, kind: str, **fields: Any) -> None:
        if self.world.main:
            self.run.event(kind, **fields)

    # ------------------------------------------------------------------------------------ saving and restoring

    def _snapshot(self) -> Snapshot:
        weights = checkpoint.model_tensors(self.model)
        return Snapshot(
            step=self.step,
            model=parallel.gathered(weights, self.world) if self.sharded else weights,
            optimizer=self.optimizer.state_tensors(),
            state=RunState(
                step=self.step,
                samples=self.sample,
                tokens=self.sample * self.config.model.context_length,
                optimizer=self.optimizer.fingerprint(),
                guard=self.guard.state(),
                loss_scale=self.scale.state(),
                rollbacks=self.rollbacks,
                eager=self.eager and bool(self.config.train.compile),
                validation=_finite(self.validation),
                validated_at=self.validated_at,
                fingerprint=self._fingerprint(),
                world_size=self.world.size,
                source_state=StreamPlace(**self._source_state) if self._source_state is not None else None,
                opening=list(self.data.opening),
                **self.data.identity,
            ).to_json(),
            config=self.config.to_yaml().encode(),
            tokenizer=self.launch.sets.tokenizer,
        )

    def _save(self, *, wait: bool, replace: bool = False) -> LmError | None:
        """Save the present step; the failure of this or an earlier save, None when all is well. Collective."""
        if self._submitted == self.step:
            failure = self.writer.wait()
            if failure is None:
                return None
        self._submitted = self.step
        with self.world.patiently():
            snapshot = self._snapshot()  # collects the parts of the optimizer's state from the ranks
            return self._write(snapshot, wait=wait, replace=replace) if self.world.main else None

    def _write(self, snapshot: Snapshot, *, wait: bool, replace: bool) -> LmError | None:
        self.observer.phase("saving")
        began = time.monotonic()
        before = self.writer.saved
        failure = self.writer.save(snapshot, wait=wait, replace=replace)
        self._save_stall_s = time.monotonic() - began
        self.observer.phase("")
        after = self.writer.saved
        if after is not None and after != before:
            self.observer.saved(after[0], after[1], self.writer.write_s)
        self.stop.reserve_s = 1.5 * (self.writer.write_s + self.writer.stall_s) + 2.0
        return failure

    def _saved_state(self) -> RunState | None:
        return read_state(self.launch.checkpoint) if self.launch.checkpoint is not None else None

    def _restore(self, saved: RunState) -> None:
        folder = self.launch.checkpoint
        assert folder is not None
        if saved.optimizer != self.optimizer.fingerprint():
            raise LmError(
                f"{folder}: the parameter groups of the optimizer are not those that the run began with.",
                hint="This version of the program builds the model differently; start a new run with --out.",
                code=Exit.DATA,
            )
        self._load(folder, saved)

    def _load(self, folder: Path, saved: RunState) -> None:
        if saved.samples is None or saved.samples * self.config.model.context_length != saved.tokens:
            raise LmError(f"{folder / checkpoint.STATE}: samples and tokens disagree.", code=Exit.DATA)
        checkpoint.load_weights(self.model, folder / checkpoint.MODEL)
        self.optimizer.load_state_tensors(read_tensors(folder / checkpoint.OPTIMIZER))
        self.step, self.sample = saved.step, saved.samples
        self.guard.load(saved.guard)
        self.scale.load(saved.loss_scale)
        self.rollbacks = saved.rollbacks
        self.eager |= saved.eager
        self.validation = saved.results

    def _roll_back(self, batch: StepBatch) -> None:
        """Return to an older checkpoint and leave out the data around the spike."""
        guard = self.guard.config
        self.writer.wait()
        steps = [
            path
            for path in checkpoint.steps_on_disk(self.run.checkpoints)
            if (checkpoint.step_of(path) or 0) <= self.step - guard.rollback_steps and checkpoint.is_sound(path)
        ]
        if not steps:
            raise LmError(
                f"a spike at step {self.step + 1}, and no checkpoint is at least {guard.rollback_steps} steps older.",
                hint="Save more often (train.checkpoint.every_steps), or use --set train.guard.on_spike=skip.",
                code=Exit.DIVERGED,
            )
        target, spiked = steps[0], self.step
        saved = read_state(target)
        after = batch.first_sample + guard.skip_steps * self.shape.rows
        rollbacks = self.rollbacks + 1
        if self.world.main:
            for path in checkpoint.steps_on_disk(self.run.checkpoints):
                if (checkpoint.step_of(path) or 0) > saved.step:
                    storage.delete_directory(path)  # they belong to the course that is given up
            self.run.cut_metrics(saved.step)
        self._load(target, saved)
        self.sample, self.rollbacks = after, rollbacks
        self.writer.saved = None
        self.writer.verified = {s for s in self.writer.verified if s <= self.step}
        self._event("rollback", spike_at=spiked + 1, back_to=self.step, next_sample=after)
        self.observer.note(f"back at step {self.step:,}; {guard.skip_steps:,} steps of data are left out")
        self._submitted = -1
        failure = self._save(wait=True, replace=True)  # the checkpoint knows of the rollback: a kill does not undo it
        if failure is not None:
            raise failure
        self.world.barrier()

    # ------------------------------------------------------------------------------------ words

    def _fingerprint(self) -> dict[str, Any]:
        return machine.fingerprint(self.world.device) | {
            "compile": bool(self.config.train.compile),
            "dtype": self.config.train.dtype,
            "reduce": self.config.train.reduce,
            "shard": "full" if self.sharded else "none",
            "lanes": self.shape.lanes,
            "micro_batch": self.shape.micro,
            "world_size": 1 if self.config.train.reduce == "exact" else self.world.size,
        }

    def _info(self) -> RunInfo:
        config, train = self.config, self.config.train
        plan = plan_model(config.model)
        return RunInfo(
            run_dir=self.run.path,
            total_steps=self.total,
            first_step=self.step,
            batch_tokens=config.batch_tokens,
            context_length=config.model.context_length,
            device=machine.device_name(self.world.device) if self.world.device.type != "cpu" else "cpu",
            dtype=train.dtype,
            dtype_reason=self.dtype_reason,
            compiled=bool(train.compile),
            world_size=self.world.size,
            parameters=plan.parameters,
            active_parameters=plan.active,
            peak_flops=self.peak_flops * self.world.size,
            peak_source=self.peak_source,
            train_flops=plan.train_flops,
            train_tokens=self.data.n_tokens,
            groups=[dict(row) for row in self.optimizer.table()],
            log_every=train.log.every_steps,
        )

    def _result(self, reason: Reason, path: Path | None) -> RunResult:
        finite = [loss for loss, _ in self._recent if math.isfinite(loss)]
        speeds = sorted(speed for _, speed in self._recent)
        samples = self.data.samples if hasattr(self, "data") else None  # nothing was opened where nothing is left
        return RunResult(
            run_dir=self.run.path,
            reason=reason,
            step=self.step,
            total_steps=self.total,
            checkpoint=path,
            signal=self.stop.number,
            loss=sum(finite) / len(finite) if finite else None,
            validation=self.validation,
            tokens_per_s=speeds[len(speeds) // 2] if speeds else None,
            seconds=time.monotonic() - self._began,
            save_s=self.writer.write_s if hasattr(self, "writer") else 0.0,
            sources=tuple(samples.shares(self.sample)) if isinstance(samples, Mixture) else (),
        )


# ---------------------------------------------------------------------------------------- small parts


def _timed_next(batches: Iterator[StepBatch]) -> tuple[StepBatch, float]:
    began = time.perf_counter()
    batch = next(batches)
    return batch, time.perf_counter() - began


def _chained(first: StepBatch, rest: Iterator[StepBatch]) -> Iterator[StepBatch]:
    yield first
    yield from rest


def _freeze_garbage() -> None:
    """The objects of the set-up live as long as the run: looking at them again costs half a second each time."""
    gc.collect()
    gc.freeze()
    gc.disable()


def _thaw_garbage() -> None:
    gc.unfreeze()
    gc.enable()


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
