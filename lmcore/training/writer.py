"""Writes checkpoints beside the training: the step waits for a copy in memory, a thread does the rest.

One checkpoint is written at a time; a second one waits for the first. What goes wrong on the thread is reported at the
next call: a failed periodic save is a warning, and training goes on with the older checkpoint; a failed final save is
an error.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lmcore.errors import Exit, LmError
from lmcore.training import checkpoint
from lmcore.training.checkpoint import Snapshot


class CheckpointWriter:
    """Saves snapshots into one directory and prunes the old ones."""

    def __init__(
        self,
        checkpoints: Path,
        *,
        keep: int,
        keep_every: int | None,
        background: bool,
        before_commit: Callable[[], None] = lambda: None,
        known: tuple[int, ...] = (),
    ) -> None:
        """before_commit: called before a checkpoint is written (the log must be durable first). known: verified
        steps."""
        self._checkpoints, self._keep, self._keep_every = checkpoints, keep, keep_every
        self._background, self._before_commit = background, before_commit
        # The thread exists from the beginning: when memory runs out, starting one can wait for ever.
        self._jobs: queue.SimpleQueue[Snapshot | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._bug: BaseException | None = None
        if background:
            threading.Thread(target=self._work, name="checkpoint", daemon=True).start()
        self._failure: LmError | None = None
        self.verified: set[int] = set(known)
        self.saved: tuple[int, Path] | None = None
        """Step and directory of the last checkpoint that is on disk."""
        self.stall_s = 0.0
        """How long the last call of `save` kept the training waiting."""
        self.write_s = 0.0
        """How long the last checkpoint took to write."""

    def save(self, snapshot: Snapshot, *, wait: bool = False, replace: bool = False) -> LmError | None:
        """Save; returns the failure of this or (when in the background) of an earlier save, None if all is well."""
        began = time.monotonic()
        failure = self.wait()
        if wait or not self._background:
            self._write(snapshot, replace)
            failure = self.wait() or failure
        else:
            copy = dataclasses.replace(snapshot, model=_copied(snapshot.model), optimizer=_copied(snapshot.optimizer))
            self._idle.clear()
            self._jobs.put(copy)
        self.stall_s = time.monotonic() - began
        return failure

    def wait(self) -> LmError | None:
        """Wait for the save that is under way; its failure, if it failed."""
        self._idle.wait()
        if self._bug is not None:
            raise self._bug
        failure, self._failure = self._failure, None
        return failure

    def close(self) -> None:
        """End the thread when it has done its work."""
        self._jobs.put(None)

    def _work(self) -> None:
        for snapshot in iter(self._jobs.get, None):
            try:
                self._write(snapshot)
            except BaseException as error:  # for whoever waits; a thread that dies in silence loses a checkpoint
                self._bug = error
            del snapshot  # its memory is needed before the next one comes
            self._idle.set()

    def _write(self, snapshot: Snapshot, replace: bool = False) -> None:
        began = time.monotonic()
        try:
            self._before_commit()
            path = checkpoint.save(self._checkpoints, snapshot, replace=replace)
            checkpoint.verify(path)  # read back before anything older is deleted
            self.verified.add(snapshot.step)
            self.saved = (snapshot.step, path)
            checkpoint.prune(self._checkpoints, keep=self._keep, keep_every=self._keep_every, known=self.verified)
        except LmError as error:
            self._failure = error
        except MemoryError:
            self._failure = LmError("there is no memory left to write a checkpoint.", code=Exit.IO)
        except OSError as error:
            from lmcore.errors import from_os_error

            self._failure = from_os_error(error, self._checkpoints, "write")
        self.write_s = time.monotonic() - began


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the host that later steps do not touch."""
    copies = {name: tensor.detach().to("cpu", copy=True, non_blocking=True) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        import torch

        torch.cuda.synchronize()
    return copies
