"""Optional trackers: TensorBoard and Weights & Biases. metrics.jsonl is written whatever they do.

A tracker that cannot start or that fails later is reported once and left alone: it never stops a run. Keys come from
the environment of the tracker itself and are never read or stored here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from lmcore.training.config import RunConfig


class Tracker(Protocol):
    """Receives flat numbers per step."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run."""

    def __init__(
        self, trackers: dict[str, Tracker] | None = None, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        self._trackers = trackers or {}
        self._warn = warn

    @classmethod
    def make(cls, config: RunConfig, run_dir: Path, warn: Callable[[str], None]) -> Trackers:
        """The trackers that the configuration asks for, as far as they can be had."""
        wanted: list[tuple[str, Callable[[], Tracker]]] = []
        log = config.train.log
        if log.tensorboard:
            wanted.append(("tensorboard", lambda: _TensorBoard(run_dir)))
        if log.wandb:
            wanted.append(("wandb", lambda: _Wandb(str(log.wandb), run_dir, config)))
        made: dict[str, Tracker] = {}
        for name, build in wanted:
            try:
                made[name] = build()
            except Exception as error:  # a tracker is a guest: whatever it throws, the run goes on
                hint = f" (install it with: pip install 'lmshards[{name}]')" if isinstance(error, ImportError) else ""
                warn(f"{name} is not used: {type(error).__name__}: {error}{hint}")
        return cls(made, warn)

    def log(self, record: dict[str, Any]) -> None:
        """Pass a line of metrics.jsonl on, flattened: val/loss, train/time/step_s, ..."""
        if not self._trackers:
            return
        values = dict(flat(record))
        for name in list(self._trackers):
            try:
                self._trackers[name].log(values, int(record["step"]))
            except Exception as error:  # see above
                self._warn(f"{name} failed and is left alone from here on: {type(error).__name__}: {error}")
                del self._trackers[name]

    def close(self) -> None:
        """Finish all trackers."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:  # see above
                self._warn(f"{name} could not be closed: {type(error).__name__}: {error}")
        self._trackers = {}


def flat(record: dict[str, Any]) -> list[tuple[str, float]]:
    """('kind/key/inner', number) of every number in a record."""
    kind = str(record.get("kind", "train"))
    found: list[tuple[str, float]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, bool) or value is None:
            return
        if isinstance(value, int | float):
            found.append((prefix, float(value)))
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}/{key}", item)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                walk(f"{prefix}/{index}", item)

    for key, value in record.items():
        if key not in ("step", "kind"):
            walk(f"{kind}/{key}", value)
    return found


class _TensorBoard:
    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, project: str, run_dir: Path, config: RunConfig) -> None:
        import wandb

        self._run = wandb.init(
            project=project, name=run_dir.name, dir=str(run_dir), config=config.model_dump(mode="json"), resume="allow"
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
